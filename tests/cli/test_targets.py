"""``fastedit targets``: the caches of other repositories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer

import fastedit
from fastedit.cli.main import main
from fastedit.data import load_facts
from fastedit.editors.prompts import fact_rows
from fastedit.models.runner import frozen

ROWS = [
    {"prompt": "The capital of {} is", "subject": name, "target_new": city, "case_id": case}
    for case, (name, city) in enumerate((("France", "Lyon"), ("Japan", "Rome"), ("Italy", "Tokyo")), 7)
]
CONTEXTS = ["{}", "The thing. {}"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(ROWS))
    (tmp_path / "contexts.json").write_text(json.dumps(CONTEXTS))
    named = ["--facts", "facts.json", "--contexts", "contexts.json", "--out", "kvs"]
    paths = [str(tmp_path / each) if "." in each or each == "kvs" else each for each in named]
    settings = ["--layer", "1", "--set", "steps=3", "lr=0.1", "clamp=4.0", "--device", "cpu", "--json"]
    return ["targets", str(tmp_path / "model"), "--name", "org/tiny", *paths, *settings]


def test_files_hold_the_editors_targets(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    folder = tmp_path / "kvs" / "org_tiny_MEMIT"
    names = [f"mcf_layer_1_clamp_4_case_{case}.npz" for case in (7, 8, 9)]
    assert report["made"] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "mcf_layer_1_clamp_4_fastedit.json"]

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    params = {"layers": [1], "steps": 3, "lr": 0.1, "clamp": 4.0}
    editor = fastedit.editor("memit", model, tokenizer, params=params, contexts=CONTEXTS)
    facts = load_facts(tmp_path / "facts.json")
    with frozen(model):
        target = editor.targets(facts, fact_rows(tokenizer, facts, CONTEXTS, None)).target
    for name, row in zip(names, target, strict=True):
        value = np.load(folder / name)["v_star"]
        assert value.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(value), row)


def test_it_goes_on_where_it_was(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "2", "--batch-size", "1"]) == 0
    first = tmp_path / "kvs" / "org_tiny_MEMIT" / "mcf_layer_1_clamp_4_case_7.npz"
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (len(report["made"]), len(report["found"])) == (1, 2)
    assert first.stat().st_mtime_ns == written


def test_files_of_other_origin_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "1"]) == 0
    assert main([*command, "--limit", "1", "--set", "steps=4", "lr=0.1", "clamp=4"]) == 1
    assert "made with another objective" in capsys.readouterr().err
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{**ROWS[0], "target_new": "Miles"}]))
    assert main(command) == 1
    assert "holds the value of" in capsys.readouterr().err
    file = tmp_path / "kvs" / "org_tiny_MEMIT" / "mcf_layer_1_clamp_4_case_7.npz"
    np.savez(file, v_star=np.zeros(4, dtype=np.float32))
    assert main(command) == 1
    assert "made by another program" in capsys.readouterr().err
    file.write_bytes(b"PK cut off")
    assert main(command) == 1
    assert "not a whole .npz file" in capsys.readouterr().err


def test_two_facts_of_one_case_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([ROWS[0], {**ROWS[1], "case_id": 7}]))
    assert main(command) == 1
    assert "have the case_id 7" in capsys.readouterr().err
    assert not (tmp_path / "kvs").exists()


def test_nse_has_a_folder_of_its_own(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--method", "nse", "--limit", "1", "--dataset", "zsre"]) == 0
    assert (tmp_path / "kvs" / "org_tiny_NSE" / "zsre_layer_1_clamp_4_case_7.npz").is_file()
    capsys.readouterr()
