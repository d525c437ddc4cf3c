"""MEMIT: many facts at once, spread over several layers (Meng et al. 2023, arXiv 2210.07229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.describe import ModelDescription
from .base import register_editor
from .locate_then_edit import LayerMeasurement, LocateParams, LocateThenEdit


@dataclass(frozen=True)
class MemitParams(LocateParams):
    """Hyper-parameters of MEMIT.

    Attributes:
        covariance_weight: λ, the weight of what the layer already maps against what is written
            (``mom2_update_weight``).
    """

    covariance_weight: float = 15000.0

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """λ by the width d of the keys: 100 (d / 768)^1.7.

        That is the published 15,000 at d = 14,336, and what suits models of a few million parameters at 768.
        """
        weight = 100 * (description.projection(0).d_in / 768) ** 1.7
        return {**super().defaults_for(description), "covariance_weight": float(f"{weight:.2g}")}


@register_editor("memit")
class Memit(LocateThenEdit):
    """Per layer, Δ = R Xᵀ with (λC + K Kᵀ) X = K: least squares between old associations and new ones."""

    Params = MemitParams

    def factor_weight(self) -> float:
        """λ of the parameters."""
        return self.params.covariance_weight

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R and X."""
        return measured.residual, self.factor(measured.layer).regularised(measured.keys)
