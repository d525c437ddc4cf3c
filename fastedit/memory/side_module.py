"""A memory beside one projection of a model, attached by a hook: parameters keep their names and their bits.

The projection itself always runs. Where a sample is routed into the memory, its output is replaced; a batch in which
nothing is routed keeps the very tensor that the projection returned. ``save_pretrained`` writes the base weights as
ever. The hooks are bound methods, so a deep copy of the model has memories of its own, and tensors follow the inputs'
device when they are used, so ``model.to`` and device maps need nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FasteditError
from ..models.describe import describe
from .base import Memory, Routes
from .edit import MemoryEdit
from .routing import Key, Router, router_of, routers_of, unhook


class SideModule:
    """One memory at one projection, and the edits that are in it.

    Attributes:
        memory: the method's part.
        layer: the block; None for a memory that answers for the whole model.
        name: dotted name of the projection.
        edits: oldest first.
    """

    def __init__(self, memory: Memory, layer: int | None, name: str, router: Router) -> None:
        self.memory, self.layer, self.name, self.router = memory, layer, name, router
        self.above = [UpperSite(self, upper) for upper in memory.upper_layers]
        self.edits: list[MemoryEdit] = []
        self.enabled = True

    @property
    def key(self) -> Key:
        """What routes are kept under."""
        return self.name, self.memory.method

    @torch.compiler.disable
    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the projection."""
        call = self.router.call
        if call is None or not self.enabled:
            return None
        routes = call.routes(self.key, self.memory)
        if routes is not None and not routes.used:
            return None
        outputs = output.reshape(*call.size, self.memory.d_out)
        inputs = args[0].reshape(*call.size, self.memory.d_in).to(outputs.device)
        tokens = None
        if routes is None:
            tokens = call.tokens(self.memory.route_tokens, outputs.device)
            read = inputs if self.memory.reads == "states" else call.ids(self.memory.method)
            routes = self._decide(read, outputs, tokens)
            self.router.note(self.key, routes, call)
        if not routes.used:
            return None
        new = self.memory.apply(inputs, outputs, routes, tokens)
        return None if new is outputs else _merged(new, outputs, routes).reshape(output.shape)

    @torch.no_grad()
    def _decide(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Routes:
        return Routes.of(self.memory.route(inputs, outputs, tokens), self.memory.version)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The model without this memory."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def sites(self) -> list[SideModule | UpperSite]:
        """What has a hook, its own place first."""
        return [self, *self.above]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that the hooks of :attr:`sites` are on; not for a memory of the whole model."""
        assert self.layer is not None
        description = describe(model)
        own = description.projection(self.layer).module
        if self.memory.place == "mlp":
            own = description.mlp(self.layer)
        return [own, *(description.projection(site.layer).module for site in self.above)]

    # -- edits --------------------------------------------------------------------------------------

    def push(self, edit: MemoryEdit) -> None:
        """Put an edit on top."""
        self.memory.add(edit)
        self.memory.version += 1
        self.edits.append(edit)
        if self.memory.whole_state and len(self.edits) > 2:
            self.edits[-3].release()  # the two newest states are enough to take the newest off

    def remove(self, edit_id: str) -> MemoryEdit:
        """Take one edit off.

        Raises:
            FasteditError: the memory cannot give this one back. Nothing changes.
        """
        position = [edit.id for edit in self.edits].index(edit_id)
        edit, memory = self.edits[position], self.memory
        if memory.whole_state:
            self._tell_apart(position)
            memory.clear()
            memory.add([each for each in self.edits if each is not edit][-1])
        else:
            memory.remove(edit_id)
        memory.version += 1
        del self.edits[position]
        return edit

    def _tell_apart(self, position: int) -> None:
        """Let the other edits' contents be without that of one; two at the least."""
        edit, below, above = (
            self.edits[position],
            self.edits[max(position - 1, 0)],
            self.edits[position + 1 :],
        )
        if not above and not below.released:
            return
        holders = [each for each in above if not each.released]
        left = [self.memory.without(each, edit) for each in holders or [edit]]
        for each, content in zip(holders or [below], left, strict=True):
            each.take_over(content, edit)


class UpperSite:
    """Where a memory answers above its own place, by the routes that were decided there.

    Attributes:
        side: the memory's own place.
        layer: the block.
    """

    def __init__(self, side: SideModule, layer: int) -> None:
        self.side, self.layer = side, layer

    @torch.compiler.disable
    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the projection."""
        call, memory = self.side.router.call, self.side.memory
        if call is None or not self.side.enabled:
            return None
        routes = call.decided.get(self.side.key) or call.known.get(self.side.key)
        if routes is None or not routes.used:
            return None
        outputs = output.reshape(*call.size, -1)
        inputs = args[0].reshape(*call.size, -1).to(outputs.device)
        new = memory.apply_above(self.layer, inputs, outputs, routes)
        return _merged(new, outputs, routes).reshape(output.shape)


def _merged(new: Tensor, outputs: Tensor, routes: Routes) -> Tensor:
    """New outputs for routed samples, the very bits of the old ones for the others."""
    if routes.all_routed:
        return new.to(outputs.dtype)
    routed = (routes.index >= 0).to(outputs.device)[:, None, None]
    return torch.where(routed, new.to(outputs.dtype), outputs)


def sides_of(model: nn.Module) -> list[SideModule]:
    """The memories of a model, in the order they were attached; empty if it has none."""
    return [side for router in routers_of(model) for side in router.sides]


def find_side(model: nn.Module, layer: int | None, method: str) -> SideModule | None:
    """The memory of a method at a block's projection (None: of the whole model), if the model has it."""
    return next((s for s in sides_of(model) if s.layer == layer and s.memory.method == method), None)


def attach(model: nn.Module, layer: int | None, memory: Memory) -> SideModule:
    """Put a memory beside the output projection of block ``layer``; None puts one beside the whole model.

    Raises:
        IndexError: no such block.
        FasteditError: a memory of this method is there already.
        ValueError: the memory is for a projection of another shape.
        TypeError: the memory stands at a block, not beside the whole model.
    """
    if layer is None:
        return memory.attach_to(model)
    projection = describe(model).projection(layer)
    if find_side(model, layer, memory.method) is not None:
        raise FasteditError(f"{projection.name} has a {memory.method} memory already")
    d_in = memory.input_width(projection)
    if (memory.d_in, memory.d_out) != (d_in, projection.d_out):
        raise ValueError(
            f"the memory is for a projection from {memory.d_in} to {memory.d_out}, {projection.name} maps "
            f"{d_in} to {projection.d_out}"
        )
    memory.attached_to(model, projection, layer)
    router = router_of(model, make=True)
    assert router is not None
    side = SideModule(memory, layer, projection.name, router)
    for module, site in zip(side.modules(model), side.sites, strict=True):
        module.register_forward_hook(site.hook)
    router.sides.append(side)
    return side


def detach(model: nn.Module, side: SideModule) -> None:
    """Take a memory off a model; without any the model is exactly as it was before the first."""
    for site in side.sites:
        unhook(model, site)
    side.router.sides.remove(side)
    side.memory.detached()
    if not side.router.sides:
        unhook(model, side.router)


def route_info(model: nn.Module) -> list[list[dict[str, Any]]]:
    """What the last prefill decided.

    Returns:
        For every sample a list with an entry per memory: ``layer`` (None for the whole model), ``method``, ``route``
        (None where the base model serves), ``edit`` (id of the edit behind it, where it belongs to one) and ``score``
        (a distance, a gate; None if the method has none).
    """
    rows: list[list[dict[str, Any]]] = []
    for side in sides_of(model):
        routes = side.router.last.get(side.key)
        if routes is None:
            continue
        indices = routes.index.tolist()
        scores = [None] * len(indices) if routes.score is None else routes.score.tolist()
        rows = rows or [[] for _ in indices]
        for row, index, score in zip(rows, indices, scores, strict=True):
            row.append(
                {
                    "layer": side.layer,
                    "method": side.memory.method,
                    "route": index if index >= 0 else None,
                    "edit": side.memory.owner(index) if index >= 0 else None,
                    "score": score,
                }
            )
    return rows


def clear_memories(model: nn.Module) -> list[MemoryEdit]:
    """Take all memories off a model; it is then exactly as it was before the first.

    Returns:
        The edits that were in them.
    """
    gone = []
    for side in sides_of(model):
        detach(model, side)
        gone += side.edits
    for edit in gone:
        edit._note(model, applied=False)
    return gone
