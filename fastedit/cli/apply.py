"""``fastedit apply``: write a saved edit into a model directory."""

from __future__ import annotations

import argparse
import json

_EXAMPLES = """\
examples:
  fastedit apply france-lyon --model models/gpt2
      change the files of models/gpt2; take it back with: fastedit revert models/gpt2 --last
  fastedit apply france-lyon --model models/gpt2 --out models/gpt2-lyon
      leave models/gpt2 as it is and write an edited copy, which can be reverted too

Only files that hold edited matrices are written. If the process is killed or the disk is full, the model
loads as it was before or as it is after, never as something in between.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = subparsers.add_parser(
        "apply",
        help="write a saved edit into a model directory",
        description="Write a saved edit into the files of a model, where it can be reverted.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("edit", metavar="EDIT_DIR", help="the directory of the edit")
    parser.add_argument(
        "--model", required=True, metavar="MODEL_DIR", help="the model's directory (safetensors)"
    )
    parser.add_argument("--out", metavar="NEW_DIR", help="write the edited model here instead of in place")
    parser.add_argument("--force", action="store_true", help="apply it to other weights than it was made on")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ..artefacts import apply_to_directory

    row = apply_to_directory(args.edit, args.model, out=args.out, force=args.force, device=args.device)
    where = args.out or args.model
    if args.json:
        print(json.dumps({"model": str(where), **row}, indent=2))
    else:
        print(f"Edit {row['id']} ({row['method']}, {count(row['facts'], 'fact')}) is in {where} now.")
        print(f"To take it out: fastedit revert {where} --edit {row['id']}")
    return 0


def count(number: int, noun: str, plural: str = "") -> str:
    """``3 facts``, ``1 fact``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
