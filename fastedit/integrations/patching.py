"""Replacing functions of another project, and putting them back.

A :class:`Point` names a function, the function that makes our replacement, and the functions whose work the
replacement does along with it. It is replaced only if all of them are versions that are known (parameters and
source); else it is left alone, and the report says so. A replacement that meets an input it does not cover
raises :class:`NotCovered` before it changes anything; the original then answers, and the call is counted.

These projects import functions by value, so a replaced function is rebound wherever the project's modules, and
the dictionaries at their top level, hold the original object.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .imports import ImportHook
from .report import PointReport, Report
from .sources import source_hash, wrappings

Known = Mapping[str, Mapping[str, str]]  # "module:function" -> source hash -> label of the version
_ORIGINAL = "__fastedit_original__"


class NotCovered(Exception):
    """Raised by a replacement, before it changes anything: the original must answer this call."""


@dataclass(frozen=True)
class Context:
    """What a replacement is made from.

    Attributes:
        original: the function it replaces.
        version: the label of the known version that was met.
        used: by path, the label of each function that the replacement stands for besides.
        fix: names of the corrections that are wanted; without them the original's numbers are kept.
        verbose: print what the original prints, once for each request or layer.
        note: adds a line to the report.
    """

    original: Callable[..., Any]
    version: str
    used: Mapping[str, str]
    fix: frozenset[str]
    verbose: bool
    note: Callable[[str], None]

    @property
    def namespace(self) -> dict[str, Any]:
        """The globals of the original's module, as they are now: its caches and settings."""
        return globals_of(self.original)


@dataclass(frozen=True)
class Point:
    """One function of another project that can be replaced.

    Attributes:
        name: ``"module:function"`` or ``"module:Class.method"``.
        make: gives the replacement, which takes the original's arguments and returns what it returns.
        uses: the functions that the replacement stands for besides: dotted paths, each step a global name in the
            function before it or an attribute of the module or class before it, such as
            ``"compute_ks.get_module_input_output_at_words"``.
    """

    name: str
    make: Callable[[Context], Callable[..., Any]]
    uses: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module that defines it."""
        return self.name.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Dotted path inside the module."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Binding:
    """One place that held an original: ``container[key]``, or an attribute if the container is no dict."""

    container: Any
    key: Any
    old: Any
    new: Any

    def undo(self) -> None:
        """Put the old object back, if the new one is still there."""
        if isinstance(self.container, dict):
            if self.container.get(self.key) is self.new:
                self.container[self.key] = self.old
        elif getattr(self.container, self.key, None) is self.new:
            setattr(self.container, self.key, self.old)


def accelerate_project(
    title: str,
    points: Sequence[Point],
    known: Known,
    *,
    root: Callable[[ModuleType], Path | None],
    fix: Collection[str] = (),
    fixes: Collection[str] = (),
    verbose: bool = False,
) -> Report:
    """Replace points in the modules that are loaded, and in others when they are loaded.

    Args:
        title: heads the report.
        points: what can be replaced.
        known: versions of the points and of what they use.
        root: for a module that defines a point, the folder of the project it belongs to; None if it is another
            project's module of the same name, which is left alone.
        fix: names of the corrections wanted.
        fixes: names of the corrections there are.
        verbose: see :class:`Context`.

    Raises:
        ValueError: a correction that there is none of.
    """
    unknown = sorted(set(fix) - set(fixes))
    if unknown:
        raise ValueError(
            f"fix: there is no {', '.join(unknown)}; there are {', '.join(sorted(fixes)) or 'none'}"
        )
    return _Patch(title, points, known, root, frozenset(fix), verbose).report


def meet_main(name: str) -> None:
    """Replace the points of module ``name`` in the main script, which is being run under that name."""
    for patch in list(_active):
        if name in patch.points:
            patch.meet(sys.modules["__main__"], name)


_active: list[_Patch] = []


class _Patch:
    """The replaced points of one call of :func:`accelerate_project`."""

    def __init__(
        self,
        title: str,
        points: Sequence[Point],
        known: Known,
        root: Callable[[ModuleType], Path | None],
        fix: frozenset[str],
        verbose: bool,
    ) -> None:
        self.known, self.root, self.fix, self.verbose = known, root, fix, verbose
        self.report = Report(title, self.restore)
        self.points: dict[str, list[Point]] = {}
        for point in points:
            self.points.setdefault(point.module, []).append(point)
        self.bindings: list[Binding] = []
        self.roots: set[Path] = set()
        self.hook = ImportHook(self.points, self.meet)
        for name in self.points:
            if name in sys.modules:
                self.meet(sys.modules[name])
        self.hook.install()
        _active.append(self)

    def meet(self, module: ModuleType, name: str | None = None) -> None:
        """Replace the points of a module that is loaded; ``name`` if it is known by another than its own."""
        root = self.root(module)
        if root is None:
            return
        self.roots.add(root.resolve())
        swaps: dict[int, tuple[Any, Any]] = {}
        for point in self.points[name or module.__name__]:
            entry = PointReport(point.name)
            self.report.points[point.name] = entry
            try:
                owner, key, original = _find(module, point.attribute)
                used = {path: follow(original, path) for path in point.uses}
                entry.version = self._version(original, point.name)
                labels = {path: self._version(function) for path, function in used.items()}
            except _Unknown as reason:
                entry.skipped = str(reason)
                continue
            context = Context(original, entry.version, labels, self.fix, self.verbose, self.report.note)
            new = _wrapper(original, point.make(context), used, entry)
            if isinstance(owner, type):
                setattr(owner, key, new)
                self.bindings.append(Binding(owner, key, original, new))
            else:
                swaps[id(original)] = original, new
        self.bindings += rebind(swaps, self._modules(module))

    def restore(self) -> None:
        """Put the originals back, also in modules that were loaded since, and load others unchanged."""
        self.hook.remove()
        if self in _active:
            _active.remove(self)
        swaps = {id(each.new): (each.new, each.old) for each in self.bindings}
        for binding in reversed(self.bindings):
            binding.undo()
        rebind(swaps, self._modules())
        self.bindings = []

    def _version(self, function: Any, name: str | None = None) -> str:
        """The label of a function's version; _Unknown if there is none."""
        name = name or f"{function.__module__}:{function.__qualname__}"
        try:
            digest, wrapped = source_hash(function), wrappings(function)
        except (OSError, TypeError) as error:
            raise _Unknown(f"unknown version: the source of {name} cannot be read ({error})") from None
        if wrapped:
            raise _Unknown(f"{name} was wrapped by somebody else")
        label = self.known.get(name, {}).get(digest)
        if label is None:
            raise _Unknown(f"unknown version of {name} (source {digest})")
        return label

    def _modules(self, *more: ModuleType) -> Iterator[ModuleType]:
        """The loaded modules of the projects met, the user's main script, and ``more``."""
        for module in {id(each): each for each in (*more, *sys.modules.values())}.values():
            if isinstance(module, ModuleType) and (
                module in more or module.__name__ == "__main__" or self._belongs(vars(module).get("__file__"))
            ):
                yield module

    def _belongs(self, file: Any) -> bool:
        return isinstance(file, str) and any(
            _resolved(file).startswith(f"{root}{os.sep}") for root in self.roots
        )


class _Unknown(Exception):
    """A point that is left alone; the reason is the message."""


def rebind(swaps: Mapping[int, tuple[Any, Any]], modules: Iterator[ModuleType]) -> list[Binding]:
    """Put new objects in the place of old ones, in modules and in the dictionaries at their top level.

    Lists and tuples that are values of such a dictionary are looked into as well; a tuple is made anew.

    Args:
        swaps: id of the old object -> old, new.
        modules: where to look.

    Returns:
        The places.
    """
    found: list[Binding] = []

    def look(container: dict[Any, Any], deeper: bool) -> None:
        for key, value in list(container.items()):
            if id(value) in swaps:
                put(container, key, value, swaps[id(value)][1])
            elif deeper and type(value) is dict:
                look(value, False)
            elif type(value) in (tuple, list) and any(id(each) in swaps for each in value):
                put(container, key, value, type(value)(swaps.get(id(x), (x, x))[1] for x in value))

    def put(container: dict[Any, Any], key: Any, old: Any, new: Any) -> None:
        container[key] = new
        found.append(Binding(container, key, old, new))

    if swaps:
        for module in modules:
            look(vars(module), True)
    return found


def unwrapped(function: Any) -> Any:
    """The original behind a function of ours; any other object itself."""
    return getattr(function, _ORIGINAL, function)


def globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The globals of the module in which a function was written, behind its decorators."""
    return inspect.unwrap(function).__globals__


def _find(module: ModuleType, path: str) -> tuple[Any, str, Any]:
    """Owner, name and object of a dotted path in a module."""
    *owners, key = path.split(".")
    owner: Any = module
    for name in owners:
        owner = getattr(owner, name, None)
    found = vars(owner).get(key) if owner is not None else None
    if not callable(found):
        raise _Unknown(f"{module.__name__} has no function {path}")
    if unwrapped(found) is not found:
        raise _Unknown("it is replaced already")
    return owner, key, found


def follow(function: Any, path: str) -> Any:
    """The original of what a dotted path of global names and attributes leads to, from a function."""
    found = function
    for name in path.split("."):
        found = unwrapped(found)
        if inspect.isfunction(found):
            found = globals_of(found).get(name)
        else:
            found = getattr(found, name, None)
        if found is None:
            raise _Unknown(f"unknown version: {function.__qualname__} has no {path}")
    return unwrapped(found)


def _wrapper(
    original: Callable[..., Any], ours: Callable[..., Any], used: Mapping[str, Any], entry: PointReport
) -> Callable[..., Any]:
    """What is called instead of the original: ours, or the original where ours does not cover the call."""

    @functools.wraps(original)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            for path, function in used.items():
                if follow(original, path) is not function:
                    raise NotCovered(f"{path} was replaced by somebody else")
            answer = ours(*args, **kwargs)
        except (NotCovered, _Unknown) as reason:
            entry.fell_back[str(reason)] += 1
        else:
            entry.calls += 1
            entry.seconds += time.perf_counter() - start
            return answer
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            entry.original_seconds += time.perf_counter() - start

    setattr(accelerated, _ORIGINAL, original)
    return accelerated


@functools.cache
def _resolved(file: str) -> str:
    return os.path.realpath(file)
