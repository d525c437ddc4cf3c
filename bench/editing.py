"""Edits per second, end to end and by stage: fastedit against the way the published code works.

    python bench/editing.py                              GPT-2-small shape with random weights, and the demo model
    python bench/editing.py --models demo --methods memit nse --batch-sizes 10
    python bench/editing.py --facts 100 --official-facts 20

Both sides get the same model, facts, contexts, statistics and hyper-parameters, in float32. The change of the weights
by the first batch is compared before anything is timed. Contexts are sampled as published: five of ten tokens, for
ROME ten of five tokens and ten of ten. The published way takes its facts one by one and solves once a batch, so it is
timed on fewer facts (--official-facts) in one batch, and its time for all of them follows.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastedit
from fastedit import Fact
from fastedit.bench import common
from fastedit.bench.baselines.locate_then_edit import Published
from fastedit.bench.baselines.ultraedit import PublishedUltraEdit
from fastedit.demo import load_demo_facts, load_demo_model
from fastedit.editors.templates import sample_contexts
from fastedit.models import describe
from fastedit.models.runner import BlockRunner

METHODS = ("memit", "alphaedit", "nse", "rome", "ultraedit")
MODELS = ("gpt2-small-shape", "demo")
LENGTHS = {"rome": ((5, 10), (10, 10))}  # of contexts, in tokens, and how many of each
LAYERS = {"gpt2-small-shape": (3, 4, 5, 6, 7), "demo": (0, 1, 2)}
COLUMNS = (
    "model", "method", "batch", "earlier_edits", "facts_per_s", "official_facts_per_s", "speedup", "difference",
    "targets_s", "keys_s", "solve_s", "apply_s", "official_targets_s", "official_keys_s", "official_solve_s",
    "official_apply_s", "solve_speedup", "route", "state_mb", "official_state_mb",
)  # fmt: skip


def load(name: str) -> tuple[Any, Any]:
    """A model in float32 and a tokenizer."""
    demo, tokenizer = load_demo_model()
    if name == "demo":
        return demo, tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0)  # 12 blocks, 768 wide, 50,257 words
    return GPT2LMHeadModel(config).eval(), tokenizer


@cache
def contexts(lengths: tuple[tuple[int, int], ...] = ((10, 5),)) -> tuple[str, ...]:
    """The bare prompt and texts sampled from the demo model: pairs of a length in tokens and a number of texts."""
    model, tokenizer = load_demo_model()
    return tuple(sample_contexts(BlockRunner(model), tokenizer, lengths, seed=0, keep_specials=False))


def counterfacts(count: int) -> list[Fact]:
    """Facts of the demo model, each with another answer of its relation as the new one."""
    facts = load_demo_facts()
    rows = [facts[(17 * i) % len(facts)] for i in range(len(facts))]
    chosen = [row for row in rows if row["neighbours"]][:count]
    return [Fact(row["prompt"], row["subject"], row["neighbours"][0]["target"]) for row in chosen]


def statistics(model: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Second moments of random, ill-conditioned keys of the size that the layers see."""
    found = {}
    for layer in layers:
        d = describe(model).projection(layer).d_in
        generator = torch.Generator().manual_seed(layer)
        spread = torch.logspace(0, -2, d)
        sample = torch.randn(3 * d, d, generator=generator) * spread
        found[layer] = sample.T @ sample / (3 * d)
    return found


def contexts_of(method: str) -> tuple[str, ...]:
    """Those that the method's authors sample."""
    return contexts(LENGTHS.get(method, ((10, 5),)))


def settings(model: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyper-parameters by our names and by the published ones."""
    layers = list(LAYERS[model])
    if method == "ultraedit":
        path = describe(load(model)[0]).output_path
        return {"modules": {path: layers}, "lr": 1e-6}, {"layers": layers, "lr": 1e-6}
    layers = layers[:1] if method == "rome" else layers
    ours: dict[str, Any] = {
        "layers": tuple(layers),
        "steps": 20,
        "lr": 0.1,
        "clamp": 0.75,
        "weight_decay": 0.5,
    }
    theirs: dict[str, Any] = {
        "layers": layers, "v_num_grad_steps": 20, "v_lr": 0.1, "clamp_norm_factor": 0.75, "v_weight_decay": 0.5,
        "kl_factor": 0.0625,
    }  # fmt: skip
    if method in ("memit", "nse"):
        ours["covariance_weight"] = theirs["mom2_update_weight"] = 100.0
    if method == "alphaedit":
        ours |= {"null_threshold": 1e-2, "ridge": 1.0}
        theirs |= {"nullspace_threshold": 1e-2, "L2": 1.0}
    if method == "nse":
        ours |= {"tolerance": 0.0, "upper_bound": 1e9, "max_sweeps": 3, "mass": 0.8}
        theirs |= {"alpha": 0.0, "upper_bound": 1e9, "max_iterations": 3, "neuron_threshold": 0.8}
    return ours, theirs


class Ours:
    """fastedit's editor, with keys of earlier edits put beneath it."""

    def __init__(self, name: str, method: str, model: Any, tokenizer: Any, moments: Any, past: dict) -> None:
        options = {} if method == "ultraedit" else {"statistics": moments, "contexts": contexts_of(method)}
        self.editor = fastedit.editor(
            method, copy.deepcopy(model), tokenizer, params=settings(name, method)[0], profile="official",
            progress=False, **options,
        )  # fmt: skip
        if method != "ultraedit":
            self.editor.prepare()
        if past and self.editor.remembers:
            self.editor.history.add("", past)
        self.seconds: dict[str, float] = {}

    def edit(self, facts: Sequence[Fact]) -> None:
        edit = self.editor.edit(facts)
        for stage, seconds in edit.measured["seconds"].items():
            stage = "targets" if stage == "gradients" else stage
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def weight(self, layer: int) -> Tensor:
        projection = self.editor.description.projection(layer)
        return projection.weight.data.T if projection.transposed else projection.weight.data

    @property
    def state_bytes(self) -> int:
        history = getattr(self.editor, "history", None)
        return 0 if history is None else sum(history.bytes_per_layer.values())


class Official:
    """The published way; what it computes once for a run is computed before it is timed."""

    def __init__(self, name: str, method: str, model: Any, tokenizer: Any, moments: Any, past: dict) -> None:
        self.method = method
        self.published: Any
        if method == "ultraedit":
            self.published = PublishedUltraEdit(
                copy.deepcopy(model), copy.deepcopy(tokenizer), **settings(name, method)[1]
            )
            return
        self.published = Published(
            copy.deepcopy(model),
            copy.deepcopy(tokenizer),
            settings(name, method)[1],
            contexts_of(method),
            moments,
        )
        for layer, keys in past.items():
            self.published.cache[layer] = keys @ keys.T
        if method == "alphaedit":
            self.published.project()
        if method == "rome":
            self.published.inverse(self.published.layers[0])

    def edit(self, facts: Sequence[Fact]) -> None:
        if self.method == "ultraedit":
            self.published.edit(facts)
        elif self.method == "nse":  # no earlier edit has changed the weights the first time
            self.published.nse(facts, self.published.targets_of(facts))
        else:
            getattr(self.published, self.method)(facts)

    def weight(self, layer: int) -> Tensor:
        return self.published.weight(layer)

    @property
    def seconds(self) -> dict[str, float]:
        return self.published.seconds

    @property
    def state_bytes(self) -> int:
        kept = {**self.published.cache} if self.method in ("alphaedit", "nse") else {}
        projectors = self.published.projectors if self.method == "alphaedit" else {}
        return sum(t.nbytes for t in (*kept.values(), *projectors.values()))


def difference(first: Any, second: Any, before: dict[int, Tensor]) -> float:
    """Largest relative difference between two changes of a weight."""
    worst = 0.0
    for layer, weight in before.items():
        ours, theirs = first.weight(layer) - weight, second.weight(layer) - weight
        worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
    return worst


def timed(side: Any, batches: Sequence[Sequence[Fact]]) -> float:
    """Seconds that the batches take."""
    side.seconds.clear()
    start = time.perf_counter()
    for batch in batches:
        side.edit(batch)
    return time.perf_counter() - start


def measure(name: str, method: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size."""
    model, tokenizer = load(name)
    layers = settings(name, method)[1]["layers"]
    moments = {} if method == "ultraedit" else statistics(model, layers)
    generator = torch.Generator().manual_seed(9)
    past = {
        layer: torch.randn(len(moments[layer]), options.earlier, generator=generator)
        * moments[layer].diagonal().sqrt()[:, None]
        for layer in layers
        if options.earlier and method in ("alphaedit", "nse")
    }
    given = (name, method, model, tokenizer, moments, past)
    facts = counterfacts(options.facts)
    few = facts[: options.official_facts]
    ours, official = Ours(*given), Official(*given)
    before = {layer: ours.weight(layer).clone() for layer in layers}
    ours.edit(few)
    taken_officially = timed(official, [few])
    found = difference(ours, official, before)
    if not found < 2e-2:
        raise SystemExit(
            f"{name} {method}: the changes of the weights differ by {found:.2g}: nothing was timed"
        )
    for batch in [1] if method == "rome" else options.batch_sizes:
        ours = Ours(*given)
        ours.edit(facts[-2:])  # pages, threads, earlier keys appended to the factors
        batches = [facts[i : i + batch] for i in range(0, len(facts), batch)]
        taken = timed(ours, batches)
        solve, theirs = ours.seconds.get("solve", 0.0), official.seconds
        once = 0.0 if method == "rome" else theirs.get("solve", 0.0) + theirs.get("state", 0.0)  # in a batch
        each = (taken_officially - once) / len(few) + once * len(batches) / len(facts)
        row: dict[str, Any] = {
            "model": name, "method": method, "batch": batch, "earlier_edits": options.earlier if past else 0,
            "facts_per_s": len(facts) / taken, "official_facts_per_s": 1 / each,
            "speedup": each * len(facts) / taken, "difference": found,
            "state_mb": ours.state_bytes / 2**20, "official_state_mb": official.state_bytes / 2**20,
            "route": " ".join(sorted(set(getattr(ours.editor, "routes", {}).values()))),
        }  # fmt: skip
        for stage in ("targets", "keys", "solve", "apply"):
            row[f"{stage}_s"] = ours.seconds.get(stage, 0.0) / len(facts)
            row[f"official_{stage}_s"] = theirs.get(stage, 0.0) / len(few)
        row["official_solve_s"] = (once or theirs.get("solve", 0.0)) * len(batches) / len(facts)
        row["solve_speedup"] = row["official_solve_s"] / max(solve / len(facts), 1e-9)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--facts", type=int, default=100, help="facts that fastedit edits")
    parser.add_argument("--official-facts", type=int, default=20, help="facts that the published way edits")
    parser.add_argument(
        "--earlier", type=int, default=1000, help="edits that lie beneath already (AlphaEdit, NSE)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for method in options.methods:
            print(f"{name} {method}", file=sys.stderr)
            for row in measure(name, method, options):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    shown = (*COLUMNS[:8], "targets_s", "official_targets_s", "solve_speedup")
    common.report("editing", rows, COLUMNS, shown, options)


if __name__ == "__main__":
    main()
