"""``fastedit calibrate``: find hyper-parameters for a model that has no published ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.loading import load_model
from . import common
from ._table import table

if TYPE_CHECKING:
    from ..editors.calibrate import Calibration
    from ..editors.trials import Scores

_EXAMPLES = """\
  fastedit calibrate ./model --out memit.json
      for MEMIT, on changed facts of the world that come with the package
  fastedit calibrate ./model --facts counterfact.json.gz --method alphaedit --stats stats/model --out alphaedit.json
      on 20 records of CounterFact, checked on 10 others, with your statistics
  fastedit calibrate ./model --facts facts.csv --method nse --limit 100 --batch-size 10 --out nse.json
      for a sequence of small batches: damage that builds up counts
  fastedit calibrate ./model --facts facts.csv --budget 300 --out memit.json
      the best that can be found in five minutes
  fastedit edit ./model --facts facts.csv --params memit.json --out edits
      afterwards: edit with what was found

Give the statistics that you will edit with: which settings are right depends on them.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "calibrate",
        "find hyper-parameters for a model without published ones",
        "Try settings of a locate-then-edit method on some facts: which blocks, how far targets may move, how "
        "much the statistics weigh. Every setting edits the facts, is measured and taken off again; the best is "
        "checked on facts that were kept back and written to a file for --params. No model file is changed.",
        _EXAMPLES,
    )
    common.add_model_options(parser)
    add = parser.add_argument
    add(
        "--facts",
        metavar="FILE",
        help="json, jsonl or csv, or a public data set's own file; rephrasings and locality prompts in it are used; "
        "default: packaged facts of the world",
    )
    add("--method", default="memit", help="a locate-then-edit method (default: memit)")
    add(
        "--limit",
        type=int,
        default=20,
        metavar="N",
        help="facts to search on; half as many are kept back (default: 20)",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="edit N facts at a time; default: all, or half for AlphaEdit and NSE",
    )
    add("--stats", metavar="DIR", help="key statistics made by fastedit stats; default: collected and cached")
    add(
        "--texts",
        nargs="+",
        metavar="FILE",
        help="texts like those the model was trained on: for the statistics, if they are collected, and to measure "
        "damage; default: the packaged neutral text",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="stop the search after so long and take the best so far",
    )
    add("--out", metavar="FILE", required=True, help="the JSON file to write; must not exist")
    add("--seed", type=int, default=0, help="of the choice of facts and all sampling (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    from ..editors.calibrate import calibrate
    from ..stats import read_texts
    from ..stats.cache import cache_place

    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists already: choose a new file")
    facts = _facts(args.facts) if args.facts else None
    texts = list(read_texts(*args.texts)) if args.texts else None
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    result = calibrate(
        model,
        tokenizer,
        facts,
        args.method,
        statistics=args.stats,
        texts=texts,
        limit=args.limit,
        batch_size=args.batch_size,
        budget=args.budget,
        seed=args.seed,
        say=common.note,
    )
    result.save(args.out)
    if texts is not None and args.stats is None:
        args.stats = str(cache_place(model, tokenizer, texts))
    common.emit(
        {"file": args.out, "statistics": args.stats, **result.as_dict()}, _text(result, args), args.json
    )
    return 0


def _facts(path: str) -> list[Any]:
    from ..data import load_facts, load_records

    if ".csv" in Path(path).suffixes:
        return list(load_facts(path))
    return list(load_records(path))


def _text(result: Calibration, args: argparse.Namespace) -> str:
    n, kept_back = result.n_searched, result.n_checked
    rows = [
        (f"default, {kept_back} facts kept back", *_cells(result.checked_default)),
        (f"chosen, {kept_back} facts kept back", *_cells(result.checked)),
        (f"chosen, the {n} facts searched on", *_cells(result.searched)),
    ]
    head = ("", "written", "said otherwise", "neighbours kept", "plain text kept", "together")
    lines = [
        table(head, rows),
        "",
        f"chosen:  {_settings(result.params)}",
        f"default: {_settings(result.default)}",
    ]
    lines.append(f"why:     {result.why}.")
    if result.searched.unreached:
        lines.append(
            f"targets: for {result.searched.unreached} of {n} facts no change within the clamp makes the model give "
            "the answer; they are written badly or not at all."
        )
    if _worse(result):
        lines.append(
            "careful: on the facts kept back the default did no worse. Give more facts with --limit."
        )
    tried = f"{len(result.targets)} ways to optimise targets and {len(result.trials)} edits"
    lines.append(f"tried:   {tried}, in {result.seconds:.0f} s; the model is as it was.")
    stats = f" --stats {args.stats}" if args.stats else ""
    facts = f" --facts {args.facts}" if args.facts else ""
    lines.append(
        f"next:    fastedit edit {args.model}{facts} --method {args.method} --params {args.out}{stats} --out edits"
    )
    return "\n".join(lines)


def _worse(result: Calibration) -> bool:
    if result.params == result.default or result.checked_default is None:
        return False
    return result.checked is None or result.checked.total <= result.checked_default.total


def _cells(scores: Scores | None) -> list[str]:
    if scores is None:
        return ["failed", "-", "-", "-", "-"]
    shares = (scores.written, scores.paraphrased, scores.neighbours, scores.text)
    return ["-" if share is None else f"{share:.0%}" for share in shares] + [f"{scores.total:.2f}"]


def _settings(params: Mapping[str, Any]) -> str:
    parts = []
    for name, value in params.items():
        if value is not None:
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{name}={shown}")
    return " ".join(parts)
