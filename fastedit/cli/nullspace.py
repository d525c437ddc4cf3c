"""``fastedit nullspace``: the null-space projectors that AlphaEdit and SPHERE read."""

from __future__ import annotations

import argparse
from typing import Any

from ..models.loading import load_model
from . import common
from ._table import table
from .stats import layers_of

_EXAMPLES = """\
  fastedit nullspace meta-llama/Meta-Llama-3-8B --stats data/stats --layers 4-8 --threshold 2e-2 \\
      --out null_space_project.pt
      what AlphaEdit computes by a CPU SVD of each layer; EasyEdit reads it where P_loc of its settings points
  fastedit nullspace ./model --stats data/stats --out P.pt --json
      the layers that AlphaEdit edits in this model
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "nullspace",
        "write AlphaEdit's null-space projectors",
        "Write one float32 tensor (layers, d, d): for each layer the projector on the directions in which its "
        "key statistics have an eigenvalue below the threshold. Reports the rank, and whether rounding decides it.",
        _EXAMPLES,
    )
    common.add_model_options(parser)
    add = parser.add_argument
    add("--stats", metavar="DIR", required=True, help="statistics of fastedit stats or of another library")
    add("--threshold", type=float, default=2e-2, help="nullspace_threshold of that library (default: 2e-2)")
    add("--layers", metavar="4-8", help='like "4-8", "3,5,7" or "all"; default: those that AlphaEdit edits')
    add("--out", metavar="FILE", required=True, help="the file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    from ..models import describe
    from ..stats import load_directory
    from ..stats.null_space import write_null_spaces

    model, _ = load_model(args.model, args.dtype, args.device)
    description = describe(model)
    layers = layers_of(args.layers, model, method="alphaedit")

    def second_moment(layer: int) -> Any:
        entry = load_directory(args.stats, model, [layer])[layer]
        return entry.second_moment.to(description.projection(layer).weight.device)

    found = write_null_spaces(args.out, layers, second_moment, args.threshold)
    value = {"file": args.out, "threshold": args.threshold, "layers": [vars(each) for each in found]}
    rows = [(each.layer, each.width, each.kept, each.width - each.kept, each.nearest) for each in found]
    text = table(("layer", "width", "kept", "removed", "nearest eigenvalue"), rows)
    common.emit(value, f"{text}\n{args.out}", args.json)
    for each in found:
        if each.ambiguous:
            common.note(
                f"layer {each.layer}: {each.ambiguous} eigenvalue(s) lie within 1e-6 of the threshold, so another "
                "program may find another rank; choose a threshold further away"
            )
    return 0
