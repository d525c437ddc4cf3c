"""Routing scores on a GPU: ‖σ(W x) − σ(W' x)‖ of every token and memory, without writing an output."""

import torch
import triton
import triton.language as tl

from . import common


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(y < 0, 0.0, y)  # NaN stays NaN
    elif ACTIVATION == "silu":
        return y / (1.0 + tl.exp(tl.minimum(-y, 88.0)))  # no overflow, on which the interpreter insists
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (y + 0.044715 * y * y * y)  # tanh(u/2) = 2 / (1 + e^-u) - 1
        return y / (1.0 + tl.exp(tl.minimum(-u, 88.0)))
    else:
        return y


@triton.jit
def _product(
    x_ptrs,
    w_ptrs,
    token_inside,
    output_inside,
    DI,
    stride_xk,
    stride_wk,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_T tokens times BLOCK_O outputs of one weight; the pointers are those of k = 0."""
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, DI, FLUSH * BLOCK_K):
        part = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
        for k0 in range(start, min(start + FLUSH * BLOCK_K, DI), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < DI
            k = k.to(tl.int64)
            x = tl.load(
                x_ptrs + k[None, :] * stride_xk, mask=token_inside[:, None] & inside[None, :], other=0.0
            )
            w = tl.load(
                w_ptrs + k[:, None] * stride_wk, mask=inside[:, None] & output_inside[None, :], other=0.0
            )
            part = common.dot(x, w, part, PRECISION)
        total += part
    return total


@triton.jit
def _routing_kernel(
    part_ptr,
    x_ptr,
    bias_ptr,
    base_ptr,
    memory0_ptr,
    memory1_ptr,
    memory2_ptr,
    memory3_ptr,
    T,
    DI,
    DO,
    stride_xt,
    stride_xk,
    stride_wo,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MEMORIES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_T tokens, BLOCK_O outputs; part[tile of outputs, memory, token] = Σ (σ(y0) − σ(y))².

    The base's activated outputs stay in registers while the memories follow one another. Sums of FLUSH · BLOCK_K
    products come from the matrix unit, which truncates, and are added up with rounding.

    Work: 2 · T · DI · DO · (1 + MEMORIES) FLOPs over all programs. Memory: each weight once for every BLOCK_T
    tokens; programs that share a tile of weights follow one another.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    token_inside = t < T
    output_inside = o < DO
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * stride_xt
    offsets = o.to(tl.int64)[None, :] * stride_wo
    bias = tl.zeros((BLOCK_O,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=output_inside, other=0.0)
    start = _product(
        x_ptrs, base_ptr + offsets, token_inside, output_inside, DI, stride_xk, stride_wk,
        BLOCK_T, BLOCK_O, BLOCK_K, FLUSH, PRECISION,
    )  # fmt: skip
    start = _activate(start + bias[None, :], ACTIVATION)
    for i in tl.static_range(MEMORIES):
        w_ptr = memory0_ptr if i == 0 else memory1_ptr if i == 1 else memory2_ptr if i == 2 else memory3_ptr
        y = _product(
            x_ptrs, w_ptr + offsets, token_inside, output_inside, DI, stride_xk, stride_wk,
            BLOCK_T, BLOCK_O, BLOCK_K, FLUSH, PRECISION,
        )  # fmt: skip
        change = _activate(y + bias[None, :], ACTIVATION) - start
        squares = tl.sum(change * change, axis=1)  # outputs beyond DO: both sides are σ(0)
        row = tl.program_id(1).to(tl.int64) * MEMORIES + i
        tl.store(part_ptr + row * T + t, squares, mask=token_inside)


# (architecture, bytes of an element, size class) -> tokens, outputs, step in d_in, warps, pipeline stages.
# "few": up to 16 tokens, bound by the weights' bytes. Chosen for no spills and for shared memory with Triton 3.9
# (tests/compile/test_triton.py), not by timing.
_CONFIG = {
    (0, 2, "few"): (16, 16, 32, 1, 1),
    (0, 4, "few"): (16, 16, 32, 1, 1),
    (0, 2, "many"): (32, 32, 32, 1, 1),
    (0, 4, "many"): (32, 32, 32, 1, 1),
    (80, 2, "few"): (16, 32, 128, 4, 5),
    (80, 4, "few"): (16, 32, 64, 4, 5),
    (80, 2, "many"): (128, 64, 32, 8, 4),
    (80, 4, "many"): (64, 64, 32, 8, 3),
    (90, 2, "few"): (16, 32, 128, 4, 5),
    (90, 4, "few"): (16, 32, 64, 4, 5),
    (90, 2, "many"): (128, 64, 64, 8, 4),
    (90, 4, "many"): (64, 64, 32, 8, 3),
    (100, 2, "many"): (128, 128, 32, 8, 4),
    (120, 4, "many"): (64, 32, 32, 4, 3),
}
_FALLBACK = {86: 80, 89: 80, 100: 90, 120: 80}
_FLUSH_PRODUCTS = 1024
_FEW = 16
_GROUP = 4  # memories in a launch


def configuration(architecture, dtype, n_tokens):
    """Tokens, outputs and step of a tile, warps and stages, for an architecture, the dtype, and T."""
    size = "few" if n_tokens <= _FEW else "many"
    nearest = _FALLBACK.get(architecture, architecture)
    return _CONFIG.get((architecture, dtype.itemsize, size)) or _CONFIG[nearest, dtype.itemsize, size]


def routing_score_triton(x, base_weight, memories, activation, transposed, bias):
    """Scores (T, m) in float32; the arguments are those that fastedit.ops.routing_score has checked.

    Args:
        x: (T, d_in), bfloat16, float16 or float32, any strides.
        base_weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; dtype of x, any strides.
        memories: list of m tensors with the dtype and the strides of base_weight.
        activation: identity, relu, silu, gelu or gelu_tanh.
        transposed: the orientation of the weights.
        bias: (d_out,) or None.
    """
    n_tokens, d_in = x.shape
    d_out = base_weight.shape[1 if transposed else 0]
    scores = torch.zeros((n_tokens, len(memories)), dtype=torch.float32, device=x.device)
    if scores.numel() == 0 or base_weight.numel() == 0:
        return scores
    stride_o, stride_k = base_weight.stride()[::-1] if transposed else base_weight.stride()
    block_t, block_o, block_k, warps, stages = configuration(common.architecture(x.device), x.dtype, n_tokens)
    tiles = triton.cdiv(d_out, block_o)
    bias = None if bias is None else bias.float().contiguous()
    with torch.cuda.device_of(x):
        for first in range(0, len(memories), _GROUP):
            group = memories[first : first + _GROUP]
            part = torch.empty((tiles, len(group), n_tokens), dtype=torch.float32, device=x.device)
            filled = group + [group[0]] * (_GROUP - len(group))
            _routing_kernel[(triton.cdiv(n_tokens, block_t), tiles)](
                part,
                x,
                x if bias is None else bias,
                base_weight,
                *filled,
                n_tokens,
                d_in,
                d_out,
                x.stride(0),
                x.stride(1),
                stride_o,
                stride_k,
                HAS_BIAS=bias is not None,
                ACTIVATION=activation,
                MEMORIES=len(group),
                BLOCK_T=block_t,
                BLOCK_O=block_o,
                BLOCK_K=block_k,
                FLUSH=max(1, _FLUSH_PRODUCTS // block_k),
                PRECISION="tf32x3",
                num_warps=warps,
                num_stages=stages,
            )
            scores[:, first : first + _GROUP] = part.sum(0, dtype=torch.float64).sqrt().T
    return scores
