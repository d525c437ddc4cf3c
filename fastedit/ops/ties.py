"""Merging of weight updates by magnitude and sign. Yadav et al. 2023 (TIES), as used by Wang et al. 2024 (WISE).

With τᵢ = Vᵢ − W₀ and uᵢ = wᵢ τᵢ, τᵢ first reduced to its ⌊κᵢN⌋ entries of largest magnitude (trim), an entry's sign
g is that of Σ uᵢ (elect), and only entries of that sign are added up (disjoint merge):
W = W₀ + Σ Aᵢuᵢ / Σ Aᵢwᵢ with Aᵢ = [sign(uᵢ) = g].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import backend, check

MAX_TENSORS = 128
VARIANTS = ("ties", "magnitude", "sign", "ties_original")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Plan:
    """What the options mean: the same for every backend."""

    keep: tuple[int, ...]  # entries of each tensor that survive trimming; all of them: it is not trimmed
    weights: tuple[float, ...]
    elect: bool  # add only entries of the elected sign
    normalise: bool  # divide by the weights of the entries added (where they sum to 0: by 1)
    majority: bool  # a zero sum takes the sign that more entries of the result have; otherwise plus
    all_at_threshold: bool  # keep every entry that equals the smallest one kept
    divisor: float  # where ``normalise`` is not set


def _plan(
    base: Tensor,
    weights: Sequence[float],
    densities: Sequence[float],
    variant: str,
    normalise: bool,
    at_threshold: str,
) -> _Plan:
    n = base.numel()
    elect = variant != "magnitude"
    total = sum(weights)
    return _Plan(
        # int(κN), as published: the product is rounded before it is cut off
        keep=tuple(n if density >= 1 else int(density * n) for density in densities),
        weights=tuple(weights),
        elect=elect,
        normalise=normalise and elect,
        majority=variant == "ties_original",
        all_at_threshold=at_threshold == "all",
        divisor=total if normalise and not elect and abs(total) >= 1e-8 else 1.0,
    )


def _check(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    variant: str = "ties",
    normalise: bool = True,
    at_threshold: str = "lowest_index",
    scale: float = 1.0,
    nonfinite: str = "raise",
) -> None:
    op = "ties_merge"
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise ValueError(f"{op}: tensors must be 1 to {MAX_TENSORS} tensors, got {len(tensors)}")
    for name, values in (("weights", weights), ("density", densities)):
        if len(values) != len(tensors):
            raise ValueError(
                f"{op}: {name} must have one number for each of {len(tensors)} tensors, got {len(values)}"
            )
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{op}: {name} must be finite, got {list(values)}")
    if not all(density > 0 for density in densities):
        raise ValueError(f"{op}: density must be above 0, got {min(densities)}")
    check.choice(op, VARIANTS, variant=variant)
    check.choice(op, ("lowest_index", "all"), at_threshold=at_threshold)
    check.choice(op, ("raise", "nan"), nonfinite=nonfinite)
    if variant == "sign" and min(densities) < 1:
        raise ValueError(f"{op}: the variant 'sign' does not trim: density must be 1, got {min(densities)}")
    if variant == "ties_original" and not (normalise and all(w == 1 for w in weights)):
        raise ValueError(
            f"{op}: the variant 'ties_original' takes an unweighted mean: weights must be None or 1, normalise True"
        )
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    if scale != 1 and variant != "ties_original":
        raise ValueError(f"{op}: scale is the λ of the variant 'ties_original', got {scale} with {variant!r}")
    named = {f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}
    check.dtype(op, _DTYPES, base=base)
    check.dtype(op, (base.dtype,), **named)
    check.shape(op, base.shape, "like base", **named)
    check.same_device(op, base=base, **named)


def _fake(base: Tensor, *_: object) -> Tensor:
    return base.new_empty(base.shape)


backend.define(
    "ties_merge",
    "(Tensor base, Tensor[] tensors, float[] weights, float[] densities, str variant='ties', bool normalise=True, "
    "str at_threshold='lowest_index', float scale=1.0, str nonfinite='raise') -> Tensor",
    _fake,
    check=_check,
)


def ties_merge(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    base: Tensor,
    *,
    variant: str = "ties",
    normalise: bool | None = None,
    at_threshold: str = "lowest_index",
    scale: float = 1.0,
    nonfinite: str = "raise",
) -> Tensor:
    """Merge edited copies of one weight: base + what the variant makes of the differences τᵢ = Vᵢ − base.

    ========================  ====  =====  ============================================================
    ``variant``               trim  elect  added to base
    ========================  ====  =====  ============================================================
    ``"ties"``                yes   yes    Σ Aᵢuᵢ / Σ Aᵢwᵢ (1 where that is 0)
    ``"magnitude"``           yes   no     Σ uᵢ; with ``normalise=True`` divided by Σ wᵢ
    ``"sign"``                no    yes    Σ Aᵢuᵢ / Σ Aᵢwᵢ; the same as ``"ties"`` with density 1
    ``"ties_original"``       yes   yes    λ · unweighted mean of the agreeing τᵢ
    ========================  ====  =====  ============================================================

    uᵢ = wᵢτᵢ; Aᵢ is 1 where uᵢ is not zero and has the sign of Σ uᵢ. A zero sum elects plus, but in
    ``"ties_original"`` the sign that Σ τᵢ has at more entries of the whole tensor (plus where neither leads).

    Args:
        tensors: 1 to 128 tensors, each shaped like ``base`` and of its dtype; any strides.
        weights: wᵢ, one for each tensor, of any sign; None for 1 each.
        density: κ, the share of entries kept by trimming, or one for each tensor: exactly int(κN) of N. At 1 and
            above a tensor is not trimmed.
        base: any shape, bfloat16, float16, float32 or float64; what is added to.
        variant: see the table.
        normalise: divide by the weights, as the table says; None for the variant's own way: only
            ``"magnitude"`` does not.
        at_threshold: which of several entries of the smallest magnitude kept survive: ``"lowest_index"``, in
            row-major order, until int(κN) are kept; ``"all"``, all of them.
        scale: λ of ``"ties_original"``.
        nonfinite: ``"raise"``; or ``"nan"``: the result is NaN throughout, and on a GPU nothing waits for it.

    Returns:
        The merged tensor, new and contiguous, shaped like ``base`` and of its dtype.

    Raises:
        ValueError: shapes, devices, numbers or options that do not fit; a tensor or ``base`` that is not finite
            (or whose difference is not), unless ``nonfinite="nan"``.
        TypeError: a dtype not listed or not that of ``base``.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Arithmetic is float32 (float64 for float64), each operation rounded, the tensors taken in the order given,
    and one last rounding to the dtype: every backend returns the same bits.
    """
    op = "ties_merge"
    check.is_tensor(op, base=base)
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: tensors must be a list of tensors, got one tensor")
    check.is_tensor(op, **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)})
    factors = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    shares = (
        [float(density)] * len(tensors) if isinstance(density, (int, float)) else [float(d) for d in density]
    )
    if normalise is None:
        normalise = variant != "magnitude"
    return backend.call(
        op, base, list(tensors), factors, shares, variant, normalise, at_threshold, float(scale), nonfinite
    )


# ---- reference ------------------------------------------------------------------------------------------


def ties_merge_reference(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    base: Tensor,
    *,
    variant: str = "ties",
    normalise: bool | None = None,
    at_threshold: str = "lowest_index",
    scale: float = 1.0,
) -> Tensor:
    """The same in plain torch with sorted entries, in the dtype of ``base``; every backend is tested against it."""
    n = base.numel()
    weights = [1.0] * len(tensors) if weights is None else weights
    densities = [density] * len(tensors) if isinstance(density, (int, float)) else density
    if normalise is None:
        normalise = variant != "magnitude"
    updates = []
    for tensor, weight, kappa in zip(tensors, weights, densities, strict=True):
        delta = (tensor - base).flatten()
        if kappa < 1 and variant != "sign":
            order = delta.abs().sort(descending=True, stable=True).indices
            kept = order[: int(kappa * n)]
            mask = torch.zeros_like(delta, dtype=torch.bool)
            mask[kept] = True
            if at_threshold == "all" and len(kept):
                mask = delta.abs() >= delta[kept[-1]].abs()
            delta = torch.where(mask, delta, 0)
        updates.append(weight * delta)
    if variant == "magnitude":
        merged = _sum(updates)
        if normalise and abs(sum(weights)) >= 1e-8:
            merged = merged / sum(weights)
        return base + merged.reshape(base.shape)
    total = _sum(updates)
    sign = total.sign()
    other = -1.0 if variant == "ties_original" and sign.sum() < 0 else 1.0
    sign[total == 0] = other
    sign[total.isnan()] = -1.0
    agrees = [update.sign() == sign for update in updates]
    merged = scale * _sum([torch.where(a, u, 0) for a, u in zip(agrees, updates, strict=True)])
    if normalise:
        divisor = _sum([w * a.to(base.dtype) for a, w in zip(agrees, weights, strict=True)])
        merged = merged / torch.where(divisor == 0, 1, divisor)
    return base + merged.reshape(base.shape)


def _sum(values: Sequence[Tensor]) -> Tensor:
    """One after the other from zero: torch.sum may take another order."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total


# ---- backends -------------------------------------------------------------------------------------------


def _flat(base: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Everything as contiguous rows of entries in row-major order; says once if that takes copies."""
    if not all(t.is_contiguous() for t in (base, *tensors)):
        check.once(
            logging.WARNING,
            f"ties_merge: tensors of shape {tuple(base.shape)} that are not contiguous are copied; trimming "
            "counts entries in row-major order",
        )
    return base.detach().reshape(-1).contiguous(), [t.detach().reshape(-1).contiguous() for t in tensors]


def _report(merged: Tensor, status: Tensor, n_tensors: int, nonfinite: str) -> None:
    """Raise if ``status`` names a tensor that is not finite; on a GPU this waits for the device."""
    if nonfinite == "raise" and (first := int(status)) < n_tensors:
        raise ValueError(
            f"ties_merge: tensors[{first}], base or their difference has entries that are NaN or infinite; "
            "nonfinite='nan' returns NaN instead of raising"
        )


def _trimmed(delta: Tensor, keep: int, all_at_threshold: bool) -> Tensor:
    """Delta with all but its ``keep`` largest entries set to zero, by selection instead of sorting."""
    n = delta.numel()
    if keep >= n:
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    magnitude = delta.abs()
    if delta.device.type == "cpu":  # NumPy selects several times faster than kthvalue
        threshold = torch.from_numpy(np.partition(magnitude.numpy(), n - keep)[n - keep :][:1])
    else:
        threshold = magnitude.kthvalue(n - keep + 1).values
    kept = magnitude >= threshold
    if not all_at_threshold:
        above = magnitude > threshold
        tied = kept ^ above
        kept = above | (tied & (tied.cumsum(0) <= keep - above.sum()))
    return torch.where(kept, delta, 0)


def _ties_torch(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    variant: str,
    normalise: bool,
    at_threshold: str,
    scale: float,
    nonfinite: str,
) -> Tensor:
    plan = _plan(base, weights, densities, variant, normalise, at_threshold)
    if base.numel() == 0:
        return base.new_empty(base.shape)
    flat, rows = _flat(base, tensors)
    start = flat.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
    status = torch.full((), len(rows), device=base.device)
    updates = []
    for i, (row, keep, weight) in enumerate(zip(rows, plan.keep, plan.weights, strict=True)):
        delta = row - start
        status = torch.where(delta.isfinite().all(), status, status.clamp(max=i))
        updates.append(weight * _trimmed(delta, keep, plan.all_at_threshold))
    merged = torch.zeros_like(start)
    total = torch.zeros_like(start)
    for update in updates:
        total += update
    if plan.elect:
        plus = total >= 0
        if plan.majority:
            plus = torch.where(total == 0, (total > 0).sum() >= (total < 0).sum(), plus)
        divisor = torch.zeros_like(start)
        for update, weight in zip(updates, plan.weights, strict=True):
            agrees = (update != 0) & ((update > 0) == plus)
            merged += torch.where(agrees, update, 0)
            divisor += weight * agrees.to(start.dtype)
        if plan.normalise:
            merged = scale * merged / torch.where(divisor == 0, 1, divisor)
    else:
        merged = total / total.new_full(
            (1,), plan.divisor
        )  # by a number, a GPU would multiply by its inverse
    out = (start + merged).to(base.dtype)
    _report(out, status, len(rows), nonfinite)
    return torch.where(status < len(rows), math.nan, out).to(base.dtype).reshape(base.shape)


def _ties_compiled(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    variant: str,
    normalise: bool,
    at_threshold: str,
    scale: float,
    nonfinite: str,
) -> Tensor:
    plan = _plan(base, weights, densities, variant, normalise, at_threshold)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if base.numel() == 0:
        return out
    flat, rows = _flat(base, tensors)
    status = torch.empty(1, dtype=torch.int32, device=base.device)
    module = backend.compiled()
    module.ties_merge(
        out.view(-1), flat, rows, plan.weights, plan.keep, status, elect=plan.elect, normalise=plan.normalise,
        majority=plan.majority, all_at_threshold=plan.all_at_threshold, scale=scale, divisor=plan.divisor,
    )  # fmt: skip
    _report(out, status, len(rows), nonfinite)
    return out


def _ties_triton(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    variant: str,
    normalise: bool,
    at_threshold: str,
    scale: float,
    nonfinite: str,
) -> Tensor:
    from ..kernels.ties import ties_merge_triton

    plan = _plan(base, weights, densities, variant, normalise, at_threshold)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if base.numel() == 0:
        return out
    flat, rows = _flat(base, tensors)
    status = torch.empty(1, dtype=torch.int32, device=base.device)
    ties_merge_triton(out.view(-1), flat, rows, plan, scale, status)
    _report(out, status, len(rows), nonfinite)
    return out


_COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Speeds relative to the torch backend: measured on two cores with AVX-512 for cpp, estimated for GPUs.
backend.provide(
    "ties_merge",
    "cpp",
    _ties_compiled,
    symbol="ties_merge",
    device="cpu",
    dtypes=_COMPILED_DTYPES,
    speed=5.0,
)
backend.provide(
    "ties_merge",
    "cuda",
    _ties_compiled,
    symbol="ties_merge",
    device="cuda",
    dtypes=_COMPILED_DTYPES,
    speed=10.0,
)
backend.provide("ties_merge", "triton", _ties_triton, device="cuda", dtypes=_COMPILED_DTYPES, speed=8.0)
backend.provide("ties_merge", "torch", _ties_torch)
