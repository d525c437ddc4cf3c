"""``fastedit train``, and edits with what it made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from editors.recipe_tiny import save_encoder
from model_configs import tiny_model, tiny_tokenizer

from fastedit.cli.main import main

ROWS = [
    {
        "prompt": f"The capital of {name} is",
        "subject": name,
        "target_new": city,
        "rephrase_prompt": f"{name} is governed from",
        "locality_prompt": f"{city} is in the city of",
        "locality_ground_truth": "Rome",
    }
    for name, city in (("France", "Lyon"), ("Japan", "Rome"), ("Italy", "Tokyo"), ("Miles", "Paris"))
]


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str, str]:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    return str(tmp_path / "model"), str(tmp_path / "data.json"), str(tmp_path / "out")


def test_train_then_edit_then_generate(
    places: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = places
    train = ["train", "serac", "--model", model, "--data", data, "--out", out, "--device", "cpu"]
    quick = ["--set", "steps=4", "batch=2", "accumulate=1", "validate_every=2", "holdout=0.3"]
    assert main([*train, *quick, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["method"]) == (4, "serac")
    assert main([*train, *quick]) == 1  # it is there
    assert "choose a new folder" in capsys.readouterr().err
    edited = str(tmp_path / "edited")
    edit = ["edit", model, "--fact", "The capital of {France} is -> Lyon", "--method", "serac", "--json"]
    where = ["--out", str(tmp_path / "edit"), "--save-model", edited, "--device", "cpu"]
    assert main([*edit, *where, "--set", f"classifier={out}"]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["counterfactual"] == out
    assert main(["show", str(tmp_path / "edit")]) == 0
    assert "a memory beside the whole model; no weight is changed" in capsys.readouterr().out
    assert main(["list", edited]) == 0
    assert main(["revert", edited]) == 0


def test_text_and_refusals(places: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = places
    train = ["train", "serac", "--model", model, "--data", data, "--out", out, "--device", "cpu"]
    assert main([*train, "--set", "steps=2", "batch=2", "accumulate=1", "--counterfactual", "base"]) == 0
    assert "2 steps, the best is 2" in capsys.readouterr().out
    assert main([*train[:-3], out + "2", "--set", "stepps=2"]) == 2
    assert "has no stepps" in capsys.readouterr().err
    assert main([*train[:-3], out + "3", "--limit", "1"]) == 2
    assert "at least 2 subjects" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "memit"])


def test_recipe_is_trained_and_edits(
    places: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = places
    encoder = str(save_encoder(tmp_path / "encoder"))
    test = tmp_path / "test.json"
    test.write_text(json.dumps(ROWS[-1:]))
    train = ["train", "recipe", "--model", model, "--data", data, "--out", out, "--device", "cpu"]
    given = ["--encoder", encoder, "--exclude", str(test)]
    quick = ["--set", "steps=2", "batch=2", "dim=8", "validate_every=1", "holdout=0.3", "train_encoder=false"]
    assert main([*train, *given, *quick, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["steps"], report["left_out"]) == ("recipe", 2, {"shared subject": 1})
    assert main([*train, *given, "--classifier", "base"]) == 2
    assert "trained without --classifier" in capsys.readouterr().err
    edited, store = str(tmp_path / "edited"), str(tmp_path / "store")
    edit = ["edit", model, "--fact", "The capital of {France} is -> Lyon", "--method", "recipe", "--json"]
    where = ["--out", str(tmp_path / "edit"), "--save-model", edited, "--device", "cpu"]
    assert main([*edit, *where, "--set", f"checkpoint={out}", f"store={store}"]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["store"] == store
    assert main(["show", str(tmp_path / "edit")]) == 0
    assert "a memory beside the whole model; no weight is changed" in capsys.readouterr().out
    assert main(["list", edited]) == 0
    assert main(["revert", edited]) == 0
    assert main([*edit, "--out", str(tmp_path / "edit2"), "--device", "cpu"]) == 2
    assert "needs a checkpoint" in capsys.readouterr().err
