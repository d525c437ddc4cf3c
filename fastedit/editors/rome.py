"""ROME: one fact as a rank-one update of one layer (Meng et al. 2022, arXiv 2202.05262)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.describe import ModelDescription
from .base import register_editor
from .locate_then_edit import LayerMeasurement, LocateParams, LocateThenEdit
from .sweep import PromptSweep
from .values import Values


@dataclass(frozen=True)
class RomeParams(LocateParams):
    """Hyper-parameters of ROME and its two corrections.

    Attributes:
        use_covariance: whiten the key with the layer's statistics (``mom2_adjustment``).
    """

    steps: int = 20
    clamp: float = 4.0
    use_covariance: bool = True

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """One layer, as deep in proportion as the published ones."""
        n_layers = description.n_layers
        return {"layers": (min(n_layers - 1, max(1, int(0.18 * n_layers))),)}


@register_editor("rome")
class Rome(LocateThenEdit):
    """Δ = Λ uᵀ with u = C⁻¹k̄/‖C⁻¹k̄‖ and Λ = (v* − W k) / (u·k).

    Published ROME takes the direction u from the key k̄ averaged over contexts, but k and W k from the bare
    prompt. Facts are edited one after the other, each on the model that the previous one left.
    """

    Params = RomeParams
    context_lengths = ((5, 10), (10, 10))
    value_at_mlp = True
    one_by_one = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if len(self.params.layers) != 1:
            raise ValueError(f"{self.method} edits one layer, got {self.params.layers}")

    def key_weights(self, n_contexts: int) -> list[float]:
        """The plain mean over all contexts."""
        return [1.0 / n_contexts] * n_contexts

    def prepare(self) -> None:
        """Factor the statistics, only if the key is whitened."""
        if self.params.use_covariance:
            super().prepare()

    def residual(
        self, layer: int, keys: Tensor, bare_keys: Tensor, values: Values, bare: PromptSweep, left: int
    ) -> Tensor:
        """v* minus the projection's present output under the bare prompt."""
        return values.target - self.project(layer, bare_keys)

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """(n, d_out) fp32: what the layer's projection makes of keys (n, d_in) now, its bias included."""
        projection = self.description.projection(layer)
        weight = projection.weight
        with torch.no_grad():
            return projection.module(keys.to(weight.device, weight.dtype)).float().to(keys.device)

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """Λ (d_out, 1) and u (d_in, 1)."""
        return self.rank_one(measured, direction_from=measured.keys, key=measured.bare_keys)

    def rank_one(
        self, measured: LayerMeasurement, direction_from: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The update that maps ``key`` to its value along the whitened ``direction_from``, both (d_in, 1)."""
        direction = direction_from.double()
        if self.params.use_covariance:
            direction = self.factor(measured.layer).solve(direction)
        direction = direction / direction.norm()
        return measured.residual.double() / (direction * key.double()).sum(), direction
