"""The locate-then-edit family: keys → target values → thin solve → low-rank update, written once.

A method is a choice of layers, of where the value lives, of how keys are averaged over contexts, and of a
solver. Everything else is here.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..artefacts import Edit, LowRank, Transaction, stack_of
from ..errors import InvalidFact, NumericalError
from ..facts import Fact, validate_facts
from ..models.describe import ModelDescription
from ..models.runner import BlockRunner, frozen
from ..models.tokens import pad_batch
from ..ops import CovarianceFactor
from .base import Editor
from .history import KeyHistory
from .prompts import FactRows, fact_rows
from .restraint import anchor_norm, prune, rect, reference_norm
from .stopwatch import Stopwatch
from .sweep import PromptSweep, weighted_mean
from .templates import sample_contexts
from .values import ValueObjective, Values, optimise_values

logger = logging.getLogger(__name__)

Factors = dict[str, list[tuple[Tensor, Tensor]]]  # by weight name, left and right of each update

_WORSE = 1.01  # a loss this much above its start is no rounding error


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
        norm_anchor: ν of Norm-Anchor Scaling, from :meth:`LocateThenEdit.measure_norm_anchor`; None for none.
        rect: RECT, the share of each weight's entries that a change may touch; None for all.
    """

    layers: tuple[int, ...]
    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    norm_anchor: float | None = None
    rect: float | None = None

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
class _Batch:
    """What came of facts that were edited together.

    ``described`` has one entry for each fact that was edited, ``set_aside`` one for each that was not, ``keys``
    what a method's history keeps, by layer.
    """

    facts: list[Fact]
    described: list[dict[str, Any]]
    set_aside: list[dict[str, Any]]
    keys: dict[int, Tensor] = field(default_factory=dict)


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

    Attributes:
        made_ahead: by text and target of a fact, what :meth:`optimise_targets` made. Another editor of the same
            model, contexts and target settings may be given it.
    """

    Params = LocateParams
    context_lengths: Sequence[tuple[int, int]] = ((10, 5),)
    value_at_mlp = False
    one_by_one = False
    remembers = False  # whether the keys of earlier batches are kept in ``history``

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
        self.history = KeyHistory()
        self.made_ahead: dict[tuple[str, str], Values] = {}

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

    def prepare(self) -> None:
        """Make what solving needs and does not depend on the facts: factors of the statistics, at first use."""
        for layer in self.params.layers:
            self.factor(layer)

    def factor_weight(self) -> float:
        """λ, the weight of the statistics."""
        return 1.0

    # -- the pipeline -------------------------------------------------------------------------------

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> Edit:
        """Write a batch of facts; see :meth:`Editor.edit`.

        Methods of the ROME kind edit the facts one after the other, all others edit them together.
        A fact whose target cannot be optimised (its loss stops being finite or, but in the official profile,
        ends above its start) is set aside with the reason in ``edit.measured["set_aside"]``; the others are
        edited.
        """
        checked = validate_facts(facts)
        watch = Stopwatch()
        self.history.follow({edit.id for edit in stack_of(self.model).edits})
        with frozen(self.model):
            with watch.stage("prepare"):
                rows = fact_rows(self.tokenizer, checked, self.contexts, self.description.context_length)
                checked, rows, known = self._known(checked, rows)
                self.prepare()
            names = self.weight_names
            with Transaction(self.model, names) as transaction:
                parts: Factors = {name: [] for name in names}
                step = 1 if self.one_by_one else len(checked)
                batches = [
                    self._edit_batch(checked[start : start + step], rows[start : start + step], parts, watch)
                    for start in range(0, len(checked), step)
                ]
                _require_some(batches)
                with watch.stage("apply"):
                    edit = transaction.commit(self._edit(batches, parts, known, transaction))
        if self.remembers:
            self.history.add(edit.id, batches[0].keys)
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        return edit

    def _edit_batch(
        self,
        facts: list[Fact],
        rows: list[FactRows],
        parts: Factors,
        watch: Stopwatch,
    ) -> _Batch:
        with watch.stage("targets"):
            values = self._targets(facts, rows)
            reasons = self._unusable(values)
        kept = [index for index in range(len(facts)) if index not in reasons]
        set_aside = [
            {"fact": facts[i].text, "target": facts[i].target_new, "reason": why}
            for i, why in reasons.items()
        ]
        for each in set_aside:
            logger.warning("%r -> %r is set aside: %s", each["fact"], each["target"], each["reason"])
        if not kept:
            return _Batch([], [], set_aside)
        facts, rows = [facts[index] for index in kept], [rows[index] for index in kept]
        values = values.select(kept)
        described = _describe_values(values)
        keys = self.write(rows, values, parts, watch, described)
        return _Batch(facts, described, set_aside, keys)

    def targets(self, facts: Sequence[Fact], rows: Sequence[FactRows]) -> Values:
        """The facts' target values, optimised on the weights as they are."""
        return optimise_values(
            self.runner,
            facts,
            rows,
            self.objective(),
            micro_batch=self.micro_batch,
            show_progress=False if self.one_by_one else self.progress,
        )

    def optimise_targets(self, facts: Iterable[Fact | Mapping[str, Any]]) -> None:
        """Optimise the targets of facts that are to be edited later, all together, in batches that fill the machine.

        Right for facts that will be edited on the weights as they are now; for NSE, whose targets do not depend on
        earlier edits, at any time.
        """
        checked = [fact for fact in validate_facts(facts) if (fact.text, fact.target) not in self.made_ahead]
        if not checked:
            return
        with frozen(self.model):
            rows = fact_rows(self.tokenizer, checked, self.contexts, self.description.context_length)
            values = self.targets(checked, rows)
        for index, fact in enumerate(checked):
            self.made_ahead[fact.text, fact.target] = values.select([index])

    def _targets(self, facts: Sequence[Fact], rows: Sequence[FactRows]) -> Values:
        """The facts' target values: those made ahead, the others are optimised."""
        names = [(fact.text, fact.target) for fact in facts]
        missing = [i for i, name in enumerate(names) if name not in self.made_ahead]
        found = {i: self.made_ahead[name] for i, name in enumerate(names) if name in self.made_ahead}
        if missing:
            made = self.targets([facts[i] for i in missing], [rows[i] for i in missing])
            found.update({i: made.select([position]) for position, i in enumerate(missing)})
        return Values.join([found[i] for i in range(len(facts))])

    def write(
        self,
        rows: Sequence[FactRows],
        values: Values,
        parts: Factors,
        watch: Stopwatch,
        described: list[dict[str, Any]],
        entry: PromptSweep | None = None,
    ) -> dict[int, Tensor]:
        """Write the values into the layers, from the lowest up, by :meth:`solve`.

        Args:
            rows: one for each fact.
            values: their targets.
            parts: by weight name, the factors of each update; appended to.
            watch: takes the times.
            described: by fact, what is reported about it; may be added to.
            entry: all prompts at the entry of the first layer, if they were run already; moved on.

        Returns:
            By layer, (d_in, n) fp32: the facts' keys under the weights written, for :attr:`history`.
        """
        layers = self.params.layers
        found = {}
        with watch.stage("keys"):
            sweep = self._entry(rows) if entry is None else entry
            bare = sweep.branch(range(0, sweep.rows, len(rows[0].prompts)))
        weights = self.key_weights(len(rows[0].prompts))
        for index, layer in enumerate(layers):
            place = self.description.projection(layer).weight.device
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
                self._add(layer, left, right, parts)
            found[layer] = measured.keys
        return found

    def _entry(self, rows: Sequence[FactRows]) -> PromptSweep:
        """All prompts of the facts, fact by fact, at the entry of the first edited layer."""
        return PromptSweep(
            self.runner, [prompt for row in rows for prompt in row.prompts], self.params.layers[0]
        )

    def _add(self, layer: int, left: Tensor, right: Tensor, parts: Factors) -> None:
        """Add left rightᵀ to the layer's weight and remember the factors."""
        projection = self.description.projection(layer)
        ops.low_rank_update_(projection.weight.data, left, right, transposed=projection.transposed)
        parts[projection.weight_name].append((left, right))

    def _unusable(self, values: Values) -> dict[int, str]:
        """Facts that cannot be edited, by position: the reason. Norm anchors are applied to the others."""
        reasons = dict(values.broken)
        if self.profile != "official":
            for index, (first, last) in enumerate(
                zip(values.losses[:, 0, 1].tolist(), values.final_loss.tolist(), strict=True)
            ):
                if index not in reasons and last > _WORSE * first:
                    reasons[index] = f"optimising its target raised its loss from {first:.3g} to {last:.3g}"
        anchor = self.params.norm_anchor
        if anchor is not None:
            values.shift, lost = anchor_norm(values.mlp, values.shift, anchor)
            for index in lost.nonzero().flatten().tolist():
                reasons.setdefault(index, f"its target is longer than twice the norm anchor {anchor:.3g}")
        return dict(sorted(reasons.items()))

    def measure_norm_anchor(self, facts: Iterable[Fact | Mapping[str, Any]]) -> float:
        """ν for ``norm_anchor``: the usual norm of targets on the model as it is; call it before any edit.

        Targets are optimised under the bare prompts only (arXiv 2602.02543, which takes 1,000 facts).
        """
        checked = validate_facts(facts)
        with frozen(self.model):
            rows = fact_rows(self.tokenizer, checked, ["{}"], self.description.context_length)
            values = self.targets(checked, rows)
        usable = [index for index in range(len(checked)) if index not in values.broken]
        if not usable:
            raise NumericalError("no target of these facts could be optimised: there is no norm to measure")
        chosen = values.select(usable)
        return reference_norm(chosen.mlp + chosen.shift)

    def prune(self) -> Edit | None:
        """Bound the singular values of all that edits have changed in this editor's layers (PRUNE).

        Meant for the end of a sequence.

        Returns:
            The edit that does it, applied; None if no singular value is above the bound.
        """
        stack = stack_of(self.model)
        factors = {}
        for layer, name in zip(self.params.layers, self.weight_names, strict=True):
            original = stack.original(name)
            changes = [edit.change(name) for edit in stack.edits if name in edit.weight_names]
            if original is None or not changes:
                continue
            if any(change.dense is not None for change in changes):
                raise ValueError(f"prune: the edits of {name} are not all of low rank")
            total = LowRank.sum([change.low_rank for change in changes if change.low_rank is not None])
            if self.description.projection(layer).transposed:
                original = original.T
            correction = prune(total, original.to(total.left.device))
            if correction is not None:
                factors[name] = correction
        if not factors:
            return None
        facts = [fact for edit in stack.edits for fact in edit.facts]
        edit = Edit(method="prune", facts=facts, factors=factors, seed=self.seed, profile=self.profile)
        return edit.apply(self.model)

    # -- state --------------------------------------------------------------------------------------

    @property
    def weight_names(self) -> list[str]:
        """The output projections of the layers."""
        return [self.description.projection(layer).weight_name for layer in self.params.layers]

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.history.follow({edit.id for edit in stack_of(self.model).edits})
        tensors = {
            f"keys.{number}.{layer}": keys
            for number, batch in enumerate(self.history.batches)
            for layer, keys in batch.keys.items()
        }
        return tensors, {"batches": len(self.history), "contexts": list(self.contexts)}

    def _load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        history = KeyHistory()
        for number in range(about["batches"]):
            keys = {}
            for layer in self.params.layers:
                place = self.description.projection(layer).weight.device
                keys[layer] = tensors[f"keys.{number}.{layer}"].to(place)
            history.add("", keys)
        self.history = history
        self._contexts = list(about["contexts"])

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
            self._factors[layer] = self.make_factor(moment.to(place), layer)
        return self._factors[layer]

    def make_factor(self, moment: Tensor, layer: int) -> CovarianceFactor:
        """Factor a layer's statistics; a method may want them kept in another form."""
        return CovarianceFactor(moment, self.factor_weight(), layer=layer)

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
        batches: Sequence[_Batch],
        parts: Factors,
        known: list[int],
        transaction: Transaction,
    ) -> Edit:
        factors = {
            name: LowRank(*(torch.cat(side, 1) for side in zip(*pairs, strict=True)))
            for name, pairs in parts.items()
            if pairs
        }
        if not factors:  # every fact was in place already: an edit that changes nothing
            projection = self.description.projection(self.params.layers[0])
            nothing = LowRank(torch.zeros(projection.d_out, 0), torch.zeros(projection.d_in, 0))
            factors = {projection.weight_name: nothing}
        dense = {}
        if self.params.rect is not None:
            dense = {
                name: rect(change.dense(), transaction.before(name).to(change.left.device), self.params.rect)
                for name, change in factors.items()
            }
        return Edit(
            method=self.method,
            facts=[fact for batch in batches for fact in batch.facts],
            params={**vars(self.params), "contexts": list(self.contexts)},
            seed=self.seed,
            profile=self.profile,
            factors={} if dense else factors,
            dense=dense,
            measured={
                "facts": [each for batch in batches for each in batch.described],
                "set_aside": [each for batch in batches for each in batch.set_aside],
                "already_known": known,
            },
        )


def _require_some(batches: Sequence[_Batch]) -> None:
    """Raise NumericalError if no fact of any batch could be edited."""
    if not any(batch.facts for batch in batches):
        reasons = "; ".join(
            f"{each['fact']!r}: {each['reason']}" for batch in batches for each in batch.set_aside
        )
        raise NumericalError(
            f"no fact of this batch can be edited: {reasons}. Lower the learning rate or the clamp, choose other "
            "layers, or use a wider dtype"
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
