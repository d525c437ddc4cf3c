"""Table, CSV and plots of long sequences of edits, from the runs in a results folder (bench/sequential.py)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastedit.bench.tables import aligned, csv_of, number, percent, pyplot
from fastedit.io import atomic_write_text, read_json

Run = dict[str, Any]

# column -> what it is called in the table
SCORES = {
    "efficacy": "efficacy",
    "efficacy_token": "by token",
    "paraphrase": "paraphrase",
    "paraphrase_token": "by token",
    "locality": "locality",
    "locality_right": "still right",
    "ES": "ES",
    "PS": "PS",
    "NS": "NS",
    "generated": "generated",
    "generated_paraphrase": "generated, paraphrase",
    "generated_locality": "generated, locality",
}
WAY_SCORES = ("efficacy", "paraphrase", "locality")
HEALTH = {"ppl": "perplexity", "kl": "KL", "weight_norm": "‖W‖ / ‖W₀‖", "change_norm": "‖W − W₀‖ / ‖W₀‖"}
UNEDITED_TEXT = "the records' true sentences about neighbours, which are never edited"
LEGEND = """\
Efficacy and paraphrase: the new answer by teacher forcing, exact and by token. Locality: argmaxes at the neighbour's
answer that are those of the unedited model; "still right": the true answer, by token. ES, PS, NS: the wanted answer
is the more probable one (rewrite, paraphrase, neighbour). Generated: greedy free text equals the new answer; for
locality, the unedited model's text. Perplexity and KL (nats, unedited to edited) are those of the text named above.
Norms: Frobenius, all edited matrices together. Collapsed: runs in which the method broke, and after how many edits;
they are scored as they were left. Set aside: facts that the method itself refused. Seconds per edit: NSE's targets,
all made ahead on the unedited model, are not counted. Scores in percent; mean ± standard deviation over orders.
"""


def write(folder: Path) -> str:
    """Write CSV, table and plots beside ``folder`` and return the table."""
    runs = [read_json(path) for path in sorted(folder.glob("*_order*.json"))]
    if not runs:
        raise SystemExit(f"there are no runs in {folder}")
    shared = read_json(folder / "shared.json")
    stem = str(folder.parent / folder.name)
    atomic_write_text(f"{stem}.csv", table_csv(runs))
    text = table(runs, shared)
    atomic_write_text(f"{stem}.md", text)
    draw(runs, shared, stem)
    return text


def table_csv(runs: Sequence[Run]) -> str:
    """One row for each run: its last scores."""
    rows = []
    for run in runs:
        last = run["points"][-1]
        row = {name: run[name] for name in ("label", "method", "norm_control", "order", "set_aside")}
        row |= {"collapsed_after": (run["collapsed"] or {}).get("edits")}
        row |= {
            f"{subset}.{name}": last[subset].get(name) for subset in ("all", "optimisable") for name in SCORES
        }
        row |= {name: last[name] for name in HEALTH}
        row |= {f"seconds.{name}": value for name, value in run["seconds"].items()}
        rows.append(row)
    return csv_of(rows)


def table(runs: Sequence[Run], shared: dict[str, Any]) -> str:
    """Three tables: scores of all records, of the optimisable ones, and the model's health."""
    about, unedited = shared["about"], shared["unedited"]
    groups = grouped(runs)
    lines = [
        f"# {about['records']} sequential edits of {about['model']}, batches of {about['batch_size']}",
        "",
        f"Records: {about['data']}. Text: {about['text'] or UNEDITED_TEXT}. fastedit {about['fastedit']}, torch "
        f"{about['torch']}.",
        "",
        LEGEND,
    ]
    for subset, title in (
        ("all", f"All {unedited['all']['records']} records"),
        ("optimisable", f"The {unedited['optimisable']['records']} optimisable records"),
    ):
        rows = [["unedited", "", *(percent([unedited[subset].get(name)]) for name in SCORES)]]
        for label, group in groups.items():
            last = [run["points"][-1][subset] for run in group]
            rows.append(
                [label, str(len(group)), *(percent([each.get(name) for each in last]) for name in SCORES)]
            )
        lines += [f"## {title}", "", *aligned(["method", "orders", *SCORES.values()], rows), ""]
    lines += on_the_way(groups)
    rows = [["unedited", number([unedited["ppl"]]), number([unedited["kl"]]), "1", "0", "", "", ""]]
    for label, group in groups.items():
        last = [run["points"][-1] for run in group]
        edits = [run["collapsed"]["edits"] for run in group if run["collapsed"]]
        collapsed = f"{len(edits)} of {len(group)}" + (
            f" (after {', '.join(map(str, edits))})" if edits else ""
        )
        per_edit = [run["seconds"]["editing"] / max(edited(run), 1) for run in group]
        rows.append(
            [
                label,
                *(number([each[name] for each in last]) for name in HEALTH),
                collapsed,
                number([run["set_aside"] for run in group]),
                number(per_edit),
            ]
        )
    header = ["method", *HEALTH.values(), "collapsed", "set aside", "seconds per edit"]
    lines += ["## Health and time", "", *aligned(header, rows), ""]
    lines += notes(groups)
    return "\n".join(lines)


def on_the_way(groups: dict[str, list[Run]]) -> list[str]:
    """Efficacy, paraphrase and locality of all facts edited so far, at each checkpoint."""
    marks = sorted({point["edits"] for group in groups.values() for run in group for point in run["points"]})
    rows = []
    for label, group in groups.items():
        points = [{point["edits"]: point["all"] for point in run["points"]} for run in group]
        cells = []
        for mark in marks:
            here = [each[mark] for each in points if mark in each]
            cells.append(" / ".join(mean_of(here, name) for name in WAY_SCORES if here))
        rows.append([label, *cells])
    header = ["method", *(f"after {mark}" for mark in marks)]
    title = "## On the way: efficacy / paraphrase / locality of the facts edited so far, exact, percent"
    return [title, "", *aligned(header, rows), ""]


def mean_of(points: list[dict[str, Any]], name: str) -> str:
    """Mean of a score in percent; a dash if the records have nothing that it could be asked of."""
    values = [point[name] for point in points if point.get(name) is not None]
    return f"{100 * statistics.fmean(values):.0f}" if values else "–"


def notes(groups: dict[str, list[Run]]) -> list[str]:
    """Settings of each method, and which methods have no norm control."""
    lines = []
    if any(group[0]["norm_control"] for group in groups.values()):
        controlled = {
            group[0]["label"].removesuffix("+norm") for group in groups.values() if group[0]["norm_control"]
        }
        without = [label for label in groups if label not in controlled and not label.endswith("+norm")]
        if without:
            lines.append(
                f"No norm control for {', '.join(without)}: there is no target whose norm could be anchored."
            )
            lines.append("")
    lines += ["Settings:", ""]
    for label, group in groups.items():
        source = "given" if group[0]["given"] else "the method's own for this shape"
        shown = ", ".join(
            f"{name} {value}" for name, value in group[0]["params"].items() if value is not None
        )
        lines.append(f"- {label} ({source}): {shown}")
    return [*lines, ""]


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, in the order of the labels."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["label"], run["order"])):
        groups.setdefault(run["label"], []).append(run)
    return groups


def edited(run: Run) -> int:
    """Facts that were edited before the method broke, if it did."""
    return run["collapsed"]["edits"] if run["collapsed"] else run["points"][-1]["edits"]


def draw(runs: Sequence[Run], shared: dict[str, Any], stem: str) -> None:
    """``_retention.png``: efficacy over the number of edits; ``_scatter.png``: efficacy against locality."""
    plt = pyplot()
    groups = grouped(runs)
    names = list(dict.fromkeys(label.removesuffix("+norm") for label in groups))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for kind, panel in (("retention", _retention), ("scatter", _scatter)):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
        for axis, subset, title in zip(
            axes, ("all", "optimisable"), ("all records", "optimisable records"), strict=True
        ):
            for label, group in groups.items():
                panel(axis, label, group, subset, colours[label.removesuffix("+norm")])
            axis.set_title(f"{title} ({shared['unedited'][subset]['records']})", fontsize=9)
            axis.set_ylim(-3, 103)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("efficacy, % exact", fontsize=8)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
        figure.savefig(f"{stem}_{kind}.png", dpi=150)
        plt.close(figure)


def _retention(axis: Any, label: str, group: list[Run], subset: str, colour: str) -> None:
    """Mean over orders of all facts edited so far, and the range of the orders."""
    edits = [point["edits"] for point in group[0]["points"]]
    series = [
        [100 * value for run in group if (value := run["points"][k][subset].get("efficacy")) is not None]
        for k in range(len(edits))
    ]
    shown = [(n, values) for n, values in zip(edits, series, strict=True) if values]
    if not shown:
        return
    x = [n for n, _ in shown]
    style = "--" if label.endswith("+norm") else "-"
    axis.plot(x, [statistics.fmean(v) for _, v in shown], style, color=colour, marker="o", ms=3, label=label)
    axis.fill_between(x, [min(v) for _, v in shown], [max(v) for _, v in shown], color=colour, alpha=0.15)
    axis.set_xscale("log")
    axis.set_xlabel("edits", fontsize=8)


def _scatter(axis: Any, label: str, group: list[Run], subset: str, colour: str) -> None:
    """One point for each order."""
    last = [run["points"][-1][subset] for run in group]
    last = [each for each in last if "efficacy" in each and "locality" in each]
    axis.scatter(
        [100 * each["locality"] for each in last],
        [100 * each["efficacy"] for each in last],
        color=colour,
        marker="x" if label.endswith("+norm") else "o",
        label=label,
    )
    axis.set_xlim(-3, 103)
    axis.set_xlabel("locality, % of argmaxes unchanged", fontsize=8)
