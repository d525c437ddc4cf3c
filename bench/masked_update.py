"""Masked optimiser steps: fastedit's backends against torch's optimisers with a stored mask, and NumPy's mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import MaskedAdamState, PhiloxMask, masked_adam_, masked_sgd_

OPS = ("masked_sgd_", "masked_adam_", "philox_bits_")
DTYPES = ("float32",)

FULL = {  # (d_out, d_in): GPT-2 XL, Llama-2-7B, Llama-3-8B
    "cpu": [(1600, 6400), (4096, 11008)],
    "cuda": [(1600, 6400), (4096, 11008), (4096, 14336)],
}
QUICK = {"cpu": [(1024, 1024)], "cuda": [(4096, 11008)]}
TOKENS = {"cpu": (12, 128, 480), "cuda": (12, 480)}  # rows of the two factors of a gradient
LR, DECAY, CLAMP = 1e-3, 1e-5, 1.0
DENSITIES = (0.1, 0.2)
Runs = dict[str, Callable[[torch.Tensor], Any]]


def mask_of(density: float) -> PhiloxMask:
    return PhiloxMask(seed=1, shard=0, layer=27, density=density)


def random(shape: tuple[int, int], device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def compared(
    op: str, shape: str, runs: Runs, start: torch.Tensor, n_bytes: float, flops: float, cannot: dict[str, str]
) -> common.Problem:
    """Every provider compared with ``runs["reference"]`` in float64, then bound to its own weight."""
    reference = start.double()
    runs.pop("reference")(reference)
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name, run in runs.items():
        weight = start.clone()
        run(weight)
        errors[name] = ((weight - reference).norm() / reference.norm()).item()
        if not errors[name] < 1e-6:
            raise SystemExit(f"{name} is wrong at {op} {shape}: relative error {errors[name]:.2g}")
        calls[name] = functools.partial(run, weight)
    return common.Problem(op, shape, "float32", calls, errors, n_bytes, flops, cannot)


def by_backends(can: list[str], call: Callable[[torch.Tensor], Any]) -> Runs:
    return {common.OURS + name: functools.partial(_by_backend, name, call) for name in can}


def _by_backend(name: str, call: Callable[[torch.Tensor], Any], weight: torch.Tensor) -> None:
    common.by_backend(name, lambda: call(weight))()


# ---- SGD ------------------------------------------------------------------------------------------------


def wise(w: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor, bound: torch.Tensor) -> None:
    """What WISE's published code does: gradient times an int64 mask, SGD with decay, two bounds, clamp."""
    g = grad * mask
    w -= LR * (g + DECAY * w)
    w.copy_(torch.clamp(w, min=bound - CLAMP, max=bound + CLAMP))


def sgd_problem(device: str, d_out: int, d_in: int, density: float) -> common.Problem:
    start, grad = random((d_out, d_in), device, 0), random((d_out, d_in), device, 1)
    bound, mask = start.clone(), mask_of(density)
    integers = mask.dense(start.shape, device=device).long()
    floats = integers.float()
    optimised = torch.nn.Parameter(start.clone())
    optimised.grad = torch.empty_like(start)
    optimiser = torch.optim.SGD([optimised], lr=LR, weight_decay=DECAY, fused=True)

    def fused(w: torch.Tensor) -> None:
        optimised.data = w
        torch.mul(grad, floats, out=optimised.grad)
        optimiser.step()
        w.clamp_(bound - CLAMP, bound + CLAMP)

    def step(w: torch.Tensor, chosen: PhiloxMask | None = mask) -> None:
        masked_sgd_(w, grad, chosen, LR, decay=DECAY, clamp_to=bound, clamp=CLAMP)

    can, cannot = common.ours("masked_sgd_", device, start, grad)
    runs: Runs = {
        "reference": lambda w: wise(w, grad, integers, bound),
        **by_backends(can, step),
        "torch, int64 mask (WISE)": lambda w: wise(w, grad, integers, bound),
        "torch fused SGD, float mask": fused,
    }
    n_bytes = 4 * start.nbytes  # the weight read and written, the gradient and the bound read
    return compared("masked_sgd_", f"{d_out}x{d_in} {density}", runs, start, n_bytes, 0.0, cannot)


def product_problem(device: str, d_out: int, d_in: int, tokens: int) -> common.Problem:
    start = random((d_out, d_in), device, 0)
    left, right = random((d_out, tokens), device, 1), random((d_in, tokens), device, 2)
    mask, whole = mask_of(DENSITIES[-1]), torch.empty_like(start)
    dense = mask.dense(start.shape, device=device)

    def separate(w: torch.Tensor) -> None:
        torch.mm(left, right.T, out=whole)
        masked_sgd_(w, whole, mask, LR, decay=DECAY)

    def in_double(w: torch.Tensor) -> None:
        w -= LR * (torch.where(dense, left.double() @ right.double().T, 0.0) + DECAY * w)

    can, cannot = common.ours("masked_sgd_", device, start, left)
    runs: Runs = {
        "reference": in_double,
        **by_backends(can, lambda w: masked_sgd_(w, (left, right), mask, LR, decay=DECAY)),
        "torch mm, then masked_sgd_": separate,
    }
    n_bytes, flops = 2 * start.nbytes + left.nbytes + right.nbytes, 2.0 * start.numel() * tokens
    return compared("masked_sgd_", f"{d_out}x{d_in} product of {tokens}", runs, start, n_bytes, flops, cannot)


# ---- Adam -----------------------------------------------------------------------------------------------


def adam_problem(device: str, d_out: int, d_in: int, density: float) -> common.Problem:
    start, grad = random((d_out, d_in), device, 0), random((d_out, d_in), device, 1)
    mask = mask_of(density)
    floats = mask.dense(start.shape, device=device).float()
    optimised = torch.nn.Parameter(start.clone())
    optimised.grad = torch.empty_like(start)
    optimiser = torch.optim.Adam([optimised], lr=LR, fused=True)
    m, v = torch.zeros_like(start), torch.zeros_like(start)

    def fused(w: torch.Tensor) -> None:
        optimised.data = w
        torch.mul(grad, floats, out=optimised.grad)
        optimiser.step()

    def unfused(w: torch.Tensor, m: torch.Tensor = m, v: torch.Tensor = v) -> None:
        g = grad * floats
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        w.addcdiv_(m / (1 - 0.9), (v / (1 - 0.999)).sqrt_().add_(1e-8), value=-LR)

    def in_double(w: torch.Tensor) -> None:
        unfused(w, torch.zeros_like(w), torch.zeros_like(w))

    can, cannot = common.ours("masked_adam_", device, start, grad)
    runs: Runs = {"reference": in_double}
    for name in can:
        state = MaskedAdamState(start, mask)
        runs |= by_backends([name], functools.partial(masked_adam_, grad=grad, mask=mask, state=state, lr=LR))
    runs |= {"torch, full tensors": unfused, "torch fused Adam, float mask": fused}
    n_bytes = 3 * start.nbytes + 16 * mask.count(start.numel(), device=device)
    return compared("masked_adam_", f"{d_out}x{d_in} {density}", runs, start, n_bytes, 0.0, cannot)


# ---- the mask alone -------------------------------------------------------------------------------------


def bits_problem(device: str, d_out: int, d_in: int, density: float) -> common.Problem:
    """Packed bits of a new mask, and NumPy's draw of it as WISE makes it; what a masked step pays for its mask."""
    import numpy as np

    n, mask = d_out * d_in, mask_of(density)
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8, device=device)
    can, cannot = common.ours("philox_bits_", device, bits)
    runs: dict[str, Callable[[], Any]] = {
        common.OURS + name: common.by_backend(
            name, lambda: torch.ops.fastedit.philox_bits_(bits, 0, mask.key)
        )
        for name in can
        if name != "torch"
    }
    if device == "cpu":
        runs["NumPy choice (WISE)"] = lambda: np.random.choice([1, 0], size=n, p=[density, 1 - density])
    selected = abs(mask.count(n, device=device) / n - density)
    errors = {name: selected for name in runs if name.startswith(common.OURS)}
    return common.Problem(
        "philox_bits_", f"{d_out}x{d_in} {density}", "float32", runs, errors, n / 8, 0.0, cannot
    )


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for d_out, d_in in (QUICK if quick else FULL)[device]:
        for density in DENSITIES:
            yield sgd_problem(device, d_out, d_in, density)
            yield adam_problem(device, d_out, d_in, density)
    yield bits_problem(device, *(QUICK if quick else FULL)[device][0], DENSITIES[-1])
    for d_out, d_in in (QUICK if quick else FULL)[device][:2]:
        for tokens in TOKENS[device]:
            yield product_problem(device, d_out, d_in, tokens)


if __name__ == "__main__":
    common.main("masked_update")
