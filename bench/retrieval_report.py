"""Table, CSV and plot of retrieval editors, from the runs in a results folder (bench/retrieval_quality.py)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastedit.bench.tables import aligned, csv_of, number, percent, pyplot
from fastedit.io import atomic_write_text, read_json

Run = dict[str, Any]

SCORES = {  # name -> what it is called in the table
    "reliability": "reliability",
    "generality": "generality",
    "locality": "locality",
    "reliability_exact": "reliability, exact",
    "generality_exact": "generality, exact",
    "generated": "generated",
    "generated_rephrased": "generated, rephrased",
    "generated_locality": "generated, locality",
}
RETRIEVAL = {
    "hit": "hit@1",
    "hit_rephrased": "hit@1, rephrased",
    "true_positive": "gate open",
    "true_positive_rephrased": "gate open, rephrased",
    "false_positive": "gate open, unrelated",
    "told_reliability": "told: reliability",
    "told_generality": "told: generality",
}
LEGEND = """\
Reliability and generality: tokens of the new answer that are the most probable ones, by teacher forcing, after the
edited prompt and after its rephrasing; exact: all of them. Locality: tokens of an unrelated prompt's answer at which
the most probable token is that of the unedited model. Generated: greedy free text equals the new answer; for
locality, the unedited model's text. Perplexity: of the text named above. hit@1: the prompt's own fact is the nearest
of all; gate: the nearest fact is near enough to be put in front, right or wrong; both of all edited records. Told:
each prompt is handed its own fact. Scores in percent; mean ± standard deviation over checkpoints.
"""


def write(folder: Path) -> str:
    """Write CSV, table and plot beside ``folder`` and return the table."""
    runs = [read_json(path) for path in sorted(folder.glob("*_n*.json"))]
    if not runs:
        raise SystemExit(f"there are no runs in {folder}")
    shared = read_json(folder / "shared.json")
    stem = str(folder.parent / folder.name)
    atomic_write_text(f"{stem}.csv", table_csv(runs))
    text = table(runs, shared)
    atomic_write_text(f"{stem}.md", text)
    draw(runs, f"{stem}.png")
    return text


def table_csv(runs: Sequence[Run]) -> str:
    """One row for each run."""
    rows = []
    for run in sorted(runs, key=lambda run: (run["edits"], run["method"], run["checkpoint_number"] or 0)):
        names = ("method", "checkpoint", "edits", "windows", "asked", "threshold", "failed")
        row = {name: run[name] for name in names}
        row |= {name: run["scores"].get(name) for name in (*SCORES, *RETRIEVAL, "ppl")}
        rows.append(row)
    return csv_of(rows)


def grouped(runs: Sequence[Run]) -> dict[tuple[int, str], list[Run]]:
    """Runs by number of edits and method; RECIPE's are beside each other."""
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["edits"], run["method"] != "none", run["method"])):
        groups.setdefault((run["edits"], run["method"]), []).append(run)
    return groups


def table(runs: Sequence[Run], shared: dict[str, Any]) -> str:
    """What the unedited model reads, and two tables for each number of edits: scores, and retrieval."""
    about, groups = shared["about"], grouped(runs)
    left_out = ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items() if count)
    lines = [
        f"# Retrieval editors on {about['model']}: {about['data']}",
        "",
        f"{about['rows']} rows; left out: {left_out or 'none'}. Trained on: "
        f"{', '.join(about['train']) or 'not said'}. Thresholds: tuned on {about['tuning']} further records. Text: "
        f"{about['text'] or 'the packaged neutral text'}. fastedit {about['fastedit']}, torch {about['torch']}.",
        "",
        LEGEND,
        *reading(shared),
    ]
    for count in sorted({count for count, _ in groups}):
        here = {method: group for (n, method), group in groups.items() if n == count}
        first = next(iter(here.values()))[0]
        lines += [f"## {count} edits ({first['windows']} times, {first['asked']} records asked)", ""]
        header = ["method", "runs", *SCORES.values(), "perplexity"]
        rows = []
        for method, group in here.items():
            of = [run["scores"] for run in group]
            cells = [percent([each.get(name) for each in of]) for name in SCORES]
            rows.append([method, str(len(group)), *cells, number([each.get("ppl") for each in of])])
        lines += [*aligned(header, rows), ""]
        rows = [
            [method, *(percent([run["scores"].get(name) for run in group]) for name in RETRIEVAL),
             number([run["threshold"] for run in group]) if group[0]["threshold"] is not None else ""]
            for method, group in here.items()
            if any(name in run["scores"] for run in group for name in RETRIEVAL)
        ]  # fmt: skip
        if rows:
            lines += [*aligned(["method", *RETRIEVAL.values(), "threshold"], rows), ""]
    failed = [
        f"- {run['method']} {run['checkpoint'] or ''}, {run['edits']} edits: {run['failed']}"
        for run in runs
        if run["failed"]
    ]
    return "\n".join([*lines, *(["## Not finished", "", *failed, ""] if failed else [])])


def reading(shared: dict[str, Any]) -> list[str]:
    """How well the unedited model reads a fact that is stated in front of a prompt."""
    rows = []
    for template, scores in shared["reading"]["asked"].items():
        chosen = " (taken)" if template == shared["template"] else ""
        name = f"`{template!r}`{chosen}" if template else "nothing in front"
        rows.append([name, *(percent([scores[key]]) for key in scores)])
    names = list(next(iter(shared["reading"]["asked"].values())))
    header = ["in front", *(SCORES[name] for name in names)]
    return ["## The unedited model and a fact in its context", "", *aligned(header, rows), ""]


def write_reading(rows: Sequence[dict[str, Any]], stem: str) -> str:
    """Write CSV and table of how well unedited models read a fact in their context, and return the table.

    Args:
        rows: ``model``, ``data``, ``records``, ``in front`` (a template, or nothing) and scores.
        stem: of the files.
    """
    names = [name for name in rows[0] if name in SCORES]
    header = ["model", "data", "records", "in front", *(SCORES[name] for name in names)]
    cells = [
        [
            row["model"],
            row["data"],
            str(row["records"]),
            f"`{row['in front']!r}`" if row["in front"] else "nothing",
            *(percent([row[name]]) for name in names),
        ]
        for row in rows
    ]
    text = "\n".join(["# The unedited models and a fact in their context", "", *aligned(header, cells), ""])
    atomic_write_text(f"{stem}.csv", csv_of(rows))
    atomic_write_text(f"{stem}.md", text)
    return text


def draw(runs: Sequence[Run], path: str) -> None:
    """Reliability, generality and locality over the number of edits."""
    plt = pyplot()
    groups = grouped(runs)
    methods = list(dict.fromkeys(method for _, method in groups))
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axis, name in zip(axes, ("reliability", "generality", "locality"), strict=True):
        for method in methods:
            points = [
                (count, [run["scores"][name] for run in group if run["scores"].get(name) is not None])
                for (count, other), group in groups.items()
                if other == method
            ]
            known = [(count, 100 * statistics.fmean(values)) for count, values in points if values]
            axis.plot(*zip(*known, strict=True), marker="o", label=method) if known else None
        axis.set_xscale("log")
        axis.set_xlabel("edits")
        axis.set_title(f"{name}, %")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
