"""The ``fastedit`` command: finds its subcommands and turns errors into plain messages."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import FasteditError

# Every verb is the file of the same name in this folder, with add_parser(subparsers) and run(args) -> int.
VERBS = (
    "demo",
    "edit",
    "eval",
    "apply",
    "revert",
    "list",
    "show",
    "export",
    "stats",
    "targets",
    "nullspace",
    "calibrate",
    "train",
    "accelerate",
    "bench",
    "info",
)

_EPILOG = """\
examples:
  fastedit demo
      see it work, on a small model that comes with the package
  fastedit edit gpt2-xl --fact "The capital of {France} is -> Lyon" --out lyon
      write one fact, measure it, keep the edit in the folder lyon
  fastedit edit ./my-model --facts facts.csv --method memit --out edits --save-model my-model-edited
      write a file of facts, and save the whole edited model too
  fastedit revert my-model-edited
      take the last edit out again: the files have their former bytes

fastedit COMMAND --help explains each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 good, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(args.run(args))
    except FasteditError as error:
        print(f"fastedit {args.command}: {error}", file=sys.stderr)
        return 1
    except (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError) as error:
        named = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        print(f"fastedit {args.command}: {named}", file=sys.stderr)
        return 1
    except ValueError as error:
        if args.verbose:
            raise
        print(f"fastedit {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            f"\nfastedit {args.command}: interrupted; every file is whole, as before or as after",
            file=sys.stderr,
        )
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="fastedit",
        description="Change single facts inside a trained language model, and take them back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastedit {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for verb in VERBS:
        importlib.import_module(f".{verb}", __package__).add_parser(subparsers)
    return parser
