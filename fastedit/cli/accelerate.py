"""``fastedit accelerate``: run somebody else's editing script with fastedit behind it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from typing import Any

from ..errors import FasteditError
from ..integrations.research_fixes import FIXES
from ..integrations.runner import child_command, split_command
from . import common

_EXAMPLES = """\
  cd AlphaEdit; fastedit accelerate -- python -m experiments.evaluate --alg_name AlphaEdit --model_name ...
      the same run, results folder and arguments; a report of what was replaced at the end
  fastedit accelerate --report run.json -- ../env/bin/python -m experiments.evaluate --alg_name NSE ...
      in another environment, which must have fastedit too
  fastedit accelerate --fix memit_seq_cache -- python -m experiments.evaluate --alg_name MEMIT_seq ...
      with a correction of the published code
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "accelerate",
        "run the script of a research repository with fastedit behind it",
        "Run a command of kmeng01/rome, kmeng01/memit, jianghoucheng/AlphaEdit, jianghoucheng/NSE, "
        "scalable-model-editing/unified-model-editing or XiaojieGu/UltraEdit, unchanged, with its slow functions "
        "replaced. Only versions that are known are touched, and what is not covered is left to the original: "
        "the report at the end, on standard error, says which and why.",
        _EXAMPLES,
    )
    add = parser.add_argument
    named = "; ".join(f"{name}: {what}" for name, what in FIXES.items())
    add("--fix", nargs="+", default=[], choices=sorted(FIXES), metavar="NAME", help=f"corrections. {named}")
    add(
        "--prints",
        action="store_true",
        help="print what the originals print, once for each request and layer",
    )
    add("--report", metavar="FILE", help="write the report as JSON")
    add("line", nargs=argparse.REMAINDER, metavar="-- python ...", help="the command, as you would type it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say: become the command, whose exit status is ours."""
    command = args.line[1:] if args.line[:1] == ["--"] else args.line
    interpreter, flags, rest = split_command(command)
    found = shutil.which(interpreter)
    if found is None:
        raise FasteditError(f"there is no interpreter {interpreter}")
    probe = [found, *flags, "-c", "import fastedit.integrations.runner"]
    if os.path.realpath(found) != os.path.realpath(sys.executable):
        asked = subprocess.run(probe, capture_output=True, text=True)
        if asked.returncode:
            last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FasteditError(f"{found} cannot import fastedit ({last}): install it in that environment")
    options = {"fix": args.fix, "verbose": args.prints, "json": args.json, "report": args.report}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(found, child_command(found, flags, rest, options))
