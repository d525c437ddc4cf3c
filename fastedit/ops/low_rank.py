"""Low-rank updates of a weight in place, W += α A Bᵀ, in one pass over the weight.

An edit of n facts has rank n: Meng et al. 2022 (MEMIT), eq. 14, Δ = R Kᵀ (C + K Kᵀ)⁻¹; Fang et al. 2025 (AlphaEdit),
eq. 14. The solves that give A and B are in :mod:`fastedit.ops.solve`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, check
from .philox import round_stochastically, runs_of_words, words

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
_ROUNDINGS = ("nearest", "stochastic")


def _check(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    op = "low_rank_update_"
    check.matrix(op, weight=weight, left=left, right=right)
    d_out, d_in = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
    stored = "weight is stored (d_in, d_out)" if transposed else "weight is (d_out, d_in)"
    check.shape(op, (d_out, left.shape[1]), f"because {stored}", left=left)
    check.shape(op, (d_in, left.shape[1]), f"because {stored} and left has rank {left.shape[1]}", right=right)
    check.dtype(op, _WEIGHT_DTYPES, weight=weight, left=left, right=right)
    check.choice(op, _ROUNDINGS, rounding=rounding)
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha must be finite, got {alpha}")
    if out_norm is not None:
        check.dtype(op, (torch.float32, torch.float64), out_norm=out_norm)
        if out_norm.numel() != 1:
            raise ValueError(f"{op}: out_norm must have one element, got shape {tuple(out_norm.shape)}")
    if residual is not None:
        check.dtype(op, _ROUNDED_DTYPES, **{"weight, where a residual is asked for,": weight})
        check.dtype(op, (torch.float32,), residual=residual)
        check.shape(op, weight.shape, "like weight as stored", residual=residual)
    elif carry:
        raise ValueError(f"{op}: carry needs the residual of earlier updates, got none")
    check.same_device(op, weight=weight, left=left, right=right, out_norm=out_norm, residual=residual)


backend.define(
    "low_rank_update_",
    "(Tensor(a!) weight, Tensor left, Tensor right, float alpha=1.0, bool transposed=False, "
    "str rounding='nearest', int seed=0, Tensor(b!)? out_norm=None, Tensor(c!)? residual=None, "
    "bool carry=False) -> ()",
    check=_check,
)


def low_rank_update_(
    weight: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    alpha: float = 1.0,
    *,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | Sequence[Tensor] | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    carry: bool = False,
) -> None:
    """Add a low-rank matrix to a weight in one pass: weight += alpha · left rightᵀ.

    The product and the sum are float32 arithmetic (float64 for a float64 weight), rounded once to the
    weight's dtype; the product is never stored. Factors are converted to that precision first.

    Args:
        weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; bfloat16, float16, float32 or float64; any
            strides; modified in place, also where it requires a gradient. Or a list, one for each layer.
        left: (d_out, r), floating point. A list if ``weight`` is one.
        right: (d_in, r), floating point. A list if ``weight`` is one.
        alpha: the factor of the product.
        transposed: the weight is stored (d_in, d_out), as in GPT-2; left and right keep their meaning.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"``: up or down with probabilities that keep
            the expected value (:func:`fastedit.ops.philox.round_stochastically`); for bfloat16 and float16.
        seed: what the random words depend on, besides the element's index in (d_out, d_in) order; 64 bits.
            Weight i of a list uses ``seed + i``.
        out_norm: one element, float32 or float64; receives ‖alpha · left rightᵀ‖, the Frobenius norm before
            rounding. A list if ``weight`` is one.
        residual: float32, of the shape in which ``weight``, bfloat16 or float16, is stored; receives what
            rounding took away, the float32 result minus the stored weight; 0 where the stored weight is not
            finite. A list if ``weight`` is one.
        carry: add what ``residual`` holds before rounding: weight + residual then follows the sum of all
            updates in float32, however small each is next to the weight.

    Raises:
        ValueError: shapes, devices or values that do not fit, ``weight`` sharing memory with another
            argument.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Whether factors are finite is not looked at: on a GPU that would wait for the device. In a list call
    everything else is checked before the first weight is written. A second run gives the same bits.
    """
    op = "low_rank_update_"
    if isinstance(weight, Tensor):
        given = {"out_norm": out_norm, "residual": residual}
        check.is_tensor(op, left=left, right=right, **{k: v for k, v in given.items() if v is not None})
        backend.call(
            op,
            weight,
            left,
            right,
            float(alpha),
            transposed,
            rounding,
            _signed(seed),
            out_norm,
            residual,
            carry,
        )
        return
    lists = {"left": left, "right": right, "out_norm": out_norm, "residual": residual}
    for name, items in lists.items():
        if isinstance(items, Tensor):
            raise TypeError(f"{op}: {name} must be a list of tensors like weight, got a tensor")
    full = {name: [None] * len(weight) if items is None else items for name, items in lists.items()}
    if any(len(items) != len(weight) for items in full.values()):
        lengths = ", ".join(f"{len(items)} {name}" for name, items in full.items())
        raise ValueError(f"{op}: lists must have one length, got {len(weight)} weight, {lengths}")
    calls = []
    for i, (w, a, b, norm, rest) in enumerate(zip(weight, *full.values(), strict=True)):
        given = {"out_norm": norm, "residual": rest}
        check.is_tensor(op, weight=w, left=a, right=b, **{k: v for k, v in given.items() if v is not None})
        calls.append((w, a, b, float(alpha), transposed, rounding, _signed(seed + i), norm, rest, carry))
        backend.check(op, *calls[-1])
    for args in calls:
        backend.call(op, *args)


def _signed(seed: int) -> int:
    """The 64-bit seed as the signed number that a schema's int holds."""
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


# ---- reference ------------------------------------------------------------------------------------------


def low_rank_update_reference(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    """The same in plain torch, computed in float64; what every backend is tested against."""
    delta = alpha * (left.double() @ right.double().T)
    start = weight.double()
    if carry and residual is not None:
        start = start + residual
    target = (start.T if transposed else start) + delta
    rounded = target
    if rounding == "stochastic" and weight.dtype != torch.float64:
        random = words(0, target.numel(), seed, target.device).reshape(target.shape)
        rounded = round_stochastically(target.float(), random, weight.dtype)
    weight.copy_(rounded.T if transposed else rounded)
    if out_norm is not None:
        out_norm.fill_(delta.norm())
    if residual is not None:
        lost = (target.T if transposed else target) - weight
        residual.copy_(lost.where(weight.isfinite(), 0.0))


# ---- backends -------------------------------------------------------------------------------------------


def _factors(left: Tensor, right: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in the working precision with contiguous rows: thin, so a copy costs next to nothing."""
    return left.detach().to(work).contiguous(), right.detach().to(work).contiguous()


def _write_norm(out_norm: Tensor | None, left: Tensor, right: Tensor, alpha: float) -> None:
    """‖α A Bᵀ‖ without the product: its square is α² Σ (AᵀA ∘ BᵀB), two thin Gram matrices in float64."""
    if out_norm is not None:
        left, right = left.double(), right.double()
        squared = ((left.T @ left) * (right.T @ right)).sum()
        out_norm.fill_(abs(alpha) * squared.clamp(min=0).sqrt())


def _low_rank_update_torch(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    """One fused product for a float32 weight; otherwise blocks of rows, whose float32 copy stays small."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = _factors(left, right, work)
    _write_norm(out_norm, left, right, alpha)
    rows, columns = (right, left) if transposed else (left, right)
    stored = weight.detach()
    with backend.full_float32():
        if stored.dtype == work:
            stored.addmm_(rows, columns.T, alpha=alpha)
            return
        step = max(1, (1 << 22) // max(1, stored.shape[1]))
        for r in range(0, stored.shape[0], step):
            block = stored[r : r + step]
            updated = block.to(work)
            if carry and residual is not None:
                updated += residual[r : r + step]
            updated.addmm_(rows[r : r + step], columns.T, alpha=alpha)
            if rounding == "stochastic":
                random = _block_words(r, block.shape, stored.shape[0], transposed, seed, weight.device)
                block.copy_(round_stochastically(updated, random, stored.dtype))
            else:
                block.copy_(updated)
            if residual is not None:
                residual[r : r + step] = (updated - block).where(block.isfinite(), 0.0)


def _block_words(
    row: int, size: torch.Size, n_rows: int, transposed: bool, seed: int, device: torch.device
) -> Tensor:
    """The random words of a block of stored rows, whose elements count in (d_out, d_in) order."""
    if not transposed:
        return words(row * size[1], size[0] * size[1], seed, device).reshape(size)
    # stored (d_in, d_out): element (i, o) has index o · d_in + i, and a block holds a range of i
    starts = torch.arange(size[1], device=device) * n_rows + row
    return runs_of_words(starts, size[0], seed).T


def _low_rank_update_compiled(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    left, right = _factors(left, right, torch.float32)
    if not weight.numel():
        return _write_norm(out_norm, left, right, alpha)
    into, lost = weight.detach(), None if residual is None else residual.detach()
    if into.stride(1) != 1 and into.shape[1] > 1 and into.stride(0) == 1:
        # the other orientation of a stored matrix
        into, lost, transposed = into.T, None if lost is None else lost.T, not transposed
    module = backend.compiled()
    used, used_lost = _unit_stride(into, "weight"), None if lost is None else _unit_stride(lost, "residual")
    module.low_rank_update(
        used,
        left,
        right,
        alpha,
        transposed,
        rounding == "stochastic",
        seed & 0xFFFFFFFFFFFFFFFF,
        out_norm,
        used_lost,
        carry,
    )
    if used is not into:
        into.copy_(used)
    if lost is not None and used_lost is not None and used_lost is not lost:
        lost.copy_(used_lost)
    return None


def _unit_stride(matrix: Tensor, name: str) -> Tensor:
    """The matrix, or a copy of it (said once) if the elements of a row are not adjacent."""
    if matrix.stride(1) == 1 or matrix.shape[1] == 1:
        return matrix
    check.once(
        logging.WARNING,
        f"low_rank_update_: rows of {name} are not contiguous (strides {matrix.stride()}): copied there and back",
    )
    return matrix.contiguous()


def _low_rank_update_triton(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    from ..kernels.low_rank import low_rank_update_triton

    left, right = _factors(left, right, torch.float32)
    _write_norm(out_norm, left, right, alpha)
    low_rank_update_triton(
        weight.detach(), left, right, alpha, transposed, rounding == "stochastic", seed, residual, carry
    )


_COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Speeds relative to the torch backend: measured on one core with AVX-512 for cpp, estimated for GPUs.
backend.provide(
    "low_rank_update_",
    "cpp",
    _low_rank_update_compiled,
    symbol="low_rank_update",
    device="cpu",
    dtypes=_COMPILED_DTYPES,
    speed={torch.bfloat16: 3.0, torch.float16: 3.0},
)
backend.provide(
    "low_rank_update_", "triton", _low_rank_update_triton, device="cuda", dtypes=_COMPILED_DTYPES, speed=3.0
)
backend.provide(
    "low_rank_update_",
    "cuda",
    _low_rank_update_compiled,
    symbol="low_rank_update",
    device="cuda",
    dtypes=_COMPILED_DTYPES,
    speed=3.0,
)
backend.provide("low_rank_update_", "torch", _low_rank_update_torch)
