"""Masked optimiser steps on a GPU: the mask is regenerated or read as bits, gradients may come as a product."""

import math

import torch
import triton
import triton.language as tl

from . import common

MASK_BLOCK = 4096  # entries between two cached ranks, as in fastedit.ops.masks

# kinds of masks
ALL = tl.constexpr(0)
PHILOX = tl.constexpr(1)
BITS = tl.constexpr(2)


@triton.jit
def _clamped(value, clamp_to, clamp):
    """Into clamp_to ± clamp; NaN in either gives NaN."""
    inside = tl.minimum(tl.maximum(value, clamp_to - clamp), clamp_to + clamp)
    inside = tl.where(clamp_to == clamp_to, inside, clamp_to)
    return tl.where(value == value, inside, value)


@triton.jit
def _bit(bits_ptr, index, inside):
    byte = tl.load(bits_ptr + (index >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (index & 7).to(tl.int32)) & 1) != 0


@triton.jit
def _product(
    left_ptr, right_ptr, r, c, N_ROWS, N_COLS, RANK, stride_left, stride_right, BLOCK_R: tl.constexpr
):
    """The tile (r, c) of left rightᵀ, in float32; factors of 16 bits are multiplied exactly."""
    out = tl.zeros((r.shape[0], c.shape[0]), dtype=tl.float32)
    left_ptrs = left_ptr + r.to(tl.int64)[:, None] * stride_left
    right_ptrs = right_ptr + c.to(tl.int64)[:, None] * stride_right
    for k0 in range(0, RANK, BLOCK_R):
        k = k0 + tl.arange(0, BLOCK_R)
        a = tl.load(left_ptrs + k[None, :], mask=(r < N_ROWS)[:, None] & (k < RANK)[None, :], other=0.0)
        b = tl.load(right_ptrs + k[None, :], mask=(c < N_COLS)[:, None] & (k < RANK)[None, :], other=0.0)
        out = common.dot(a, tl.trans(b), out, "tf32x3")
    return out


@triton.jit(do_not_specialize=["seed", "shard", "layer", "threshold", "RANK"])
def _sgd_kernel(
    w_ptr,
    g_ptr,
    right_ptr,
    to_ptr,
    bits_ptr,
    N_ROWS,
    N_COLS,
    RANK,
    lr,
    decay,
    clamp,
    seed,
    shard,
    layer,
    threshold,
    stride_w0,
    stride_w1,
    stride_g0,
    stride_g1,
    stride_t0,
    stride_t1,
    KIND: tl.constexpr,
    DECAYS: tl.constexpr,
    DECAYS_ALL: tl.constexpr,
    CLAMPS: tl.constexpr,
    PRODUCT: tl.constexpr,
    COUNT_DOWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one BLOCK_ROWS × BLOCK_COLS tile of W as stored, (N_ROWS, N_COLS).

    COUNT_DOWN: entries count down the columns (W is stored transposed). PRODUCT: the gradient is g rightᵀ, of
    factors (N_ROWS, RANK) and (N_COLS, RANK).

    Memory: W read and written, the gradient and clamp_to read, once, whatever is selected: accesses of single
    entries would be more instructions and, from a density of a tenth on, hardly fewer bytes.
    """
    blocks = tl.cdiv(N_COLS, BLOCK_COLS)
    pid = tl.program_id(0)
    r0 = (pid // blocks).to(tl.int64) * BLOCK_ROWS
    c0 = (pid % blocks).to(tl.int64) * BLOCK_COLS
    r = r0 + tl.arange(0, BLOCK_ROWS)
    c = c0 + tl.arange(0, BLOCK_COLS)
    inside = (r < N_ROWS)[:, None] & (c < N_COLS)[None, :]
    keep = inside
    if KIND == PHILOX:
        if COUNT_DOWN:
            words = tl.trans(common.philox_words(seed, c, r0, N_ROWS, BLOCK_ROWS, ALIGNED, shard, layer))
        else:
            words = common.philox_words(seed, r, c0, N_COLS, BLOCK_COLS, ALIGNED, shard, layer)
        keep = inside & (words < threshold.to(tl.uint32))
    elif KIND == BITS:
        if COUNT_DOWN:
            index = c[None, :] * N_ROWS + r[:, None]
        else:
            index = r[:, None] * N_COLS + c[None, :]
        keep = inside & _bit(bits_ptr, index, inside)

    w_ptrs = w_ptr + r[:, None] * stride_w0 + c[None, :] * stride_w1
    if PRODUCT:
        change = _product(g_ptr, right_ptr, r, c, N_ROWS, N_COLS, RANK, stride_g0, stride_g1, BLOCK_R)
    else:
        change = tl.load(g_ptr + r[:, None] * stride_g0 + c[None, :] * stride_g1, mask=inside, other=0.0).to(
            tl.float32
        )
    change = tl.where(keep, change, 0.0)
    old = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    if DECAYS:
        change += decay * tl.where(keep | DECAYS_ALL, old, 0.0)
    new = old - lr * change
    if not DECAYS_ALL:
        new = tl.where(keep, new, old)
    if CLAMPS:
        to = tl.load(to_ptr + r[:, None] * stride_t0 + c[None, :] * stride_t1, mask=inside, other=0.0)
        new = _clamped(new, to.to(tl.float32), clamp)
    tl.store(w_ptrs, common.round_to(new, w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adam(w, g, m, v, first_rate, second, second_rate, rate, correction, eps):
    m += first_rate * (g - m)
    v = second * v + second_rate * g * g
    return w - tl.div_rn(rate * m, tl.sqrt_rn(v) * correction + eps), m, v


@triton.jit(do_not_specialize=["seed", "shard", "layer", "threshold"])
def _adam_kernel(
    w_ptr,
    g_ptr,
    to_ptr,
    bits_ptr,
    m_ptr,
    v_ptr,
    offsets_ptr,
    N,
    N_COLS,
    first_rate,
    second,
    second_rate,
    rate,
    correction,
    eps,
    gradient_decay,
    weight_decay,
    clamp,
    seed,
    shard,
    layer,
    threshold,
    stride_w0,
    stride_w1,
    stride_g0,
    stride_g1,
    stride_t0,
    stride_t1,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    DECAYS_GRADIENT: tl.constexpr,
    DECAYS: tl.constexpr,
    DECAYS_ALL: tl.constexpr,
    CLAMPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BLOCK consecutive entries, whose moments follow one another from the block's cached rank on.

    STEP entries at a time.

    FLAT: all tensors are contiguous and strides are not looked at. Otherwise neighbouring entries may lie far
    apart. Memory: W read and written, the gradient and clamp_to read, and the moments of selected entries.
    """
    pid = tl.program_id(0).to(tl.int64)
    before = pid * BLOCK
    if KIND != ALL:
        before = tl.load(offsets_ptr + pid)
    for step in tl.static_range(0, BLOCK, STEP):
        start = pid * BLOCK + step
        index = start + tl.arange(0, STEP)
        inside = index < N
        keep = inside
        if KIND == PHILOX:
            row = tl.zeros((1,), dtype=tl.int64)
            words = common.philox_words(seed, row, start, N, STEP, True, shard, layer)
            keep = inside & (tl.reshape(words, (STEP,)) < threshold.to(tl.uint32))
        elif KIND == BITS:
            keep = inside & _bit(bits_ptr, index, inside)
        ones = keep.to(tl.int32)
        place = before + (tl.cumsum(ones, 0) - ones)
        before += tl.sum(ones, 0)

        if FLAT:
            w_at = index
            g_at = index
            t_at = index
        else:
            row = index // N_COLS
            column = index % N_COLS
            w_at = row * stride_w0 + column * stride_w1
            g_at = row * stride_g0 + column * stride_g1
            t_at = row * stride_t0 + column * stride_t1
        old = tl.load(w_ptr + w_at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
        if DECAYS_GRADIENT:
            g += gradient_decay * old
        g = tl.where(keep, g, 0.0)
        decayed = old
        if DECAYS:
            decayed -= weight_decay * old
        m = tl.load(m_ptr + place, mask=keep, other=0.0)
        v = tl.load(v_ptr + place, mask=keep, other=0.0)
        new, m, v = _adam(decayed, g, m, v, first_rate, second, second_rate, rate, correction, eps)
        tl.store(m_ptr + place, m, mask=keep)
        tl.store(v_ptr + place, v, mask=keep)
        if DECAYS_ALL:
            new = tl.where(keep, new, decayed)
        else:
            new = tl.where(keep, new, old)
        if CLAMPS:
            to = tl.load(to_ptr + t_at, mask=inside, other=0.0).to(tl.float32)
            new = _clamped(new, to, clamp)
        tl.store(w_ptr + w_at, common.round_to(new, w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _listed_kernel(
    w_ptr,
    g_ptr,
    right_ptr,
    indices_ptr,
    m_ptr,
    v_ptr,
    COUNT,
    N,
    N_COLS,
    RANK,
    lr,
    decay,
    first_rate,
    second,
    second_rate,
    rate,
    correction,
    eps,
    weight_decay,
    stride_w0,
    stride_w1,
    stride_g0,
    stride_g1,
    DECAYS_GRADIENT: tl.constexpr,
    DECAYS: tl.constexpr,
    ADAM: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK entries given by index. Indices outside the tensor are passed over.

    ``decay`` times the weight is added to the gradient; ``weight_decay`` times the weight is taken off it.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < COUNT
    index = tl.load(indices_ptr + i, mask=inside, other=0).to(tl.int64)
    inside = inside & (index >= 0) & (index < N)
    row = index // N_COLS
    column = index % N_COLS
    w_ptrs = w_ptr + row * stride_w0 + column * stride_w1
    old = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT:
        g = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(0, RANK):
            a = tl.load(g_ptr + row * stride_g0 + k, mask=inside, other=0.0).to(tl.float32)
            g += a * tl.load(right_ptr + column * stride_g1 + k, mask=inside, other=0.0).to(tl.float32)
    else:
        g = tl.load(g_ptr + row * stride_g0 + column * stride_g1, mask=inside, other=0.0).to(tl.float32)
    if DECAYS_GRADIENT:
        g += decay * old
    if ADAM:
        m = tl.load(m_ptr + i, mask=inside, other=0.0)
        v = tl.load(v_ptr + i, mask=inside, other=0.0)
        decayed = old
        if DECAYS:
            decayed -= weight_decay * old
        new, m, v = _adam(decayed, g, m, v, first_rate, second, second_rate, rate, correction, eps)
        tl.store(m_ptr + i, m, mask=inside)
        tl.store(v_ptr + i, v, mask=inside)
    else:
        new = old - lr * g
    tl.store(w_ptrs, common.round_to(new, w_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "shard", "layer", "threshold", "first"])
def _bits_kernel(bits_ptr, N_BYTES, seed, shard, layer, threshold, first, BLOCK: tl.constexpr):
    """One program: BLOCK bytes of mask bits; two counters a byte."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.zeros((1,), dtype=tl.int64)
    words = common.philox_words(seed, row, first + start * 8, 0, BLOCK * 8, True, shard, layer)
    ones = tl.reshape((words < threshold.to(tl.uint32)).to(tl.int32), (BLOCK, 8))
    byte = tl.sum(ones << tl.arange(0, 8)[None, :], axis=1)
    at = start + tl.arange(0, BLOCK)
    tl.store(bits_ptr + at, byte.to(tl.uint8), mask=at < N_BYTES)


# (architecture, 16-bit weight) -> rows and columns of a tile, warps. "flat": one row; "tile": of a strided weight;
# "product": (..., step in rank, warps, stages). Chosen for no spills and 16-byte accesses with Triton 3.6 and 3.9
# (tests/compile/test_triton.py), not by timing.
_SGD = {
    "flat": {0: (1, 1024, 1), 80: (1, 2048, 8)},
    "tile": {0: (16, 32, 1), 80: (32, 64, 8)},
}
_PRODUCT = {0: (16, 32, 16, 1, 1), 80: (64, 64, 32, 8, 2), 90: (64, 128, 32, 8, 2)}
_FALLBACK = {86: 80, 89: 80, 100: 90, 120: 80}
_ADAM = {True: (4096, 16), False: (1024, 8)}  # flat or not: entries at a time, warps
_LISTED = 256
_BITS = 256


def sgd_configuration(architecture, layout):
    """Rows and columns of a tile, step in rank, warps and stages; layout is "flat", "tile" or "product"."""
    if layout == "product":
        return _PRODUCT[_FALLBACK.get(architecture, architecture)]
    rows, columns, warps = _SGD[layout][min(architecture, 80)]
    return rows, columns, 16, warps, 1


def _kind(mask, key):
    return PHILOX.value if key else BITS.value if mask is not None else ALL.value


def _words(key):
    """Seed, shard, layer and threshold, the seed as 64 bits."""
    if not key:
        return 0, 0, 0, 0
    return key[0] & 0xFFFFFFFFFFFFFFFF, *key[1:]


def philox_bits_triton(bits, start, key):
    """Write the mask bits of the entries from ``start``, a multiple of 8, on; bits: (n,) uint8, contiguous."""
    if bits.numel() == 0:
        return
    with torch.cuda.device_of(bits):
        _bits_kernel[(triton.cdiv(bits.numel(), _BITS),)](
            bits, bits.numel(), *_words(key), start, BLOCK=_BITS, num_warps=4
        )


def masked_sgd_triton(param, grad, right, mask, key, lr, decay, decay_scope, clamp_to, clamp):
    """One masked step of SGD in place; as fastedit.ops.masked_sgd_ checks its arguments.

    Args:
        param: (d_out, d_in), bfloat16, float16 or float32, any strides.
        grad: like param, floating, any strides; or left (d_out, r) if ``right`` is given.
        right: (d_in, r), floating, or None.
        mask: bits (uint8) or indices (int32, int64), contiguous, or None.
        key: seed, shard, layer and threshold, or empty.
        lr: the learning rate.
        decay: the weight decay.
        decay_scope: "all", "masked" or "none".
        clamp_to: like param, or None.
        clamp: how far from it.
    """
    if param.numel() == 0:
        return
    param = param.detach()
    decay = 0.0 if decay_scope == "none" else decay
    if right is not None:
        grad, right = _factors(grad, right)
    if mask is not None and mask.dtype != torch.uint8:
        _listed(param, grad, right, mask, lr=lr, decay=decay)
        return
    n_rows, n_cols = param.shape
    bound = param if clamp_to is None else clamp_to
    layout = "tile"
    count_down = False
    w, g, t = param, grad, bound
    if right is not None:
        layout = "product"
    elif param.is_contiguous() and grad.is_contiguous() and bound.is_contiguous():
        layout = "flat"
        w, g, t = w.view(1, -1), g.view(1, -1), t.view(1, -1)
        n_rows, n_cols = w.shape
    if (
        layout != "flat" and param.stride(0) == 1 and param.stride(1) != 1
    ):  # make columns the contiguous direction
        w, t, count_down, n_rows, n_cols = w.T, t.T, True, n_cols, n_rows
        if right is None:
            g = g.T
        else:
            g, right = right, g
    strides = g.stride() if right is None else (g.stride(0), right.stride(0))
    block_rows, block_cols, block_r, warps, stages = sgd_configuration(
        common.architecture(param.device), layout
    )
    with torch.cuda.device_of(param):
        _sgd_kernel[(triton.cdiv(n_rows, block_rows) * triton.cdiv(n_cols, block_cols),)](
            w,
            g,
            g if right is None else right,
            t,
            param if mask is None else mask,
            n_rows,
            n_cols,
            0 if right is None else g.shape[1],
            lr,
            decay,
            clamp,
            *_words(key),
            *w.stride(),
            *strides,
            *t.stride(),
            KIND=_kind(mask, key),
            DECAYS=decay != 0,
            DECAYS_ALL=decay != 0 and decay_scope == "all",
            CLAMPS=clamp_to is not None,
            PRODUCT=right is not None,
            COUNT_DOWN=count_down,
            ALIGNED=layout == "flat" or (n_rows if count_down else n_cols) % 4 == 0,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )


def masked_adam_triton(
    param, grad, exp_avg, exp_avg_sq, offsets, mask, key, step, lr, beta1, beta2, eps, weight_decay, decoupled,
    decay_scope, clamp_to, clamp,
):  # fmt: skip
    """One masked step of Adam in place, as fastedit.ops.masked_adam_ checks its arguments.

    Moments are (count,), float32, contiguous; offsets (⌈n / 4096⌉,), int64, or None with indices and without a
    mask. The others are those of masked_sgd_triton and of the formulas of fastedit.ops.masked_adam_.
    """
    if param.numel() == 0:
        return
    param, n = param.detach(), param.numel()
    weight_decay = 0.0 if decay_scope == "none" else weight_decay
    gradient_decay = 0.0 if decoupled else weight_decay
    shrink = lr * weight_decay if decoupled else 0.0
    rate, correction = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    numbers = (1 - beta1, beta2, 1 - beta2, rate, correction, eps)
    if mask is not None and mask.dtype != torch.uint8:
        _listed(
            param, grad, None, mask, decay=gradient_decay, moments=(exp_avg, exp_avg_sq), numbers=numbers,
            weight_decay=shrink,
        )  # fmt: skip
        return
    bound = param if clamp_to is None else clamp_to
    flat = param.is_contiguous() and grad.is_contiguous() and bound.is_contiguous()
    with torch.cuda.device_of(param):
        _adam_kernel[(triton.cdiv(n, MASK_BLOCK),)](
            param,
            grad,
            bound,
            param if mask is None else mask,
            exp_avg,
            exp_avg_sq,
            exp_avg if offsets is None else offsets,
            n,
            param.shape[1],
            *numbers,
            gradient_decay,
            shrink,
            clamp,
            *_words(key),
            *param.stride(),
            *grad.stride(),
            *bound.stride(),
            KIND=_kind(mask, key),
            FLAT=flat,
            DECAYS_GRADIENT=gradient_decay != 0,
            DECAYS=shrink != 0,
            DECAYS_ALL=shrink != 0 and decay_scope == "all",
            CLAMPS=clamp_to is not None,
            BLOCK=MASK_BLOCK,
            STEP=_ADAM[flat][0],
            num_warps=_ADAM[flat][1],
        )


def _factors(left, right):
    """Rows contiguous; of one dtype, 16 bits if both have it."""
    if left.dtype != right.dtype or left.dtype == torch.float64:
        left, right = left.float(), right.float()
    return left.detach().contiguous(), right.detach().contiguous()


def _listed(
    param, grad, right, indices, lr=0.0, decay=0.0, moments=None, numbers=(0.0,) * 6, weight_decay=0.0
):
    count = indices.numel()
    if count == 0:
        return
    strides = grad.stride() if right is None else (grad.stride(0), right.stride(0))
    first, second = (param, param) if moments is None else moments
    with torch.cuda.device_of(param):
        _listed_kernel[(triton.cdiv(count, _LISTED),)](
            param,
            grad,
            grad if right is None else right,
            indices,
            first,
            second,
            count,
            param.numel(),
            param.shape[1],
            0 if right is None else grad.shape[1],
            lr,
            decay,
            *numbers,
            weight_decay,
            *param.stride(),
            *strides,
            DECAYS_GRADIENT=decay != 0,
            DECAYS=weight_decay != 0,
            ADAM=moments is not None,
            PRODUCT=right is not None,
            BLOCK=_LISTED,
            num_warps=4,
        )
