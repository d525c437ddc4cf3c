"""Nearest keys and greatest inner products: fastedit's searches against torch, FAISS and the look-up of GRACE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import KeyIndex, max_inner_product, nearest_key
from fastedit.ops.retrieval import exact_values

OPS = ("nearest_key", "max_inner_product")
DTYPES = ("float32",)

# (op, queries, keys, d, kind of keys)
FULL = [
    ("max_inner_product", 1, 100_000, 1024, "random"),
    ("max_inner_product", 16, 100_000, 1024, "random"),
    ("max_inner_product", 64, 100_000, 1024, "random"),
    ("max_inner_product", 4096, 4000, 1024, "random"),
    ("max_inner_product", 1, 100_000, 1024, "decaying"),
    ("max_inner_product", 64, 100_000, 1024, "decaying"),
    ("nearest_key", 1, 100_000, 1024, "random"),
    ("nearest_key", 64, 100_000, 1024, "random"),
    ("nearest_key", 1, 100_000, 1024, "decaying"),
    ("nearest_key", 1, 1000, 4096, "random"),
    ("nearest_key", 1, 10_000, 4096, "random"),
    ("nearest_key", 1, 1000, 11_008, "random"),
    ("nearest_key", 1, 10_000, 11_008, "random"),
]
QUICK = [
    ("max_inner_product", 1, 20_000, 512, "random"),
    ("max_inner_product", 64, 20_000, 512, "decaying"),
    ("nearest_key", 1, 20_000, 512, "random"),
]


def vectors(n: int, d: int, kind: str, device: str, seed: int) -> torch.Tensor:
    """Normal vectors; decaying: the i-th coordinate's deviation is 1/i, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "decaying":
        basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
        x = (x / torch.arange(1, d + 1)) @ basis.T
    return x.to(device)


def exact(op: str, queries: torch.Tensor, keys: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """float64 values (scores, or minus squared distances) of the keys found: (B,)."""
    b = torch.arange(len(queries), device=queries.device)
    return exact_values(queries, keys, None, b, found, op == "nearest_key")


# ---- what one would run otherwise -----------------------------------------------------------------------


def torch_product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (queries @ keys.T).max(dim=1).indices


def grace(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The look-up of GRACE's code: cdist from all keys, then the smallest."""
    return torch.cdist(keys, queries, p=2).min(dim=0).indices


def expansion(queries: torch.Tensor, keys: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
    """The fastest of torch: one product with squared norms known beforehand. Cancels for keys close together."""
    return (torch.addmm(half_norms, queries, keys.T, alpha=-1)).min(dim=1).indices


def faiss_search(index: Any, queries: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(index.search(queries.numpy(), 1)[1][:, 0])


def with_faiss(
    op: str, queries: torch.Tensor, keys: torch.Tensor, kind: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """FAISS's exact indices; for decaying spectra also Panorama, its keys and queries rotated into the eigenbasis."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    d = keys.shape[1]
    flat = faiss.IndexFlatL2(d) if op == "nearest_key" else faiss.IndexFlatIP(d)
    flat.add(keys.numpy())
    out = {"FAISS flat": lambda: faiss_search(flat, queries)}
    name = "IndexFlatL2Panorama" if op == "nearest_key" else "IndexFlatIPPanorama"
    if kind == "decaying" and hasattr(faiss, name):
        rotation = torch.linalg.eigh(keys.T @ keys)[1].flip(1)
        panorama = getattr(faiss, name)(d, 16, 512)
        panorama.add((keys @ rotation).numpy())
        out["FAISS Panorama"] = lambda: faiss_search(panorama, queries @ rotation)
    return out


# ---- problems -------------------------------------------------------------------------------------------


def problem(device: str, op: str, n_queries: int, n: int, d: int, kind: str) -> common.Problem:
    keys, queries = vectors(n, d, kind, device, 1), vectors(n_queries, d, kind, device, 2)
    call: Callable[..., Any] = nearest_key if op == "nearest_key" else max_inner_product
    can, cannot = common.ours(op, device, queries, keys)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        common.OURS + name: common.by_backend(name, lambda: call(queries, keys)[0].view(-1)) for name in can
    }
    if device == "cpu" and "cpp" in can:
        index = KeyIndex(d)
        index.add(keys)
        search: Callable[..., Any] = index.nearest if op == "nearest_key" else index.max_inner_product
        runs[f"{common.OURS}cpp KeyIndex ({index.scanned})"] = lambda: search(queries)[0].view(-1)
    if op == "nearest_key":
        half_norms = keys.square().sum(1) / 2
        runs["torch cdist (GRACE)"] = lambda: grace(queries, keys)
        runs["torch addmm with norms kept"] = lambda: expansion(queries, keys, half_norms)
    else:
        runs["torch matmul and max"] = lambda: torch_product(queries, keys)
    if device == "cpu":
        runs |= with_faiss(op, queries, keys, kind)
    # the reference: the best of what anybody found, as float64 sees it; ours are exact, so none may do better
    values = {name: exact(op, queries, keys, run()) for name, run in runs.items()}
    best = torch.stack(list(values.values())).amax(0)
    errors = {
        name: ((best - value) / best.abs().clamp(min=1e-30)).max().item() for name, value in values.items()
    }
    for name, error in errors.items():
        if error > (0 if name.startswith(common.OURS) else 1e-4):
            raise SystemExit(
                f"{name} is wrong for {op} {n_queries}x{n}x{d} {kind}: relative error {error:.2g}"
            )
    n_bytes = 4 * d * (n + n_queries) + 12 * n_queries
    shape = f"{n_queries}x{n}x{d} {kind}"
    return common.Problem(
        op, shape, "float32", runs, errors, n_bytes, 2 * math.prod((n_queries, n, d)), cannot
    )


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for op, n_queries, n, d, kind in QUICK if quick else FULL:
        yield problem(device, op, n_queries, n, d, kind)


if __name__ == "__main__":
    common.main("retrieval")
