"""The random words that every backend shares: Philox4x32-10 (Salmon et al. 2011) of (seed, element index).

Element i of a tensor, counted in a fixed logical order, gets word ``i % 4`` of the block whose counter is
(lo32(i // 4), hi32(i // 4), 0, 0) and whose key is (lo32(seed), hi32(seed)). So a random decision per element
never needs to be stored, and comes out the same in torch, C++, CUDA and Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: Tensor, seed: int, third: int = 0, fourth: int = 0) -> Tensor:
    """Philox4x32-10 of 128-bit counters.

    Args:
        counter: (...), int64, the low half of the counter modulo 2^64.
        seed: the 64-bit key; taken modulo 2^64.
        third: the third word of the counter, in [0, 2^32).
        fourth: the fourth word.

    Returns:
        (..., 4), int64, each a word in [0, 2^32).
    """
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2, c3 = torch.full_like(counter, third), torch.full_like(counter, fourth)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, so all 64 bits of the unsigned product are right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(start: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of the elements ``start`` to ``start + count`` - 1: (count,), int64 in [0, 2^32)."""
    first = start // 4
    blocks = torch.arange(first, (start + count + 3) // 4, device=device)
    return philox(blocks, seed).reshape(-1)[start - 4 * first :][:count]


def runs_of_words(starts: Tensor, count: int, seed: int) -> Tensor:
    """The words of ``count`` elements from each of ``starts`` (m,) on: (m, count), int64 in [0, 2^32)."""
    steps = torch.arange((count + 6) // 4, device=starts.device)
    runs = philox((starts // 4)[:, None] + steps, seed).flatten(1)
    offsets = (starts % 4)[:, None] + torch.arange(count, device=starts.device)
    return runs.gather(1, offsets)


def round_stochastically(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 up or down at random, with probabilities that keep the expected value.

    The low 16 (bfloat16) or 13 (float16) bits of the word are added to the bit pattern of ``value``, whose
    low bits are then cut off. Under 2^-14, where float16 is a grid of 2^-24, the magnitude becomes
    floor(abs(value) · 2^24 + low13 · 2^-13) · 2^-24, the same in effect. What is not finite is converted as it
    is; a result past the largest number becomes infinite, as it does when rounding to nearest.

    Args:
        value: float32.
        random: words in [0, 2^32), shaped like ``value``, int64.
        dtype: bfloat16 or float16; float32 returns ``value`` as it is.
    """
    if dtype == torch.float32:
        return value
    low = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    added = random & low
    out = ((value.view(torch.int32) + added.to(torch.int32)) & ~low).view(torch.float32)
    if dtype == torch.float16:
        units = value.abs() * 2.0**24
        whole = units.floor()
        up = (units - whole) * 8192 >= 8192 - added
        out = torch.where(value.abs() < 2.0**-14, ((whole + up) * 2.0**-24).copysign(value), out)
    return torch.where(value.isfinite(), out, value).to(dtype)
