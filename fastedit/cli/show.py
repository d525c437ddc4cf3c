"""``fastedit show``: what a saved edit is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ._table import size_text, table
from .apply import count

if TYPE_CHECKING:
    from ..artefacts import Edit
    from ..memory.edit import MemoryEdit

_EXAMPLES = """\
examples:
  fastedit show france-lyon                method, model, matrices, ranks, norms
  fastedit show france-lyon --facts        the facts as well
  fastedit show france-lyon --json         everything, with parameters and measurements
"""
_FEW = 5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = subparsers.add_parser(
        "show",
        help="show what a saved edit is",
        description="Show what a saved edit is: its method, facts, matrices, ranks, norms and measurements.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("edit", metavar="EDIT_DIR", help="the directory of the edit")
    parser.add_argument("--facts", action="store_true", help=f"show all facts, not the first {_FEW} only")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from ..artefacts import Edit, load_edit

    edit = load_edit(args.edit)
    if not isinstance(edit, Edit):
        _show_memory(edit, args)
        return 0
    matrices = _matrices(edit)
    if args.json:
        content = {**edit.as_dict(), "rank": edit.rank, "bytes": edit.size_bytes, "changes": matrices}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    originals = "with originals" if edit._originals is not None else "without originals"
    print(
        f"Edit {edit.id}: {edit.method} ({edit.profile}), {count(len(edit.facts), 'fact')}, made "
        f"{edit.created[:19]} UTC"
    )
    print(
        f"made on model {edit.base_fingerprint}, seed {edit.seed}, {size_text(edit.size_bytes)}, "
        f"{originals}\n"
    )
    print(_facts(edit, None if args.facts else _FEW) + "\n")
    head = ["matrix", "shape", "dtype", "rank", "norm of the change"]
    print(table(head, [[m["name"], m["shape"], m["dtype"], m["rank"], f"{m['norm']:.4g}"] for m in matrices]))
    print(_measured(edit))
    return 0


def _show_memory(edit: MemoryEdit, args: argparse.Namespace) -> None:
    if args.json:
        content = {**edit.as_dict(), "rank": 0, "bytes": edit.size_bytes, "changes": []}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    print(
        f"Edit {edit.id}: {edit.method} ({edit.profile}), {count(len(edit.facts), 'fact')}, made "
        f"{edit.created[:19]} UTC"
    )
    print(
        f"made on model {edit.base.fingerprint}, seed {edit.seed}, {size_text(edit.size_bytes)}\n"
        f"a memory beside {_place(edit)}; no weight is changed\n"
    )
    print(_facts(edit, None if args.facts else _FEW))
    print(_measured(edit))


def _place(edit: MemoryEdit) -> str:
    size = f" ({edit.base.shape[0]} x {edit.base.shape[1]}, {edit.base.dtype})"
    return edit.place + ("" if edit.layer is None else size)


def _measured(edit: Edit | MemoryEdit) -> str:
    simple = {key: value for key, value in edit.measured.items() if not isinstance(value, (dict, list))}
    if not simple:
        return ""
    return "\n" + table(["measured", "value"], [[key, str(value)] for key, value in simple.items()])


def _facts(edit: Edit | MemoryEdit, limit: int | None) -> str:
    chosen = edit.facts[:limit]
    rows = [[f.text, f.target_new.strip(), (f.target_old or "").strip()] for f in chosen]
    text = table(["fact", "new answer", "old answer"], rows)
    more = len(edit.facts) - len(chosen)
    return text + (f"\n... and {more} more (--facts shows all)" if more else "")


def _matrices(edit: Edit) -> list[dict[str, Any]]:
    norms = edit.norms()
    rows = []
    for name, record in edit.matrices.items():
        shape = f"{record.shape[0]} x {record.shape[1]}"
        rank = edit.factors[name].rank if name in edit.factors else "dense"
        rows.append({"name": name, "shape": shape, "dtype": record.dtype, "rank": rank, "norm": norms[name]})
    return rows
