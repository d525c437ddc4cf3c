"""MEMIT with an edit cache: earlier batches are preserved like the model's own associations (LTE 2.8)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import CovarianceFactor
from .base import register_editor
from .locate_then_edit import LayerMeasurement
from .memit import Memit
from .sequential import InStep


@register_editor("memit-cache")
class MemitCache(Memit):
    """Δ = R Xᵀ with (λC + C_p + K Kᵀ) X = K, where C_p = Σ k kᵀ over the keys of all earlier batches."""

    params_file = "memit"
    remembers = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_step: dict[int, InStep] = {}

    def current(self, layer: int) -> CovarianceFactor:
        """The layer's factor of λC + C_p."""
        factor = self.factor(layer)
        self._in_step.setdefault(layer, InStep(factor)).follow(self.history, layer)
        return factor

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R and X."""
        return measured.residual, self.current(measured.layer).regularised(measured.keys)
