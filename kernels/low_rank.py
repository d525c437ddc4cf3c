"""Low-rank update of a weight on a GPU: W += α A Bᵀ in one pass over W."""

import torch
import triton
import triton.language as tl

from . import common


@triton.jit(do_not_specialize=["N_ROWS", "N_COLS", "R"])
def _prepare_factors_kernel(
    out_ptr,
    rows_ptr,
    cols_ptr,
    N_ROWS,
    N_COLS,
    R,
    stride_rows,
    stride_cols,
    R_PADDED,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both factors, one below the other, padded with zeros to R_PADDED columns, so that later loads are aligned.

    SPLIT: as bfloat16, R_PADDED columns of high halves beside R_PADDED columns of low ones.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // R_PADDED
    k = at % R_PADDED
    in_rows = (row < N_ROWS) & (k < R)
    in_cols = (row >= N_ROWS) & (row < N_ROWS + N_COLS) & (k < R)
    value = tl.load(rows_ptr + row * stride_rows + k, mask=in_rows, other=0.0)
    value += tl.load(cols_ptr + (row - N_ROWS) * stride_cols + k, mask=in_cols, other=0.0)
    inside = row < N_ROWS + N_COLS
    if SPLIT:
        high = common.round_to(value, tl.bfloat16)
        low = common.round_to(value - high.to(tl.float32), tl.bfloat16)
        tl.store(out_ptr + row * (2 * R_PADDED) + k, high, mask=inside)
        tl.store(out_ptr + row * (2 * R_PADDED) + R_PADDED + k, low, mask=inside)
    else:
        tl.store(out_ptr + at, value, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _low_rank_kernel(
    w_ptr,
    rows_ptr,
    cols_ptr,
    residual_ptr,
    N_ROWS,
    N_COLS,
    R,
    alpha,
    seed,
    stride_w0,
    stride_w1,
    stride_rows,
    stride_cols,
    stride_residual0,
    stride_residual1,
    STOCHASTIC: tl.constexpr,
    COUNT_DOWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CARRY: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one BLOCK_ROWS × BLOCK_COLS tile of W as stored, (N_ROWS, N_COLS).

    PRODUCT says how the product of the factors rows (N_ROWS, R) and cols (N_COLS, R) is summed, in float32:

    - "outer": BLOCK_R >= R outer products of float32 columns by multiply-adds;
    - "split": on the matrix unit from bfloat16 halves that stand side by side, R columns each: high · high +
      high · low + low · high, good to 2^-16, that is under a hundredth of half a unit of a bfloat16 weight;
    - "tf32x3": on the matrix unit from float32 factors, good to float32.

    COUNT_DOWN: elements count down the columns for the random words (the weight is stored transposed).
    RESIDUAL: what rounding took away is written; CARRY: and what stood there is added first.

    Memory: N_ROWS · N_COLS elements read and written, and the factors, which stay in L2. FLOPs:
    2 · N_ROWS · N_COLS · R, three times that on the matrix unit.
    """
    blocks = tl.cdiv(N_COLS, BLOCK_COLS)
    pid = tl.program_id(0)
    r0 = (pid // blocks) * BLOCK_ROWS
    c0 = (pid % blocks) * BLOCK_COLS
    r = r0 + tl.arange(0, BLOCK_ROWS)
    c = c0 + tl.arange(0, BLOCK_COLS)
    r64 = r.to(tl.int64)
    c64 = c.to(tl.int64)
    inside = (r < N_ROWS)[:, None] & (c < N_COLS)[None, :]
    ptrs = w_ptr + r64[:, None] * stride_w0 + c64[None, :] * stride_w1
    stored = tl.load(ptrs, mask=inside, other=0.0)  # first, so that it arrives while the product is summed

    delta = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    if PRODUCT == "outer":
        for k in tl.static_range(BLOCK_R):
            a = tl.load(rows_ptr + r64 * stride_rows + k, mask=r < tl.where(k < R, N_ROWS, 0), other=0.0)
            b = tl.load(cols_ptr + c64 * stride_cols + k, mask=c < tl.where(k < R, N_COLS, 0), other=0.0)
            delta += a[:, None] * b[None, :]
    else:
        row_ptrs = rows_ptr + r64[:, None] * stride_rows
        col_ptrs = cols_ptr + c64[:, None] * stride_cols
        for k0 in range(0, R, BLOCK_R):
            k = k0 + tl.arange(0, BLOCK_R)[None, :]
            row_mask = (r < N_ROWS)[:, None] & (k < R)
            col_mask = (c < N_COLS)[:, None] & (k < R)
            a = tl.load(row_ptrs + k, mask=row_mask, other=0.0)
            b = tl.load(col_ptrs + k, mask=col_mask, other=0.0)
            if PRODUCT == "split":
                a_low = tl.load(row_ptrs + R + k, mask=row_mask, other=0.0)
                b_low = tl.load(col_ptrs + R + k, mask=col_mask, other=0.0)
                delta = common.dot(a_low, tl.trans(b), delta, "ieee")
                delta = common.dot(a, tl.trans(b_low), delta, "ieee")
                delta = common.dot(a, tl.trans(b), delta, "ieee")
            else:
                delta = common.dot(a, tl.trans(b), delta, "tf32x3")

    start = stored.to(tl.float32)
    residual_ptrs = residual_ptr + r64[:, None] * stride_residual0 + c64[None, :] * stride_residual1
    if CARRY:
        start += tl.load(residual_ptrs, mask=inside, other=0.0)
    updated = start + alpha * delta
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
    if RESIDUAL:
        kept = out.to(tl.float32)
        finite = tl.abs(kept) < float("inf")
        lost = tl.where(finite, updated, 0.0) - tl.where(finite, kept, 0.0)
        tl.store(residual_ptrs, lost, mask=inside)


# (architecture, product) -> rows and columns of a tile, step in rank, warps, stages. Chosen for no spills and
# 16-byte accesses with Triton 3.6 and 3.9 (tests/compile/test_triton.py), not by timing; bench/tune.py times them.
_CONFIG = {
    (0, "outer"): (32, 32, 8, 1, 1),
    (0, "split"): (32, 32, 16, 1, 1),
    (0, "tf32x3"): (32, 32, 16, 1, 1),
    (80, "outer"): (32, 128, 8, 8, 1),
    (80, "split"): (64, 64, 32, 4, 3),
    (80, "tf32x3"): (64, 64, 32, 8, 2),
    (90, "outer"): (32, 128, 8, 8, 1),
    (90, "split"): (128, 128, 32, 8, 3),
    (90, "tf32x3"): (64, 128, 32, 8, 2),
    (100, "outer"): (32, 128, 8, 8, 1),
    (100, "split"): (128, 128, 32, 8, 3),
    (100, "tf32x3"): (64, 64, 32, 4, 2),
}
_FALLBACK = {86: 80, 89: 80, 120: 80}
_OUTER_RANK = 8  # up to here multiply-adds keep up with memory, and the matrix unit would multiply zeros
_MATRIX_STEP = 16


def product(dtype, rank, residual=False):
    """How the product of the factors is summed for a dtype of weight, a rank, and with a (float32) residual."""
    if rank <= _OUTER_RANK:
        return "outer"
    return "split" if dtype == torch.bfloat16 and not residual else "tf32x3"


def configuration(architecture, dtype, rank, unaligned=False, residual=False):
    """Tile, step in rank, warps and stages for an architecture, the weight's dtype and a rank.

    ``unaligned``: random words are computed one element at a time, which takes more registers.
    """
    architecture = _FALLBACK.get(architecture, architecture)
    kind = product(dtype, rank, residual)
    rows, cols, step, warps, stages = _CONFIG[architecture, kind]
    if kind == "outer":
        return rows, cols, triton.next_power_of_2(max(rank, 1)), warps, stages
    if unaligned:
        rows, cols, _, warps, stages = _CONFIG[architecture, "tf32x3"]
    return rows, cols, _MATRIX_STEP if rank <= _MATRIX_STEP else step, warps, stages


def _prepare(rows, cols, split):
    """Factors for the matrix unit: aligned rows, and in bfloat16 halves with ``split``; with their padded rank."""
    n_rows, rank = rows.shape
    padded = triton.cdiv(rank, _MATRIX_STEP) * _MATRIX_STEP
    if not split and rank % 4 == 0:
        return rows, cols, rank
    total = n_rows + cols.shape[0]
    dtype = torch.bfloat16 if split else torch.float32
    out = torch.empty((total, padded * (2 if split else 1)), dtype=dtype, device=rows.device)
    block = 1024
    _prepare_factors_kernel[(triton.cdiv(total * padded, block),)](
        out,
        rows,
        cols,
        n_rows,
        cols.shape[0],
        rank,
        rows.stride(0),
        cols.stride(0),
        padded,
        SPLIT=split,
        BLOCK=block,
    )
    return out[:n_rows], out[n_rows:], padded


def low_rank_update_triton(
    weight, left, right, alpha, transposed, stochastic, seed, residual=None, carry=False, config=None
):
    """Add alpha left rightᵀ to weight in place, as fastedit.ops.low_rank_update_ checks its arguments.

    Args:
        weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; bfloat16, float16 or float32; any strides.
        left: (d_out, r), float32, contiguous.
        right: (d_in, r), float32, contiguous.
        alpha: the factor of the product, a float.
        transposed: the orientation of weight.
        stochastic: round at random by (seed, index in (d_out, d_in) order); for 16-bit weights.
        seed: 64 bits.
        residual: float32, like weight as stored, any strides; receives what rounding took away. For 16-bit weights.
        carry: add what residual holds before rounding.
        config: tile, step in rank, warps and stages, in place of the table's; for bench/tune.py.
    """
    if weight.numel() == 0:
        return
    rows, cols = (right, left) if transposed else (left, right)
    lost = weight if residual is None else residual
    if weight.stride(0) == 1 and weight.stride(1) != 1:  # make columns the contiguous direction
        weight, lost, rows, cols, transposed = weight.T, lost.T, cols, rows, not transposed
    n_rows, n_cols = weight.shape
    rank = rows.shape[1]
    stochastic = stochastic and weight.dtype != torch.float32
    aligned = (n_rows if transposed else n_cols) % 4 == 0
    kind = product(weight.dtype, rank, residual is not None)
    block_rows, block_cols, block_r, warps, stages = config or configuration(
        common.architecture(weight.device),
        weight.dtype,
        rank,
        stochastic and not aligned,
        residual is not None,
    )
    programs = triton.cdiv(n_rows, block_rows) * triton.cdiv(n_cols, block_cols)
    with torch.cuda.device_of(weight):
        if kind != "outer":
            rows, cols, rank = _prepare(rows, cols, kind == "split")
        _low_rank_kernel[(programs,)](
            weight,
            rows,
            cols,
            lost,
            n_rows,
            n_cols,
            rank,
            alpha,
            seed & 0xFFFFFFFFFFFFFFFF,
            weight.stride(0),
            weight.stride(1),
            rows.stride(0),
            cols.stride(0),
            lost.stride(0),
            lost.stride(1),
            STOCHASTIC=stochastic,
            COUNT_DOWN=transposed,
            ALIGNED=aligned,
            RESIDUAL=residual is not None,
            CARRY=carry,
            PRODUCT=kind,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            BLOCK_R=block_r,
            num_warps=warps,
            num_stages=stages,
        )
