"""Solves that preserve the keys of earlier batches, by a dual factor that follows the editor's history."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..ops import DualSolver
from .history import KeyHistory


class SequentialSolver:
    """One layer's (εI + G Gᵀ + F Fᵀ)⁻¹F, where G holds the features of all batches in a history.

    A batch costs what its n columns cost, whatever the width d: the triangular factor of εI + GᵀG grows by n
    rows a batch and is cut back when batches are taken off.

    Args:
        d: number of rows of features.
        ridge: ε.
        features: from keys (d_in, n) to features (d, n).
    """

    def __init__(self, d: int, ridge: float, features: Callable[[Tensor], Tensor]) -> None:
        self.dual = DualSolver(d, ridge)
        self._features = features
        self._batches: list[tuple[str, int]] = []  # name and first column of each stored batch

    def solve(self, keys: Tensor, residual: Tensor, history: KeyHistory, layer: int) -> tuple[Tensor, Tensor]:
        """Left R S⁻¹ (d_out, n) and right Y (d, n) of the update in feature space, fp64.

        Args:
            keys: (d_in, n).
            residual: (d_out, n).
            history: the batches to preserve.
            layer: whose keys of the history count.

        Raises:
            NumericalError: the batch's system is not positive definite; names the smallest pivot.
        """
        self._follow(history, layer)
        right, factor = self.dual.solve(self._features(keys))
        return self.dual.divide(residual, factor), right

    def _follow(self, history: KeyHistory, layer: int) -> None:
        """Make the stored batches those of the history."""
        names = history.ids
        same = 0
        while same < min(len(names), len(self._batches)) and names[same] == self._batches[same][0]:
            same += 1
        if same < len(self._batches):
            self.dual.truncate(self._batches[same][1])
            del self._batches[same:]
        for name, batch in zip(names[same:], history.batches[same:], strict=True):
            start = self.dual.rank
            self.dual.append(self._features(batch.keys[layer]))
            self._batches.append((name, start))
