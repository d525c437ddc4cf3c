"""r-ROME: ROME with the context-averaged key and output everywhere (Gupta et al. 2024, arXiv 2403.07175)."""

from __future__ import annotations

from torch import Tensor

from .base import register_editor
from .locate_then_edit import LayerMeasurement
from .rome import Rome
from .sweep import PromptSweep
from .values import Values


@register_editor("r-rome")
class RRome(Rome):
    """Δ = Λ uᵀ with u from k̄, Λ = (v* − mean of W k) / (u·k̄): one key in both places."""

    def residual(
        self, layer: int, keys: Tensor, bare_keys: Tensor, values: Values, bare: PromptSweep, left: int
    ) -> Tensor:
        """v* minus the projection's present output averaged over contexts, which is that of the mean key."""
        return values.target - self.project(layer, keys)

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """Λ (d_out, 1) and u (d_in, 1)."""
        return self.rank_one(measured, direction_from=measured.keys, key=measured.keys)
