"""Memories in model directories, and every command that sees them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from memory.toy import generate
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, make

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError
from fastedit.artefacts import apply_to_directory, export, list_directory, revert_directory
from fastedit.cli.main import main
from fastedit.memory import sides_of

QUICK = {"layers": (1,), "steps": 10, "lr": 0.3, "init": "warm", "radius": 0.5}
MORE = [Fact("The capital of {} is", "Japan", "Rome")]


def edit_of(model: Any, facts: list[Fact] = FACTS, method: str = "grace", **params: Any) -> Any:
    quick = QUICK if method == "grace" else {"layers": (1,), "steps": 4, "lr": 0.02}
    return fastedit.editor(method, model, tiny_tokenizer(), params={**quick, **params}).edit(facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    ids = tiny_tokenizer()([fact.text for fact in [*FACTS[:1], *MORE]], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_model_is_saved_and_loaded_with_its_memories(tmp_path: Path) -> None:
    model = tiny_model("llama")
    edit_of(model)
    edit_of(model, MORE, layers=(0,))
    edit_of(model, MORE)
    fastedit.save_model(model, tmp_path / "saved", tiny_tokenizer())
    loaded = fastedit.load_model(tmp_path / "saved")
    assert [[edit.id for edit in side.edits] for side in sides_of(loaded)] == [
        [edit.id for edit in side.edits] for side in sides_of(model)
    ]
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(FileExistsError):
        fastedit.save_model(model, tmp_path / "saved")
    fastedit.save_model(tiny_model("llama"), tmp_path / "saved", overwrite=True)
    assert sides_of(fastedit.load_model(tmp_path / "saved")) == []


def test_edits_go_in_and_out_of_a_directory(folder: Path) -> None:
    before = contents(folder)
    model = fastedit.load_model(folder)
    base = logits(model)
    first, second = edit_of(model), edit_of(model, MORE)
    for edit in (first, second):
        row = apply_to_directory(edit, folder)
        assert (row["id"], row["method"], row["matrices"]) == (edit.id, "grace", 0)
    assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert [row["id"] for row in list_directory(folder)] == [first.id, second.id]
    assert torch.equal(logits(fastedit.load_model(folder)), logits(model))
    with pytest.raises(FasteditError, match="in this memory already"):
        apply_to_directory(first, folder)
    assert [row["id"] for row in revert_directory(folder, first.id[:6])] == [first.id]
    first.revert(model)
    assert torch.equal(logits(fastedit.load_model(folder)), logits(model))
    revert_directory(folder, "all")
    assert {k: v for k, v in contents(folder).items() if k != ".fastedit.lock"} == before
    assert torch.equal(logits(fastedit.load_model(folder)), base)
    with pytest.raises(FasteditError, match="nothing to revert"):
        revert_directory(folder)


def test_another_directory_takes_the_edit_and_this_one_stays(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    edit = edit_of(fastedit.load_model(folder))
    apply_to_directory(edit, folder, out=tmp_path / "new")
    assert contents(folder) == before
    assert [each.id for each in sides_of(fastedit.load_model(tmp_path / "new"))[0].edits] == [edit.id]
    for format in ("full", "lora"):
        with pytest.raises(FasteditError, match="cannot be merged"):
            export([], tmp_path / "new", tmp_path / "out", format=format)


def test_weights_and_memories_in_one_directory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = edit_of(fastedit.load_model(folder))
    weights = make("memit", fastedit.load_model(folder), params={"steps": 3, "layers": (0,)}).edit(MORE)
    apply_to_directory(weights, folder)
    apply_to_directory(memory, folder)
    assert [row["method"] for row in list_directory(folder)] == ["memit", "grace"]
    with caplog.at_level(logging.WARNING):
        model = fastedit.load_model(folder)
    assert "used on other weights" in caplog.text
    assert len(sides_of(model)) == 1
    assert revert_directory(folder)[0]["method"] == "grace"
    assert revert_directory(folder)[0]["method"] == "memit"
    assert list_directory(folder) == []


def test_edits_of_other_weights_and_damaged_lists_are_refused(folder: Path) -> None:
    edit = edit_of(tiny_model("llama", seed=4))
    with pytest.raises(BaseMismatch, match="other bits than the weight"):
        apply_to_directory(edit, folder)
    assert list_directory(folder) == []
    apply_to_directory(edit, folder, force=True)
    place = folder / "fastedit_memory" / "memory.json"
    text = place.read_text()
    place.write_text(text[:-20])
    with pytest.raises(CorruptFile, match="truncated"):
        list_directory(folder)
    place.write_text(text)
    shutil.rmtree(place.parent / edit.id)
    with pytest.raises(CorruptFile, match="there is no edit in"):
        fastedit.load_model(folder)


def test_a_whole_state_is_taken_out_from_the_top(folder: Path) -> None:
    model = fastedit.load_model(folder)
    edits = [edit_of(model, facts, "defer") for facts in (FACTS, MORE)]
    for edit in edits:
        apply_to_directory(edit, folder)
    assert torch.equal(logits(fastedit.load_model(folder)), logits(model))
    with pytest.raises(FasteditError, match="were trained on top of it"):
        revert_directory(folder, edits[0].id)
    assert len(list_directory(folder)) == 2
    revert_directory(folder)
    edits[1].revert()
    assert torch.equal(logits(fastedit.load_model(folder)), logits(model))


def test_a_killed_writer_leaves_the_former_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastedit.load_model(folder)
    first, second = edit_of(model), edit_of(model, MORE)
    apply_to_directory(first, folder)
    before = list_directory(folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastedit.memory.directory._commit", killed)
    with pytest.raises(KeyboardInterrupt):
        apply_to_directory(second, folder)
    monkeypatch.undo()
    assert list_directory(folder) == before
    third = edit_of(fastedit.load_model(folder), [Fact("{} sings", "Ada Lovelace", "Paris")])
    apply_to_directory(third, folder)  # sweeps what the killed one left
    assert {p.name for p in (folder / "fastedit_memory").iterdir()} == {"memory.json", first.id, third.id}


SETTINGS = {
    "grace": ["layers=1", "steps=10", "lr=0.3", "init=warm", "radius=0.5"],
    "defer": ["layers=1", "steps=4", "lr=0.02"],
    "wise": ["layers=1", "steps=3", "save_freq=1", "merge_freq=8"],
    "melo": ["layers=1", "targets=[2]", "steps=4"],
    "t-patcher": ["layers=1", "steps=6", "memory_size=50", "check_every=3"],
    "serac": ["threshold=0.9"],
}


@pytest.mark.parametrize("method", list(SETTINGS))
def test_the_command_line(method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--set", *SETTINGS[method]]
    edited, place = tmp_path / "edited", tmp_path / "edit"
    facts = ["--fact", "The capital of {France} is -> Lyon", "--fact", "{Miles Davis} plays the -> violin"]
    common = ["--method", method, *settings, "--json"]
    args = [
        "edit",
        str(folder),
        *facts,
        "--batch-size",
        "1",
        "--out",
        str(place),
        "--save-model",
        str(edited),
    ]
    assert main([*args, *common]) == 0
    ids = [edit["id"] for edit in json.loads(capsys.readouterr().out)["edits"]]
    assert len(ids) == 2
    assert main(["list", str(edited), "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ids
    assert main(["show", str(place / "002")]) == 0
    shown = capsys.readouterr().out
    for words in (method, "no weight is changed", "memory_bytes", "prefill_flops", "Miles Davis"):
        assert words in shown
    assert main(["show", str(place / "002"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["memory_entries"] >= 1
    again = [
        "edit",
        str(edited),
        "--fact",
        "The capital of {Japan} is -> Rome",
        "--out",
        str(tmp_path / "more"),
    ]
    assert main([*again, "--save-model", str(tmp_path / "edited-2"), *common]) == 0
    assert len(list_directory(tmp_path / "edited-2")) == 3
    capsys.readouterr()
    single = ["revert", str(edited), "--edit", ids[0], "--json"]
    if method == "defer":
        assert main(single) != 0
        assert "cannot be taken off by itself" in capsys.readouterr().err
    else:
        assert main(single) == 0
        assert [row["id"] for row in json.loads(capsys.readouterr().out)["remaining"]] == ids[1:]
    assert main(["revert", str(edited), "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remaining"] == []
    assert main(["apply", str(place / "001"), "--model", str(edited)]) == 0
    assert main(["export", str(place / "001"), "--model", str(folder), "--out", str(tmp_path / "x")]) != 0
    assert "cannot be merged" in capsys.readouterr().err


def test_evaluation_routes_by_the_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Teacher-forced scores see the memory, though answers follow the prompts in the same rows."""
    rows = [{**fact.as_dict(), "prompt": fact.prompt} for fact in FACTS]
    data = tmp_path / "facts.json"
    data.write_text(json.dumps(rows))
    args = ["eval", str(folder), "--data", str(data), "--method", "grace", "--batch-size", "2", "--json"]
    settings = ["--set", "layers=2", "steps=60", "lr=0.3", "init=warm", "radius=0.05"]
    assert main([*args, *settings, "--protocols", "easyedit.tf"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    tacc = {row["when"]: row["metrics"]["reliability.tacc"]["mean"] for row in results}
    assert tacc["final"] > tacc["before"]


def test_scores_see_the_memory() -> None:
    from fastedit.evaluation.scoring import Pair, Scorer

    model = tiny_model("llama")
    edit = edit_of(model, FACTS, steps=40)
    pairs = [Pair(fact.text, fact.target_new) for fact in FACTS]
    for side in ("left", "right"):
        scorer = Scorer(model, tiny_tokenizer(), padding_side=side, batch_size=2)
        after = [score.nll for score in scorer.score(pairs)]
        with sides_of(model)[0].suspended():
            before = [score.nll for score in scorer.score(pairs)]
        outcomes = edit.measured["facts"]
        for one, other, outcome in zip(before, after, outcomes, strict=True):
            assert one == pytest.approx(outcome["loss_before"], rel=1e-3)
            assert other == pytest.approx(outcome["loss_after"], rel=0.05)
    generate(model, {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 3).long()})
