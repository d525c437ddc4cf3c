"""Telling versions of somebody else's function apart: by its parameters and the text of its source."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def source_hash(function: Callable[..., Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 over a function's parameter names and source.

    Comments on lines of their own, empty lines and blanks at the ends of lines do not count; everything else does,
    decorators included.

    Raises:
        OSError: the source cannot be found.
        TypeError: it is not a function written in Python.
    """
    return _hash(inspect.signature(function).parameters, inspect.getsource(function))


def hashes_in(source: str) -> dict[str, str]:
    """Qualified name -> :func:`source_hash` of all functions of a module and methods of its classes, from its text.

    What is needed to enter a version into a table of known ones, without loading its code.
    """
    lines = source.splitlines()

    def functions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node

    found = {}
    for name, node in functions(ast.parse(source).body, ""):
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        found[name] = _hash(_parameters(node.args), "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def wrappings(function: Callable[..., Any]) -> int:
    """How often a function was wrapped at run time, beyond the decorators that its source shows."""
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    if not count:
        return 0
    first = textwrap.dedent(inspect.getsource(function)).splitlines()
    shown = next((number for number, line in enumerate(first) if not line.startswith("@")), 0)
    return max(0, count - shown)


def _hash(parameters: Iterable[str], source: str) -> str:
    lines = [line.rstrip() for line in textwrap.dedent(source).splitlines()]
    counted = [line for line in lines if line and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join([", ".join(parameters), *counted]).encode()).hexdigest()[:16]


def _parameters(given: ast.arguments) -> list[str]:
    """Names in the order in which ``inspect.signature`` lists them."""
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    if given.vararg is not None:
        names.append(given.vararg.arg)
    names += [each.arg for each in given.kwonlyargs]
    if given.kwarg is not None:
        names.append(given.kwarg.arg)
    return names
