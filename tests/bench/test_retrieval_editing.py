"""The benchmark of retrieval editors, on a handful of the demo model's facts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from recipe_tiny import FACTS, PROMPTS, save_encoder, trained

from fastedit.bench import retrieval_editing, retrieval_quality
from fastedit.bench.retrieval_quality import (
    Exchanged,
    ExchangedRecipe,
    apart,
    best_threshold,
    demo_rows,
    encoded_once,
)
from fastedit.data import Record, records_from
from fastedit.io import read_json
from fastedit.memory.encoder import TextEncoder
from fastedit.models import encode_prompt

METHODS = ("none", "recipe", "recipe@text", "recipe@words", "recipe@cosine", "ft-m")


# ---- records --------------------------------------------------------------------------------------------


def row(subject: str, near: str = "Far is", **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"{subject} lies in",
        "subject": subject,
        "target_new": "Rome",
        "ground_truth": "Oslo",
        "rephrase_prompt": f"Where is {subject}? In",
        "locality_prompt": near,
        "locality_ground_truth": "away",
        **changes,
    }


def test_records_that_share_anything_with_training_are_left_out() -> None:
    train = records_from([row("Aland", "Seen is")])
    rows = [
        row("aland"),
        row("Bland", "Seen is"),
        row("Cland"),
        row("Cland"),
        row("Dland", "Cland lies in"),
        row("Eland", "Huge is"),
    ]

    def fits(record: Record) -> bool:
        return "Huge" not in str(record.locality)

    kept, left_out = apart(records_from(rows), train, fits)
    assert [record.fact.subject for record in kept] == ["Cland"]
    assert left_out == {
        "subject in training": 1,
        "prompt in training": 1,
        "nothing to ask": 0,
        "too long": 1,
        "edited elsewhere": 2,
    }


def test_demo_rows_share_no_subject_and_edit_no_locality_prompt() -> None:
    train, test = (records_from(rows) for rows in demo_rows())
    kept, left_out = apart(test, train, lambda record: True)
    assert len(kept) == len(test) > 200
    assert not any(left_out.values())
    assert all(record.fact.target_new != record.target_true for record in (*train, *test))


def test_the_best_threshold_parts_own_facts_from_unrelated_prompts() -> None:
    relevant = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.8, 0.3]])
    unrelated = torch.tensor([[0.3, 0.5], [0.6, 0.1], [0.75, 0.2]])
    assert best_threshold(relevant, [0, 1, 1], unrelated) == pytest.approx(
        0.65
    )  # the third finds the wrong one
    assert best_threshold(relevant, [0, 1, 0], unrelated[:2]) == pytest.approx(0.65)


# ---- memories with parts exchanged ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("recipe"))


def memory_of(checkpoint: Path, **exchange: Any) -> Exchanged:
    editor = ExchangedRecipe(
        tiny_model("llama"), tiny_tokenizer(), params={"checkpoint": str(checkpoint)}, exchange=exchange
    )
    editor.edit(FACTS)
    memory = editor.side.memory  # type: ignore[union-attr]
    assert isinstance(memory, Exchanged)
    return memory


def test_scores_are_those_that_the_memory_decides_by(checkpoint: Path) -> None:
    memory = memory_of(checkpoint)
    scores, bounds = memory.scores(PROMPTS)
    best, place = scores.max(1)
    ids = torch.tensor([entry.id for entry in memory.store.entries()])
    assert memory.find(PROMPTS).index.tolist() == torch.where(best > bounds, ids[place], -1).tolist()
    memory.threshold = float(best.max()) + 1  # no cosine is above it
    assert memory.find(PROMPTS).index.tolist() == [-1] * len(PROMPTS)
    memory.threshold = -1.0
    assert min(memory.find(PROMPTS).index.tolist()) >= 0
    memory.told = {PROMPTS[1]: FACTS[2].text}
    assert memory.find(PROMPTS[:2]).index.tolist() == [-1, int(ids[2])]


def test_what_is_in_front_can_be_text_or_words(checkpoint: Path) -> None:
    tokenizer = tiny_tokenizer()
    fact, text = FACTS[0], f"{FACTS[0].text} {FACTS[0].target_new}"
    memory = memory_of(checkpoint, front="text", template="{fact}\n{prompt}")
    first = next(iter(memory.store.entries())).id
    front = memory.prefix(first)
    assert front.ids == encode_prompt(tokenizer, f"{fact.text}{fact.target}\n")
    words = memory_of(checkpoint, front="words")
    embeddings = words.prefix(first).embeddings
    assert embeddings is not None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert embeddings.equal(words.base.get_input_embeddings().weight[ids])


# ---- training -------------------------------------------------------------------------------------------


def test_encoders_with_the_same_weights_read_each_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_encoder(tmp_path / "encoder"))
    first, second = TextEncoder.load(folder), TextEncoder.load(folder)
    wanted = first.statistics(["a", "b b"]), first.pooled(["a", "b b"], "mean")
    read: list[str] = []
    states = TextEncoder.states

    def noted(self: TextEncoder, texts: Any) -> Any:
        read.extend(texts)
        return states(self, texts)

    monkeypatch.setattr(TextEncoder, "states", noted)
    with encoded_once():
        assert first.statistics(["b b", "a", "a"]).equal(wanted[0][[1, 0, 0]])
        assert second.statistics(["a"]).equal(wanted[0][:1])
        assert read == ["b b", "a"]
        torch.testing.assert_close(second.pooled(["a", "b b"], "mean"), wanted[1])
        assert len(read) == 4
        with torch.no_grad():
            next(second.module.parameters()).add_(1.0)
        other = TextEncoder(second.module, second.tokenizer)
        assert not other.statistics(["a"]).equal(wanted[0][:1])
    second.statistics(["a"])
    assert len(read) == 6


@pytest.mark.slow
def test_a_checkpoint_that_is_there_is_not_trained_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrieval_editing.main(training(folder, folder / "encoder"))
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()] == [["is", "there"]] * 2


# ---- the commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, two checkpoints that have learned nothing, settings, and the results of one command."""
    folder = tmp_path_factory.mktemp("retrieval")
    retrieval_editing.main(["demo-data", "--out", str(folder)])
    rows = json.loads((folder / "demo_train.json").read_text())[:40]
    (folder / "demo_train.json").write_text(json.dumps(rows))
    encoder = save_encoder(folder / "encoder")
    retrieval_editing.main(training(folder, encoder))
    (folder / "settings").mkdir()
    (folder / "settings" / "demo_ft-m.json").write_text(json.dumps({"layers": [2], "steps": 4}))
    retrieval_editing.main(command(folder))
    return folder


def training(folder: Path, encoder: Path | str) -> list[str]:
    given = {"--model": "demo", "--data": folder / "demo_train.json", "--exclude": folder / "demo_test.json"}
    given |= {"--out": folder / "recipe", "--encoder": encoder, "--steps": 1}
    return ["train", *(str(part) for pair in given.items() for part in pair), "--seeds", "0", "1"]


def command(folder: Path, *more: str) -> list[str]:
    given = {"--model": "demo", "--data": folder / "demo_test.json", "--train": folder / "demo_train.json"}
    given |= {"--settings": folder / "settings", "--out": folder / "runs", "--scored": 2, "--tuning": 8}
    given |= {"--text-tokens": 64}
    options = [str(part) for pair in given.items() for part in pair]
    checkpoints = [str(folder / f"recipe{seed}") for seed in (0, 1)]
    options += ["--checkpoints", *checkpoints, "--counts", "1", "2", "--methods", *METHODS]
    return ["quality", *options, *more]


@pytest.mark.slow
def test_every_run_has_its_scores(folder: Path) -> None:
    runs = {path.stem: read_json(path) for path in (folder / "runs").glob("*_n*.json")}
    labels = [
        f"{method}{place}"
        for method in METHODS
        for place in (("_c0", "_c1") if method.startswith("recipe") else ("",))
    ]
    assert set(runs) == {f"{label}_n{count}" for label in labels for count in (1, 2)}
    for name, run in runs.items():
        assert run["failed"] is None, name
        assert (run["windows"], run["asked"]) == (2 // run["edits"], 2)
        scores = run["scores"]
        assert set(retrieval_quality.MEASURES) < set(scores)
        assert 0 <= scores["locality"] <= 1 < scores["ppl"]
        if run["method"].startswith("recipe"):
            assert scores["hit"] == 1 or run["edits"] == 2
            assert (run["threshold"] is None) == (run["method"] != "recipe@cosine")
    assert runs["none_n2"]["scores"]["locality"] == 1
    assert runs["none_n2"]["scores"]["reliability_exact"] == 0
    for front in ("text", "words"):
        assert (
            runs[f"recipe@{front}_c0_n2"]["scores"]["told_reliability"] == 1
        )  # the demo model reads its context


@pytest.mark.slow
def test_the_table_has_a_line_for_each_method(folder: Path) -> None:
    lines = (folder / "runs.md").read_text().splitlines()
    for method in METHODS:
        assert sum(line.startswith(f"| {method} ") for line in lines) >= 2
    with (folder / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    assert (folder / "runs.png").stat().st_size > 0


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "runs" / "none_n2.json").unlink()
    made = []
    run = retrieval_quality.Study.run

    def noted(study: Any, *given: Any) -> dict[str, Any]:
        made.append(given[0])
        return run(study, *given)

    monkeypatch.setattr(retrieval_quality.Study, "run", noted)
    retrieval_editing.main(command(folder))
    assert made == ["none"]
    assert "19 runs are there, 1 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of other records or settings"):
        retrieval_editing.main(command(folder, "--seed", "1"))


@pytest.mark.slow
def test_reading_needs_no_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder / "demo_test.json"), "--train", str(folder / "demo_train.json")]
    stem = folder / "reading"
    retrieval_editing.main(["reading", "--models", "demo", *data, "--records", "8", "--out", str(stem)])
    with stem.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["in front"] for row in rows] == ["", *retrieval_quality.TEMPLATES]
    assert {row["records"] for row in rows} == {"8"}
    assert float(rows[0]["reliability_exact"]) == 0
    assert float(rows[1]["reliability_exact"]) > 0.8  # the demo model reads its context
    assert stem.with_suffix(".md").read_text() == capsys.readouterr().out.removesuffix("\n")
