"""EMMET: a batch as an equality-constrained update (Gupta et al. 2024, arXiv 2403.14236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.describe import ModelDescription
from .base import register_editor
from .locate_then_edit import LayerMeasurement, LocateParams, LocateThenEdit


@dataclass(frozen=True)
class EmmetParams(LocateParams):
    """Hyper-parameters of EMMET.

    Attributes:
        covariance_weight: w, the weight of the statistics.
        ridge: ε, what keeps the n×n system of a batch of similar facts solvable (``emmet_lambda``).
    """

    covariance_weight: float = 1.0
    ridge: float = 0.1

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """One layer, as deep in proportion as the published ones."""
        return {"layers": super().defaults_for(description)["layers"][-1:]}


@register_editor("emmet")
class Emmet(LocateThenEdit):
    """Δ = R (εI + Kᵀ(wC)⁻¹K)⁻¹ Kᵀ(wC)⁻¹: MEMIT with λ = εw, up to rounding."""

    Params = EmmetParams

    def factor_weight(self) -> float:
        """The weight w of the parameters."""
        return self.params.covariance_weight

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R and X."""
        return measured.residual, self.factor(measured.layer).regularised(measured.keys, self.params.ridge)
