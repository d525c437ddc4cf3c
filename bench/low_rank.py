"""Low-rank update of a weight: fastedit's backends against the ways of published editing code and of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import low_rank_update_

OPS = ("low_rank_update_",)

FULL = {  # (d_out, d_in, rank): GPT-2 XL, Llama-3-8B; one edit, a batch, a thousand
    "cpu": [(1600, 6400, 10), (4096, 14336, 1), (4096, 14336, 32), (4096, 4096, 256)],
    "cuda": [(4096, 14336, 1), (4096, 14336, 16), (4096, 14336, 100), (4096, 14336, 1000), (1600, 6400, 100)],
}
QUICK = {"cpu": [(1024, 1024, 16)], "cuda": [(4096, 14336, 16)]}
DTYPES = ("bfloat16", "float16", "float32")
ALPHA = 1e-3
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5}  # of one rounding to the weight's dtype


def memit(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """What MEMIT does: the product in float64, cast to float32, added."""
    weight += (ALPHA * (left.double() @ right.double().T)).float()


def cast(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The usual shorter way: the product in float32, cast to the weight's dtype, added (two roundings)."""
    weight += (ALPHA * (left @ right.T)).to(weight.dtype)


def in_dtype(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The best single call of torch: addmm_ in the weight's dtype, with rounded factors."""
    weight.addmm_(left.to(weight.dtype), right.to(weight.dtype).T, alpha=ALPHA)


def once(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Our arithmetic with torch's calls: everything in float32, rounded once."""
    weight.copy_(torch.addmm(weight.float(), left, right.T, alpha=ALPHA))


def providers(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, device: str) -> dict[str, Any]:
    out = {
        "torch fp64 product (MEMIT)": lambda w: memit(w, left, right),
        "torch fp32 product, cast, add": lambda w: cast(w, left, right),
        "torch fp32, rounded once": lambda w: once(w, left, right),
    }
    if weight.dtype != torch.float16 or device == "cuda":
        out["torch addmm_ in weight's dtype"] = lambda w: in_dtype(w, left, right)
    return out


def problem(device: str, d_out: int, d_in: int, rank: int, dtype: str) -> common.Problem:
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(d_out, d_in, generator=generator, device=device).to(common.DTYPES[dtype])
    left = torch.randn(d_out, rank, generator=generator, device=device)
    right = torch.randn(d_in, rank, generator=generator, device=device)
    reference = start.double() + ALPHA * (left.double() @ right.double().T)
    can, cannot = common.ours("low_rank_update_", device, start, left, right)
    calls = {
        common.OURS + name: lambda w, name=name: common.by_backend(
            name, lambda: low_rank_update_(w, left, right, ALPHA)
        )()
        for name in can
    }
    shape = f"{d_out}x{d_in} r{rank}"
    runs, errors = {}, {}
    for name, run in {**calls, **providers(start, left, right, device)}.items():
        weight = start.clone()
        run(weight)
        errors[name] = ((weight - reference).norm() / reference.norm()).item()
        if not errors[name] < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong at {shape} {dtype}: relative error {errors[name]:.2g}")
        runs[name] = lambda run=run, weight=weight: run(weight)
    # the fewest: the weight read and written once, the factors read once
    n_bytes = 2 * start.nbytes + left.nbytes + right.nbytes
    flops = 2 * d_out * d_in * rank
    return common.Problem("low_rank_update_", shape, dtype, runs, errors, n_bytes, flops, cannot)


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for d_out, d_in, rank in (QUICK if quick else FULL)[device]:
        for dtype in DTYPES:
            yield problem(device, d_out, d_in, rank, dtype)


if __name__ == "__main__":
    common.main("low_rank")
