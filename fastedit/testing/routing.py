"""Cases of ``routing_score``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.routing import routing_score_reference
from .case import BF16, FP16, FP32, FP64, NAN, Case, case, normal, require, require_same

DTYPES = (BF16, FP16, FP32)
ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh")
SHAPES = {  # (tokens, d_in, d_out)
    "one": (1, 1, 1),
    "few_primes": (3, 31, 17),
    "few_above_tile": (8, 33, 40),
    "many_primes": (17, 45, 33),
    "whole_tiles": (32, 64, 32),
}
EMPTY = {
    "no_tokens": ((0, 7), 5),
    "empty_batch": ((2, 0, 7), 5),
    "no_outputs": ((3, 7), 0),
    "no_inputs": ((3, 0), 5),
}
TOLERANCE = {BF16: 2e-6, FP16: 2e-6, FP32: 2e-6, FP64: 1e-14}
Function = Callable[..., Any]


def layer(
    d_in: int,
    d_out: int,
    dtype: torch.dtype,
    n_memories: int = 2,
    transposed: bool = False,
    device: torch.device | str = "cpu",
    distance: float = 0.2,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """A base weight and memories near it, of the scale of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    memories = [
        base + distance * torch.randn(d_out, d_in, generator=generator) / d_in**0.5 for _ in range(n_memories)
    ]
    base, *memories = [w.to(dtype).to(device) for w in (base, *memories)]
    if transposed:
        base, *memories = [w.T.contiguous() for w in (base, *memories)]
    return base, memories


def tokens(
    *shape: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", seed: int = 1
) -> Tensor:
    """Standard normal inputs."""
    return normal(*shape, dtype=dtype, device=device, seed=seed)


def error(
    scores: Tensor,
    x: Tensor,
    base: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    **options: Any,
) -> float:
    """The largest error, relative to the length of the outputs: a score is a difference of them."""
    options = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in options.items()}
    x, base = x.cpu(), base.cpu()
    reference = routing_score_reference(x, base, [w.cpu() for w in memories], activation, **options)
    origin = routing_score_reference(x, base, [torch.zeros_like(base)], activation, **options)
    scale = origin.norm() / max(1, origin.numel()) ** 0.5 + reference.norm()
    return ((scores.cpu() - reference).abs().max() / scale).item() if reference.numel() else 0.0


def views_of(x: Tensor) -> dict[str, Tensor]:
    """Inputs of width 20 out of (40, 43)."""
    return {
        "offset columns": x[:, 3:23],
        "every second row": x[::2, :20],
        "transposed": x[:20].T,
        "every second column": x[:3, :40:2],
        "one token": x[0, :20],
        "batch": x[:, :20].view(4, 10, 20)[:, 1:],
    }


VIEWS = tuple(views_of(torch.empty(40, 43)))


def cases() -> Iterator[Case]:
    """Every dtype, odd shapes, activations, biases, numbers of memories, views, empty inputs, NaN."""
    new = partial(case, "routing_score")
    for dtype in DTYPES:
        for shape, sizes in SHAPES.items():
            yield new(f"{shape}-out_in", dtype, _plain, dtype=dtype, sizes=sizes, transposed=False)
            needs = "transposed bias"
            yield new(f"{shape}-in_out", dtype, _plain, needs, dtype=dtype, sizes=sizes, transposed=True)
        yield new("inside a larger tensor", dtype, _inside, "views", dtype=dtype)
    for n in (2, 20):
        for activation in ACTIVATIONS:
            for metric in ("activated", "linear"):
                needs = "bias" + (" metric" if metric == "linear" else "")
                given = {"n": n, "activation": activation, "metric": metric}
                yield new(f"{n} tokens-{activation}-{metric}", FP32, _activation, needs, **given)
            if activation != "identity":
                yield new(f"{n} tokens-{activation}-NaN", FP32, _nan, n=n, activation=activation)
        yield new(f"{n} tokens-mixed dtypes", BF16, _mixed, "mixed", n=n)
    for n in (0, 1, 5, 9):
        yield new(f"{n} memories", FP32, _memories, n=n)
    for name, (empty, d_out) in EMPTY.items():
        yield new(name, FP32, _empty, shape=empty, d_out=d_out)
    for view in VIEWS:
        yield new(f"view: {view}", FP32, _view, "views", name=view)
    yield new("float64", FP64, _float64)


def _compare(
    function: Function, x: Tensor, base: Tensor, memories: list[Tensor], activation: str, **options: Any
) -> None:
    scores = function(x, base, memories, activation, **options)
    dtype = FP64 if x.dtype == FP64 else FP32
    require(scores.dtype == dtype, f"scores must be {dtype}, not {scores.dtype}")
    wanted = (*x.shape[:-1], len(memories))
    require(tuple(scores.shape) == wanted, f"scores have shape {tuple(scores.shape)}, not {wanted}")
    found = error(scores, x, base, memories, activation, **options)
    require(
        found < TOLERANCE[x.dtype],
        f"scores have an error of {found:.1e}, allowed are {TOLERANCE[x.dtype]:.1e}",
    )


def _plain(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    transposed: bool,
) -> None:
    n_tokens, d_in, d_out = sizes
    base, memories = layer(d_in, d_out, dtype, 2, transposed, device)
    options: dict[str, Any] = {}
    if transposed:
        options = {"transposed": True, "bias": tokens(d_out, dtype=dtype, device=device, seed=2)}
    _compare(function, tokens(n_tokens, d_in, dtype=dtype, device=device), base, memories, "silu", **options)


def _inside(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype) -> None:
    """Weights that are parts of larger tensors, or stored the other way round, or each in its own way."""
    base, memories = layer(20, 16, dtype, device=device)
    larger = torch.full((3, 20, 24), NAN, dtype=dtype, device=device)
    inside = [larger[i, 2:18, 1:21].copy_(w) for i, w in enumerate((base, *memories))]
    turned = [w.T.contiguous().T for w in (base, *memories)]
    mixed = [base, turned[1], memories[1]]
    for n_tokens in (2, 20):
        x = tokens(n_tokens, 20, dtype=dtype, device=device)
        for weights in (inside, turned, mixed):
            _compare(function, x, weights[0], weights[1:], "silu")


def _activation(
    function: Function, device: torch.device, tf32x3: bool, n: int, activation: str, metric: str
) -> None:
    base, memories = layer(24, 20, FP32, 1, device=device, distance=1.0)
    x, bias = 4 * tokens(n, 24, device=device), tokens(20, device=device, seed=2)
    options = {"bias": bias, **({"metric": metric} if metric == "linear" else {})}
    _compare(function, x, base, memories, activation, **options)


def _nan(function: Function, device: torch.device, tf32x3: bool, n: int, activation: str) -> None:
    """It stays with its token."""
    base, memories = layer(20, 16, FP32, device=device)
    x = tokens(n, 20, device=device)
    clean = function(x, base, memories, activation)
    x[1, 4] = NAN
    scores = function(x, base, memories, activation)
    require(scores[1].isnan().all(), "the scores of a token that holds NaN must be NaN")
    rest = torch.arange(n, device=device) != 1
    require_same(scores[rest], clean[rest].cpu(), "the score of a token beside one that holds NaN")


def _mixed(function: Function, device: torch.device, tf32x3: bool, n: int) -> None:
    base, memories = layer(20, 16, FP32, device=device)
    weights = [base.to(BF16), memories[0], memories[1].to(FP16)]
    _compare(function, tokens(n, 20, dtype=BF16, device=device), weights[0], weights[1:], "silu")


def _memories(function: Function, device: torch.device, tf32x3: bool, n: int) -> None:
    base, memories = layer(18, 20, FP32, n, device=device)
    _compare(function, tokens(2, 3, 18, device=device), base, memories, "silu")


def _empty(
    function: Function, device: torch.device, tf32x3: bool, shape: tuple[int, ...], d_out: int
) -> None:
    weight = torch.ones(d_out, shape[-1], device=device)
    scores = function(torch.ones(shape, device=device), weight, [weight, weight + 1], "silu")
    require_same(scores, torch.zeros(*shape[:-1], 2), "the scores of nothing")


def _view(function: Function, device: torch.device, tf32x3: bool, name: str) -> None:
    base, memories = layer(20, 16, FP32, device=device)
    _compare(function, views_of(tokens(40, 43, device=device))[name], base, memories, "silu")


def _float64(function: Function, device: torch.device, tf32x3: bool) -> None:
    base, memories = layer(20, 16, FP64, device=device)
    _compare(function, tokens(5, 20, dtype=FP64, device=device), base, memories, "gelu")
