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

    @property
    def token_flops(self) -> int:
        """Multiplications and additions for each token, at all projections."""
        a = sum(2 * t.shape[1] * t.shape[2] for t in self._a.values())
        return a + sum(2 * t.shape[1] * t.shape[2] for t in self._b.values())

    def append(self, factors: Factors) -> None:
        """Add a block. Blocks of smaller rank are filled up with zeros."""
        for layer, (a, b) in factors.items():
            rank = max(a.shape[1], self._a[layer].shape[2] if layer in self._a else 0)
            for held, new in ((self._a, a), (self._b, b)):
                shape = (new.shape[0], rank) if held is self._a else (rank, new.shape[1])
                rows = held[layer] = self._with_room(held.get(layer), new, shape)
                rows[self.n] = 0
                rows[self.n, : new.shape[0], : new.shape[1]] = new.to(rows)
        self.n += 1

    def _with_room(self, rows: Tensor | None, new: Tensor, shape: tuple[int, int]) -> Tensor:
        """The array with room for one more block of this shape."""
        if rows is not None and self.n < len(rows) and rows.shape[1:] == shape:
            return rows
        room = max(_FIRST_ROOM, 2 * self.n)
        device = new.device if rows is None else rows.device
        wider = torch.zeros(room, *shape, device=device)
        if rows is not None:
            wider[: self.n, : rows.shape[1], : rows.shape[2]] = rows[: self.n]
        return wider

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
