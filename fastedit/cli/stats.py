"""``fastedit stats``: collect the key statistics that most weight editors need."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FasteditError
from ..models.loading import load_model
from ._table import table

if TYPE_CHECKING:
    from ..stats import Statistics

_EXAMPLES = """\
examples:
  fastedit stats gpt2-xl --texts wiki.jsonl.gz
      layers and number of tokens chosen for the model; kept where "fastedit edit" finds them
  fastedit stats ./llama --texts a.txt b.txt --layers 4-8 --tokens 200000 --out stats/llama
      one file per layer in stats/llama
  fastedit stats meta-llama/Meta-Llama-3-8B --texts wiki.jsonl --layers 4-8 --profile official \\
      --format easyedit --out data/stats
      the files that EasyEdit and AlphaEdit read, over the sample their own code would use
  torchrun --nproc-per-node 8 -m fastedit stats MODEL --texts wiki.jsonl
      eight GPUs share the texts
  zcat corpus.gz | fastedit stats MODEL --texts -
      texts from standard input, parted by empty lines
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = subparsers.add_parser(
        "stats",
        help="collect the activation statistics that ROME, MEMIT, AlphaEdit and NSE need",
        description="Collect the second moment of the inputs of MLP output projections, over plain text, in "
        "one pass for all layers. An interrupted run goes on where it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face name of a causal language model")
    add(
        "--texts",
        nargs="+",
        metavar="FILE",
        help=".txt (paragraphs), .json, .jsonl, each also .gz, or - for standard input; "
        "default: the packaged neutral text, which is short",
    )
    add("--layers", metavar="4-8", help='like "4-8", "3,5,7" or "all"; default: those that MEMIT edits')
    add("--tokens", type=int, metavar="N", help="tokens to use; default: ten times the width of the keys")
    add("--max-length", type=int, metavar="N", help="tokens kept of each text; default: 1024")
    add("--batch-tokens", type=int, metavar="N", help="tokens in one forward pass; default: 8192")
    add("--out", metavar="DIR", help="folder for the files; default: the cache, where the editors look")
    add(
        "--format",
        choices=("fastedit", "memit", "easyedit"),
        default="fastedit",
        help="fastedit: safetensors; memit, easyedit: the .npz files those libraries read, under their names",
    )
    add(
        "--dataset",
        choices=("wikipedia", "wikitext"),
        default="wikipedia",
        help="in .npz file names: mom2_dataset in that library's settings",
    )
    add(
        "--sample-size",
        type=int,
        default=100_000,
        metavar="N",
        help="in .npz file names: mom2_n_samples in that library's settings; default: 100000",
    )
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="use what is there already")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        default="auto",
        help="precision of the model; auto: as it was saved. Sums are float64 in any case",
    )
    add("--device", default="auto", help='"auto", "cpu", "cuda:1", or "map" to spread a big model')
    add(
        "--accumulate-on",
        metavar="DEVICE",
        help='"cpu" if the sums (8 d² bytes a layer) do not fit beside it',
    )
    add("--seed", type=int, metavar="N", help="shuffle the texts with this seed; default: as they come")
    add(
        "--profile",
        choices=("clean", "official"),
        default="clean",
        help="official: the sample, text lengths and packing of the published code",
    )
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    try:
        return _run(args)
    except FasteditError:
        raise
    except (FileNotFoundError, ValueError) as error:
        print(f"fastedit stats: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from ..stats import read_texts
    from ..stats.cache import cache_place, collect_and_save, load_cached, neutral_texts
    from ..stats.distributed import joined, local_device

    if args.out is None and args.format != "fastedit":
        raise ValueError(
            f"--format {args.format} writes where that library looks: give its folder with --out"
        )
    texts: Any = read_texts(*args.texts) if args.texts else neutral_texts()
    device = str(local_device()) if args.device == "auto" else args.device
    with joined() as group:
        model, tokenizer = load_model(args.model, args.dtype, device)
        layers = layers_of(args.layers, model)
        settings = _settings(args)
        if args.out is None:
            texts = list(texts)
            directory = cache_place(model, tokenizer, texts, **settings)
        else:
            directory = Path(args.out)
        statistics = load_cached(directory, layers, model) if args.out is None and args.resume else None
        if statistics is None:
            statistics = collect_and_save(
                model,
                tokenizer,
                texts,
                layers=layers,
                directory=directory,
                save=partial(_save, args=args),
                resume=args.resume,
                accumulate_on=args.accumulate_on,
                **settings,
            )
        if group.rank == 0:
            files = {layer: _file(statistics[layer], directory, args) for layer in layers}
            print(_json(statistics, files) if args.json else _table(statistics, files))
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``collect`` that decide the result; those left at their default stay out."""
    settings: dict[str, Any] = {
        "n_tokens": args.tokens,
        "max_length": args.max_length,
        "batch_tokens": args.batch_tokens,
        "profile": None if args.profile == "clean" else args.profile,
    }
    if args.seed is not None:
        settings.update(shuffle=True, seed=args.seed)
    return {name: value for name, value in settings.items() if value is not None}


def layers_of(text: str | None, model: Any, method: str = "memit") -> list[int]:
    """The layers that ``--layers`` names; None stands for those that ``method`` edits in this model."""
    from ..models import describe

    description = describe(model)
    if text is None:
        from ..editors.base import editor_class
        from ..editors.params import resolve_params

        return list(resolve_params(method, editor_class(method).Params, description, None).layers)
    if text == "all":
        return list(range(description.n_layers))
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f'--layers must be like "4-8", "3,5,7" or "all", got {text!r}')
        layers.update(range(int(first), int(last or first) + 1))
    if not layers or max(layers) >= description.n_layers:
        raise ValueError(f"--layers {text}: the model has layers 0 to {description.n_layers - 1}")
    return sorted(layers)


def _save(statistics: dict[int, Statistics], directory: Path, *, args: argparse.Namespace) -> None:
    for entry in statistics.values():
        path = _file(entry, directory, args)
        if args.format == "fastedit":
            entry.save(path)
        else:
            entry.to_npz(path, sample_size=args.sample_size)


def _file(entry: Statistics, directory: Path, args: argparse.Namespace) -> Path:
    from ..stats import npz_path
    from ..stats.statistics import layer_file

    if args.format == "fastedit":
        return directory / layer_file(entry.layer)
    return npz_path(
        directory,
        args.model.rstrip("/"),
        entry.module,
        style=args.format,
        dataset=args.dataset,
        sample_size=args.sample_size,
    )


def _json(statistics: dict[int, Statistics], files: dict[int, Path]) -> str:
    rows = [
        {
            "layer": layer,
            "module": entry.module,
            "width": entry.d_in,
            "tokens": entry.count,
            "file": str(files[layer]),
            "meta": entry.meta,
        }
        for layer, entry in sorted(statistics.items())
    ]
    return json.dumps({"statistics": rows}, indent=2)


def _table(statistics: dict[int, Statistics], files: dict[int, Path]) -> str:
    rows = [
        (layer, entry.d_in, entry.count, str(files[layer])) for layer, entry in sorted(statistics.items())
    ]
    return table(("layer", "width", "tokens", "file"), rows)
