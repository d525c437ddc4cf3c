"""Runs somebody's script or module as the interpreter would, with fastedit behind the functions it knows.

Started by ``fastedit accelerate``: ``python -m fastedit.integrations.runner OPTIONS -- -m package.module ...``, where
OPTIONS is a JSON object with ``fix``, ``verbose``, ``json`` and ``report``. The script is the process's main module,
with its own arguments, path and exit status. Functions that it defines itself are replaced as soon as they are
defined, before the rest of it runs.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import FasteditError
from .patching import meet, points_of
from .report import Report

FLAGS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


def split_command(command: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Interpreter, its own flags, and what it is to run: ``["-m", module, ...]`` or ``[script, ...]``.

    Raises:
        ValueError: no interpreter of Python, or nothing that it is to run.
    """
    if not command or not Path(command[0]).name.startswith("python"):
        raise ValueError(
            "give the command that you would type, such as: python -m experiments.evaluate --alg_name NSE; "
            f"got {' '.join(command) or 'nothing'}"
        )
    flags, rest = [], list(command[1:])
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c", "-"):
        flags.append(rest.pop(0))
        if flags[-1] in FLAGS_WITH_VALUE and rest:
            flags.append(rest.pop(0))
    if not rest or rest[0] in ("-c", "-") or (rest[0] == "-m" and len(rest) < 2):
        raise ValueError("the command must run a script, or a module with -m")
    return command[0], flags, rest


def child_command(
    interpreter: str, flags: Sequence[str], rest: Sequence[str], options: dict[str, Any]
) -> list[str]:
    """The command that runs ``rest`` under this module."""
    return [interpreter, *flags, "-m", "fastedit.integrations.runner", json.dumps(options), "--", *rest]


def main(argv: Sequence[str]) -> None:
    """Run ``argv[2:]`` with the options ``argv[0]``; leaves by the script's own exit."""
    from . import research

    options = json.loads(argv[0])
    report = research.accelerate(fix=options["fix"], verbose=options["verbose"])
    try:
        run(list(argv[2:]))
    finally:
        _tell(report, options)


def run(command: list[str]) -> None:
    """Run ``["-m", module, ...]`` or ``[script, ...]`` as the main module.

    Raises:
        FasteditError: there is no such script or module.
    """
    if command[0] == "-m":
        spec = _main_spec(command[1])
        sys.argv = [str(spec.origin), *command[2:]]
        if not sys.path or sys.path[0] not in ("", os.getcwd()):
            sys.path.insert(0, os.getcwd())
        _execute(Path(str(spec.origin)), command[1], spec)
    else:
        path = Path(command[0])
        if not path.is_file():
            raise FasteditError(f"there is no script {path}")
        sys.argv = list(command)
        sys.path[0:1] = [str(path.resolve().parent)]
        _execute(path, _name_of(path), None)


def _main_spec(name: str) -> importlib.machinery.ModuleSpec:
    """Where the code of ``python -m name`` is; that of a package is its ``__main__``."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise FasteditError(f"there is no module {name} that could be run in {os.getcwd()}")
    return spec


def _name_of(script: Path) -> str:
    """The name by which the points know a script, such as ``experiments.evaluate``; empty for others."""
    tail = script.resolve().with_suffix("").parts
    for name in points_of():
        parts = tuple(name.split("."))
        if tail[-len(parts) :] == parts:
            return name
    return ""


def _execute(path: Path, name: str, spec: importlib.machinery.ModuleSpec | None) -> None:
    """Execute the file as ``__main__``; its points are replaced behind the last definition of one."""
    module = ModuleType("__main__")
    module.__file__ = os.path.abspath(path)
    module.__spec__ = spec
    module.__package__ = None if spec is None else spec.parent
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = module
    tree = ast.parse(path.read_bytes(), str(path))
    defined = points_of().get(name, frozenset())
    last = max(
        (number + 1 for number, node in enumerate(tree.body) if getattr(node, "name", None) in defined),
        default=0,
    )
    flags = _future_flags(tree)

    def execute(body: list[ast.stmt]) -> None:
        code = compile(ast.Module(body, []), str(path), "exec", flags=flags, dont_inherit=True)
        exec(code, module.__dict__)

    if last:
        execute(tree.body[:last])
        meet(module, name)
    execute(tree.body[last:])


def _future_flags(tree: ast.Module) -> int:
    """The compiler's flags for ``from __future__`` imports, which hold for both parts of a file."""
    import __future__

    flags = 0
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
    return flags


def _tell(report: Report, options: dict[str, Any]) -> None:
    """The report, on standard error, where it is not mixed with what the script prints; and to a file."""
    text = json.dumps(report.as_dict(), indent=2) if options["json"] else str(report)
    print(text, file=sys.stderr, flush=True)
    if options["report"]:
        Path(options["report"]).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FasteditError as error:
        print(f"fastedit accelerate: {error}", file=sys.stderr)
        sys.exit(1)
