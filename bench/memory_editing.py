"""Edits per second of memory editors: fastedit's against the way the published code works.

    python bench/memory_editing.py                       GPT-2-small shape with random weights, and the demo model
    python bench/memory_editing.py --methods grace --models demo --facts 4 --official-facts 2

Both sides get the same model, facts and hyper-parameters (WISE: contexts and masks too), in float32, and take the
same number of steps. What the first steps of one edit leave behind is compared before anything is timed. The
published way's cost per fact does not depend on how many there are, so it edits fewer. The clean profile, which is
the default, is timed beside the official one. WISE: it leaves padding out; rows are the published eleven, with
prefixes of five and of ten tokens; the memory of the mask and the time of a merge are compared for the weight's own
shape. GRACE: the facts come as one batch, and some once more as calls of one fact each. T-Patcher: no step is left
out, and both sides are given the same 40,000 queries to leave alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch

import fastedit
from fastedit import Fact
from fastedit.bench import common
from fastedit.bench.baselines.grace import PublishedGrace
from fastedit.bench.baselines.t_patcher import PlainTPatcher
from fastedit.bench.baselines.wise import PublishedWise, ties_by_sort
from fastedit.bench.editing import MODELS, counterfacts, load
from fastedit.demo import load_demo_model
from fastedit.editors.t_patcher import text_queries
from fastedit.editors.wise import sample_prefixes
from fastedit.memory import clear_memories
from fastedit.models import describe
from fastedit.models.fingerprint import fingerprint
from fastedit.models.runner import BlockRunner
from fastedit.ops import PhiloxMask, ties_merge
from fastedit.stats.cache import neutral_texts

CHECKED_STEPS = 3
REMEMBERED, SAMPLED = 40_000, 1000  # queries that T-Patcher leaves alone, and how many of them text gives
COLUMNS = (
    "model", "method", "weight", "steps", "facts", "official_facts", "edits_per_s", "clean_edits_per_s",
    "single_edits_per_s", "official_edits_per_s", "speedup", "clean_speedup", "difference", "prefix_s", "training_s",
    "official_forward_s", "official_backward_s", "official_update_s", "mask_bytes", "official_mask_bytes", "merge_ms",
    "official_merge_ms", "merge_speedup",
)  # fmt: skip


@cache
def prefixes() -> list[str]:
    """WISE's templates of edit rows, sampled from the demo model: the bare prompt, and ten as published."""
    model, tokenizer = load_demo_model()
    return sample_prefixes(BlockRunner(model), tokenizer, seed=0)


class Method(ABC):
    """What is special to a method: its settings, both sides, and what they must agree on.

    Args:
        name: of the model.
        device: ``"cpu"`` or ``"cuda"``.
    """

    name: ClassVar[str]
    layers: ClassVar[dict[str, int]]  # by model
    facts: ClassVar[int]  # how many fastedit edits, how many the published way, and steps for each,
    official_facts: ClassVar[int]  # where the command line does not say
    steps: ClassVar[int]

    def __init__(self, name: str, device: str) -> None:
        model, self.tokenizer = load(name)
        self.model, self.device, self.layer = model.to(device), device, self.layers[name]
        self.projection = describe(self.model).projection(self.layer)

    def facts_of(self, count: int) -> list[Fact]:
        """The facts to edit."""
        return counterfacts(count)

    @abstractmethod
    def ours(self, steps: int, profile: str) -> Any:
        """Our editor."""

    @abstractmethod
    def published(self, steps: int) -> Any:
        """The published way, on the same model."""

    def edit_as_published(self, side: Any, facts: list[Fact]) -> None:
        """Let the published way edit some facts."""
        for fact in facts:
            side.edit(fact.text, fact.target)

    @abstractmethod
    def learned(self, editor: Any) -> list[torch.Tensor]:
        """The losses of our editor's only edit, and what it has learned, as tensors to be compared."""

    @abstractmethod
    def learned_as_published(self, side: Any) -> list[torch.Tensor]:
        """The same of the published way."""

    def seconds(self, measured: dict[str, Any]) -> dict[str, float]:
        """Columns of stages from what an edit of ours measured, for the whole batch."""
        return {"training_s": measured["seconds"]["train"]}

    def extras(self, facts: list[Fact], steps: int, theirs: Any) -> dict[str, Any]:
        """Further columns; ``theirs`` has edited."""
        return {}


class Wise(Method):
    name = "wise"
    layers: ClassVar = {"gpt2-small-shape": 10, "demo": 4}
    facts, official_facts, steps = 10, 3, 30
    settings: ClassVar = {"lr": 0.1, "alpha": 2.0, "beta": 8.0, "gamma": 4.0, "mask_ratio": 0.2}

    def facts_of(self, count: int) -> list[Fact]:
        """Facts with another fact's prompt and answer as the text to leave alone."""
        found = counterfacts(count + 1)
        texts = [fact.text + fact.target for fact in found[1:]]
        return [replace(fact, locality=text) for fact, text in zip(found[:-1], texts, strict=True)]

    def ours(self, steps: int, profile: str) -> Any:
        params = {**self.settings, "layers": [self.layer], "steps": steps}
        return fastedit.editor(
            "wise", self.model, self.tokenizer, params=params, contexts=prefixes(), profile=profile, progress=False
        )  # fmt: skip

    def published(self, steps: int) -> PublishedWise:
        given = self.settings
        hparams = {
            "inner_params": [self.projection.weight_name], "edit_lr": given["lr"], "n_iter": steps,
            "alpha": given["alpha"], "beta": given["beta"], "gamma": given["gamma"], "save_freq": 500,
            "merge_freq": 1000, "norm_constraint": 1.0, "weights": 1.0, "densities": 0.53,
        }  # fmt: skip
        shape = self.projection.d_out, self.projection.d_in
        mask = PhiloxMask(0, 0, self.layer, given["mask_ratio"]).dense(shape).to(self.device)
        return PublishedWise(self.model, self.tokenizer, hparams, prefixes(), [mask])

    def edit_as_published(self, side: PublishedWise, facts: list[Fact]) -> None:
        for fact in facts:
            assert fact.locality is not None
            side.edit(fact.text, fact.target, fact.locality)

    def learned(self, editor: Any) -> list[torch.Tensor]:
        return [editor.losses[0], editor.state.side.weight - editor.state.base]

    def learned_as_published(self, side: PublishedWise) -> list[torch.Tensor]:
        return [side.losses[0], side.side - side.original]

    def seconds(self, measured: dict[str, Any]) -> dict[str, float]:
        return {f"{stage}_s": measured["training"][stage] for stage in ("prefix", "training")}

    def extras(self, facts: list[Fact], steps: int, theirs: PublishedWise) -> dict[str, Any]:
        sizes = {"mask_bytes": 0, "official_mask_bytes": theirs.mask.nbytes}
        return sizes | merging(theirs.original, theirs.side, self.device)


class Grace(Method):
    name = "grace"
    layers: ClassVar = {"gpt2-small-shape": 9, "demo": 4}
    facts, official_facts, steps = 100, 5, 100
    settings: ClassVar = {"lr": 0.1, "radius": 1.0, "init": "warm"}

    def ours(self, steps: int, profile: str) -> Any:
        params = {**self.settings, "layers": [self.layer], "steps": steps}
        return fastedit.editor(
            "grace", self.model, self.tokenizer, params=params, profile=profile, progress=False
        )

    def published(self, steps: int) -> PublishedGrace:
        given = self.settings
        hparams = {
            "inner_params": [self.projection.weight_name], "edit_lr": given["lr"], "n_iter": steps,
            "eps": given["radius"], "val_init": given["init"],
        }  # fmt: skip
        return PublishedGrace(self.model, self.tokenizer, hparams)

    def learned(self, editor: Any) -> list[torch.Tensor]:
        book = editor.side.memory.codebook
        return [editor.losses[0], book.keys, book.values, book.radii]

    def learned_as_published(self, side: PublishedGrace) -> list[torch.Tensor]:
        return [side.losses[0], side.keys, side.values.detach(), side.radii]

    def extras(self, facts: list[Fact], steps: int, theirs: PublishedGrace) -> dict[str, Any]:
        """Calls of one fact each, as many as the published way edited."""
        editor, few = self.ours(steps, "clean"), facts[: len(theirs.losses)]
        start = clock(self.device)
        for fact in few:
            editor.edit([fact])
        taken = clock(self.device) - start
        clear_memories(self.model)
        return {"single_edits_per_s": len(few) / taken}


class TPatcher(Method):
    """All steps are taken: no validation stops them. All activations count, so that rounding does not choose.

    The queries to be left alone are as many as published; they are those of ordinary text, moved a little.
    """

    name = "t-patcher"
    layers: ClassVar = {"gpt2-small-shape": 11, "demo": 5}
    facts, official_facts, steps = 20, 5, 100
    settings: ClassVar = {"activation_k": 40, "check_from": 1_000_000}

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        runner = BlockRunner(self.model)
        texts = neutral_texts()
        real = text_queries(runner, self.tokenizer, texts, self.layer, SAMPLED)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(real), (REMEMBERED,), generator=generator)
        noise = torch.randn(REMEMBERED, real.shape[1], generator=generator) * 0.1 * real.std().cpu()
        self.queries = real[rows.to(device)] + noise.to(device)

    def ours(self, steps: int, profile: str) -> Any:
        params = {**self.settings, "layers": [self.layer], "steps": steps}
        editor = fastedit.editor(
            "t-patcher", self.model, self.tokenizer, params=params, profile=profile, progress=False
        )
        editor._remembered = fingerprint(self.model), self.queries  # both sides are given them
        return editor

    def published(self, steps: int) -> PlainTPatcher:
        editor = self.ours(steps, "official")
        rows = list(self.queries.split(1))
        held_out = len(rows) // 10
        return PlainTPatcher(
            self.model, self.tokenizer, self.layer, editor.params, rows[:-held_out], rows[-held_out:], True
        )

    def edit_as_published(self, side: PlainTPatcher, facts: list[Fact]) -> None:
        for fact in facts:
            side.edit(fact)

    def learned(self, editor: Any) -> list[torch.Tensor]:
        patches = editor.side.memory.patches
        return [patches.keys, patches.bias, patches.values]

    def learned_as_published(self, side: PlainTPatcher) -> list[torch.Tensor]:
        return [side.keys, side.bias, side.values]


METHODS: dict[str, type[Method]] = {method.name: method for method in (Wise, Grace, TPatcher)}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference; infinite if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).norm() / other.norm())


def clock(device: str) -> float:
    """Seconds, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(run: Callable[[], Any], device: str, repetitions: int = 5) -> float:
    taken = []
    for _ in range(repetitions):
        start = clock(device)
        run()
        taken.append(clock(device) - start)
    return statistics.median(taken) * 1e3


def difference(method: Method, fact: Fact) -> float:
    """Largest relative difference in losses and in what is learned after a few steps of one edit."""
    editor, side = method.ours(CHECKED_STEPS, "official"), method.published(CHECKED_STEPS)
    editor.edit([fact])
    mine = [tensor.clone() for tensor in method.learned(editor)]
    clear_memories(method.model)
    method.edit_as_published(side, [fact])
    return max(map(relative, mine, method.learned_as_published(side)))


def measure(kind: type[Method], name: str, options: argparse.Namespace) -> dict[str, Any]:
    method, device = kind(name, options.device), options.device
    steps = options.steps or kind.steps
    facts = method.facts_of(options.facts or kind.facts)
    few = facts[: options.official_facts or kind.official_facts]
    found = difference(method, facts[0])
    if not found < 1e-3:
        raise SystemExit(f"{name} {kind.name}: the first steps differ by {found:.2g}: nothing was timed")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "model": name, "method": kind.name, "weight": f"{method.projection.d_out}x{method.projection.d_in}",
        "steps": steps, "facts": len(facts), "official_facts": len(few), "difference": found,
    }  # fmt: skip
    for profile, column in (("official", "edits_per_s"), ("clean", "clean_edits_per_s")):
        editor = method.ours(steps, profile)
        start = clock(device)
        edit = editor.edit(facts)
        row[column] = len(facts) / (clock(device) - start)
        if profile == "official":
            row |= {stage: taken / len(facts) for stage, taken in method.seconds(edit.measured).items()}
        clear_memories(method.model)
    theirs = method.published(steps)
    start = clock(device)
    method.edit_as_published(theirs, few)
    row["official_edits_per_s"] = len(few) / (clock(device) - start)
    row |= {
        f"official_{stage}_s": theirs.seconds[stage] / len(few) for stage in ("forward", "backward", "update")
    }
    row["speedup"] = row["edits_per_s"] / row["official_edits_per_s"]
    row["clean_speedup"] = row["clean_edits_per_s"] / row["official_edits_per_s"]
    if device == "cuda":  # a stage's clock does not wait for the device
        row |= {column: None for column in row if column.endswith("_s") and not column.endswith("_per_s")}
    return row | method.extras(facts, steps, theirs)


def merging(base: torch.Tensor, side: torch.Tensor, device: str) -> dict[str, float]:
    """Two side memories by TIES, ours and by sorting; entries tied at a threshold may differ."""
    generator = torch.Generator().manual_seed(1)
    sides = [side, side + 1e-3 * torch.randn(base.shape, generator=generator).to(device)]
    merged = ties_merge(sides, [0.5, 0.5], 0.53, base)
    sorted_out = ties_by_sort(base, sides, [0.5, 0.5], 0.53)
    if not relative(merged - base, sorted_out - base) < 2e-2:
        raise SystemExit("the merged memories differ: nothing was timed")
    mine = median_ms(lambda: ties_merge(sides, [0.5, 0.5], 0.53, base), device)
    theirs = median_ms(lambda: ties_by_sort(base, sides, [0.5, 0.5], 0.53), device)
    return {"merge_ms": mine, "official_merge_ms": theirs, "merge_speedup": theirs / mine}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    counts = {n: f"{kind.facts}, {kind.official_facts} and {kind.steps}" for n, kind in METHODS.items()}
    defaults = "; ".join(f"{n} {numbers}" for n, numbers in counts.items())
    parser.add_argument("--facts", type=int, help="facts that fastedit edits")
    parser.add_argument("--official-facts", type=int, help="facts that the published way edits")
    parser.add_argument("--steps", type=int, help=f"steps for each fact (defaults of the three: {defaults})")
    common.add_output_arguments(parser)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for method in options.methods:
            print(name, method, file=sys.stderr)
            rows.append(measure(METHODS[method], name, options))
            print(json.dumps(rows[-1]), file=sys.stderr)
    shown = (*COLUMNS[:2], *COLUMNS[3:13], "merge_speedup")
    common.report("memory_editing", rows, COLUMNS, shown, options)


if __name__ == "__main__":
    main()
