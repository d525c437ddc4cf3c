"""``fastedit edit``: write a list of facts into a model, measure it, and keep the edit."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidFact
from ..facts import Fact, validate_facts
from ..models.loading import load_model, model_folder
from . import common
from ._table import table

if TYPE_CHECKING:
    from ..artefacts import Edit
    from ..memory.edit import MemoryEdit

_EXAMPLES = """\
  fastedit edit gpt2-xl --fact "The capital of {France} is -> Lyon" --out lyon
      one fact; braces mark the subject
  fastedit edit ./model --facts facts.csv --out edits --save-model edited-model
      a file of facts, and the edited model beside the edit; "fastedit revert edited-model" undoes it
  fastedit edit ./model --facts counterfact.json.gz --limit 100 --batch-size 10 --out edits
      the first 100 records of CounterFact, in ten batches, each its own edit
  fastedit edit ./model --facts facts.json --method rome --set layers=5 clamp=3 --out edit
      another method, and two of its hyper-parameters
  fastedit edit ./model --facts monday.csv --method alphaedit --state state --out monday --save-model edited
  fastedit edit edited --facts tuesday.csv --method alphaedit --state state --out tuesday --save-model edited-2
      a sequence over several days: AlphaEdit goes on preserving Monday's facts

facts files: .json, .jsonl or .csv, also .gz, with the fields prompt, subject and target_new (a prompt without
{} must contain its subject), or the files of CounterFact, zsRE and other public data sets as they are.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of ``fastedit``."""
    parser = common.subcommand(
        subparsers,
        "edit",
        "write facts into a model",
        "Write facts into a model. The model on disk is not touched: the edit is kept in a folder of its own, "
        "from which it can be applied, reverted and exported; --save-model writes an edited copy as well.",
        _EXAMPLES,
    )
    common.add_model_options(parser)
    add = parser.add_argument
    add("--facts", metavar="FILE", help="the facts: json, jsonl or csv, or a public data set's own file")
    add("--fact", action="append", default=[], metavar="TEXT", help='"The capital of {France} is -> Lyon"')
    add("--limit", type=int, metavar="N", help="only the first N facts")
    add("--batch-size", type=int, metavar="N", help="edit N facts at a time; default: all together")
    add("--out", metavar="DIR", required=True, help="folder for the edit; must not exist")
    add("--save-model", metavar="DIR", help="also write the edited model to this new folder")
    add(
        "--state",
        metavar="DIR",
        help="go on from the state in this folder, if there is one, and keep the new one there",
    )
    add_editor_options(parser)
    parser.set_defaults(run=run)


def add_editor_options(parser: Any) -> None:
    """Options that choose and set up an editing method."""
    add = parser.add_argument
    add("--method", default="memit", help="editing method; fastedit info lists them (default: memit)")
    add("--params", metavar="FILE", help="hyper-parameters, a JSON file")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="single hyper-parameters")
    add("--stats", metavar="DIR", help="key statistics made by fastedit stats; default: collected and cached")
    add(
        "--profile",
        choices=("clean", "official", "paper"),
        default="clean",
        help="where code and papers differ",
    )
    add(
        "--on-known",
        choices=("warn", "skip", "error"),
        default="warn",
        help="facts the model already answers",
    )
    add("--seed", type=int, default=0, help="of everything that is sampled (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status."""
    for place in (args.out, args.save_model):
        if place is not None and Path(place).exists():
            raise FileExistsError(f"{place} exists already: choose a new folder")
    facts = read_facts(args)
    started = time.perf_counter()
    folder = model_folder(args.model) if args.save_model else None
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    editor = make_editor(args, model, tokenizer)
    if args.state and Path(args.state).exists():
        editor.load_state(args.state)
    loaded = time.perf_counter()

    answers = {"before": answer(model, tokenizer, facts)}
    edits = [editor.edit(batch) for batch in batches(facts, args.batch_size)]
    edited = time.perf_counter()
    answers["after"] = answer(model, tokenizer, facts)
    rows = _rows(facts, answers)
    measured = {"n_facts": len(facts), "n_now_right": sum(row["right"] for row in rows), "rows": rows}
    edits[-1].measured["answers"] = measured
    edits = [edit for edit in edits if not getattr(edit, "released", False)]  # held by a later one
    places = save_edits(edits, Path(args.out))
    if args.state:
        editor.save_state(args.state)
    if folder is not None:
        _save_model(places, folder, Path(args.save_model))
    value = {
        "edits": [{"id": edit.id, "folder": str(place)} for edit, place in zip(edits, places, strict=True)],
        "model": str(args.save_model) if args.save_model else None,
        "method": args.method,
        "params": edits[0].params,
        "seconds": {"load": round(loaded - started, 3), "edit": round(edited - loaded, 3)},
        **measured,
    }
    common.emit(value, _text(value, args), args.json)
    return 0


def read_facts(args: argparse.Namespace) -> list[Fact]:
    """The facts of ``--facts`` and ``--fact``.

    Raises:
        InvalidFact: there are none, or one is not usable.
    """
    from ..data import load_facts, parse_fact

    facts = list(load_facts(args.facts)) if args.facts else []
    facts += [parse_fact(text) for text in args.fact]
    if not facts:
        raise InvalidFact(
            'no facts: give a file with --facts, or --fact "The capital of {France} is -> Lyon"'
        )
    facts = facts[: args.limit]
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    return [fact for batch in batches(facts, args.batch_size) for fact in validate_facts(batch)]


def batches(facts: Sequence[Fact], size: int | None) -> list[Sequence[Fact]]:
    """The facts in batches of ``size``; None makes one batch."""
    size = size or len(facts)
    return [facts[start : start + size] for start in range(0, len(facts), size)]


def make_editor(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """The editor that the options of :func:`add_editor_options` describe."""
    from ..editors import editor, editor_class
    from ..editors.locate_then_edit import LocateThenEdit
    from ..editors.rase import Rase
    from ..io import read_json

    params = dict(read_json(args.params)) if args.params else {}
    params.update(setting_values(args.set))
    options: dict[str, Any] = {"profile": args.profile, "seed": args.seed}
    kind = editor_class(args.method)
    if issubclass(kind, Rase) and args.stats:  # for the editor inside
        options["statistics"] = args.stats
    elif issubclass(kind, LocateThenEdit):
        options["on_known"] = args.on_known
        if args.stats:
            options["statistics"] = args.stats
    elif args.stats or args.on_known != "warn":
        raise ValueError(f"{args.method} uses neither --stats nor --on-known")
    return editor(args.method, model, tokenizer, params=params or None, **options)


def setting_values(settings: Sequence[str]) -> dict[str, Any]:
    """Hyper-parameters from ``NAME=VALUE`` arguments."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set wants NAME=VALUE, got {setting!r}")
        found[name.strip().replace("-", "_")] = _value(name.strip(), value)
    return found


def _value(name: str, text: str) -> Any:
    """A hyper-parameter from the command line: JSON, or layers as ``4-8`` and ``3,5``."""
    if name == "layers":
        layers: list[int] = []
        for part in text.strip("[]()").split(","):
            first, dash, last = part.strip().partition("-")
            layers += range(int(first), int(last if dash else first) + 1)
        return layers
    try:
        return json.loads(text)
    except ValueError:
        return text


def answer(model: Any, tokenizer: Any, facts: Sequence[Fact], max_new_tokens: int = 12) -> list[str]:
    """What the model says to each fact's prompt, greedily."""
    from ..evaluation.generation import Generator

    generator = Generator(model, tokenizer, chat=False)
    said = generator.greedy([fact.text for fact in facts], max_new_tokens=max_new_tokens)
    return [getattr(each, "text", "") for each in said]


def save_edits(edits: Sequence[Edit | MemoryEdit], out: Path) -> list[Path]:
    """Save one edit as ``out`` itself, several as ``out/001``, ``out/002`` and so on; all or nothing."""
    from ..io import atomic_directory

    if len(edits) == 1:
        return [edits[0].save(out)]
    names = [f"{number:03d}" for number in range(1, len(edits) + 1)]
    with atomic_directory(out) as temporary:
        for name, edit in zip(names, edits, strict=True):
            edit.save(temporary / name)
    return [out / name for name in names]


def _save_model(places: Sequence[Path], folder: Path, out: Path) -> None:
    from ..artefacts import apply_to_directory

    apply_to_directory(places[0], folder, out=out)
    for place in places[1:]:
        apply_to_directory(place, out)


def _rows(facts: Sequence[Fact], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    rows = []
    for fact, before, after in zip(facts, answers["before"], answers["after"], strict=True):
        wanted = fact.target_new.strip()
        right = after.strip().casefold().startswith(wanted.casefold())
        rows.append({"prompt": fact.text, "target": wanted, "before": before, "after": after, "right": right})
    return rows


def _text(value: dict[str, Any], args: argparse.Namespace) -> str:
    shown = value["rows"][:20]
    rows = [
        (
            common.shorten(row["prompt"], 44),
            common.shorten(row["target"], 16),
            common.shorten(row["before"], 20),
            common.shorten(row["after"], 20),
            "yes" if row["right"] else "NO",
        )
        for row in shown
    ]
    lines = [table(("prompt", "wanted", "before", "after", "as wanted"), rows)]
    if len(shown) < value["n_facts"]:
        lines.append(f"... and {value['n_facts'] - len(shown)} more")
    per_fact = value["seconds"]["edit"] / value["n_facts"]
    lines += [
        "",
        f"{value['n_now_right']} of {value['n_facts']} facts are now answered as wanted "
        f"({value['seconds']['edit']:.1f} s, {per_fact:.2f} s a fact).",
        f"edit:  {args.out}" + (f" ({len(value['edits'])} batches)" if len(value["edits"]) > 1 else ""),
    ]
    if args.save_model:
        lines.append(f"model: {args.save_model}   undo: fastedit revert {args.save_model}")
    else:
        lines.append(f"next:  fastedit apply {value['edits'][0]['folder']} --model {args.model}")
    return "\n".join(lines)
