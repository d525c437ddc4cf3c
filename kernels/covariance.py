"""Second moment of activations on a GPU: C += Xᵀ diag(mask) X, one triangle computed, both written."""

import functools
import inspect

import torch
import triton
import triton.language as tl

from . import common

# One loop instead of two, so that loads stay in flight while partial sums are added up (Triton 3.3 and newer).
_FLATTEN = tl.constexpr("flatten" in inspect.signature(tl.range.__init__).parameters)


@triton.jit
def _triangle_position(k):
    """Row and column of the k-th tile of a lower triangle, row by row."""
    i = ((tl.sqrt(8.0 * k.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > k, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= k, i + 1, i)
    return i, k - i * (i + 1) // 2


@triton.jit
def _grouped_position(k, N_TILES, GROUP: tl.constexpr):
    """The same triangle in bands of GROUP rows, each column by column: tiles that run together share panels of x."""
    i, _ = _triangle_position(k)
    top = i // GROUP * GROUP
    height = min(GROUP, N_TILES - top)
    k -= top * (top + 1) // 2
    below = k - top * height  # position in the triangle at the end of the band
    i, j = _triangle_position(tl.maximum(below, 0))
    return (
        tl.where(below < 0, top + k % height, top + i),
        tl.where(below < 0, k // height, top + j),
    )


@triton.jit
def _add_to_both_triangles(cov_ptr, total, rows, cols, D, stride_c0, stride_c1):
    r = rows.to(tl.int64)[:, None]
    c = cols.to(tl.int64)[None, :]
    lower = (r >= c) & (r < D)
    ptrs = cov_ptr + r * stride_c0 + c * stride_c1
    total = tl.load(ptrs, mask=lower, other=0.0) + total.to(cov_ptr.dtype.element_ty)
    tl.store(ptrs, total, mask=lower)
    tl.store(cov_ptr + c * stride_c0 + r * stride_c1, total, mask=lower & (r > c))


@triton.jit
def _kept(mask_ptr, t, END, stride_mask, HAS_MASK: tl.constexpr):
    keep = t < END
    if HAS_MASK:
        keep = tl.load(mask_ptr + t.to(tl.int64) * stride_mask, mask=keep, other=0) != 0
    return keep


@triton.jit
def _sum_of_steps(
    start, END, STEPS, D, keep, rows, cols, x_ptr, mask_ptr, stride_xt, stride_xd, stride_mask,
    HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of STEPS · BLOCK_T tokens from ``start``, and which tokens count in the step after them."""
    row_ptrs = x_ptr + rows.to(tl.int64)[None, :] * stride_xd
    col_ptrs = x_ptr + cols.to(tl.int64)[None, :] * stride_xd
    part = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    for step in range(0, STEPS):
        t = start + step * BLOCK_T + tl.arange(0, BLOCK_T)
        # the mask is read one step ahead: the copies that it guards then start at once
        keep_next = _kept(mask_ptr, t + BLOCK_T, END, stride_mask, HAS_MASK)
        offsets = t.to(tl.int64)[:, None] * stride_xt
        xi = tl.load(row_ptrs + offsets, mask=keep[:, None] & (rows < D)[None, :], other=0.0)
        xj = tl.load(col_ptrs + offsets, mask=keep[:, None] & (cols < D)[None, :], other=0.0)
        part = common.dot(tl.trans(xi), xj, part, PRECISION)
        keep = keep_next
    return part, keep


@triton.jit(do_not_specialize=["SPLIT_TOKENS", "STEPS"])
def _covariance_kernel(
    out_ptr,
    x_ptr,
    mask_ptr,
    T,
    D,
    SPLIT_TOKENS,
    STEPS,
    stride_c0,
    stride_c1,
    stride_xt,
    stride_xd,
    stride_mask,
    HAS_MASK: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: SPLIT_TOKENS tokens of one BLOCK_D × BLOCK_D tile (i, j), i >= j, of cov.

    PARTIAL: the tile goes to out[split, tile], a workspace for _add_partials_kernel; otherwise there is one split,
    and the tile is added to cov = out, and so is its mirror image.

    Sums of STEPS · BLOCK_T tokens come from the matrix unit, which truncates; they are added up in float32 with
    rounding. Masked rows are not loaded.
    """
    n_tiles = tl.cdiv(D, BLOCK_D)
    tiles = n_tiles * (n_tiles + 1) // 2
    pid = tl.program_id(0)
    tile = pid % tiles
    first = pid // tiles * SPLIT_TOKENS
    end = min(first + SPLIT_TOKENS, T)
    i, j = _grouped_position(tile, n_tiles, GROUP)
    rows = i * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = j * BLOCK_D + tl.arange(0, BLOCK_D)

    total = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    keep = _kept(mask_ptr, first + tl.arange(0, BLOCK_T), end, stride_mask, HAS_MASK)
    if _FLATTEN:
        for start in tl.range(first, end, STEPS * BLOCK_T, flatten=True):
            part, keep = _sum_of_steps(
                start, end, STEPS, D, keep, rows, cols, x_ptr, mask_ptr, stride_xt, stride_xd, stride_mask,
                HAS_MASK, BLOCK_D, BLOCK_T, PRECISION,
            )  # fmt: skip
            total += part
    else:
        for start in range(first, end, STEPS * BLOCK_T):
            part, keep = _sum_of_steps(
                start, end, STEPS, D, keep, rows, cols, x_ptr, mask_ptr, stride_xt, stride_xd, stride_mask,
                HAS_MASK, BLOCK_D, BLOCK_T, PRECISION,
            )  # fmt: skip
            total += part

    if PARTIAL:
        place = tl.arange(0, BLOCK_D)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(out_ptr + pid.to(tl.int64) * (BLOCK_D * BLOCK_D) + place, total)
    else:
        _add_to_both_triangles(out_ptr, total, rows, cols, D, stride_c0, stride_c1)


@triton.jit(do_not_specialize=["SPLITS", "D"])  # D = 1 would be a Python number
def _add_partials_kernel(
    cov_ptr,
    partials_ptr,
    SPLITS,
    D,
    stride_c0,
    stride_c1,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: ROWS rows of one tile. Adds the splits, first to last, to cov and to its mirror image."""
    n_tiles = tl.cdiv(D, BLOCK_D)
    tiles = n_tiles * (n_tiles + 1) // 2
    tile = tl.program_id(0)
    i, j = _grouped_position(tile, n_tiles, GROUP)
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    ptrs = (
        partials_ptr + tile.to(tl.int64) * (BLOCK_D * BLOCK_D) + inside[:, None] * BLOCK_D + column[None, :]
    )
    total = tl.zeros((ROWS, BLOCK_D), dtype=cov_ptr.dtype.element_ty)
    for _ in range(0, SPLITS):
        total += tl.load(ptrs).to(cov_ptr.dtype.element_ty)
        ptrs += tiles.to(tl.int64) * (BLOCK_D * BLOCK_D)
    _add_to_both_triangles(
        cov_ptr, total, i * BLOCK_D + inside, j * BLOCK_D + column, D, stride_c0, stride_c1
    )


# (architecture, arithmetic, large tiles?) -> tile, tokens a step, warps, pipeline stages. Arithmetic: "half" for
# bfloat16 and float16, else the precision of float32. Chosen for no spills, wgmma that stays asynchronous, and
# shared memory, with Triton 3.6 and 3.9 (tests/compile/test_triton.py), not by timing; bench/tune.py times them.
_CONFIG = {
    (0, "half", False): (32, 32, 1, 1),
    (0, "tf32x3", False): (32, 32, 1, 1),
    (80, "half", False): (64, 64, 4, 3),
    (80, "half", True): (128, 32, 8, 4),
    (80, "tf32x3", False): (64, 16, 4, 3),
    (80, "ieee", False): (64, 16, 4, 3),
    (80, "ieee", True): (128, 16, 8, 3),
    (90, "half", False): (64, 64, 4, 4),
    (90, "half", True): (128, 64, 8, 4),
    (90, "tf32x3", False): (64, 32, 4, 3),
    (90, "ieee", False): (64, 32, 4, 3),
    (90, "ieee", True): (128, 32, 8, 3),
    (100, "tf32x3", False): (64, 16, 4, 3),
    (120, "half", False): (64, 32, 4, 4),
    (120, "half", True): (128, 32, 8, 3),
    (120, "tf32x3", False): (64, 16, 8, 3),
}
_FALLBACK = {86: 80, 89: 80, 100: 90, 120: 80}
_LARGE = 256  # from this d on a tile of 128 wastes little; few tiles are made up for by splitting the tokens
_GROUP = 8
_FLUSH_TOKENS = 512  # at most this many are summed by the matrix unit: docs/gpu.md says why
_SPLIT_COST = 512  # writing and reading back a partial tile takes about as long as multiplying so many tokens
_MAX_SPLITS = 32
_WORKSPACE_BYTES = 256 << 20
_FLOAT64_CHUNK = 32768  # tokens between additions to a float64 cov
PRECISIONS = ("tf32x3", "ieee")


def configuration(architecture, x_dtype, d, precision="tf32x3"):
    """Tile, tokens a step, warps and stages for an architecture, the dtype of x, d and the precision of float32."""
    arithmetic = "half" if x_dtype.itemsize == 2 else precision if architecture else "tf32x3"
    fallback = _FALLBACK.get(architecture, architecture)
    for key in (
        (architecture, arithmetic, d >= _LARGE),
        (architecture, arithmetic, False),
        (fallback, arithmetic, d >= _LARGE),
        (fallback, arithmetic, False),
    ):
        if key in _CONFIG:
            return _CONFIG[key]
    raise KeyError(f"no configuration for {architecture}, {arithmetic}")


@functools.lru_cache(maxsize=256)
def plan_splits(n_tokens, tiles, slots, least=1):
    """Into how many parts to split the tokens so that tiles · parts programs fill the GPU evenly.

    Args:
        n_tokens: tokens in the call.
        tiles: tiles of the triangle.
        slots: programs that run at a time.
        least: no fewer parts than this.
    """

    def cost(splits):
        rounds = -(-tiles * splits // slots)
        return rounds * (-(-n_tokens // splits) + (_SPLIT_COST if splits > 1 else 0))

    return min(range(least, max(least, _MAX_SPLITS) + 1), key=cost)


def _launch(cov, x, mask, config, precision):
    block_d, block_t, warps, stages = config
    n_tokens, d = x.shape
    tiles = triton.cdiv(d, block_d) * (triton.cdiv(d, block_d) + 1) // 2
    tile_bytes = 4 * block_d * block_d
    float64 = cov.dtype == torch.float64
    slots = common.multiprocessors(x.device) * max(1, 8 // warps)
    splits = plan_splits(n_tokens, tiles, slots)
    splits = max(1, min(splits, _WORKSPACE_BYTES // (tiles * tile_bytes)))
    steps = triton.cdiv(triton.cdiv(n_tokens, block_t), splits)  # of one split
    flushes = triton.cdiv(steps, max(1, _FLUSH_TOKENS // block_t))
    steps = triton.cdiv(steps, flushes)  # between two flushes
    split_tokens = flushes * steps * block_t
    splits = triton.cdiv(n_tokens, split_tokens)
    partial = (
        float64 or splits > 1
    )  # a float64 cov is added to by the second kernel alone: fewer registers here
    out = (
        torch.empty(splits * tiles * tile_bytes // 4, dtype=torch.float32, device=x.device)
        if partial
        else cov
    )
    _covariance_kernel[(tiles * splits,)](
        out,
        x,
        x if mask is None else mask,
        n_tokens,
        d,
        split_tokens,
        steps,
        cov.stride(0),
        cov.stride(1),
        x.stride(0),
        x.stride(1),
        0 if mask is None else mask.stride(0),
        HAS_MASK=mask is not None,
        PARTIAL=partial,
        BLOCK_D=block_d,
        BLOCK_T=block_t,
        GROUP=_GROUP,
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )
    if partial:
        rows = min(block_d, 32)
        _add_partials_kernel[(tiles, block_d // rows)](
            cov,
            out,
            splits,
            d,
            cov.stride(0),
            cov.stride(1),
            BLOCK_D=block_d,
            ROWS=rows,
            GROUP=_GROUP,
            num_warps=4,
        )


def covariance_triton(cov, x, mask=None, precision="tf32x3", config=None):
    """Add xᵀ diag(mask) x to cov in place; the arguments are those that fastedit.ops.covariance_ has checked.

    Args:
        cov: (d, d), float32 or float64, symmetric, any strides.
        x: (T, d), bfloat16, float16 or float32, any strides.
        mask: (T,), bool, any stride, or None.
        precision: of the products of a float32 x: "tf32x3", three products on the matrix unit, good to about 2^-21,
            or "ieee", float32 multiply-adds.
        config: tile, tokens a step, warps and stages, in place of the table's; for bench/tune.py.
    """
    n_tokens, d = x.shape
    if n_tokens == 0 or d == 0:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'tf32x3' or 'ieee', got {precision!r}")
    config = config or configuration(common.architecture(x.device), x.dtype, d, precision)
    counted = None if mask is None else mask.view(torch.uint8)
    chunk = _FLOAT64_CHUNK if cov.dtype == torch.float64 else n_tokens
    with torch.cuda.device_of(x):
        for t in range(0, n_tokens, chunk):
            part = None if counted is None else counted[t : t + chunk]
            _launch(cov, x[t : t + chunk], part, config, precision)
