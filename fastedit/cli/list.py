"""``fastedit list``: the edits in a model directory."""

from __future__ import annotations

import argparse
import json

from ._table import size_text, table

_EXAMPLES = """\
examples:
  fastedit list models/gpt2
  fastedit list models/gpt2 --json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = subparsers.add_parser(
        "list",
        help="show the edits in a model directory",
        description="Show the edits that are in the files of a model, oldest first.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="the model's directory")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ..artefacts import list_directory

    rows = list_directory(args.model)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"There are no edits in {args.model}.")
    else:
        head = ["id", "method", "facts", "matrices", "rank", "size", "applied (UTC)"]
        cells = [
            [
                r["id"],
                r["method"],
                r["facts"],
                r["matrices"],
                r["rank"],
                size_text(r["bytes"]),
                r["applied"][:19],
            ]
            for r in rows
        ]
        print(table(head, cells))
    return 0
