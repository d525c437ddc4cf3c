"""The keys of the batches that an editor has written, for methods that preserve what was written before.

A history follows the model: a batch whose edit has been taken off is forgotten, wherever it was in the sequence,
so that the next batch is solved as if it had never been.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PastBatch:
    """One batch.

    Attributes:
        edit_id: of its edit; empty for batches that came with a saved state and can no longer be taken off.
        keys: layer -> (d_in, n) fp32, the keys under the weights that the batch left.
    """

    edit_id: str
    keys: Mapping[int, Tensor]


class KeyHistory:
    """Keys by batch and layer, oldest batch first."""

    def __init__(self) -> None:
        self.batches: list[PastBatch] = []

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    @property
    def ids(self) -> list[str]:
        """One name for each batch, unique within the history."""
        return [batch.edit_id or f"restored {index}" for index, batch in enumerate(self.batches)]

    def follow(self, applied: Collection[str]) -> None:
        """Forget the batches whose edit is not among ``applied``, the ids of the edits on the model."""
        self.batches = [batch for batch in self.batches if not batch.edit_id or batch.edit_id in applied]

    def add(self, edit_id: str, keys: Mapping[int, Tensor]) -> None:
        """Append a batch."""
        self.batches.append(PastBatch(edit_id, dict(keys)))

    def keys(self, layer: int) -> Tensor | None:
        """(d_in, r): the keys of all batches side by side; None if there are none."""
        parts = [batch.keys[layer] for batch in self.batches]
        return torch.cat(parts, 1) if parts else None

    @property
    def bytes_per_layer(self) -> dict[int, int]:
        """Memory by layer."""
        sizes: dict[int, int] = {}
        for batch in self.batches:
            for layer, keys in batch.keys.items():
                sizes[layer] = sizes.get(layer, 0) + keys.nbytes
        return sizes
