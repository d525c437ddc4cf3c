"""Edits per second of memory editors: fastedit's WISE against the way the published code works.

    python bench/memory_editing.py                       GPT-2-small shape with random weights, and the demo model
    python bench/memory_editing.py --models demo --facts 4 --official-facts 2

Both sides get the same model, facts, contexts, masks and hyper-parameters, in float32, and take the same number of
steps. Losses and weights of the first steps are compared before anything is timed. The clean profile, which is the
default, is timed beside the official one: it leaves padding out. Memory of the mask and time of a merge are compared
for the weight's own shape.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastedit
from fastedit import Fact
from fastedit.bench import common
from fastedit.bench.baselines.wise import PublishedWise, ties_by_sort
from fastedit.bench.editing import CONTEXTS, counterfacts, load
from fastedit.ops import PhiloxMask, ties_merge

LAYERS = {"gpt2-small-shape": 10, "demo": 4}
MODELS = tuple(LAYERS)
SETTINGS = {"lr": 0.1, "alpha": 2.0, "beta": 8.0, "gamma": 4.0, "mask_ratio": 0.2}
CHECKED_STEPS = 3
COLUMNS = (
    "model", "weight", "steps", "edits_per_s", "clean_edits_per_s", "official_edits_per_s", "speedup",
    "clean_speedup", "difference", "prefix_s", "training_s", "official_forward_s", "official_backward_s",
    "official_update_s", "mask_bytes", "official_mask_bytes", "merge_ms", "official_merge_ms", "merge_speedup",
)  # fmt: skip


def facts_of(count: int) -> list[Fact]:
    """Facts with another fact's prompt and answer as the text to leave alone."""
    found = counterfacts(count + 1)
    texts = [fact.text + fact.target for fact in found[1:]]
    return [replace(fact, locality=text) for fact, text in zip(found[:-1], texts, strict=True)]


def ours(name: str, model: Any, tokenizer: Any, steps: int, profile: str) -> Any:
    params = {**SETTINGS, "layers": [LAYERS[name]], "steps": steps}
    return fastedit.editor(
        "wise", model, tokenizer, params=params, contexts=CONTEXTS, profile=profile, progress=False
    )


def published(name: str, model: Any, tokenizer: Any, steps: int, mask: torch.Tensor) -> PublishedWise:
    weight = fastedit.models.describe(model).projection(LAYERS[name]).weight_name
    hparams = {
        "inner_params": [weight], "edit_lr": SETTINGS["lr"], "n_iter": steps, "alpha": SETTINGS["alpha"],
        "beta": SETTINGS["beta"], "gamma": SETTINGS["gamma"], "save_freq": 500, "merge_freq": 1000,
        "norm_constraint": 1.0, "weights": 1.0, "densities": 0.53,
    }  # fmt: skip
    return PublishedWise(model, tokenizer, hparams, CONTEXTS, [mask])


def edit_as_published(side: PublishedWise, facts: list[Fact]) -> None:
    for fact in facts:
        assert fact.locality is not None
        side.edit(fact.text, fact.target, fact.locality)


def difference(name: str, model: Any, tokenizer: Any, mask: torch.Tensor, fact: Fact) -> float:
    """Relative difference of losses and of the side memory's change after a few steps of one edit."""
    mine, theirs = (
        ours(name, model, tokenizer, CHECKED_STEPS, "official"),
        published(name, model, tokenizer, CHECKED_STEPS, mask),
    )
    mine.edit([fact])
    found = mine.state.side.weight - mine.state.base
    losses = mine.losses[0]
    mine.reset()
    edit_as_published(theirs, [fact])
    wanted = theirs.side - theirs.original
    return max(_relative(losses, theirs.losses[0]), _relative(found, wanted))


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def median_ms(run: Callable[[], Any], repetitions: int = 5) -> float:
    taken = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(name)
    facts, steps = facts_of(options.facts), options.steps
    projection = fastedit.models.describe(model).projection(LAYERS[name])
    shape = projection.d_out, projection.d_in
    mask = PhiloxMask(0, 0, LAYERS[name], SETTINGS["mask_ratio"]).dense(shape)
    found = difference(name, model, tokenizer, mask, facts[0])
    if not found < 1e-3:
        raise SystemExit(f"{name}: the first steps differ by {found:.2g}: nothing was timed")
    row: dict[str, Any] = {
        "model": name,
        "weight": f"{shape[0]}x{shape[1]}",
        "steps": steps,
        "difference": found,
    }
    for profile, column in (("official", "edits_per_s"), ("clean", "clean_edits_per_s")):
        editor = ours(name, model, tokenizer, steps, profile)
        start = time.perf_counter()
        edit = editor.edit(facts)
        row[column] = len(facts) / (time.perf_counter() - start)
        assert set(edit.measured["steps"]) == {steps}
        if profile == "official":
            for stage in ("prefix", "training"):
                row[f"{stage}_s"] = edit.measured["training"][stage] / len(facts)
        editor.reset()
    theirs, few = published(name, model, tokenizer, steps, mask), facts[: options.official_facts]
    start = time.perf_counter()
    edit_as_published(theirs, few)
    row["official_edits_per_s"] = len(few) / (time.perf_counter() - start)
    for stage in ("forward", "backward", "update"):
        row[f"official_{stage}_s"] = theirs.seconds[stage] / len(few)
    row["speedup"] = row["edits_per_s"] / row["official_edits_per_s"]
    row["clean_speedup"] = row["clean_edits_per_s"] / row["official_edits_per_s"]
    row["mask_bytes"], row["official_mask_bytes"] = 0, theirs.mask.nbytes
    return row | merging(theirs.original, theirs.side)


def merging(base: torch.Tensor, side: torch.Tensor) -> dict[str, float]:
    """Two side memories by TIES, ours and by sorting; entries tied at a threshold may differ."""
    generator = torch.Generator().manual_seed(1)
    sides = [side, side + 1e-3 * torch.randn(base.shape, generator=generator)]
    merged = ties_merge(sides, [0.5, 0.5], 0.53, base)
    sorted_out = ties_by_sort(base, sides, [0.5, 0.5], 0.53)
    if not _relative(merged - base, sorted_out - base) < 2e-2:
        raise SystemExit("the merged memories differ: nothing was timed")
    mine = median_ms(lambda: ties_merge(sides, [0.5, 0.5], 0.53, base))
    theirs = median_ms(lambda: ties_by_sort(base, sides, [0.5, 0.5], 0.53))
    return {"merge_ms": mine, "official_merge_ms": theirs, "merge_speedup": theirs / mine}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--facts", type=int, default=10, help="facts that fastedit edits")
    parser.add_argument("--official-facts", type=int, default=3, help="facts that the published way edits")
    parser.add_argument("--steps", type=int, default=30, help="steps for each fact")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        print(name, file=sys.stderr)
        rows.append(measure(name, options))
        print(json.dumps(rows[-1]), file=sys.stderr)
    about = common.machine("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "memory_editing_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: common.text(value) for key, value in {**row, **about}.items()})
    if options.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=1))
        return
    shown = (*COLUMNS[:11], "merge_speedup")
    lines = [shown, *(tuple(common.text(row[c]) for c in shown) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines))


if __name__ == "__main__":
    main()
