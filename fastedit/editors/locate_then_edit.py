"""The locate-then-edit family: keys → target values → thin solve → low-rank update, written once.

A method is a choice of layers, of where the value lives, of how keys are averaged over contexts, and of a
solver. Everything else is here.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..artefacts import Edit, LowRank, Transaction, stack_of
from ..errors import InvalidFact
from ..facts import Fact, validate_facts
from ..models.describe import ModelDescription
from ..models.runner import BlockRunner, frozen
from ..models.tokens import pad_batch
from ..ops.solve import CovarianceFactor
from .base import Editor
from .prompts import FactRows, fact_rows
from .sweep import PromptSweep, weighted_mean
from .templates import sample_contexts
from .values import ValueObjective, Values, optimise_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocateParams:
    """Hyper-parameters that every method of the family has.

    Attributes:
        layers: the blocks that are edited, ascending; values live at the last one.
        steps: evaluations of the target's loss (LTE: ``v_num_grad_steps``).
        lr: learning rate of the target's optimiser (``v_lr``).
        clamp: largest change of the value, as a multiple of its norm (``clamp_norm_factor``).
        weight_decay: of the change of the value (``v_weight_decay``).
        kl_factor: weight of the KL term that keeps the subject's essence.
    """

    layers: tuple[int, ...]
    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl_factor: float = 0.0625

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Layers for a model without published settings: as deep, in proportion, as in published ones."""
        n_layers = description.n_layers
        last = max(0, min(n_layers - 2, max(2, int(0.27 * n_layers))))
        return {"layers": tuple(range(max(0, last - 4), last + 1))}


@dataclass
class LayerMeasurement:
    """What a solver may use for one layer; all fp32.

    Attributes:
        layer: the block.
        keys: (d_in, n), averaged over contexts.
        residual: (d_out, n), what the value still lacks.
        bare_keys: (d_in, n), under the bare prompt.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    bare_keys: Tensor


@dataclass
class _Stopwatch:
    """Seconds spent per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class LocateThenEdit(Editor):
    """Base of the family. A method gives :meth:`solve` and the class attributes below.

    Args:
        model: see :class:`Editor`.
        tokenizer: see :class:`Editor`.
        statistics: second moments of keys: per layer a :class:`fastedit.stats.Statistics` or a (d, d)
            tensor, or a directory that holds them; None collects them once and caches them.
        contexts: context templates, each with one ``{}``; None samples the method's own.
        micro_batch: facts whose targets are optimised together; None chooses by free memory.
        on_known: what to do with a fact that the model answers already: ``"warn"`` (edit it all the
            same), ``"skip"`` (leave it out) or ``"error"``.
        **options: see :class:`Editor`.
    """

    Params = LocateParams
    context_lengths: Sequence[tuple[int, int]] = ((10, 5),)
    value_at_mlp = False
    one_by_one = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        statistics: Mapping[int, Any] | str | Path | None = None,
        contexts: Sequence[str] | None = None,
        micro_batch: int | None = None,
        on_known: Literal["warn", "skip", "error"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.runner = BlockRunner(model)
        self.micro_batch = micro_batch
        self.on_known = on_known
        self._statistics = statistics
        self._contexts = None if contexts is None else _checked_contexts(contexts)
        self._factors: dict[int, CovarianceFactor] = {}

    # -- what a method chooses ----------------------------------------------------------------------

    @abstractmethod
    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """The update of one layer as factors: left (d_out, n) and right (d_in, n), Δ = left rightᵀ."""

    def key_weights(self, n_contexts: int) -> list[float]:
        """Weights of the contexts in a key: half for the bare prompt, half for all others together."""
        others = n_contexts - 1
        return [1.0] if others == 0 else [0.5, *[0.5 / others] * others]

    def residual(
        self, layer: int, keys: Tensor, bare_keys: Tensor, values: Values, bare: PromptSweep, left: int
    ) -> Tensor:
        """(n, d_out): what the values still lack when ``layer`` is edited.

        Args:
            layer: the block.
            keys: (n, d_in), averaged over contexts.
            bare_keys: (n, d_in), under the bare prompt.
            values: the targets.
            bare: the bare prompts' states at the entry of ``layer``.
            left: layers still to be edited, this one included, over which the rest is spread.
        """
        return (values.target - bare.outputs(self.params.layers[-1])) / left

    def needs_statistics(self) -> bool:
        """Whether :meth:`factor` will be called."""
        return True

    def factor_weight(self) -> float:
        """λ, the weight of the statistics."""
        return 1.0

    # -- the pipeline -------------------------------------------------------------------------------

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> Edit:
        """Write a batch of facts; see :meth:`Editor.edit`.

        Methods of the ROME kind edit the facts one after the other, all others edit them together.
        """
        checked = validate_facts(facts)
        watch = _Stopwatch()
        with frozen(self.model):
            with watch.stage("prepare"):
                rows = fact_rows(self.tokenizer, checked, self.contexts, self.description.context_length)
                checked, rows, known = self._known(checked, rows)
                if self.needs_statistics():
                    for layer in self.params.layers:
                        self.factor(layer)
            names = [self.description.projection(layer).weight_name for layer in self.params.layers]
            with Transaction(self.model, names) as transaction:
                parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
                outcome: list[dict[str, Any]] = []
                step = 1 if self.one_by_one else len(checked)
                for start in range(0, len(checked), step):
                    chosen = slice(start, start + step)
                    values = self._edit_batch(checked[chosen], rows[chosen], parts, watch)
                    outcome += _describe_values(values)
                with watch.stage("apply"):
                    edit = self._edit(checked, parts, outcome, known)
                    edit = transaction.commit(edit)
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        return edit

    def _edit_batch(
        self,
        facts: Sequence[Fact],
        rows: Sequence[FactRows],
        parts: dict[str, list[tuple[Tensor, Tensor]]],
        watch: _Stopwatch,
    ) -> Values:
        layers = self.params.layers
        with watch.stage("targets"):
            values = optimise_values(
                self.runner,
                facts,
                rows,
                self.objective(),
                micro_batch=self.micro_batch,
                show_progress=False if self.one_by_one else self.progress,
            )
        with watch.stage("keys"):
            sweep = PromptSweep(self.runner, [prompt for row in rows for prompt in row.prompts], layers[0])
            bare = PromptSweep(self.runner, [row.prompts[0] for row in rows], layers[0])
        weights = self.key_weights(len(rows[0].prompts))
        for index, layer in enumerate(layers):
            projection = self.description.projection(layer)
            place = projection.weight.device
            with watch.stage("keys"):
                sweep.advance(layer)
                bare.advance(layer)
                rows_of_keys = sweep.keys()
                keys, bare_keys = weighted_mean(rows_of_keys, weights), rows_of_keys[:: len(weights)]
                residual = self.residual(layer, keys, bare_keys, values, bare, len(layers) - index)
                measured = LayerMeasurement(
                    layer, keys.T.to(place), residual.T.to(place), bare_keys.T.to(place)
                )
            with watch.stage("solve"):
                left, right = (factor.float() for factor in self.solve(measured))
            with watch.stage("apply"):
                ops.low_rank_update_(projection.weight.data, left, right, transposed=projection.transposed)
                parts[projection.weight_name].append((left, right))
        return values

    # -- pieces -------------------------------------------------------------------------------------

    @property
    def contexts(self) -> list[str]:
        """The context templates, sampled at first use."""
        if self._contexts is None:
            with frozen(self.model):
                self._contexts = sample_contexts(
                    self.runner,
                    self.tokenizer,
                    self.context_lengths,
                    seed=self.seed,
                    keep_specials=self.profile == "official",
                )
        return self._contexts

    def objective(self) -> ValueObjective:
        """The loss that target values are optimised for."""
        params = self.params
        return ValueObjective(
            layer=params.layers[-1],
            at_mlp=self.value_at_mlp,
            steps=params.steps,
            lr=params.lr,
            clamp=params.clamp,
            weight_decay=params.weight_decay,
            kl_factor=params.kl_factor,
        )

    def factor(self, layer: int) -> CovarianceFactor:
        """The factored statistics of a layer, made at first use."""
        if layer not in self._factors:
            moment = self._second_moments()[layer]
            place = self.description.projection(layer).weight.device
            self._factors[layer] = CovarianceFactor(moment.to(place), self.factor_weight(), layer=layer)
        return self._factors[layer]

    def _second_moments(self) -> dict[int, Tensor]:
        from .. import stats

        layers = list(self.params.layers)
        given = self._statistics
        if given is None:
            given = stats.ensure(self.model, self.tokenizer, layers, progress=self.progress)
        elif isinstance(given, (str, Path)):
            given = stats.load_directory(given, self.model, layers)
        missing = [layer for layer in layers if layer not in given]
        if missing:
            raise ValueError(f"the statistics lack layers {missing}; they hold {sorted(given)}")
        self._statistics = given
        return {layer: self._moment(layer, given[layer]) for layer in layers}

    def _moment(self, layer: int, given: Any) -> Tensor:
        if isinstance(given, Tensor):
            moment = given
        else:
            given.check(self.model, base_fingerprint=stack_of(self.model).base_fingerprint())
            moment = given.second_moment
        width = self.description.projection(layer).d_in
        if moment.shape != (width, width):
            raise ValueError(
                f"the statistics of layer {layer} must have shape ({width}, {width}), got {tuple(moment.shape)}"
            )
        return moment

    @torch.no_grad()
    def _known(self, facts: list[Fact], rows: list[FactRows]) -> tuple[list[Fact], list[FactRows], list[int]]:
        """Find the facts whose target the model already gives, and treat them as ``on_known`` says."""
        bare = [row.targets[0] for row in rows]
        padded = pad_batch([row.ids for row in bare], pad_id=0)
        ids, mask, positions = (tensor.to(self.runner.device) for tensor in padded)
        hidden = self.description.decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        known = []
        for index, row in enumerate(rows):
            end = len(bare[index].ids)
            logits = self.description.logits(hidden[index, end - len(row.target) : end])
            if logits.argmax(-1).tolist() == row.target:
                known.append(index)
        if not known:
            return facts, rows, known
        named = "; ".join(f"{facts[i].text!r} -> {facts[i].target_new.strip()!r}" for i in known)
        if self.on_known == "error":
            raise InvalidFact(f"the model already answers {named}: leave it out, or set on_known='warn'")
        logger.warning("the model already answers %s", named)
        if self.on_known == "skip":
            kept = [i for i in range(len(facts)) if i not in known]
            if not kept:
                raise InvalidFact("the model already gives every answer of this batch: nothing to edit")
            return [facts[i] for i in kept], [rows[i] for i in kept], known
        return facts, rows, known

    def _edit(
        self,
        facts: list[Fact],
        parts: dict[str, list[tuple[Tensor, Tensor]]],
        outcome: list[dict[str, Any]],
        known: list[int],
    ) -> Edit:
        factors = {
            name: LowRank(
                torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 1)
            )
            for name, pairs in parts.items()
        }
        return Edit(
            method=self.method,
            facts=facts,
            params={**vars(self.params), "contexts": list(self.contexts)},
            seed=self.seed,
            profile=self.profile,
            factors=factors,
            measured={"facts": outcome, "already_known": known},
        )


def _describe_values(values: Values) -> list[dict[str, Any]]:
    steps = (~values.losses[:, :, 0].isnan()).sum(1).tolist()
    rows = zip(
        steps,
        values.losses[:, 0, 1].tolist(),
        values.final_loss.tolist(),
        values.shift.norm(dim=1).tolist(),
        values.initial.norm(dim=1).tolist(),
        strict=True,
    )
    names = ("steps", "nll_before", "nll_optimised", "shift_norm", "value_norm")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _checked_contexts(contexts: Sequence[str]) -> list[str]:
    wrong = [context for context in contexts if context.count("{}") != 1]
    if wrong or not contexts:
        raise ValueError(f"every context needs exactly one {{}}, got {wrong or 'no contexts'}")
    if contexts[0] != "{}":
        raise ValueError(f"the first context must be the bare '{{}}', got {contexts[0]!r}")
    return list(contexts)
