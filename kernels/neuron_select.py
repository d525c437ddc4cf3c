"""Selection of the fewest neurons that hold a share of the activation mass, on a GPU; scores; squares of a matrix."""

import struct

import torch
import triton
import triton.language as tl


@triton.jit
def _patterns(row_ptr, start, D, BLOCK: tl.constexpr):
    """Bit patterns of the scores [start, start + BLOCK) as integers, 0 for what is not there; what is there.

    Valid scores, -0.0 taken as 0.0, have patterns in their own order; all else has those of infinity and beyond.
    """
    i = start + tl.arange(0, BLOCK)
    there = i < D
    values = tl.load(row_ptr + i, mask=there, other=0.0)
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        bits = tl.where(bits < 0, 0x7FFFFFFFFFFFFFFF, bits)
    else:
        values = values.to(tl.float32)
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, 0x7FFFFFFF, bits)
    return tl.where(values == 0.0, 0, bits), there


@triton.jit
def _steps(bits, largest, GRID, MANTISSA: tl.constexpr):
    """The whole grid steps in scores, int64, given by their patterns and that of the row's largest score."""
    field = bits >> MANTISSA
    mantissa = (bits - (field << MANTISSA)).to(tl.int64)
    mantissa = tl.where(field > 0, mantissa + (tl.full((), 1, tl.int64) << MANTISSA), mantissa)
    below = tl.maximum(largest >> MANTISSA, 1) - tl.maximum(field, 1)
    shift = (GRID - (MANTISSA + 1) - below).to(tl.int64)
    down = tl.minimum(tl.maximum(-shift, 0), 63)
    return tl.where(shift >= 0, mantissa << tl.maximum(shift, 0), mantissa >> down)


@triton.jit
def _mass_from(
    row_ptr, held, held_steps, pivot, largest, D, GRID,
    MANTISSA: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass of the scores whose pattern is not below ``pivot``."""
    if HELD:
        mass = tl.sum(tl.where(held >= pivot, held_steps, 0), 0)
    else:
        mass = tl.full((), 0, tl.int64)
        for start in range(0, D, BLOCK):
            bits, there = _patterns(row_ptr, start, D, BLOCK)
            mass += tl.sum(tl.where(there & (bits >= pivot), _steps(bits, largest, GRID, MANTISSA), 0), 0)
    return mass


@triton.jit
def _neuron_select_kernel(
    scores_ptr,
    mask_ptr,
    indices_ptr,
    counts_ptr,
    D,
    stride_row,
    GRID,
    mass_bits,
    ALL: tl.constexpr,
    PREFIX: tl.constexpr,
    MANTISSA: tl.constexpr,
    KEY_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one row.

    HELD: BLOCK >= D, and the search keeps the row in registers; otherwise each pass reads it again, as does the end,
    which writes the results in pieces of CHUNK. The wanted score is found bit by bit: a bit is set if the mass of all
    scores not below the result still passes the limit. Masses are integers, so no order of addition changes anything.

    Work: KEY_BITS - LOW_BITS sums over the row. Memory, if held: scores twice, the second time from a cache; the
    results once.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * stride_row
    mask_ptr += row * D
    indices_ptr += row * D
    held, held_there = _patterns(row_ptr, 0, D, BLOCK)
    largest = tl.max(held, 0)
    if not HELD:
        for start in range(BLOCK, D, BLOCK):
            bits, _ = _patterns(row_ptr, start, D, BLOCK)
            largest = tl.maximum(largest, tl.max(bits, 0))
    one = tl.full((), 1, held.dtype)
    last = (one << (KEY_BITS - 1)) - 1 + (one << (KEY_BITS - 1))
    valid = largest < last - (one << MANTISSA) + 1  # below infinity

    threshold = one - 1
    ties = tl.full((), 0, tl.int64) + D
    if not ALL:
        held_steps = tl.where(held_there & valid, _steps(held, largest, GRID, MANTISSA), 0)
        total = _mass_from(row_ptr, held, held_steps, threshold, largest, D, GRID, MANTISSA, HELD, BLOCK)
        target = mass_bits.to(tl.float64, bitcast=True) * total.to(tl.float64)
        limit = target.to(tl.int64)
        if not PREFIX:
            limit = tl.where(limit.to(tl.float64) == target, limit - 1, limit)
        for k in range(KEY_BITS - LOW_BITS):
            pivot = threshold | (one << (KEY_BITS - 1 - k))
            mass = _mass_from(row_ptr, held, held_steps, pivot, largest, D, GRID, MANTISSA, HELD, BLOCK)
            threshold = tl.where(mass > limit, pivot, threshold)
        next_up = tl.minimum(threshold, last - 1) + 1
        above = _mass_from(row_ptr, held, held_steps, next_up, largest, D, GRID, MANTISSA, HELD, BLOCK)
        fit = (limit - above) // tl.maximum(_steps(threshold, largest, GRID, MANTISSA), 1)
        if PREFIX:
            ties = tl.where((fit == 0) & (above == 0), 1, fit)
        else:
            ties = fit + 1
        # mass so near to 1 that its product with the total rounds up, or a row of zeros
        everything = total <= limit
        if not PREFIX:
            ties = tl.where(total == 0, 1, ties)
        ties = tl.where(everything, D, ties)
        threshold = tl.where(everything | (total == 0), 0, threshold)
    ties = tl.where(valid, tl.minimum(ties, D), 0).to(tl.int32)
    threshold = tl.where(valid, threshold, last)

    count = tl.full((), 0, tl.int32)
    ties_seen = tl.full((), 0, tl.int32)
    for start in range(0, D, CHUNK):
        bits, there = _patterns(row_ptr, start, D, CHUNK)
        equal = (there & (bits == threshold)).to(tl.int32)
        rank = ties_seen + tl.cumsum(equal, 0)
        selected = there & ((bits > threshold) | ((equal != 0) & (rank <= ties)))
        chosen = selected.to(tl.int32)
        place = count + tl.cumsum(chosen, 0) - chosen
        i = start + tl.arange(0, CHUNK)
        tl.store(mask_ptr + i, selected.to(tl.uint8), mask=there)
        tl.store(indices_ptr + place, i, mask=selected)
        count += tl.sum(chosen, 0)
        ties_seen += tl.sum(equal, 0)
    for start in range(0, D, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(indices_ptr + i, i * 0 - 1, mask=(i >= count) & (i < D))
    tl.store(counts_ptr + row, count)


@triton.jit
def _neuron_scores_kernel(keys_ptr, out_ptr, D, N, stride_kd, stride_kn, BLOCK: tl.constexpr):
    """One program: BLOCK neurons, each added up in the order of its keys. Memory: keys once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < D
    ptrs = keys_ptr + i * stride_kd
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for _ in range(N):
        values = tl.load(ptrs, mask=there, other=0.0)
        if values.dtype != tl.float64:
            values = values.to(tl.float32)
        total += tl.abs(values.to(tl.float64))
        ptrs += stride_kn
    tl.store(out_ptr + i, total, mask=there)


@triton.jit
def _gather_square_kernel(
    matrix_ptr,
    indices_ptr,
    out_ptr,
    D,
    S,
    stride_m0,
    stride_m1,
    stride_i,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS × BLOCK elements of the square. Memory: what is selected once, the square once."""
    blocks = tl.cdiv(S, BLOCK)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    from_row = tl.load(indices_ptr + r.to(tl.int64) * stride_i, mask=r < S, other=-1).to(tl.int64)[:, None]
    from_column = tl.load(indices_ptr + c.to(tl.int64) * stride_i, mask=c < S, other=-1).to(tl.int64)[None, :]
    inside = (from_row >= 0) & (from_row < D) & (from_column >= 0) & (from_column < D)
    values = tl.load(
        matrix_ptr + from_row * stride_m0 + from_column * stride_m1, mask=inside, other=float("nan")
    )
    place = r.to(tl.int64)[:, None] * S + c.to(tl.int64)[None, :]
    tl.store(out_ptr + place, values, mask=(r < S)[:, None] & (c < S)[None, :])


# Elements of a row that one program keeps in registers, and of the pieces in which it reads a longer one. Chosen for
# no spills with Triton 3.9 (tests/compile/test_triton.py), not by timing.
_HELD = 8192
_CHUNK = 4096
_LOW_BITS = {
    torch.bfloat16: 16,
    torch.float16: 13,
    torch.float32: 0,
    torch.float64: 0,
}  # zero in every pattern


def configuration(d):
    """Whether a row of d scores is held, the block, the chunk, and the warps."""
    held = d <= _HELD
    whole = max(16, triton.next_power_of_2(d))
    block = whole if held else _CHUNK
    return held, block, min(whole, _CHUNK), min(16, max(1, block // 256))


def _bits_of(mass):
    """The float64 as an int64: as a number it would arrive as float32. What is tinier selects the same."""
    return struct.unpack("<q", struct.pack("<d", max(mass, 1e-300)))[0]


def neuron_select_triton(scores, mass, prefix, mask, indices, counts):
    """Fill mask, indices and counts; the arguments are those that fastedit.ops.neuron_select has checked.

    Args:
        scores: (B, d), bfloat16, float16, float32 or float64, unit last stride.
        mass: the share, above 0.
        prefix: whether the rule is "prefix".
        mask: (B, d), bool, contiguous; written.
        indices: (B, d), int32, contiguous; written.
        counts: (B,), int32, contiguous; written.
    """
    n_rows, d = scores.shape
    if d == 0:
        counts.zero_()
        return
    if n_rows == 0:
        return
    held, block, chunk, warps = configuration(d)
    double = scores.dtype == torch.float64
    with torch.cuda.device_of(scores):
        _neuron_select_kernel[(n_rows,)](
            scores,
            mask.view(torch.uint8),
            indices,
            counts,
            d,
            scores.stride(0),
            63 - d.bit_length(),
            _bits_of(mass),
            ALL=mass >= 1,
            PREFIX=prefix,
            MANTISSA=52 if double else 23,
            KEY_BITS=63 if double else 31,
            LOW_BITS=_LOW_BITS[scores.dtype],
            HELD=held,
            BLOCK=block,
            CHUNK=chunk,
            num_warps=warps,
        )


def neuron_scores_triton(keys, out):
    """Fill out (d,), float64, contiguous, with the sums of |keys (d, n)|; any strides of keys."""
    d, n = keys.shape
    if d == 0:
        return
    block = 64
    with torch.cuda.device_of(keys):
        _neuron_scores_kernel[(triton.cdiv(d, block),)](
            keys, out, d, n, keys.stride(0), keys.stride(1), BLOCK=block, num_warps=2
        )


def gather_square_triton(matrix, indices, out):
    """Fill out (s, s), contiguous, with matrix[indices][:, indices]; any strides of the others."""
    n = indices.shape[0]
    if n == 0:
        return
    rows, block = (8, 128) if n >= 64 else (4, 16)
    with torch.cuda.device_of(matrix):
        _gather_square_kernel[(triton.cdiv(n, rows) * triton.cdiv(n, block),)](
            matrix,
            indices,
            out,
            matrix.shape[0],
            n,
            matrix.stride(0),
            matrix.stride(1),
            indices.stride(0),
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
