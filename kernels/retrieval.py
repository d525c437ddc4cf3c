"""Nearest keys and greatest inner products on a GPU: a scan that bounds tiles of keys, then exact values of the few.

The scan computes inner products on the matrix unit and knows how far off they can be. For each query and tile of
keys it stores two numbers: no key of the tile is better than ``upper``, one is at least as good as ``lower``. The
k-th greatest ``lower`` of a query is a bar; tiles whose ``upper`` reaches it are computed again in float64, and the
best k of those are the result. Nothing waits for the device, and no matrix of queries by keys is stored.
"""

import math

import torch
import triton
import triton.language as tl

from . import common


@triton.jit
def _scan_kernel(
    upper_ptr,
    lower_ptr,
    queries_ptr,
    norms_ptr,
    keys_ptr,
    scale_ptr,
    alive_ptr,
    B,
    N,
    D,
    TILES,
    gamma,
    floor,
    stride_qb,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_scale,
    stride_alive,
    NEAREST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_B queries and one tile of BLOCK_N keys; upper and lower are (B, TILES).

    Values are inner products, or minus squared distances formed from them. Of float32 keys three TF32 products
    are taken; narrower keys are exact in TF32, so the high and the low part of the queries make two. The value
    is within gamma ‖q‖‖k‖, or gamma (‖q‖ + ‖k‖)², plus ``floor`` for what underflows.

    Memory: each key once for every BLOCK_B queries; programs with the same keys follow one another.
    """
    parts = tl.cdiv(B, BLOCK_B)
    b = tl.program_id(0) % parts * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(0) // parts
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_query = b < B
    is_key = n < N
    b = b.to(tl.int64)
    q_ptrs = queries_ptr + b[:, None] * stride_qb
    k_ptrs = keys_ptr + n[None, :] * stride_kn
    product = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = d < D
        d = d.to(tl.int64)
        q = tl.load(q_ptrs + d[None, :] * stride_qd, mask=is_query[:, None] & inside[None, :], other=0.0)
        k = tl.load(k_ptrs + d[:, None] * stride_kd, mask=inside[:, None] & is_key[None, :], other=0)
        k = k.to(tl.float32)
        squares += tl.sum(k * k, axis=0)
        if keys_ptr.dtype.element_ty == tl.float32:
            product = tl.dot(q, k, product, input_precision="tf32x3")
        else:
            high = (q.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
            product = tl.dot(high, k, product, input_precision="tf32")
            product = tl.dot(q - high, k, product, input_precision="tf32")

    norm_q = tl.load(norms_ptr + b, mask=is_query, other=0.0)
    norm_k = tl.sqrt(squares)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n * stride_scale, mask=is_key, other=0.0)
        product = product * scale[None, :]
        norm_k = norm_k * tl.abs(scale)
    if NEAREST:
        value = 2.0 * product - (norm_k * norm_k)[None, :] - (norm_q * norm_q)[:, None]
        reach = norm_q[:, None] + norm_k[None, :]
        slack = gamma * (reach * reach) + floor
    else:
        value = product
        # 1e-15: at least the norm of a vector whose squares are too small for float32
        slack = gamma * ((norm_q + 1e-15)[:, None] * (norm_k + 1e-15)[None, :]) + floor
    upper = value + slack
    lower = value - slack
    upper = tl.where(tl.abs(upper) < float("inf"), upper, float("inf"))  # NaN, too, could be anything
    lower = tl.where(tl.abs(lower) < float("inf"), lower, float("-inf"))
    counts = is_key
    if HAS_ALIVE:
        counts = tl.load(alive_ptr + n * stride_alive, mask=is_key, other=0) != 0
    upper = tl.where(counts[None, :], upper, float("-inf"))
    lower = tl.where(counts[None, :], lower, float("-inf"))
    place = b * TILES + tile
    tl.store(upper_ptr + place, tl.max(upper, axis=1), mask=is_query)
    tl.store(lower_ptr + place, tl.max(lower, axis=1), mask=is_query)


@triton.jit
def _exact_kernel(
    values_ptr,
    order_ptr,
    upper_ptr,
    bar_ptr,
    queries_ptr,
    keys_ptr,
    scale_ptr,
    alive_ptr,
    N,
    D,
    TILES,
    stride_qb,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_scale,
    stride_alive,
    NEAREST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    SIGN: tl.constexpr,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one query and GROUP tiles; values and order, (B, groups, KEPT), its best K keys, in any order.

    Better is a greater value, then a smaller order, which is SIGN times the key's index. Every value is a sum over
    d in the same order, wherever the key stands. No key: minus infinity, and the greatest order.
    """
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, KEPT)
    none = 0x7FFFFFFFFFFFFFFF
    best = tl.full((KEPT,), float("-inf"), dtype=tl.float64)
    order = tl.full((KEPT,), none, dtype=tl.int64)
    bottom = tl.full((), float("-inf"), dtype=tl.float64)  # the worst of the K
    bottom_order = tl.full((), none, dtype=tl.int64)
    bar = tl.load(bar_ptr + b)
    first = group * GROUP
    for i in range(0, min(GROUP, TILES - first)):
        tile = first + i
        limit = tl.load(upper_ptr + b * TILES + tile)
        if (limit >= bar) & (limit > float("-inf")):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            counts = n < N
            if HAS_ALIVE:
                counts = tl.load(alive_ptr + n * stride_alive, mask=counts, other=0) != 0
            value = tl.full((BLOCK_N,), 0.0, dtype=tl.float64)
            for d0 in range(0, D, BLOCK_D):
                d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
                inside = d < D
                q = tl.load(queries_ptr + b * stride_qb + d * stride_qd, mask=inside, other=0.0)
                k = tl.load(
                    keys_ptr + n[:, None] * stride_kn + d[None, :] * stride_kd,
                    mask=counts[:, None] & inside[None, :],
                    other=0,
                )
                q = q.to(tl.float64)[None, :]
                k = k.to(tl.float32).to(tl.float64)
                if HAS_SCALE:
                    scale = tl.load(scale_ptr + n * stride_scale, mask=counts, other=0.0)
                    k = k * scale.to(tl.float64)[:, None]
                if NEAREST:
                    value -= tl.sum((k - q) * (k - q), axis=1)
                else:
                    value += tl.sum(k * q, axis=1)
            value = tl.where(counts & (value == value), value, float("-inf"))
            mine = tl.where(value > float("-inf"), SIGN * n, none)
            remaining = K  # no more than K keys of a tile can be among the best K
            while remaining > 0:
                top = tl.max(value, axis=0)
                top_order = tl.min(tl.where(value == top, mine, none), axis=0)
                if (top > bottom) | ((top == bottom) & (top_order < bottom_order)):
                    worst = (slots < K) & (best == bottom) & (order == bottom_order)
                    slot = 0 if K == 1 else tl.min(tl.where(worst, slots, KEPT), axis=0)
                    best = tl.where(slots == slot, top, best)
                    order = tl.where(slots == slot, top_order, order)
                    value = tl.where(mine == top_order, float("-inf"), value)
                    mine = tl.where(mine == top_order, none, mine)
                    if K == 1:
                        bottom = top
                        bottom_order = top_order
                    else:
                        bottom = tl.min(tl.where(slots < K, best, float("inf")), axis=0)
                        last = (slots < K) & (best == bottom)
                        bottom_order = tl.max(tl.where(last, order, -none), axis=0)
                    remaining -= 1
                else:
                    remaining = 0
    place = (b * tl.num_programs(1) + group) * KEPT + slots
    tl.store(values_ptr + place, best)
    tl.store(order_ptr + place, order)


# (architecture, bytes of an element of a key, size class) -> queries, keys and step of a tile, warps, stages of the
# scan; step of the second pass, and how many tiles a program of it looks through. "few": up to 16 queries, bound by
# the keys' bytes. Chosen for no spills and for shared memory with Triton 3.9 (tests/compile/test_triton.py), not by
# timing.
_CONFIG = {
    (80, 1, "few"): (16, 64, 128, 4, 3, 32, 32),
    (80, 2, "few"): (16, 64, 64, 4, 4, 32, 32),
    (80, 4, "few"): (16, 64, 32, 4, 4, 16, 32),
    (80, 1, "many"): (64, 64, 64, 4, 2, 32, 32),
    (80, 2, "many"): (64, 64, 32, 4, 3, 32, 32),
    (80, 4, "many"): (64, 64, 32, 8, 3, 16, 32),
}
_INTERPRETED = (16, 32, 128, 1, 1, 128, 2)
_FEW = 16
_BOUND_BYTES = 64 << 20  # of upper and lower: queries are served in chunks that keep within


def configuration(architecture, dtype, n_queries):
    """Tiles, warps, stages and steps as listed above, for an architecture, the keys' dtype, and B."""
    size = "few" if n_queries <= _FEW else "many"
    return _CONFIG[80, dtype.itemsize, size] if architecture else _INTERPRETED


def _search(queries, keys, k, alive, scale, nearest, highest):
    """The best k values, (B, k) in float64 descending, and their indices (−1: none)."""
    n_queries, d = queries.shape
    n_keys = keys.shape[0]
    values = torch.full((n_queries, k), -math.inf, dtype=torch.float64, device=queries.device)
    indices = torch.full((n_queries, k), -1, device=queries.device)
    if n_queries == 0 or n_keys == 0:
        return values, indices
    block_b, block_n, block_d, warps, stages, exact_d, group = configuration(
        common.architecture(keys.device), keys.dtype, n_queries
    )
    tiles = triton.cdiv(n_keys, block_n)
    groups = triton.cdiv(tiles, group)
    # Sums of d TF32 products, truncated when they are added: half of this is left for the other roundings.
    gamma, floor = (d + 32) * 2.0**-22, max(d, 1) * 2.0**-120
    norms = queries.double().norm(dim=1).float()
    counted = queries if alive is None else alive.view(torch.uint8)
    scaled = queries if scale is None else scale
    strides = (
        *queries.stride(),
        *keys.stride(),
        0 if scale is None else scale.stride(0),
        0 if alive is None else counted.stride(0),
    )
    options = {"NEAREST": nearest, "HAS_SCALE": scale is not None, "HAS_ALIVE": alive is not None}
    kept = max(2, triton.next_power_of_2(k))
    chunk = max(block_b, _BOUND_BYTES // (8 * tiles) // block_b * block_b)
    with torch.cuda.device_of(keys), common.quiet():
        for start in range(0, n_queries, chunk):
            rows = queries[start : start + chunk]
            n = rows.shape[0]
            upper, lower = (
                torch.empty((n, tiles), dtype=torch.float32, device=keys.device) for _ in range(2)
            )
            _scan_kernel[(triton.cdiv(n, block_b) * tiles,)](
                upper, lower, rows, norms[start:], keys, scaled, counted, n, n_keys, d, tiles, gamma, floor,
                *strides, **options, BLOCK_B=block_b, BLOCK_N=block_n, BLOCK_D=block_d,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if tiles >= k:  # tiles' best keys are k different ones
                bar = lower.topk(k, dim=1).values[:, -1].contiguous()
            else:
                bar = lower.new_full((n,), -math.inf)
            found = torch.empty((n, groups * kept), dtype=torch.float64, device=keys.device)
            order = torch.empty((n, groups * kept), dtype=torch.int64, device=keys.device)
            _exact_kernel[(n, groups)](
                found, order, upper, bar, rows, keys, scaled, counted, n_keys, d, tiles,
                *strides, **options, SIGN=-1 if highest else 1, K=k, KEPT=kept, GROUP=group, BLOCK_N=block_n,
                BLOCK_D=exact_d, num_warps=4,
            )  # fmt: skip
            values[start : start + chunk], indices[start : start + chunk] = _best(found, order, k)
    return values, indices


def _best(found, order, k):
    """The best k of each row, by value and then by order, which is given back as an index."""
    order, place = order.sort(dim=1)
    found, second = found.gather(1, place).sort(dim=1, descending=True, stable=True)
    order = order.gather(1, second)[:, :k]
    return found[:, :k], torch.where(found[:, :k] > -math.inf, order.abs(), -1)


def nearest_key_triton(queries, keys, radius, alive, scale):
    """Index and distance as fastedit.ops.nearest_key describes and checks them.

    Args:
        queries: (B, d), float32, bfloat16 or float16, any strides.
        keys: (N, d), float32, bfloat16, float16 or int8, any strides.
        radius: (N,), float32, or None.
        alive: (N,), bool, any stride, or None.
        scale: (N,), float32, any stride, or None.
    """
    values, indices = _search(queries.float(), keys, 1, alive, scale, True, False)
    distance, index = (-values[:, 0]).sqrt().float(), indices[:, 0]
    covered = distance < math.inf
    if radius is not None and keys.shape[0]:
        covered &= distance <= radius[index.clamp(min=0)]
    return torch.where(covered, index, -1), distance


def max_inner_product_triton(queries, keys, threshold, k, alive, scale, ties):
    """Indices and scores as fastedit.ops.max_inner_product describes and checks them.

    Args:
        queries: (B, d), float32, bfloat16 or float16, any strides.
        keys: (N, d), float32, bfloat16, float16 or int8, any strides.
        threshold: (B,), float32, or None.
        k: 1 to 64.
        alive: (N,), bool, any stride, or None.
        scale: (N,), float32, any stride, or None.
        ties: "lowest" or "highest".
    """
    values, indices = _search(queries.float(), keys, k, alive, scale, False, ties == "highest")
    scores = values.float()
    beaten = scores > (-math.inf if threshold is None else threshold[:, None])
    return torch.where(beaten, indices, -1), torch.where(beaten, scores, -math.inf)
