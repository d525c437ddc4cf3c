"""Nearest key within its own radius, and maximum inner product against a threshold, streaming over the keys.

The nearest key is the look-up of GRACE (Hartvigsen et al. 2023), the inner product that of RECIPE (Chen et al.
2024, whose threshold is a sentinel's score). Every backend finds what a search in float64 finds: a fast scan with
a proven error bound discards the keys that cannot win, and the few that remain are compared in float64.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from . import backend, check

_QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
MAX_K = 64


def _check_common(
    op: str,
    queries: Tensor,
    keys: Tensor,
    alive: Tensor | None,
    scale: Tensor | None,
    **others: Tensor | None,
) -> None:
    check.matrix(op, queries=queries, keys=keys)
    check.last_dim(op, queries.shape[1], "queries", keys=keys)
    check.shape(op, keys.shape[:1], "like the rows of keys", alive=alive, scale=scale)
    check.dtype(op, _QUERY_DTYPES, queries=queries)
    check.dtype(op, _KEY_DTYPES, keys=keys)
    check.dtype(op, (torch.bool,), alive=alive)
    check.dtype(op, (torch.float32,), scale=scale, **others)
    if scale is not None and keys.dtype != torch.int8:
        raise ValueError(f"{op}: scale belongs to int8 keys, got {check.name_of(keys.dtype)} keys")
    check.same_device(op, queries=queries, keys=keys, alive=alive, scale=scale, **others)


def _check_nearest(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    _check_common("nearest_key", queries, keys, alive, scale, radius=radius)
    check.shape("nearest_key", keys.shape[:1], "like the rows of keys", radius=radius)


def _check_product(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> None:
    op = "max_inner_product"
    _check_common(op, queries, keys, alive, scale, threshold=threshold)
    check.shape(op, queries.shape[:1], "like the rows of queries", threshold=threshold)
    check.choice(op, ("lowest", "highest"), ties=ties)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{op}: k must be from 1 to {MAX_K}, got {k}")


def _nearest_fake(queries: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    n = queries.shape[0]
    return queries.new_empty((n,), dtype=torch.int64), queries.new_empty((n,), dtype=torch.float32)


def _product_fake(
    queries: Tensor, keys: Tensor, threshold: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)


backend.define(
    "nearest_key",
    "(Tensor queries, Tensor keys, Tensor? radius=None, Tensor? alive=None, Tensor? scale=None)"
    " -> (Tensor, Tensor)",
    _nearest_fake,
    check=_check_nearest,
)
backend.define(
    "max_inner_product",
    "(Tensor queries, Tensor keys, Tensor? threshold=None, int k=1, Tensor? alive=None, Tensor? scale=None,"
    ' str ties="lowest") -> (Tensor, Tensor)',
    _product_fake,
    check=_check_product,
)


def nearest_key(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find for every query the nearest key, and whether that key covers it: j = argmin ‖k_j − q‖, d_j <= r_j.

    A key farther away that would cover the query is never used.

    Args:
        queries: (B, d), float32, bfloat16 or float16; any strides.
        keys: (N, d), float32, bfloat16, float16 or int8; any row stride. Need not have the queries' dtype.
        radius: (N,), float32; None: the nearest key always covers.
        alive: (N,), bool, False for keys that are skipped; None: all are alive.
        scale: (N,), float32, for int8 keys: row j stands for scale[j] · keys[j]. None: 1.

    Returns:
        index: (B,), int64; −1 where the nearest key does not cover the query, or there is none.
        distance: (B,), float32, to the nearest key whether it covers or not; infinite if there is none.

    Raises:
        ValueError: shapes or devices that do not fit, a scale without int8 keys.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Exact: distances are compared in float64, summed from differences in an order that is the same for all
    keys; of keys equally far the lowest index wins. The distance is then rounded to float32, and *that* is
    compared with the radius, so a radius set to a returned distance covers. Keys at a distance that is not
    finite (NaN included) are never found. No gradient.
    """
    check.is_tensor("nearest_key", queries=queries, keys=keys)
    return backend.call("nearest_key", queries.detach(), keys.detach(), radius, alive, scale)


def max_inner_product(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> tuple[Tensor, Tensor]:
    """Find for every query the k keys of greatest inner product that beat the query's threshold.

    Args:
        queries: (B, d), float32, bfloat16 or float16; any strides.
        keys: (N, d), float32, bfloat16, float16 or int8; any row stride. Need not have the queries' dtype.
        threshold: (B,), float32; only scores strictly greater count. None: no threshold.
        k: how many, 1 to 64.
        alive: (N,), bool, False for keys that are skipped; None: all are alive.
        scale: (N,), float32, for int8 keys: row j stands for scale[j] · keys[j]. None: 1.
        ties: which of equal scores comes first: ``"lowest"`` index, or ``"highest"`` (the latest edit).

    Returns:
        indices: (B, k), int64, by descending score; −1 where fewer than k keys beat the threshold.
        scores: (B, k), float32; −infinity where the index is −1.

    Raises:
        ValueError: shapes or devices that do not fit, k out of range, a scale without int8 keys, other ties.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Exact: scores are compared in float64, summed in an order that is the same for all keys. A score is then
    rounded to float32, and *that* is compared with the threshold, so a key never beats its own returned score.
    Scores that are NaN or −infinity are never found. No gradient.
    """
    check.is_tensor("max_inner_product", queries=queries, keys=keys)
    return backend.call(
        "max_inner_product", queries.detach(), keys.detach(), threshold, k, alive, scale, ties
    )


# ---- references -----------------------------------------------------------------------------------------


def _float64_rows(keys: Tensor, scale: Tensor | None) -> Tensor:
    rows = keys.double()
    return rows if scale is None else rows * scale.double()[:, None]


def nearest_key_reference(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch and float64, one query at a time; what every backend is tested against."""
    rows = _float64_rows(keys, scale)
    index = torch.full(queries.shape[:1], -1, device=queries.device)
    distance = torch.full(queries.shape[:1], math.inf, device=queries.device)
    for b, query in enumerate(queries.double() if len(rows) else ()):
        squared = (rows - query).square().sum(1).nan_to_num(nan=math.inf, posinf=math.inf)
        if alive is not None:
            squared[~alive] = math.inf
        j = squared.argmin()
        distance[b] = squared[j].sqrt()
        if distance[b] < math.inf and (radius is None or distance[b] <= radius[j]):
            index[b] = j
    return index, distance


def max_inner_product_reference(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> tuple[Tensor, Tensor]:
    """The same in plain torch and float64, one query at a time; what every backend is tested against."""
    rows = _float64_rows(keys, scale)
    indices = torch.full((queries.shape[0], k), -1, device=queries.device)
    scores = torch.full((queries.shape[0], k), -math.inf, device=queries.device)
    order = torch.arange(len(rows), device=queries.device)
    if ties == "highest":
        order = order.flip(0)
    if alive is not None:
        order = order[alive[order]]
    for b, query in enumerate(queries.double()):
        products = (rows[order] * query).sum(1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        products, places = products.sort(descending=True, stable=True)
        found = products.float() > (-math.inf if threshold is None else threshold[b])
        found = order[places[found]][:k]
        indices[b, : len(found)] = found
        scores[b, : len(found)] = products[: len(found)]
    return indices, scores


# ---- torch ----------------------------------------------------------------------------------------------


def nothing_found(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices, (B, k), of a search that has not begun."""
    shape = (queries.shape[0], k)
    values = torch.full(shape, -math.inf, dtype=torch.float64, device=queries.device)
    return values, torch.full(shape, -1, device=queries.device)


def exact_values(
    queries: Tensor, keys: Tensor, scale: Tensor | None, b: Tensor, j: Tensor, nearest: bool
) -> Tensor:
    """Scores, or minus the squared distances, of the pairs (queries[b], keys[j]) in float64."""
    out = torch.empty(b.shape, dtype=torch.float64, device=b.device)
    step = max(1, (1 << 21) // max(1, queries.shape[1]))
    for s in range(0, len(b), step):
        part = slice(s, s + step)
        query = queries[b[part]].double()
        key = _float64_rows(keys[j[part]], None if scale is None else scale[j[part]])
        out[part] = -(key - query).square().sum(1) if nearest else (key * query).sum(1)
    return out.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def merge(
    values: Tensor, indices: Tensor, b: Tensor, new: Tensor, j: Tensor, highest: bool
) -> tuple[Tensor, Tensor]:
    """The best k of each query, of those found before and of pairs with greater indices, ascending in j."""
    n, k = values.shape
    rows = torch.arange(n, device=b.device).repeat_interleave(k)
    parts = [(rows, values.reshape(-1), indices.reshape(-1)), (b, new, j)]
    if highest:
        parts = [tuple(t.flip(0) for t in parts[1]), parts[0]]  # type: ignore[list-item]
    rows, score, index = (torch.cat(column) for column in zip(*parts, strict=True))
    order = score.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows = rows[order]
    counts = torch.bincount(rows, minlength=n)
    place = torch.arange(len(rows), device=b.device) - (counts.cumsum(0) - counts)[rows]
    keep = order[place < k]  # every query has k entries at least: those found before
    return score[keep].view(n, k), index[keep].view(n, k)


def search_torch(
    queries: Tensor,
    keys: Tensor,
    k: int,
    alive: Tensor | None,
    scale: Tensor | None,
    nearest: bool,
    highest: bool = False,
    offset: int = 0,
    found: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The best k scores, or minus squared distances, (B, k) in float64, and their indices (−1: none).

    ``found`` is what this function returned for earlier keys; ``offset`` is the index of the first of these.

    A chunk of keys at a time: products in float32 differ from the exact ones by at most γ‖q‖‖k‖, γ =
    (d + 8)·2⁻²⁴ with room for the other roundings, and squared distances formed from them by at most
    γ(‖q‖ + ‖k‖)². What could be among the best k by that bound is computed again in float64.
    """
    n, d = queries.shape
    values, indices = found or nothing_found(queries, k)
    if n == 0:
        return values, indices
    queries = queries.detach().float()
    keys = keys.detach()
    gamma = 1.05 * (d + 8) * 2.0**-24
    vanished = math.sqrt(d) * 2.0**-62  # the norm of a row whose squares are too small for float32
    norm_q = torch.linalg.vector_norm(queries, dim=1)[:, None]
    step = max(128, (1 << 22) // max(n, d, 1))
    for start in range(0, keys.shape[0], step):
        rows = keys[start : start + step].float()
        if scale is not None:
            rows = rows * scale[start : start + step, None]
        with backend.full_float32():
            product = queries @ rows.T
        norm_k = torch.linalg.vector_norm(rows, dim=1)[None]
        if nearest:
            value = 2 * product - norm_k.square() - norm_q.square()
            slack = gamma * (norm_q + norm_k).square()
        else:
            value = product
            slack = gamma * ((norm_q + vanished) * (norm_k + vanished))
        slack = slack + d * 2.0**-120  # products too small for float32
        upper = (value + slack).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
        lower = (value - slack).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        if alive is not None:
            dead = ~alive[start : start + step]
            upper = upper.masked_fill(dead, -math.inf)
            lower = lower.masked_fill(dead, -math.inf)
        bar = values[:, -1]
        if k <= lower.shape[1]:
            last = lower.amax(1) if k == 1 else lower.topk(k, dim=1).values[:, -1]
            bar = torch.maximum(bar, last.double())
        b, j = ((upper >= bar[:, None]) & (upper > -math.inf)).nonzero(as_tuple=True)
        if len(b):
            j = j + start
            exact = exact_values(queries, keys, scale, b, j, nearest)
            values, indices = merge(values, indices, b, exact, j + offset, highest)
    return values, indices


def covering(values: Tensor, indices: Tensor, radius: Tensor | None) -> tuple[Tensor, Tensor]:
    """Index and distance of :func:`nearest_key` from the best value of each query."""
    distance, index = (-values[:, 0]).sqrt().float(), indices[:, 0]
    covered = distance < math.inf
    if radius is not None and radius.shape[0]:
        covered &= distance <= radius[index.clamp(min=0)]
    return torch.where(covered, index, -1), distance


def beating(values: Tensor, indices: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices and scores of :func:`max_inner_product` from the best values of each query."""
    scores = values.float()
    beaten = scores > (-math.inf if threshold is None else threshold[:, None])
    return torch.where(beaten, indices, -1), torch.where(beaten, scores, -math.inf)


def _nearest_torch(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return covering(*search_torch(queries, keys, 1, alive, scale, nearest=True), radius)


def _product_torch(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> tuple[Tensor, Tensor]:
    found = search_torch(queries, keys, k, alive, scale, nearest=False, highest=ties == "highest")
    return beating(*found, threshold)


# ---- compiled -------------------------------------------------------------------------------------------


def _keys_by_rows(op: str, keys: Tensor) -> Tensor:
    """Keys whose rows are adjacent elements; says once if that takes a copy."""
    if keys.shape[1] <= 1 or keys.stride(1) == 1 or keys.numel() == 0:
        return keys.detach()
    check.once(
        logging.WARNING,
        f"{op}: keys of shape {tuple(keys.shape)} and strides {keys.stride()} are copied; a contiguous last "
        "dimension avoids it",
    )
    return keys.detach().contiguous()


def _nearest_compiled(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    queries = queries.detach().float().contiguous()
    keys = _keys_by_rows("nearest_key", keys)
    index, distance = _nearest_fake(queries)
    module = backend.compiled()
    module.nearest_key(queries, keys, index, distance, radius=radius, alive=alive, scale=scale)
    return index, distance


def _product_compiled(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> tuple[Tensor, Tensor]:
    queries = queries.detach().float().contiguous()
    keys = _keys_by_rows("max_inner_product", keys)
    indices, scores = _product_fake(queries, keys, threshold, k)
    module = backend.compiled()
    module.max_inner_product(
        queries,
        keys,
        indices,
        scores,
        threshold=threshold,
        alive=alive,
        scale=scale,
        highest=ties == "highest",
    )
    return indices, scores


# ---- Triton ---------------------------------------------------------------------------------------------


def _nearest_triton(
    queries: Tensor,
    keys: Tensor,
    radius: Tensor | None = None,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..kernels.retrieval import nearest_key_triton

    return nearest_key_triton(queries, keys, radius, alive, scale)


def _product_triton(
    queries: Tensor,
    keys: Tensor,
    threshold: Tensor | None = None,
    k: int = 1,
    alive: Tensor | None = None,
    scale: Tensor | None = None,
    ties: str = "lowest",
) -> tuple[Tensor, Tensor]:
    from ..kernels.retrieval import max_inner_product_triton

    return max_inner_product_triton(queries, keys, threshold, k, alive, scale, ties)


for _name, _torch, _compiled, _triton in (
    ("nearest_key", _nearest_torch, _nearest_compiled, _nearest_triton),
    ("max_inner_product", _product_torch, _product_compiled, _product_triton),
):
    backend.provide(_name, "cpp", _compiled, symbol=_name, key=1, device="cpu", speed=3.0)
    backend.provide(_name, "cuda", _compiled, symbol=_name, key=1, device="cuda", speed=3.0)
    backend.provide(_name, "triton", _triton, key=1, device="cuda", speed=2.0)
    backend.provide(_name, "torch", _torch)
