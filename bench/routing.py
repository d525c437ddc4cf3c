"""Routing scores: fastedit's backends against the products, activation and norm that memory editors call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastedit.bench import common
from fastedit.ops import routing_score, routing_score_reference

OPS = ("routing_score",)

LLAMA, GPT2_XL = (4096, 11008, "silu", False), (1600, 6400, "gelu_tanh", True)  # d_out, d_in, σ, transposed
FULL = {  # (layer, memories, tokens)
    "cpu": [(LLAMA, 2, 1), (LLAMA, 2, 16), (LLAMA, 2, 64), (LLAMA, 4, 1), (GPT2_XL, 2, 1), (GPT2_XL, 2, 64)],
    "cuda": [(LLAMA, 2, 1), (LLAMA, 2, 16), (LLAMA, 4, 64), (LLAMA, 4, 2048), (GPT2_XL, 2, 1), (GPT2_XL, 2, 512)],
}  # fmt: skip
QUICK = {"cpu": [((512, 1408, "silu", False), 2, 8)], "cuda": [(LLAMA, 2, 16)]}
DTYPES = ("bfloat16", "float32")
TOLERANCE = 1e-4
SIGMA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def wise(x: torch.Tensor, weights: list[torch.Tensor], activation: str, transposed: bool) -> torch.Tensor:
    """What WISE does, in the weights' dtype: every output, the activation, the norm of the difference."""
    sigma = SIGMA[activation]
    base, *memories = [sigma(x @ (w if transposed else w.T)) for w in weights]
    return torch.stack([(base - y).norm(dim=-1) for y in memories], -1)


def upcast(x: torch.Tensor, weights: list[torch.Tensor], activation: str, transposed: bool) -> torch.Tensor:
    """The same in float32."""
    return wise(x.float(), [w.float() for w in weights], activation, transposed)


def stacked(x: torch.Tensor, stack: torch.Tensor, activation: str, transposed: bool) -> torch.Tensor:
    """One batched product over weights that lie in one tensor, (m + 1, ...), in their dtype."""
    y = SIGMA[activation](torch.matmul(x, stack if transposed else stack.mT))
    return (y[:1] - y[1:]).norm(dim=-1).T


def problem(
    device: str, layer: tuple[int, int, str, bool], n_memories: int, n_tokens: int, dtype: str
) -> common.Problem:
    d_out, d_in, activation, transposed = layer
    generator = torch.Generator(device).manual_seed(0)
    shape = (d_in, d_out) if transposed else (d_out, d_in)
    base = torch.randn(shape, generator=generator, device=device) / d_in**0.5
    change = 0.2 * torch.randn(shape, generator=generator, device=device) / d_in**0.5
    stack = torch.stack([base + i * change for i in range(n_memories + 1)]).to(common.DTYPES[dtype])
    weights = list(stack.unbind(0))
    x = torch.randn(n_tokens, d_in, generator=generator, device=device).to(stack.dtype)
    args = (activation, transposed)
    reference = routing_score_reference(x, weights[0], weights[1:], *args)
    can, cannot = common.ours("routing_score", device, x, *weights)
    runs: dict[str, Any] = {
        common.OURS + name: common.by_backend(
            name, lambda: routing_score(x, weights[0], weights[1:], activation, transposed=transposed)
        )
        for name in can
    }
    runs["torch, in x's dtype (WISE)"] = lambda: wise(x, weights, *args)
    runs["torch batched, in x's dtype"] = lambda: stacked(x, stack, *args)
    if dtype != "float32":
        runs["torch fp32 upcast"] = lambda: upcast(x, weights, *args)
    errors = {}
    name_of_shape = f"{d_out}x{d_in} m{n_memories} T{n_tokens}"
    for name, run in runs.items():
        errors[name] = ((run() - reference).norm() / reference.norm()).item()
        if not errors[name] < (2e-2 if "x's dtype" in name else TOLERANCE):
            raise SystemExit(f"{name} is wrong at {name_of_shape} {dtype}: relative error {errors[name]:.2g}")
    # the fewest: every weight and token read once, scores written; a product with every weight
    n_bytes = stack.nbytes + x.nbytes + 4 * n_tokens * n_memories
    flops = 2 * n_tokens * stack.numel()
    return common.Problem("routing_score", name_of_shape, dtype, runs, errors, n_bytes, flops, cannot)


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for layer, n_memories, n_tokens in (QUICK if quick else FULL)[device]:
        for dtype in DTYPES:
            yield problem(device, layer, n_memories, n_tokens, dtype)


if __name__ == "__main__":
    common.main("routing")
