"""NSE: neuron-level sequential editing (Jiang et al. 2024, arXiv 2410.04045)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..artefacts import stack_of
from ..artefacts.weights import uninterrupted
from ..facts import Fact
from ..models.describe import Projection
from ..ops import CovarianceFactor, neuron_select_keys
from .base import register_editor
from .locate_then_edit import Factors, LayerMeasurement
from .memit import MemitParams
from .memit_cache import MemitCache
from .prompts import FactRows
from .stopwatch import Stopwatch
from .sweep import PromptSweep, weighted_mean
from .values import Values

logger = logging.getLogger(__name__)

_DONE = 0.1
_PARTS = ("initial", "shift", "mlp", "losses")  # tensors of a target


@dataclass(frozen=True)
class NseParams(MemitParams):
    """Hyper-parameters of NSE.

    Attributes:
        tolerance: α: a fact whose value is this close (‖z − h‖) is done; None for a tenth of the distance that its
            target was moved by (‖δ‖), since α goes by the scale of the model's hidden states.
        upper_bound: a fact whose value is this far away is left out of a sweep, and reported; None for no bound.
        max_sweeps: M; the published code makes M − 1 sweeps at most, the profile ``"paper"`` M.
        mass: p, the share of the activation mass that the edited neurons hold; 1 for all neurons.
    """

    tolerance: float | None = None
    upper_bound: float | None = None
    max_sweeps: int = 3
    mass: float = 0.8


@register_editor("nse")
class Nse(MemitCache):
    """Targets on the original weights, few neurons a layer, and sweeps over the layers until facts are in place.

    In a sweep over the facts that are not done, Δ has only the columns S of the neurons that hold the share p of
    Σ |k| over their keys, and there Δ = R Xᵀ with (λC + C_p + K Kᵀ)_SS X = K_S. C_p holds the keys of all facts
    of earlier batches.

    State beside the model: the original bits of the edited projections (shared with the record of edits, if that
    has them), the keys of all facts, and the targets given to :meth:`optimise_targets`; for each layer a float64
    factor of λC, d × d, and with p < 1 also λC + C_p, from which the systems of few neurons are cut.

    Attributes:
        routes: by layer, the way its last restricted solve took (:meth:`fastedit.ops.CovarianceFactor.route`).
    """

    Params = NseParams
    params_file = "nse"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept: dict[int, Tensor] | None = None
        self.routes: dict[int, str] = {}

    # -- targets on the original weights ------------------------------------------------------------

    def targets(self, facts: Sequence[Fact], rows: Sequence[FactRows]) -> Values:
        """The facts' target values, optimised on the original weights, so they may be made ahead at any time."""
        self._keep_originals()
        with self._rewound():
            return super().targets(facts, rows)

    def prepare(self) -> None:
        """Factors of the statistics, and the original weights."""
        super().prepare()
        self._keep_originals()

    def make_factor(self, moment: Tensor, layer: int) -> CovarianceFactor:
        """With the matrix kept beside the factor: the systems of few neurons are cut out of it."""
        return CovarianceFactor(moment, self.factor_weight(), layer=layer, keep_matrix=self.params.mass < 1)

    def _keep_originals(self) -> None:
        """Keep the bits of matrices that have other edits on them; of the others the record of edits does."""
        if self._kept is not None:
            return
        self._kept = {
            layer: projection.weight.detach().clone()
            for layer, projection in self._projections().items()
            if stack_of(self.model).original(projection.weight_name) is not None
        }

    def _projections(self) -> dict[int, Projection]:
        return {layer: self.description.projection(layer) for layer in self.params.layers}

    @contextmanager
    def _rewound(self) -> Iterator[None]:
        """The edited projections have their original weights here."""
        assert self._kept is not None
        swaps = []
        for layer, projection in self._projections().items():
            original = self._kept.get(layer, stack_of(self.model).original(projection.weight_name))
            if original is not None:
                swaps.append((projection.weight, original))
        before = [weight.detach().clone() for weight, _ in swaps]
        try:
            with torch.no_grad():
                for weight, original in swaps:
                    weight.copy_(original)
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                for (weight, _), bits in zip(swaps, before, strict=True):
                    weight.copy_(bits)

    # -- sweeps -------------------------------------------------------------------------------------

    def write(
        self,
        rows: Sequence[FactRows],
        values: Values,
        parts: Factors,
        watch: Stopwatch,
        described: list[dict[str, Any]],
        entry: PromptSweep | None = None,
    ) -> dict[int, Tensor]:
        """Sweep over the layers until every fact is in place, or the sweeps are used up."""
        params = self.params
        sweeps = params.max_sweeps - (self.profile != "paper")
        upper = math.inf if params.upper_bound is None else params.upper_bound
        near = (_DONE * values.shift.norm(dim=1)).tolist()
        if params.tolerance is not None:
            near = [params.tolerance] * len(rows)
        keys: dict[int, Tensor] = {}
        with watch.stage("keys"):  # no sweep changes what is below the first layer
            entry = self._entry(rows) if entry is None else entry
        contexts = len(rows[0].prompts)
        for sweep in range(sweeps + 1):
            with watch.stage("keys"):
                bare = entry.branch(range(0, entry.rows, contexts))
                distance = (values.target - bare.outputs(params.layers[-1])).norm(dim=1)
            active = [i for i, far in enumerate(distance.tolist()) if near[i] < far < upper]
            if not active or sweep == sweeps:
                break
            with watch.stage("keys"):
                theirs = entry.branch([i * contexts + context for i in active for context in range(contexts)])
            keys = super().write(
                [rows[i] for i in active], values.select(active), parts, watch, described, theirs
            )
            for i in active:
                described[i]["sweeps"] = sweep + 1
        for i, far in enumerate(distance.tolist()):
            described[i].setdefault("sweeps", 0)
            described[i]["distance"] = far
            if far >= upper:
                described[i]["left_out"] = f"its distance {far:.3g} is not below upper_bound {upper:g}"
                logger.warning("a fact is left out: %s", described[i]["left_out"])
        whole = all(each["sweeps"] == 1 for each in described) and len(keys) > 0
        with watch.stage("keys"):
            return keys if whole else self._keys(entry, contexts)

    def _keys(self, sweep: PromptSweep, contexts: int) -> dict[int, Tensor]:
        """By layer, (d_in, n): keys on the weights as they are; the sweep is moved on."""
        weights = self.key_weights(contexts)
        found = {}
        for layer in self.params.layers:
            sweep.advance(layer)
            place = self.description.projection(layer).weight.device
            found[layer] = weighted_mean(sweep.keys(), weights).T.to(place)
        return found

    # -- state --------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._keep_originals()
        assert self._kept is not None
        tensors, about = super()._state()
        for layer, projection in self._projections().items():
            original = self._kept.get(layer, stack_of(self.model).original(projection.weight_name))
            if original is not None:
                tensors[f"original.{layer}"] = original
        for number, values in enumerate(self.made_ahead.values()):
            for name in _PARTS:
                tensors[f"target.{number}.{name}"] = getattr(values, name)
        return tensors, {**about, "targets": [list(key) for key in self.made_ahead]}

    def _load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super()._load_state(tensors, about)
        self._kept = {
            layer: tensors[f"original.{layer}"].to(projection.weight.device)
            for layer, projection in self._projections().items()
            if f"original.{layer}" in tensors
        }
        self.made_ahead = {}
        for number, (text, target) in enumerate(about["targets"]):
            initial, shift, mlp, losses = (tensors[f"target.{number}.{name}"] for name in _PARTS)
            self.made_ahead[text, target] = Values(initial, shift, mlp, losses)

    # -- few neurons --------------------------------------------------------------------------------

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """R and X, whose rows outside the chosen neurons are 0."""
        if self.params.mass >= 1:
            return super().solve(measured)
        neurons = self.neurons(measured.keys)
        right = torch.zeros_like(measured.keys, dtype=torch.float64)
        factor = self.current(measured.layer)
        right[neurons] = factor.restricted(measured.keys, neurons)
        self.routes[measured.layer] = factor.route(len(neurons), measured.keys.shape[1])
        return measured.residual, right

    def neurons(self, keys: Tensor) -> Tensor:
        """(s,) int64, ascending: the neurons that hold the share ``mass`` of Σ |k| over keys (d, n)."""
        rule = "at_least" if self.profile == "paper" else "prefix"
        _, indices, count = neuron_select_keys(keys, self.params.mass, rule=rule)
        return indices[: int(count)].long()
