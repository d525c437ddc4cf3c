"""The benchmark of long sequences, on a handful of facts of the demo model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastedit import NumericalError
from fastedit.bench import sequential
from fastedit.demo import MODEL_FOLDER, load_demo_facts
from fastedit.io import read_json

pytestmark = pytest.mark.slow
FACTS = 4
METHODS = ["ft-m", "memit"]
SETTINGS = {"memit": {"layers": [1], "steps": 5}, "ft-m": {"layers": [2], "steps": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, settings, and the results of one command."""
    folder = tmp_path_factory.mktemp("sequential")
    facts = load_demo_facts(neighbours=1)[:: len(load_demo_facts()) // FACTS][:FACTS]
    rows = [
        {
            "case_id": number,
            "prompt": fact["prompt"].format(fact["subject"]),
            "subject": fact["subject"],
            "target_new": fact["neighbours"][0]["target"],
            "ground_truth": fact["target"],
            "rephrase_prompt": fact["paraphrases"][0].format(fact["subject"]),
            "locality_prompt": fact["prompt"].format(fact["neighbours"][0]["subject"]),
            "locality_ground_truth": fact["neighbours"][0]["target"],
        }
        for number, fact in enumerate(facts)
    ]
    (folder / "records.json").write_text(json.dumps(rows))
    (folder / "settings").mkdir()
    for method, params in SETTINGS.items():
        (folder / "settings" / f"model_{method}.json").write_text(json.dumps(params))
    sequential.main(command(folder))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    given = {"--model": MODEL_FOLDER, "--records": folder / "records.json", "--settings": folder / "settings"}
    given |= {"--out": folder / "runs", "--batch-size": 2, "--orders": 1, "--checkpoints": 2}
    options = [str(part) for pair in given.items() for part in pair]
    return [*options, "--norm-control", "--methods", *METHODS, *more]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in (folder / "runs").glob("*_order*.json")}


def test_every_run_has_its_scores(folder: Path) -> None:
    runs = results(folder)
    labels = ("ft-m", "memit", "memit+norm")
    assert set(runs) == {f"{label}_order0" for label in labels}
    shared = read_json(folder / "runs" / "shared.json")
    assert shared["unedited"]["all"]["efficacy"] == 0
    assert shared["unedited"]["all"]["locality"] == 1
    for run in runs.values():
        assert run["collapsed"] is None
        first, last = run["points"]
        assert (first["edits"], last["edits"]) == (2, 4)
        assert first["all"]["records"] == 2
        assert last["all"].keys() == {"records", *sequential.MEASURES} - {
            "ES",
            "PS",
            "NS",
        }  # no shared answers
        assert last["optimisable"]["records"] == len(shared["optimisable"])
        assert 0 <= last["all"]["efficacy"] <= last["all"]["efficacy_token"] <= 1
        assert last["change_norm"] > first["change_norm"] > 0
        assert last["ppl"] > 1
        assert last["kl"] > 0
    assert runs["memit+norm_order0"]["params"]["norm_anchor"] == shared["norm_anchors"]["memit"]["norm"]
    assert runs["memit_order0"]["params"]["steps"] == SETTINGS["memit"]["steps"]


def test_table_csv_and_plots_stand_beside_the_runs(folder: Path) -> None:
    text = (folder / "runs.md").read_text()
    assert "No norm control for ft-m" in text
    assert "memit+norm" in text
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["ft-m", "memit+norm", "memit"]
    assert float(rows[0]["all.efficacy_token"]) > 0
    for kind in ("retention", "scatter"):
        assert (folder / f"runs_{kind}.png").stat().st_size > 0


def test_only_missing_runs_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was lost, and another order, which is another sequence of the same facts."""
    before = results(folder)
    (folder / "runs" / "ft-m_order0.json").unlink()
    made = []
    run = sequential.Study.run
    monkeypatch.setattr(sequential.Study, "run", lambda self, *which: made.append(which) or run(self, *which))
    sequential.main(command(folder, "--orders", "2", "--methods", "ft-m"))
    assert [(variant.label, order) for variant, order in made] == [("ft-m", 0), ("ft-m", 1)]
    after = results(folder)
    again = {**after["ft-m_order0"], "seconds": None}
    assert again == {**before["ft-m_order0"], "seconds": None}
    assert after["memit_order0"] == before["memit_order0"]
    assert after["ft-m_order1"]["points"] != again["points"]
    made.clear()
    sequential.main(command(folder, "--table-only"))
    assert not made
    assert "| ft-m       | 2" in (folder / "runs.md").read_text()


def test_results_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    for method, params in {**SETTINGS, "ft-m": {"layers": [3]}}.items():
        (tmp_path / f"model_{method}.json").write_text(json.dumps(params))
    with pytest.raises(SystemExit, match="was made with other settings"):
        sequential.main(command(folder, "--settings", str(tmp_path)))
    with pytest.raises(SystemExit, match="of other records or settings"):
        sequential.main(command(folder, "--limit", "3"))


def test_a_method_that_breaks_is_scored_as_it_was_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.editors.fine_tune import FineTuneM

    edit, batches = FineTuneM.edit, []

    def breaks(self: FineTuneM, facts: Any) -> Any:
        batches.append(facts)
        if len(batches) == 2:
            raise NumericalError("the loss is not finite")
        return edit(self, facts)

    monkeypatch.setattr(FineTuneM, "edit", breaks)
    runs = command(folder, "--out", str(tmp_path / "runs"), "--orders", "1", "--methods", "ft-m")
    sequential.main(runs)
    run = read_json(tmp_path / "runs" / "ft-m_order0.json")
    assert run["collapsed"] == {"edits": 2, "reason": "the loss is not finite"}
    assert run["points"][-1]["edits"] == 4
    assert run["points"][-1]["change_norm"] == run["points"][0]["change_norm"]
    assert "1 of 1 (after 2)" in (tmp_path / "runs.md").read_text()


def test_wrong_variants_are_named() -> None:
    for name in ("memit@0.8", "nse@1.5", "nse@many", "wise@both"):
        with pytest.raises(SystemExit, match=f"{name}' is none of the variants grace@REPLACEMENT"):
            sequential.variants_of([name], False)
    with pytest.raises(ValueError, match="there is no method 'memo'"):
        sequential.variants_of(["memo"], True)
