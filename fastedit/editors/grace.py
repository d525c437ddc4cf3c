"""GRACE: a codebook of inputs and learned outputs beside one projection (Hartvigsen et al. 2023, arXiv 2211.11031).

The query of a prompt is the projection's input at the prompt's last token. If the nearest key covers it, that key's
value takes the place of the projection's output. Only values are trained; keys come from the model as it is, so the
facts of a batch are trained all at once and come out as if they had been edited one after the other.

The published GPT2-XL settings stand at the MLP's input projection (``c_fc``) and are not among the packaged ones:
here the memory is always beside the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import CorruptFile
from ..facts import Fact
from ..memory.base import Decision, Memory, Routes
from ..memory.codebook import Codebook, Expand, Placement, Rules
from ..memory.edit import MemoryEdit
from ..memory.routing import last_token, prompts
from ..models.describe import ModelDescription
from ..models.tokens import pad_batch
from ..progress import progress
from .base import register_editor
from .memory_editor import (
    Learned,
    MemoryEditor,
    TargetRow,
    UpperPass,
    depth_default,
    require_finite,
    together,
)

Replacement = Literal["replace_last", "replace_prompt", "replace_all"]


@dataclass(frozen=True)
class GraceParams:
    """Hyper-parameters of GRACE.

    Attributes:
        layers: the block, one.
        lr: of Adam on a value.
        steps: of Adam for each fact.
        radius: of a new key.
        init: what a value starts from: ``"cold"`` uniform in [0, 1), ``"warm"`` the projection's own output.
        expand: see :class:`fastedit.memory.codebook.Rules`.
        replacement: which outputs a value replaces: ``"replace_last"`` at the prompt's last token,
            ``"replace_prompt"`` at the tokens before it, ``"replace_all"`` everywhere, generated tokens too.
    """

    layers: tuple[int, ...]
    lr: float = 1.0
    steps: int = 100
    radius: float = 1.0
    init: Literal["cold", "warm"] = "cold"
    expand: Expand = "coverage"
    replacement: Replacement = "replace_last"

    def __post_init__(self) -> None:
        choices = {
            "init": ("cold", "warm"),
            "expand": ("coverage", "moving_average"),
            "replacement": ("replace_last", "replace_prompt", "replace_all"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.steps < 1 or self.radius <= 0:
            raise ValueError(f"steps and radius must be positive, got {self.steps} and {self.radius}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """A layer at three quarters of the depth, where the published settings have it."""
        return {"layers": depth_default(description, 0.75)}


class GraceMemory(Memory):
    """A :class:`Codebook` and the facts that made it, so that any of them can be taken out again.

    An edit's content: ``keys`` (n, d_in) in the model's dtype and ``values`` (n, d_out) fp32, a row per fact, and the
    facts' labels and prompt lengths. Taking an edit out undoes the codebook's growth back to it, bit for bit, and
    places the later facts anew.
    """

    method = "grace"
    settings = ("radius", "expand", "replacement")

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.replacement: Replacement = params["replacement"]
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        official = self.profile == "official"
        rules = Rules(self.params["radius"], self.params["expand"], official)
        self.codebook = Codebook(self.d_in, self.d_out, rules)
        self._edits: list[tuple[MemoryEdit, int]] = []  # with the codebook's mark before it

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """The entry whose key is nearest to the input at the last token, if it covers it."""
        column = last_token(tokens)
        index, distance = self.codebook.lookup(
            inputs[torch.arange(len(inputs), device=inputs.device), column]
        )
        return Decision(torch.where(tokens.any(1), index, -1), score=distance)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The entry's value at the places that :attr:`GraceParams.replacement` names."""
        if tokens is None and self.replacement != "replace_all":
            return outputs
        values = self.codebook.values[routes.index.clamp(min=0)][:, None].to(outputs.dtype)
        return torch.where(self.replaced(outputs, tokens)[..., None], values, outputs)

    def replaced(self, outputs: Tensor, tokens: Tensor | None) -> Tensor:
        """(B, T) bool, the positions whose outputs a value replaces; ``tokens`` marks the prompt."""
        columns = torch.arange(outputs.shape[1], device=outputs.device)
        if self.replacement == "replace_all" or tokens is None:
            return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
        last = last_token(tokens)[:, None]
        return columns == last if self.replacement == "replace_last" else columns < last

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Place an edit's facts, in order."""
        tensors, labels, lengths = edit.content, edit.about["labels"], edit.about["prompt_lengths"]
        keys, values = tensors["keys"], tensors["values"]
        n = len(labels)
        if keys.shape != (n, self.d_in) or values.shape != (n, self.d_out) or len(lengths) != n:
            raise CorruptFile(
                f"{edit!r} must hold {n} keys of {self.d_in} and values of {self.d_out}, it has {tuple(keys.shape)} "
                f"and {tuple(values.shape)}"
            )
        device = self.codebook.keys.device
        self._edits.append((edit, self.codebook.mark()))
        for key, value, label, length in zip(
            keys.to(device), values.to(device), labels, lengths, strict=True
        ):
            placement = self.codebook.place(key, value, label, length)
            row = placement.added if placement.row is None else placement.row
            if row is None:
                continue
            if row != placement.added:
                self.codebook.set_value(row, value)
            self.codebook.set_owner(row, edit.id)

    def remove(self, edit_id: str) -> None:
        """Undo the growth back to an edit, and place the later ones anew."""
        position = next(i for i, (edit, _) in enumerate(self._edits) if edit.id == edit_id)
        later = [edit for edit, _ in self._edits[position + 1 :]]
        self.codebook.rollback(self._edits[position][1])
        del self._edits[position:]
        for edit in later:
            self.add(edit)

    def owner(self, index: int) -> str | None:
        """The edit that gave an entry its value last."""
        return self.codebook.owners[index]

    # -- reports ------------------------------------------------------------------------------------

    @property
    def n_facts(self) -> int:
        """Facts in it."""
        return sum(len(edit.about["labels"]) for edit, _ in self._edits)

    @property
    def n_entries(self) -> int:
        """Entries of the codebook."""
        return len(self.codebook)

    @property
    def n_bytes(self) -> int:
        """Bytes of the codebook."""
        return self.codebook.n_bytes

    @property
    def prefill_flops(self) -> int:
        """A difference, a square and a sum for each element of each key."""
        return 3 * len(self.codebook) * self.d_in


class _Visit(NamedTuple):
    """A fact's turn in the scan.

    Attributes:
        placement: what became of it.
        previous: the last fact of the batch before it that has the same entry, if there is one.
        wave: how many such facts there are.
    """

    placement: Placement
    previous: int | None
    wave: int


@register_editor("grace")
class Grace(MemoryEditor):
    """Adds facts to a codebook beside one projection; see the module.

    ``official`` keeps the published port's rules for labels (:class:`fastedit.memory.codebook.Rules`). Serving is the
    same in all profiles: the prompt's last token asks, once.
    """

    Params = GraceParams
    memory_class = GraceMemory

    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Place the facts in turn, then train all their values together."""
        assert isinstance(memory, GraceMemory)
        keys, outputs = self._queries(rows)
        initial = outputs.float() if self.params.init == "warm" else self._cold(outputs, memory)
        mark = memory.codebook.mark()
        try:
            visits = _scan(memory.codebook, rows, keys, initial)
            values = initial.clone()
            for i, visit in enumerate(visits):
                if visit.placement.row is not None:
                    values[i] = memory.codebook.values[visit.placement.row]
        finally:
            memory.codebook.rollback(mark)
        losses = torch.full((len(rows), self.params.steps), float("nan"))
        with progress(total=len(rows), desc="training values", unit="fact", show=self.progress) as bar:
            for number in range(1 + max(visit.wave for visit in visits)):
                wave = [i for i, visit in enumerate(visits) if visit.wave == number]
                for i in wave:
                    if (previous := visits[i].previous) is not None:
                        values[i] = values[previous]
                for batch in together(rows, wave):
                    self._train([rows[i] for i in batch], batch, visits, values, losses, memory)
                    bar.update(len(batch))
        require_finite(losses, facts)
        about = {"labels": [row.target for row in rows], "prompt_lengths": [row.n_prompt for row in rows]}
        measured = {
            "facts": [
                {"action": visit.placement.action, "loss_before": first, "loss_after": last}
                for visit, first, last in zip(
                    visits, losses[:, 0].tolist(), losses[:, -1].tolist(), strict=True
                )
            ]
        }
        self.losses = losses
        return Learned({"keys": keys, "values": values}, about, measured)

    # -- queries ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _queries(self, rows: Sequence[TargetRow]) -> tuple[Tensor, Tensor]:
        """Input (n, d_in) and output (n, d_out) of the projection at each prompt's last token."""
        found: dict[str, Tensor] = {}

        def keep(_module: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            at = torch.arange(len(last), device=out.device), last.to(out.device)
            found["keys"] = args[0].reshape(*ids.shape, -1).to(out.device)[at]
            found["outputs"] = out.reshape(*ids.shape, -1)[at]

        keys: list[Tensor] = [torch.empty(0)] * len(rows)
        outputs = list(keys)
        for batch in together(rows, range(len(rows))):
            cut = [rows[i].ids[: rows[i].n_prompt] for i in batch]
            ids, mask, positions = (t.to(self.runner.device) for t in pad_batch(cut, pad_id=0))
            last = torch.tensor([len(prompt) - 1 for prompt in cut])
            handle = self.projection.module.register_forward_hook(keep)
            try:
                with prompts(self.model, [len(prompt) for prompt in cut]):
                    self.description.decoder(
                        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                    )
            finally:
                handle.remove()
            for place, i in enumerate(batch):
                keys[i], outputs[i] = found["keys"][place], found["outputs"][place]
        found_keys = torch.stack(keys)
        if found_keys.dtype == torch.float64:
            found_keys = found_keys.float()  # look-ups are in float32
        return found_keys, torch.stack(outputs)

    def _cold(self, outputs: Tensor, memory: GraceMemory) -> Tensor:
        """Each fact's own draw, the same whether facts come together or one after the other."""
        first = memory.n_facts + self.seed * 1_000_003
        draws = [
            torch.rand(outputs.shape[1], generator=torch.Generator().manual_seed(first + i))
            for i in range(len(outputs))
        ]
        return torch.stack(draws).to(outputs.device)

    # -- training -----------------------------------------------------------------------------------

    def _train(
        self,
        rows: Sequence[TargetRow],
        places: Sequence[int],
        visits: Sequence[_Visit],
        values: Tensor,
        losses: Tensor,
        memory: GraceMemory,
    ) -> None:
        """Train the values of some facts, all at once; results into ``values`` and ``losses`` at ``places``."""
        last = memory.replacement == "replace_last"
        upper = UpperPass(self.runner, rows, self.layer, [row.key if last else 0 for row in rows])
        columns = torch.arange(upper.real.shape[1], device=upper.real.device)
        prompt = upper.real & (columns <= upper.key[:, None])
        covered = torch.tensor([visits[i].placement.row is not None for i in places], device=prompt.device)
        where = (memory.replaced(upper.outputs, prompt) & covered[:, None]).to(upper.outputs.device)
        value = values[list(places)].to(upper.outputs.device).requires_grad_()
        optimiser = torch.optim.Adam([value], lr=self.params.lr)
        for step in range(self.params.steps):
            with torch.enable_grad():
                put = value[:, None].to(upper.outputs.dtype)
                loss = upper.losses(torch.where(where[..., None], put, upper.outputs))
                (value.grad,) = torch.autograd.grad(loss.sum(), value)
            losses[places, step] = loss.detach().float().cpu()
            optimiser.step()
        values[list(places)] = value.detach().to(values.device)


def _scan(codebook: Codebook, rows: Sequence[TargetRow], keys: Tensor, initial: Tensor) -> list[_Visit]:
    """Place the facts one after the other; the codebook changes."""
    latest: dict[int, int] = {}
    visits: list[_Visit] = []
    for i, (row, key, value) in enumerate(zip(rows, keys, initial, strict=True)):
        placement = codebook.place(key, value, row.target, row.n_prompt)
        previous = latest.get(placement.row) if placement.row is not None else None
        visits.append(_Visit(placement, previous, 0 if previous is None else visits[previous].wave + 1))
        if placement.row is not None:
            latest[placement.row] = i
    return visits
