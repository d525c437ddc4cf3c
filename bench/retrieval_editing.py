"""Retrieval editors: how well they edit, and how fast they train, edit and serve.

    python bench/retrieval_editing.py speed                        training, adding facts, serving with 10,000 facts
    python bench/retrieval_editing.py speed --parts training --rounds 3
    python bench/retrieval_editing.py demo-data --out data         facts of the demo model, by subject: train and test
    python bench/retrieval_editing.py reading --models MODEL_DIR --data test.json --train train.json --out reading
    python bench/retrieval_editing.py train --model MODEL_DIR --data train.json --exclude test.json --out recipe
    python bench/retrieval_editing.py quality --model MODEL_DIR --data test.json --train train.json \\
        --checkpoints recipe0 recipe1 recipe2

Quality: see bench/retrieval_quality.py. Speed:

training  steps per second of ``fastedit train recipe`` against the published way (bench/baselines/recipe.py) with the
          same networks, records, draws and losses, which are compared before anything is timed; without dropout. Both
          with the encoder in training, and with a frozen one, whose output fastedit reads once.
adding    facts per second of one edit of many facts, against the encoder alone on the same texts.
serving   every prompt finds a fact. "first token": its time less the encoder's on the prompts, over the unedited
          model's first token, where the soft prompts are read for the first time; "as_long" is the same over the
          unedited model's first token of prompts that are longer by the vectors of a soft prompt: what is left if
          these positions are not counted. "again": other words of the prompt have been answered before, but not
          these, so the encoder runs and the soft prompts' keys and values are there. "later tokens": of both models
          in turn, token by token. All are medians of ratios of neighbouring runs.

The language model has GPT-2-small's shape and random weights. Searching 1,000,000 keys is measured by
bench/retrieval.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastedit import Fact
from fastedit.bench import common, retrieval_quality
from fastedit.bench.baselines.recipe import PublishedBatch, PublishedRecipe, Row
from fastedit.bench.editing import load
from fastedit.bench.serving import Generation, Inputs, encoded, prefill, twin
from fastedit.data import records_from
from fastedit.editors.recipe import Recipe
from fastedit.editors.recipe_training import (
    Example,
    RecipeTrainingParams,
    _Drawn,
    _Learner,
    examples_of,
    row_of,
)
from fastedit.editors.training_loop import adam
from fastedit.memory import clear_memories, route_info
from fastedit.memory.encoder import TextEncoder
from fastedit.memory.recipe import RecipeMemory, RecipeNetworks, RecipeSizes, knowledge_text, write_checkpoint
from fastedit.memory.sentences import DEFAULT_ENCODER
from fastedit.models import describe, fingerprint
from fastedit.models.runner import frozen

MODEL = "gpt2-small-shape"
PARTS = ("training", "adding", "serving")
COLUMNS = (
    "part", "case", "batch", "facts", "rate_per_s", "other_per_s", "speedup", "cpu_speedup", "ms", "other_ms",
    "ratio", "cpu_ratio", "as_long", "difference", "routed",
)  # fmt: skip
SIZES: dict[str, Any] = {"dim": 512, "prompt_tokens": 3, "sentinel_tokens": 10}


# ---- timing ---------------------------------------------------------------------------------------------


Sample = tuple[float, float]  # seconds of the clock and of the processor


def measured(run: Callable[[], Any]) -> Sample:
    """The time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Sample]]:
    """The time of each run, in turn; the first round is not counted."""
    found: dict[str, list[Sample]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        names = [*list(runs)[turn % len(runs) :], *list(runs)[: turn % len(runs)]]
        for name in names:
            found[name].append(measured(runs[name]))
    return {name: samples[1:] for name, samples in found.items()}


def less(one: Sample, other: Sample) -> Sample:
    return one[0] - other[0], one[1] - other[1]


def medians(samples: Sequence[Sample]) -> float:
    """Median seconds of the clock."""
    return statistics.median(seconds for seconds, _ in samples)


def compared(one: Sequence[Sample], other: Sequence[Sample]) -> tuple[float, ...]:
    """Median seconds of both by the clock, and the median ratios one / other by the clock and by the processor."""
    clock, processor = (
        statistics.median(a[part] / b[part] for a, b in zip(one, other, strict=True)) for part in (0, 1)
    )
    return medians(one), medians(other), clock, processor


# ---- training -------------------------------------------------------------------------------------------


def published_batch(learner: Any, drawn: _Drawn, batch: Sequence[Example]) -> PublishedBatch:
    """What a step of ours has drawn, for the published way."""
    n = len(batch)
    pairs = list(zip(drawn.own, drawn.inside, drawn.first, strict=True))

    def row(prompt: str, answer: str) -> Row:
        found = row_of(learner.tokenizer, prompt, answer)
        return found.ids[: found.key + 1], found.target

    rows = [row(*asked) for asked in drawn.rows]
    return PublishedBatch(
        [knowledge_text(*example.own) for example in batch],
        [own if first else inside for own, inside, first in pairs],
        [inside if first else own for own, inside, first in pairs],
        drawn.outside,
        rows[:n],
        rows[n : 2 * n],
        rows[2 * n :],
    )


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps per second, with the encoder in training and without."""
    model, tokenizer = load(MODEL)
    records = records_from(retrieval_quality.demo_rows()[0])
    examples, _ = examples_of(records, (), tokenizer, float("inf"))
    rows = []
    for train_encoder in (True, False):
        for size in options.train_batches:
            rows.append(_training(model, tokenizer, examples, train_encoder, size, options))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def _training(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    train_encoder: bool,
    size: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    given = RecipeTrainingParams(batch=size, train_encoder=train_encoder, encoder_lr=1e-5, **SIZES)
    settings = given.resolved("official")
    rng = random.Random(0)
    batches = [rng.sample(list(examples), size) for _ in range(options.rounds + 1)]
    as_loaded = copy.deepcopy(model).eval()
    with frozen(model):
        learner = _Learner(
            model, tokenizer, settings, TextEncoder.load(options.encoder), options.encoder, "official", 0
        )
        learner.reader.module.eval()
        learner.prepare([example for batch in batches for example in batch], False)
        reader = copy.deepcopy(learner.reader)
        networks = copy.deepcopy(learner.networks)
        theirs = PublishedRecipe(
            as_loaded, reader, networks, settings.encoder_lr, settings.hinge, train_encoder
        )
        drawn = [learner._draw(batch, random.Random(i)) for i, batch in enumerate(batches)]
        published = [
            published_batch(learner, each, batch) for each, batch in zip(drawn, batches, strict=True)
        ]
        mine = learner.objective(batches[0], random.Random(0), settings.hinge)[1]
        wanted = {name: float(value.detach()) for name, value in theirs.losses(published[0]).items()}
        difference = max(abs(mine[name] - wanted[name]) / abs(wanted[name]) for name in wanted)
        if not difference < 1e-4:
            raise SystemExit(f"the losses differ by {difference:.2g}: {mine}, {wanted}: nothing was timed")
        optimiser = adam(learner.groups())
        places = {"ours": iter(range(len(batches))), "theirs": iter(range(len(batches)))}

        def step() -> None:
            i = next(places["ours"])
            loss, _ = learner.objective(batches[i], random.Random(i), settings.hinge)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

        found = turns(
            {"ours": step, "theirs": lambda: theirs.step(published[next(places["theirs"])])}, options.rounds
        )
    seconds, other, ratio, cpu = compared(found["ours"], found["theirs"])
    return {
        "part": "training",
        "case": "encoder trained" if train_encoder else "encoder frozen",
        "batch": size,
        "rate_per_s": 1 / seconds,
        "other_per_s": 1 / other,
        "speedup": 1 / ratio,
        "cpu_speedup": 1 / cpu,
        "difference": difference,
    }


# ---- a checkpoint with random networks ------------------------------------------------------------------


def facts_of(count: int) -> list[Fact]:
    """Facts about subjects that are told apart by their numbers."""
    return [Fact("The capital of country number {} is", str(number), "Lyon") for number in range(count)]


def recipe_of(model: Any, tokenizer: Any, encoder: str, folder: Path) -> Recipe:
    """An editor with random networks, with one tower, so that a prompt is like its fact, and a sentinel of zeros."""
    reader = TextEncoder.load(encoder)
    torch.manual_seed(0)
    sizes = RecipeSizes(reader.width, hidden=describe(model).hidden_size, tied_towers=True, **SIZES)
    networks = RecipeNetworks(sizes)
    with torch.no_grad():
        networks.sentinel.zero_()
    if not folder.exists():
        folder.mkdir()
        write_checkpoint(folder, networks, reader, encoder, fingerprint(model), tokenizer, {})
    return Recipe(model, tokenizer, params={"checkpoint": str(folder)}, progress=False)


# ---- adding facts ---------------------------------------------------------------------------------------


def adding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One edit of many facts against the encoder on their texts."""
    model, tokenizer = load(MODEL)
    facts = facts_of(options.added)
    with tempfile.TemporaryDirectory() as folder:
        editor = recipe_of(model, tokenizer, options.encoder, Path(folder) / "recipe")
        texts = [knowledge_text(fact.text, fact.target) for fact in facts]
        reader = editor.parts.encoder

        def edit() -> None:
            editor.edit(facts)
            clear_memories(model)

        def encode() -> None:
            with torch.no_grad():
                reader.statistics(texts)

        found = turns({"ours": edit, "encoder": encode}, options.rounds)
    seconds, other, ratio, cpu = compared(found["ours"], found["encoder"])
    row = {
        "part": "adding",
        "case": "one edit",
        "facts": len(facts),
        "rate_per_s": len(facts) / seconds,
        "other_per_s": len(facts) / other,
        "speedup": 1 / ratio,
        "cpu_speedup": 1 / cpu,
    }
    return [row]


# ---- serving --------------------------------------------------------------------------------------------


def serving(options: argparse.Namespace) -> list[dict[str, Any]]:
    """First and later tokens with many facts; every prompt finds one."""
    unedited, tokenizer = load(MODEL)
    model = twin(unedited)
    facts = facts_of(options.facts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        editor = recipe_of(model, tokenizer, options.encoder, Path(folder) / "recipe")
        editor.edit(facts)
        memory = editor.side.memory  # type: ignore[union-attr]
        assert isinstance(memory, RecipeMemory)
        step = len(facts) // max(options.batches)
        for batch in options.batches:
            texts = [fact.text for fact in facts[::step]][:batch]
            rows += _serving(model, unedited, memory, texts, encoded(tokenizer, texts, "cpu"), options)
            print(json.dumps(rows[-1]), file=sys.stderr)
    return [{"part": "serving", "facts": len(facts), **row} for row in rows]


def _serving(
    model: Any,
    unedited: Any,
    memory: RecipeMemory,
    texts: list[str],
    inputs: Inputs,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    prefill(model, inputs)
    routed = sum(row[0]["route"] is not None for row in route_info(model)) / len(texts)
    parts = memory.parts
    assert parts is not None
    n = parts.networks.sizes.prompt_tokens
    longer = {name: torch.cat((each, each[:, -1:].expand(-1, n)), 1) for name, each in inputs.items()}

    def edited(prompts_too: bool) -> None:
        memory._queries.clear()
        if prompts_too:
            memory.version += 1
        prefill(model, inputs)

    @torch.no_grad()
    def encode() -> None:
        parts.encoder.statistics(texts)

    runs = {
        "first token": lambda: edited(True),
        "again": lambda: edited(False),
        "encoder": encode,
        "unedited": lambda: prefill(unedited, inputs),
        "longer": lambda: prefill(unedited, longer),
    }
    found = turns(runs, options.rounds)
    head = {"batch": len(texts), "routed": routed}
    rows: list[dict[str, Any]] = []
    for case in ("first token", "again"):
        over = [less(one, encoder) for one, encoder in zip(found[case], found["encoder"], strict=True)]
        _, _, ratio, cpu = compared(over, found["unedited"])
        ours, encoder, other = (medians(found[name]) for name in (case, "encoder", "unedited"))
        row = {"case": case, **head, "ms": ours * 1e3, "other_ms": (encoder + other) * 1e3}
        rows.append({**row, "ratio": ratio, "cpu_ratio": cpu})
        if case == "first token":
            rows[-1]["as_long"] = compared(over, found["longer"])[2]
    later = [step for _ in range(options.rounds) for step in by_turns(model, unedited, inputs, options)]
    seconds, other, ratio, cpu = compared(*([pair[side] for pair in later] for side in (0, 1)))
    numbers = {"ms": seconds * 1e3, "other_ms": other * 1e3, "ratio": ratio, "cpu_ratio": cpu}
    return [*rows, {"case": "later tokens", **head, **numbers}]


def by_turns(
    model: Any, unedited: Any, inputs: Inputs, options: argparse.Namespace
) -> list[tuple[Sample, Sample]]:
    """Of each later token the time of the edited and of the unedited model, one after the other."""
    pair = [Generation(each, inputs, options.device) for each in (model, unedited)]
    steps = []
    for turn in range(options.new_tokens):
        found = {side: measured(pair[side].step) for side in ((0, 1) if turn % 2 else (1, 0))}
        steps.append((found[0], found[1]))
    return steps[2:]  # the first is the prompt, the next warms up


# ---- the command ----------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Measure the parts, and write the table."""
    rows: list[dict[str, Any]] = []
    measures = {"training": training, "adding": adding, "serving": serving}
    for part in options.parts:
        print(part, file=sys.stderr)
        rows += measures[part](options)
    rows = [{**dict.fromkeys(COLUMNS), **row} for row in rows]
    common.report("retrieval_editing", rows, COLUMNS, COLUMNS, options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quality = commands.add_parser(
        "quality",
        help="how well they edit",
        description=retrieval_quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    retrieval_quality.add_arguments(quality)
    quality.set_defaults(run=retrieval_quality.main)
    reading = commands.add_parser("reading", help="how well unedited models read a fact in their context")
    retrieval_quality.add_reading_arguments(reading)
    reading.set_defaults(run=retrieval_quality.read)
    train = commands.add_parser("train", help="train RECIPE for the quality study, a checkpoint a seed")
    retrieval_quality.add_training_arguments(train)
    train.set_defaults(run=retrieval_quality.train)
    data = commands.add_parser("demo-data", help="write the demo model's facts, by subject: train and test")
    data.add_argument("--out", required=True, type=Path, metavar="DIR")
    data.set_defaults(run=lambda options: retrieval_quality.write_demo_rows(options.out))
    fast = commands.add_parser("speed", help="how fast they train, edit and serve")
    add = fast.add_argument
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--encoder", default=DEFAULT_ENCODER, metavar="DIR", help="folder or name of the text encoder")
    add("--rounds", type=int, default=7, help="timed rounds")
    add("--train-batches", type=int, nargs="+", default=[8], metavar="B", help="records in a step")
    add("--added", type=int, default=1000, metavar="N", help="facts of the edit that is timed")
    add("--facts", type=int, default=10_000, metavar="N", help="facts in the store when serving")
    add("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="B", help="prompts at a time")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to generate")
    common.add_output_arguments(fast)
    fast.set_defaults(run=speed)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
