"""What a memory editor adds at one projection: the interface that every method fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import FasteditError

if TYPE_CHECKING:
    from ..models.describe import Projection
    from .edit import MemoryEdit
    from .side_module import SideModule

RouteScope = Literal["prefill", "per_call"]
RouteTokens = Literal["prompt", "all"]
Place = Literal["projection", "mlp"]
Reads = Literal["states", "ids"]


@dataclass(frozen=True)
class Decision:
    """What :meth:`Memory.route` decides for every sample of a batch.

    Attributes:
        index: (B,) int64; what the sample goes through, −1 for the base projection.
        payload: (B, ...) whatever of the sample later steps need, or None.
        score: (B,) what the decision was made by (a distance, a gate), for reports; or None.
    """

    index: Tensor
    payload: Tensor | None = None
    score: Tensor | None = None


@dataclass(frozen=True)
class Routes:
    """The routes of a batch at one projection, as they stand beside the KV cache.

    Attributes:
        index: (B,) int64 on the projection's device, −1 where the base projection serves.
        used: the indices from 0 up that may occur in ``index``, known without asking the device.
        payload: see :class:`Decision`.
        score: see :class:`Decision`.
        version: of the memory when the routes were decided.
        width: columns at the head of the KV cache that were put there by the memory.
        rows: (m,) int64 for each of ``used``, the samples that go there; None once samples were reordered.
    """

    index: Tensor
    used: tuple[int, ...]
    payload: Tensor | None
    score: Tensor | None
    version: int
    width: int = 0
    rows: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, decision: Decision, version: int) -> Routes:
        """Routes of a decision; the one place where the device is waited for."""
        routed: dict[int, list[int]] = {}
        for row, index in enumerate(decision.index.tolist()):
            if index >= 0:
                routed.setdefault(index, []).append(row)
        used = tuple(sorted(routed))
        order = torch.tensor([row for index in used for row in routed[index]], dtype=torch.int64)
        rows = order.to(decision.index.device).split([len(routed[index]) for index in used])
        return cls(decision.index, used, decision.payload, decision.score, version, rows=rows)

    @property
    def all_routed(self) -> bool:
        """Whether every sample is known to go through the memory."""
        return self.rows is not None and sum(map(len, self.rows)) == len(self.index)

    def select(self, rows: Tensor) -> Routes:
        """The routes of these rows (beams that are reordered, samples that are dropped)."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))

        index = self.index.index_select(0, rows.to(self.index.device))
        return replace(self, index=index, payload=take(self.payload), score=take(self.score), rows=None)

    def repeat(self, times: int) -> Routes:
        """Every row ``times`` times, the copies side by side."""
        rows = torch.arange(len(self.index), device=self.index.device).repeat_interleave(times)
        return self.select(rows)


class Memory(ABC):
    """What a method keeps beside one projection, and when and how it answers in the projection's place.

    The base weights are never touched. Everything that a memory knows came in by :meth:`add`, so a memory is the
    same wherever the same edits are added in the same order.

    Args:
        d_in: width of the projection's input; for a memory beside the whole MLP, of the MLP's.
        d_out: width of its output.
        params: the method's hyper-parameters, as plain values.
        profile: ``"clean"``, ``"official"`` or ``"paper"``.
        seed: of everything sampled.
    """

    method: str
    """Name of the editing method."""
    place: Place = "projection"
    """Whether it stands beside the MLP's output projection, or beside the whole MLP, whose input it then sees."""
    route_scope: RouteScope = "prefill"
    """Whether a sample's route is decided once, at prefill, or anew in every call."""
    route_tokens: RouteTokens = "prompt"
    """Whether the route may look at the prompt's tokens only, or at all real tokens of the call."""
    reads: Reads = "states"
    """Whether a route is decided by what the place is given, or by the token ids of the call."""
    settings: tuple[str, ...] = ()
    """Names of the hyper-parameters that decide how the memory behaves; all edits in it must agree on them."""
    whole_state = False
    """The content of an edit is the whole state after it. An older edit can be taken off then only as far as
    :meth:`without` can tell it from the later ones."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make sure that the class says how an edit is taken off, and what it answers above if it does.

        Raises:
            TypeError: it does not.
        """
        super().__init_subclass__(**options)
        if not cls.whole_state and cls.remove is Memory.remove:
            raise TypeError(f"{cls.__name__} must define remove, or set whole_state")
        if (cls.upper_layers is Memory.upper_layers) != (cls.apply_above is Memory.apply_above):
            raise TypeError(f"{cls.__name__} must define both upper_layers and apply_above, or neither")

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        self.d_in, self.d_out = d_in, d_out
        self.params, self.profile, self.seed = dict(params), profile, seed
        self.version = 0

    def attached_to(self, model: nn.Module, projection: Projection, layer: int) -> None:  # noqa: B027
        """Called before anything is added: where it stands. Most memories need not know."""

    def attach_to(self, model: nn.Module) -> SideModule:
        """Stand beside a whole model; only memories that can say how.

        Raises:
            TypeError: this one stands at a block.
        """
        raise TypeError(f"a {self.method} memory stands at a block, not beside the whole model")

    def detached(self) -> None:  # noqa: B027
        """Called when it is taken off a model. Most memories need not know."""

    @property
    def outlives_edits(self) -> bool:
        """Whether it holds more than its edits on this model, so that taking the last one off leaves it there."""
        return False

    @property
    def upper_layers(self) -> tuple[int, ...]:
        """Blocks above its own at whose output projections it answers too, by the routes decided at its own."""
        return ()

    @classmethod
    def input_width(cls, projection: Projection) -> int:
        """Width of what it is given where it stands."""
        return projection.d_in if cls.place == "projection" else projection.d_out

    # -- serving ------------------------------------------------------------------------------------

    @abstractmethod
    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """Decide for every sample whether the memory answers. Runs without gradients, on the inputs' device.

        Args:
            inputs: (B, T, d_in), what the projection is given; for a memory that :attr:`reads` ids those, (B, T).
            outputs: (B, T, d_out), what it returned.
            tokens: (B, T) bool, the tokens to decide by: the prompt's, or all real ones (:attr:`route_tokens`).
                A row may hold none; its route must then be −1.
        """

    @abstractmethod
    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The outputs of the samples that are routed into the memory.

        Args:
            inputs: (B, T, d_in).
            outputs: (B, T, d_out), what the base projection returned; not to be changed in place.
            routes: at least one sample is routed. Rows with index −1 may come out in any way: they are
                replaced by the base projection's.
            tokens: the tokens that the route was decided by, (B, T) bool, in the call that decided it; None in
                later calls.

        Returns:
            (B, T, d_out), in any floating dtype, or ``outputs`` itself if this call is not changed.
        """

    def apply_above(self, layer: int, inputs: Tensor, outputs: Tensor, routes: Routes) -> Tensor:
        """What :meth:`apply` is at the projection of one of :attr:`upper_layers`; defined together with these."""
        return outputs

    # -- content ------------------------------------------------------------------------------------

    @abstractmethod
    def add(self, edit: MemoryEdit) -> None:
        """Take in an edit's content, on top of what is there. Nothing changes if it raises."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    def remove(self, edit_id: str) -> None:
        """Forget one edit, as if it had never been made; every memory without :attr:`whole_state` defines it.

        Raises:
            FasteditError: the memory holds its edits as one whole.
        """
        raise FasteditError(f"the {self.method} memory holds its edits as one whole, {edit_id} among them")

    @classmethod
    def without(cls, state: MemoryEdit, gone: MemoryEdit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and ``about`` of an edit with :attr:`whole_state`, exactly as if another had not been made.

        Args:
            state: whose content is looked at; left as it is.
            gone: beneath it, or itself; its own content may have been released.

        Raises:
            FasteditError: the method cannot tell them apart.
        """
        if state.id == gone.id:
            raise FasteditError(
                f"the state before {gone!r} is not kept any more: only the newest edit of a {cls.method} memory can "
                "be taken off by itself. Revert all of it, or apply a saved edit anew"
            )
        raise FasteditError(
            f"{gone!r} cannot be taken off by itself: later edits of the {cls.method} memory were trained on top of "
            "it. Revert those first, newest first, or all of it"
        )

    # -- reports ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_entries(self) -> int:
        """How many things it holds that a sample can be routed to."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes of its tensors."""

    @property
    def prefill_flops(self) -> int:
        """Multiplications and additions to decide one sample's route."""
        return 0

    @property
    def token_flops(self) -> int:
        """Multiplications and additions for each generated token of a routed sample."""
        return 0

    def owner(self, index: int) -> str | None:
        """Id of the edit that a route leads to, if it belongs to one."""
        return None
