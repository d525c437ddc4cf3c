"""Stores of keys: whatever was added, removed and updated, searches find what float64 finds among all keys."""

from __future__ import annotations

import math

import pytest
import torch

import fastedit
from fastedit.ops import (
    FaissIndex,
    KeyIndex,
    backend,
    max_inner_product_reference,
    nearest_key_reference,
)
from fastedit.ops import key_index as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
COMPILED = not isinstance(backend.extension(), str)
needs_compiled = pytest.mark.skipif(not COMPILED, reason="fastedit._C was not built")


def decaying(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.logspace(0, -3, d)


def kept(index):
    """All keys in float64, as the index keeps them."""
    if index.dtype != torch.int8:
        return index.keys().double()
    return torch.cat([c.keys[: c.n].double() * c.scale[: c.n, None].double() for c in index._chunks])


def agrees(index, queries, radius, alive, k=3):
    keys = kept(index)
    found, expected = index.nearest(queries), nearest_key_reference(queries, keys, radius, alive)
    assert found[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(found[1], expected[1], rtol=2e-7, atol=0)
    threshold = torch.zeros(len(queries))
    for ties in ("lowest", "highest"):
        found = index.max_inner_product(queries, threshold, k, ties=ties)
        expected = max_inner_product_reference(queries, keys, threshold, k, alive, ties=ties)
        assert found[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=2e-7, atol=0)
    ids, distances = index.neighbours(queries, k)
    squared = (keys[None] - queries.double()[:, None]).square().sum(-1).masked_fill(~alive, math.inf)
    order = squared.sort(dim=1, stable=True)
    assert ids.tolist() == order.indices[:, :k].tolist()
    torch.testing.assert_close(distances, order.values[:, :k].sqrt().float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("scan", ["auto", "int8", "projected", "keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_add_remove_update_and_snapshot(monkeypatch, dtype, scan):
    monkeypatch.setattr(module, "_FIRST_CAPACITY", 64)
    monkeypatch.setattr(module, "_FIT_AT", 300)
    n, d = 700, 41
    keys, radius = decaying(n, d), torch.linspace(0.1, 3, n)
    alive = torch.ones(n, dtype=torch.bool)
    index = KeyIndex(d, dtype=dtype, scan=scan)
    queries = decaying(6, d, seed=1)
    queries[0] = keys[77]
    ids = [index.add(keys[part], radius[part]) for part in (slice(0, 7), slice(7, 500), slice(500, n))]
    assert torch.equal(torch.cat(ids), torch.arange(n))
    assert len(index) == n
    agrees(index, queries, radius, alive)
    gone = torch.tensor([3, n - 1, 77, 400])
    index.remove(gone)
    alive[gone] = False
    changed = torch.tensor([10, 600, 64])
    index.update(changed, 3 * keys[changed])
    index.update(changed[:2], radius=7.0)
    radius[changed[:2]] = 7
    index.update(changed[2:], keys[changed[2:]], radius[changed[2:]] * 2)
    radius[changed[2:]] *= 2
    assert len(index) == n - 4
    for part in (queries[:1], queries[:3], queries):
        agrees(index, part, radius, alive)
    again = KeyIndex(d, dtype=dtype, scan=scan)
    again.load_state_dict(index.state_dict())
    agrees(again, queries, radius, alive)
    assert torch.equal(again.keys(), index.keys())
    assert again.add(queries, 1.0).tolist() == list(range(n, n + 6))
    index.fit()
    agrees(index, queries, radius, alive)


@needs_compiled
def test_what_is_scanned():
    index = KeyIndex(300)
    index.add(torch.randn(4096, 300, generator=torch.Generator().manual_seed(0)))
    assert index.scanned == "int8"  # nothing to gain from a projection
    index = KeyIndex(300)
    index.add(decaying(4095, 300))
    assert index.scanned == "int8"
    index.add(decaying(1, 300))
    assert index.scanned == "projected"
    assert KeyIndex(3, scan="keys").scanned == "keys"
    assert index.n_bytes >= 4096 * 300 * 4


@pytest.mark.parametrize("scan", ["int8", "projected", "keys"])
def test_keys_that_are_not_finite_or_not_there(scan):
    index = KeyIndex(6, scan=scan)
    queries = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    assert index.nearest(queries)[0].tolist() == [-1] * 4
    assert index.max_inner_product(queries, k=2)[0].tolist() == [[-1, -1]] * 4
    assert index.neighbours(queries, 2)[1].tolist() == [[math.inf] * 2] * 4
    assert index.add(torch.empty(0, 6)).tolist() == []
    keys = torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    keys[3, 2], keys[5, 0], keys[6] = math.nan, math.inf, 0
    index.add(keys, 10.0)
    radius, alive = torch.full((20,), 10.0), torch.ones(20, dtype=torch.bool)
    for part in (queries[:1], queries):
        found, expected = index.nearest(part), nearest_key_reference(part, keys, radius, alive)
        assert found[0].tolist() == expected[0].tolist()
        found, expected = (
            index.max_inner_product(part, None, 20),
            max_inner_product_reference(part, keys, None, 20),
        )
        assert found[0].tolist() == expected[0].tolist()
    assert index.nearest(torch.empty(0, 6))[0].shape == (0,)


def test_every_backend_serves(served_by, device, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_CAPACITY", 32)
    index = KeyIndex(20, device=device)
    keys, queries = decaying(90, 20), decaying(3, 20, seed=1)
    keys[60], queries[0] = keys[10], 3 * keys[10]  # a tie between two chunks
    index.add(keys[:50].to(device), 0.5)
    index.add(keys[50:].to(device), torch.full((40,), 2.0, device=device))
    index.remove(torch.tensor([4]))
    radius = torch.cat((torch.full((50,), 0.5), torch.full((40,), 2.0)))
    alive = torch.arange(90) != 4
    found = [t.cpu() for t in index.nearest(queries.to(device))]
    assert found[0].tolist() == nearest_key_reference(queries, keys, radius, alive)[0].tolist()
    for ties in ("highest", "lowest"):
        found = [t.cpu() for t in index.max_inner_product(queries.to(device), k=3, ties=ties)]
        expected = max_inner_product_reference(queries, keys, None, 3, alive, ties=ties)
        assert found[0].tolist() == expected[0].tolist()
    assert len(index._chunks) == 2


def test_appending_moves_no_key(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_CAPACITY", 8)
    index = KeyIndex(4)
    index.add(torch.ones(5, 4))
    where = index._chunks[0].keys.data_ptr()
    for _ in range(15):
        index.add(torch.ones(2, 4))
    index.add(torch.ones(60, 4))
    assert index._chunks[0].keys.data_ptr() == where
    assert [chunk.capacity for chunk in index._chunks] == [8, 8, 16, 32, 64]


def test_wrong_arguments_are_named():
    index = KeyIndex(4)
    index.add(torch.ones(3, 4))
    with pytest.raises(ValueError, match="KeyIndex: dim must be at least 1, got 0"):
        KeyIndex(0)
    with pytest.raises(TypeError, match="KeyIndex: dtype must be .* got float64"):
        KeyIndex(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="scan must be 'auto'"):
        KeyIndex(4, scan="fast")
    with pytest.raises(
        ValueError, match=r"add: keys must have shape \(..., 4\) to fit the store, got \(3, 5\)"
    ):
        index.add(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"add: radius must have shape \(2,\) like the keys"):
        index.add(torch.ones(2, 4), torch.ones(3))
    assert index.n_added == 3
    with pytest.raises(ValueError, match="ids must be from 0 to 2, got 0 to 3"):
        index.remove(torch.tensor([0, 3]))
    index.remove(torch.tensor([1]))
    with pytest.raises(ValueError, match="id 1 was removed"):
        index.update(torch.tensor([1]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="an id is given twice"):
        index.update(torch.tensor([2, 2]), torch.ones(2, 4))
    with pytest.raises(ValueError, match="update: 1 keys expected, one for each id, got 2"):
        index.update(torch.tensor([2]), torch.ones(2, 4))
    with pytest.raises(ValueError, match="nearest: queries must have shape"):
        index.nearest(torch.ones(2, 3))
    with pytest.raises(ValueError, match="neighbours: k must be from 1 to 64, got 0"):
        index.neighbours(torch.ones(2, 4), 0)
    with pytest.raises(ValueError, match=r"threshold must have shape \(2,\)"):
        index.max_inner_product(torch.ones(2, 4), torch.ones(1))
    with pytest.raises(ValueError, match="load_state_dict: dim must be 5, got 4"):
        KeyIndex(5).load_state_dict(index.state_dict())


# ---- FAISS ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat", "PCA8,Flat"])
def test_faiss_names_candidates_and_fastedit_decides(factory):
    pytest.importorskip("faiss", reason='faiss is not installed (pip install "fastedit-llm[faiss]")')
    n, d = 400, 16
    keys, radius = decaying(n, d), torch.linspace(0.1, 2, n)
    alive = torch.ones(n, dtype=torch.bool)
    index = FaissIndex(d, factory, candidates=64)
    queries = decaying(5, d, seed=1)
    queries[0] = keys[7]
    exact = factory == "Flat"

    def compare():
        if exact:
            agrees(index, queries, radius, alive)
        ids, scores = index.max_inner_product(queries, torch.zeros(5), 2)
        b, place = (ids >= 0).nonzero(as_tuple=True)
        assert alive[ids[b, place]].all()
        products = (queries[b].double() * kept(index)[ids[b, place]]).sum(1).float()
        torch.testing.assert_close(scores[b, place], products)
        assert (scores[b, place] > 0).all()

    index.add(keys[:300], radius[:300])
    radius_all, radius = radius, radius[:300]
    alive = alive[:300]
    compare()
    index.add(keys[300:], radius_all[300:])
    radius, alive = radius_all, torch.ones(n, dtype=torch.bool)
    compare()
    gone = torch.arange(0, n, 3)
    index.remove(gone)
    alive[gone] = False
    compare()
    index.update(torch.tensor([1, 2]), 2 * keys[[1, 2]])
    compare()
    again = FaissIndex(d, factory, candidates=64)
    again.load_state_dict(index.state_dict())
    index = again
    compare()
    assert FaissIndex(d, factory).nearest(queries)[0].tolist() == [-1] * 5


@pytest.mark.parametrize("kind", [KeyIndex, FaissIndex])
def test_removed_keys_can_be_restored(kind):
    if kind is FaissIndex:
        pytest.importorskip("faiss", reason='faiss is not installed (pip install "fastedit-llm[faiss]")')
    index = kind(4)
    index.add(torch.eye(4))
    index.remove(torch.tensor([1, 3]))
    assert index.max_inner_product(torch.eye(4), torch.zeros(4))[0][:, 0].tolist() == [0, -1, 2, -1]
    index.restore(torch.tensor([3]))
    assert index.max_inner_product(torch.eye(4), torch.zeros(4))[0][:, 0].tolist() == [0, -1, 2, 3]
    assert len(index) == 3
    for ids, match in (([1, 3], "id 3 was not removed"), ([4], "from 0 to 3")):
        with pytest.raises(ValueError, match=match):
            index.restore(torch.tensor(ids))
    assert len(index) == 3


def test_absent_faiss_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "fastedit-llm\[faiss\]"'):
        FaissIndex(4)


def test_the_backend_chosen_by_name_serves_or_is_refused():
    index = KeyIndex(4)
    index.add(torch.ones(3, 4))
    with backend.use_backend("cuda"):
        if backend.missing("cuda", torch.device("cuda"), True):
            with pytest.raises(fastedit.BackendUnavailable):
                index.nearest(torch.ones(1, 4))


def test_examples_in_the_documentation_run():
    import doctest
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "ops" / "retrieval.md"
    for failed, _ in (doctest.testfile(str(page), module_relative=False), doctest.testmod(module)):
        assert failed == 0
