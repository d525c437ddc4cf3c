"""``nearest_key`` and ``max_inner_product`` on every backend against the float64 reference: the same indices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit
from fastedit.ops import (
    backend,
    max_inner_product,
    max_inner_product_reference,
    nearest_key,
    nearest_key_reference,
)

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
INF, NAN = math.inf, math.nan
DTYPES = [FP32, BF16, FP16, INT8]
SHAPES = [  # (queries, keys, d, k)
    pytest.param(1, 1, 1, 1, id="one"),
    pytest.param(1, 53, 17, 3, id="one_query"),
    pytest.param(3, 31, 65, 2, id="three_queries"),
    pytest.param(5, 97, 33, 7, id="above_tiles"),
    pytest.param(17, 48, 64, 1, id="many_queries"),
    pytest.param(4, 3, 5, 5, id="fewer_keys_than_k"),
]


def skip_unsupported(op, queries, keys):
    try:
        backend.choose(op, queries, keys)
    except fastedit.BackendUnavailable as reason:
        pytest.skip(str(reason))


def normal(*shape, dtype=FP32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x * 20).to(dtype).to(device) if dtype == INT8 else x.to(dtype).to(device)


def scale_for(keys):
    return None if keys.dtype != INT8 else torch.linspace(-0.3, 1.0, len(keys), device=keys.device)


def on_cpu(*tensors):
    return [t.cpu() if isinstance(t, torch.Tensor) else t for t in tensors]


def same(out, reference):
    index, value = (t.cpu() for t in out)
    assert index.dtype == torch.int64
    assert value.dtype == torch.float32
    assert index.tolist() == reference[0].tolist()
    torch.testing.assert_close(value, reference[1], rtol=2e-7, atol=0, equal_nan=True)


def check_nearest(queries, keys, radius=None, alive=None, scale=None):
    out = nearest_key(queries, keys, radius, alive, scale=scale)
    same(out, nearest_key_reference(*on_cpu(queries, keys, radius, alive), scale=on_cpu(scale)[0]))
    return out


def check_product(queries, keys, threshold=None, k=1, alive=None, scale=None, ties="lowest"):
    out = max_inner_product(queries, keys, threshold, k, alive, scale=scale, ties=ties)
    reference = max_inner_product_reference(
        *on_cpu(queries, keys, threshold, k, alive), scale=on_cpu(scale)[0], ties=ties
    )
    same(out, reference)
    return out


@pytest.mark.parametrize(("n_queries", "n_keys", "d", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_same_as_float64(served_by, device, dtype, n_queries, n_keys, d, k):
    queries, keys = normal(n_queries, d, seed=1, device=device), normal(n_keys, d, dtype=dtype, device=device)
    skip_unsupported("nearest_key", queries, keys)
    scale = scale_for(keys)
    check_nearest(queries, keys, scale=scale)
    assert backend.served("nearest_key") == served_by
    check_product(queries, keys, k=k, scale=scale)
    assert backend.served("max_inner_product") == served_by
    alive = torch.arange(n_keys, device=device) % 3 != 1
    keys[~alive] = 100
    _, nearest = nearest_key(queries, keys, None, alive, scale=scale)
    radius = nearest.median() * torch.linspace(0.5, 2, n_keys, device=device)
    check_nearest(queries, keys, radius, alive, scale)
    threshold = 3 * normal(n_queries, device=device, seed=2)
    check_product(queries, keys, threshold, k, alive, scale, ties="highest")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
def test_queries_in_half_precision(served_by, device, dtype):
    queries, keys = (
        normal(3, 20, dtype=dtype, device=device, seed=3),
        normal(40, 20, dtype=dtype, device=device),
    )
    queries[1] = keys[7]
    index, distance = check_nearest(queries, keys)
    assert index[1] == 7
    assert distance[1] == 0
    check_product(queries, keys, k=2)


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


@pytest.mark.parametrize("n_queries", [1, 4])
def test_small_differences_are_decided_exactly(served_by, device, n_queries):
    """Keys that differ in the last bit of one element: no float32 sum tells them apart."""
    keys = normal(1, 129, device=device).repeat(50, 1)
    keys[31, 64] = torch.nextafter(keys[31, 64], torch.tensor(INF, device=device))
    queries = torch.zeros(n_queries, 129, device=device)
    queries[:] = keys[31]
    queries[:, 64] = 1.0
    check_product(queries, keys, k=2)
    queries[:] = keys[31]
    index, distance = check_nearest(queries, keys)
    assert index.tolist() == [31] * n_queries
    assert distance.tolist() == [0.0] * n_queries


def test_far_from_the_origin_distances_keep_their_precision(served_by, device):
    """Where the expansion by inner products cancels."""
    keys = normal(60, 48, device=device) * 1e-3 + 100
    queries = keys[[5, 59]] + 1e-5
    check_nearest(queries, keys)
    check_nearest(queries.repeat(3, 1), keys)


def test_only_the_nearest_key_may_cover(served_by, device):
    keys = torch.tensor([[0.0, 0.0], [3.0, 0.0]], device=device)
    queries = torch.tensor([[1.0, 0.0]], device=device)
    index, distance = check_nearest(queries, keys, torch.tensor([0.5, 100.0], device=device))
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


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "d"),
    [
        pytest.param(0, 5, 3, id="no_queries"),
        pytest.param(2, 0, 3, id="no_keys"),
        pytest.param(2, 5, 0, id="no_columns"),
        pytest.param(0, 0, 0, id="nothing"),
    ],
)
def test_empty(served_by, device, n_queries, n_keys, d):
    queries, keys = torch.ones(n_queries, d, device=device), torch.ones(n_keys, d, device=device)
    check_nearest(queries, keys, torch.ones(n_keys, device=device))
    check_product(queries, keys, torch.full((n_queries,), -1.0, device=device), k=2)


def test_none_alive(served_by, device):
    queries, keys = normal(2, 8, device=device), normal(9, 8, device=device)
    alive = torch.zeros(9, dtype=torch.bool, device=device)
    index, distance = check_nearest(queries, keys, None, alive)
    assert index.tolist() == [-1, -1]
    assert distance.tolist() == [INF, INF]
    indices, scores = check_product(queries, keys, None, 2, alive)
    assert indices.tolist() == [[-1, -1]] * 2
    assert scores.tolist() == [[-INF, -INF]] * 2


@pytest.mark.parametrize("n_queries", [1, 6])
def test_what_is_not_finite_is_never_found(served_by, device, n_queries):
    keys = normal(40, 24, device=device)
    keys[3, 5], keys[17, 0], keys[20, 23] = NAN, INF, -INF
    queries = normal(n_queries, 24, device=device, seed=5)
    check_nearest(queries, keys)
    check_product(queries, keys, k=40)  # an infinite score is one; NaN is none
    queries[0, 2] = NAN
    index, distance = check_nearest(queries, keys)
    assert index[0] == -1
    assert distance[0] == INF
    check_product(queries, keys, k=3)
    queries[0] = 0
    check_nearest(queries, keys)
    check_product(queries, keys, k=3)
    queries[0, 1] = INF
    check_nearest(queries, keys)
    check_product(queries, keys, k=3)


@pytest.mark.parametrize("n_queries", [1, 6])
@pytest.mark.parametrize(
    "size", [1e-30, 1e-16, 1e17, 1e30], ids=["squares_vanish", "small", "large", "squares_overflow"]
)
def test_sizes_beyond_the_squares_of_float32(served_by, device, n_queries, size):
    keys, queries = size * normal(40, 24, device=device), size * normal(n_queries, 24, device=device, seed=5)
    check_nearest(queries, keys)
    check_product(queries / size, keys, k=3)


def test_views(served_by, device):
    store = normal(60, 50, device=device)
    queries = normal(20, 12, device=device, seed=1)
    flags = torch.arange(120, device=device).reshape(60, 2) % 3 != 0
    radius = torch.full((60, 2), 4.0, device=device)
    views = {
        "columns": (queries[:3], store[:, 5:17], radius[:, 0], flags[:, 1]),
        "every second row": (queries[::4], store[::2, :12], radius[::2, 1], flags[::2, 0]),
        "transposed": (queries[:12, :4].T, store[:12, :].T, None, None),
        "every second column": (queries[:2, ::2], store[:, :12:2], None, flags[:, 0]),
        "one key": (queries, store[0, :12].expand(7, 12), None, None),
    }
    for name, (q, keys, r, alive) in views.items():
        q, keys = q[:, : keys.shape[1]], keys[:, : q.shape[1]]
        try:
            check_nearest(q, keys, r, alive)
            check_product(q, keys, q[:, 0], 2, alive)
        except AssertionError as error:
            raise AssertionError(name) from error


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
        check_nearest(queries, keys)
        for ties in ("lowest", "highest"):
            check_product(queries, keys, k=k, ties=ties)


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
            check_nearest(queries, keys, None, alive)
            check_product(queries, keys, None, k, alive, ties=ties)
        else:
            with backend.use_backend(name):
                check_nearest(queries, keys, None, alive)
                check_product(queries, keys, None, k, alive, ties=ties)
