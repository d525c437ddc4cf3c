"""MEMIT with an edit cache: earlier batches are preserved like the model's own associations (LTE 2.8)."""

from __future__ import annotations

from torch import Tensor

from .base import register_editor
from .locate_then_edit import LayerMeasurement
from .memit import Memit
from .sequential import SequentialSolver


@register_editor("memit-cache")
class MemitCache(Memit):
    """Δ = R Xᵀ with (λC + C_p + K Kᵀ) X = K, where C_p = Σ k kᵀ over the keys of all earlier batches."""

    params_file = "memit"
    remembers = True

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._solvers: dict[int, SequentialSolver] = {}

    def solver(self, layer: int) -> SequentialSolver:
        """The layer's solver; its features are whitened keys L⁻¹K with λC = L Lᵀ."""
        if layer not in self._solvers:
            d_in = self.description.projection(layer).d_in
            self._solvers[layer] = SequentialSolver(d_in, 1.0, self.factor(layer).whiten)
        return self._solvers[layer]

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R S⁻¹ and L⁻ᵀY."""
        left, right = self.solver(measured.layer).solve(
            measured.keys, measured.residual, self.history, measured.layer
        )
        return left, self.factor(measured.layer).unwhiten(right)
