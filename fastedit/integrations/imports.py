"""Acting on modules when they have been loaded, and running a user's script in two steps."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any


class ImportHook(importlib.abc.MetaPathFinder):
    """Calls ``meet(module)`` as soon as one of the named modules has been loaded.

    Args:
        names: full names of the modules.
        meet: what is done with each.
    """

    def __init__(self, names: Collection[str], meet: Callable[[ModuleType], object]) -> None:
        self.names = frozenset(names)
        self.meet = meet

    def install(self) -> None:
        """Begin, before all other finders."""
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stop; nothing happens if it was stopped already."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification that the other finders give, with a loader that calls ``meet`` afterwards."""
        if fullname not in self.names:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (each.find_spec(fullname, path, target) for each in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.meet)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that loads like another one and then reports the module."""

    def __init__(self, loader: Any, meet: Callable[[ModuleType], object]) -> None:
        self.loader = loader
        self.meet = meet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.meet(module)
