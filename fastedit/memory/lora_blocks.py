"""Blocks of low-rank changes at several projections, one block for each sample of a batch (Yu et al. 2024, MELO)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FIRST_ROOM = 8  # blocks that a buffer begins with

Factors = Mapping[int, tuple[Tensor, Tensor]]
"""By layer: A (d_in, rank) and B (rank, d_out), fp32."""


class LoraBlocks:
    """For each layer A (n, d_in, rank) and B (n, rank, d_out), fp32, in arrays of doubling capacity.

    Args:
        scale: what a block's product A B is multiplied by.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._a: dict[int, Tensor] = {}
        self._b: dict[int, Tensor] = {}
        self.n = 0

    def __len__(self) -> int:
        return self.n

    @property
    def n_bytes(self) -> int:
        """Bytes held, room to grow included."""
        return sum(t.nbytes for t in (*self._a.values(), *self._b.values()))

    def append(self, factors: Factors) -> None:
        """Add a block."""
        for layer, (a, b) in factors.items():
            for held, new in ((self._a, a), (self._b, b)):
                rows = held.get(layer, new.new_empty(0, *new.shape, dtype=torch.float32))
                if self.n == len(rows):
                    rows = torch.cat((rows, rows.new_empty(max(_FIRST_ROOM, self.n), *new.shape)))
                rows[self.n] = new.to(rows)
                held[layer] = rows
        self.n += 1

    def truncate(self, n: int) -> None:
        """Keep the first n blocks."""
        self.n = n

    def change(self, layer: int, inputs: Tensor, index: Tensor) -> Tensor:
        """What each sample's block adds to a projection's output.

        Args:
            layer: the projection's block.
            inputs: (B, T, d_in), any floating dtype.
            index: (B,) the samples' blocks; a negative one stands for any.

        Returns:
            (B, T, d_out), fp32.
        """
        for held in (self._a, self._b):
            held[layer] = held[layer].to(inputs.device)
        index = index.to(inputs.device).clamp(min=0)
        return low_rank_change(inputs, self._a[layer][index], self._b[layer][index], self.scale)


def low_rank_change(inputs: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The product scale · x A B, fp32: x (..., T, d_in), A (..., d_in, rank), B (..., rank, d_out)."""
    return scale * (inputs.float() @ a @ b)
