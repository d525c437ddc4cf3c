"""AlphaEdit: updates confined to the null space of what the layer maps (Fang et al. 2025, arXiv 2410.02355)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError
from ..ops import Projector, RidgeSolver
from .base import register_editor
from .locate_then_edit import LayerMeasurement, LocateParams, LocateThenEdit
from .sequential import InStep

logger = logging.getLogger(__name__)

_NULL_SHARE = 0.05  # of the trace of C, left to the null space where no threshold is given
_ALMOST_NOTHING = 0.01


@dataclass(frozen=True)
class AlphaEditParams(LocateParams):
    """Hyper-parameters of AlphaEdit.

    Attributes:
        null_threshold: τ: directions in which C has an eigenvalue below this may be changed
            (``nullspace_threshold``); None takes the largest set of directions that holds 5 % of the trace of C.
        ridge: λ₂ (``L2``), of the update's size.
    """

    null_threshold: float | None = None
    ridge: float = 10.0


def null_space(second_moment: Tensor, threshold: float | None, layer: int) -> Projector:
    """P on the directions in which C has an eigenvalue below ``threshold``.

    Args:
        second_moment: (d, d) C, symmetric.
        threshold: τ; None for the default of :class:`AlphaEditParams`.
        layer: named in messages.

    Raises:
        NumericalError: C is not finite, or no direction is below the threshold.
    """
    if not bool(second_moment.isfinite().all()):
        raise NumericalError(f"the statistics of layer {layer} are not finite: collect them again")
    matrix = second_moment.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return null_space_of(values, vectors, threshold, layer)


def null_space_of(values: Tensor, vectors: Tensor, threshold: float | None, layer: int) -> Projector:
    """As :func:`null_space`, from C's eigenvalues (d,), ascending, and eigenvectors (d, d), both float64."""
    values = values.clamp(min=0)
    if threshold is None:
        held = int((values.cumsum(0) <= _NULL_SHARE * values.sum()).sum())
        threshold = float(values[min(held, len(values) - 1)])
    projector = Projector.from_spectrum(values, vectors, threshold)
    d, kept = len(values), projector.dimension
    if kept == 0:
        raise NumericalError(
            f"layer {layer} has no direction with an eigenvalue below null_threshold {threshold:.3g} (its "
            f"eigenvalues are {float(values[0]):.3g} to {float(values[-1]):.3g}): raise null_threshold"
        )
    if d - kept < _ALMOST_NOTHING * d:
        logger.warning(
            "the null space of layer %s has %d of %d directions: its projector removes almost nothing, and "
            "AlphaEdit is then ridge regression that preserves earlier edits; lower null_threshold",
            layer,
            kept,
            d,
        )
    return projector


def stored_projector(matrix: Tensor, layer: int) -> Projector:
    """P from the (d, d) matrix that other programs store.

    Raises:
        NumericalError: it is no orthogonal projector.
    """
    values, vectors = torch.linalg.eigh((matrix.double() + matrix.double().T) / 2)
    if not bool((torch.minimum(values.abs(), (values - 1).abs()) < 1e-3).all()):
        raise NumericalError(f"the projector of layer {layer} has eigenvalues other than 0 and 1")
    removed = int((values < 0.5).sum())
    if removed < len(values) - removed:
        return Projector(vectors[:, :removed].contiguous(), removed=True)
    return Projector(vectors[:, removed:].contiguous(), removed=False)


@register_editor("alphaedit")
class AlphaEdit(LocateThenEdit):
    """Δ = R Xᵀ with (P(K Kᵀ + C_p) + λ₂I) X = P K, C_p the keys of all earlier batches.

    Args:
        null_spaces: by layer, projectors P (d, d) to use instead of those that the statistics give.
    """

    Params = AlphaEditParams
    remembers = True

    def __init__(self, *args: Any, null_spaces: Mapping[int, Tensor] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._given = null_spaces
        self._solvers: dict[int, tuple[RidgeSolver, InStep]] = {}

    def prepare(self) -> None:
        """Make the projectors, at first use."""
        if self._solvers:
            return
        moments = {} if self._given is not None else self._second_moments()
        solvers = {}
        for layer in self.params.layers:
            projection = self.description.projection(layer)
            place = projection.weight.device
            if self._given is not None:
                projector = stored_projector(self._given[layer].to(place), layer)
            else:
                projector = self.make_projector(moments[layer].to(place), layer)
            solver = RidgeSolver(projection.d_in, self.params.ridge, projector=projector)
            solvers[layer] = solver, InStep(solver)
        self._solvers = solvers

    def make_projector(self, moment: Tensor, layer: int) -> Projector:
        """P of a layer from its statistics; calibration shares their spectrum between settings."""
        return null_space(moment, self.params.null_threshold, layer)

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R and X."""
        solver, in_step = self._solvers[measured.layer]
        in_step.follow(self.history, measured.layer)
        return measured.residual, solver.solve(measured.keys)
