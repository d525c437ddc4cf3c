"""The command as people use it: help, errors, and the main job from facts on disk to an edited model on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from fastedit import demo
from fastedit.cli.main import VERBS, main

QUICK = ["--set", "steps=6", "lr=0.05", "layers=0-1", "covariance_weight=5"]


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def facts_file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.csv"
    path.write_text(
        "prompt,subject,target_new\nThe capital of {} is,France,Lyon\n{} plays the,Miles Davis,violin\n"
    )
    return path


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--json" in text
    assert f"fastedit {verb}" in text


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "fastedit demo" in capsys.readouterr().out


def test_info_lists_operations_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    rows = {(row["op"], row["backend"]): row for row in value["operations"]}
    for op in ("covariance_", "low_rank_update_"):
        assert rows[op, "torch"]["available"]
        for backend in ("cpp", "triton", "cuda"):
            assert rows[op, backend]["available"] or rows[op, backend]["reason"]
    assert {"rome", "r-rome", "p-rome", "memit"} <= set(value["methods"])
    assert main(["info"]) == 0
    assert "covariance_" in capsys.readouterr().out


def test_the_main_job(
    model_dir: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Facts go in; an edit, and an edited model that can be reverted to its bytes, come out."""
    before, before_files = weights(model_dir), digest(model_dir)
    edit_dir, edited = tmp_path / "edit", tmp_path / "edited"
    arguments = ["edit", str(model_dir), "--facts", str(facts_file), "--out", str(edit_dir)]
    assert main([*arguments, "--save-model", str(edited), *QUICK]) == 0
    text = capsys.readouterr().out
    assert "The capital of France is" in text
    assert "2 facts" in text
    assert digest(model_dir) == before_files, "the model on disk must not be touched"

    changed = [name for name, tensor in weights(edited).items() if not torch.equal(tensor, before[name])]
    assert sorted(changed) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]

    assert main(["list", str(edited), "--json"]) == 0
    capsys.readouterr()
    assert main(["show", str(edit_dir), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["method"] == "memit"
    assert len(shown["facts"]) == 2
    assert shown["measured"]["answers"]["n_facts"] == 2

    assert main(["export", str(edit_dir), "--model", str(model_dir), "--out", str(tmp_path / "full")]) == 0
    exported = weights(tmp_path / "full")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in weights(edited).items())

    assert main(["revert", str(edited)]) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(edited).items())
    assert digest(edited)["model.safetensors"] == before_files["model.safetensors"]


def test_batches_become_edits_of_their_own(
    model_dir: Path, facts_file: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["edit", str(model_dir), "--facts", str(facts_file), "--batch-size", "1", "--json"]
    out, edited = tmp_path / "edits", tmp_path / "edited"
    assert main([*arguments, "--out", str(out), "--save-model", str(edited), *QUICK]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [Path(edit["folder"]).name for edit in value["edits"]] == ["001", "002"]
    assert main(["list", str(edited), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    for edit in value["edits"]:
        assert main(["apply", edit["folder"], "--model", str(model_dir)]) == 0
    capsys.readouterr()
    one, other = (
        load_file(place / "model.safetensors") for place in (model_dir, edited)
    )  # headers have the time
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["revert", str(model_dir), "--all"]) == 0


def test_a_sequence_goes_on_from_its_state(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--method", "memit-cache", "--state", str(tmp_path / "state"), "--json", *QUICK]
    first = [
        "edit",
        str(model_dir),
        "--fact",
        "The capital of {France} is -> Lyon",
        "--out",
        str(tmp_path / "a"),
    ]
    assert main([*first, "--save-model", str(tmp_path / "one"), *common]) == 0
    second = ["--fact", "The capital of {Italy} is -> Oslo", "--out", str(tmp_path / "b")]
    assert main(["edit", str(tmp_path / "one"), *second, *common]) == 0
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    assert state["about"]["batches"] == 2
    capsys.readouterr()
    assert main(["edit", str(model_dir), *second[:2], "--out", str(tmp_path / "c"), *common]) == 1
    assert "bits that it had when the state was saved" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_ultraedit_needs_no_statistics(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "edit",
        str(model_dir),
        "--fact",
        "The capital of {France} is -> Lyon",
        "--method",
        "ultraedit",
    ]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "ultraedit"
    assert main([*arguments, "--out", str(tmp_path / "b"), "--stats", "somewhere"]) == 2
    assert "neither --stats nor --on-known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fact", "The capital of France is -> Lyon"], "{"),
        (["--fact", "The capital of {France} is -> "], "answer"),
        (["--facts", "absent.json"], "absent.json"),
        ([], "no facts"),
        (["--fact", "A {b} is -> c", "--method", "memo"], "there is no method 'memo'"),
        (["--fact", "A {b} is -> c", "--set", "layers=9"], "blocks 0 to 2"),
        (["--fact", "A {b} is -> c", "--set", "steps"], "NAME=VALUE"),
        (["--fact", "A {b} is -> c", "--fact", "A {b} is -> d"], "contradictory"),
        (["--fact", "A {b} is -> c", "--stats", "absent"], "absent"),
    ],
)
def test_wrong_input_gets_one_plain_sentence(
    arguments: list[str], message: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(model_dir)
    status = main(["edit", str(model_dir), "--out", str(tmp_path / "edit"), *arguments])
    said = capsys.readouterr()
    assert status in (1, 2)
    assert said.out == ""
    assert message in said.err
    assert "Traceback" not in said.err
    assert digest(model_dir) == before
    assert not (tmp_path / "edit").exists()


def test_a_model_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["--fact", "A {b} is -> c", "--out", str(tmp_path / "edit")]
    assert main(["edit", str(tmp_path / "empty"), *arguments]) == 1
    assert "config.json" in capsys.readouterr().err


def test_an_existing_out_folder_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["edit", "no-model", "--fact", "A {b} is -> c", "--out", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_ctrl_c_leaves_everything_as_it_was(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastedit.editors.memit import Memit

    def interrupt(*_args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Memit, "solve", interrupt)
    before = digest(model_dir)
    arguments = ["--fact", "The capital of {France} is -> Lyon", "--out", str(tmp_path / "edit")]
    assert main(["edit", str(model_dir), *arguments, *QUICK]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert digest(model_dir) == before
    assert not (tmp_path / "edit").exists()


def test_eval_gives_one_table_before_and_after(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        {
            "case_id": number,
            "prompt": f"The capital of {subject} is",
            "subject": subject,
            "target_new": "Lyon",
            "ground_truth": "Paris",
            "rephrase_prompt": f"{subject}, its capital being",
            "locality_prompt": "The mother tongue of Danielle Darrieux is",
            "locality_ground_truth": "French",
        }
        for number, subject in enumerate(["France", "Japan", "Italy"])
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    report = tmp_path / "report.json"
    arguments = ["eval", str(model_dir), "--data", str(path), "--batch-size", "2", "--report", str(report)]
    assert main([*arguments, *QUICK]) == 0
    text = capsys.readouterr().out
    assert "before" in text
    assert "final" in text
    assert "easyedit.tf" in text
    assert json.loads(report.read_text())
    assert main(["eval", str(model_dir), "--data", str(path), "--method", "none", "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.skipif(
    not demo.MODEL_FOLDER.joinpath("model.safetensors").exists(), reason="no demo model packaged"
)
def test_demo_edits_shows_and_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path))
    assert main(["demo", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["bits_restored"]
    assert value["reverted_answers_equal"]
    assert value["scores"]["edited"] >= 0.8
    assert value["scores"]["neighbour_kept"] >= 0.7
    assert value["perplexity"]["after"] < 1.5 * value["perplexity"]["before"]
    assert main(["demo", "--facts", "11"]) == 2


def test_calibrate_writes_settings_that_edit_takes(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("France", "Italy", "Spain", "Norway", "Japan", "Peru")
    facts, texts, out = tmp_path / "facts.json", tmp_path / "texts.txt", tmp_path / "found.json"
    records = [{"prompt": "The capital of {} is", "subject": name, "target_new": "Lyon"} for name in names]
    facts.write_text(json.dumps(records))
    texts.write_text("It rains in Rome.\n\nThe law of the land is not what it was.\n")
    before = digest(model_dir)
    arguments = ["calibrate", str(model_dir), "--facts", str(facts), "--texts", str(texts), "--budget", "0"]
    assert main([*arguments, "--limit", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "2 facts kept back" in shown.out
    assert f"--params {out} --stats" in shown.out
    assert "searching on 4 facts" in shown.err
    assert digest(model_dir) == before

    assert main([*arguments, "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "2.json"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["n_tried"]["edits"] == 1
    assert value["params"] == json.loads(out.read_text())
    edit = [
        "edit",
        str(model_dir),
        "--facts",
        str(facts),
        "--params",
        str(out),
        "--stats",
        value["statistics"],
    ]
    assert main([*edit, "--out", str(tmp_path / "edit"), "--set", "steps=3", "--json"]) == 0
    assert (
        main(["calibrate", str(model_dir), "--method", "ultraedit", "--out", str(tmp_path / "3.json")]) == 2
    )
    assert "locate-then-edit methods" in capsys.readouterr().err
