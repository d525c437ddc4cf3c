"""``fastedit bench``: time the operations here, beside what one would run without them."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from . import common

STEMS = ("covariance", "low_rank", "solve", "neuron_select", "masked_update", "ties", "retrieval", "routing")

_EXAMPLES = """\
  fastedit bench
      every operation on every device here
  fastedit bench covariance low_rank --device cpu --quick
      two of them, small sizes: some seconds
  fastedit bench retrieval --plot retrieval.png --json > retrieval.json
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "bench",
        "time the kernels on this machine",
        "Time the operations on this machine beside what one would run without them: for every shape the backends, "
        "the ratio to the fastest other way, bytes, FLOPs, and the share of this machine's measured limit. Results "
        "are compared with float64 before anything is timed.",
        _EXAMPLES,
    )
    parser.add_argument(
        "op", nargs="*", metavar="OP", help=f"one or more of {', '.join(STEMS)}; default: all"
    )
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument(
        "--repetitions", type=int, help="timed rounds for each provider (default: 15, quick: 5)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write a CSV for each operation and device")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (needs fastedit-llm[plots])")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    unknown = [name for name in args.op if name not in STEMS]
    if unknown:
        raise ValueError(f"no benchmark {unknown[0]!r}: expected {', '.join(STEMS)}")
    from ..bench import common as benchmark

    results = [
        benchmark.run(stem, importlib.import_module(f"..bench.{stem}", __package__), device, args)
        for stem in args.op or STEMS
        for device in benchmark.devices(args.device)
    ]
    benchmark.finish(args, results)
    return 0
