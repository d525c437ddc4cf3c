"""The published files themselves, where a folder with them is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastedit.data import load_facts, load_records, load_texts

# Formats that are not records of edits.
OTHER = ("ability", "text")
OTHER_FILES = ("cf_generation_prompts", "counterfact_sampled_unique")


def _files() -> list[Path]:
    root = os.environ.get("FASTEDIT_TEST_DATA")
    folder = Path(root, "data") if root else Path("/nonexistent")
    return sorted(p for p in folder.rglob("*") if ".json" in p.name and p.is_file())


def _cases(wanted: bool) -> list:
    chosen = [
        p for p in _files() if (p.parent.name not in OTHER and not p.name.startswith(OTHER_FILES)) == wanted
    ]
    if not chosen:
        reason = "FASTEDIT_TEST_DATA is unset or has no data/ folder"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]
    return [pytest.param(p, id=f"{p.parent.name}/{p.name}") for p in chosen]


@pytest.mark.parametrize("path", _cases(True))
def test_published_records_are_read(path):
    records = load_records(path)
    total = len(records) + len(records.skipped)
    assert len(records) >= 0.98 * total, records.skipped[:3]
    assert all(s.reason for s in records.skipped)
    positions = [r.position for r in records] + [s.position for s in records.skipped]
    assert sorted(positions) == list(range(total))
    for record in records:
        assert record.fact.text
        assert record.source
        for kinds in (record.locality, record.portability):
            assert all(items and all(item.prompt.strip() for item in items) for items in kinds.values())


@pytest.mark.parametrize("path", _cases(True))
def test_published_records_are_facts(path):
    facts = load_facts(path, on_skip="warn")
    assert facts
    assert all(fact.target.startswith(" ") for fact in facts)


@pytest.mark.parametrize("path", _cases(False))
def test_other_files_are_refused(path):
    with pytest.raises(ValueError, match="no known record format"):
        load_records(path)


def test_texts_are_read():
    paths = [p for p in _files() if p.parent.name == "text"]
    if not paths:
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no data/text folder")
    for path in paths:
        assert len(load_texts(path)) > 1


def test_full_and_flat_counterfact_agree():
    paths = {p.name: p for p in _files()}
    if "counterfact.json.gz" not in paths or "counterfact-edit.json.gz" not in paths:
        pytest.skip("FASTEDIT_TEST_DATA has no CounterFact files")
    flat = {r.name: r for r in load_records(paths["counterfact-edit.json.gz"])}
    shared = [r for r in load_records(paths["counterfact.json.gz"]) if r.name in flat]
    assert shared
    for record in shared:
        other = flat[record.name]
        assert (record.fact.text, record.fact.target) == (other.fact.text, other.fact.target)
        assert other.neighborhood[0] in record.neighborhood
