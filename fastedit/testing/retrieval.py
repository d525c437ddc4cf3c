"""Cases of ``nearest_key`` and ``max_inner_product``: the same indices as in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.retrieval import max_inner_product_reference, nearest_key_reference
from .case import BF16, FP16, FP32, INF, NAN, Case, case, require
from .case import normal as normal_numbers

INT8 = torch.int8
DTYPES = (FP32, BF16, FP16, INT8)
SHAPES = {  # (queries, keys, d, k)
    "one": (1, 1, 1, 1),
    "one_query": (1, 53, 17, 3),
    "three_queries": (3, 31, 65, 2),
    "above_tiles": (5, 97, 33, 7),
    "many_queries": (17, 48, 64, 1),
    "fewer_keys_than_k": (4, 3, 5, 5),
}
EMPTY = {"no_queries": (0, 5, 3), "no_keys": (2, 0, 3), "no_columns": (2, 5, 0), "nothing": (0, 0, 0)}
VIEWS = ("columns", "every second row", "transposed", "every second column", "one key")
SIZES = {"squares_vanish": 1e-30, "small": 1e-16, "large": 1e17, "squares_overflow": 1e30}
Function = Callable[..., Any]
Found = tuple[Tensor, Tensor]


def normal(
    *shape: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """Normal numbers; int8 ones of standard deviation 20."""
    x = normal_numbers(*shape, seed=seed)
    return (x * 20 if dtype == INT8 else x).to(dtype).to(device)


def scale_for(keys: Tensor) -> Tensor | None:
    """A scale for int8 keys, negative and zero ones among them."""
    return None if keys.dtype != INT8 else torch.linspace(-0.3, 1.0, len(keys), device=keys.device)


def same(out: Found, reference: Found) -> None:
    """Raise AssertionError unless indices are equal and values agree to float32's rounding."""
    index, value = (t.cpu() for t in out)
    require(index.dtype == torch.int64, f"indices must be int64, not {index.dtype}")
    require(value.dtype == FP32, f"values must be float32, not {value.dtype}")
    require(
        index.tolist() == reference[0].tolist(), f"indices are {index.tolist()}, not {reference[0].tolist()}"
    )
    torch.testing.assert_close(value, reference[1], rtol=2e-7, atol=0, equal_nan=True)


def check_nearest(
    function: Function,
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> Found:
    """Call a ``nearest_key`` and compare with the reference."""
    out = function(queries, keys, *_given(radius, alive), **_scale(scale))
    same(out, nearest_key_reference(queries.cpu(), keys.cpu(), _cpu(radius), _cpu(alive), scale=_cpu(scale)))
    return out


def check_product(
    function: Function,
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> Found:
    """Call a ``max_inner_product`` and compare with the reference."""
    options: dict[str, Any] = {**_scale(scale), **({} if ties == "lowest" else {"ties": ties})}
    out = function(queries, keys, threshold, k, *_given(alive), **options)
    reference = max_inner_product_reference(
        queries.cpu(), keys.cpu(), _cpu(threshold), k, _cpu(alive), scale=_cpu(scale), ties=ties
    )
    same(out, reference)
    return out


def view_of(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries, keys, radius and flags in one of the ways of ``VIEWS``."""
    store = normal(60, 50, device=device)
    queries = normal(20, 12, device=device, seed=1)
    flags = torch.arange(120, device=device).reshape(60, 2) % 3 != 0
    radius = torch.full((60, 2), 4.0, device=device)
    views: dict[str, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {
        "columns": (queries[:3], store[:, 5:17], radius[:, 0], flags[:, 1]),
        "every second row": (queries[::4], store[::2, :12], radius[::2, 1], flags[::2, 0]),
        "transposed": (queries[:12, :4].T, store[:12, :].T, None, None),
        "every second column": (queries[:2, ::2], store[:, :12:2], None, flags[:, 0]),
        "one key": (queries, store[0, :12].expand(7, 12), None, None),
    }
    q, keys, r, alive = views[name]
    return q[:, : keys.shape[1]], keys[:, : q.shape[1]], r, alive


def cases() -> Iterator[Case]:
    """Odd shapes, dead keys poisoned, thresholds, equal and nearly equal keys, views, what is not finite."""
    for op in ("nearest_key", "max_inner_product"):
        new = partial(case, op)
        for dtype in DTYPES:
            scaled = " scale" if dtype == INT8 else ""
            for shape, sizes in SHAPES.items():
                yield new(shape, dtype, _plain, scaled, op=op, dtype=dtype, sizes=sizes)
                needs = f"alive threshold{scaled}" + (" ties" if op == "max_inner_product" else "")
                yield new(f"{shape}-dead_keys", dtype, _dead, needs, op=op, dtype=dtype, sizes=sizes)
        for dtype in (BF16, FP16):
            yield new("queries in half precision", dtype, _half, op=op, dtype=dtype)
        for n in (1, 6):
            yield new(f"{n} queries-equal keys", FP32, _equal, op=op, n=n)
            yield new(f"{n} queries-nearly equal keys", FP32, _nearly, op=op, n=n)
            yield new(f"{n} queries-not finite", FP32, _not_finite, op=op, n=n)
            for name, size in SIZES.items():
                yield new(f"{n} queries-{name}", FP32, _sizes, op=op, n=n, size=size)
        yield new("far from the origin", FP32, _far, op=op)
        for name, empty in EMPTY.items():
            yield new(name, FP32, _empty, op=op, sizes=empty)
        yield new("none alive", FP32, _none_alive, "alive", op=op)
        for view in VIEWS:
            yield new(f"view: {view}", FP32, _view, "views alive threshold", op=op, name=view)


def _check(function: Function, op: str, queries: Tensor, keys: Tensor, k: int = 1, **more: Any) -> Found:
    if op == "nearest_key":
        return check_nearest(function, queries, keys, **more)
    return check_product(function, queries, keys, None, k, **more)


def _plain(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    op: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
) -> None:
    n_queries, n_keys, d, k = sizes
    queries, keys = normal(n_queries, d, seed=1, device=device), normal(n_keys, d, dtype=dtype, device=device)
    _check(function, op, queries, keys, k, scale=scale_for(keys))


def _dead(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    op: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
) -> None:
    n_queries, n_keys, d, k = sizes
    queries, keys = normal(n_queries, d, seed=1, device=device), normal(n_keys, d, dtype=dtype, device=device)
    alive = torch.arange(n_keys, device=device) % 3 != 1
    keys[~alive] = 100 if dtype == INT8 else NAN
    scale = scale_for(keys)
    if op == "nearest_key":
        _, nearest = nearest_key_reference(queries.cpu(), keys.cpu(), None, alive.cpu(), scale=_cpu(scale))
        radius = nearest.median().to(device) * torch.linspace(0.5, 2, n_keys, device=device)
        check_nearest(function, queries, keys, radius, alive, scale)
        return
    threshold = 3 * normal(n_queries, device=device, seed=2)
    check_product(function, queries, keys, threshold, k, alive, scale)
    check_product(function, queries, keys, threshold, k, alive, scale, ties="highest")


def _half(function: Function, device: torch.device, tf32x3: bool, op: str, dtype: torch.dtype) -> None:
    queries = normal(3, 20, dtype=dtype, device=device, seed=3)
    keys = normal(40, 20, dtype=dtype, device=device)
    queries[1] = keys[7]
    _check(function, op, queries, keys, 2)


def _equal(function: Function, device: torch.device, tf32x3: bool, op: str, n: int) -> None:
    rows = normal(1, 70, device=device).expand(37, 70).contiguous()
    _check(function, op, normal(n, 70, device=device, seed=1), rows, 3)


def _nearly(function: Function, device: torch.device, tf32x3: bool, op: str, n: int) -> None:
    """Keys that differ in the last bit of one element: no float32 sum tells them apart."""
    keys = normal(1, 129, device=device).repeat(50, 1)
    keys[31, 64] = torch.nextafter(keys[31, 64], torch.tensor(INF, device=device))
    queries = keys[31].repeat(n, 1)
    if op == "max_inner_product":
        queries[:, 64] = 1.0
    _check(function, op, queries, keys, 2)


def _not_finite(function: Function, device: torch.device, tf32x3: bool, op: str, n: int) -> None:
    keys = normal(40, 24, device=device)
    keys[3, 5], keys[17, 0], keys[20, 23] = NAN, INF, -INF
    queries = normal(n, 24, device=device, seed=5)
    _check(function, op, queries, keys, 40)  # an infinite score is one; NaN is none
    for column, value in ((2, NAN), (slice(None), 0.0), (1, INF)):
        queries[0, column] = value
        _check(function, op, queries, keys, 3)


def _sizes(function: Function, device: torch.device, tf32x3: bool, op: str, n: int, size: float) -> None:
    keys, queries = size * normal(40, 24, device=device), normal(n, 24, device=device, seed=5)
    _check(function, op, queries * (size if op == "nearest_key" else 1), keys, 3)


def _far(function: Function, device: torch.device, tf32x3: bool, op: str) -> None:
    """Where the expansion of distances by inner products cancels."""
    keys = normal(60, 48, device=device) * 1e-3 + 100
    queries = keys[[5, 59]] + 1e-5
    _check(function, op, queries, keys)
    _check(function, op, queries.repeat(3, 1), keys)


def _empty(
    function: Function, device: torch.device, tf32x3: bool, op: str, sizes: tuple[int, int, int]
) -> None:
    queries, keys = torch.ones(sizes[0], sizes[2], device=device), torch.ones(sizes[1:], device=device)
    _check(function, op, queries, keys, 2)


def _none_alive(function: Function, device: torch.device, tf32x3: bool, op: str) -> None:
    queries, keys = normal(2, 8, device=device), normal(9, 8, device=device)
    _check(function, op, queries, keys, 2, alive=torch.zeros(9, dtype=torch.bool, device=device))


def _view(function: Function, device: torch.device, tf32x3: bool, op: str, name: str) -> None:
    queries, keys, radius, alive = view_of(name, device)
    if op == "nearest_key":
        check_nearest(function, queries, keys, radius, alive)
    else:
        check_product(function, queries, keys, queries[:, 0], 2, alive)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _given(*tensors: Tensor | None) -> list[Tensor | None]:
    """Trailing arguments that are None are left out, so that functions without them can be checked."""
    given = list(tensors)
    while given and given[-1] is None:
        given.pop()
    return given


def _scale(scale: Tensor | None) -> dict[str, Tensor]:
    return {} if scale is None else {"scale": scale}
