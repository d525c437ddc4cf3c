"""Low-rank update of a weight: fastedit's backends against the ways of published editing code and of torch."""

from __future__ import annotations

from typing import Any

import common
import torch

from fastedit.ops import backend, low_rank_update_

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
    def by(name: str) -> Any:
        def run(w: torch.Tensor) -> None:
            with backend.use_backend(name):
                low_rank_update_(w, left, right, ALPHA)

        return run

    names = common.ours("low_rank_update_", device, weight, left, right)[0]
    out = {common.OURS + name: by(name) for name in names}
    out["torch fp64 product (MEMIT)"] = lambda w: memit(w, left, right)
    out["torch fp32 product, cast, add"] = lambda w: cast(w, left, right)
    out["torch fp32, rounded once"] = lambda w: once(w, left, right)
    if weight.dtype != torch.float16 or device == "cuda":
        out["torch addmm_ in weight's dtype"] = lambda w: in_dtype(w, left, right)
    return out


def bench(device: str, d_out: int, d_in: int, rank: int, dtype: str, options: Any, limit: dict) -> list:
    head = {"op": "low_rank_update_", "device": device, "shape": f"{d_out}x{d_in} r{rank}", "dtype": dtype}
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(d_out, d_in, generator=generator, device=device).to(common.DTYPES[dtype])
    left = torch.randn(d_out, rank, generator=generator, device=device)
    right = torch.randn(d_in, rank, generator=generator, device=device)
    reference = start.double() + ALPHA * (left.double() @ right.double().T)
    runs, errors = {}, {}
    for name, run in providers(start, left, right, device).items():
        weight = start.clone()
        run(weight)
        errors[name] = ((weight - reference).norm() / reference.norm()).item()
        if not errors[name] < TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong on {head}: relative error {errors[name]:.2g}")
        runs[name] = lambda run=run, weight=weight: run(weight)
    del reference
    # the fewest: the weight read and written once, the factors read once
    n_bytes = 2 * start.nbytes + left.nbytes + right.nbytes
    flops = 2 * d_out * d_in * rank
    rows = common.measured(head, runs, errors, options.repetitions, n_bytes, flops, limit)
    _, cannot = common.ours("low_rank_update_", device, start)
    return rows + [common.not_measured(head, common.OURS + name, reason) for name, reason in cannot.items()]


def main() -> None:
    options = common.arguments("low_rank", __doc__)
    rows, limit = [], {}
    for device in options.devices:
        reason = common.no_gpu() if device == "cuda" else ""
        limit[device] = {} if reason else common.limits(device, DTYPES, options.quick)
        for d_out, d_in, rank in (QUICK if options.quick else FULL)[device]:
            for dtype in DTYPES:
                if reason:
                    shape = f"{d_out}x{d_in} r{rank}"
                    head = {"op": "low_rank_update_", "device": device, "shape": shape, "dtype": dtype}
                    rows += [common.not_measured(head, common.OURS + b, reason) for b in ("triton", "cuda")]
                else:
                    rows += bench(device, d_out, d_in, rank, dtype, options, limit[device])
    common.finish(options, rows, limit)


if __name__ == "__main__":
    main()
