"""``fastedit eval``: edit a data set in batches and score the model before, on the way and at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..models.loading import load_model
from . import common
from .edit import add_editor_options, make_editor

_EXAMPLES = """\
  fastedit eval ./model --data counterfact.json.gz --limit 100 --batch-size 10
      edit 100 records ten at a time, then score all of them: one table, before and after
  fastedit eval ./model --data zsre_mend_eval.json.gz --method rome --batch-size 1 --limit 50 --json
  fastedit eval ./model --data facts.json --method none
      only score the model as it is
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "eval",
        "edit a data set and measure the result",
        "Edit the records of a data set in batches, never undoing any, and score the unedited and the edited "
        "model on all of them: reliability, generality, locality, CounterFact's scores where the data have "
        "them, free generation, and drift. Nothing is written but the reports that you ask for.",
        _EXAMPLES,
    )
    common.add_model_options(parser)
    add = parser.add_argument
    add("--data", metavar="FILE", required=True, help="records, in the file format of any public data set")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add("--batch-size", type=int, default=10, metavar="N", help="records edited together (default: 10)")
    add("--protocols", nargs="+", metavar="ID", help="scores to compute, e.g. wild easyedit.tf cf.prob")
    add("--generation", action="store_true", help="also sample text for fluency and consistency (slow)")
    add("--text", metavar="FILE", help="text for perplexity; default: the packaged neutral text")
    add("--rows", metavar="FILE", help="append every single score to this JSON-lines file as it is made")
    add("--report", metavar="FILE", help="write the report as JSON")
    add_editor_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    from ..data import load_records
    from ..evaluation import Evaluator, run_sequential

    records = load_records(args.data)
    chosen = records[: args.limit]
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    editor = None if args.method == "none" else make_editor(args, model, tokenizer)
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    evaluator = Evaluator(
        model,
        tokenizer,
        chosen,
        protocols=args.protocols,
        generation=args.generation,
        text=text,
        out=args.rows,
        seed=args.seed,
    )
    if editor is None:
        evaluator.before()
        report = evaluator.report()
    else:
        report = run_sequential(editor, chosen, args.batch_size, evaluator)
    if args.report:
        report.save(args.report)
    common.emit(report.as_dict(), report.table(), args.json)
    for position, reason in records.skipped[:10]:
        common.note(f"record {position} was left out: {reason}")
    return 0
