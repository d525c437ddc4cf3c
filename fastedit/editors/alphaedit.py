"""AlphaEdit: updates confined to the null space of what the layer maps (Fang et al. 2025, arXiv 2410.02355)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericalError
from .base import register_editor
from .locate_then_edit import LayerMeasurement, LocateParams, LocateThenEdit
from .sequential import SequentialSolver

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


class NullSpace:
    """The projector P on the directions that a layer hardly uses, as the thinner of two factors.

    P = U Uᵀ with an orthonormal basis U of those directions, or I − V Vᵀ with one of the others.

    Args:
        vectors: (d, d), orthonormal columns; the null space is spanned by the first ``rank``.
        rank: its dimension.
    """

    def __init__(self, vectors: Tensor, rank: int) -> None:
        self.rank = rank
        self.complement = rank > vectors.shape[1] // 2
        self.basis = (vectors[:, rank:] if self.complement else vectors[:, :rank]).double().contiguous()

    @classmethod
    def of_statistics(cls, second_moment: Tensor, threshold: float | None, layer: int) -> NullSpace:
        """The directions in which C (d, d) has an eigenvalue below ``threshold``.

        Args:
            second_moment: C, symmetric.
            threshold: τ; None for the default of :class:`AlphaEditParams`.
            layer: named in messages.

        Raises:
            NumericalError: C is not finite, or no direction is below the threshold.
        """
        values, vectors = torch.linalg.eigh(_symmetric(second_moment, f"the statistics of layer {layer}"))
        if threshold is None:
            share = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
            rank = int((share <= _NULL_SHARE).sum())
        else:
            rank = int((values < threshold).sum())
        d = len(values)
        if rank == 0:
            raise NumericalError(
                f"layer {layer} has no direction below the null-space threshold {threshold}; its eigenvalues are "
                f"{float(values[0]):.3g} to {float(values[-1]):.3g}: raise null_threshold"
            )
        if d - rank < _ALMOST_NOTHING * d:
            logger.warning(
                "the null space of layer %s has %d of %d directions: its projector removes almost nothing, and "
                "AlphaEdit is then ridge regression that preserves earlier edits; lower null_threshold",
                layer,
                rank,
                d,
            )
        return cls(vectors, rank)

    @classmethod
    def of_projector(cls, projector: Tensor, layer: int) -> NullSpace:
        """From P (d, d) itself, as other programs store it.

        Raises:
            NumericalError: it is no orthogonal projector.
        """
        values, vectors = torch.linalg.eigh(_symmetric(projector, f"the projector of layer {layer}"))
        if bool((torch.minimum(values.abs(), (values - 1).abs()) > 1e-3).any()):
            raise NumericalError(f"the projector of layer {layer} has eigenvalues other than 0 and 1")
        return cls(vectors.flip(1), int((values > 0.5).sum()))

    def project(self, keys: Tensor) -> Tensor:
        """P K, fp64, for K (d, n)."""
        keys = keys.double()
        inside = self.basis @ (self.basis.T @ keys)
        return keys - inside if self.complement else inside


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    matrix = matrix.double()
    if not bool(matrix.isfinite().all()):
        raise NumericalError(f"{name}: all values must be finite")
    return (matrix + matrix.T) / 2


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
        self._solvers: dict[int, SequentialSolver] = {}

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
                space = NullSpace.of_projector(self._given[layer].to(place), layer)
            else:
                space = NullSpace.of_statistics(moments[layer].to(place), self.params.null_threshold, layer)
            solvers[layer] = SequentialSolver(projection.d_in, self.params.ridge, space.project)
        self._solvers = solvers

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R S⁻¹ and Y."""
        return self._solvers[measured.layer].solve(
            measured.keys, measured.residual, self.history, measured.layer
        )
