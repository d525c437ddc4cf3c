"""``fastedit bench`` and what its benchmarks share."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import types
from pathlib import Path

import pytest
import torch

from fastedit.bench import common
from fastedit.cli.bench import STEMS
from fastedit.cli.main import main


def options(**given) -> argparse.Namespace:
    values = {"repetitions": 3, "quick": True, "out": None, "plot": None, "json": False, **given}
    return argparse.Namespace(**values)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A benchmark of one small problem on a machine whose limits are known."""
    x = torch.ones(64)
    runs = {common.OURS + "cpp": lambda: x.sum(), "torch": lambda: [x.sum() for _ in range(50)]}
    problem = common.Problem(
        "sum", "64", "float32", runs, dict.fromkeys(runs, 0.0), x.nbytes, 64, {"fastedit-cuda": "no GPU"}
    )
    monkeypatch.setattr(common, "limits", lambda *_: {"copy": 1e9, "float32": 1e9})
    return types.SimpleNamespace(
        OPS=("sum",), DTYPES=("float32",), problems=lambda device, quick: iter([problem])
    )


def test_every_provider_gets_a_row(tiny: types.SimpleNamespace) -> None:
    rows = {row["provider"]: row for row in common.run("tiny", tiny, "cpu", options()).rows}
    assert rows["fastedit-cpp"]["speedup_vs_best_other"] > 1
    assert rows["torch"]["speedup_vs_best_other"] is None
    assert 0 < rows["torch"]["fraction_of_limit"] < rows["fastedit-cpp"]["fraction_of_limit"]
    assert rows["fastedit-cuda"]["note"] == "not measured: no GPU"
    assert all(set(row) == set(common.COLUMNS) for row in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "covariance", "--device", "cuda", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["rows"]
    assert all(row["note"] == "not measured: no GPU on this machine" for row in result["rows"])


def test_tables_are_kept_where_asked(
    tiny: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = common.run("tiny", tiny, "cpu", options())
    common.finish(options(out=tmp_path, plot=str(tmp_path / "tiny.png")), [result])
    with (tmp_path / "tiny_cpu.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["provider"] == "fastedit-cpp"
    assert row["device_name"]
    assert row["date"]
    assert (tmp_path / "tiny.png").stat().st_size > 0
    assert "copy 1 GB/s" in capsys.readouterr().out


def test_an_unknown_operation_is_one_plain_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "covarience"]) == 2
    assert "no benchmark 'covarience': expected covariance" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_every_benchmark_compares_results_and_measures(stem: str) -> None:
    module = importlib.import_module(f"fastedit.bench.{stem}")
    problem = next(iter(module.problems("cpu", True)))
    assert problem.op in module.OPS
    ours = {name for name in problem.runs if name.startswith(common.OURS)}
    assert ours
    assert ours <= set(problem.errors)
    rows = common.measured(problem, "cpu", 1, {"copy": 1e10, problem.dtype: 1e12})
    assert any(row["provider"].startswith(common.OURS) for row in rows)
    assert any(not row["provider"].startswith(common.OURS) for row in rows)
