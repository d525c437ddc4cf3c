"""Solvers that hold the keys of earlier batches, kept in step with an editor's history."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .history import KeyHistory


class Appendable(Protocol):
    """A solver of :mod:`fastedit.ops.solve` that stores keys."""

    @property
    def rank(self) -> int:
        """The number of keys stored."""

    def append(self, keys: Tensor) -> None:
        """Store keys (d, n)."""

    def truncate(self, k: int) -> None:
        """Keep the first ``k`` keys stored."""


class InStep:
    """Keeps one layer's solver at the batches of a history.

    A batch that was added is appended to the solver; where one was taken off, the solver is cut back to what lies
    before it and gets those after it again.
    """

    def __init__(self, solver: Appendable) -> None:
        self.solver = solver
        self._stored: list[tuple[str, int]] = []  # name and first key of each batch

    def follow(self, history: KeyHistory, layer: int) -> None:
        """Bring the solver to the batches of ``history``, with their keys in ``layer``."""
        names = history.ids
        same = 0
        while same < min(len(names), len(self._stored)) and names[same] == self._stored[same][0]:
            same += 1
        if same < len(self._stored):
            self.solver.truncate(self._stored[same][1])
            del self._stored[same:]
        for name, batch in zip(names[same:], history.batches[same:], strict=True):
            start = self.solver.rank
            self.solver.append(batch.keys[layer])
            self._stored.append((name, start))
