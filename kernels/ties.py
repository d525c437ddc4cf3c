"""Merging of weight updates by magnitude and sign on a GPU: exact selection by bit patterns, then one fused pass.

A sample of each update brackets the k-th largest magnitude. One pass counts, tile by tile, what is above the bracket
and collects what is inside; three rounds of histograms over what was collected yield all 31 bits. Where the bracket
missed, the histograms read the whole update instead: decided on the device, nothing is waited for.
"""

import torch
import triton
import triton.language as tl

from . import common

_ABOVE, _AT_HIGH, _INSIDE, _AT_LOW = (tl.constexpr(i) for i in range(4))  # counts of a tile
_MODE, _FIRST, _RANK = (tl.constexpr(i) for i in range(3))  # what is known of a threshold
_AT_END, _COLLECTED, _MISSED = (tl.constexpr(i) for i in range(3))  # modes: where the k-th largest is
_STATE = tl.constexpr(3)
_COUNTS = tl.constexpr(4)
_KEEP_ALL = tl.constexpr(-1)
_BINS = tl.constexpr(2048)
_LARGEST = 0x7FFFFFFF


@triton.jit(do_not_specialize=["i", "keep"])
def _describe_kernel(address_ptr, keep_ptr, weight_ptr, i, v_ptr, keep, weight):
    """One entry of the table of inputs; a copy from the host would wait, or go stale in a captured graph."""
    tl.store(address_ptr + i, v_ptr.to(tl.int64))
    tl.store(keep_ptr + i, keep)
    tl.store(weight_ptr + i, weight)


@triton.jit
def _difference(base_ptr, address_ptr, i, offsets, inside, ALIGNED: tl.constexpr):
    """V_i - base in float32, rounded; 0 outside."""
    v_ptr = tl.load(address_ptr + i).to(base_ptr.dtype)
    if ALIGNED:
        v_ptr = tl.multiple_of(v_ptr, 16)
    base = tl.load(base_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.load(v_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - base


@triton.jit
def _magnitude_bits(delta, inside):
    """Bit patterns of |delta|, which have the same order; -2 outside, below every bracket."""
    return tl.where(inside, delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -2)


@triton.jit
def _trims(keep_ptr, i, N):
    keep = tl.load(keep_ptr + i)
    return (keep > 0) & (keep < N)


@triton.jit
def _count_kernel(
    base_ptr,
    address_ptr,
    keep_ptr,
    bracket_ptr,
    counts_ptr,
    collected_ptr,
    N,
    M,
    N_TILES,
    CAPACITY,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one tile of one input. Memory: the tile of the input and of base, once."""
    i = tl.program_id(0) % M
    tile = (tl.program_id(0) // M).to(tl.int64)
    if not _trims(keep_ptr, i, N):
        return
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < N
    bits = _magnitude_bits(_difference(base_ptr, address_ptr, i, offsets, valid, ALIGNED), valid)
    low = tl.load(bracket_ptr + 2 * i)
    high = tl.load(bracket_ptr + 2 * i + 1)
    inside = (bits > low) & (bits < high)
    slot = i * N_TILES + tile
    counts = counts_ptr + slot * _COUNTS
    tl.store(counts + _ABOVE, tl.sum((bits > high).to(tl.int32)))
    tl.store(counts + _AT_HIGH, tl.sum((bits == high).to(tl.int32)))
    tl.store(counts + _INSIDE, tl.sum(inside.to(tl.int32)))
    tl.store(counts + _AT_LOW, tl.sum((bits == low).to(tl.int32)))
    at = tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(collected_ptr + slot * CAPACITY + at, bits, mask=inside & (at < CAPACITY))


@triton.jit
def _locate_kernel(
    keep_ptr, bracket_ptr, counts_ptr, state_ptr, bins_ptr, N, N_TILES, CAPACITY, BLOCK: tl.constexpr
):
    """One program: one input. From the counts: is the k-th largest at an end of the bracket, inside, or elsewhere."""
    i = tl.program_id(0)
    keep = tl.load(keep_ptr + i).to(tl.int64)
    state = state_ptr + i * _STATE
    tl.store(state + _MODE, _AT_END)
    tl.store(state + _FIRST, tl.where(keep == 0, 0x7FFFFFFF, 0).to(tl.int64))
    tl.store(state + _RANK, keep)
    if not _trims(keep_ptr, i, N):
        return
    tl.store(bins_ptr + i * _BINS + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int64))
    low = tl.load(bracket_ptr + 2 * i).to(tl.int64)
    high = tl.load(bracket_ptr + 2 * i + 1).to(tl.int64)
    above = tl.zeros((BLOCK,), tl.int64)
    at_high = tl.zeros((BLOCK,), tl.int64)
    inside = tl.zeros((BLOCK,), tl.int64)
    at_low = tl.zeros((BLOCK,), tl.int64)
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N_TILES, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        counts = counts_ptr + (i.to(tl.int64) * N_TILES + tiles) * _COUNTS
        there = tiles < N_TILES
        above += tl.load(counts + _ABOVE, mask=there, other=0)
        at_high += tl.load(counts + _AT_HIGH, mask=there, other=0)
        collected = tl.load(counts + _INSIDE, mask=there, other=0)
        inside += collected
        most = tl.maximum(most, collected)
        at_low += tl.load(counts + _AT_LOW, mask=there, other=0)
    below_high = keep - tl.sum(above)  # rank among those not above
    below_inside = below_high - tl.sum(at_high)
    below_low = below_inside - tl.sum(inside)
    overflow = tl.max(most, 0) > CAPACITY
    in_low = (below_low > 0) & (low < high) & (below_low <= tl.sum(at_low))
    in_collected = (below_inside > 0) & (below_low <= 0) & (overflow == 0)
    in_high = (below_high > 0) & (below_inside <= 0)
    known = in_high | in_low
    mode = tl.where(known, _AT_END, tl.where(in_collected, _COLLECTED, _MISSED))
    rank = tl.where(
        in_high, below_high, tl.where(in_low, below_low, tl.where(in_collected, below_inside, keep))
    )
    tl.store(state + _MODE, mode.to(tl.int64))
    tl.store(state + _FIRST, tl.where(known, tl.where(in_high, high, low), 0))
    tl.store(state + _RANK, rank)


@triton.jit
def _histogram_kernel(
    base_ptr,
    address_ptr,
    counts_ptr,
    collected_ptr,
    state_ptr,
    bins_ptr,
    N,
    M,
    N_TILES,
    CAPACITY,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: GROUP tiles of one input. The next bits of magnitudes in [first, first + 2^WIDTH)."""
    i = tl.program_id(0) % M
    mode = tl.load(state_ptr + i * _STATE + _MODE)
    if mode == _AT_END:
        return
    first = tl.load(state_ptr + i * _STATE + _FIRST)
    bins = tl.zeros((_BINS,), tl.int32)
    outside = tl.zeros((), tl.int32)
    start = (tl.program_id(0) // M).to(tl.int64) * GROUP
    entries = tl.arange(0, BLOCK)
    for step in range(GROUP):
        tile = start + step
        slot = i * N_TILES + tile
        if mode == _COLLECTED:
            count = tl.load(counts_ptr + slot * _COUNTS + _INSIDE, mask=tile < N_TILES, other=0)
            there = entries < count
            bits = tl.load(collected_ptr + slot * CAPACITY + entries, mask=there, other=-2)
        else:
            offsets = tile * BLOCK + entries
            there = offsets < N
            bits = _magnitude_bits(_difference(base_ptr, address_ptr, i, offsets, there, ALIGNED), there)
        past = bits.to(tl.int64) - first
        counted = (past >= 0) & ((past >> WIDTH) == 0)
        bins += tl.histogram(tl.where(counted, past >> SHIFT, 0).to(tl.int32), _BINS)
        outside += tl.sum((counted == 0).to(tl.int32))  # those went to the first bin
    which = tl.arange(0, _BINS)
    bins -= tl.where(which == 0, outside, 0)
    tl.atomic_add(bins_ptr + i * _BINS + which, bins.to(tl.int64), mask=bins != 0)


@triton.jit
def _descend_kernel(state_ptr, bins_ptr, SHIFT: tl.constexpr):
    """One program: one input. To the bin that holds the value wanted, and its rank therein."""
    i = tl.program_id(0)
    state = state_ptr + i * _STATE
    if tl.load(state + _MODE) == _AT_END:
        return
    which = tl.arange(0, _BINS)
    bins = tl.load(bins_ptr + i * _BINS + which)
    rank = tl.load(state + _RANK)
    here_and_above = tl.sum(bins) - tl.cumsum(bins, 0) + bins
    bin = tl.sum((here_and_above >= rank).to(tl.int64)) - 1
    tl.store(state + _FIRST, tl.load(state + _FIRST) + (bin << SHIFT))
    tl.store(state + _RANK, rank - tl.sum(tl.where(which > bin, bins, 0)))
    tl.debug_barrier()
    tl.store(bins_ptr + i * _BINS + which, tl.zeros((_BINS,), tl.int64))


@triton.jit
def _tied_kernel(
    base_ptr,
    address_ptr,
    keep_ptr,
    bracket_ptr,
    counts_ptr,
    collected_ptr,
    state_ptr,
    quota_ptr,
    N,
    M,
    N_TILES,
    CAPACITY,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one tile of one input. How many entries equal the threshold."""
    i = tl.program_id(0) % M
    tile = (tl.program_id(0) // M).to(tl.int64)
    if not _trims(keep_ptr, i, N):
        return
    slot = i * N_TILES + tile
    mode = tl.load(state_ptr + i * _STATE + _MODE)
    threshold = tl.load(state_ptr + i * _STATE + _FIRST)
    entries = tl.arange(0, BLOCK)
    if mode == _AT_END:
        high = tl.load(bracket_ptr + 2 * i + 1).to(tl.int64)
        tied = tl.load(counts_ptr + slot * _COUNTS + tl.where(threshold == high, _AT_HIGH, _AT_LOW))
    else:
        if mode == _COLLECTED:
            there = entries < tl.load(counts_ptr + slot * _COUNTS + _INSIDE)
            bits = tl.load(collected_ptr + slot * CAPACITY + entries, mask=there, other=-2)
        else:
            offsets = tile * BLOCK + entries
            there = offsets < N
            bits = _magnitude_bits(_difference(base_ptr, address_ptr, i, offsets, there, ALIGNED), there)
        tied = tl.sum((bits == threshold).to(tl.int32))
    tl.store(quota_ptr + slot, tied)


@triton.jit
def _quota_kernel(keep_ptr, state_ptr, quota_ptr, N, N_TILES, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one input. From tied entries in each tile to those it may keep: the lowest indices of all."""
    i = tl.program_id(0)
    keep = tl.load(keep_ptr + i)
    trims = _trims(keep_ptr, i, N)
    threshold = tl.load(state_ptr + i * _STATE + _FIRST)
    rank = tl.load(state_ptr + i * _STATE + _RANK)
    every = threshold == 0  # which trims nothing
    if ALL:
        every = every | (keep > 0)
    before = tl.zeros((), tl.int64)
    for start in range(0, N_TILES, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        there = tiles < N_TILES
        quotas = quota_ptr + i.to(tl.int64) * N_TILES + tiles
        tied = tl.where(trims, tl.load(quotas, mask=there, other=0), 0).to(tl.int64)
        room = rank - before - (tl.cumsum(tied, 0) - tied)
        kept = tl.minimum(tl.maximum(room, 0), tied)
        kept = tl.where(every | (trims & (kept == tied)), _KEEP_ALL, kept)
        tl.store(quotas, kept.to(tl.int32), mask=there)
        before += tl.sum(tied)


@triton.jit
def _update(
    base_ptr,
    address_ptr,
    weight_ptr,
    state_ptr,
    quota_ptr,
    i,
    tile,
    offsets,
    valid,
    N_TILES,
    ALIGNED: tl.constexpr,
):
    """w_i (V_i - base) where it survives trimming, else 0; the weight; whether every difference is finite."""
    delta = _difference(base_ptr, address_ptr, i, offsets, valid, ALIGNED)
    bits = _magnitude_bits(delta, valid)
    threshold = tl.load(state_ptr + i * _STATE + _FIRST)
    quota = tl.load(quota_ptr + i * N_TILES + tile)
    tied = bits == threshold
    kept = (bits > threshold) | (tied & (quota == _KEEP_ALL))
    if quota > 0:
        kept = kept | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= quota))
    weight = tl.load(weight_ptr + i)
    return tl.where(kept, weight * delta, 0.0), weight, tl.max(bits, 0) < 0x7F800000


@triton.jit
def _merge_kernel(
    out_ptr,
    base_ptr,
    address_ptr,
    weight_ptr,
    state_ptr,
    quota_ptr,
    status_ptr,
    votes_ptr,
    N,
    M,
    N_TILES,
    scale,
    divisor,
    ELECT: tl.constexpr,
    NORMALISE: tl.constexpr,
    MAJORITY: tl.constexpr,
    AGAIN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one tile. Inputs are read twice, the second time from the cache.

    AGAIN: only if the zero sums must become negative after all. Memory: every input and base once, out once.
    """
    if AGAIN:  # noqa: SIM102 (decided when compiling)
        if (tl.load(votes_ptr) >= 0) | (tl.load(votes_ptr + 1) == 0):
            return
    tile = tl.program_id(0).to(tl.int64)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < N
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(M):
        u, _, finite = _update(
            base_ptr, address_ptr, weight_ptr, state_ptr, quota_ptr, i, tile, offsets, valid, N_TILES, ALIGNED
        )
        total += u
        if finite == 0:
            tl.atomic_min(status_ptr, i)
    if ELECT:
        if AGAIN:
            plus = total > 0
        else:
            plus = total >= 0
        merged = tl.zeros((BLOCK,), tl.float32)
        weights = tl.zeros((BLOCK,), tl.float32)
        for i in range(M):
            u, weight, _ = _update(
                base_ptr,
                address_ptr,
                weight_ptr,
                state_ptr,
                quota_ptr,
                i,
                tile,
                offsets,
                valid,
                N_TILES,
                ALIGNED,
            )
            agrees = (plus & (u > 0)) | ((plus == 0) & (u < 0))
            merged += tl.where(agrees, u, 0.0)
            weights += tl.where(agrees, weight, 0.0)
        if MAJORITY:  # noqa: SIM102
            if not AGAIN:
                balance = tl.sum((total > 0).to(tl.int32)) - tl.sum((total < 0).to(tl.int32))
                undecided = tl.sum(((total == 0) & (merged != 0)).to(tl.int32))
                tl.atomic_add(votes_ptr, balance.to(tl.int64))
                tl.atomic_add(votes_ptr + 1, undecided.to(tl.int64))
    else:
        merged = total
    by = tl.zeros((BLOCK,), tl.float32) + divisor
    if NORMALISE:
        by = tl.where(weights == 0, 1.0, weights)
    base = tl.load(base_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    out = base + tl.div_rn(merged * scale, by)
    tl.store(out_ptr + offsets, common.round_to(out, out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _poison_kernel(out_ptr, status_ptr, N, M, BLOCK: tl.constexpr):
    """NaN throughout, if something was not finite."""
    if tl.load(status_ptr) >= M:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    nan = tl.full((BLOCK,), float("nan"), tl.float32)
    tl.store(out_ptr + offsets, nan.to(out_ptr.dtype.element_ty), mask=offsets < N)


# (interpreted or compiled) -> entries of a tile, tiles a histogram reads, entries of a sample, warps
_CONFIG = {True: (256, 2, 256, 1), False: (2048, 32, 32768, 8)}


def configuration(interpreted):
    """Entries of a tile, tiles in a histogram's program, entries of a sample, warps."""
    return _CONFIG[interpreted]


def _brackets(base, tensors, keep, sample_entries):
    """(m, 2) bit patterns: order statistics of a sample, five standard deviations on either side of the k-th largest.

    Everything is a bracket, too, where the tensor is small or not trimmed.
    """
    n, device = base.numel(), base.device
    brackets = torch.empty((len(tensors), 2), dtype=torch.int32, device=device)
    brackets[:, 0] = -1
    brackets[:, 1] = _LARGEST
    if n <= 4 * sample_entries:
        return brackets
    share = n // sample_entries
    entry = torch.arange(sample_entries, device=device)
    # somewhere in each share: equal steps could meet one column of a matrix only
    at = entry * share + ((entry + 1) * 0x9E3779B1 >> 7) % share
    start = base[at].float()
    for i, (tensor, k) in enumerate(zip(tensors, keep, strict=True)):
        if not 0 < k < n:
            continue
        order = (tensor[at].float() - start).abs().view(torch.int32).sort(descending=True).values
        expected = int(k / n * sample_entries)
        margin = int(5.0 * (sample_entries * (k / n) * (1 - k / n)) ** 0.5) + 8
        if expected + margin < sample_entries:
            brackets[i, 0] = order[expected + margin]
        if expected - margin >= 0:
            brackets[i, 1] = order[expected - margin]
    return brackets


def ties_merge_triton(out, base, tensors, plan, scale, status):
    """Write base + the merged differences to out; the arguments are those that fastedit.ops.ties_merge has made.

    Args:
        out: (N,), contiguous, of base's dtype; written.
        base: (N,), contiguous; bfloat16, float16 or float32; N > 0.
        tensors: list of tensors like base.
        plan: keep and weights for each tensor; elect, normalise, majority, all_at_threshold, divisor.
        scale: factor of the sum.
        status: (1,), int32; receives the first tensor that is not finite (out is NaN then), or their number.
    """
    n, m, device = base.numel(), len(tensors), base.device
    block, group, sample_entries, warps = configuration(common.is_interpreted())
    tiles = triton.cdiv(n, block)
    capacity = block if n <= 4 * sample_entries else block // 8
    trims = any(0 < k < n for k in plan.keep)
    aligned = all(t.data_ptr() % 16 == 0 for t in (base, *tensors))
    address, keep = torch.empty((2, m), dtype=torch.int64, device=device)
    weights = torch.empty(m, dtype=torch.float32, device=device)
    state = torch.empty((m, _STATE.value), dtype=torch.int64, device=device)
    counts = torch.empty((m, tiles, _COUNTS.value) if trims else 0, dtype=torch.int32, device=device)
    quotas = torch.empty((m, tiles), dtype=torch.int32, device=device)
    bins = torch.empty((m, _BINS.value), dtype=torch.int64, device=device)
    collected = torch.empty((m, tiles, capacity) if trims else 0, dtype=torch.int32, device=device)
    votes = torch.zeros(2, dtype=torch.int64, device=device)
    status.fill_(m)
    flags = {"ALIGNED": aligned, "BLOCK": block, "num_warps": warps}
    with torch.cuda.device_of(base):
        brackets = _brackets(base, tensors, plan.keep, sample_entries)
        for i, (tensor, k, weight) in enumerate(zip(tensors, plan.keep, plan.weights, strict=True)):
            _describe_kernel[(1,)](address, keep, weights, i, tensor, k, weight, num_warps=1)
        if trims:
            # one axis: the others end at 65,535; programs with the same tile of base follow one another
            _count_kernel[(tiles * m,)](
                base, address, keep, brackets, counts, collected, n, m, tiles, capacity, **flags
            )
        _locate_kernel[(m,)](
            keep, brackets, counts, state, bins, n, tiles if trims else 0, capacity, BLOCK=1024
        )
        if trims:
            width = 31
            for shift in (20, 10, 0):
                _histogram_kernel[(triton.cdiv(tiles, group) * m,)](
                    base, address, counts, collected, state, bins, n, m, tiles, capacity,
                    SHIFT=shift, WIDTH=width, GROUP=group, **flags,
                )  # fmt: skip
                _descend_kernel[(m,)](state, bins, SHIFT=shift)
                width = shift
            _tied_kernel[(tiles * m,)](
                base,
                address,
                keep,
                brackets,
                counts,
                collected,
                state,
                quotas,
                n,
                m,
                tiles,
                capacity,
                **flags,
            )
        _quota_kernel[(m,)](keep, state, quotas, n, tiles, ALL=plan.all_at_threshold, BLOCK=1024)
        for again in (False, True) if plan.majority else (False,):
            _merge_kernel[(tiles,)](
                out, base, address, weights, state, quotas, status, votes, n, m, tiles, scale, plan.divisor,
                ELECT=plan.elect, NORMALISE=plan.normalise, MAJORITY=plan.majority, AGAIN=again,
                enable_fp_fusion=False,  # products and sums are rounded one by one, as everywhere
                **flags,
            )  # fmt: skip
        _poison_kernel[(tiles,)](out, status, n, m, BLOCK=block, num_warps=warps)
