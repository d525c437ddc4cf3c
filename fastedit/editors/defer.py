"""DEFER: a gate and a linear predictor beside one projection (a baseline of Hartvigsen et al. 2023, after SERAC).

The gate g(h) = σ(a·h + b) looks at the projection's input h at the prompt's last token. Where it is at least one
half, every output of the projection is o(h) = C h + c. Both are trained on the edits alone, without any example that
the memory should leave alone, so the gate drifts open: the method is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CorruptFile
from ..facts import Fact
from ..memory.base import Decision, Memory, Routes
from ..memory.edit import MemoryEdit
from ..memory.routing import last_token
from ..models.describe import ModelDescription
from ..progress import progress
from .base import register_editor
from .memory_editor import (
    Learned,
    MemoryEditor,
    TargetRow,
    UpperPass,
    depth_default,
    require_finite,
    target_rows,
    together,
)

_NAMES = ("gate_weight", "gate_bias", "value_weight", "value_bias")


@dataclass(frozen=True)
class DeferParams:
    """Hyper-parameters of DEFER.

    Attributes:
        layers: the block, one.
        lr: of Adam on gate and predictor.
        steps: of Adam for each batch.
    """

    layers: tuple[int, ...]
    lr: float = 7e-5
    steps: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """A layer at three quarters of the depth, as for GRACE."""
        return {"layers": depth_default(description, 0.75)}


class DeferMemory(Memory):
    """Gate (d_in → 1) and predictor (d_in → d_out), fp32. An edit's content is all of it after the edit."""

    method = "defer"
    whole_state = True

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.clear()

    def clear(self) -> None:
        """Go back to the initial values: uniform in ±1/√d_in, as of a fresh linear layer."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) / self.d_in**0.5

        self.state = {
            "gate_weight": draw(1, self.d_in),
            "gate_bias": draw(1),
            "value_weight": draw(self.d_out, self.d_in),
            "value_bias": draw(self.d_out),
        }

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """0 where the gate at the last token is at least one half; the prediction is kept for later calls."""
        self.state = {name: tensor.to(inputs.device) for name, tensor in self.state.items()}
        rows = torch.arange(len(inputs), device=inputs.device)
        gate, value = gate_and_value(inputs[rows, last_token(tokens)], self.state)
        index = torch.where((gate >= 0.5) & tokens.any(1), 0, -1)
        return Decision(index, payload=value, score=gate)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The prediction, at every position."""
        assert routes.payload is not None
        return routes.payload.to(outputs)[:, None].expand(outputs.shape)

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Take over the state after the edit."""
        content = edit.content
        wrong = [
            name for name in _NAMES if name not in content or content[name].shape != self.state[name].shape
        ]
        if wrong:
            raise CorruptFile(f"{edit!r} lacks {', '.join(wrong)} in the shape that this projection needs")
        self.state = {name: content[name].float().clone() for name in _NAMES}

    # -- reports ------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """One predictor."""
        return 1

    @property
    def n_bytes(self) -> int:
        """Bytes of gate and predictor."""
        return sum(tensor.nbytes for tensor in self.state.values())

    @property
    def prefill_flops(self) -> int:
        """A product with the gate and the predictor."""
        return 2 * self.d_in * (self.d_out + 1)


def gate_and_value(queries: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """g(h) (B,) and o(h) (B, d_out), fp32, of queries (B, d_in)."""
    queries = queries.float()
    gate = torch.sigmoid(F.linear(queries, state["gate_weight"], state["gate_bias"]))[:, 0]
    return gate, F.linear(queries, state["value_weight"], state["value_bias"])


@register_editor("defer")
class Defer(MemoryEditor):
    """Trains gate and predictor on every batch, on top of what the batches before left.

    ``official`` takes the last token of the target for the query in training, as the published port does; else it is
    the last token of the prompt, as at inference.
    """

    Params = DeferParams
    memory_class = DeferMemory

    def rows(self, facts: Any) -> list[TargetRow]:
        """With the whole target in ``official``, whose query is its last token."""
        return target_rows(
            self.tokenizer,
            facts,
            self.description.context_length,
            whole_target=self.profile == "official",
        )

    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Minimise the mean over the facts of their targets' loss under g·o(h) + (1 − g)·y at all positions."""
        assert isinstance(memory, DeferMemory)
        parts = [
            (batch, UpperPass(self.runner, [rows[i] for i in batch], self.layer, [0] * len(batch)))
            for batch in together(rows, range(len(rows)))
        ]
        device = parts[0][1].inputs.device
        state = {name: tensor.to(device).clone().requires_grad_() for name, tensor in memory.state.items()}
        optimiser = torch.optim.Adam(state.values(), lr=self.params.lr)
        losses = torch.full((len(rows), self.params.steps), float("nan"))
        gates = torch.full((len(rows),), float("nan"))
        for step in progress(range(self.params.steps), desc="training", unit="step", show=self.progress):
            optimiser.zero_grad()
            for batch, upper in parts:
                with torch.enable_grad():
                    gate, loss = self._losses(upper, state)
                    (loss.sum() / len(rows)).backward()
                losses[batch, step], gates[batch] = loss.detach().float().cpu(), gate.detach().cpu()
            optimiser.step()
        require_finite(losses, facts)
        measured = [
            {"loss_before": first, "loss_after": last, "gate": gate}
            for first, last, gate in zip(
                losses[:, 0].tolist(), losses[:, -1].tolist(), gates.tolist(), strict=True
            )
        ]
        return Learned({name: tensor.detach() for name, tensor in state.items()}, {}, {"facts": measured})

    def _losses(self, upper: UpperPass, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows' gates and losses."""
        column = upper.real.sum(1) - 1 if self.profile == "official" else upper.key
        at = torch.arange(len(column), device=upper.inputs.device), column.to(upper.inputs.device)
        gate, value = gate_and_value(upper.inputs[at], state)
        gate = gate[:, None, None]
        return gate[:, 0, 0], upper.losses(gate * value[:, None] + (1 - gate) * upper.outputs.float())
