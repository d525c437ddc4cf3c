"""Thin solves with a covariance that is factored once per layer (LTE 5.4).

The update of MEMIT and its relatives is Δ = R Xᵀ with (A + K Kᵀ) X = K and A = λC. With A = L Lᵀ and the
whitened keys F = L⁻¹K, the push-through identity gives X = L⁻ᵀ F (I + FᵀF)⁻¹: two triangular solves and an
n×n system instead of a d×d system per batch, and the same X.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import NumericalError

logger = logging.getLogger(__name__)

_JITTER = 1e-12


class CovarianceFactor:
    """λC, factored once in fp64 and kept.

    Args:
        second_moment: (d, d) C, the uncentred second moment of a layer's keys; symmetric, finite.
        weight: λ.
        layer: named in errors.

    Raises:
        NumericalError: C is not finite, or neither Cholesky nor LU can factor it.
    """

    def __init__(self, second_moment: Tensor, weight: float = 1.0, *, layer: int | None = None) -> None:
        matrix = second_moment.double()
        if not bool(matrix.isfinite().all()):
            raise NumericalError(f"the statistics of layer {layer} are not finite: collect them again")
        matrix = weight * (matrix + matrix.T) / 2
        self._cholesky, self._lu = _factor(matrix, layer)

    def solve(self, right: Tensor) -> Tensor:
        """(λC)⁻¹ right, fp64, for right (d, n)."""
        if self._cholesky is not None:
            return torch.cholesky_solve(right.double(), self._cholesky)
        assert self._lu is not None
        return torch.linalg.lu_solve(*self._lu, right.double())

    def whiten(self, right: Tensor) -> Tensor:
        """L⁻¹ right, fp64, with λC = L Lᵀ, for right (d, n).

        Raises:
            NumericalError: λC is not positive definite, so there is no L.
        """
        return torch.linalg.solve_triangular(self._triangle(), right.double(), upper=False)

    def unwhiten(self, right: Tensor) -> Tensor:
        """L⁻ᵀ right, fp64."""
        return torch.linalg.solve_triangular(self._triangle().T, right.double(), upper=True)

    def _triangle(self) -> Tensor:
        if self._cholesky is None:
            raise NumericalError(
                "the statistics are not positive definite, which a method that preserves earlier edits needs: "
                "collect more tokens than the layer is wide"
            )
        return self._cholesky

    def regularised(self, keys: Tensor, ridge: float = 1.0) -> Tensor:
        """X (d, n), fp64, with X = (λC)⁻¹K (ridge·I + Kᵀ(λC)⁻¹K)⁻¹; ridge 1 solves (λC + KKᵀ) X = K.

        Args:
            keys: (d, n) K.
            ridge: ε of LTE's unified form.

        Raises:
            NumericalError: the n×n system is singular.
        """
        keys = keys.double()
        if self._cholesky is not None:
            white = torch.linalg.solve_triangular(self._cholesky, keys, upper=False)
            solved = torch.linalg.solve_triangular(self._cholesky.T, white, upper=True)
            system = white.T @ white
        else:
            solved = self.solve(keys)
            system = keys.T @ solved
        system.diagonal().add_(ridge)
        result, info = torch.linalg.solve_ex(system.T, solved.T)
        if int(info) != 0 or not bool(result.isfinite().all()):
            raise NumericalError(
                f"the {len(system)}x{len(system)} system of this batch is singular: are two facts the same?"
            )
        return result.T


def _factor(matrix: Tensor, layer: int | None) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor, None
    jitter = _JITTER * float(matrix.diagonal().mean())
    matrix.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        logger.warning("the statistics of layer %s are nearly singular: jitter %.1e was added", layer, jitter)
        return factor, None
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    logger.warning(
        "the statistics of layer %s are not positive definite (smallest eigenvalue %.2e): using LU instead of "
        "Cholesky; more tokens would mend this",
        layer,
        smallest,
    )
    lu, pivots, bad = torch.linalg.lu_factor_ex(matrix)
    if int(bad) != 0:
        raise NumericalError(
            f"the statistics of layer {layer} are singular (smallest eigenvalue {smallest:.2e}): collect more "
            "tokens than the layer is wide"
        )
    return None, (lu, pivots)
