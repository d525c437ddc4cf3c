"""Fine-tuning of one projection, or several: FT and FT-L (Zhu et al. 2020, as in Meng et al. 2022) and FT-M.

The published loops run the whole model for every step. Nothing below the lowest edited projection depends on the
weights that are trained, so what goes into it and what stands beside it in the residual stream are computed once
for a batch; a step runs from there up. Only the edited weights are differentiated, and the step and its bound are
one pass over them (:func:`fastedit.ops.masked_adam_`). Results equal those of the loop up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..artefacts import Edit, Transaction, stack_of
from ..errors import NumericalError
from ..facts import Fact, validate_facts
from ..models.describe import ModelDescription, Projection
from ..models.runner import BlockCalls, BlockRunner, frozen
from ..models.tokens import pad_batch
from ..ops import MaskedAdamState, masked_adam_
from ..progress import progress
from .base import Editor, register_editor
from .prompts import FactRows, fact_rows
from .stopwatch import Stopwatch
from .token_losses import token_nll

OBJECTIVES = ("target", "prompt_last", "sentence")


@dataclass(frozen=True)
class FineTuneParams:
    """Hyper-parameters of fine-tuning.

    Attributes:
        layers: the blocks whose MLP output projection is trained, ascending.
        steps: passes over the batch at most.
        lr: Adam's learning rate.
        stop_loss: a mini-batch whose loss is below this takes no step; training ends when a pass's mean is.
        epsilon: no weight leaves its original value by more than this (L∞); None for no bound.
        objective: what is averaged over a fact's tokens, then over facts: ``"target"``, the loss of the target's
            tokens after the prompt and the target's own beginning (FT-M; the prompt is masked); ``"prompt_last"``,
            the same tokens, but all read at the prompt's last position; ``"sentence"``, prompt and target alike.
            None takes the method's.
        mini_batch: facts in a step; None takes the whole batch.
        micro_batch: facts in one backward pass; bounds memory, does not change the result.
    """

    layers: tuple[int, ...]
    steps: int = 25
    lr: float = 5e-4
    stop_loss: float = 1e-2
    epsilon: float | None = None
    objective: str | None = None
    mini_batch: int | None = None
    micro_batch: int = 16

    def __post_init__(self) -> None:
        if self.objective not in (None, *OBJECTIVES):
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        for name in ("steps", "mini_batch", "micro_batch"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and (value is not None or name != "mini_batch"):
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        for name in ("lr", "stop_loss", "epsilon"):
            value = getattr(self, name)
            if name == "epsilon" and value is None:
                continue
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, not negative, got {value!r}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """The layer at two thirds of the depth."""
        return {"layers": (min(description.n_layers - 1, int(0.66 * description.n_layers)),)}


@dataclass(frozen=True)
class FineTuneLParams(FineTuneParams):
    """Hyper-parameters of FT-L, which always has a bound.

    Attributes:
        epsilon: as in :class:`FineTuneParams`; the default is that of GPT-2 XL.
    """

    epsilon: float | None = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is None:
            raise ValueError("epsilon must be a number for ft-l, got None: without a bound the method is ft")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Layer 0, and a bound that shrinks with the width as the published ones do, from 2e-3 on."""
        epsilon = min(2e-3, 5e-4 * (1600 / description.hidden_size) ** 2.45)
        return {"layers": (0,), "epsilon": float(f"{epsilon:.2g}")}


@dataclass(frozen=True)
class _Part:
    """Some facts of a batch, run up to the lowest edited projection.

    Attributes:
        facts: their positions in the batch, one for each row.
        keys: (rows, length, d_in), what goes into the projection.
        rest: (rows, length, hidden), the block's output without what the projection adds.
        calls: the arguments of the blocks above.
        scored: flat (row · length + column) positions that are scored.
        token: the ids that they shall give.
        owner: the row of each.
        weight: of each, one over the row's number of them.
    """

    facts: list[int]
    keys: Tensor
    rest: Tensor
    calls: BlockCalls
    scored: Tensor
    token: Tensor
    owner: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Trained:
    """A weight in training, as stored.

    Attributes:
        projection: where it belongs.
        path: its name inside the block.
        master: its value, float32 (float64 for a float64 model).
        centre: what it is kept close to; None if it is not.
        state: Adam's moments.
    """

    projection: Projection
    path: str
    master: Tensor
    centre: Tensor | None
    state: MaskedAdamState

    @property
    def change(self) -> Tensor:
        """(d_out, d_in): what training has added so far."""
        change = self.master - self.projection.weight.detach().to(self.master.dtype)
        return change.T if self.projection.transposed else change


@register_editor("ft")
class FineTune(Editor):
    """Adam on the weight of an MLP output projection until the targets are likely.

    The published FT reads all tokens of a target at the prompt's last position, which is wrong for a target of
    several tokens; the profile ``"official"`` keeps that. Without it, FT's loss is that of FT-M. Biases are not
    trained, though the published code also trains GPT-2's.
    """

    Params: type[Any] = FineTuneParams
    official_objective = "prompt_last"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.runner = BlockRunner(self.model)
        self._restored: dict[str, Tensor] = {}  # original weights that came with a saved state

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> Edit:
        """Write a batch of facts; see :meth:`Editor.edit`.

        Raises:
            NumericalError: the loss is not finite; names the facts.
            ValueError: a weight that has a bound was changed by another method. In either case the model keeps
                its weights.
        """
        checked = validate_facts(facts)
        watch = Stopwatch()
        with frozen(self.model):
            rows = fact_rows(self.tokenizer, checked, ["{}"], self.description.context_length)
            self._require_no_others()
            with Transaction(self.model, self.weight_names) as transaction:
                with watch.stage("prefix"):
                    batches = self._batches(rows)
                with watch.stage("training"):
                    trained = {layer: self._trained(layer) for layer in self.params.layers}
                    losses = self._train(checked, batches, trained)
                with watch.stage("apply"):
                    edit = transaction.commit(self._edit(checked, trained, losses))
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        return edit

    @property
    def objective(self) -> str:
        """The objective of the parameters, or else the method's."""
        method = self.official_objective if self.profile == "official" else "target"
        return self.params.objective or method

    @property
    def weight_names(self) -> list[str]:
        """The output projections of the layers."""
        return [self.description.projection(layer).weight_name for layer in self.params.layers]

    def _edit(self, facts: list[Fact], trained: Mapping[int, _Trained], losses: list[Tensor]) -> Edit:
        ends = zip(losses[0].tolist(), losses[-1].tolist(), strict=True)
        return Edit(
            method=self.method,
            facts=facts,
            params={**vars(self.params), "objective": self.objective},
            seed=self.seed,
            profile=self.profile,
            factors={},
            dense={each.projection.weight_name: each.change for each in trained.values()},
            measured={
                "facts": [
                    {"steps": len(losses), "nll_before": first, "nll_optimised": last} for first, last in ends
                ]
            },
        )

    # -- the bound ----------------------------------------------------------------------------------

    @property
    def _around_original(self) -> bool:
        """Whether weights are kept close to the unedited ones; in the official profile to those before a batch."""
        return self.params.epsilon is not None and self.profile != "official"

    def _require_no_others(self) -> None:
        """A bound around the original weights would take back what other methods have written."""
        if not self._around_original:
            return
        for edit in stack_of(self.model).edits:
            both = sorted({*edit.weight_names} & {*self.weight_names})
            if both and edit.method != self.method:
                raise ValueError(
                    f"{self.method} keeps {both[0]} within {self.params.epsilon} of its original, but the "
                    f"{edit.method} edit {edit.id} has changed it: revert that edit, take other layers, or use the "
                    "profile 'official', whose bound is around the weights that it finds"
                )

    def _original(self, projection: Projection) -> Tensor:
        """The bits before the first edit, as stored."""
        found = self._restored.get(projection.weight_name)
        if found is None:
            found = stack_of(self.model).original(projection.weight_name)
        return projection.weight.detach().clone() if found is None else found

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self._around_original:
            return {}, {}
        projections = [self.description.projection(layer) for layer in self.params.layers]
        return {each.weight_name: self._original(each).contiguous() for each in projections}, {}

    def _load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self._restored = dict(tensors)

    # -- once for a batch ---------------------------------------------------------------------------

    def _trained(self, layer: int) -> _Trained:
        projection = self.description.projection(layer)
        weight = projection.weight.detach()
        work = torch.float64 if weight.dtype == torch.float64 else torch.float32
        master = weight.to(work, copy=True)
        centre = None
        if self.params.epsilon is not None:
            centre = self._original(projection).to(weight.device) if self._around_original else weight.clone()
        named = self.description.blocks[layer].named_parameters()
        path = next(name for name, parameter in named if parameter is projection.weight)
        return _Trained(projection, path, master, centre, MaskedAdamState(master, None))

    def _batches(self, rows: Sequence[FactRows]) -> list[list[_Part]]:
        """The parts of each mini-batch, rows of like length together."""
        size, micro = self.params.mini_batch or len(rows), self.params.micro_batch
        batches = []
        for start in range(0, len(rows), size):
            inside = range(start, min(start + size, len(rows)))
            order = sorted(inside, key=lambda i: len(rows[i].targets[0].ids))
            lots = [order[first : first + micro] for first in range(0, len(order), micro)]
            batches.append([self._part(rows, chosen) for chosen in lots])
        return batches

    @torch.no_grad()
    def _part(self, rows: Sequence[FactRows], chosen: list[int]) -> _Part:
        asked = [_asked(rows[i], self.objective) for i in chosen]
        padded = pad_batch([ids for ids, _, _ in asked], pad_id=0)
        ids, mask, positions = (tensor.to(self.runner.device) for tensor in padded)
        calls = self.runner.capture(ids, mask, positions)
        lowest = self.params.layers[0]
        keys, rest = self._below(calls, self.runner.run(calls, calls.embedded, 0, lowest), lowest)
        width = ids.shape[1]
        scored = [row * width + column for row, (_, columns, _) in enumerate(asked) for column in columns]
        counts = torch.tensor([len(tokens) for _, _, tokens in asked])
        owner = torch.arange(len(asked)).repeat_interleave(counts)
        return _Part(
            chosen,
            keys,
            rest,
            calls,
            torch.tensor(scored),
            torch.tensor([token for _, _, tokens in asked for token in tokens]),
            owner,
            1.0 / counts[owner],
        )

    def _below(self, calls: BlockCalls, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The projection's input, and the block's output if the projection gave nothing."""
        seen: list[Tensor] = []

        def silence(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.append(args[0])
            return torch.zeros_like(out)

        handle = self.description.projection(layer).module.register_forward_hook(silence)
        try:
            rest = self.runner.run(calls, hidden, layer, layer + 1)
        finally:
            handle.remove()
        return seen[0].reshape(*rest.shape[:-1], -1), rest

    # -- steps --------------------------------------------------------------------------------------

    def _train(
        self, facts: Sequence[Fact], batches: list[list[_Part]], trained: Mapping[int, _Trained]
    ) -> list[Tensor]:
        """Train; returns the facts' losses (n,) in each pass, taken before the steps of that pass."""
        history: list[Tensor] = []
        for _ in progress(range(self.params.steps), desc="fine-tuning", unit="pass", show=self.progress):
            losses = torch.zeros(len(facts))
            for parts in batches:
                self._step(facts, parts, trained, losses)
            history.append(losses)
            if float(losses.mean()) < self.params.stop_loss:
                break
        return history

    def _step(
        self, facts: Sequence[Fact], parts: list[_Part], trained: Mapping[int, _Trained], losses: Tensor
    ) -> None:
        """One step of Adam on a mini-batch; its facts' losses are written into ``losses``."""
        inside = [i for part in parts for i in part.facts]
        total: list[Tensor] = []
        for part in parts:
            leaves = {layer: each.master.detach().requires_grad_() for layer, each in trained.items()}
            with torch.enable_grad():
                found = self._losses(part, trained, leaves)
                gradients = torch.autograd.grad(found.sum() / len(inside), list(leaves.values()))
            losses[part.facts] = found.detach().float().cpu()
            total = list(gradients) if not total else [a + b for a, b in zip(total, gradients, strict=True)]
        if not bool(losses[inside].isfinite().all()):
            named = ", ".join(repr(facts[i].text) for i in inside if not math.isfinite(losses[i]))
            raise NumericalError(f"the loss of {named} is not finite: lower lr, or use a wider dtype")
        if float(losses[inside].mean()) < self.params.stop_loss:
            return
        for each, gradient in zip(trained.values(), total, strict=True):
            masked_adam_(
                each.master,
                gradient,
                None,
                each.state,
                lr=self.params.lr,
                clamp_to=each.centre,
                clamp=self.params.epsilon,
            )

    def _losses(self, part: _Part, trained: Mapping[int, _Trained], leaves: Mapping[int, Tensor]) -> Tensor:
        """(rows,) the loss of each fact under the weights ``leaves``."""
        description, lowest = self.description, self.params.layers[0]
        weights = {layer: leaf.to(trained[layer].projection.weight.dtype) for layer, leaf in leaves.items()}
        module = trained[lowest].projection.module
        inner = next(n for n, p in module.named_parameters() if p is trained[lowest].projection.weight)
        added = functional_call(module, {inner: weights[lowest]}, (part.keys,))
        norm = description.post_mlp_norm(lowest)
        hidden = part.rest + (added if norm is None else norm(added)) * description.residual_scale
        for index in range(lowest + 1, description.n_layers):
            if index not in weights:
                hidden = self.runner.run(part.calls, hidden, index, index + 1)
                continue
            args, kwargs = part.calls.arguments[index]
            changed = {trained[index].path: weights[index]}
            out = functional_call(description.blocks[index], changed, (hidden, *args), kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        place = hidden.device
        logits = self.runner.logits(hidden.flatten(0, 1)[part.scored.to(place)]).float()
        weighted = token_nll(logits, part.token.to(logits.device)) * part.weight.to(logits.device)
        zero = torch.zeros(len(part.facts), device=logits.device)
        return zero.index_add(0, part.owner.to(logits.device), weighted)


@register_editor("ft-l")
class FineTuneL(FineTune):
    """FT with every weight kept within ``epsilon`` of its original.

    The bound is around the unedited weights, in the official profile around those before the batch, so that there
    it allows more with every batch. It holds up to the rounding of the model's dtype.
    """

    Params = FineTuneLParams


@register_editor("ft-m")
class FineTuneM(FineTune):
    """FT on the target's own tokens with the prompt masked, in every profile (EasyEdit's FT-M)."""

    official_objective = "target"


def _asked(row: FactRows, objective: str) -> tuple[list[int], list[int], list[int]]:
    """A fact's ids to run, the columns that are scored, and the tokens that they shall give."""
    ids, target = row.targets[0].ids, row.target
    last = len(ids) - len(target)  # of the prompt
    if objective == "prompt_last":
        return ids[: last + 1], [last] * len(target), target
    if objective == "sentence":
        return ids, list(range(len(ids))), [*ids[1:], target[-1]]
    return ids, list(range(last, len(ids))), target
