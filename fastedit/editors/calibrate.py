"""Hyper-parameters of locate-then-edit methods for a model without published ones: tried on some of its facts.

The search goes down the pipeline. Which block's value can be moved so far that the model gives the new answer,
and with what clamp, learning rate and steps? Over how many blocks is the value spread? How much do the statistics
weigh in the solve? Each question is asked for the few best answers to the one before. Every setting edits the
facts, is scored and is taken off again, bit for bit. Targets are optimised once for each block, clamp and learning
rate, and serve all settings that share them; so do the factored statistics of a window of blocks.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Record
from ..errors import NumericalError
from ..evaluation import Scorer
from ..facts import Fact
from ..io import atomic_write_json
from ..models.describe import describe
from ..progress import progress as progress_bar
from .base import editor_class
from .locate_then_edit import LocateThenEdit
from .prompts import fact_rows
from .trials import (
    Case,
    Common,
    Judge,
    Moments,
    Scores,
    Shared,
    on_shared,
    packaged_records,
    text_rows,
    unchanged,
    usable_cases,
)
from .values import ValueObjective

logger = logging.getLogger(__name__)

_REACHED = 0.5  # nats: a target whose loss ends below this is one that the model can be brought to say
_CLAMPS = (0.75, 1.5, 4.0)
_RATES = (0.1, 0.5, 1.0)
_STEPS = (25, 50)
_WINDOWS = (1, 2, 3, 5)
_WEIGHTS = (0.3, 0.03, 0.1, 1.0, 3.0)  # λ over d, the mean of kᵀC⁻¹k; the first is tried with every window
_SHARES = (0.2, 0.02, 0.05, 1.0)  # of the trace of C, left to the null space
_RIDGES = (0.03, 0.003, 0.3)  # λ₂ over the trace of C, the mean of ‖k‖²
_MASSES = (0.8, 0.95, 1.0)
_MOST_LAYERS = 6
_KEPT_LAYERS, _KEPT_TARGETS, _KEPT_WINDOWS = 3, 4, 3
_TARGETS_SHARE = 0.5  # of the budget


# ---- what comes out -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetTrial:
    """How many facts' targets could be optimised at one block with one setting.

    Attributes:
        layer: the block.
        clamp: see :class:`fastedit.editors.locate_then_edit.LocateParams`.
        lr: likewise.
        steps: likewise.
        reached: the share of facts whose target's loss ended below 0.5.
        loss: the median of the last losses.
    """

    layer: int
    clamp: float
    lr: float
    steps: int
    reached: float
    loss: float

    @property
    def settings(self) -> dict[str, Any]:
        """Clamp, learning rate and steps, as parameters of a method."""
        return {"clamp": self.clamp, "lr": self.lr, "steps": self.steps}


@dataclass(frozen=True)
class Trial:
    """One setting, and what it did to the facts that are searched on.

    Attributes:
        params: all hyper-parameters.
        scores: None if the edit failed.
        failure: why.
        seconds: of editing, scoring and taking the edit off, targets not counted.
    """

    params: dict[str, Any]
    scores: Scores | None
    failure: str = ""
    seconds: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: the total, and of equals the one that changes plain text least."""
        if self.scores is None or not math.isfinite(self.scores.kl):
            return (0.0, -math.inf)
        return (round(self.scores.total, 6), -self.scores.kl)


@dataclass
class Calibration:
    """The hyper-parameters chosen, and everything that was tried.

    Attributes:
        method: the method's name.
        params: the hyper-parameters chosen, for ``params=`` of :func:`fastedit.editor`.
        default: those that the method has for this model without calibration.
        searched: scores of ``params`` on the facts that were searched on.
        checked: scores of ``params`` on the facts kept back, edited like any others; None if that failed.
        checked_default: scores of ``default`` on the facts kept back; None if it cannot edit them.
        n_searched: number of facts searched on.
        n_checked: number of facts kept back.
        targets: every setting tried for optimising targets.
        trials: every setting tried for editing, the default first.
        finished: False if the budget ended the search.
        seconds: in all.
        why: the reason for the choice, in words.
    """

    method: str
    params: dict[str, Any]
    default: dict[str, Any]
    searched: Scores
    checked: Scores | None
    checked_default: Scores | None
    n_searched: int
    n_checked: int
    targets: list[TargetTrial] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    finished: bool = True
    seconds: float = 0.0
    why: str = ""

    def save(self, path: str | Path) -> Path:
        """Write the hyper-parameters chosen, and nothing else, as the JSON file that ``params=`` takes."""
        atomic_write_json(path, self.params)
        return Path(path)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **{name: getattr(self, name) for name in ("method", "params", "default", "why", "finished")},
            "scores": {
                "searched": self.searched.as_dict(),
                "checked": self.checked.as_dict() if self.checked else None,
                "checked_default": self.checked_default.as_dict() if self.checked_default else None,
            },
            "facts": {"searched": self.n_searched, "checked": self.n_checked},
            "n_tried": {"targets": len(self.targets), "edits": len(self.trials)},
            "targets": [dataclasses.asdict(trial) for trial in self.targets],
            "trials": [
                {
                    "params": trial.params,
                    "scores": trial.scores.as_dict() if trial.scores else None,
                    "failure": trial.failure,
                    "seconds": round(trial.seconds, 3),
                }
                for trial in self.trials
            ],
            "seconds": round(self.seconds, 1),
        }


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    facts: Iterable[Record | Fact | Mapping[str, Any]] | None = None,
    method: str = "memit",
    *,
    statistics: Mapping[int, Any] | str | Path | None = None,
    texts: Sequence[str] | None = None,
    limit: int = 20,
    batch_size: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    say: Callable[[str], None] = logger.info,
) -> Calibration:
    """Choose a method's hyper-parameters for a model by trying them.

    Settings are ranked by the harmonic mean of four shares on the facts searched on: facts written, facts written
    under other wordings, neighbours that are answered as before, and tokens of plain text that are predicted as
    before (the middle two where the facts have such prompts). The winner and the method's default are then
    measured on facts that were kept back. The model has the bits it had when this returns or raises.

    Statistics must be those that will be used for editing: which λ is right depends on them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        facts: records of :mod:`fastedit.data`, whose rephrasings and locality prompts are used, or plain facts;
            None takes changed facts of the world that come with the package.
        method: a locate-then-edit method.
        statistics: as for the editor: by layer, or a directory; only layers that it has are tried. None collects
            and caches them, layer by layer as they are needed.
        texts: texts like those that the model was trained on, for the statistics, if they are collected, and for
            the damage to plain text; None takes the packaged neutral text.
        limit: facts to search on. Half as many again are kept back; if there are fewer facts, a third of them.
        batch_size: facts of one edit. None makes one batch, or two for methods that remember earlier batches. Give
            that of your sequence, and a ``limit`` of many batches, to see damage that builds up.
        budget: seconds after which the search stops and the best setting so far is taken; measuring that one
            comes on top.
        seed: of the choice of facts, and of the editor's contexts.
        progress: show progress bars; None shows them on a terminal only.
        say: takes plain-language messages: how long it will take, what goes on.

    Raises:
        ValueError: not a locate-then-edit method, or a number out of range.
        InvalidFact: fewer than six usable facts.
        NumericalError: no setting, the default included, could edit these facts.
    """
    kind = editor_class(method)
    if not issubclass(kind, LocateThenEdit):
        raise ValueError(f"calibrate serves locate-then-edit methods such as memit and rome, got {method!r}")
    for name, value, least in (("limit", limit, 4), ("batch_size", batch_size, 1), ("budget", budget, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    started = time.monotonic()
    given = packaged_records(seed) if facts is None else list(facts)
    moments = Moments(model, tokenizer, statistics, texts, progress)
    with unchanged(model), _quiet():
        scorer = Scorer(model, tokenizer, show_progress=False)
        cases = usable_cases(given, scorer, seed, limit + limit // 2)
        n_checked = len(cases) // 3
        windows = text_rows(tokenizer, texts, describe(model).context_length)
        search = _Search(
            kind,
            Common(model, tokenizer, moments, scorer, windows, batch_size, seed, progress),
            cases[n_checked:],
            None if budget is None else started + budget,
            say,
        )
        result = search.run(cases[:n_checked])
    result.seconds = time.monotonic() - started
    return result


# ---- the search -----------------------------------------------------------------------------------------


class _BudgetSpent(Exception):
    """Ends the search."""


class _Search:
    """The stages of the search for one method; see the module's docstring."""

    def __init__(
        self,
        kind: type[LocateThenEdit],
        common: Common,
        cases: Sequence[Case],
        deadline: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.kind, self.common, self.cases, self.deadline, self.say = kind, common, cases, deadline, say
        first = kind(common.model, common.tokenizer, seed=common.seed, progress=False)
        self.default = first.params
        self.fields = {each.name for each in dataclasses.fields(self.default)}
        common.contexts = list(first.contexts)
        facts = [case.fact for case in cases]
        rows = fact_rows(common.tokenizer, facts, common.contexts, common.description.context_length)
        self.shared = Shared(common, facts, rows, first.runner)
        self.judge = Judge(common, cases)
        self.targets: list[TargetTrial] = []
        self.trials: list[Trial] = []
        self.make = on_shared(kind)
        now = time.monotonic()
        self.targets_deadline = None if deadline is None else now + _TARGETS_SHARE * (deadline - now)

    def run(self, kept_back: Sequence[Case]) -> Calibration:
        """Search, then measure the winner and the default on the cases kept back."""
        layers = self.candidate_layers()
        if not set(self.default.layers) <= self.common.moments.available:
            raise ValueError(
                f"the statistics lack layers of the default {self.default.layers}, which is compared with; they "
                f"hold {sorted(self.common.moments.available)}"
            )
        self.common.moments.of(self.default.layers)
        started = time.monotonic()
        self.shared.values(self._objective(self.default.layers[-1], vars(self.default)))
        optimised = time.monotonic()
        self.try_([self.default])
        self.announce(layers, optimised - started, time.monotonic() - optimised)
        finished = True
        try:
            self.search(layers)
        except _BudgetSpent:
            finished = False
        best = max(self.trials, key=lambda trial: trial.rank)
        if best.scores is None:
            raise NumericalError(f"no setting could edit these facts; the default: {self.trials[0].failure}")
        chosen = type(self.default)(**best.params)
        self.say("measuring the choice and the default on the facts kept back")
        checked = self.check(chosen, kept_back)
        by_default = checked if chosen == self.default else self.check(self.default, kept_back)
        return Calibration(
            self.kind.method,
            _plain(chosen),
            _plain(self.default),
            best.scores,
            checked.scores,
            by_default.scores,
            len(self.cases),
            len(kept_back),
            self.targets,
            self.trials,
            finished,
            why=self.reason(best, finished),
        )

    def search(self, layers: Sequence[int]) -> None:
        """All stages, until done or :class:`_BudgetSpent`."""
        targets = self.best_targets(layers)
        windows = sorted({window for target in targets for window in self.windows(target.layer)})
        self.common.moments.of(sorted({layer for window in windows for layer in window}))
        spread = []
        for target in targets:
            for window in self.windows(target.layer):
                spread.append(replace(self.default, layers=window, **target.settings))
        spread = [replace(params, **self.solver_settings(params.layers)[0]) for params in spread]
        best = self.best(self.try_(spread, "layers"), _KEPT_WINDOWS)
        solved = [
            replace(params, **settings)
            for params in best
            for settings in self.solver_settings(params.layers)[1:]
        ]
        best = self.best([*self.trials, *self.try_(solved, "solver")], 1)
        for settings in self.refinements(best[0]):
            refined = [replace(self.best(self.trials, 1)[0], **settings)]
            self.try_(refined)

    # -- targets ------------------------------------------------------------------------------------

    def candidate_layers(self) -> list[int]:
        """All blocks but the last, or six of them evenly spread and the default's, as far as there are statistics."""
        last = self.common.description.n_layers - 2
        chosen = set(range(last + 1))
        if len(chosen) > _MOST_LAYERS:
            chosen = {round(i * last / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS)}
        chosen = (chosen | {self.default.layers[-1]}) & self.common.moments.available
        return sorted(chosen)

    def best_targets(self, layers: Sequence[int]) -> list[TargetTrial]:
        """The few best settings for optimising targets: first the block, then clamp and rate, then the steps.

        Half of the budget may go into it.
        """
        depth = self.default.layers[-1]
        self.optimise([(layer, _CLAMPS[1], _RATES[1]) for layer in layers], "blocks", _STEPS[0])
        by_block = sorted(self.targets, key=lambda t: (-t.reached, abs(t.layer - depth), t.loss))
        kept = [trial.layer for trial in by_block[:_KEPT_LAYERS]]
        known = {(trial.layer, trial.clamp, trial.lr) for trial in self.targets}
        grid = [(layer, clamp, rate) for layer in kept for clamp in _CLAMPS for rate in _RATES]
        fresh = [point for point in grid if point not in known]
        self.optimise(fresh, "clamps and learning rates", _STEPS[0])
        best: dict[tuple[int, float], TargetTrial] = {}
        for trial in sorted((t for t in self.targets if t.layer in kept), key=_most_reached):
            best.setdefault((trial.layer, trial.clamp), trial)
        chosen = sorted(best.values(), key=_most_reached)[:_KEPT_TARGETS]
        longer = self.optimise([(t.layer, t.clamp, t.lr) for t in chosen], "steps", _STEPS[1])
        better = {(t.layer, t.clamp): t for t in longer if t.reached > best[t.layer, t.clamp].reached}
        return [better.get((trial.layer, trial.clamp), trial) for trial in chosen]

    def optimise(self, grid: Sequence[tuple[int, float, float]], what: str, steps: int) -> list[TargetTrial]:
        """Optimise the targets of all facts at every (block, clamp, rate), as far as the time for it goes."""
        found: list[TargetTrial] = []
        for layer, clamp, rate in self.bar(grid, f"targets: {what}"):
            if (
                self.targets
                and self.targets_deadline is not None
                and time.monotonic() > self.targets_deadline
            ):
                break
            objective = self._objective(layer, {"clamp": clamp, "lr": rate, "steps": steps})
            losses = self.losses(objective)
            reached = sum(loss < _REACHED for loss in losses) / len(losses)
            trial = TargetTrial(layer, clamp, rate, steps, reached, median(losses))
            found.append(trial)
            self.targets.append(trial)
        return found

    def losses(self, objective: ValueObjective) -> list[float]:
        """The last loss of each fact's target; infinite where there is none."""
        values = self.shared.values(objective)
        losses = values.final_loss.tolist()
        return [
            math.inf if index in values.broken or math.isnan(loss) else loss
            for index, loss in enumerate(losses)
        ]

    def _objective(self, layer: int, settings: Mapping[str, Any]) -> ValueObjective:
        return ValueObjective(
            layer=layer,
            at_mlp=self.kind.value_at_mlp,
            weight_decay=self.default.weight_decay,
            kl_factor=self.default.kl_factor,
            **{name: settings[name] for name in ("steps", "lr", "clamp")},
        )

    # -- edits --------------------------------------------------------------------------------------

    def windows(self, last: int) -> list[tuple[int, ...]]:
        """The blocks to spread a value of block ``last`` over: 1, 2, 3 or 5 of them."""
        if self.kind.one_by_one:
            return [(last,)]
        spans = {tuple(range(max(0, last - size + 1), last + 1)) for size in _WINDOWS}
        return sorted((w for w in spans if set(w) <= self.common.moments.available), key=len)

    def solver_settings(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """What is tried for the solve, the middle first: in units of what the keys of these blocks are like."""
        moments = self.common.moments.of(layers)
        if "null_threshold" in self.fields:
            trace = sum(float(moment.diagonal().sum()) for moment in moments.values()) / len(moments)
            values = torch.cat([self.shared.eigenvalues(layer) for layer in layers])
            return [
                {"null_threshold": _threshold(values, share), "ridge": _short(factor * trace)}
                for share in _SHARES
                for factor in _RIDGES
            ]
        if "covariance_weight" in self.fields:
            d = len(next(iter(moments.values())))
            ridge = getattr(self.default, "ridge", 1.0)
            return [{"covariance_weight": _short(factor * d / ridge)} for factor in _WEIGHTS]
        if "use_covariance" in self.fields:
            return [{"use_covariance": True}, {"use_covariance": False}]
        return [{}]

    def refinements(self, params: Any) -> Iterator[dict[str, Any]]:
        """Single changes of the best setting: NSE's neurons, and its bounds in units of the targets' distances."""
        if "mass" not in self.fields:
            return
        yield from ({"mass": mass} for mass in _MASSES if mass != params.mass)
        shifts = self.shared.values(self._objective(params.layers[-1], vars(params))).shift.norm(dim=1)
        yield {"tolerance": _short(0.3 * float(shifts.median()))}
        yield {"upper_bound": _short(float(shifts.quantile(0.9)))}

    def try_(self, candidates: Sequence[Any], what: str | None = None) -> list[Trial]:
        """Edit the facts with every setting, score and take off; settings tried before are not tried again."""
        found = []
        known = {tuple(sorted(trial.params.items())) for trial in self.trials}
        fresh = [
            params for params in dict.fromkeys(candidates) if tuple(sorted(vars(params).items())) not in known
        ]
        for params in self.bar(fresh, f"edits: {what}") if what else fresh:
            self.check_budget()
            self.shared.retain(params.layers)
            objective = self._objective(params.layers[-1], vars(params))
            losses = self.losses(objective)
            trial = self.trial(
                params,
                [case.fact for case in self.cases],
                self.judge,
                lambda *args, **options: self.make(self.shared, *args, **options),
            )
            if trial.scores is not None:
                unreached = sum(loss >= _REACHED for loss in losses)
                trial = replace(trial, scores=replace(trial.scores, unreached=unreached))
            found.append(trial)
            self.trials.append(trial)
        return found

    def check(self, params: Any, cases: Sequence[Case]) -> Trial:
        """Edit other cases with the method as it is, and score."""
        return self.trial(params, [case.fact for case in cases], Judge(self.common, cases), self.kind)

    def trial(
        self, params: Any, facts: Sequence[Fact], judge: Judge, make: Callable[..., LocateThenEdit]
    ) -> Trial:
        """Edit facts with one setting, score, and take the edits off."""
        common = self.common
        started = time.monotonic()
        set_aside = unreached = 0
        with unchanged(common.model):
            try:
                editor = make(
                    common.model,
                    common.tokenizer,
                    params=params,
                    statistics=common.moments.of(params.layers),
                    contexts=common.contexts,
                    seed=common.seed,
                    progress=False,
                )
                for batch in self.batches(facts):
                    measured = editor.edit(batch).measured
                    set_aside += len(measured["set_aside"])
                    unreached += sum(each["nll_optimised"] >= _REACHED for each in measured["facts"])
                scores = replace(judge.scores(), set_aside=set_aside, unreached=unreached + set_aside)
            except NumericalError as error:
                return Trial(dict(vars(params)), None, str(error), time.monotonic() - started)
        return Trial(dict(vars(params)), scores, "", time.monotonic() - started)

    def batches(self, facts: Sequence[Fact]) -> list[Sequence[Fact]]:
        """The facts in batches."""
        half = -(-len(facts) // 2) if self.kind.remembers else len(facts)
        size = self.common.batch_size or half
        return [facts[start : start + size] for start in range(0, len(facts), size)]

    # -- the rest -----------------------------------------------------------------------------------

    def best(self, trials: Sequence[Trial], count: int) -> list[Any]:
        """The hyper-parameters of the best trials."""
        ranked = sorted(trials, key=lambda trial: trial.rank, reverse=True)
        return [type(self.default)(**trial.params) for trial in ranked[:count]]

    def bar(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        """The items, with a progress bar."""
        return progress_bar(items, desc=what, unit="setting", show=self.common.progress)

    def check_budget(self) -> None:
        """Raises _BudgetSpent, but not before the default has been tried."""
        if self.trials and self.deadline is not None and time.monotonic() > self.deadline:
            raise _BudgetSpent

    def announce(self, layers: Sequence[int], optimising: float, editing: float) -> None:
        """Say about how long the search will take, from what the default took."""
        per_step = optimising / self.default.steps
        kept = min(len(layers), _KEPT_LAYERS)
        runs = len(layers) + kept * (len(_CLAMPS) * len(_RATES) - 1)
        seconds = per_step * (runs * _STEPS[0] + _KEPT_TARGETS * _STEPS[1])
        windows = 1 if self.kind.one_by_one else len(_WINDOWS)
        solver = len(self.solver_settings(self.default.layers))
        edits = _KEPT_TARGETS * windows + _KEPT_WINDOWS * (solver - 1) + (5 if "mass" in self.fields else 0)
        seconds += edits * editing + 2 * (optimising + editing)
        self.say(
            f"searching on {len(self.cases)} facts: up to {runs + _KEPT_TARGETS} ways to optimise targets and "
            f"{edits} edits, about {_duration(seconds)}"
            + (
                ""
                if self.deadline is None
                else f", or until the budget ends in {_duration(self.deadline - time.monotonic())}"
            )
        )

    def reason(self, best: Trial, finished: bool) -> str:
        """Why this setting was chosen."""
        n = len(self.trials)
        why = (
            f"of {n} settings it has the best harmonic mean of what is written and what is kept"
            if n > 1
            else "nothing but the default was tried"
        )
        if best is self.trials[0] and n > 1:
            why += "; it is the default"
        return why if finished else why + "; the budget ended the search early"


def _most_reached(trial: TargetTrial) -> tuple[float, float, float]:
    """Sort key: the most targets reached, then the smaller change, then the lower loss."""
    return -trial.reached, trial.clamp, trial.loss


def _threshold(values: Tensor, share: float) -> float:
    """τ such that the directions of smaller eigenvalue hold a share of the sum; 1 or more keeps all."""
    values = values.clamp(min=0).sort().values
    if share >= 1:
        return _short(2 * float(values[-1]))
    held = int((values.cumsum(0) <= share * values.sum()).sum())
    return _short(float(values[min(held, len(values) - 1)]))


def _short(value: float) -> float:
    """Two digits, as people write settings."""
    return float(f"{value:.2g}")


def _plain(params: Any) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(params).items()}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the editors' warnings, which every setting would repeat; what they say is counted instead."""
    loggers = [
        logging.getLogger(f"{__package__}.{name}") for name in ("locate_then_edit", "alphaedit", "nse")
    ]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
