"""Edit a data set batch by batch, score on the way and at the end, and time the edits."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..data import Record, Records
from ..facts import Fact
from ..progress import progress
from .evaluator import DRIFT, TEACHER_FORCED, Evaluator
from .results import Report, RetentionPoint

_LOGGER = logging.getLogger(__name__)
AGE_PROTOCOL = "easyedit.tf"


class EditsFacts(Protocol):
    """Anything with ``edit(facts)``, such as an editor of fastedit."""

    def edit(self, facts: list[Fact]) -> Any:
        """Write a batch of facts into the model."""


def run_sequential(
    editor: EditsFacts,
    records: Records | Sequence[Record],
    batch_size: int,
    evaluator: Evaluator,
    checkpoints: Iterable[int] | None = None,
    *,
    immediate: Sequence[str] | None = None,
) -> Report:
    """Edit ``records`` in batches, never restoring, and evaluate.

    The unedited model is scored first, if that has not been done. Each batch is scored right after its edit
    (moment ``immediate`` for batches of one record, else ``batch``); at the checkpoints all facts edited so
    far and the drift are scored; all records are scored at the end (``final``). Timing covers the edits only.

    Args:
        editor: writes facts into the evaluator's model.
        records: what to edit, in order: the evaluator's records or some of them.
        batch_size: records edited together. Several edits of one record that must follow each other
            (conflict and round edits) make one batch per step.
        evaluator: scores; its ``before`` is called if need be.
        checkpoints: numbers of edited records at which the retention curve has a point; None takes the
            powers of ten. The end is always one.
        immediate: protocols scored right after each batch; None takes the teacher-forced ones.

    Returns:
        The evaluator's report with retention curve and efficiency.

    Raises:
        ValueError: no records, a batch size below one, or records the evaluator does not have.
    """
    records = list(records)
    if batch_size < 1 or not records:
        raise ValueError(
            f"records and a batch_size of at least 1 are needed, got {len(records)}, {batch_size}"
        )
    run = _Run(editor, records, batch_size, evaluator)
    points = sorted({*(_powers(len(records)) if checkpoints is None else checkpoints)} - {len(records)})
    evaluator.before()
    moment = "immediate" if batch_size == 1 else "batch"
    names = TEACHER_FORCED if immediate is None else tuple(immediate)
    starts = range(0, len(records), batch_size)
    for start in progress(starts, desc="editing", unit="batch", show=evaluator.show_progress):
        done = run.edit(start)
        evaluator.after(moment, run.n_edits, indices=run.indices[start:done], protocols=names)
        if points and points[0] <= done < len(records):
            points = [point for point in points if point > done]
            evaluator.after(
                "checkpoint",
                run.n_edits,
                indices=run.indices[:done],
                protocols=(AGE_PROTOCOL, *DRIFT),
                edits=run.edits,
            )
            run.note_retention("checkpoint")
    evaluator.after("final", run.n_edits, indices=run.indices, edits=run.edits)
    run.note_retention("final")
    return evaluator.report(retention=run.retention, efficiency=run.efficiency())


class _Run:
    """The state of one sequential run."""

    def __init__(
        self, editor: EditsFacts, records: Sequence[Record], batch_size: int, evaluator: Evaluator
    ) -> None:
        self.editor = editor
        self.records = records
        self.batch_size = batch_size
        self.evaluator = evaluator
        self.indices = evaluator.indices_of(records)
        self.n_edits = 0
        self.edits: list[Any] = []
        self.edited_at: dict[int, int] = {}
        self.seconds: list[tuple[float, int]] = []
        self.retention: list[RetentionPoint] = []
        self.peak_memory = 0

    def edit(self, start: int) -> int:
        """Edit the batch that begins at ``start``; returns the number of records edited so far."""
        stop = min(start + self.batch_size, len(self.records))
        for facts in steps(self.records[start:stop]):
            _synchronise()
            resident = _reset_peak()
            begin = time.perf_counter()
            self.edits.append(self.editor.edit(facts))
            _synchronise()
            self.seconds.append((time.perf_counter() - begin, len(facts)))
            self.peak_memory = max(self.peak_memory, _peak() - resident)
            self.n_edits += len(facts)
        for place in range(start, stop):
            self.edited_at[self.indices[place]] = self.n_edits
        return stop

    def note_retention(self, when: str) -> None:
        """Group the latest rows by age: 0, 1-9, 10-99 and so on, in facts edited since."""
        groups: dict[int, list[dict[str, float]]] = {}
        for row in self.evaluator.rows(AGE_PROTOCOL, when, self.n_edits):
            age = self.n_edits - self.edited_at[row["index"]]
            groups.setdefault(0 if age == 0 else 1 + int(math.log10(age)), []).append(row["metrics"])
        for group, rows in sorted(groups.items()):
            youngest, oldest = (0, 0) if group == 0 else (10 ** (group - 1), 10**group - 1)
            tacc, exact = (
                float(np.mean([row[f"reliability.{name}"] for row in rows])) for name in ("tacc", "exact")
            )
            self.retention.append(RetentionPoint(self.n_edits, youngest, oldest, len(rows), tacc, exact))

    def efficiency(self) -> dict[str, Any]:
        """Seconds per edit over edits: a batch's time divided by its facts counts once for each of them."""
        per_edit = np.repeat([seconds / n for seconds, n in self.seconds], [n for _, n in self.seconds])
        values: dict[str, Any] = {
            "seconds_per_edit": {
                "median": float(np.median(per_edit)),
                "p90": float(np.quantile(per_edit, 0.9)),
                "mean": float(per_edit.mean()),
            },
            "seconds_first_batch": self.seconds[0][0],
            "seconds_total": float(sum(seconds for seconds, _ in self.seconds)),
            "n_edits": self.n_edits,
            "batch_size": self.batch_size,
        }
        if torch.cuda.is_available():
            values["peak_device_bytes_above_model"] = self.peak_memory
        return values


def steps(batch: Sequence[Record]) -> list[list[Fact]]:
    """The facts of a batch, in groups that can be edited together.

    A fact that occurs twice (multi-hop records share edits) is edited once. A fact that changes the answer
    of one before it goes into a later step, and so does the second edit of conflict and round records.
    """
    groups: list[dict[str, Fact]] = []
    for record in batch:
        follows = record.source.startswith("pitfalls")
        earliest = 0
        for fact in record.facts:
            place = _place(groups, fact, earliest)
            groups[place].setdefault(" ".join(fact.text.split()), fact)
            earliest = place + 1 if follows else 0
    return [list(group.values()) for group in groups]


def _place(groups: list[dict[str, Fact]], fact: Fact, earliest: int) -> int:
    """The step for a fact: after the last step that gives its prompt another answer."""
    text = " ".join(fact.text.split())
    for number in reversed(range(len(groups))):
        other = groups[number].get(text)
        if other is not None:
            if other.target == fact.target and number >= earliest:
                return number
            earliest = max(earliest, number + 1)
            break
    while len(groups) <= earliest:
        groups.append({})
    return earliest


def _powers(n: int) -> list[int]:
    return [10**i for i in range(len(str(n))) if 10**i < n]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
