"""``fastedit export``: an edited model for other programs, or a LoRA adapter."""

from __future__ import annotations

import argparse
import json

from .apply import count

_EXAMPLES = """\
examples:
  fastedit export france-lyon --model models/gpt2 --out gpt2-lyon --format full
      a whole model directory that any program loads
  fastedit export france-lyon --model models/gpt2 --out lyon-lora --format lora
      a LoRA adapter: peft.PeftModel.from_pretrained(model, "lyon-lora")
  fastedit export first second --model models/gpt2 --out gpt2-two --format full --dtype bfloat16
      two edits, one on top of the other, with the weights in bfloat16

The model stays as it is. To change a model so that it can be reverted, use `fastedit apply`.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = subparsers.add_parser(
        "export",
        help="write an edited model for other programs, or a LoRA adapter",
        description="Write an edited model as a directory of its own, or edits as a PEFT LoRA adapter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("edits", metavar="EDIT_DIR", nargs="+", help="the directories of the edits, in order")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model's directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--format", choices=["full", "lora"], default="full", help="what to write (default: full)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the weights of --format full (default: as they are)",
    )
    parser.add_argument("--force", action="store_true", help="also apply edits made on other weights")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ..artefacts import export, load_edit

    edits = [load_edit(directory) for directory in args.edits]
    out = export(
        edits,
        args.model,
        args.out,
        format=args.format,
        dtype=args.dtype,
        force=args.force,
        overwrite=args.overwrite,
        device=args.device,
    )
    if args.json:
        ids = [edit.id for edit in edits]
        print(json.dumps({"out": str(out), "format": args.format, "edits": ids}, indent=2))
    else:
        what = "The edited model" if args.format == "full" else "The LoRA adapter"
        print(f"{what} with {count(len(edits), 'edit')} is in {out}.")
    return 0
