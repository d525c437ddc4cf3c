"""Sequential runs: moments, retention, steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastedit import Fact
from fastedit.data import Record, records_from
from fastedit.evaluation import Evaluator, read_rows, run_sequential
from fastedit.evaluation.sequential import _powers, steps
from fastedit.models import describe


class Lookup(torch.nn.Module):
    """A model that knows exactly the texts in its memory."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.next_id: dict[tuple[int, ...], int] = {}

    def learn(self, text):
        ids = self.tokenizer(text)["input_ids"]
        self.next_id |= {tuple(ids[:i]): ids[i] for i in range(1, len(ids))}

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(len(ids)):
                known = self.next_id.get(tuple(ids[: i + 1]))
                if known is not None:
                    logits[row, i, known] = 9.0
        return SimpleNamespace(logits=logits)


class Editor:
    """Writes facts into a lookup; ``forgets`` drops everything but the newest batch."""

    def __init__(self, model, forgets):
        self.model, self.forgets, self.batches = model, forgets, []

    def edit(self, facts):
        self.batches.append(facts)
        if self.forgets:
            self.model.next_id.clear()
        for fact in facts:
            self.model.learn(fact.text + fact.target)
        return SimpleNamespace()


def _records(n):
    return [
        Record(Fact("The river of {} is the", f"town {chr(65 + i)}", "Danube"), position=i) for i in range(n)
    ]


@pytest.fixture
def lookup(tiny_llama):
    return Lookup(tiny_llama[1]), tiny_llama[1]


def test_retention_worked_value(lookup):
    model, tokenizer = lookup
    records = _records(3)
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"])
    report = run_sequential(Editor(model, forgets=True), records, 1, evaluator)
    assert report.get("easyedit.tf", "before").metrics["reliability.exact"].mean == 0.0
    assert report.get("easyedit.tf", "immediate").metrics["reliability.exact"].mean == 1.0
    assert report.get("easyedit.tf", "final").metrics["reliability.exact"].mean == pytest.approx(1 / 3)
    points = {(p.n_edits, p.age_from): (p.n, p.exact) for p in report.retention}
    assert points == {(1, 0): (1, 1.0), (3, 0): (1, 1.0), (3, 1): (2, 0.0)}
    assert "retention" in report.table()


def test_a_memory_keeps_everything(lookup, tmp_path):
    model, tokenizer = lookup
    records = _records(12)
    out = tmp_path / "rows.jsonl"
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"], out=out)
    report = run_sequential(Editor(model, forgets=False), records, 5, evaluator, checkpoints=[4, 10])
    assert report.get("easyedit.tf").metrics["reliability.exact"].mean == 1.0
    assert report.get("easyedit.tf", "batch").n_records == 12
    assert {p.n_edits for p in report.retention} == {5, 10, 12}
    assert report.efficiency["n_edits"] == 12
    assert set(report.efficiency["seconds_per_edit"]) == {"median", "p90", "mean"}
    batch = [row for row in read_rows(out) if row.get("when") == "batch"]
    assert [row["n_edits"] for row in batch] == [5] * 5 + [10] * 5 + [12] * 2


def test_an_interrupted_run_keeps_its_rows(lookup, tmp_path):
    model, tokenizer = lookup
    records = _records(4)
    out = tmp_path / "rows.jsonl"

    class Breaks(Editor):
        def edit(self, facts):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().edit(facts)

    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"], out=out)
    with pytest.raises(KeyboardInterrupt):
        run_sequential(Breaks(model, forgets=False), records, 1, evaluator)
    moments = [row["when"] for row in read_rows(out) if row["type"] == "row"]
    assert moments.count("before") == 4
    assert moments.count("immediate") == 2


def test_weights_and_text_are_measured(tiny_llama):
    model, tokenizer = tiny_llama
    projection = describe(model).projection(0)

    class Nudges:
        def edit(self, facts):
            generator = torch.Generator().manual_seed(len(facts))
            left = 0.1 * torch.randn(projection.d_out, 1, generator=generator)
            right = torch.randn(projection.d_in, 1, generator=generator)
            with torch.no_grad():
                projection.weight.add_(left @ right.T)
            return SimpleNamespace(factors={projection.weight_name: SimpleNamespace(left=left, right=right)})

    records = _records(4)
    protocols = ["easyedit.tf", "drift.ppl", "drift.kl", "drift.weight"]
    evaluator = Evaluator(model, tokenizer, records, protocols, text="The river of Ulm is the Danube. " * 5)
    report = run_sequential(Nudges(), records, 2, evaluator, checkpoints=[2])
    assert report.get("drift.weight").metrics["relative"].mean > 0
    assert [r.n_edits for r in report.results if r.protocol == "drift.kl" and r.when == "checkpoint"] == [2]
    assert report.get("drift.kl").metrics["kl"].mean > 0


def _fact(subject, target):
    return Fact("The river of {} is", subject, target)


def test_steps_keep_contradictions_apart():
    a, b, c = _fact("Ulm", "Rhine"), _fact("Ulm", "Main"), _fact("Bonn", "Elbe")
    assert steps([Record(a), Record(c), Record(a)]) == [[a, c]]
    assert steps([Record(a), Record(c), Record(b)]) == [[a, c], [b]]
    assert steps([Record(a), Record(b), Record(a)]) == [[a], [b], [a]]
    assert steps([Record(a, more=[(c, [])])]) == [[a, c]]
    assert steps([Record(a, more=[(c, [])], source="pitfalls.conflict")]) == [[a], [c]]


def test_records_must_be_the_evaluators(lookup):
    model, tokenizer = lookup
    records = _records(2)
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"])
    with pytest.raises(ValueError, match="evaluator was made with"):
        run_sequential(Editor(model, False), _records(2), 1, evaluator)
    with pytest.raises(ValueError, match="batch_size"):
        run_sequential(Editor(model, False), records, 0, evaluator)


def test_powers():
    assert _powers(1) == []
    assert _powers(10) == [1]
    assert _powers(2500) == [1, 10, 100, 1000]


def test_multi_hop_records_share_edits(lookup):
    model, tokenizer = lookup
    rewrite = {
        "prompt": "The river of {} is the",
        "subject": "Ulm",
        "question": "Which river?",
        "target_new": {"str": "Rhine"},
        "target_true": {"str": "Danube"},
    }
    row = {
        "case_id": 1,
        "requested_rewrite": [rewrite],
        "questions": ["Where to?"],
        "new_answer": "Sea",
        "new_answer_alias": [],
        "new_single_hops": [],
    }
    records = records_from([row, row | {"case_id": 2}])
    editor = Editor(model, forgets=False)
    run_sequential(editor, records, 2, Evaluator(model, tokenizer, records, ["easyedit.tf"]))
    assert [len(batch) for batch in editor.batches] == [1]
