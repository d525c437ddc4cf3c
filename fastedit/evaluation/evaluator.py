"""Scores a model's records before and after edits, and collects the numbers into a report."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..data import Record, Records, Snippets
from ..models import fingerprint
from ..progress import progress
from .drift import DriftMeter, DriftReference, Window, text_windows, weight_drift
from .generation import Generation, Generator
from .metrics import em, token_accuracy
from .protocols import (
    Answers,
    CfAcc,
    CfGen,
    CfProb,
    EasyEditTf,
    Judge,
    NotApplicableError,
    Protocol,
    Row,
    Wild,
    WiseOod,
    WisePpl,
    ZsreMemit,
)
from .results import MOMENTS, Report, Result, RowWriter, is_finite, summarise
from .scoring import Pair, PairScore, Scorer, Unscorable

DRIFT = ("drift.ppl", "drift.kl", "drift.top1", "drift.weight", "drift.canary")
TEACHER_FORCED = ("easyedit.tf", "cf.prob", "cf.acc", "zsre.memit", "wise.ppl", "wise.ood")
PROTOCOLS = ("wild", *TEACHER_FORCED, "cf.gen", *DRIFT)
"""The ids of all protocols, headline first."""


@dataclass
class Before:
    """What the unedited model gave: rows for the report, and what edited models are compared with.

    It may be handed to the evaluators of several editing methods, as long as model, records and settings
    are the same (``key``). ``model_hash`` is that of the unedited model.
    """

    key: str
    model_hash: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    drift: DriftReference | None = None


class Evaluator:
    """Scores records of a data set on a model, before and after it is edited.

    >>> evaluator = Evaluator(model, tokenizer, records)                         # doctest: +SKIP
    >>> evaluator.before()                                                       # doctest: +SKIP
    >>> edit = editor.edit(records.facts)                                        # doctest: +SKIP
    >>> evaluator.after(when="final", n_edits=len(records.facts), edits=[edit])  # doctest: +SKIP
    >>> report = evaluator.report()                                              # doctest: +SKIP

    Args:
        model: the causal language model; edited in place between the calls.
        tokenizer: its tokenizer.
        records: what to score.
        protocols: ids to run; None runs all that the records have the fields for.
        batch_size: texts a batch; results do not depend on it.
        generation: also sample text for fluency and consistency (``cf.gen``), which is slow.
        text: the fixed text for drift; None takes the packaged neutral text.
        out: JSON-lines file that rows are appended to as they are made.
        seed: of sampling and bootstrap.
        show_progress: True, False, or None for bars on a terminal only.
        chat: ask ``wild`` prompts through the chat template; None does so if the tokenizer has one.
        judge: optional ``judge(question, gold, answer) -> bool`` for ``wild``.
        judge_name: what the judge is called in the report.
        snippets: CounterFact's reference texts, for consistency.
        items_per_kind: prompts of each kind that ``wild`` asks; None asks all.
        drift_tokens: use at most this many tokens of the text; None uses all.
        drift_window: tokens a window.
        canary: facts the unedited model knows, away from the edits; their token accuracy and ``wild`` exact
            match are ``drift.canary``.
        before: results of the unedited model from another evaluator with the same model and settings.

    Raises:
        ValueError: no records, or a protocol that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        records: Records | Sequence[Record],
        protocols: Sequence[str] | None = None,
        batch_size: int = 16,
        generation: bool = False,
        text: str | None = None,
        out: Any = None,
        seed: int = 0,
        show_progress: bool | None = None,
        *,
        chat: bool | None = None,
        judge: Judge | None = None,
        judge_name: str = "",
        snippets: Snippets | None = None,
        items_per_kind: int | None = 1,
        drift_tokens: int | None = 16384,
        drift_window: int = 1024,
        canary: Records | Sequence[Record] = (),
        before: Before | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.records = list(records)
        if not self.records:
            raise ValueError("there are no records to evaluate")
        self.batch_size = batch_size
        self.seed = seed
        self.show_progress = show_progress
        self._items_per_kind = items_per_kind
        self._scorer = Scorer(model, tokenizer, batch_size=batch_size, show_progress=False)
        self._generator = Generator(model, tokenizer, batch_size=batch_size, chat=chat, show_progress=False)
        self._makers: dict[str, Protocol] = {
            p.id: p
            for p in (
                Wild(judge=judge, items_per_kind=items_per_kind),
                EasyEditTf(),
                CfProb(),
                CfAcc(),
                ZsreMemit(),
                WisePpl(),
                WiseOod(),
                CfGen(snippets),
            )
        }
        self._canary = list(canary)
        self.protocols = self._choose(protocols, generation)
        self._drift_settings = {"tokens": drift_tokens, "window": drift_window}
        self._explicit_drift = protocols is not None
        self._text = text
        self._windows: list[list[int]] | None = None
        self._writer = RowWriter(out)
        self._run = uuid.uuid4().hex[:12]
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[dict[str, Any]] = []
        self._index = {id(record): i for i, record in enumerate(self.records)}
        self.meta = self._describe(records, judge_name)
        self._before: Before | None = None
        if before is not None:
            self._take(before)

    # --- what is run ----------------------------------------------------------------------------------

    def _choose(self, protocols: Sequence[str] | None, generation: bool) -> tuple[str, ...]:
        if protocols is not None:
            unknown = [name for name in protocols if name not in PROTOCOLS]
            if unknown:
                raise ValueError(f"unknown protocol(s) {', '.join(unknown)}; known: {', '.join(PROTOCOLS)}")
            return tuple(dict.fromkeys(protocols))
        wanted = [
            name
            for name, protocol in self._makers.items()
            if (name != "cf.gen" or generation) and any(protocol.applies(r) for r in self.records)
        ]
        return (*wanted, *(name for name in DRIFT if name != "drift.canary" or self._canary))

    def _describe(self, records: Any, judge_name: str) -> dict[str, Any]:
        import transformers

        parameter = next(self.model.parameters(), None)
        config = getattr(self.model, "config", None)
        return {
            "run": self._run,
            "protocols": list(self.protocols),
            "seed": self.seed,
            "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
            "device": str(parameter.device) if parameter is not None else None,
            "model": _name(getattr(config, "_name_or_path", "")) or type(self.model).__name__,
            "model_hash": _model_hash(self.model, self._scorer),
            "data": _name(getattr(records, "path", "")),
            "data_sha256": getattr(records, "sha256", ""),
            "records_hash": _records_hash(self.records),
            "n_records": len(self.records),
            "unusable_records": [s._asdict() for s in getattr(records, "skipped", [])],
            "taught": sorted({record.taught for record in self.records}),
            "prompt": {"wild": "chat template" if self._generator.chat else "bare", "teacher_forced": "bare"},
            "judge": judge_name or None,
            "versions": {
                "fastedit": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    @property
    def key(self) -> str:
        """Hash of what the unedited model's results depend on, but for the weights, which change."""
        names = ("protocols", "seed", "dtype", "records_hash", "prompt", "judge")
        sizes = [type(self.model).__name__, sum(p.numel() for p in self.model.parameters())]
        parts = {name: self.meta[name] for name in names} | self._drift_settings
        parts |= {"text": self._text, "sizes": sizes, "items": self._items_per_kind}
        parts["canary"] = _records_hash(self._canary)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # --- the two calls --------------------------------------------------------------------------------

    def before(self) -> Before:
        """Score the unedited model, once; a second call returns what is there."""
        if self._before is None:
            self._header()
            before = Before(self.key, self.meta["model_hash"])
            start = len(self._rows), len(self._skipped)
            self._before = before
            try:
                self._score_records("before", 0, range(len(self.records)), self.protocols, {})
                self._score_drift("before", 0, self.protocols, None)
            except BaseException:
                self._before = None
                raise
            before.rows, before.skipped = self._rows[start[0] :], self._skipped[start[1] :]
        return self._before

    def after(
        self,
        when: str = "final",
        n_edits: int | None = None,
        *,
        indices: Sequence[int] | None = None,
        protocols: Sequence[str] | None = None,
        edits: Sequence[Any] | None = None,
    ) -> None:
        """Score the edited model.

        Args:
            when: ``immediate``, ``batch``, ``checkpoint`` or ``final``.
            n_edits: facts edited so far; None counts all facts of all records.
            indices: score these records only.
            protocols: run these only, of those the evaluator has.
            edits: all edits made so far, for ``drift.weight``.

        Raises:
            RuntimeError: :meth:`before` was not called, so that there is nothing to compare with.
            ValueError: an unknown moment.
        """
        if when not in MOMENTS or when == "before":
            raise ValueError(f"when must be one of {', '.join(MOMENTS[1:])}, got {when!r}")
        if self._before is None:
            raise RuntimeError(
                "call before() on the unedited model first: locality and drift compare with it"
            )
        if n_edits is None:
            n_edits = sum(len(record.facts) for record in self.records)
        names = self.protocols if protocols is None else [p for p in self.protocols if p in protocols]
        chosen = range(len(self.records)) if indices is None else indices
        self._score_records(when, n_edits, chosen, names, self._before.kept)
        if any(name in DRIFT for name in names):
            self._score_drift(when, n_edits, names, edits)

    def indices_of(self, records: Sequence[Record]) -> list[int]:
        """Where ``records`` stand among the evaluator's own.

        Raises:
            ValueError: a record the evaluator was not made with.
        """
        try:
            return [self._index[id(record)] for record in records]
        except KeyError:
            raise ValueError("the records must be (some of) those that the evaluator was made with") from None

    def rows(self, protocol: str, when: str, n_edits: int | None = None) -> list[dict[str, Any]]:
        """The rows of one protocol at one moment."""
        return [
            row
            for row in self._rows
            if row["protocol"] == protocol and row["when"] == when and n_edits in (None, row["n_edits"])
        ]

    def report(self, **more: Any) -> Report:
        """Everything so far; ``more`` goes to the report (``retention``, ``efficiency``)."""
        groups: dict[tuple[str, str, int], tuple[list[Any], list[Any]]] = {}
        for place, entries in enumerate((self._rows, self._skipped)):
            for entry in entries:
                at = entry["n_edits"] if entry["when"] == "checkpoint" else -1
                groups.setdefault((entry["protocol"], entry["when"], at), ([], []))[place].append(entry)
        order = {name: i for i, name in enumerate(PROTOCOLS)}
        results: list[Result] = [
            summarise(rows, skipped, self.meta, self.seed)
            for _, (rows, skipped) in sorted(
                groups.items(), key=lambda item: (order[item[0][0]], MOMENTS.index(item[0][1]), item[0][2])
            )
        ]
        return Report(results, self.meta, **more)

    # --- records --------------------------------------------------------------------------------------

    def _score_records(
        self,
        when: str,
        n_edits: int,
        indices: Sequence[int],
        names: Sequence[str],
        kept: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> None:
        protocols = [self._makers[name] for name in names if name in self._makers]
        if not protocols or not len(indices):
            return
        size = max(16, self.batch_size)
        with progress(
            total=len(indices), desc=f"evaluating ({when})", unit="record", show=self.show_progress
        ) as bar:
            for start in range(0, len(indices), size):
                chunk = list(indices[start : start + size])
                self._score_chunk(when, n_edits, chunk, protocols, kept)
                bar.update(len(chunk))

    def _score_chunk(
        self,
        when: str,
        n_edits: int,
        chunk: Sequence[int],
        protocols: Sequence[Protocol],
        kept: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> None:
        usable = [(p, i) for p in protocols for i in chunk if self._checked(p, i, when, n_edits)]
        pairs = self._pairs(usable)
        texts = self._texts(usable)
        samples = self._samples(usable)
        rows = []
        for protocol, i in usable:
            record = self.records[i]
            answers = Answers(pairs, texts, samples.get(i, {}))
            before = None if when == "before" else kept.get((protocol.id, i), {})
            try:
                row = protocol.row(record, answers, before)
                if not is_finite(row.metrics):
                    raise NotApplicableError("a value is not finite")
            except NotApplicableError as error:
                self._skip(protocol.id, when, n_edits, record.name, str(error))
                continue
            rows.append(self._row(protocol.id, when, n_edits, i, row))
            for reason in answers.left_out:
                self._skip(protocol.id, when, n_edits, record.name, reason)
        self._add(rows)

    def _checked(self, protocol: Protocol, index: int, when: str, n_edits: int) -> bool:
        record = self.records[index]
        try:
            protocol.check(record)
        except NotApplicableError as error:
            self._skip(protocol.id, when, n_edits, record.name, str(error))
            return False
        return True

    def _pairs(self, usable: Sequence[tuple[Protocol, int]]) -> dict[Pair, PairScore | Unscorable]:
        wanted = list(dict.fromkeys(pair for p, i in usable for pair in p.pairs(self.records[i])))
        return dict(zip(wanted, self._scorer.score(wanted), strict=True)) if wanted else {}

    def _texts(self, usable: Sequence[tuple[Protocol, int]]) -> dict[str, str | Unscorable]:
        wanted = list(dict.fromkeys(prompt for p, i in usable for prompt in p.prompts(self.records[i])))
        given = self._generator.greedy(wanted) if wanted else []
        texts = [g.text if isinstance(g, Generation) else g for g in given]
        return dict(zip(wanted, texts, strict=True))

    def _samples(self, usable: Sequence[tuple[Protocol, int]]) -> dict[int, dict[str, str | Unscorable]]:
        """Sampled texts by record and prompt; the same prompt in two records is sampled twice."""
        wanted = [(i, n, prompt) for p, i in usable for n, prompt in enumerate(p.samples(self.records[i]))]
        if not wanted:
            return {}
        names = [f"{self.records[i].name}.{n}" for i, n, _ in wanted]
        texts = self._generator.sample([prompt for *_, prompt in wanted], names, seed=self.seed)
        samples: dict[int, dict[str, str | Unscorable]] = {}
        for (i, _, prompt), text in zip(wanted, texts, strict=True):
            samples.setdefault(i, {})[prompt] = text
        return samples

    def _row(self, protocol: str, when: str, n_edits: int, index: int, row: Row) -> dict[str, Any]:
        if when == "before" and self._before is not None and row.keep:
            self._before.kept[protocol, index] = row.keep
        fields: dict[str, Any] = self._common("row", protocol, when, n_edits)
        fields |= {"record": self.records[index].name, "index": index, "metrics": row.metrics}
        return fields | ({"outputs": row.outputs} if row.outputs else {})

    # --- drift ----------------------------------------------------------------------------------------

    def _score_drift(
        self, when: str, n_edits: int, names: Sequence[str], edits: Sequence[Any] | None
    ) -> None:
        if any(name in names for name in ("drift.ppl", "drift.kl", "drift.top1")):
            self._score_text(when, n_edits, names)
        if "drift.weight" in names and when != "before":
            self._score_weights(when, n_edits, edits)
        if "drift.canary" in names:
            self._score_canary(when, n_edits)

    def _score_text(self, when: str, n_edits: int, names: Sequence[str]) -> None:
        try:
            windows = self._drift_windows()
        except (ImportError, OSError, ValueError) as error:
            if self._explicit_drift:
                raise
            for name in (n for n in ("drift.ppl", "drift.kl", "drift.top1") if n in names):
                self._skip(name, when, n_edits, "text", str(error))
            return
        meter = DriftMeter(self.model, self.tokenizer, windows, show_progress=self.show_progress)
        if when == "before":
            values, reference = meter.before()
            if self._before is not None:
                self._before.drift = reference
            self.meta["drift"] |= {"mode": reference.mode}
        else:
            values = meter.after(self._before.drift if self._before else None)
        for number, window in enumerate(values):
            self._window_rows(when, n_edits, names, number, window)

    def _window_rows(self, when: str, n_edits: int, names: Sequence[str], number: int, w: Window) -> None:
        rows = []
        for name, value in (("drift.ppl", w.nll), ("drift.kl", w.kl), ("drift.top1", w.same)):
            if name not in names or value is None:
                continue
            if not w.finite:
                self._skip(
                    name, when, n_edits, f"window {number}", "the model gives logits that are not finite"
                )
                continue
            sums = {"sum": value, "count": float(w.n)}
            rows.append(
                self._common("row", name, when, n_edits) | {"record": f"window {number}", "metrics": sums}
            )
        self._add(rows)

    def _drift_windows(self) -> list[list[int]]:
        if self._windows is None:
            text, name = self._text, "given"
            if text is None:
                text, name = _neutral_text(), "packaged neutral text"
            self._windows = text_windows(
                self.tokenizer,
                text,
                length=self._drift_settings["window"] or 1024,
                context_length=self._scorer.forward.context_length,
                limit=self._drift_settings["tokens"],
            )
            self.meta["drift"] = {
                "text": name,
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "n_windows": len(self._windows),
                "window": len(self._windows[0]),
            }
        return self._windows

    def _score_weights(self, when: str, n_edits: int, edits: Sequence[Any] | None) -> None:
        given = [edit for edit in edits or [] if getattr(edit, "factors", None)]
        if not given:
            self._skip("drift.weight", when, n_edits, "weights", "no edit with factors was given")
            return
        rows = []
        for matrix in weight_drift(self.model, given):
            fields = self._common("row", "drift.weight", when, n_edits)
            values = {"relative": matrix.relative, "spectral": matrix.spectral}
            if is_finite(values):
                rows.append(fields | {"record": matrix.name, "metrics": values})
            else:
                self._skip("drift.weight", when, n_edits, matrix.name, "the change is not finite")
        self._add(rows)

    def _score_canary(self, when: str, n_edits: int) -> None:
        facts = [record.fact for record in self._canary]
        if not facts:
            self._skip("drift.canary", when, n_edits, "canary", "no canary facts were given")
            return
        scores = self._scorer.score([Pair(fact.text, fact.target_new) for fact in facts])
        answers = self._generator.greedy([fact.text for fact in facts])
        rows = []
        for record, score, answer in zip(self._canary, scores, answers, strict=True):
            if isinstance(score, Unscorable) or isinstance(answer, Unscorable):
                reason = score.reason if isinstance(score, Unscorable) else answer.reason  # type: ignore[union-attr]
                self._skip("drift.canary", when, n_edits, record.name, reason)
                continue
            values = {"tacc": token_accuracy(score.hits), "em": em(answer.text, record.answers_new)}
            fields = self._common("row", "drift.canary", when, n_edits)
            rows.append(fields | {"record": record.name, "metrics": values})
        self._add(rows)

    # --- keeping --------------------------------------------------------------------------------------

    def _take(self, before: Before) -> None:
        if before.key != self.key:
            raise ValueError(
                "before= comes from another model, other records or other settings: run before() on this one"
            )
        self._before = before
        self.meta["model_hash"] = before.model_hash
        self._header()
        self._add(before.rows)
        self._skipped += before.skipped
        if before.drift is not None:
            self._drift_windows()
            self.meta["drift"] |= {"mode": before.drift.mode}

    def _header(self) -> None:
        header = {"type": "header", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "meta": self.meta}
        self._writer.write([header])

    def _common(self, kind: str, protocol: str, when: str, n_edits: int) -> dict[str, Any]:
        return {"type": kind, "run": self._run, "protocol": protocol, "when": when, "n_edits": n_edits}

    def _skip(self, protocol: str, when: str, n_edits: int, record: str, reason: str) -> None:
        entry = self._common("skipped", protocol, when, n_edits) | {"record": record, "reason": reason}
        self._skipped.append(entry)
        self._writer.write([entry])

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows += rows
        self._writer.write(rows)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    records: Records | Sequence[Record],
    *,
    before: Before | None = None,
    n_edits: int | None = None,
    edits: Sequence[Any] | None = None,
    **settings: Any,
) -> Report:
    """Score a model once: the unedited model without ``before``, else an edited one against it.

    Args:
        model: the model as it is now.
        tokenizer: its tokenizer.
        records: what to score.
        before: from :meth:`Evaluator.before` on the unedited model; None scores the model as unedited.
        n_edits: facts edited so far.
        edits: the edits, for ``drift.weight``.
        **settings: further arguments of :class:`Evaluator`.
    """
    evaluator = Evaluator(model, tokenizer, records, before=before, **settings)
    evaluator.before()
    if before is not None:
        evaluator.after("final", n_edits, edits=edits)
    return evaluator.report()


def _model_hash(model: nn.Module, scorer: Scorer) -> str | None:
    return fingerprint(model) if scorer.forward.description is not None else None


def _neutral_text() -> str:
    try:
        from ..demo import neutral_text
    except ImportError as error:
        raise ImportError(
            f"the packaged neutral text for drift is missing ({error}): pass text=, or leave the drift "
            "protocols out"
        ) from None
    return neutral_text()


def _name(place: Any) -> str:
    """A hub's name as it is; of a file or folder its own name, since a report may be read elsewhere."""
    return Path(place).name if place and Path(place).exists() else str(place)


def _records_hash(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        parts = [
            [fact.as_dict() for fact in record.facts],
            [rephrase for _, rephrase in record.edits],
            record.locality,
            record.portability,
            record.generation_prompts,
        ]
        digest.update(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
