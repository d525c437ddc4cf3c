"""Merging of weight updates (TIES): fastedit's backends against what editing code does and the best of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import ties_merge, ties_merge_reference

OPS = ("ties_merge",)
DTYPES = ()  # no products: bytes are the limit

DENSITY = 0.53
FULL = {  # (tensors, entries): on a GPU Llama-2-7B's 11008 x 4096
    "cpu": [(3, 4_000_000), (8, 1_000_000), (3, 10_000)],
    "cuda": [(2, 11008 * 4096), (3, 11008 * 4096), (8, 4096 * 4096)],
}
QUICK = {"cpu": [(3, 1_000_000)], "cuda": [(2, 4096 * 4096)]}


def sorting(tensors: list[torch.Tensor], weights: list[float], base: torch.Tensor) -> torch.Tensor:
    """What editing code does: sorted top-k with indices, a mask of zeros and ones, all differences stacked."""
    trimmed = []
    for tensor in tensors:
        delta = tensor - base
        kept = torch.topk(delta.abs().float(), int(DENSITY * delta.numel()), largest=True).indices
        mask = torch.zeros_like(delta)
        mask[kept] = 1
        trimmed.append(delta * mask)
    stacked = torch.stack(trimmed)
    factors = torch.tensor(weights, dtype=base.dtype, device=base.device)[:, None]
    updates = stacked * factors
    sign = (updates.sum(0) >= 0).to(base.dtype) * 2 - 1
    agrees = (updates.sign() == sign).to(base.dtype)
    divisor = (factors * agrees).sum(0)
    divisor[divisor == 0] = 1
    return base + (updates * agrees).sum(0) / divisor


def selecting(tensors: list[torch.Tensor], weights: list[float], base: torch.Tensor) -> torch.Tensor:
    """The best of torch and NumPy: selection instead of sorting, no masks but comparisons, sums in place."""
    start = base.float()
    updates = []
    total = torch.zeros_like(start)
    for tensor, weight in zip(tensors, weights, strict=True):
        delta = tensor - start
        magnitude = delta.abs()
        n = delta.numel()
        smallest = n - int(DENSITY * n)
        if base.device.type == "cpu":
            import numpy as np

            threshold = float(np.partition(magnitude.numpy(), smallest)[smallest])
        else:
            threshold = magnitude.kthvalue(smallest + 1).values
        delta.mul_(magnitude.ge_(threshold)).mul_(weight)
        total.add_(delta)
        updates.append(delta)
    sign = total.ge_(0).mul_(2).sub_(1)
    merged = torch.zeros_like(start)
    divisor = torch.zeros_like(start)
    for update, weight in zip(updates, weights, strict=True):
        agrees = update * sign > 0
        merged.addcmul_(update, agrees)
        divisor.add_(agrees, alpha=weight)
    divisor.masked_fill_(divisor == 0, 1)
    return merged.div_(divisor).add_(start).to(base.dtype)


def problem(device: str, m: int, n: int, dtype: str) -> common.Problem:
    generator = torch.Generator(device).manual_seed(0)
    kind = common.DTYPES[dtype]
    base = (0.02 * torch.randn(n, generator=generator, device=device)).to(kind)
    edits = [1e-3 * torch.randn(n, generator=generator, device=device) for _ in range(m)]
    tensors = [(base.float() + edit).to(kind) for edit in edits]
    weights = [1.0] * m
    doubles = [t.double() for t in tensors]
    reference = ties_merge_reference(doubles, weights, DENSITY, base.double())
    can, cannot = common.ours("ties_merge", device, base)
    calls: dict[str, Any] = {
        common.OURS + name: common.by_backend(name, lambda: ties_merge(tensors, weights, DENSITY, base))
        for name in can
    }
    calls["torch topk (editing code)"] = lambda: sorting(tensors, weights, base)
    calls["selection, in place"] = lambda: selecting(tensors, weights, base)
    errors = {}
    change = (reference - base.double()).norm()
    for name, run in calls.items():
        errors[name] = ((run().double() - reference).norm() / change).item()
        # entries equal to the threshold are many in bfloat16 and float16: only ours keep the same ones
        tolerance = 1e-2 if dtype == "float32" else 0.3 if dtype == "bfloat16" else 0.1
        if not errors[name] < tolerance:
            raise SystemExit(f"{name} is wrong at {m}x{n} {dtype}: relative error {errors[name]:.2g}")
    size = base.element_size()
    n_bytes = (
        (2 * (m + 1) + 1) * n * size
    )  # inputs and base twice: the threshold needs all before the first output
    flops = 4 * m * n
    return common.Problem("ties_merge", f"{m}x{n}", dtype, calls, errors, n_bytes, flops, cannot)


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for m, n in (QUICK if quick else FULL)[device]:
        for dtype in ("float32", "bfloat16", "float16"):
            yield problem(device, m, n, dtype)


if __name__ == "__main__":
    common.main("ties")
