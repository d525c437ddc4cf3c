"""The subcommands apply, revert, list, show and export, on a model directory."""

from __future__ import annotations

import argparse
import json

import pytest

from fastedit.artefacts import list_directory, stack_of
from fastedit.cli import apply, export, revert, show
from fastedit.cli import list as list_command


@pytest.fixture
def run(capsys):
    parser = argparse.ArgumentParser(prog="fastedit")
    subparsers = parser.add_subparsers(required=True)
    for module in (apply, revert, list_command, show, export):
        module.add_parser(subparsers)

    def call(*words: object) -> str:
        args = parser.parse_args([str(word) for word in words])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def place(tmp_path, make_model, make_edit):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    edit = make_edit(model)
    edit.measured = {"efficacy": 1.0, "seconds": {"solve": 0.1}}
    stack_of(model).push(edit)
    edit.save(tmp_path / "edit")
    return tmp_path, edit.id


def test_apply_list_revert(run, place) -> None:
    path, edit_id = place
    model = path / "model"
    assert "There are no edits" in run("list", model)
    before = (model / "model.safetensors").read_bytes()
    text = run("apply", path / "edit", "--model", model)
    assert f"Edit {edit_id} (memit, 1 fact) is in {model} now." in text
    assert f"fastedit revert {model} --edit {edit_id}" in text
    assert edit_id in run("list", model)
    assert json.loads(run("list", model, "--json"))[0]["id"] == edit_id
    assert "No edits left" in run("revert", model)
    assert (model / "model.safetensors").read_bytes() == before
    row = json.loads(run("apply", path / "edit", "--model", model, "--out", path / "out", "--json"))
    assert row["model"] == str(path / "out")
    assert len(list_directory(path / "out")) == 1
    result = json.loads(run("revert", path / "out", "--edit", edit_id[:5], "--json"))
    assert result["reverted"][0]["id"] == edit_id
    assert result["remaining"] == []


def test_show(run, place) -> None:
    path, edit_id = place
    text = run("show", path / "edit")
    for part in (
        edit_id,
        "memit",
        "The capital of France is",
        "Lyon",
        "mlp.c_proj.weight",
        "16 x 40",
        "efficacy",
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 110
    content = json.loads(run("show", path / "edit", "--json", "--facts"))
    assert content["id"] == edit_id
    assert content["changes"][0]["rank"] == 3
    assert content["measured"]["seconds"] == {"solve": 0.1}


def test_export(run, place) -> None:
    path, edit_id = place
    text = run("export", path / "edit", "--model", path / "model", "--out", path / "full", "--format", "full")
    assert "The edited model with 1 edit is in" in text
    assert (path / "full" / "config.json").exists()
    words = ["export", path / "edit", "--model", path / "model", "--out", path / "lora", "--format", "lora"]
    assert json.loads(run(*words, "--json")) == {
        "out": str(path / "lora"),
        "format": "lora",
        "edits": [edit_id],
    }
    assert (path / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["apply", "revert", "list", "show", "export"])
def test_help_has_examples(run, name, capsys) -> None:
    with pytest.raises(SystemExit):
        run(name, "--help")
    assert f"examples:\n  fastedit {name} " in capsys.readouterr().out
