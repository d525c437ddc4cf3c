"""What the settings of one calibration share: facts, what they are judged by, targets, factored statistics."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts import stack_of
from ..artefacts.weights import uninterrupted
from ..data import Item, Record
from ..errors import InvalidFact
from ..evaluation import DriftMeter, DriftReference, Pair, PairScore, Scorer, text_windows
from ..facts import Fact, validate_facts
from ..models.describe import ModelDescription, describe
from ..models.runner import frozen
from ..ops import CovarianceFactor, Projector
from ..stats import ensure, load_directory
from .alphaedit import null_space_of
from .locate_then_edit import Factors, LayerMeasurement, LocateThenEdit
from .prompts import FactRows
from .stopwatch import Stopwatch
from .sweep import PromptSweep
from .values import ValueObjective, Values, optimise_values

_PARAPHRASES, _NEIGHBOURS = 2, 3  # of a fact, at most
_TEXT_TOKENS, _TEXT_LENGTH = 1024, 128
_FEWEST = 6


@dataclass(frozen=True)
class Scores:
    """What an edit of some facts did; shares from 0 to 1, None where the facts have no prompts of the kind.

    Attributes:
        written: facts whose every target token is the most probable one (teacher forced).
        paraphrased: the same under other wordings.
        neighbours: prompts about other subjects whose predicted answer is the one from before the edit.
        text: tokens of plain text whose most probable successor is the one from before.
        kl: nats per token of plain text, KL(before ‖ after).
        unreached: facts whose target's loss stayed above 0.5 while it was optimised.
        set_aside: facts that the editor gave up.
    """

    written: float
    paraphrased: float | None
    neighbours: float | None
    text: float
    kl: float
    unreached: int = 0
    set_aside: int = 0

    @property
    def total(self) -> float:
        """The harmonic mean of the shares that there are; 0 if one of them is 0 or the model is broken."""
        shares = [self.written, self.paraphrased, self.neighbours, self.text]
        given = [share for share in shares if share is not None]
        if min(given) <= 0 or not math.isfinite(self.kl):
            return 0.0
        return len(given) / sum(1 / share for share in given)

    def as_dict(self) -> dict[str, Any]:
        """All fields and the total, for JSON: a KL that is not finite is None."""
        kl = self.kl if math.isfinite(self.kl) else None
        return {**dataclasses.asdict(self), "kl": kl, "total": self.total}


# ---- the facts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fact and what it is judged by: pairs that must hold the new answer, and pairs that must not change."""

    fact: Fact
    paraphrases: list[Pair]
    neighbours: list[Pair]

    @property
    def written(self) -> Pair:
        """The fact's own prompt with the new answer."""
        return Pair(self.fact.text, self.fact.target_new)


def packaged_records(seed: int = 0) -> list[Record]:
    """The facts of the packaged demo model, each with the answer of another fact of its relation to write.

    They are facts of the world (capitals, authors, currencies), so that other English models know many of them.
    """
    from ..demo import load_demo_facts

    rng = random.Random(seed)
    known = load_demo_facts(neighbours=_NEIGHBOURS, seed=seed)
    answers: dict[str, list[str]] = {}
    for each in known:
        answers.setdefault(each["relation"], []).append(each["target"])
    records = []
    for each in known:
        others = sorted({answer for answer in answers[each["relation"]] if answer != each["target"]})
        if not others:
            continue
        new = rng.choice(others)
        near = [
            Item(item["prompt"].replace("{}", item["subject"]), [item["target"]])
            for item in each["neighbours"]
        ]
        records.append(
            Record(
                Fact(each["prompt"], each["subject"], new, target_old=each["target"]),
                rephrase=[text.replace("{}", each["subject"]) for text in each["paraphrases"]],
                locality={"neighborhood": near},
            )
        )
    return records


def _case(item: Record | Fact | Mapping[str, Any]) -> Case:
    if not isinstance(item, Record):
        return Case(validate_facts([item])[0], [], [])
    near = [Pair(each.prompt, each.answers[0]) for kind in item.locality.values() for each in kind]
    return Case(
        item.fact,
        [Pair(text, item.fact.target_new) for text in item.rephrase[:_PARAPHRASES]],
        near[:_NEIGHBOURS],
    )


def usable_cases(
    items: Sequence[Record | Fact | Mapping[str, Any]], scorer: Scorer, seed: int, wanted: int
) -> list[Case]:
    """At most ``wanted`` cases in an order that depends on the seed, without repeats and facts known already."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    cases: list[Case] = []
    seen: set[str] = set()
    for start in range(0, len(order), wanted):
        fresh = []
        for index in order[start : start + wanted]:
            case = _case(items[index])
            name = " ".join(case.fact.text.split())
            if name not in seen:
                seen.add(name)
                fresh.append(case)
        scores = scorer.score([case.written for case in fresh])
        cases += [
            case
            for case, score in zip(fresh, scores, strict=True)
            if isinstance(score, PairScore) and not all(score.hits)
        ]
        if len(cases) >= wanted:
            break
    if len(cases) < _FEWEST:
        raise InvalidFact(
            f"calibration needs at least {_FEWEST} facts that the model does not answer as wanted already, got "
            f"{len(cases)} of {len(items)}"
        )
    return cases[:wanted]


def text_rows(tokenizer: Any, texts: Sequence[str] | None, context_length: int | None) -> list[list[int]]:
    """Token rows of the beginnings of texts, spread evenly over them."""
    from ..stats.cache import neutral_texts

    listed = neutral_texts() if texts is None else list(texts)
    windows: list[list[int]] = []
    step = max(1, len(listed) // (_TEXT_TOKENS // 16))
    for text in listed[::step]:
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) < 2:
            continue
        windows += text_windows(tokenizer, text, length=_TEXT_LENGTH, context_length=context_length)[:1]
        if sum(map(len, windows)) >= _TEXT_TOKENS:
            break
    if not windows:
        raise ValueError("the texts hold no text of two tokens")
    return windows


# ---- judging --------------------------------------------------------------------------------------------


class Judge:
    """Scores the model on some cases, against what it said when this was made."""

    def __init__(self, common: Common, cases: Sequence[Case]) -> None:
        self._scorer = common.scorer
        self._cases = cases
        self._paraphrases = [pair for case in cases for pair in case.paraphrases]
        neighbours = [pair for case in cases for pair in case.neighbours]
        said = zip(neighbours, self._scorer.score(neighbours), strict=True)
        self._neighbours = {pair: score.argmax for pair, score in said if isinstance(score, PairScore)}
        self._meter = common.meter
        self._reference = common.reference

    def scores(self) -> Scores:
        """Of the model as it is."""
        now = self._scorer.score(list(self._neighbours))
        same = [
            isinstance(score, PairScore) and score.argmax == before
            for score, before in zip(now, self._neighbours.values(), strict=True)
        ]
        drift = self._meter.after(self._reference)
        n = sum(window.n for window in drift)
        finite = all(window.finite for window in drift)
        return Scores(
            written=self._hits([case.written for case in self._cases]) or 0.0,
            paraphrased=self._hits(self._paraphrases),
            neighbours=sum(same) / len(same) if same else None,
            text=sum(window.same or 0.0 for window in drift) / n,
            kl=sum(window.kl or 0.0 for window in drift) / n if finite else math.inf,
        )

    def _hits(self, pairs: Sequence[Pair]) -> float | None:
        if not pairs:
            return None
        scores = self._scorer.score(pairs)
        return sum(isinstance(score, PairScore) and all(score.hits) for score in scores) / len(pairs)


# ---- what settings share --------------------------------------------------------------------------------


class Moments:
    """Second moments of keys by layer, collected or read when they are first asked for."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        given: Mapping[int, Any] | str | Path | None,
        texts: Sequence[str] | None,
        progress: bool | None,
    ) -> None:
        self._model, self._tokenizer, self._texts, self._progress = model, tokenizer, texts, progress
        n_layers = describe(model).n_layers
        self.available = set(range(n_layers))
        self._collects = given is None
        self._found: dict[int, Tensor] = {}
        if isinstance(given, (str, Path)):
            given = _read(given, model, n_layers)
        if given is not None:
            self.available &= set(given)
            for layer in self.available:
                self._found[layer] = self._checked(given[layer])
            if not self.available:
                raise ValueError(
                    f"the statistics hold layers {sorted(given)}, the model has 0 to {n_layers - 1}"
                )

    def _checked(self, given: Any) -> Tensor:
        if isinstance(given, Tensor):
            return given
        given.check(self._model, base_fingerprint=stack_of(self._model).base_fingerprint())
        return given.second_moment

    def of(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """(d, d) fp32 by layer, on the CPU if they were collected or read."""
        missing = [layer for layer in layers if layer not in self._found]
        if missing and not self._collects:
            raise ValueError(f"the statistics lack layers {missing}; they hold {sorted(self.available)}")
        if missing:
            found = ensure(self._model, self._tokenizer, missing, texts=self._texts, progress=self._progress)
            self._found.update({layer: found[layer].second_moment for layer in missing})
        return {layer: self._found[layer] for layer in layers}


def _read(directory: str | Path, model: nn.Module, n_layers: int) -> dict[int, Any]:
    """Statistics of all layers that a directory has."""
    found: dict[int, Any] = {}
    for layer in range(n_layers):
        try:
            found.update(load_directory(directory, model, [layer]))
        except FileNotFoundError:
            continue
    if not found:
        raise FileNotFoundError(f"{directory} holds no statistics of this model")
    return found


@dataclass
class Common:
    """What the settings of one calibration share."""

    model: nn.Module
    tokenizer: Any
    moments: Moments
    scorer: Scorer
    windows: list[list[int]]
    batch_size: int | None
    seed: int
    progress: bool | None
    contexts: list[str] | None = None

    def __post_init__(self) -> None:
        self.description: ModelDescription = describe(self.model)
        self.meter = DriftMeter(self.model, self.tokenizer, self.windows, batch_size=16, show_progress=False)
        self.reference: DriftReference = self.meter.before()[1]


class Shared:
    """Targets of the facts searched on, and factored statistics of the layers of the present setting."""

    def __init__(self, common: Common, facts: Sequence[Fact], rows: Sequence[FactRows], runner: Any) -> None:
        self._common, self._facts, self._rows, self._runner = common, facts, rows, runner
        self._position = {fact.text: index for index, fact in enumerate(facts)}
        self._values: dict[ValueObjective, Values] = {}
        self._factors: dict[int, CovarianceFactor] = {}
        self._spectra: dict[int, tuple[Tensor, Tensor]] = {}
        self._eigenvalues: dict[int, Tensor] = {}

    def values(self, objective: ValueObjective) -> Values:
        """The targets of all facts, on the weights of the unedited model."""
        if objective not in self._values:
            with frozen(self._common.model):
                self._values[objective] = optimise_values(
                    self._runner, self._facts, self._rows, objective, show_progress=False
                )
        return self._values[objective]

    def values_of(self, facts: Sequence[Fact], objective: ValueObjective) -> Values:
        """The targets of some of the facts."""
        return self.values(objective).select([self._position[fact.text] for fact in facts])

    def retain(self, layers: Sequence[int]) -> None:
        """Forget the factors of other layers, and the keys that earlier settings appended."""
        self._factors = {layer: factor for layer, factor in self._factors.items() if layer in layers}
        self._spectra = {layer: spectrum for layer, spectrum in self._spectra.items() if layer in layers}
        for factor in self._factors.values():
            factor.truncate(0)

    def factor(self, layer: int, moment: Tensor, keep_matrix: bool) -> CovarianceFactor:
        """The factor of C, for any λ: see :class:`OnShared`."""
        if layer not in self._factors:
            self._factors[layer] = CovarianceFactor(moment, layer=layer, keep_matrix=keep_matrix)
        return self._factors[layer]

    def eigenvalues(self, layer: int) -> Tensor:
        """(d,) of C, on the CPU; kept for all layers."""
        if layer not in self._eigenvalues:
            moment = self._common.moments.of([layer])[layer]
            place = self._common.description.projection(layer).weight.device
            self._eigenvalues[layer] = torch.linalg.eigvalsh(moment.to(place).double()).cpu()
        return self._eigenvalues[layer]

    def spectrum(self, layer: int, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d,), ascending, and eigenvectors (d, d) of C, float64."""
        if layer not in self._spectra:
            matrix = moment.double()
            self._spectra[layer] = tuple(torch.linalg.eigh((matrix + matrix.T) / 2))
        return self._spectra[layer]


class OnShared(LocateThenEdit):
    """Put before a method's class: takes targets and factored statistics from what settings share.

    C is factored once for all λ: with keys K/√λ, X = (A + K Kᵀ/λ)⁻¹K/√λ of A = C + C_p/λ is √λ times the X of λC.
    """

    def __init__(self, shared: Shared, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shared = shared
        self._root = math.sqrt(super().factor_weight())

    def targets(self, facts: Sequence[Fact], rows: Sequence[FactRows]) -> Values:
        """Those optimised on the unedited model."""
        return self._shared.values_of(facts, self.objective())

    def make_factor(self, moment: Tensor, layer: int) -> CovarianceFactor:
        """That of C."""
        return self._shared.factor(layer, moment, keep_matrix=hasattr(self.params, "mass"))

    def make_projector(self, moment: Tensor, layer: int) -> Projector:
        """P of AlphaEdit, from the spectrum that settings share."""
        return null_space_of(*self._shared.spectrum(layer, moment), self.params.null_threshold, layer)

    def solve(self, measured: LayerMeasurement) -> tuple[Tensor, Tensor]:
        """The method's, with λ in the keys."""
        scaled = replace(measured, keys=measured.keys / self._root, bare_keys=measured.bare_keys / self._root)
        left, right = super().solve(scaled)  # type: ignore[safe-super]
        return left, right / self._root

    def write(
        self,
        rows: Sequence[FactRows],
        values: Values,
        parts: Factors,
        watch: Stopwatch,
        described: list[dict[str, Any]],
        entry: PromptSweep | None = None,
    ) -> dict[int, Tensor]:
        """The method's; keys that are remembered have λ in them too."""
        keys = super().write(rows, values, parts, watch, described, entry)
        return {layer: found / self._root for layer, found in keys.items()}


def on_shared(kind: type[LocateThenEdit]) -> Callable[..., LocateThenEdit]:
    """The method's class with :class:`OnShared` before it."""
    return type(f"Shared{kind.__name__}", (OnShared, kind), {})


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Take off every edit that was made inside, whatever ended it."""
    stack = stack_of(model)
    before = {edit.id for edit in stack.edits}
    try:
        yield
    finally:
        with uninterrupted():
            for edit in reversed(stack.edits):
                if edit.id not in before:
                    stack.remove(edit)
