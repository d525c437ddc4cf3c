"""Rows, results and the report: numbers that carry how they were made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..io import atomic_write_json
from .metrics import Estimate, bootstrap_means, estimate, harmonic_mean

MOMENTS = ("before", "immediate", "batch", "checkpoint", "final")
"""When a record is scored: on the unedited model; right after its edit; right after its batch; on the way,
all edited so far; after the last edit."""

GUARD = {"warn_ppl": 1.1, "fail_ppl": 1.5, "warn_kl": 0.05, "fail_kl": 0.5, "fail_canary": 10.0}
"""Thresholds of the health guard: perplexity as a multiple of before, KL in nats, points of canary
exact match lost. Engineering defaults."""

_RAW = ("drift.ppl", "drift.kl", "drift.weight", "wise.ppl")


@dataclass(frozen=True)
class Result:
    """One protocol at one moment.

    Attributes:
        protocol: the protocol's id, such as ``cf.prob``.
        when: one of ``MOMENTS``.
        n_edits: facts edited when the last of its records was scored.
        n_records: records averaged.
        metrics: name to mean and spread over records.
        skipped: records and items left out, with the reason.
        meta: model, data, seed, versions and whatever else the numbers depend on.
    """

    protocol: str
    when: str
    n_edits: int
    n_records: int
    metrics: dict[str, Estimate]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the shared ``meta`` is left to the report."""
        fields = {"protocol": self.protocol, "when": self.when, "n_edits": self.n_edits}
        metrics = {name: asdict(value) for name, value in self.metrics.items()}
        return {**fields, "n_records": self.n_records, "metrics": metrics, "skipped": self.skipped}


def average(results: Sequence[Result]) -> dict[str, float]:
    """Mean of each metric over results of one protocol at one moment (several seeds or data sets).

    Raises:
        ValueError: no results, or results of different protocols or moments, which are not comparable.
    """
    if not results:
        raise ValueError("average: no results")
    kinds = sorted({(result.protocol, result.when) for result in results})
    if len(kinds) > 1:
        shown = ", ".join(f"{protocol} ({when})" for protocol, when in kinds)
        raise ValueError(f"results of different protocols or moments cannot be averaged or ranked: {shown}")
    names = [name for name in results[0].metrics if all(name in r.metrics for r in results)]
    return {name: sum(r.metrics[name].mean for r in results) / len(results) for name in names}


def summarise(
    rows: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    seed: int = 0,
) -> Result:
    """Average the rows of one protocol at one moment.

    Raises:
        ValueError: rows of different protocols or moments.
    """
    kinds = {(row["protocol"], row["when"]) for row in (*rows, *skipped)}
    if len(kinds) != 1:
        raise ValueError(f"rows of one protocol and moment are averaged, got {sorted(kinds)}")
    protocol, when = kinds.pop()
    if protocol in ("drift.ppl", "drift.kl", "drift.top1"):
        metrics = _windows(protocol, rows, seed)
    else:
        names = dict.fromkeys(name for row in rows for name in row["metrics"])
        values = {name: [r["metrics"][name] for r in rows if name in r["metrics"]] for name in names}
        metrics = {name: estimate(value, seed=seed) for name, value in values.items()}
    if protocol == "cf.prob":
        metrics |= _score(rows, metrics, seed)
    if protocol == "wise.ppl" and rows:
        metrics |= _other_means(rows, seed)
    n_edits = max((row["n_edits"] for row in (*rows, *skipped)), default=0)
    left_out = [{"record": row["record"], "reason": row["reason"]} for row in skipped]
    return Result(protocol, when, n_edits, len(rows), metrics, left_out, meta)


def _other_means(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Estimate]:
    """The median of the records' perplexities and exp of their mean NLL: the mean follows the few largest."""
    nll = np.array([row["metrics"]["nll"] for row in rows], dtype=np.float64)
    draws = nll[np.random.default_rng(seed).integers(len(nll), size=(1000, len(nll)))]
    kinds: dict[str, Callable[..., Any]] = {"ppl.median": np.median, "ppl.geometric": np.mean}
    out = {}
    for name, function in kinds.items():
        resampled = np.exp(function(draws, axis=1))
        low, high = (float(q) for q in np.quantile(resampled, [0.025, 0.975]))
        value = float(np.exp(function(nll)))
        out[name] = Estimate(value, float(resampled.std()), low, high, len(nll), "bootstrap")
    return out


def _windows(protocol: str, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Estimate]:
    """Sum over windows divided by number of tokens; the interval resamples windows."""
    if not rows:
        return {}
    name = protocol.removeprefix("drift.")
    sums = np.array([[row["metrics"]["sum"], row["metrics"]["count"]] for row in rows], dtype=np.float64)
    final = (lambda x: np.exp(np.minimum(x, 700.0))) if name == "ppl" else (lambda x: x)
    value = float(final(sums[:, 0].sum() / sums[:, 1].sum()))
    n = int(sums[:, 1].sum())
    if len(rows) == 1:
        return {name: Estimate(value, 0.0, value, value, n, "none")}
    means = bootstrap_means(sums, seed=seed)
    resampled = final(means[:, 0] / means[:, 1])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {name: Estimate(value, float(resampled.std()), float(low), float(high), n, "bootstrap")}


def _score(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Estimate], seed: int
) -> dict[str, Estimate]:
    """S: the harmonic mean of the three means, not the mean of harmonic means; and their plain mean."""
    names = ("ES", "PS", "NS")
    if not all(name in metrics for name in names):
        return {}
    means = [metrics[name].mean for name in names]
    whole = np.array(
        [[r["metrics"][n] for n in names] for r in rows if all(n in r["metrics"] for n in names)]
    )
    if not len(whole):
        return {}
    resampled = bootstrap_means(whole, seed=seed)
    out = {}
    for name, function in (("S_harmonic", harmonic_mean), ("avg", lambda v: float(np.mean(v)))):
        draws = np.array([function(list(row)) for row in resampled])
        low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
        out[name] = Estimate(function(means), float(draws.std()), low, high, len(whole), "bootstrap")
    return out


@dataclass(frozen=True)
class RetentionPoint:
    """How well facts of one age are remembered.

    Attributes:
        n_edits: facts edited so far.
        age_from: youngest age in this group, in facts edited since (0 is the newest); ``age_to`` the oldest.
        n: number of facts in the group.
        tacc: their mean token accuracy; ``exact`` the share with all tokens right.
    """

    n_edits: int
    age_from: int
    age_to: int
    n: int
    tacc: float
    exact: float


@dataclass(frozen=True)
class Report:
    """All results of an evaluation.

    Attributes:
        results: one per protocol and moment.
        meta: what every number depends on.
        retention: accuracy by age at the checkpoints, of a sequential run.
        efficiency: seconds per edit and the like, of a sequential run.
    """

    results: list[Result]
    meta: Mapping[str, Any] = field(default_factory=dict)
    retention: list[RetentionPoint] = field(default_factory=list)
    efficiency: dict[str, Any] = field(default_factory=dict)

    def get(self, protocol: str, when: str = "final") -> Result:
        """The result of one protocol at one moment (the last, if there are several).

        Raises:
            KeyError: there is none; the message lists what there is.
        """
        found = [r for r in self.results if r.protocol == protocol and r.when == when]
        if not found:
            have = ", ".join(f"{r.protocol} ({r.when})" for r in self.results)
            raise KeyError(f"no result of {protocol} ({when}); there are: {have or 'none'}")
        return found[-1]

    def guard(self) -> list[str]:
        """Warnings about the model's health, worst first; empty if there is nothing to say."""
        messages = []
        for when in [m for m in MOMENTS if m != "before"]:
            ratio, kl = self._ppl_ratio(when), self._mean("drift.kl", "kl", when)
            broken = [r for r in self.results if r.when == when and _not_finite(r)]
            if broken:
                messages.append(f"fail: logits that are not finite ({when})")
            messages += _judge("perplexity is", ratio, "warn_ppl", "fail_ppl", when, "times that of before")
            messages += _judge("KL to the unedited model is", kl, "warn_kl", "fail_kl", when, "nats")
            lost = self._canary_lost(when)
            if lost is not None and lost >= GUARD["fail_canary"]:
                messages.append(f"fail: canary exact match lost {lost:.1f} points ({when})")
        return sorted(dict.fromkeys(messages))

    def _mean(self, protocol: str, metric: str, when: str) -> float | None:
        try:
            return self.get(protocol, when).metrics[metric].mean
        except KeyError:
            return None

    def _ppl_ratio(self, when: str) -> float | None:
        before, after = (self._mean("drift.ppl", "ppl", moment) for moment in ("before", when))
        return after / before if before and after else None

    def _canary_lost(self, when: str) -> float | None:
        before, after = (self._mean("drift.canary", "em", moment) for moment in ("before", when))
        return None if before is None or after is None else 100 * (before - after)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "meta": dict(self.meta),
            "results": [result.as_dict() for result in self.results],
            "retention": [asdict(point) for point in self.retention],
            "efficiency": self.efficiency,
            "guard": {"thresholds": GUARD, "messages": self.guard()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`as_dict` as JSON, atomically."""
        atomic_write_json(path, self.as_dict())

    def table(self) -> str:
        """A table to read: one line per metric, one column per moment.

        Scores are in percent, mean ± standard error and the 95 % interval; perplexity, KL and the weights'
        change are as they are.
        """
        moments = [when for when in MOMENTS if when != "checkpoint"]
        moments = [when for when in moments if any(r.when == when for r in self.results)]
        lines = [["protocol", "metric", "n", *moments]]
        for protocol in dict.fromkeys(r.protocol for r in self.results if r.when != "checkpoint"):
            lines += self._lines(protocol, moments)
        parts = [self._heading(), _aligned(lines), *self._notes()]
        return "\n".join(part for part in parts if part)

    def _heading(self) -> str:
        names = ("model", "dtype", "data", "n_records", "seed")
        known = [f"{name} {self.meta[name]}" for name in names if self.meta.get(name) not in (None, "")]
        unit = "scores in percent: mean ± standard error [95 % interval]"
        return "\n".join(part for part in (", ".join(known), unit) if part)

    def _lines(self, protocol: str, moments: Sequence[str]) -> list[list[str]]:
        results = {r.when: r for r in self.results if r.protocol == protocol}
        names = dict.fromkeys(name for when in moments if when in results for name in results[when].metrics)
        lines: list[list[str]] = []
        for name in names:
            cells = {when: r.metrics[name] for when, r in results.items() if name in r.metrics}
            n = max(value.n for value in cells.values())
            shown = [_cell(cells[when], protocol) if when in cells else "" for when in moments]
            label = protocol if not lines else ""
            lines.append([label, name, str(n), *shown])
        return lines

    def _notes(self) -> list[str]:
        notes = []
        if self.retention:
            lines = [["edits", "age", "n", "tacc", "exact"]]
            for p in self.retention:
                age = f"{p.age_from}-{p.age_to}"
                lines.append([str(p.n_edits), age, str(p.n), f"{100 * p.tacc:.1f}", f"{100 * p.exact:.1f}"])
            notes.append("\nretention (age: facts edited since)\n" + _aligned(lines))
        if self.efficiency:
            notes.append("\nefficiency\n" + _aligned([[k, _plain(v)] for k, v in _flat(self.efficiency)]))
        for result in self.results:
            if result.skipped and result.when != "checkpoint":
                notes.append(f"\n{result.protocol} ({result.when}): {_reasons(result.skipped)}")
        for message in self.guard():
            notes.append(f"\nguard: {message}")
        return notes


def _not_finite(result: Result) -> bool:
    return any("not finite" in entry["reason"] for entry in result.skipped)


def _judge(what: str, value: float | None, warn: str, fail: str, when: str, unit: str) -> list[str]:
    if value is None or value <= GUARD[warn]:
        return []
    level, limit = ("fail", GUARD[fail]) if value > GUARD[fail] else ("warn", GUARD[warn])
    return [f"{level}: {what} {value:.3g} {unit} ({when}; the limit is {limit})"]


def _cell(value: Estimate, protocol: str) -> str:
    scale, digits = (1.0, 4) if protocol in _RAW else (100.0, 1)

    def show(x: float) -> str:
        return f"{x:.4g}" if scale == 1.0 else f"{scale * x:.{digits}f}"

    if value.interval == "none":
        return show(value.mean)
    return f"{show(value.mean)} ± {show(value.se)} [{show(value.low)}, {show(value.high)}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reasons(skipped: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for entry in skipped:
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + 1
    return f"{len(skipped)} left out: " + "; ".join(f"{n} x {reason}" for reason, n in counts.items())


class RowWriter:
    """Appends rows to a JSON-lines file as they are made; without a path it only keeps them out of the way.

    Every line is flushed, so that an interrupted run keeps what it has.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. A value that is not finite is refused: it has no place in JSON."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of rows; a last line that was cut off by an interruption is left out."""
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if any(rest.strip() for rest in lines[number + 1 :]):
                raise
    return rows


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether every value of a row is a number that may enter a mean."""
    return all(math.isfinite(value) for value in metrics.values())
