"""p-ROME: ROME with the bare prompt's key everywhere (Gupta et al. 2024, arXiv 2403.07175)."""

from __future__ import annotations

from torch import Tensor

from .base import register_editor
from .locate_then_edit import LayerMeasurement
from .rome import Rome
from .sweep import PromptSweep
from .values import Values


@register_editor("p-rome")
class PRome(Rome):
    """Δ = Λ uᵀ with u from k, Λ = δ / (u·k), k under the bare prompt."""

    params_file = "rome"

    def residual(
        self, layer: int, keys: Tensor, bare_keys: Tensor, values: Values, bare: PromptSweep, left: int
    ) -> Tensor:
        """The optimised change δ itself."""
        return values.shift

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """Λ (d_out, 1) and u (d_in, 1)."""
        return self.rank_one(measured, direction_from=measured.bare_keys, key=measured.bare_keys)
