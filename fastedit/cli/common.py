"""What several subcommands share: model options, tables, a parser with examples."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..models.loading import DTYPES


def subcommand(subparsers: Any, name: str, help: str, description: str, examples: str) -> Any:
    """A subparser whose help ends with examples and which has ``--json``."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_model_options(parser: Any) -> None:
    """Add ``MODEL``, ``--dtype`` and ``--device``."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder or Hugging Face name of a causal language model"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision of the model; auto: as it was saved"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='"auto", "cpu", "cuda:1", or "map" to spread a big model over devices',
    )


def shorten(text: str, width: int) -> str:
    """The text in one line, cut to ``width`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def emit(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print ``value`` as JSON or ``text`` for people."""
    print(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def note(message: str) -> None:
    """Say something to the person on standard error, so that ``--json`` output stays clean."""
    print(message, file=sys.stderr, flush=True)
