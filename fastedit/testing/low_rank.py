"""Cases of ``low_rank_update_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .case import (
    BF16,
    FP16,
    FP32,
    FP64,
    NAN,
    Case,
    case,
    normal,
    require,
    require_close,
    require_same,
    surrounded,
)

DTYPES = (BF16, FP16, FP32)
UNIT = {BF16: 2.0**-8, FP16: 2.0**-11}  # half a unit in the last place, relative to the power of two below
SHAPES = {  # (d_out, d_in, rank)
    "one": (1, 1, 1),
    "primes": (17, 5, 3),
    "around_tile": (31, 33, 1),
    "aligned": (40, 36, 17),
    "whole_tiles": (64, 32, 16),
}
EMPTY = {"no_rows": (0, 5, 2), "no_columns": (5, 0, 2), "rank_0": (5, 4, 0)}
Function = Callable[..., Any]


def problem(
    d_out: int,
    d_in: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, left and right."""
    weight = normal(d_in, d_out, seed=1) if transposed else normal(d_out, d_in, seed=1)
    return (
        weight.to(dtype).to(device),
        normal(d_out, rank, device=device, seed=2),
        normal(d_in, rank, device=device, seed=3),
    )


def exact(
    weight: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum and the product before rounding, in float64."""
    delta = alpha * (left.cpu().double() @ right.cpu().double().T)
    return weight.cpu().double() + (delta.T if transposed else delta), delta


def require_rounded(out: Tensor, target: Tensor, magnitude: Tensor, dtype: torch.dtype, slack: float) -> None:
    """Within half a unit in the last place of the exact target, plus the error of a float32-grade product."""
    error = (out.cpu().double() - target).abs()
    if dtype == FP32:
        allowed = (slack * magnitude.max()).expand(error.shape)
    else:
        step = torch.exp2(torch.floor(torch.log2(target.abs().clamp(min=2.0**-14)))) * UNIT[dtype]
        allowed = step * (1 + 1e-9) + slack * magnitude
    wrong = ~(error <= allowed)
    require(
        not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} entries are not the exact sum rounded once"
    )


def slack_of(dtype: torch.dtype, tf32x3: bool) -> float:
    """Error of the product, relative to the sum of its magnitudes."""
    if not tf32x3:
        return 1e-6
    return 2.0**-14 if dtype == BF16 else 1e-5  # two bfloat16 halves; TF32x3


def cases() -> Iterator[Case]:
    """One rounding for every dtype and odd shape, the norm, views, factors of other dtypes, lists, residuals."""
    new = partial(case, "low_rank_update_")
    for dtype in DTYPES:
        for shape, sizes in SHAPES.items():
            for transposed in (False, True):
                order, needs = ("in_out", "transposed") if transposed else ("out_in", "")
                given = {"dtype": dtype, "sizes": sizes, "transposed": transposed}
                yield new(f"{shape}-{order}", dtype, _plain, needs, **given, norm=False)
                yield new(f"{shape}-{order}-norm", dtype, _plain, f"{needs} out_norm", **given, norm=True)
                if dtype != FP32:
                    yield new(f"{shape}-{order}-residual", dtype, _residual, f"{needs} residual", **given)
        yield new("inside a larger tensor", dtype, _inside, "views", dtype=dtype, step=1)
        yield new("no contiguous dimension", dtype, _inside, "views", dtype=dtype, step=3)
        yield new("column major", dtype, _column_major, "views", dtype=dtype, transposed=False)
        yield new(
            "column major-in_out", dtype, _column_major, "views transposed", dtype=dtype, transposed=True
        )
        yield new("factors of other dtypes and strides", dtype, _factors, "factors views", dtype=dtype)
        for name, sizes in EMPTY.items():
            yield new(name, dtype, _empty, dtype=dtype, sizes=sizes, norm=False)
            yield new(f"{name}-norm", dtype, _empty, "out_norm", dtype=dtype, sizes=sizes, norm=True)
        yield new("lists", dtype, _lists, "lists", dtype=dtype)
    yield new("float64", FP64, _float64)


def _plain(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    transposed: bool,
    norm: bool,
) -> None:
    weight, left, right = problem(*sizes, dtype, device, transposed)
    target, delta = exact(weight, left, right, 0.7, transposed)
    magnitude = exact(weight.abs(), left.abs(), right.abs(), 0.7, transposed)[0]
    options: dict[str, Any] = {"transposed": True} if transposed else {}
    if norm:
        options["out_norm"] = torch.full((), NAN, dtype=FP64, device=device)
    function(weight, left, right, 0.7, **options)
    require_rounded(weight, target, magnitude, dtype, slack_of(dtype, tf32x3))
    if norm:
        require_close(options["out_norm"], delta.norm(), 1e-5, "out_norm")


def _residual(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    transposed: bool,
) -> None:
    weight, left, right = problem(*sizes, dtype, device, transposed)
    target, _ = exact(weight, left, right, 0.7, transposed)
    residual = torch.full(weight.shape, NAN, device=device)
    function(weight, left, right, 0.7, residual=residual, **({"transposed": True} if transposed else {}))
    require_close(weight.double() + residual, target, 2e-6, "weight + residual")


def _inside(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, step: int) -> None:
    left, right = normal(20, 4, device=device, seed=2), normal(12, 4, device=device, seed=3)
    with surrounded(20, 12, dtype, device, step) as weight:
        weight.copy_(normal(20, 12, seed=5))
        target, _ = exact(weight, left, right)
        function(weight, left, right)
        require_close(weight, target, _grade(dtype), "weight")


def _column_major(
    function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, transposed: bool
) -> None:
    weight, left, right = problem(20, 15, 4, dtype, device, transposed)
    weight = weight.T.contiguous().T
    target, _ = exact(weight, left, right, 1.0, transposed)
    function(weight, left, right, **({"transposed": True} if transposed else {}))
    require_close(weight, target, _grade(dtype), "weight")


def _factors(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    weight = torch.zeros(9, 6, dtype=dtype, device=device)
    left, right = normal(9, 8, dtype=BF16, device=device)[:, ::2], normal(4, 6, dtype=FP64, device=device).T
    target, _ = exact(weight, left, right, -2.0)
    function(weight, left, right, -2.0)
    require_close(weight, target, _grade(dtype), "weight")


def _empty(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    norm: bool,
) -> None:
    weight, left, right = problem(*sizes, dtype, device)
    before, received = weight.cpu().clone(), torch.full((1,), 3.0, device=device)
    function(weight, left, right, **({"out_norm": received} if norm else {}))
    require_same(weight, before, "the weight, to which nothing was to be added,")
    require(not norm or received.item() == 0, f"out_norm of nothing must be 0, not {received.item()}")


def _lists(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    problems = [problem(*sizes, dtype, device) for sizes in ((5, 4, 2), (6, 3, 2))]
    targets = [exact(*p, 0.5)[0] for p in problems]
    weights, lefts, rights = map(list, zip(*problems, strict=True))
    function(weights, lefts, rights, 0.5)
    for i, (weight, target) in enumerate(zip(weights, targets, strict=True)):
        require_close(weight, target, _grade(dtype), f"weight[{i}]")


def _float64(function: Function, device: torch.device, tf32x3: bool) -> None:
    weight, left, right = problem(9, 7, 3, FP64, device)
    target, _ = exact(weight, left.double(), right.double(), 0.5)
    function(weight, left.double(), right.double(), 0.5)
    require_close(weight, target, 1e-14, "weight")


def _grade(dtype: torch.dtype) -> float:
    """Relative error of one rounding and a float32-grade product."""
    return {BF16: 3e-3, FP16: 4e-4, FP32: 1e-5}[dtype]
