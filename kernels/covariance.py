"""Second moment of activations on a GPU: C += Xᵀ diag(mask) X, one triangle computed, both written."""

import torch
import triton
import triton.language as tl

from . import common


@triton.jit
def _covariance_kernel(
    cov_ptr,
    x_ptr,
    mask_ptr,
    T,
    D,
    stride_c0,
    stride_c1,
    stride_xt,
    stride_xd,
    stride_mask,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLUSH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one BLOCK_D × BLOCK_D tile (i, j), i >= j, of cov and its mirror image.

    Sums of FLUSH · BLOCK_T tokens come from the matrix unit, which truncates; they are added up in float32
    with rounding, and once to cov. Masked rows are not loaded.

    Work: T · D · (D + BLOCK_D) FLOPs over all programs. Memory, ideally: X once and L2 for the rest; cov's
    lower triangle is read, both are written.
    """
    pair = tl.program_id(0)
    i = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
    j = pair - i * (i + 1) // 2

    rows = i * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = j * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ptrs = x_ptr + rows.to(tl.int64)[None, :] * stride_xd
    col_ptrs = x_ptr + cols.to(tl.int64)[None, :] * stride_xd
    total = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    for start in range(0, T, FLUSH * BLOCK_T):
        part = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
        for t0 in range(start, min(start + FLUSH * BLOCK_T, T), BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            keep = t < T
            t = t.to(tl.int64)
            if HAS_MASK:
                keep = tl.load(mask_ptr + t * stride_mask, mask=keep, other=0) != 0
            xi = tl.load(
                row_ptrs + t[:, None] * stride_xt, mask=keep[:, None] & (rows < D)[None, :], other=0.0
            )
            xj = tl.load(
                col_ptrs + t[:, None] * stride_xt, mask=keep[:, None] & (cols < D)[None, :], other=0.0
            )
            part = common.dot(tl.trans(xi), xj, part, PRECISION)
        total += part

    r = rows.to(tl.int64)[:, None]
    c = cols.to(tl.int64)[None, :]
    lower = (r >= c) & (r < D)
    cov_ptrs = cov_ptr + r * stride_c0 + c * stride_c1
    total = tl.load(cov_ptrs, mask=lower, other=0.0) + total.to(cov_ptr.dtype.element_ty)
    tl.store(cov_ptrs, total, mask=lower)
    tl.store(cov_ptr + c * stride_c0 + r * stride_c1, total, mask=lower & (r > c))


# (architecture, bytes of an element of x, size class) -> tile, tokens a step, warps, pipeline stages.
# "small": too few large tiles to fill a GPU; "double": a float64 cov, which takes more registers. Chosen
# for no spills and for shared memory with Triton 3.6 and 3.9 (tests/compile/test_triton.py), not by timing.
_CONFIG = {
    (0, 2, "small"): (32, 32, 1, 1),
    (0, 4, "small"): (32, 32, 1, 1),
    (80, 2, "small"): (64, 64, 4, 3),
    (80, 2, "large"): (128, 32, 8, 4),
    (80, 4, "small"): (64, 16, 4, 3),
    (90, 2, "small"): (64, 64, 4, 4),
    (90, 2, "large"): (128, 64, 8, 4),
    (90, 4, "small"): (64, 32, 4, 3),
    (120, 2, "small"): (64, 32, 4, 4),
    (120, 2, "double"): (64, 64, 4, 3),
    (120, 4, "small"): (64, 16, 8, 3),
}
_FALLBACK = {86: 80, 89: 80, 100: 90}
_FLUSH_TOKENS = 1024
_LARGE = 2048  # from this d on a triangle of 128 × 128 tiles fills the largest GPUs
_FLOAT64_CHUNK = 32768  # tokens between additions to a float64 cov


def configuration(architecture, x_dtype, cov_dtype, d):
    """Tile, tokens a step, warps and stages for an architecture, the two dtypes, and d."""
    size = "double" if cov_dtype == torch.float64 else "large" if d >= _LARGE else "small"
    architecture = _FALLBACK.get(architecture, architecture)
    small = _CONFIG[architecture, x_dtype.itemsize, "small"]
    return _CONFIG.get((architecture, x_dtype.itemsize, size), small)


def covariance_triton(cov, x, mask=None):
    """Add xᵀ diag(mask) x to cov in place; the arguments are those that fastedit.ops.covariance_ has checked.

    Args:
        cov: (d, d), float32 or float64, symmetric, any strides.
        x: (T, d), bfloat16, float16 or float32, any strides.
        mask: (T,), bool, any stride, or None.
    """
    n_tokens, d = x.shape
    if n_tokens == 0 or d == 0:
        return
    block_d, block_t, warps, stages = configuration(common.architecture(x.device), x.dtype, cov.dtype, d)
    tiles = triton.cdiv(d, block_d)
    chunk = _FLOAT64_CHUNK if cov.dtype == torch.float64 else n_tokens
    with torch.cuda.device_of(x):
        for t in range(0, n_tokens, chunk):
            rows = x[t : t + chunk]
            counted = rows if mask is None else mask[t : t + chunk].view(torch.uint8)
            _covariance_kernel[(tiles * (tiles + 1) // 2,)](
                cov,
                rows,
                counted,
                rows.shape[0],
                d,
                cov.stride(0),
                cov.stride(1),
                rows.stride(0),
                rows.stride(1),
                0 if mask is None else counted.stride(0),
                HAS_MASK=mask is not None,
                BLOCK_D=block_d,
                BLOCK_T=block_t,
                FLUSH=max(1, _FLUSH_TOKENS // block_t),
                PRECISION="tf32x3",
                num_warps=warps,
                num_stages=stages,
            )
