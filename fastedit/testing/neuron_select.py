"""Cases of ``neuron_select``, ``neuron_scores`` and ``gather_square``: equal to the references, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.neuron_select import gather_square_reference, neuron_scores_reference, neuron_select_reference
from .case import BF16, FP16, FP32, FP64, INF, NAN, Case, case, normal, require, require_same

DTYPES = (BF16, FP16, FP32, FP64)
RULES = ("at_least", "prefix")
KINDS = ("normal", "heavy", "ties")
KEYS = ("no_neurons", "no_tokens", "one_neuron", "one_token", "primes", "transposed", "every_second")
WIDTHS = {(1, 0.5): "one", (17, 0.8): "primes", (33, 1e-9): "tiny_share", (150, 0.95): "large_share"}
Function = Callable[..., Any]


def rows(n_rows: int, d: int, kind: str, seed: int = 0) -> Tensor:
    """(n_rows, d) scores, not negative: half normal, of a heavy tail, or many of them equal."""
    x = normal(n_rows, d, seed=seed)
    if kind == "heavy":
        return x.mul_(3).exp_().clamp_(max=6e4)
    if kind == "ties":
        return x.mul_(2).round_().abs_()
    return x.abs_()


def views_of(store: Tensor) -> dict[str, Tensor]:
    """Scores (6, 10) in other shapes and strides."""
    return {
        "one row": store[0],
        "batch": store.view(3, 2, 10),
        "columns": store[:, 3:9],
        "every second": store[:, ::2],
        "transposed": store.T,
        "expanded": store[:1].expand(3, 10),
        "no rows": store[:0],
        "no columns": store[:, :0],
    }


VIEWS = tuple(views_of(torch.empty(6, 10)))


def cases() -> Iterator[Case]:
    """Every dtype and rule, equal scores, views, empty and invalid rows, indices in any order."""
    select, sums, square = (partial(case, op) for op in ("neuron_select", "neuron_scores", "gather_square"))
    for dtype in DTYPES:
        for rule in RULES:
            needs = "" if rule == "at_least" else "rule"
            for kind in KINDS:
                for (d, mass), width in WIDTHS.items():
                    given = {"dtype": dtype, "rule": rule, "kind": kind, "d": d, "mass": mass}
                    yield select(f"{rule}-{kind}-{width}", dtype, _select, needs, **given)
        for name in KEYS:
            needs = "views" if name in ("transposed", "every_second") else ""
            yield sums(name, dtype, _sums, needs, dtype=dtype, name=name)
        yield select("invalid rows", dtype, _invalid, dtype=dtype)
        for view in ("plain", "transposed", "every second column"):
            for index_dtype in (torch.int32, torch.int64):
                given = {"dtype": dtype, "view": view, "index_dtype": index_dtype, "d": 21}
                name = f"{view}-{str(index_dtype).removeprefix('torch.')}_indices"
                yield square(name, dtype, _square, "" if view == "plain" else "views", **given)
        larger = {"dtype": dtype, "view": "plain", "index_dtype": torch.int64, "d": 70}
        yield square("larger", dtype, _square, **larger)
    for view in VIEWS:
        yield select(f"view: {view}", FP32, _select_view, "views", name=view)
    yield sums("not finite", FP32, _sums_not_finite)
    yield square("not finite", FP32, _square_not_finite)


def _require_selection(out: Any, reference: tuple[Tensor, ...]) -> None:
    for name, got, wanted in zip(("mask", "indices", "counts"), out, reference, strict=True):
        require_same(got, wanted, name)


def _options(rule: str) -> dict[str, str]:
    return {} if rule == "at_least" else {"rule": rule}


def _select(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    rule: str,
    kind: str,
    d: int,
    mass: float,
) -> None:
    scores = rows(2, d, kind).to(dtype)
    out = function(scores.to(device), mass, **_options(rule))
    _require_selection(out, neuron_select_reference(scores, mass, rule))


def _invalid(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    """Rows that hold NaN, infinities or negative numbers select nothing and disturb no other."""
    scores = rows(6, 21, "normal").to(dtype)
    for i, value in enumerate((NAN, INF, -INF, -1.0)):
        scores[i, (i * 7) % 21] = value
    scores[4, 3] = -0.0
    for mass in (0.8, 1.0):
        out = function(scores.to(device), mass)
        _require_selection([t[:4] for t in out], _nothing(4, 21))
        _require_selection([t[4:] for t in out], neuron_select_reference(scores[4:], mass))


def _nothing(n: int, d: int) -> tuple[Tensor, ...]:
    indices = torch.full((n, d), -1, dtype=torch.int32)
    return torch.zeros(n, d, dtype=torch.bool), indices, torch.zeros(n, dtype=torch.int32)


def _select_view(function: Function, device: torch.device, tf32x3: bool, name: str) -> None:
    scores = views_of(rows(6, 10, "normal").to(device))[name]
    out = function(scores, 0.7)
    _require_selection(out, neuron_select_reference(scores.cpu(), 0.7))
    require(all(t.is_contiguous() for t in out), "the results must be contiguous")


def _sums(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, name: str) -> None:
    store = normal(37, 70, seed=2).mul_(3).exp_().to(dtype)  # sums that depend on their order
    store[::2] *= -1
    keys = {
        "no_neurons": store[:0],
        "no_tokens": store[:, :0],
        "one_neuron": store[:1].contiguous(),
        "one_token": store[:, :1].contiguous(),
        "primes": store[:, :13].contiguous(),
        "transposed": store.T,
        "every_second": store[::3, 1::2],
    }[name]
    require_same(function(keys.to(device)), neuron_scores_reference(keys))


def _sums_not_finite(function: Function, device: torch.device, tf32x3: bool) -> None:
    keys = torch.tensor([[1.0, NAN], [-INF, 1.0], [-1.0, 2.0]], device=device)
    require_same(function(keys), torch.tensor([NAN, INF, 3.0], dtype=FP64))


def _square(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    view: str,
    index_dtype: torch.dtype,
    d: int,
) -> None:
    store = normal(d, 2 * d, seed=3).to(dtype).to(device)
    matrix = {
        "plain": store[:, :d].contiguous(),
        "transposed": store[:, :d].T,
        "every second column": store[:, ::2],
    }[view]
    mixed = torch.randperm(d, generator=torch.Generator().manual_seed(3))[: d - 3]
    for indices in (
        torch.arange(d),
        mixed,
        torch.tensor([3, 3, 0]),
        torch.arange(0),
        torch.arange(2 * d)[::3] // 2,
    ):
        out = function(matrix, indices.to(index_dtype).to(device))
        require_same(out, gather_square_reference(matrix.cpu(), indices))
        require(out.is_contiguous(), "the result must be contiguous")


def _square_not_finite(function: Function, device: torch.device, tf32x3: bool) -> None:
    matrix = torch.tensor([[NAN, 1.0], [INF, -0.0]], device=device)
    out = function(matrix, torch.tensor([1, 0], device=device))
    same = out.cpu().view(torch.int32) == matrix.cpu().flip(0, 1).view(torch.int32)
    require(same.all(), "NaN, infinities or the sign of a zero are not kept")
