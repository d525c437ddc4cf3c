"""Low-rank update of a weight on a GPU: W += α A Bᵀ in one pass over W."""

import torch
import triton
import triton.language as tl

from . import common


@triton.jit(do_not_specialize=["seed"])
def _low_rank_kernel(
    w_ptr,
    rows_ptr,
    cols_ptr,
    N_ROWS,
    N_COLS,
    R,
    alpha,
    seed,
    stride_w0,
    stride_w1,
    stride_rows,
    stride_cols,
    STOCHASTIC: tl.constexpr,
    COUNT_DOWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one BLOCK_ROWS × BLOCK_COLS tile of W as stored, (N_ROWS, N_COLS).

    The product of the float32 factors rows (N_ROWS, R) and cols (N_COLS, R) is summed in float32 over steps
    of BLOCK_R: with SPLIT from bfloat16 halves, high · high + high · low + low · high, good to 2^-16, that is
    under a hundredth of half a unit of a bfloat16 weight; without it from TF32x3, good to float32.

    COUNT_DOWN: elements count down the columns for the random words (the weight is stored transposed).

    Memory: N_ROWS · N_COLS elements read and written, and the factors, which stay in L2. FLOPs:
    3 · 2 · N_ROWS · N_COLS · R.
    """
    blocks = tl.cdiv(N_COLS, BLOCK_COLS)
    pid = tl.program_id(0)
    r0 = (pid // blocks) * BLOCK_ROWS
    c0 = (pid % blocks) * BLOCK_COLS
    r = r0 + tl.arange(0, BLOCK_ROWS)
    c = c0 + tl.arange(0, BLOCK_COLS)
    row_ptrs = rows_ptr + r.to(tl.int64)[:, None] * stride_rows
    col_ptrs = cols_ptr + c.to(tl.int64)[:, None] * stride_cols
    delta = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for k0 in range(0, R, BLOCK_R):
        k = k0 + tl.arange(0, BLOCK_R)
        a = tl.load(row_ptrs + k[None, :], mask=(r < N_ROWS)[:, None] & (k < R)[None, :], other=0.0)
        b = tl.load(col_ptrs + k[None, :], mask=(c < N_COLS)[:, None] & (k < R)[None, :], other=0.0)
        if SPLIT:
            a_high = common.round_to(a, tl.bfloat16)
            b_high = common.round_to(b, tl.bfloat16)
            a_low = common.round_to(a - a_high.to(tl.float32), tl.bfloat16)
            b_low = common.round_to(b - b_high.to(tl.float32), tl.bfloat16)
            delta = common.dot(a_low, tl.trans(b_high), delta, "ieee")
            delta = common.dot(a_high, tl.trans(b_low), delta, "ieee")
            delta = common.dot(a_high, tl.trans(b_high), delta, "ieee")
        else:
            delta = common.dot(a, tl.trans(b), delta, "tf32x3")

    inside = (r < N_ROWS)[:, None] & (c < N_COLS)[None, :]
    ptrs = w_ptr + r.to(tl.int64)[:, None] * stride_w0 + c.to(tl.int64)[None, :] * stride_w1
    updated = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) + alpha * delta
    T: tl.constexpr = w_ptr.dtype.element_ty
    if STOCHASTIC:
        if COUNT_DOWN:
            words = tl.trans(common.philox_words(seed, c, r0, N_ROWS, BLOCK_ROWS, ALIGNED))
        else:
            words = common.philox_words(seed, r, c0, N_COLS, BLOCK_COLS, ALIGNED)
        out = common.round_stochastically(updated, words, T)
    else:
        out = common.round_to(updated, T)
    tl.store(ptrs, out, mask=inside)


# (architecture, bfloat16 weight) -> rows and columns of a tile, step in rank, warps, stages. Chosen for
# no spills and 16-byte accesses with Triton 3.6 and 3.9 (tests/compile/test_triton.py), not by timing.
_CONFIG = {
    (0, True): (32, 32, 16, 1, 1),
    (0, False): (32, 32, 16, 1, 1),
    (80, True): (64, 128, 32, 8, 2),
    (80, False): (64, 64, 32, 8, 2),
    (90, True): (128, 128, 32, 8, 3),
    (90, False): (64, 128, 32, 8, 2),
}
_FALLBACK = {86: 80, 89: 80, 100: 90, 120: 80}


def configuration(architecture, dtype, unaligned=False):
    """Tile, step in rank, warps and stages for an architecture and the weight's dtype.

    ``unaligned``: random words are computed one element at a time, which takes more registers.
    """
    return _CONFIG[_FALLBACK.get(architecture, architecture), dtype == torch.bfloat16 and not unaligned]


def low_rank_update_triton(weight, left, right, alpha, transposed, stochastic, seed):
    """Add alpha left rightᵀ to weight in place, as fastedit.ops.low_rank_update_ checks its arguments.

    Args:
        weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; bfloat16, float16 or float32; any strides.
        left: (d_out, r), float32, contiguous.
        right: (d_in, r), float32, contiguous.
        alpha: the factor of the product, a float.
        transposed: the orientation of weight.
        stochastic: round at random by (seed, index in (d_out, d_in) order); for 16-bit weights.
        seed: 64 bits.
    """
    if weight.numel() == 0:
        return
    rows, cols = (right, left) if transposed else (left, right)
    n_rows, n_cols = weight.shape
    w0, w1 = weight.stride()
    if w0 == 1 and w1 != 1:  # make columns the contiguous direction
        rows, cols, n_rows, n_cols, w0, w1, transposed = cols, rows, n_cols, n_rows, w1, w0, not transposed
    stochastic = stochastic and weight.dtype != torch.float32
    aligned = (n_rows if transposed else n_cols) % 4 == 0
    block_rows, block_cols, block_r, warps, stages = configuration(
        common.architecture(weight.device), weight.dtype, stochastic and not aligned
    )
    programs = triton.cdiv(n_rows, block_rows) * triton.cdiv(n_cols, block_cols)
    split = weight.dtype == torch.bfloat16
    with torch.cuda.device_of(weight):
        _low_rank_kernel[(programs,)](
            weight,
            rows,
            cols,
            n_rows,
            n_cols,
            rows.shape[1],
            alpha,
            seed & 0xFFFFFFFFFFFFFFFF,
            w0,
            w1,
            rows.stride(0),
            cols.stride(0),
            STOCHASTIC=stochastic,
            COUNT_DOWN=transposed,
            ALIGNED=aligned,
            SPLIT=split,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
