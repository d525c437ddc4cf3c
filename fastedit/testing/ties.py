"""Cases of ``ties_merge``: the bits of the reference in float32 (float64 for float64), rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.ties import VARIANTS, ties_merge_reference
from .case import BF16, FP16, FP32, FP64, INF, NAN, Case, case, require, require_same, untouched

DTYPES = (BF16, FP16, FP32, FP64)
SIZES = (1, 257, 1100)
DENSITIES: dict[str, float | list[float]] = {
    "0.2": 0.2,
    "0.53": 0.53,
    "1": 1.0,
    "1.5": 1.5,
    "each its own": [0.1, 1.0, 0.9],
}
Function = Callable[..., Any]


def copies(
    n: int,
    m: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    step: float = 0.01,
    share: float = 0.6,
) -> tuple[Tensor, list[Tensor]]:
    """Base and m edited copies; the edits are multiples of ``step``, so that many magnitudes are equal."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * n + m)
    base = torch.randn(n, generator=generator).to(dtype)
    edits = [torch.randn(n, generator=generator).mul(3).round() * step for _ in range(m)]
    masks = [torch.rand(n, generator=generator) < share for _ in range(m)]
    tensors = [(base.double() + e * k).to(dtype) for e, k in zip(edits, masks, strict=True)]
    return base.to(device), [t.to(device) for t in tensors]


def expected(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    density: float | Sequence[float],
    **options: Any,
) -> Tensor:
    """The reference in the arithmetic of the backends, rounded once."""
    work = FP64 if base.dtype == FP64 else FP32
    merged = ties_merge_reference(
        [t.cpu().to(work) for t in tensors], weights, density, base.cpu().to(work), **options
    )
    return merged.to(base.dtype)


def options_of(variant: str) -> dict[str, Any]:
    """Options of a variant."""
    return {"variant": variant, **({"scale": 0.7} if variant == "ties_original" else {})}


def weights_of(variant: str, m: int) -> list[float] | None:
    """Weights of both signs, if the variant takes any."""
    return None if variant == "ties_original" else [(-1) ** i * (1.0 + 0.3 * i) for i in range(m)]


def cases() -> Iterator[Case]:
    """Every dtype and variant, densities, equal magnitudes, views, unchanged and empty tensors, NaN."""
    new = partial(case, "ties_merge")
    for dtype in DTYPES:
        for n in SIZES:
            for variant in VARIANTS:
                needs = "" if variant == "ties" else "variant"
                yield new(f"{n}-{variant}", dtype, _plain, needs, dtype=dtype, n=n, variant=variant)
    for dtype in (BF16, FP32):
        for name, density in DENSITIES.items():
            for kept in ("lowest_index", "all"):
                needs = "" if kept == "lowest_index" else "at_threshold"
                given = {"dtype": dtype, "density": density, "kept": kept}
                yield new(f"density {name}-{kept}", dtype, _densities, needs, **given)
    for m in (1, 5, 17):
        yield new(f"{m} tensors", FP32, _numbers, m=m)
    for n in (0, 1, 300):
        yield new(f"unchanged copies of {n}", FP32, _unchanged, n=n)
    for dtype in (BF16, FP32):
        yield new("views", dtype, _views, "views", dtype=dtype)
    for name, value in (("nan", NAN), ("inf", INF)):
        for density in (0.4, 1.0):
            given = {"value": value, "density": density}
            yield new(f"{name} at density {density}", FP32, _not_finite, "nonfinite", **given)


def _plain(
    function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, n: int, variant: str
) -> None:
    base, tensors = copies(n, 3, dtype, device)
    density = 1.0 if variant == "sign" else 0.53
    options = {} if variant == "ties" else options_of(variant)
    with untouched(base=base, **{f"tensors[{i}]": t for i, t in enumerate(tensors)}):
        merged = function(tensors, weights_of(variant, 3), density, base, **options)
    require_same(merged, expected(base, tensors, weights_of(variant, 3), density, **options))


def _densities(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    density: float | list[float],
    kept: str,
) -> None:
    base, tensors = copies(300, 3, dtype, device, step=0.25)
    options = {} if kept == "lowest_index" else {"at_threshold": kept}
    merged = function(tensors, [1.0, 0.5, 2.0], density, base, **options)
    require_same(merged, expected(base, tensors, [1.0, 0.5, 2.0], density, **options))


def _numbers(function: Function, device: torch.device, tf32x3: bool, m: int) -> None:
    base, tensors = copies(70, m, FP32, device)
    require_same(function(tensors, None, 0.4, base), expected(base, tensors, None, 0.4))


def _unchanged(function: Function, device: torch.device, tf32x3: bool, n: int) -> None:
    base = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    require_same(function([base, base.clone()], None, 0.2, base), base.cpu())
    require_same(
        function([base + 1], None, 1e-9, base), base.cpu(), "what a density that keeps nothing gives"
    )


def _views(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    base, tensors = copies(24 * 20, 2, dtype, device)
    reference = expected(base, tensors, None, 0.3).view(24, 20)
    square, others = base.view(24, 20), [t.view(24, 20) for t in tensors]
    inside = torch.full((26, 43), NAN, dtype=dtype, device=device)[1:25, 1:41:2]
    inside.copy_(others[0])
    transposed = others[1].T.contiguous().T
    merged = function([inside, transposed], None, 0.3, square)
    require_same(merged, reference)
    require(merged.is_contiguous(), "the result must be contiguous")
    offset = torch.cat([base[:1], tensors[0]])[1:]  # not aligned to 16 bytes
    require_same(function([offset, tensors[1]], None, 0.3, base), reference.flatten())


def _not_finite(function: Function, device: torch.device, tf32x3: bool, value: float, density: float) -> None:
    base, tensors = copies(300, 3, FP32, device)
    tensors[1][299], tensors[2][5] = value, value
    merged = function(tensors, None, density, base, nonfinite="nan")
    require(merged.isnan().all(), "with nonfinite='nan' all of the result must be NaN")
    try:
        function(tensors, None, density, base)
    except ValueError:
        return
    raise AssertionError("an input that is not finite must raise ValueError")
