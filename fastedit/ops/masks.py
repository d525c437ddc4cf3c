"""Sparse masks over the entries of a tensor that are never stored dense: by random words, packed bits or indices.

Entries are counted row by row of the tensor's own shape, whichever way it lies in memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend, check

BLOCK = 4096  # entries between two cached ranks, see Mask.offsets
_PIECE = 1 << 20  # entries that are dense at a time
_ONE = 1 << 32


class Mask(ABC):
    """A choice of entries of a tensor: :class:`PhiloxMask`, :class:`BitMask` or :class:`IndexMask`."""

    def bits(self, n: int, *, device: torch.device | str | None = None) -> Tensor:
        """The mask of ``n`` entries packed: (⌈n / 8⌉,) uint8; entry j is bit j % 8 of byte j // 8.

        What NumPy's ``packbits(..., bitorder="little")`` gives. Bits beyond ``n`` are 0.

        Raises:
            ValueError: it is a mask of another number of entries.
        """
        self.check_size(n)
        out = self._bits(n, device)
        if n % 8:
            out[-1:].bitwise_and_((1 << n % 8) - 1)
        return out

    def check_size(self, n: int) -> None:
        """Raise ValueError unless this can be a mask of ``n`` entries."""
        own = getattr(self, "n", n)
        if own != n:
            raise ValueError(f"{type(self).__name__}: this is a mask of {own} entries, the tensor has {n}")

    @abstractmethod
    def _bits(self, n: int, device: torch.device | str | None) -> Tensor:
        """A new tensor of packed bits, of which those beyond ``n`` may be anything."""

    def dense(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor: for tests and small tensors, everything else does without."""
        n = math.prod(shape)
        return _unpack_bits(self.bits(n, device=device), n).reshape(tuple(shape))

    def count(self, n: int, *, device: torch.device | str | None = None) -> int:
        """How many of ``n`` entries are selected."""
        return int(_counts(self.bits(n, device=device)).sum())

    def offsets(self, n: int, *, device: torch.device | str | None = None) -> tuple[Tensor, int]:
        """The number of selected entries before every 4096 of ``n``, (⌈n / 4096⌉,) int64, and in all."""
        counts = _counts(self.bits(n, device=device))
        ends = counts.cumsum(0)
        return ends - counts, int(ends[-1]) if n else 0

    def pack(self, values: Tensor) -> Tensor:
        """The selected entries of ``values`` in the order in which they are counted: (count,)."""
        parts = [flat[keep] for flat, keep in self._pieces(values)]
        return torch.cat(parts) if parts else values.new_empty(0)

    def unpack(self, packed: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
        """The inverse of :meth:`pack`: a tensor of ``shape`` with ``fill`` where nothing is selected."""
        out = torch.full(tuple(shape), fill, dtype=packed.dtype, device=packed.device)
        check.shape(
            "unpack", (self.count(out.numel(), device=out.device),), "as many as are selected", packed=packed
        )
        done = 0
        for flat, keep in self._pieces(out):
            count = int(keep.sum())
            flat[keep] = packed[done : done + count]
            done += count
        return out

    def _pieces(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive entries of a tensor and which of them are selected."""
        flat, n = values.reshape(-1), values.numel()
        self.check_size(n)
        bits = self.bits(n, device=values.device)
        for start in range(0, n, _PIECE):
            end = min(n, start + _PIECE)
            yield flat[start:end], _unpack_bits(bits[start // 8 : (end + 7) // 8], end - start)


@dataclass(frozen=True)
class PhiloxMask(Mask):
    """A random mask that takes no memory: entry j is selected with probability ``density``.

    Its random word is word j % 4 of Philox4x32-10 (Salmon et al. 2011) with key ``seed`` and counter
    (lo32(j // 4), hi32(j // 4), shard, layer); it is selected if the word is less than ⌊density · 2³²⌋. So every
    backend finds the same entries, however the tensor is cut up or stored, and masks of different shards or
    layers are independent.

    Args:
        seed: 64 bits.
        shard: in [0, 2³²); which of several masks of one tensor.
        layer: in [0, 2³²); which tensor.
        density: in [0, 1].

    >>> mask = PhiloxMask(seed=7, shard=0, layer=27, density=0.25)
    >>> mask.dense((2, 8)).int().tolist()
    [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 1]]
    """

    seed: int
    shard: int = 0
    layer: int = 0
    density: float = 1.0

    def __post_init__(self) -> None:
        for name in ("shard", "layer"):
            if not 0 <= getattr(self, name) < _ONE:
                raise ValueError(f"PhiloxMask: {name} must be in [0, 2^32), got {getattr(self, name)}")
        if not 0 <= self.density <= 1:
            raise ValueError(f"PhiloxMask: density must be in [0, 1], got {self.density}")

    @property
    def threshold(self) -> int:
        """Words below it select: in [0, 2³²]."""
        return math.floor(self.density * _ONE)

    @property
    def key(self) -> list[int]:
        """Seed as a signed number, shard, layer, threshold, as the ops take it; empty if all are selected."""
        if self.threshold == _ONE:
            return []
        seed = self.seed & 0xFFFFFFFFFFFFFFFF
        return [seed - (1 << 64) if seed >> 63 else seed, self.shard, self.layer, self.threshold]

    def _bits(self, n: int, device: torch.device | str | None) -> Tensor:
        out = torch.empty((n + 7) // 8, dtype=torch.uint8, device=device)
        if self.threshold == _ONE:
            return out.fill_(255)
        backend.call("philox_bits_", out, 0, self.key)
        return out


@dataclass(frozen=True, eq=False)
class BitMask(Mask):
    """A given mask, eight entries a byte.

    Args:
        packed: (⌈n / 8⌉,), uint8, contiguous; entry j is bit j % 8 of byte j // 8, as of NumPy's
            ``packbits(..., bitorder="little")``. What the last byte holds beyond n is ignored.
        n: the number of entries.
    """

    packed: Tensor
    n: int

    def __post_init__(self) -> None:
        check.is_tensor("BitMask", packed=self.packed)
        check.dtype("BitMask", (torch.uint8,), packed=self.packed)
        check.shape("BitMask", ((self.n + 7) // 8,), f"for {self.n} entries", packed=self.packed)
        object.__setattr__(self, "packed", self.packed.contiguous())

    @classmethod
    def from_dense(cls, mask: Tensor) -> BitMask:
        """Pack a bool tensor of any shape."""
        check.dtype("BitMask.from_dense", (torch.bool,), mask=mask)
        flat, n = mask.reshape(-1), mask.numel()
        pieces = [_pack_bits(flat[start : start + _PIECE]) for start in range(0, n, _PIECE)]
        return cls(torch.cat(pieces) if pieces else flat.to(torch.uint8), n)

    def _bits(self, n: int, device: torch.device | str | None) -> Tensor:
        return self.packed.to(device=self.packed.device if device is None else device, copy=True)


@dataclass(frozen=True, eq=False)
class IndexMask(Mask):
    """A given mask of few entries: their indices.

    Args:
        indices: (count,), int32 or int64, contiguous, sorted, each once, in [0, n).
        n: the number of entries.
        validate: look whether they are; waits for the device on a GPU.
    """

    indices: Tensor
    n: int
    validate: bool = True

    def __post_init__(self) -> None:
        check.is_tensor("IndexMask", indices=self.indices)
        check.dtype("IndexMask", (torch.int32, torch.int64), indices=self.indices)
        if self.indices.dim() != 1:
            raise ValueError(
                f"IndexMask: indices must have 1 dimension, got shape {tuple(self.indices.shape)}"
            )
        object.__setattr__(self, "indices", self.indices.contiguous())
        if self.validate and not self._is_valid():
            raise ValueError(f"IndexMask: indices must be sorted, each once, in [0, {self.n})")

    def _is_valid(self) -> bool:
        i = self.indices
        return i.numel() == 0 or (bool((i[1:] > i[:-1]).all()) and int(i[0]) >= 0 and int(i[-1]) < self.n)

    def _bits(self, n: int, device: torch.device | str | None) -> Tensor:
        out = torch.zeros((n + 7) // 8, dtype=torch.int32, device=self.indices.device)
        indices = self.indices.long()
        # every bit is added once, so the sum is their union
        out.index_add_(0, indices >> 3, torch.ones_like(indices, dtype=torch.int32) << (indices & 7).int())
        return out.to(device=device, dtype=torch.uint8)


def as_mask(op: str, mask: Mask | Tensor, n: int) -> Mask:
    """A mask of ``n`` entries: as given, or from packed bits (uint8) or indices (int32, int64)."""
    if isinstance(mask, Tensor):
        if mask.dtype == torch.uint8:
            mask = BitMask(mask, n)
        else:
            check.dtype(op, (torch.uint8, torch.int32, torch.int64), mask=mask)
            mask = IndexMask(mask, n)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{op}: mask must be a PhiloxMask, BitMask, IndexMask or tensor, got {type(mask).__name__}"
        )
    mask.check_size(n)
    return mask


# ---- bits -----------------------------------------------------------------------------------------------


def _unpack_bits(bits: Tensor, n: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).reshape(-1)[:n].bool()


def _pack_bits(keep: Tensor) -> Tensor:
    """(n,) bool as (⌈n / 8⌉,) uint8."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.reshape(-1, 8) << places).sum(1, dtype=torch.uint8)


def _counts(bits: Tensor) -> Tensor:
    """The number of ones of every 512 bytes, the last ones maybe fewer: int64."""
    table = torch.arange(256, device=bits.device)
    table = sum((table >> i) & 1 for i in range(8)).to(torch.uint8)  # type: ignore[union-attr]
    width = BLOCK // 8
    parts = [
        torch.nn.functional.pad(table[piece.int()], (0, -piece.numel() % width)).reshape(-1, width).sum(1)
        for piece in bits.split(_PIECE)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=bits.device)
