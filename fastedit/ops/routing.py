"""How far a side memory would move a layer's output, and which memory a sample is therefore routed to.

Source: Wang et al. 2024 (WISE), eq. 3 and 4. Their code applies the activation to the outputs,
‖σ(W x) − σ(W' x)‖, and published thresholds belong to that; the paper's formula leaves it out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, check

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_METRICS = ("activated", "linear")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
_ALIASES = {  # as transformers' configurations say it
    "linear": "identity",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """σ by one of the names that :func:`routing_score` takes, for autograd; ValueError for an unknown name."""
    name = _ALIASES.get(name, name)
    check.choice("activation_function", tuple(_ACTIVATIONS), activation=name)
    return _ACTIVATIONS[name]


def _check(
    x: Tensor,
    base_weight: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> None:
    op = "routing_score"
    named = {f"memories[{i}]": memory for i, memory in enumerate(memories)}
    check.matrix(op, base_weight=base_weight)
    d_out, d_in = base_weight.shape[::-1] if transposed else base_weight.shape
    check.last_dim(op, d_in, "base_weight", x=x)
    check.shape(op, base_weight.shape, "like base_weight", **named)
    check.shape(op, (d_out,), "to fit base_weight", bias=bias)
    check.choice(op, tuple(_ACTIVATIONS), activation=activation)
    check.choice(op, _METRICS, metric=metric)
    check.dtype(op, _DTYPES, x=x, base_weight=base_weight, bias=bias, **named)
    double = [tensor.dtype == torch.float64 for tensor in (x, base_weight, *memories)]
    if any(double) and not all(double):
        raise TypeError(f"{op}: x, base_weight and memories must be float64 if one of them is")
    check.same_device(op, x=x, base_weight=base_weight, bias=bias, **named)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, base_weight: Tensor, memories: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(memories)), dtype=_result_dtype(x))


backend.define(
    "routing_score",
    "(Tensor x, Tensor base_weight, Tensor[] memories, str activation, bool transposed=False, "
    "Tensor? bias=None, str metric='activated') -> Tensor",
    _fake,
    check=_check,
)


def routing_score(
    x: Tensor,
    base_weight: Tensor,
    memories: Tensor | Sequence[Tensor],
    activation: str,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    """Score every token against every memory: s[t, m] = ‖σ(W x_t + b) − σ(W_m x_t + b)‖ over d_out.

    All memories in one pass; no output of any weight is written to memory.

    Args:
        x: (..., d_in), the layer's input; bfloat16, float16, float32 or float64; any strides.
        base_weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; dtypes as for x.
        memories: (m, d_out, d_in) or a sequence of m tensors, stored like ``base_weight``; m may be 0.
        activation: σ: ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``; also by the names of
            transformers, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"gelu_fast"``, ``"swish"``, ``"linear"``.
        transposed: weights are stored (d_in, d_out), as in GPT-2.
        bias: (d_out,), added to every output; None: no bias.
        metric: ``"activated"`` as above; ``"linear"`` leaves out σ, and with it the bias.

    Returns:
        (..., m), float32 (float64 for float64 arguments).

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation or metric.
        TypeError: a dtype not listed, float64 beside another dtype.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Products of 16-bit values are exact, sums are float32. Dtypes of x and the weights may differ. A NaN in a
    token makes that token's scores NaN and no other's. A second run gives the same bits. No gradient.
    """
    op = "routing_score"
    listed = list(memories.unbind(0)) if isinstance(memories, Tensor) else list(memories)
    check.is_tensor(op, x=x, base_weight=base_weight, **{f"memories[{i}]": w for i, w in enumerate(listed)})
    name = _ALIASES.get(activation, activation)
    x, base_weight, listed = x.detach(), base_weight.detach(), [memory.detach() for memory in listed]
    return backend.call(op, x, base_weight, listed, name, transposed, bias, metric)


def route(
    scores: Tensor,
    threshold: Tensor | float,
    mask: Tensor | None = None,
    *,
    rule: str = "highest",
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Decide for every sample which memory serves it, without waiting for the device.

    The score of a sample is the mean or the greatest of its tokens' scores. With thresholds τ:

    - ``"highest"``: the memory of the highest score among those whose score exceeds their own threshold;
    - ``"merge"`` (WISE-Merge, memory 0 merged, memory 1 in training): the base weight if no score reaches its
      threshold, otherwise the memory of the highest score, of equal ones the last;
    - ``"retrieve"`` (WISE-Retrieve, memory 0 in training): memory 0 unless its score is below its threshold, then
      the base weight; a later memory takes over if its score exceeds its own threshold and every earlier
      one's that did so, and memory 0's score even where that was rejected.

    Args:
        scores: (..., T, m) from :func:`routing_score`.
        threshold: (m,) or one number for all memories: activation ratio times the calibrated threshold.
        mask: (..., T), bool, True for real tokens; None: all are. Scores of others are not used, NaN included.
        rule: one of the above.
        reduce: ``"mean"`` or ``"max"``.

    Returns:
        index: (...), int64: the memory, or −1 for the base weight.
        sample_scores: (..., m); 0 for a sample without real tokens.

    Raises:
        ValueError: shapes that do not fit, an unknown rule or reduction.

    A memory whose sample score is NaN is never chosen.
    """
    op = "route"
    check.choice(op, ("highest", "merge", "retrieve"), rule=rule)
    check.choice(op, ("mean", "max"), reduce=reduce)
    if scores.dim() < 2:
        raise ValueError(f"{op}: scores must have shape (..., T, m), got {tuple(scores.shape)}")
    check.shape(op, scores.shape[:-1], "like scores without its last dimension", mask=mask)
    n_memories = scores.shape[-1]
    if isinstance(threshold, Tensor) and threshold.dim():
        check.shape(op, (n_memories,), "one for each memory", threshold=threshold)
    sample_scores = _reduce_tokens(scores, mask, reduce)
    if n_memories == 0:
        return scores.new_full(sample_scores.shape[:-1], -1, dtype=torch.int64), sample_scores
    return _decide(sample_scores, threshold, rule), sample_scores


def _reduce_tokens(scores: Tensor, mask: Tensor | None, reduce: str) -> Tensor:
    if scores.shape[-2] == 0:
        return scores.sum(-2)
    if mask is None:
        return scores.mean(-2) if reduce == "mean" else scores.amax(-2)
    kept = torch.where(mask.unsqueeze(-1), scores, 0)  # scores are norms: 0 is the least
    if reduce == "max":
        return kept.amax(-2)
    return kept.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def _decide(scores: Tensor, threshold: Tensor | float, rule: str) -> Tensor:
    known = torch.where(scores.isnan(), -torch.inf, scores)
    m = scores.shape[-1]
    if rule == "highest":
        eligible = torch.where(known > threshold, known, -torch.inf)
        best, index = eligible.max(-1)
        return torch.where(best > -torch.inf, index, -1)
    if rule == "merge":
        index = m - 1 - known.flip(-1).argmax(-1)
        return torch.where((known >= threshold).any(-1), index, -1)
    start = torch.where((known >= threshold)[..., 0], 0, -1)
    if m == 1:
        return start
    eligible = torch.where(known > threshold, known, -torch.inf)[..., 1:]
    best, index = eligible.max(-1)
    return torch.where(best > known[..., 0], index + 1, start)


# ---- reference ------------------------------------------------------------------------------------------


def routing_score_reference(
    x: Tensor,
    base_weight: Tensor,
    memories: Tensor | Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    """The same in plain torch, computed in float64; what every backend is tested against."""

    def output(weight: Tensor) -> Tensor:
        y = x.double() @ (weight.double() if transposed else weight.double().T)
        if metric == "linear":
            return y
        return _ACTIVATIONS[activation](y if bias is None else y + bias.double())

    base = output(base_weight)
    scores = [(base - output(memory)).norm(dim=-1) for memory in memories]
    return torch.stack(scores, dim=-1) if scores else x.new_zeros((*x.shape[:-1], 0), dtype=torch.float64)


# ---- backends -------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """Tokens as (T, d_in) with adjacent elements: small beside the weights, so a copy costs next to nothing."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _by_rows(weights: Sequence[Tensor], transposed: bool) -> tuple[list[Tensor], bool]:
    """The weights with adjacent elements in their last dimension, and whether that is now d_out."""
    weights = list(weights)
    if weights[0].stride(1) != 1 and weights[0].stride(0) == 1:  # the other orientation of a stored matrix
        weights, transposed = [weight.T for weight in weights], not transposed
    if any(weight.stride(1) != 1 and weight.shape[1] > 1 and weight.numel() for weight in weights):
        check.once(
            logging.WARNING,
            "routing_score: weights whose contiguous dimensions differ, or that have none, are copied",
        )
        weights = [weight.contiguous() for weight in weights]
    return weights, transposed


def _routing_score_torch(
    x: Tensor,
    base_weight: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    """Outputs in blocks whose float32 weights and products stay small; memories as differences from the base."""
    work, sigma = _result_dtype(x), _ACTIVATIONS[activation]
    tokens = _rows(x).to(work)
    base, *others = [w.T if transposed else w for w in (base_weight, *memories)]
    squares = tokens.new_zeros((len(tokens), len(others)))
    step = max(16, (1 << 22) // max(1, base.shape[1], len(tokens)))
    with backend.full_float32():
        for r in range(0, base.shape[0], step):
            block = base[r : r + step].to(work)
            shift = None
            if metric == "activated":
                shift = tokens @ block.T
                if bias is not None:
                    shift += bias[r : r + step].to(work)
                start = sigma(shift)
            for i, memory in enumerate(others):
                change = tokens @ (memory[r : r + step].to(work) - block).T
                if shift is not None:
                    change = sigma(change.add_(shift)).sub_(start)
                squares[:, i] += change.square().sum(1)
    return squares.sqrt().reshape(*x.shape[:-1], len(others))


def _compiled(
    x: Tensor,
    weights: Sequence[Tensor],
    activation: str,
    transposed: bool,
    bias: Tensor | None,
    metric: str,
) -> Tensor:
    n_memories = len(weights) - 1
    scores = x.new_zeros((*x.shape[:-1], n_memories), dtype=torch.float32)
    if scores.numel() and weights[0].numel():
        listed, transposed = _by_rows(weights, transposed)
        module = backend.compiled()
        module.routing_score(
            _rows(x),
            listed[0],
            listed[1:],
            scores.view(-1, n_memories),
            "identity" if metric == "linear" else activation,
            transposed,
            None if bias is None else bias.float().contiguous(),
        )
    return scores


def _routing_score_cpp(
    x: Tensor,
    base_weight: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    return _compiled(x, (base_weight, *memories), activation, transposed, bias, metric)


def _one_dtype(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """X and weights in one dtype, which the kernels for GPUs ask for; x is small beside the weights."""
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) == 1 and weights[0].dtype in (x.dtype, torch.float32):
        return x.to(weights[0].dtype), weights
    check.once(
        logging.WARNING,
        "routing_score: on a GPU x and weights of different dtypes are copied to float32",
    )
    return x.float(), [weight.float() for weight in weights]


def _routing_score_cuda(
    x: Tensor,
    base_weight: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    x, weights = _one_dtype(x, (base_weight, *memories))
    return _compiled(x, weights, activation, transposed, bias, metric)


def _routing_score_triton(
    x: Tensor,
    base_weight: Tensor,
    memories: Sequence[Tensor],
    activation: str,
    transposed: bool = False,
    bias: Tensor | None = None,
    metric: str = "activated",
) -> Tensor:
    from ..kernels.routing import routing_score_triton

    x, weights = _one_dtype(x, (base_weight, *memories))
    if len({weight.stride() for weight in weights}) > 1:
        check.once(logging.WARNING, "routing_score: weights of different strides are copied")
        weights = [weight.contiguous() for weight in weights]
    base, *others = weights
    if metric == "linear":
        activation, bias = "identity", None
    scores = routing_score_triton(_rows(x), base, others, activation, transposed, bias)
    return scores.view(*x.shape[:-1], len(others))


_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Speeds relative to the torch backend: measured on two cores with AVX-512 for cpp, estimated for GPUs.
backend.provide(
    "routing_score",
    "cpp",
    _routing_score_cpp,
    symbol="routing_score",
    device="cpu",
    dtypes=_KERNEL_DTYPES,
    speed={torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 1.2},
)
backend.provide(
    "routing_score", "triton", _routing_score_triton, device="cuda", dtypes=_KERNEL_DTYPES, speed=3.0
)
backend.provide(
    "routing_score",
    "cuda",
    _routing_score_cuda,
    symbol="routing_score",
    device="cuda",
    dtypes=_KERNEL_DTYPES,
    speed=2.0,
)
backend.provide("routing_score", "torch", _routing_score_torch)
