"""``fastedit targets``: the target values that the MEMIT, AlphaEdit and NSE repositories read from their caches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import CorruptFile
from ..models.loading import load_model
from . import common
from .edit import setting_values

# The harnesses keep the values of AlphaEdit under MEMIT's name; NSE has a folder of its own.
_ALGORITHMS = {"memit": "MEMIT", "alphaedit": "MEMIT", "nse": "NSE"}

_EXAMPLES = """\
  fastedit targets gpt2-xl --facts multi_counterfact.json --dataset mcf --method nse --layer 17 --out data/kvs
      what the NSE repository computes before its first edit; DIR is its KV_DIR
  fastedit targets ./llama --facts multi_counterfact.json --dataset mcf --limit 2000 --layer 8 \\
      --set lr=0.1 clamp=0.75 --out data/kvs
      for MEMIT and AlphaEdit with --use_cache; settings as in their hparams file

The harness uses any file of the right name, whatever it was made of. Here a folder is only added to if model,
tokenizer, settings and contexts are those that its *_fastedit.json names. Their own NSE run leaves out the space
before the target; these values are made with it.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "targets",
        "optimise target values ahead, into the caches of other repositories",
        "Optimise the target value of every fact, many at a time, and write one .npz a fact under the name the "
        "MEMIT, AlphaEdit and NSE repositories look for. An interrupted run goes on where it was.",
        _EXAMPLES,
    )
    common.add_model_options(parser)
    add = parser.add_argument
    add(
        "--facts", metavar="FILE", required=True, help="the facts: a data set's own file, or json, jsonl, csv"
    )
    add(
        "--dataset",
        metavar="NAME",
        default="mcf",
        help="the harness's --ds_name, in file names (default: mcf)",
    )
    add("--method", choices=sorted(_ALGORITHMS), default="memit", help="whose targets (default: memit)")
    add("--layer", type=int, metavar="L", help="the last layer edited; default: the method's for this model")
    add("--out", metavar="DIR", required=True, help="the repository's KV_DIR")
    add("--name", help="the model's name in the folder's name; default: MODEL with / as _")
    add("--limit", type=int, metavar="N", help="only the first N facts")
    add("--contexts", metavar="FILE", help="context templates, a JSON list; default: sampled from the model")
    add("--params", metavar="FILE", help="hyper-parameters, a JSON file")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="single hyper-parameters, such as lr=0.1")
    add("--batch-size", type=int, default=100, metavar="N", help="facts between two writes (default: 100)")
    add("--seed", type=int, default=0, help="of the contexts that are sampled (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status: 1 if a value could not be made."""
    from ..data import load_facts
    from ..editors.target_files import write_targets

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    facts = load_facts(args.facts)[: args.limit]
    contexts = _contexts(args.contexts)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    written = write_targets(
        _editor(args, model, tokenizer, contexts),
        facts,
        args.out,
        model_name=args.name or args.model.rstrip("/"),
        algorithm=_ALGORITHMS[args.method],
        dataset=args.dataset,
        batch_size=args.batch_size,
    )
    value = {
        "directory": str(written.directory),
        "made": [str(path) for path in written.made],
        "found": [str(path) for path in written.found],
        "failed": written.failed,
    }
    text = f"{len(written.made)} target values made, {len(written.found)} found, in {written.directory}"
    common.emit(value, text, args.json)
    for case, reason in written.failed.items():
        common.note(f"case {case} has no file: {reason}")
    return 1 if written.failed else 0


def _editor(args: argparse.Namespace, model: Any, tokenizer: Any, contexts: list[str] | None) -> Any:
    from ..editors import editor
    from ..io import read_json

    params = dict(read_json(args.params)) if args.params else {}
    params.update(setting_values(args.set))
    if args.layer is not None:
        params["layers"] = [args.layer]
    options: dict[str, Any] = {"seed": args.seed, "progress": False, "contexts": contexts}
    return editor(args.method, model, tokenizer, params=params or None, **options)


def _contexts(path: str | None) -> list[str] | None:
    from ..io import read_json

    if path is None:
        return None
    value = read_json(Path(path))
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise CorruptFile(f"{path} must hold a JSON list of templates with one {{}} each")
    return value
