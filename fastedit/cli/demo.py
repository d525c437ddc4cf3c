"""``fastedit demo``: edit facts in the packaged model, show what changed, and take it all back."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from . import common
from ._table import table

_EXAMPLES = """\
  fastedit demo
  fastedit demo --facts 3 --method rome
  fastedit demo --json
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "demo",
        "edit a small packaged model and show what happens",
        "Writes invented facts into the small language model that comes with the package, shows what it said "
        "before and after, also to a paraphrase and about an unrelated neighbour, and takes the edit back.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--facts", type=int, default=10, metavar="N", help="how many facts, 1 to 10 (default: 10)"
    )
    parser.add_argument("--method", default="memit", help="editing method (default: memit)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    value = demonstrate(args.method, args.facts)
    common.emit(value, _text(value), args.json)
    return 0 if value["bits_restored"] else 1


def demonstrate(method: str = "memit", n_facts: int = 10) -> dict[str, Any]:
    """Edit the demo model and measure; see the keys of the result for what is measured."""
    from .. import Fact, demo, editor
    from ..models.fingerprint import weight_digest

    suggestions = demo.suggested_edits()
    if not 1 <= n_facts <= len(suggestions):
        raise ValueError(f"--facts must be 1 to {len(suggestions)}, got {n_facts}")
    suggestions = suggestions[:n_facts]
    started = time.perf_counter()
    common.note("loading the demo model ...")
    model, tokenizer = demo.load_demo_model()
    before_bits = {name: weight_digest(parameter) for name, parameter in model.named_parameters()}
    facts = [
        Fact(item["prompt"], item["subject"], item["target_new"], target_old=item["target_old"])
        for item in suggestions
    ]
    prompts = {
        "answer": [fact.text for fact in facts],
        "paraphrase": [item["paraphrases"][0].replace("{}", item["subject"]) for item in suggestions],
        "neighbour": [
            item["neighbours"][0]["prompt"].replace("{}", item["neighbours"][0]["subject"])
            for item in suggestions
        ],
    }
    before = _look(model, tokenizer, prompts)
    common.note(f"editing {len(facts)} facts with {method} ...")
    editing = time.perf_counter()
    edit = editor(method, model, tokenizer).edit(facts)
    seconds = time.perf_counter() - editing
    after = _look(model, tokenizer, prompts)
    edit.revert()
    reverted = _look(model, tokenizer, prompts)
    after_bits = {name: weight_digest(parameter) for name, parameter in model.named_parameters()}
    rows = []
    for index, (fact, item) in enumerate(zip(facts, suggestions, strict=True)):
        neighbour = item["neighbours"][0]
        rows.append(
            {
                "prompt": fact.text,
                "target": fact.target_new,
                "paraphrase": prompts["paraphrase"][index],
                "neighbour": prompts["neighbour"][index],
                "neighbour_truth": neighbour["target"],
                "before": {kind: before[kind][index] for kind in prompts},
                "after": {kind: after[kind][index] for kind in prompts},
            }
        )
    return {
        "method": method,
        "params": edit.params,
        "rows": rows,
        "scores": _scores(rows),
        "perplexity": {"before": before["perplexity"], "after": after["perplexity"]},
        "reverted_answers_equal": all(reverted[kind] == before[kind] for kind in prompts),
        "bits_restored": before_bits == after_bits,
        "seconds": {"edit": round(seconds, 2), "all": round(time.perf_counter() - started, 2)},
    }


def _look(model: Any, tokenizer: Any, prompts: dict[str, list[str]]) -> dict[str, Any]:
    """Greedy answers to all prompts, and the perplexity of the neutral text."""
    from .. import demo
    from ..evaluation.drift import DriftMeter, text_windows
    from ..evaluation.generation import Generator

    generator = Generator(model, tokenizer, chat=False)
    flat = [prompt for group in prompts.values() for prompt in group]
    said = iter(generator.greedy(flat, max_new_tokens=8, stops=(".", "\n", ",")))
    looked: dict[str, Any] = {
        kind: [getattr(next(said), "text", "").strip() for _ in group] for kind, group in prompts.items()
    }
    windows = text_windows(tokenizer, demo.neutral_text(), length=256, limit=2048)
    sums = DriftMeter(model, tokenizer, windows, show_progress=False).after()
    looked["perplexity"] = math.exp(sum(window.nll for window in sums) / sum(window.n for window in sums))
    return looked


def _scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    def share(hits: list[bool]) -> float:
        return round(sum(hits) / len(hits), 3)

    return {
        "edited": share([row["after"]["answer"].startswith(row["target"]) for row in rows]),
        "paraphrase": share([row["after"]["paraphrase"].startswith(row["target"]) for row in rows]),
        "neighbour_kept": share([row["after"]["neighbour"] == row["before"]["neighbour"] for row in rows]),
    }


def _text(value: dict[str, Any]) -> str:
    rows = []
    for row in value["rows"]:
        rows.append((common.shorten(row["prompt"], 46), row["before"]["answer"], row["after"]["answer"]))
        rows.append(
            (
                "   said otherwise: " + common.shorten(row["paraphrase"], 44),
                row["before"]["paraphrase"],
                row["after"]["paraphrase"],
            )
        )
        rows.append(
            (
                "   a neighbour:    " + common.shorten(row["neighbour"], 44),
                row["before"]["neighbour"],
                row["after"]["neighbour"],
            )
        )
    cut = [(prompt, common.shorten(old, 22), common.shorten(new, 22)) for prompt, old, new in rows]
    scores, n = value["scores"], len(value["rows"])
    perplexity = value["perplexity"]
    return "\n".join(
        [
            table(("the model is asked", "before", "after the edit"), cut),
            "",
            f"written:    {scores['edited'] * n:.0f} of {n} facts, {scores['paraphrase'] * n:.0f} of {n} when "
            f"said otherwise, in {value['seconds']['edit']:.1f} s with {value['method']}",
            f"kept:       {scores['neighbour_kept'] * n:.0f} of {n} neighbours answer as before; perplexity of "
            f"plain text {perplexity['before']:.2f} -> {perplexity['after']:.2f}",
            "taken back: "
            + (
                "all weights have their former bits, and all answers are as before"
                if value["bits_restored"] and value["reverted_answers_equal"]
                else "THE WEIGHTS DIFFER FROM BEFORE: this is a defect, please report it"
            ),
        ]
    )
