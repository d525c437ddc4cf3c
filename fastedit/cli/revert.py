"""``fastedit revert``: take edits out of a model directory."""

from __future__ import annotations

import argparse
import json

from .apply import count

_EXAMPLES = """\
examples:
  fastedit revert models/gpt2                      take out the last edit
  fastedit revert models/gpt2 --edit 3f9c1a        take out one edit by its id or the start of it
  fastedit revert models/gpt2 --all                take out all edits: the files have their first bytes again

Edits that were applied after the one taken out stay: they are applied again. `fastedit list` shows the ids.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = subparsers.add_parser(
        "revert",
        help="take edits out of a model directory",
        description="Take edits out of the files of a model, exactly: the former bits are restored.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="the model's directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--edit", metavar="ID", help="the edit with this id (or start of an id)")
    which.add_argument("--last", action="store_true", help="the last edit (default)")
    which.add_argument("--all", action="store_true", help="all edits")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ..artefacts import list_directory, revert_directory

    which = "all" if args.all else "last" if args.edit is None else args.edit
    gone = revert_directory(args.model, which, device=args.device)
    left = list_directory(args.model)
    if args.json:
        print(json.dumps({"model": args.model, "reverted": gone, "remaining": left}, indent=2))
    else:
        for row in gone:
            print(
                f"Edit {row['id']} ({row['method']}, {count(row['facts'], 'fact')}) is out of {args.model}."
            )
        print(
            f"{count(len(left), 'edit')} left."
            if left
            else "No edits left: the weights are the original ones."
        )
    return 0
