"""Cases of ``covariance_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.covariance import covariance_reference
from .case import (
    BF16,
    FP16,
    FP32,
    FP64,
    NAN,
    Case,
    case,
    name_of,
    normal,
    require,
    require_close,
    require_same,
    surrounded,
)

TOLERANCE = {  # (dtype of x, dtype of cov): relative error to float64
    (BF16, FP32): 1e-5,
    (FP16, FP32): 1e-5,
    (FP32, FP32): 2e-6,
    (FP64, FP32): 2e-6,
    (BF16, FP64): 1e-5,
    (FP16, FP64): 1e-5,
    (FP32, FP64): 2e-6,
    (FP64, FP64): 1e-12,
}
SHAPES = {  # (tokens, d)
    "one": (1, 1),
    "primes": (5, 17),
    "below_tile": (33, 31),
    "above_tile": (31, 33),
    "whole_tiles": (70, 64),
}
EMPTY = {"no_tokens": (0, 7), "empty_batch": (2, 0, 7), "all_masked": (5, 7), "no_columns": (3, 0)}
VIEWS = (
    "offset columns",
    "every second row",
    "transposed",
    "every second column",
    "batch without its first token",
    "one token",
)
Function = Callable[..., Any]


def tolerance(x_dtype: torch.dtype, cov_dtype: torch.dtype, tf32x3: bool) -> float:
    """Allowed error; three TF32 products stand for one of float32 if ``tf32x3``."""
    return 1e-5 if tf32x3 and x_dtype == FP32 else TOLERANCE[x_dtype, cov_dtype]


def tokens(
    n_tokens: int, d: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """(n_tokens, d), of mean 0.3."""
    return normal(n_tokens, d, seed=seed).add_(0.3).to(dtype).to(device)


def symmetric(d: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(d, d), not zero."""
    start = tokens(d, d, FP32, seed=1)
    return (start + start.T).to(dtype).to(device)


def expected(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The result in float64."""
    out = cov.cpu().double().clone()
    covariance_reference(out, x.cpu().double(), None if mask is None else mask.cpu())
    return out


def view_of(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Inputs of width 20 and its mask, in one of the ways of ``VIEWS``."""
    d = 20
    store = tokens(40, 2 * d + 3, dtype, device)
    flags = torch.arange(80, device=device).reshape(40, 2) % 3 != 0
    return {
        "offset columns": (store[:, 3 : 3 + d], flags[:, 0]),
        "every second row": (store[::2, :d], flags[::2, 1]),
        "transposed": (store[:d, : 2 * d].T, None),
        "every second column": (store[:, : 2 * d : 2], flags[:, 1]),
        "batch without its first token": (
            store[:, :d].view(4, 10, d)[:, 1:],
            flags[:, 0].view(4, 10)[:, 1:],
        ),
        "one token": (store[0, :d], torch.tensor(True, device=device)),
    }[name]


def cases() -> Iterator[Case]:
    """Every dtype, odd shapes, poisoned masked rows, views, nothing to add, lists."""
    new = partial(case, "covariance_")
    for x_dtype, cov_dtype in TOLERANCE:
        doubles = "float64_cov" if cov_dtype == FP64 else ""
        for shape, sizes in SHAPES.items():
            name, both = f"{name_of(cov_dtype)}_cov-{shape}", {"dtypes": (x_dtype, cov_dtype), "sizes": sizes}
            yield new(f"{name}-all", x_dtype, _plain, doubles, **both, masked=False)
            yield new(f"{name}-masked", x_dtype, _plain, f"{doubles} mask", **both, masked=True)
    for dtype in (BF16, FP32):
        for view in VIEWS:
            yield new(f"x: {view}", dtype, _view, "views mask", dtype=dtype, name=view)
        yield new("cov inside a larger tensor", dtype, _inside, "views", dtype=dtype)
        for name, empty in EMPTY.items():
            masked = name == "all_masked"
            yield new(name, dtype, _empty, "mask" if masked else "", dtype=dtype, sizes=empty, masked=masked)
        yield new("lists of layers", dtype, _lists, "lists mask", dtype=dtype)


def _plain(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int],
    masked: bool,
) -> None:
    x, cov = tokens(*sizes, dtypes[0], device), symmetric(sizes[1], dtypes[1], device)
    mask = None
    if masked:
        mask = torch.arange(sizes[0], device=device) % 3 != 1
        x[~mask] = NAN
    reference = expected(cov, x, mask)
    function(cov, x, *([mask] if masked else []))
    require_close(cov, reference, tolerance(*dtypes, tf32x3), "cov")
    require((cov == cov.T).all(), "cov is not exactly symmetric")


def _view(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, name: str) -> None:
    x, mask = view_of(name, dtype, device)
    cov = torch.zeros(20, 20, device=device)
    function(cov, x, mask)
    require_close(cov, expected(torch.zeros(20, 20), x, mask), 1e-5, "cov")


def _inside(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    x = tokens(23, 19, dtype, device)
    with surrounded(19, 19, FP32, device) as cov:
        cov.zero_()
        function(cov, x)
        require_close(cov, expected(torch.zeros(19, 19), x), 1e-5, "cov")


def _empty(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    masked: bool,
) -> None:
    cov = symmetric(sizes[-1], FP32, device)
    before = cov.cpu().clone()
    x = torch.full(sizes, NAN, dtype=dtype, device=device)
    function(cov, x, *([torch.zeros(sizes[:-1], dtype=torch.bool, device=device)] if masked else []))
    require_same(cov, before, "cov, to which nothing was to be added,")


def _lists(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    sizes = [5, 8, 5, 0]
    covs = [torch.zeros(d, d, device=device) for d in sizes]
    xs = [tokens(11, d, dtype, device, seed=d) for d in sizes]
    mask = torch.arange(11, device=device) != 4
    function(covs, xs, mask)
    function(covs, xs, [None, mask, None, None])
    for i, (cov, x) in enumerate(zip(covs, xs, strict=True)):
        reference = expected(expected(torch.zeros_like(cov), x, mask), x, mask if i == 1 else None)
        require_close(cov, reference, 1e-5, f"cov[{i}]")
