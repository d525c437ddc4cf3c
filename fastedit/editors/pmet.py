"""PMET: precise targets for the MLP, found with a second vector for the attention (Li et al. 2024, 2308.08742)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..facts import Fact
from .base import register_editor
from .memit import Memit, MemitParams
from .pmet_values import optimise_pairs
from .prompts import FactRows
from .sweep import PromptSweep
from .values import Values


@dataclass(frozen=True)
class PmetParams(MemitParams):
    """Hyper-parameters of PMET; the defaults are those published for GPT-J."""

    steps: int = 30
    lr: float = 0.2
    kl_factor: float = 1.0


@register_editor("pmet")
class Pmet(Memit):
    """MEMIT's solve for values that live at the MLP's output, spread over the layers by square roots.

    The values are optimised together with a shift of the attention's output in the same block, which takes up
    what the MLP should not hold and is then dropped (:func:`fastedit.editors.pmet_values.optimise_pairs`).
    Layer i of L is given R_i = (v* − present output of the last layer's MLP) / √(L − i).
    """

    Params = PmetParams
    value_at_mlp = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.description.attention_projection(self.params.layers[-1])  # raises where there is none

    def targets(self, facts: Sequence[Fact], rows: Sequence[FactRows]) -> Values:
        """The values of the last layer's MLP, optimised on the weights as they are."""
        return optimise_pairs(
            self.runner, rows, self.objective(), micro_batch=self.micro_batch, show_progress=self.progress
        )

    def residual(
        self, layer: int, keys: Tensor, bare_keys: Tensor, values: Values, bare: PromptSweep, left: int
    ) -> Tensor:
        """What the last layer's MLP output still lacks under the bare prompt, over √``left``."""
        return (values.target - bare.projected(self.params.layers[-1])) / left**0.5
