"""Neurons by share of mass, their scores, the square they select: fastedit's backends against torch's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import (
    gather_square,
    gather_square_reference,
    neuron_scores,
    neuron_scores_reference,
    neuron_select,
    neuron_select_reference,
)

OPS = ("neuron_select", "neuron_scores", "gather_square")
DTYPES = ("float32", "bfloat16")
MASS = 0.8
TOP_K = 512
NSE_ROWS = 4  # from this many rows on the loop of the published code would take seconds

# (rows, d, distribution)
SELECT = [
    (64, 14336, "normal"),
    (64, 14336, "heavy"),
    (64, 6400, "normal"),
    (1, 14336, "normal"),
    (1, 6400, "heavy"),
]
KEYS = [(14336, 100), (6400, 100)]  # (d, n)
SQUARE = {
    "cpu": [(6400, 3800), (6400, 400)],
    "cuda": [(14336, 8600), (6400, 3800), (14336, 1000)],
}  # (d, selected)
QUICK_SELECT, QUICK_KEYS, QUICK_SQUARE = [(8, 6400, "normal")], [(6400, 20)], [(1024, 600)]


# ---- selection ------------------------------------------------------------------------------------------


def sort_and_scatter(scores: torch.Tensor) -> torch.Tensor:
    """A mask by sorting every row: the usual way of top-p."""
    values, order = scores.sort(dim=1, descending=True)
    sums = values.cumsum(1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, sums - values < MASS * sums[:, -1:])


def nse(scores: torch.Tensor) -> list[list[int]]:
    """The way of NSE's published code: per row, a sort, then a Python loop over its running sum."""
    chosen = []
    for row in scores:
        order = torch.argsort(-row)
        total, running, picked = row.sum() * MASS, 0.0, []
        for i in order:
            running += row[i]
            if running > total:
                break
            picked.append(int(i))
        chosen.append(picked)
    return chosen


def scores_of(n_rows: int, d: int, kind: str, device: str) -> torch.Tensor:
    x = torch.randn(n_rows, d, generator=torch.Generator(device).manual_seed(0), device=device)
    return x.abs() if kind == "normal" else x.mul_(2).exp_()


def select_problem(device: str, n_rows: int, d: int, kind: str) -> common.Problem:
    scores = scores_of(n_rows, d, kind, device)
    reference = neuron_select_reference(scores, MASS)
    can, cannot = common.ours("neuron_select", device, scores)
    runs: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name in can:
        run = common.by_backend(name, lambda: neuron_select(scores, MASS))
        if not all(torch.equal(a, b) for a, b in zip(run(), reference, strict=True)):
            raise SystemExit(f"{name} selects another set at {n_rows}x{d} {kind}")
        runs[common.OURS + name], errors[common.OURS + name] = run, 0.0
    wrong = int((sort_and_scatter(scores.double()) != reference[0]).sum())
    if wrong:
        raise SystemExit(f"a float64 sort selects another set at {n_rows}x{d} {kind}: {wrong} neurons differ")
    runs["torch sort, cumsum, scatter"] = lambda: sort_and_scatter(scores)
    errors["torch sort, cumsum, scatter"] = (
        int((sort_and_scatter(scores) != reference[0]).sum()) / scores.numel()
    )
    runs[f"torch topk({TOP_K}), a fixed number"] = lambda: scores.topk(TOP_K, dim=1)
    if n_rows < NSE_ROWS:
        runs["loop over the sorted row (NSE)"] = lambda: nse(scores)
    # the fewest: scores read once, mask, indices and counts written once; nothing that a product could bound
    n_bytes = n_rows * (d * (4 + 1 + 4) + 4)
    return common.Problem(
        "neuron_select", f"{n_rows}x{d} {kind}", "float32", runs, errors, n_bytes, 0, cannot
    )


# ---- scores ---------------------------------------------------------------------------------------------


def scores_problem(device: str, d: int, n: int, layout: str, dtype: str) -> common.Problem:
    keys = torch.randn(n, d, generator=torch.Generator(device).manual_seed(0), device=device).to(
        common.DTYPES[dtype]
    )
    keys = keys.T if layout == "tokens" else keys.T.contiguous()
    reference = neuron_scores_reference(keys)
    can, cannot = common.ours("neuron_scores", device, keys)
    calls: dict[str, Callable[[], Any]] = {
        common.OURS + name: common.by_backend(name, lambda: neuron_scores(keys)) for name in can
    }
    calls["torch abs().sum(1) (NSE)"] = lambda: keys.abs().sum(1)
    calls["torch abs().sum(1, float64)"] = lambda: keys.abs().sum(1, dtype=torch.float64)
    errors = {name: ((run() - reference).norm() / reference.norm()).item() for name, run in calls.items()}
    for name, error in errors.items():
        if not error <= (0 if name.startswith(common.OURS) else 1e-2):
            raise SystemExit(f"{name} is wrong at {d}x{n} {layout} {dtype}: relative error {error:.2g}")
    n_bytes = keys.numel() * keys.element_size() + 8 * d
    return common.Problem("neuron_scores", f"{d}x{n} {layout}", dtype, calls, errors, n_bytes, 0, cannot)


# ---- squares --------------------------------------------------------------------------------------------


def square_problem(device: str, d: int, n: int, dtype: str) -> common.Problem:
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(d, d, generator=generator, device=device).to(common.DTYPES[dtype])
    indices = torch.randperm(d, generator=generator, device=device)[:n].sort().values
    reference = gather_square_reference(matrix, indices)
    can, cannot = common.ours("gather_square", device, matrix, indices)
    calls = {
        common.OURS + name: common.by_backend(name, lambda: gather_square(matrix, indices)) for name in can
    }
    calls["torch matrix[i][:, i] (NSE)"] = lambda: matrix[indices][:, indices]
    calls["torch matrix[i[:, None], i]"] = lambda: matrix[indices[:, None], indices]
    calls["torch index_select, twice"] = lambda: matrix.index_select(0, indices).index_select(1, indices)
    for name, run in calls.items():
        if not torch.equal(run(), reference):
            raise SystemExit(f"{name} is wrong at {d}, {n} {dtype}")
    n_bytes = 2 * n * n * matrix.element_size()
    return common.Problem(
        "gather_square", f"{d} to {n}", dtype, calls, dict.fromkeys(calls, 0.0), n_bytes, 0, cannot
    )


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for n_rows, d, kind in QUICK_SELECT if quick else SELECT:
        yield select_problem(device, n_rows, d, kind)
    for d, n in QUICK_KEYS if quick else KEYS:
        for layout in ("tokens", "neurons"):
            yield scores_problem(device, d, n, layout, "float32")
    for d, n in QUICK_SQUARE if quick else SQUARE[device]:
        for dtype in DTYPES:
            yield square_problem(device, d, n, dtype)


if __name__ == "__main__":
    common.main("neuron_select")
