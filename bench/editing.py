"""Edits per second, end to end and by stage: fastedit against the way the published code works.

    python bench/editing.py                              GPT-2-small shape with random weights, and the demo model
    python bench/editing.py --models demo --methods memit nse --batch-sizes 10
    python bench/editing.py --facts 100 --official-facts 20
    python bench/editing.py --device cuda --dtypes float32 bfloat16     Llama-3-8B shape on a GPU, random weights

Both sides get the same model, facts, contexts, statistics and hyper-parameters. The change of the weights by the
first batch is compared before anything is timed; in bfloat16, where the published way adds to rounded weights and
fastedit to float32 masters, the difference is only shown. Contexts are sampled as published: five of ten tokens, for
ROME ten of five tokens and ten of ten. The published way takes its facts one by one and solves once a batch, so it is
timed on fewer facts (--official-facts) in one batch, and its time for all of them follows. On a GPU the time of a
whole edit is that of the device, the split into stages what the host sees of it, and the peak memory of each side is
shown.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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
BIG = "llama3-8b-shape"  # for a GPU
LENGTHS = {"rome": ((5, 10), (10, 10))}  # of contexts, in tokens, and how many of each
LAYERS = {"gpt2-small-shape": (3, 4, 5, 6, 7), "demo": (0, 1, 2), BIG: (4, 5, 6, 7, 8)}
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
COLUMNS = (
    "model", "dtype", "method", "batch", "earlier_edits", "facts_per_s", "official_facts_per_s", "speedup",
    "difference", "targets_s", "keys_s", "solve_s", "apply_s", "official_targets_s", "official_keys_s",
    "official_solve_s", "official_apply_s", "solve_speedup", "route", "state_mb", "official_state_mb", "peak_mb",
    "official_peak_mb",
)  # fmt: skip


def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model, the same at every call, and a tokenizer."""
    demo, tokenizer = load_demo_model()
    if name == "demo":
        return demo.to(device, dtype), tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if name == BIG:
        with torch.device(device), default_dtype(dtype):
            model = LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=0, **LLAMA3_8B))
    else:
        config = GPT2Config(bos_token_id=0, eos_token_id=0)  # 12 blocks, 768 wide, 50,257 words
        model = GPT2LMHeadModel(config).to(device, dtype)
    return model.eval(), tokenizer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors of floating point have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


def statistics(sizes: dict[int, int], device: str) -> dict[int, Tensor]:
    """Second moments of random, ill-conditioned keys of the sizes that the layers see."""
    found = {}
    for layer, d in sizes.items():
        generator = torch.Generator(device).manual_seed(layer)
        spread = torch.logspace(0, -2, d, device=device)
        sample = torch.randn(3 * d, d, generator=generator, device=device) * spread
        found[layer] = sample.T @ sample / (3 * d)
    return found


def contexts_of(method: str) -> tuple[str, ...]:
    """Those that the method's authors sample."""
    return contexts(LENGTHS.get(method, ((10, 5),)))


def settings(model: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyper-parameters by our names and by the published ones."""
    layers = list(LAYERS[model])
    if method == "ultraedit":
        path = "mlp.c_proj" if model == "gpt2-small-shape" else "mlp.down_proj"
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
            method, model, tokenizer, params=settings(name, method)[0], profile="official",
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
            self.published = PublishedUltraEdit(model, copy.deepcopy(tokenizer), **settings(name, method)[1])
            return
        self.published = Published(
            model,
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


def changes(side: Any, layers: Sequence[int], facts: Sequence[Fact]) -> tuple[dict[int, Tensor], float]:
    """How a batch changes the weights, in float32, and how long it takes."""
    before = {layer: side.weight(layer).float().clone() for layer in layers}
    seconds = timed(side, [facts])
    return {layer: side.weight(layer).float() - weight for layer, weight in before.items()}, seconds


def difference(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    """Largest relative difference between two changes of a weight."""
    return max(((ours[layer] - theirs[layer]).norm() / theirs[layer].norm()).item() for layer in ours)


def timed(side: Any, batches: Sequence[Sequence[Fact]]) -> float:
    """Seconds that the batches take."""
    side.seconds.clear()
    start = now()
    for batch in batches:
        side.edit(batch)
    return now() - start


def now() -> float:
    """Seconds, once the GPU has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(device: str) -> float | str:
    """The most memory that was taken since the last call, which only a GPU tells."""
    if device == "cpu":
        return ""
    most = torch.cuda.max_memory_allocated() / 2**20
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def measure(name: str, dtype: str, method: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size. One side's model is there at a time."""
    layers = settings(name, method)[1]["layers"]
    device = options.device

    def given() -> tuple[Any, ...]:
        return (name, method, *load(name, device, getattr(torch, dtype)), moments, past)

    description = describe(load(name, device, getattr(torch, dtype))[0])
    sizes = {layer: description.projection(layer).d_in for layer in layers}
    del description
    moments = {} if method == "ultraedit" else statistics(sizes, device)
    generator = torch.Generator(device).manual_seed(9)
    past = {
        layer: torch.randn(len(moments[layer]), options.earlier, generator=generator, device=device)
        * moments[layer].diagonal().sqrt()[:, None]
        for layer in layers
        if options.earlier and method in ("alphaedit", "nse")
    }
    facts = counterfacts(options.facts)
    few = facts[: options.official_facts]
    by_us, _ = changes(Ours(*given()), layers, few)
    official: Any = Official(*given())
    peak_mb(device)
    by_them, taken_officially = changes(official, layers, few)
    official_peak = peak_mb(device)
    found = difference(by_us, by_them)
    if dtype == "float32" and not found < 2e-2:
        raise SystemExit(
            f"{name} {method}: the changes of the weights differ by {found:.2g}: nothing was timed"
        )
    theirs, official_state = dict(official.seconds), official.state_bytes
    del official, by_us, by_them
    for batch in [1] if method == "rome" else options.batch_sizes:
        ours = Ours(*given())
        ours.edit(facts[-2:])  # pages, threads, earlier keys appended to the factors
        batches = [facts[i : i + batch] for i in range(0, len(facts), batch)]
        peak_mb(device)
        taken = timed(ours, batches)
        solve = ours.seconds.get("solve", 0.0)
        once = 0.0 if method == "rome" else theirs.get("solve", 0.0) + theirs.get("state", 0.0)  # in a batch
        each = (taken_officially - once) / len(few) + once * len(batches) / len(facts)
        row: dict[str, Any] = {
            "model": name, "dtype": dtype, "method": method, "batch": batch,
            "earlier_edits": options.earlier if past else 0,
            "facts_per_s": len(facts) / taken, "official_facts_per_s": 1 / each,
            "speedup": each * len(facts) / taken, "difference": found,
            "state_mb": ours.state_bytes / 2**20, "official_state_mb": official_state / 2**20,
            "peak_mb": peak_mb(device), "official_peak_mb": official_peak,
            "route": " ".join(sorted(set(getattr(ours.editor, "routes", {}).values()))),
        }  # fmt: skip
        for stage in ("targets", "keys", "solve", "apply"):
            row[f"{stage}_s"] = ours.seconds.get(stage, 0.0) / len(facts)
            row[f"official_{stage}_s"] = theirs.get(stage, 0.0) / len(few)
        row["official_solve_s"] = (once or theirs.get("solve", 0.0)) * len(batches) / len(facts)
        row["solve_speedup"] = row["official_solve_s"] / max(solve / len(facts), 1e-9)
        yield row
        del ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*MODELS, BIG),
        help=f"default: {' '.join(MODELS)}; on a GPU {BIG}",
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--facts", type=int, default=100, help="facts that fastedit edits")
    parser.add_argument("--official-facts", type=int, default=20, help="facts that the published way edits")
    parser.add_argument(
        "--earlier", type=int, default=1000, help="edits that lie beneath already (AlphaEdit, NSE)"
    )
    common.add_output_arguments(parser)
    options = parser.parse_args()
    rows = []
    for name in options.models or (MODELS if options.device == "cpu" else (BIG,)):
        for dtype in options.dtypes:
            for method in options.methods:
                print(f"{name} {dtype} {method}", file=sys.stderr)
                for row in measure(name, dtype, method, options):
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr)
    shown = (*COLUMNS[:9], "targets_s", "official_targets_s", "solve_speedup")
    common.report("editing", rows, COLUMNS, shown, options)


if __name__ == "__main__":
    main()
