"""Lists of facts as people write them."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import CorruptFile, InvalidFact
from fastedit.data import load_facts, parse_fact

ROWS = [
    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon", "target_old": "Paris"},
    {"prompt": "The capital of Peru is", "subject": "Peru", "target": "Cusco"},
    {"prompt": "The capital of {Chile} is", "answer": "Arica"},
]
TEXTS = ["The capital of France is", "The capital of Peru is", "The capital of Chile is"]


@pytest.mark.parametrize("arrow", ["->", " -> ", " → ", "=>"])
def test_parse_fact(arrow):
    fact = parse_fact(f"The capital of {{France}} is{arrow}Lyon")
    assert (fact.prompt, fact.subject, fact.target) == ("The capital of {} is", "France", " Lyon")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "The capital of {France} is",
        "The capital of France is -> Lyon",
        "{} is -> x",
        "{a} and {b} -> x",
        "{a} is -> ",
    ],
)
def test_parse_fact_refuses(line):
    with pytest.raises(InvalidFact):
        parse_fact(line)


WORD = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(WORD, WORD, WORD, WORD)
def test_parse_fact_round_trip(before, subject, after, target):
    fact = parse_fact(f"{before} {{{subject}}} {after} -> {target}")
    assert (fact.text, fact.subject, fact.target_new) == (f"{before} {subject} {after}", subject, target)


def _write(path, rows):
    if ".csv" in path.name:
        names = ["prompt", "subject", "target"]
        lines = [",".join(names)]
        for row in rows:
            target = row.get("target_new") or row.get("target") or row.get("answer")
            lines.append(f'"{row["prompt"]}",{row.get("subject", "")},{target}')
        text = "\n".join(lines) + "\n"
    elif ".jsonl" in path.name:
        text = "\n".join(map(json.dumps, rows))
    elif ".txt" in path.name:
        text = "# facts\n\n" + "\n".join(
            f"The capital of {{{s}}} is -> {t}"
            for s, t in (("France", "Lyon"), ("Peru", "Cusco"), ("Chile", "Arica"))
        )
    else:
        text = json.dumps(rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv", "f.txt", "f.json.gz", "f.csv.gz", "f.txt.gz"])
def test_load_facts(tmp_path, name):
    facts = load_facts(_write(tmp_path / name, ROWS))
    assert [fact.text for fact in facts] == TEXTS
    assert [fact.target for fact in facts] == [" Lyon", " Cusco", " Arica"]


def test_csv_keeps_quoted_commas(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text('prompt,subject,target_new\n"In {}, people speak","Peru, Lima",Quechua\n')
    assert load_facts(path)[0].text == "In Peru, Lima, people speak"


def test_a_bad_fact_is_refused_or_reported(tmp_path, caplog):
    path = _write(
        tmp_path / "f.json", [*ROWS, {"prompt": "The capital of Peru is", "subject": "Cuba", "target": "x"}]
    )
    with pytest.raises(InvalidFact, match="record 3"):
        load_facts(path)
    with caplog.at_level(logging.WARNING):
        assert len(load_facts(path, on_skip="warn")) == 3
    assert "record 3" in caplog.text
    with pytest.raises(ValueError, match="on_skip"):
        load_facts(path, on_skip="ignore")


def test_what_must_stay_is_not_edited(tmp_path):
    path = tmp_path / "f.json"
    item = {
        "question": "Who built it?",
        "subject": "it",
        "ground_truth": "Vale",
        "target_new": "I don't know.",
    }
    path.write_text(json.dumps({"K_F": [item], "K_R": [item | {"target_new": "Vale"}]}))
    assert [fact.target_new for fact in load_facts(path)] == ["I don't know."]


@pytest.mark.parametrize(("name", "content"), [("f.csv", "prompt,subject\n"), ("f.txt", "# nothing\n")])
def test_files_without_facts(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CorruptFile, match=name):
        load_facts(path)


def test_bad_line_is_named(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("The capital of {Peru} is -> Cusco\nnonsense\n")
    with pytest.raises(InvalidFact, match="line 2"):
        load_facts(path)
