"""``nearest_key`` and ``max_inner_product`` on every backend against the float64 reference: the same indices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops import (
    backend,
    max_inner_product,
    max_inner_product_reference,
    nearest_key,
    nearest_key_reference,
)
from fastedit.testing.retrieval import check_nearest, check_product, normal, same

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
INF, NAN = math.inf, math.nan
DTYPES = [FP32, BF16, FP16, INT8]


@pytest.mark.parametrize("n_queries", [1, 5])
def test_of_equal_keys_one_is_chosen_by_its_index(served_by, device, n_queries):
    rows = normal(1, 70, device=device).expand(37, 70).contiguous()
    queries = normal(n_queries, 70, device=device, seed=1)
    assert nearest_key(queries, rows)[0].tolist() == [0] * n_queries
    for ties, expected in (("lowest", [0, 1, 2]), ("highest", [36, 35, 34])):
        assert max_inner_product(queries, rows, k=3, ties=ties)[0].tolist() == [expected] * n_queries
    alive = torch.ones(37, dtype=torch.bool, device=device)
    alive[[0, 36]] = False
    assert nearest_key(queries, rows, None, alive)[0].tolist() == [1] * n_queries
    for ties, expected in (("lowest", [1, 2]), ("highest", [35, 34])):
        assert (
            max_inner_product(queries, rows, None, 2, alive, ties=ties)[0].tolist() == [expected] * n_queries
        )


def test_only_the_nearest_key_may_cover(served_by, device):
    keys = torch.tensor([[0.0, 0.0], [3.0, 0.0]], device=device)
    queries = torch.tensor([[1.0, 0.0]], device=device)
    index, distance = check_nearest(nearest_key, queries, keys, torch.tensor([0.5, 100.0], device=device))
    assert index.tolist() == [-1]
    assert distance.tolist() == [1.0]


def test_a_returned_distance_covers_as_a_radius_and_a_returned_score_is_not_beaten(served_by, device):
    queries, keys = normal(40, 33, device=device, seed=4), normal(60, 33, device=device)
    index, distance = nearest_key(queries, keys)
    radius = torch.zeros(60, device=device)
    for j, d in zip(index.tolist(), distance.tolist(), strict=True):
        radius[j] = max(radius[j].item(), d)
    assert nearest_key(queries, keys, radius)[0].tolist() == index.tolist()
    scores = max_inner_product(queries, keys)[1][:, 0]
    assert (max_inner_product(queries, keys, scores)[0] == -1).all()
    below = torch.nextafter(scores, torch.tensor(-INF, device=device))
    assert (max_inner_product(queries, keys, below)[0] >= 0).all()


def test_norms_whose_squares_nearly_vanish(served_by, device):
    """The nearer key is the farther one from the origin: what a bound adds to norms must not decide."""
    queries, keys = torch.zeros(3, 24, device=device), torch.zeros(2, 24, device=device)
    queries[:, 0] = 5e-15
    keys[:, 0] = torch.tensor([3.999e-15, 6e-15])
    for part in (queries[:1], queries):
        assert nearest_key(part, keys)[0].tolist() == [1] * len(part)


def test_workspaces_do_not_depend_on_the_default_dtype(served_by, device):
    queries, keys = normal(5, 40, device=device, seed=1), normal(80, 40, device=device)
    expected = [*nearest_key(queries, keys), *max_inner_product(queries, keys, k=2)]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(BF16)
        found = [*nearest_key(queries, keys), *max_inner_product(queries, keys, k=2)]
    finally:
        torch.set_default_dtype(default)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_run_gives_the_same_bits(served_by, device):
    queries, keys = normal(9, 40, device=device, seed=1), normal(80, 40, dtype=BF16, device=device)
    first, second = (max_inner_product(queries, keys, k=4) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    first, second = (nearest_key(queries, keys) for _ in range(2))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("k", [1, 4])
def test_many_keys(k):
    """The automatic choice of this machine, over several tiles."""
    keys = normal(9000, 24)
    keys[8000] = keys[1]
    for n_queries in (1, 33):
        queries = normal(n_queries, 24, seed=7)
        check_nearest(nearest_key, queries, keys)
        for ties in ("lowest", "highest"):
            check_product(max_inner_product, queries, keys, k=k, ties=ties)


def test_inputs_that_need_gradients():
    queries, keys = normal(2, 5).requires_grad_(), torch.nn.Parameter(normal(6, 5))
    for name in ("torch", None):
        if name is None:
            out = [*nearest_key(queries, keys), *max_inner_product(queries, keys)]
        else:
            with backend.use_backend(name):
                out = [*nearest_key(queries, keys), *max_inner_product(queries, keys)]
        assert not any(t.requires_grad for t in out)


# ---- on a GPU -------------------------------------------------------------------------------------------


def gpu_backend(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return backend.use_backend(name)


GPU = pytest.mark.parametrize("name", ["torch", "triton", "cuda"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(
    ("n_queries", "n_keys", "d"), [(1, 100_000, 1024), (64, 50_001, 1023), (700, 3000, 4096)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_real_sizes(name, n_queries, n_keys, d, dtype):
    queries, keys = normal(n_queries, d, device="cuda", seed=1), normal(n_keys, d, dtype=dtype, device="cuda")
    keys[-1] = keys[0]
    with gpu_backend(name):
        found = nearest_key(queries, keys)
        products = max_inner_product(queries, keys, k=4)
    few = slice(0, 8)
    same([t[few] for t in found], [t.cpu() for t in nearest_key_reference(queries[few], keys)])
    same([t[few] for t in products], [t.cpu() for t in max_inner_product_reference(queries[few], keys, k=4)])


@pytest.mark.gpu
@GPU
def test_keys_of_more_than_2_31_elements(name):
    n, d = (1 << 31) // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 4 * n * d:
        pytest.skip("needs 9 GB of free GPU memory")
    keys = torch.zeros(n, d, dtype=INT8, device="cuda")
    keys[n - 2, 7] = 5
    queries = torch.zeros(2, d, device="cuda")
    queries[:, 7] = 5
    with gpu_backend(name):
        assert nearest_key(queries, keys)[0].tolist() == [n - 2] * 2
        assert max_inner_product(queries, keys)[0].tolist() == [[n - 2]] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_cuda_graph_and_another_stream(name):
    queries, keys = normal(5, 64, device="cuda", seed=1), normal(900, 64, device="cuda")
    stream = torch.cuda.Stream()
    with gpu_backend(name):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = nearest_key(queries, keys), max_inner_product(queries, keys, k=2)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nearest_key(queries, keys), max_inner_product(queries, keys, k=2)
        queries.copy_(normal(5, 64, device="cuda", seed=2))
        graph.replay()
        torch.cuda.synchronize()
    same(captured[0], nearest_key_reference(queries.cpu(), keys.cpu()))
    same(captured[1], max_inner_product_reference(queries.cpu(), keys.cpu(), k=2))
    queries = normal(5, 64, seed=1)
    same(first[0], nearest_key_reference(queries, keys.cpu()))


# ---- what is refused ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    q, keys = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=r"nearest_key: keys must have shape \(..., 4\) to fit queries, got \(3, 5\)"
    ):
        nearest_key(q, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"nearest_key: queries must have 2 dimensions, got shape \(4,\)"):
        nearest_key(q[0], keys)
    with pytest.raises(ValueError, match=r"radius must have shape \(3,\) like the rows of keys, got \(2,\)"):
        nearest_key(q, keys, torch.ones(2))
    with pytest.raises(ValueError, match=r"alive must have shape \(3,\) like the rows of keys, got \(1,\)"):
        nearest_key(q, keys, None, torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match="nearest_key: alive must be bool, got float32"):
        nearest_key(q, keys, None, torch.ones(3))
    with pytest.raises(TypeError, match="nearest_key: keys must be .* or int8, got float64"):
        nearest_key(q, keys.double())
    with pytest.raises(TypeError, match="queries must be float32, bfloat16 or float16, got int64"):
        nearest_key(q.long(), keys)
    with pytest.raises(ValueError, match="scale belongs to int8 keys, got float32 keys"):
        nearest_key(q, keys, scale=torch.ones(3))
    with pytest.raises(TypeError, match="nearest_key: keys must be a tensor, got list"):
        nearest_key(q, [1.0])
    with pytest.raises(
        ValueError, match=r"threshold must have shape \(2,\) like the rows of queries, got \(3,\)"
    ):
        max_inner_product(q, keys, torch.ones(3))
    with pytest.raises(TypeError, match="threshold must be float32, got float64"):
        max_inner_product(q, keys, torch.ones(2, dtype=torch.float64))
    for k in (0, 65):
        with pytest.raises(ValueError, match=f"max_inner_product: k must be from 1 to 64, got {k}"):
            max_inner_product(q, keys, k=k)
    with pytest.raises(ValueError, match="ties must be 'lowest' or 'highest', got 'first'"):
        max_inner_product(q, keys, ties="first")
    with pytest.raises(ValueError, match="keys must be on cpu like queries, got meta"):
        max_inner_product(q, keys.to("meta"))


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    q, keys, alive = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, dtype=torch.bool)
    with backend.use_backend("torch"):
        torch.library.opcheck(torch.ops.fastedit.nearest_key.default, (q, keys, torch.ones(3), alive))
        torch.library.opcheck(
            torch.ops.fastedit.max_inner_product.default, (q, keys, torch.ones(2), 2, alive)
        )
        torch.library.opcheck(
            torch.ops.fastedit.max_inner_product.default,
            (q, keys.to(INT8), None, 1, None, torch.ones(3), "highest"),
        )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(queries, keys, radius):
        index, distance = nearest_key(2 * queries, keys, radius)
        indices, scores = max_inner_product(queries, keys, distance, k=2)
        return index + 1, scores.sum(1), indices

    queries, keys, radius = normal(3, 6, seed=1), normal(10, 6), torch.full((10,), 3.0)
    index, distance = nearest_key_reference(2 * queries, keys, radius)
    indices, scores = max_inner_product_reference(queries, keys, distance, k=2)
    for name in ("torch", None):
        if name is None:
            out = step(queries, keys, radius)
        else:
            with backend.use_backend(name):
                out = step(queries, keys, radius)
        assert torch.equal(out[0], index + 1)
        assert torch.equal(out[2], indices)
        torch.testing.assert_close(out[1], scores.sum(1))


def test_fake_tensors_are_checked_and_not_computed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, keys = torch.zeros(2, 4), torch.zeros(3, 4)
        index, distance = nearest_key(q, keys)
        assert (index.shape, index.dtype, distance.dtype) == ((2,), torch.int64, torch.float32)
        indices, scores = max_inner_product(q, keys, k=3)
        assert (indices.shape, scores.shape) == ((2, 3), (2, 3))
        with pytest.raises(ValueError, match="keys must have shape"):
            nearest_key(q, keys[:, :3])


# ---- properties -----------------------------------------------------------------------------------------


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n_queries=st.integers(0, 9),
    n_keys=st.integers(0, 60),
    d=st.integers(0, 70),
    k=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    whole=st.booleans(),
    dead=st.booleans(),
    ties=st.sampled_from(["lowest", "highest"]),
    seed=st.integers(0, 1000),
)
def test_any_input_agrees_with_the_reference(n_queries, n_keys, d, k, dtype, whole, dead, ties, seed):
    """Small whole numbers make many exact ties."""
    queries, keys = normal(n_queries, d, seed=seed + 1), normal(n_keys, d, seed=seed)
    if whole or dtype == INT8:
        queries, keys = queries.round(), keys.round()
    keys = keys.to(dtype)
    alive = torch.arange(n_keys) % 4 != seed % 4 if dead else None
    for name in ("torch", None):
        if name is None:
            check_nearest(nearest_key, queries, keys, None, alive)
            check_product(max_inner_product, queries, keys, None, k, alive, ties=ties)
        else:
            with backend.use_backend(name):
                check_nearest(nearest_key, queries, keys, None, alive)
                check_product(max_inner_product, queries, keys, None, k, alive, ties=ties)
