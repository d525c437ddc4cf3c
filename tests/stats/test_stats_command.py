from __future__ import annotations

import argparse
import json

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer

from fastedit import CorruptFile, FasteditError
from fastedit.cli.stats import add_parser
from fastedit.stats import Statistics, accumulate, ensure


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of a text that goes on." for i in range(90)))
    return str(path)


def command(*arguments):
    parser = argparse.ArgumentParser("fastedit")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["stats", *map(str, arguments)])
    return args.run(args)


def test_files_and_table(model_folder, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(model_folder, "--texts", texts, "--layers", "0-1", "--tokens", 700, "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "width", "tokens", "file"]
    assert lines[2].split() == ["1", "64", "700", str(out / "layer_001.safetensors")]
    assert sorted(path.name for path in out.iterdir()) == ["layer_000.safetensors", "layer_001.safetensors"]
    assert Statistics.load(out / "layer_001.safetensors").count == 700


def test_json(model_folder, texts, tmp_path, capsys):
    assert command(model_folder, "--texts", texts, "--layers", "2", "--out", tmp_path / "o", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["statistics"]
    assert (row["layer"], row["width"], row["tokens"]) == (2, 64, 640)
    assert row["module"] == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("style", ["easyedit", "memit"])
def test_files_of_other_libraries(style, model_folder, texts, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--layers", "1", "--format", style, "--sample-size", 77, "--profile", "official"]
    assert command(model_folder, "--texts", texts, "--out", out, *options) == 0
    (file,) = out.glob("*/wikipedia_stats/model.layers.1.mlp.down_proj_float32_mom2_77.npz")
    assert file.parent.parent.name == ("tiny" if style == "easyedit" else model_folder.replace("/", "_"))
    assert Statistics.from_npz(file).meta["profile"] == "official"


def test_cache_is_where_editors_look(model_folder, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    options = ["--texts", texts, "--layers", "all", "--seed", 3]
    assert command(model_folder, *options) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(accumulate.Accumulators, "add", lambda *_: 1 / 0)
    assert command(model_folder, *options) == 0  # found, not collected again
    assert capsys.readouterr().out == first
    found = ensure(tiny_model("llama"), tiny_tokenizer(), [0, 1, 2], n_tokens=600)
    assert torch.equal(found[1].second_moment, Statistics.load(first.split()[-5]).second_moment)


def test_interrupted_run_goes_on(model_folder, texts, tmp_path, monkeypatch):
    from fastedit.stats import checkpoint

    monkeypatch.setattr(checkpoint.Checkpoint, "due", lambda self: True)
    original, calls = accumulate.Accumulators.add, []

    def add(self, ids, mask):
        calls.append(int(mask.sum()))
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, ids, mask)

    monkeypatch.setattr(accumulate.Accumulators, "add", add)
    options = ["--texts", texts, "--layers", "0", "--batch-tokens", 100, "--out", tmp_path / "out"]
    with pytest.raises(KeyboardInterrupt):
        command(model_folder, *options)
    assert command(model_folder, *options) == 0
    assert sum(calls) - calls[2] == 640
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["layer_000.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "5"], "layers 0 to 2"),
        (["--layers", "x"], "4-8"),
        (["--texts", "none.txt"], "none.txt"),
        (["--format", "memit", "--layers", "0"], "--out"),
    ],
)
def test_mistakes_are_told_plainly(options, message, model_folder, texts, capsys):
    assert command(model_folder, "--texts", texts, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_missing_model_is_told_plainly(tmp_path):
    with pytest.raises(FasteditError, match="cannot load the model"):
        command(tmp_path / "nothing")


def test_damaged_texts_are_an_error_of_fastedit(model_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(CorruptFile, match="line 1"):
        command(model_folder, "--texts", tmp_path / "a.jsonl", "--layers", "0", "--out", tmp_path / "out")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    assert "torchrun" in capsys.readouterr().out
