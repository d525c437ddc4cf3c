"""The evaluator and its report: protocols, moments, bookkeeping."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import data_folder

from fastedit import Fact, demo
from fastedit.data import Item, Record, Snippets, load_records, records_from
from fastedit.evaluation import Evaluator, average, evaluate, metrics, read_rows
from fastedit.evaluation.results import Report, Result, summarise
from fastedit.evaluation.scoring import Pair, Scorer

COUNTERFACT = [
    {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "{} lived in",
            "relation_id": "P1",
            "target_new": {"str": "York", "id": "Q1"},
            "target_true": {"str": "Leeds", "id": "Q2"},
            "subject": name,
        },
        "paraphrase_prompts": [f"Rain. {name} dwelt in", f"The home of {name} was"],
        "neighborhood_prompts": ["Hugh Vale lived in", "Ann Lee lived in", "Max Roth dwelt in"],
        "generation_prompts": [f"{name} was", f"In youth, {name}"],
    }
    for i, name in enumerate(["Ada Brook", "Eve Hill", "Ida Stone"])
]
TEXT = "The river of Ulm is the Danube. Ada Brook lived in York. " * 4


@pytest.fixture
def records():
    return records_from(COUNTERFACT)


def _shake(model, factor=1.4):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(factor)


def test_counterfact_numbers_by_hand(tiny_llama, records):
    model, tokenizer = tiny_llama
    evaluator = Evaluator(model, tokenizer, records, ["cf.prob", "cf.acc"], batch_size=2)
    evaluator.before()
    rows = evaluator.rows("cf.prob", "before")
    score = Scorer(model, tokenizer).score
    for record, row in zip(records, rows, strict=True):
        for letter, prompts in (
            ("E", [record.fact.text]),
            ("P", record.rephrase),
            ("N", record.neighborhood),
        ):
            new = [score([Pair(p, "York")])[0].nll for p in prompts]
            true = [score([Pair(p, "Leeds")])[0].nll for p in prompts]
            if letter == "N":
                new, true = true, new
            assert row["metrics"][f"{letter}S"] == metrics.success(new, true)
            assert row["metrics"][f"{letter}M"] == pytest.approx(metrics.magnitude(new, true), abs=1e-6)
    result = evaluator.report().get("cf.prob", "before")
    means = [result.metrics[name].mean for name in ("ES", "PS", "NS")]
    assert result.metrics["S_harmonic"].mean == pytest.approx(metrics.harmonic_mean(means))
    assert result.metrics["avg"].mean == pytest.approx(sum(means) / 3)
    assert set(evaluator.rows("cf.acc", "before")[0]["metrics"]) == {
        "rewrite.exact",
        "paraphrase.exact",
        "neighborhood.exact",
    }


WISE = [
    {
        "prompt": "Ada Brook,",
        "target_new": f"{name} of York, was born in Leeds.",
        "subject": "Ada Brook,",
        "ood_rephrase": f" {name} was born. She lived in York.",
        "locality_prompt": "The river of Ulm is",
        "locality_ground_truth": "the Danube",
    }
    for name in ("the miller", "the painter", "the mason")
]


def test_wise_numbers_by_hand(tiny):
    model, tokenizer = tiny
    records = records_from(WISE)
    evaluator = Evaluator(model, tokenizer, records, ["wise.ppl", "wise.ood"], batch_size=2)
    evaluator.before()
    score = Scorer(model, tokenizer).score
    nll = []
    for record, row, sure in zip(
        records, evaluator.rows("wise.ppl", "before"), evaluator.rows("wise.ood", "before"), strict=True
    ):
        answer, text = score(
            [
                Pair("Ada Brook,", record.fact.target_new),
                Pair("the", record.raw["ood_rephrase"].strip().removeprefix("the ")),
            ]
        )
        nll.append(answer.nll)
        expected = {
            "nll": answer.nll,
            "ppl": math.exp(answer.nll),
            "ppl.clipped": min(math.exp(answer.nll), 100.0),
        }
        assert row["metrics"] == pytest.approx(expected, rel=1e-5)
        for name, pair in (("rewrite", answer), ("ood", text)):
            probabilities = [math.exp(value) for value in pair.log_probs]
            assert sure["metrics"][f"{name}.share"] == sum(p > 0.8 for p in probabilities) / len(
                probabilities
            )
            assert sure["metrics"][f"{name}.sure"] == float(math.exp(-pair.nll) > 0.8)
    found = evaluator.report().get("wise.ppl", "before").metrics
    assert found["ppl.median"].mean == pytest.approx(math.exp(sorted(nll)[1]), rel=1e-5)
    assert found["ppl.geometric"].mean == pytest.approx(math.exp(sum(nll) / 3), rel=1e-5)
    assert found["ppl.geometric"].low <= found["ppl.geometric"].mean <= found["ppl.geometric"].high


def test_wise_protocols_apply_to_wise_records(tiny_llama, records):
    model, tokenizer = tiny_llama
    assert not {"wise.ppl", "wise.ood"} & set(Evaluator(model, tokenizer, records).protocols)
    assert {"wise.ppl", "wise.ood"} <= set(Evaluator(model, tokenizer, records_from(WISE)).protocols)
    hallucination = records_from([{k: v for k, v in WISE[0].items() if k != "ood_rephrase"}])
    protocols = Evaluator(model, tokenizer, hallucination).protocols
    assert "wise.ppl" in protocols
    assert "wise.ood" not in protocols
    evaluator = Evaluator(model, tokenizer, [*records, *hallucination], ["wise.ppl"])
    evaluator.before()
    result = evaluator.report().get("wise.ppl", "before")
    assert result.n_records == 1
    assert "is of format counterfact" in result.skipped[0]["reason"]


@pytest.mark.parametrize("name", ["hallucination/hallucination-edit.json.gz", "temporal/temporal-edit.json"])
def test_published_wise_records_are_scored(name):
    path = data_folder("data", "wise", *name.split("/"))
    model, tokenizer = demo.load_demo_model()
    loaded = load_records(path)
    assert loaded[0].source == ("flat" if "hallucination" in name else "wise.temporal")
    short = sorted(loaded, key=lambda record: len(" ".join(map(str, record.raw.values()))))[:4]
    evaluator = Evaluator(model, tokenizer, short, ["wise.ppl", "wise.ood", "easyedit.tf"])
    evaluator.before()
    report = evaluator.report()
    ppl = report.get("wise.ppl", "before")
    assert ppl.n_records == 4
    assert ppl.metrics["ppl.median"].mean > 1
    assert ppl.metrics["ppl.clipped"].mean <= 100
    assert report.get("easyedit.tf", "before").metrics["locality.agreement"].mean == 1.0
    ood = report.get("wise.ood", "before")
    assert ood.n_records == (0 if "hallucination" in name else 4)
    assert all(0 <= value.mean <= 1 for value in ood.metrics.values())


def test_default_run_has_every_part(tiny_llama, records, tmp_path):
    model, tokenizer = tiny_llama
    out = tmp_path / "rows.jsonl"
    snippets = Snippets({("P1", "Q1"): ["York is a town.", "In York they lived."]})
    evaluator = Evaluator(
        model, tokenizer, records, generation=True, text=TEXT, out=out, snippets=snippets, canary=records[:1]
    )
    evaluator.before()
    _shake(model)
    evaluator.after(n_edits=3)
    report = evaluator.report()
    protocols = ["wild", "easyedit.tf", "cf.prob", "cf.acc", "cf.gen", "drift.ppl", "drift.kl", "drift.top1"]
    for protocol in [*protocols, "drift.canary"]:
        for when in ("before", "final"):
            result = report.get(protocol, when)
            assert result.n_records > 0
            assert result.n_edits == (3 if when == "final" else 0)
    assert report.get("easyedit.tf", "before").metrics["locality.agreement"].mean == 1.0
    assert report.get("wild", "before").metrics["locality.agreement"].mean == 1.0
    assert "consistency" in report.get("cf.gen").metrics
    assert report.get("drift.kl").metrics["kl"].mean > 0
    assert report.get("drift.weight").skipped[0]["reason"] == "no edit with factors was given"
    assert report.meta["versions"]["torch"] == torch.__version__
    assert report.meta["dtype"] == "float32"
    assert report.meta["prompt"]["wild"] == "bare"
    written = read_rows(out)
    assert written[0]["type"] == "header"
    assert sum(row["type"] == "row" and row["protocol"] == "cf.gen" for row in written) == 6
    table = report.table()
    for word in ("before", "final", "S_harmonic", "reliability.em", "ppl", "no edit with factors"):
        assert word in table
    json.dumps(report.as_dict(), allow_nan=False)
    report.save(tmp_path / "report.json")


def test_results_do_not_depend_on_the_batch(tiny, records):
    model, tokenizer = tiny
    reports = []
    for batch_size in (1, 3, 16):
        evaluator = Evaluator(
            model, tokenizer, records, ["wild", "easyedit.tf", "cf.prob"], batch_size=batch_size
        )
        evaluator.before()
        reports.append(
            [
                row["metrics"]
                for p in ("wild", "easyedit.tf", "cf.prob")
                for row in evaluator.rows(p, "before")
            ]
        )
    for other in reports[1:]:
        for a, b in zip(reports[0], other, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_locality_is_agreement_with_the_unedited_model(tiny_llama, records):
    model, tokenizer = tiny_llama
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"])
    evaluator.before()
    pairs = [Pair(p, "Leeds") for p in COUNTERFACT[0]["neighborhood_prompts"]]
    old = [s.argmax for s in Scorer(model, tokenizer).score(pairs)]
    _shake(model, 3.0)
    new = [s.argmax for s in Scorer(model, tokenizer).score(pairs)]
    evaluator.after(n_edits=3)
    expected = sum(metrics.agreement(o, n) for o, n in zip(old, new, strict=True)) / 3
    assert evaluator.rows("easyedit.tf", "final")[0]["metrics"]["locality.agreement"] == pytest.approx(
        expected
    )
    assert expected < 1


def test_before_comes_first_and_only_once(tiny_llama, records):
    model, tokenizer = tiny_llama
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf"])
    with pytest.raises(RuntimeError, match="before"):
        evaluator.after()
    first = evaluator.before()
    _shake(model)
    assert evaluator.before() is first
    with pytest.raises(ValueError, match="when must be"):
        evaluator.after(when="before")
    assert len(evaluator.rows("easyedit.tf", "before")) == 3


def test_before_can_be_shared(tiny_llama, records):
    model, tokenizer = tiny_llama
    settings = {"protocols": ["wild", "easyedit.tf", "drift.kl"], "text": TEXT}
    before = Evaluator(model, tokenizer, records, **settings).before()
    _shake(model)
    report = evaluate(model, tokenizer, records, before=before, n_edits=3, **settings)
    assert report.get("drift.kl").metrics["kl"].mean > 0
    assert report.get("easyedit.tf", "before").n_records == 3
    assert report.meta["model_hash"] == before.model_hash
    with pytest.raises(ValueError, match="other records or other settings"):
        evaluate(model, tokenizer, records[:2], before=before, **settings)


def test_different_protocols_or_moments_are_not_averaged(tiny_llama, records):
    model, tokenizer = tiny_llama
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf", "cf.prob"])
    evaluator.before()
    evaluator.after(n_edits=3)
    report = evaluator.report()
    final, before, other = (
        report.get("easyedit.tf"),
        report.get("easyedit.tf", "before"),
        report.get("cf.prob"),
    )
    assert average([final, final])["reliability.tacc"] == final.metrics["reliability.tacc"].mean
    for mixed in ([final, before], [final, other]):
        with pytest.raises(ValueError, match="cannot be averaged"):
            average(mixed)
    with pytest.raises(ValueError, match="one protocol"):
        summarise(evaluator.rows("cf.prob", "final") + evaluator.rows("cf.prob", "before"), [], {})
    with pytest.raises(KeyError, match="there are"):
        report.get("wild")


def test_nothing_is_skipped_silently(tiny_llama, records):
    model, tokenizer = tiny_llama
    long = Record(Fact("The river " * 70 + "{} is", "Ulm", "Rhine"))
    bare = replace(records[1], locality={"neighborhood": [Item("Hugh Vale lived in", [])]}, neighborhood=[])
    evaluator = Evaluator(model, tokenizer, [records[0], long, bare], ["easyedit.tf", "wild", "cf.prob"])
    evaluator.before()
    report = evaluator.report()
    tf = report.get("easyedit.tf", "before")
    assert tf.n_records == 2
    assert tf.metrics["reliability.tacc"].n == 2
    assert tf.metrics["locality.agreement"].n == 1
    reasons = [entry["reason"] for entry in tf.skipped]
    assert any("the model takes 128" in reason for reason in reasons)
    assert any("the item has no answer" in reason for reason in reasons)
    assert len(report.get("cf.prob", "before").skipped) == 2
    assert "left out" in report.table()


def test_a_collapsed_model_fails_the_guard(tiny_llama, records):
    model, tokenizer = tiny_llama
    evaluator = Evaluator(model, tokenizer, records, ["easyedit.tf", "drift.ppl", "drift.kl"], text=TEXT)
    evaluator.before()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    evaluator.after(n_edits=3)
    report = evaluator.report()
    assert report.get("easyedit.tf").n_records == 0
    assert any("not finite" in message for message in report.guard())
    json.dumps(report.as_dict(), allow_nan=False)
    report.table()


def test_guard_thresholds():
    def result(protocol, when, name, mean):
        return Result(protocol, when, 1, 1, {name: metrics.Estimate(mean, 0, mean, mean, 1, "none")})

    def messages(ppl, kl):
        return Report(
            [
                result("drift.ppl", "before", "ppl", 10.0),
                result("drift.ppl", "final", "ppl", ppl),
                result("drift.kl", "final", "kl", kl),
            ]
        ).guard()

    assert messages(10.5, 0.01) == []
    assert [m.split(":")[0] for m in messages(12.0, 0.1)] == ["warn", "warn"]
    assert [m.split(":")[0] for m in messages(16.0, 0.6)] == ["fail", "fail"]


def test_zsre_in_memit_style_needs_the_true_answer(tiny_llama):
    model, tokenizer = tiny_llama
    row = {
        "subject": "Ada Brook",
        "src": "Where was Ada Brook born?",
        "pred": "Leeds",
        "rephrase": "Ada's birth town?",
        "alt": "York",
        "answers": ["Leeds"],
        "loc": "nq question: who built the mill",
        "loc_ans": "Hugh Vale",
    }
    evaluator = Evaluator(model, tokenizer, records_from([row]), ["zsre.memit"])
    evaluator.before()
    assert "zsre_answer='true'" in evaluator.report().get("zsre.memit", "before").skipped[0]["reason"]
    evaluator = Evaluator(model, tokenizer, records_from([row], zsre_answer="true"))
    assert "zsre.memit" in evaluator.protocols
    evaluator = Evaluator(model, tokenizer, records_from([row], zsre_answer="true"), ["zsre.memit"])
    evaluator.before()
    assert set(evaluator.rows("zsre.memit", "before")[0]["metrics"]) == {
        "rewrite.tacc",
        "paraphrase.tacc",
        "neighborhood.tacc",
    }


def test_judge_is_asked(tiny_llama, records):
    model, tokenizer = tiny_llama
    asked = []

    def judge(question, gold, answer):
        asked.append((question, gold))
        return True

    evaluator = Evaluator(model, tokenizer, records, ["wild"], judge=judge, judge_name="always")
    evaluator.before()
    assert evaluator.report().get("wild", "before").metrics["reliability.judge"].mean == 1.0
    assert ("Ada Brook lived in", "York") in asked
    assert evaluator.meta["judge"] == "always"


def test_unknown_protocol_and_no_records(tiny_llama, records):
    with pytest.raises(ValueError, match="unknown protocol"):
        Evaluator(*tiny_llama, records, ["cf.magic"])
    with pytest.raises(ValueError, match="no records"):
        Evaluator(*tiny_llama, [])


def test_cut_off_rows_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(ValueError):
        read_rows(path)


@pytest.fixture(scope="module")
def factlm():
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = data_folder("models", "factlm-llama")
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_published_token_accuracies(factlm):
    golden = json.loads(data_folder("golden", "memit.json").read_text())
    by_name = {r.name: r for r in load_records(data_folder("golden", "records.json"))}
    chosen = [by_name[str(case_id)] for batch in golden["case_ids"] for case_id in batch]
    evaluator = Evaluator(*factlm, chosen, ["easyedit.tf", "wild"])
    evaluator.before()
    rows = [row["metrics"] for row in evaluator.rows("easyedit.tf", "before")]
    names = {
        "prompt_new": "reliability",
        "prompt_true": "old_answer",
        "rephrase_new": "generality",
        "locality_true": "locality",
    }
    for key, name in names.items():
        metric = "locality.gold" if name == "locality" else f"{name}.tacc"
        assert [row[metric] for row in rows] == pytest.approx(golden["pre"][key]["per_record"], abs=1e-6), key
    result = evaluator.report().get("easyedit.tf", "before")
    assert result.metrics["old_answer.exact"].mean == 1.0
    outputs = [row["outputs"]["reliability"][0] for row in evaluator.rows("wild", "before")]
    known = [metrics.em(text, [record.target_true]) for text, record in zip(outputs, chosen, strict=True)]
    assert sum(known) / len(known) >= 0.9
