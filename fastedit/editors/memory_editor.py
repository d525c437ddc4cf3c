"""What memory editors share: rows of prompts and targets, the frozen part of the model run once, edits committed.

Nothing below the wrapped projection depends on what is trained, so it is run once per batch. Each step then runs
only the blocks above it, and of a row only the positions from the first that the memory changes: those before keep
the keys and values that they had.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidFact, NumericalError
from ..facts import Fact, validate_facts
from ..memory.base import Memory, Place
from ..memory.edit import Base, MemoryEdit
from ..memory.routing import prompts
from ..memory.side_module import SideModule, find_side
from ..models.describe import ModelDescription, Projection
from ..models.runner import BlockCalls, BlockRunner, Prefix, frozen
from ..models.tokens import encode_prompt, pad_batch, target_ids
from .base import Editor, editor_class
from .stopwatch import Stopwatch

_TOKENS_TOGETHER = 4096  # of the rows that are trained in one batch


@dataclass(frozen=True)
class TargetRow:
    """A fact as token ids.

    Attributes:
        ids: prompt and target; the last token of the target is left out unless it was asked for.
        n_prompt: tokens of the prompt, BOS included.
        target: ids of the target.
    """

    ids: list[int]
    n_prompt: int
    target: list[int]

    @property
    def key(self) -> int:
        """Index of the prompt's last token."""
        return self.n_prompt - 1


def target_rows(
    tokenizer: Any, facts: Sequence[Fact], context_length: int | None, *, whole_target: bool = False
) -> list[TargetRow]:
    """Tokenise facts as they will be asked: the prompt as a text to be continued, the target as its continuation.

    Args:
        tokenizer: a Hugging Face tokenizer.
        facts: the batch.
        context_length: the model's, or None if it has no limit.
        whole_target: keep the target's last token in the row, which no loss needs.

    Raises:
        InvalidFact: a prompt or target without tokens, or a row longer than the model's context; names the fact.
    """
    rows = []
    for fact in facts:
        prompt = encode_prompt(tokenizer, fact.text)
        try:
            target = target_ids(tokenizer, fact.target)
        except ValueError as error:
            raise InvalidFact(f"{fact.text!r}: {error}") from None
        if not prompt:
            raise InvalidFact(f"the prompt {fact.text!r} has no tokens")
        ids = [*prompt, *(target if whole_target else target[:-1])]
        if context_length is not None and len(ids) > context_length:
            raise InvalidFact(
                f"{fact.text!r} with its target takes {len(ids)} tokens, the model's context holds {context_length}"
            )
        rows.append(TargetRow(ids, len(prompt), target))
    return rows


class UpperPass:
    """Rows run once up to a projection, so that what it puts out can be replaced again and again.

    Args:
        runner: the model, frozen and in evaluation mode. Its other memories take part below the projection.
        rows: at least one.
        layer: the projection's block.
        starts: per row the first position whose output will be replaced; earlier ones keep their keys and values.
        place: ``"mlp"`` looks at the whole MLP in the projection's place: its input, and the same output.

    Attributes:
        inputs: (rows, length, d_in), what the projection is given, from each row's start on.
        outputs: (rows, length, d_out), what it returns.
        real: (rows, length) bool, False at padding (rows are padded on the right).
        key: (rows,) column of the prompt's last token; negative if it lies before the start.
        target: (targets,) the tokens of all rows' targets.
    """

    @torch.no_grad()
    def __init__(
        self,
        runner: BlockRunner,
        rows: Sequence[TargetRow],
        layer: int,
        starts: Sequence[int],
        place: Place = "projection",
    ) -> None:
        self.runner, self.layer = runner, layer
        self.description = runner.description
        ids, mask, positions = (t.to(runner.device) for t in pad_batch([row.ids for row in rows], pad_id=0))
        first = torch.tensor(starts, device=ids.device)
        left = torch.tensor([len(row.ids) for row in rows], device=ids.device) - first
        offsets = torch.arange(int(left.max()), device=ids.device)
        columns = (first[:, None] + offsets).clamp(max=ids.shape[1] - 1)
        self.real = offsets < left[:, None]
        self.key = torch.tensor([row.key for row in rows], device=ids.device) - first

        seen: dict[str, Tensor] = {}

        # Indexing copies, which matters: some models add to these tensors in place further on.
        def keep_block(_module: object, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
            seen["states"] = _at(out[0] if isinstance(out, tuple) else out, columns)

        def keep_projection(_module: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen["inputs"] = _at(args[0].reshape(*ids.shape, -1), columns)
            seen["outputs"] = _at(out.reshape(*ids.shape, -1), columns)

        projection = self.description.projection(layer).module
        hooks = [
            (self.description.blocks[layer], keep_block),
            (projection if place == "projection" else self.description.mlp(layer), keep_projection),
        ]
        with prompts(runner.model, [row.n_prompt for row in rows]):
            _, pairs = runner.record(ids, mask, positions, hooks)
        self.inputs, self.outputs, self._states = seen["inputs"], seen["outputs"], seen["states"]
        self._added = self._contribution(self.outputs).float()
        self._calls = BlockCalls(self._states, [])
        if layer + 1 < self.description.n_layers:
            live = self.real.long()
            prefix = Prefix.before(first, pairs, layer + 1) if max(starts) > 0 else None
            whole = live if prefix is None else torch.cat((prefix.mask, live), 1)
            places = (first[:, None] + offsets) * live
            self._calls = runner.capture(torch.gather(ids, 1, columns), whole, places, prefix)
        self._score_at(rows, starts)

    def losses(self, outputs: Tensor) -> Tensor:
        """(rows,) fp32, the mean negative log-likelihood of each row's target tokens.

        Args:
            outputs: (rows, length, d_out), what the projection shall return; differentiable.
        """
        log_p = self.log_probabilities(outputs)
        picked = -log_p.gather(1, self.target.to(log_p.device)[:, None])[:, 0]
        total = torch.zeros(len(self.inputs), device=picked.device)
        total = total.index_add(0, self._row.to(picked.device), picked * self._weight.to(picked.device))
        return total.to(self.inputs.device)

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """(targets, vocabulary) fp32, at the positions that predict :attr:`target`; see :meth:`losses`."""
        moved = self._states.float() + (self._contribution(outputs).float() - self._added)
        hidden = moved.to(self._states.dtype)
        flat = self.runner.states_at(self._calls, hidden, self.layer + 1, self._scored)
        return F.log_softmax(self.runner.logits(flat).float(), dim=-1)

    def _contribution(self, outputs: Tensor) -> Tensor:
        """What the projection's outputs add to the residual stream."""
        norm = self.description.post_mlp_norm(self.layer)
        outputs = outputs.to(self._states.dtype)
        return (outputs if norm is None else norm(outputs)) * self.description.residual_scale

    def _score_at(self, rows: Sequence[TargetRow], starts: Sequence[int]) -> None:
        scored: list[int] = []
        token: list[int] = []
        row_of: list[int] = []
        weight: list[float] = []
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            n, begin = len(row.target), number * self.inputs.shape[1] + row.key - start
            scored += range(begin, begin + n)
            token += row.target
            row_of += [number] * n
            weight += [1.0 / n] * n
        device = self.inputs.device
        self._scored, self.target, self._row = (
            torch.tensor(x, device=device) for x in (scored, token, row_of)
        )
        self._weight = torch.tensor(weight, device=device)


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Hidden (rows, length, d) at columns (rows, m): a copy (rows, m, d)."""
    columns = columns.to(hidden.device)
    return hidden[torch.arange(len(columns), device=hidden.device)[:, None], columns]


def together(rows: Sequence[TargetRow], chosen: Sequence[int]) -> Iterator[list[int]]:
    """The chosen rows in batches of like length that are trained together."""
    batch: list[int] = []
    for position in sorted(chosen, key=lambda i: len(rows[i].ids)):
        if batch and (len(batch) + 1) * len(rows[position].ids) > _TOKENS_TOGETHER:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


@dataclass
class Learned:
    """What a method learned from a batch.

    Attributes:
        tensors: by name; what :meth:`fastedit.memory.Memory.add` will find.
        about: anything else that JSON can hold.
        measured: for the report.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


class MemoryEditor(Editor):
    """Base of editors that leave the weights alone and put a memory beside one projection.

    A method gives its :attr:`memory_class`, its hyper-parameters (with ``layers``, one of them) and :meth:`learn`.
    """

    memory_class: ClassVar[type[Memory]]

    def __init__(self, model: nn.Module, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if len(self.params.layers) != 1:
            raise ValueError(f"{self.method} stands beside one layer, got layers {self.params.layers}")
        self.layer: int = self.params.layers[0]
        self.projection: Projection = self.description.projection(self.layer)
        self.runner = BlockRunner(model)

    @property
    def side(self) -> SideModule | None:
        """The memory on the model; None before the first edit and after the last was taken off."""
        return find_side(self.model, self.layer, self.method)

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> MemoryEdit:  # type: ignore[override]
        """Write a batch of facts into the memory; see :meth:`Editor.edit`."""
        checked = validate_facts(facts)
        watch = Stopwatch()
        rows = self.rows(checked)
        side = self.side
        memory = self.new_memory() if side is None else side.memory
        with ExitStack() as stack:
            stack.enter_context(watch.stage("train"))
            stack.enter_context(frozen(self.model))
            if side is not None:
                stack.enter_context(side.suspended())
            learned = self.learn(checked, rows, memory)
        with watch.stage("apply"):
            edit = MemoryEdit(
                method=self.method,
                facts=checked,
                layer=self.layer,
                tensors=learned.tensors,
                about=learned.about,
                params=vars(self.params),
                seed=self.seed,
                profile=self.profile,
                base=Base.of(self.model, self.layer),
                beneath=() if side is None else tuple(each.id for each in side.edits),
                measured=learned.measured,
            )
            edit._join(self.model)
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        edit.measured.update(self.overhead())
        return edit

    def rows(self, facts: Sequence[Fact]) -> list[TargetRow]:
        """The facts as token ids; see :func:`target_rows`."""
        return target_rows(self.tokenizer, facts, self.description.context_length)

    @abstractmethod
    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Train on a batch. The model is frozen and its memory suspended.

        Args:
            facts: the batch, named in errors.
            rows: the same, as ids.
            memory: what is there, to be left as it is: the result is put into it afterwards.
        """

    def new_memory(self) -> Memory:
        """An empty memory for this editor's projection and settings."""
        return self.memory_class(
            self.memory_class.input_width(self.projection),
            self.projection.d_out,
            vars(self.params),
            self.profile,
            self.seed,
        )

    def overhead(self) -> dict[str, Any]:
        """Size of the memory, and its work beside that of the model."""
        side = self.side
        if side is None:
            return {}
        memory = side.memory
        per_token = 2 * sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "memory_entries": memory.n_entries,
            "memory_bytes": memory.n_bytes,
            "prefill_flops": memory.prefill_flops,
            "token_flops": memory.token_flops,
            "token_overhead": memory.token_flops / per_token,
        }


def memory_class(method: str) -> type[Memory]:
    """The memory of a method."""
    kind: type[Memory] | None = getattr(editor_class(method), "memory_class", None)
    if kind is None:
        raise ValueError(f"{method} is no memory editor")
    return kind


def memory_for(edit: MemoryEdit, projection: Projection) -> Memory:
    """An empty memory of the kind that an edit belongs to."""
    kind = memory_class(edit.method)
    return kind(kind.input_width(projection), projection.d_out, edit.params, edit.profile, edit.seed)


def require_finite(losses: Tensor, facts: Sequence[Fact]) -> None:
    """Make sure that training went well: losses (facts, steps).

    Raises:
        NumericalError: a loss is not finite; names the fact. Nothing was changed.
    """
    wrong = (~losses.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        named = ", ".join(repr(facts[i].text) for i in wrong)
        raise NumericalError(f"the loss of {named} stopped being finite: lower lr, or use a wider dtype")


def depth_default(description: ModelDescription, fraction: float) -> tuple[int, ...]:
    """One layer at a fraction of the depth, never the last if there is another."""
    return (max(0, min(int(fraction * description.n_layers), description.n_layers - 2)),)
