"""Everything below an adapter of EasyEdit's, run once: training then takes the blocks from the adapter's own on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models.runner import BlockRunner
from ..locate import covering
from ..patching import NotCovered

_INPUTS = {"input_ids", "attention_mask", "labels"}


class FrozenBlocks:
    """The hidden states that enter the block of an adapter, for rows that are trained on.

    Args:
        model: the model, with the adapter in the place of one of its modules; in evaluation mode.
        adapter: the module that is trained; its ``layer`` is the module it stands for.
        tokens: what the original calls the model with.

    Attributes:
        runner: the model's blocks.
        layer: the block that holds the adapter.
        hidden: (rows, length, hidden) at its entry.
        ids: (rows, length).

    Raises:
        NotCovered: a model that our runner does not know, inputs besides ids, mask and labels, or a hook.
    """

    def __init__(self, model: nn.Module, adapter: Any, tokens: Mapping[str, Tensor]) -> None:
        others = sorted(set(tokens) - _INPUTS)
        if others:
            raise NotCovered(f"the model is given {', '.join(others)}")
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise NotCovered("a module of the model has a forward hook")
        with covering():
            self.runner = BlockRunner(model)
            blocks = self.runner.description.blocks
            if any(block.training for block in blocks):
                raise NotCovered("the model is in training mode")
            inside = [n for n, block in enumerate(blocks) if any(each is adapter for each in block.modules())]
            if len(inside) != 1:
                raise NotCovered("the adapter is not part of one decoder block")
            self.layer = inside[0]
            self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
            self.positions = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
            # the adapter itself must not see these passes: GRACE's draws random numbers whenever it is called
            with torch.no_grad(), forward_replaced(adapter, adapter.layer):
                calls = self.runner.capture(self.ids, self.mask, self.positions)
                self.hidden = self.runner.run(calls, calls.embedded, 0, self.layer)

    def above(self, rows: int | None = None) -> Callable[[], Tensor]:
        """A function that runs the first ``rows`` rows from the adapter's block to the last, with gradients.

        It returns (rows · length, hidden) before the final norm.
        """
        calls = self.runner.capture(self.ids[:rows], self.mask[:rows], self.positions[:rows])
        hidden, last = self.hidden[:rows], self.runner.description.n_layers

        def run() -> Tensor:
            return self.runner.run(calls, hidden, self.layer, last).reshape(-1, hidden.shape[-1])

        return run

    @torch.no_grad()
    def inputs_of(self, adapter: nn.Module) -> Tensor:
        """(rows, length, d_in): what enters the adapter."""
        seen: list[Tensor] = []

        def keep(*args: Any) -> Tensor:
            seen.append(args[0].clone())
            raise _Enough

        with forward_replaced(adapter, keep):
            try:
                calls = self.runner.capture(self.ids, self.mask, self.positions)
                self.runner.run(calls, self.hidden, self.layer, self.layer + 1)
            except _Enough:
                pass
        return seen[0]


class _Enough(Exception):
    """The adapter has been reached."""


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, a module computes something else."""
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
