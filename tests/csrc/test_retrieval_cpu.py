"""fastedit._C's searches on the CPU, each instruction set that the machine has, with and without codes."""

from __future__ import annotations

import math

import pytest
import torch

from fastedit.ops import max_inner_product_reference, nearest_key_reference

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
INF = math.inf
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i8": torch.int8}
# queries around widths (1, 2, 4, 8) and rows (3), keys around blocks (16) and tiles (48), d around 4, 32 and 64
SHAPES = [
    (1, 1, 1),
    (1, 15, 3),
    (2, 17, 4),
    (3, 47, 63),
    (4, 49, 65),
    (5, 97, 31),
    (8, 100, 130),
    (9, 16, 128),
    (23, 33, 7),
    (1, 2000, 40),
    (6, 2000, 40),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def empty_codes(n: int, d: int, rest: torch.Tensor | None = None) -> tuple:
    data = torch.full(((n + 15) // 16, 64 * ((d + 3) // 4)), 77, dtype=torch.uint8)
    return data, torch.full((n,), math.nan), torch.full((n,), math.nan), torch.full((n,), math.nan), rest


def start(n_queries: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n_queries, k), -INF, dtype=torch.float64), torch.full((n_queries, k), -1)


def data_of(n_queries: int, n: int, d: int, dtype: torch.dtype):
    torch.manual_seed(n + d)
    queries = torch.randn(n_queries, d)
    keys = torch.randn(n, d)
    if n > 10:
        keys[n // 2] = keys[3]
    scale = torch.rand(n) - 0.3 if dtype == torch.int8 else None
    return queries, (20 * keys if scale is not None else keys).to(dtype), scale, torch.rand(n) > 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(isa, shape, dtype):
    n_queries, n, d = shape
    queries, keys, scale, alive = data_of(n_queries, n, d, DTYPES[dtype])
    index, distance = torch.empty(n_queries, dtype=torch.int64), torch.full((n_queries,), math.nan)
    radius = torch.rand(n) * 2 * d**0.5
    _C.nearest_key(queries, keys, index, distance, radius=radius, alive=alive, scale=scale, isa=isa)
    expected = nearest_key_reference(queries, keys, radius, alive, scale=scale)
    assert index.tolist() == expected[0].tolist()
    torch.testing.assert_close(distance, expected[1], rtol=2e-7, atol=0)
    for k, highest in ((1, False), (4, True)):
        indices, scores = torch.empty(n_queries, k, dtype=torch.int64), torch.empty(n_queries, k)
        threshold = torch.randn(n_queries)
        given = {"threshold": threshold, "alive": alive, "scale": scale, "highest": highest, "isa": isa}
        _C.max_inner_product(queries, keys, indices, scores, **given)
        ties = "highest" if highest else "lowest"
        expected = max_inner_product_reference(queries, keys, threshold, k, alive, scale=scale, ties=ties)
        assert indices.tolist() == expected[0].tolist()
        torch.testing.assert_close(scores, expected[1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("nearest", [False, True], ids=["product", "nearest"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_codes_change_no_result(isa, shape, nearest):
    n_queries, n, d = shape
    queries, keys, _, alive = data_of(n_queries, n, d, torch.float32)
    codes = empty_codes(n, d)
    _C.encode_keys(keys[: n // 3], (codes[0], *(c[: n // 3] for c in codes[1:4]), None), 0, isa=isa)
    _C.encode_keys(keys[n // 3 :], codes, n // 3, isa=isa)
    with_codes, without = start(n_queries, 3), start(n_queries, 3)
    _C.search_keys(queries, keys, *with_codes, nearest=nearest, alive=alive, codes=codes, isa=isa)
    _C.search_keys(queries, keys, *without, nearest=nearest, alive=alive, isa=isa)
    assert torch.equal(with_codes[0], without[0])
    assert torch.equal(with_codes[1], without[1])


@pytest.mark.parametrize("nearest", [False, True], ids=["product", "nearest"])
@pytest.mark.parametrize("n_queries", [1, 3, 11])
def test_codes_of_a_projection_change_no_result(isa, n_queries, nearest):
    queries, keys, _, _ = data_of(n_queries, 300, 50, torch.float32)
    m = 9
    rest = keys[:, m:].norm(dim=1) * (1 + 1e-5)
    codes = empty_codes(300, m, rest)
    _C.encode_keys(keys[:, :m].contiguous(), (*codes[:4], None), isa=isa)
    codes[3].copy_(keys.norm(dim=1) * (1 + 1e-6))
    given = {"scan_queries": queries[:, :m].contiguous(), "rest": queries[:, m:].norm(dim=1) * (1 + 1e-5)}
    with_codes, without = start(n_queries, 2), start(n_queries, 2)
    _C.search_keys(queries, keys, *with_codes, nearest=nearest, codes=codes, isa=isa, **given)
    _C.search_keys(queries, keys, *without, nearest=nearest, isa=isa)
    assert torch.equal(with_codes[0], without[0])
    assert torch.equal(with_codes[1], without[1])


@pytest.mark.parametrize("size", [1e-40, 1e-31, 1e-18, 1.0, 1e18, 3e37])
def test_codes_and_their_errors(isa, size):
    """|k − step (byte − 128)| is at most ``error``, |k| at most ``norm``, neither much less."""
    torch.manual_seed(0)
    n, d = 19, 70
    keys = torch.randn(n, d) * size
    keys[4] = 0
    codes = empty_codes(n, d)
    _C.encode_keys(keys, codes, isa=isa)
    data, step, error, norm, _ = codes
    bytes_ = data.view(2, 18, 16, 4).transpose(1, 2).reshape(32, 72)[:n, :d]
    left = (keys.double() - step.double()[:, None] * (bytes_.double() - 128)).norm(dim=1)
    assert (error.double() >= left).all()
    assert (norm.double() >= keys.double().norm(dim=1)).all()
    assert (data.view(2, 18, 16, 4)[1, :, 3:] == 77).all()  # beyond the last key nothing is written
    if 1e-10 < size < 1e10:
        assert (norm.double() <= keys.double().norm(dim=1) * (1 + 1e-4) + 1e-16).all()
        assert (error.double() <= left * (1 + 1e-4) + 1e-6 * norm + 1e-16).all()


def test_searching_in_parts_is_searching_the_whole(isa):
    queries, keys, _, alive = data_of(5, 500, 33, torch.bfloat16)
    for highest in (False, True):
        whole, parts = start(5, 6), start(5, 6)
        _C.search_keys(queries, keys, *whole, nearest=False, highest=highest, alive=alive, isa=isa)
        for first in range(0, 500, 123):
            part = slice(first, first + 123)
            given = {"highest": highest, "offset": first, "alive": alive[part], "isa": isa}
            _C.search_keys(queries, keys[part], *parts, nearest=False, **given)
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("n_queries", [1, 20])
def test_same_bits_for_any_number_of_threads(isa, n_queries):
    queries, keys, _, _ = data_of(n_queries, 3000, 100, torch.float32)
    keys[2500] = keys[100]
    codes = empty_codes(3000, 100)
    _C.encode_keys(keys, codes, isa=isa)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            for given in (codes, None):
                found = start(n_queries, 3)
                _C.search_keys(queries, keys, *found, nearest=False, codes=given, isa=isa)
                results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("n_queries", [1, 4])
def test_dimensions_whose_sums_of_bytes_would_overflow(isa, n_queries):
    keys = torch.full((3, 70_000), 127, dtype=torch.int8)
    keys[1] = -128
    queries = -torch.ones(n_queries, 70_000)
    indices, scores = torch.empty(n_queries, 1, dtype=torch.int64), torch.empty(n_queries, 1)
    _C.max_inner_product(queries, keys, indices, scores, isa=isa)
    assert indices.tolist() == [[1]] * n_queries
    assert scores.tolist() == [[128.0 * 70_000]] * n_queries


def test_the_largest_sums_of_bytes_fit(isa):
    keys = torch.full((3, 65_536), -1.0)
    keys[2] = 1
    codes = empty_codes(3, 65_536)
    _C.encode_keys(keys, codes, isa=isa)
    found = start(2, 3)
    _C.search_keys(torch.ones(2, 65_536), keys, *found, nearest=False, codes=codes, isa=isa)
    assert found[1].tolist() == [[2, 0, 1]] * 2
    assert found[0].tolist() == [[65_536.0, -65_536.0, -65_536.0]] * 2


def test_arguments_that_would_leave_memory_are_refused():
    queries, keys = torch.ones(2, 4), torch.ones(3, 4)
    index, distance = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(ValueError, match=r"keys: shape \(3, 4\) expected, got \(3, 5\)"):
        _C.nearest_key(queries, torch.ones(3, 5), index, distance)
    with pytest.raises(TypeError, match="queries: float32 expected, got float64"):
        _C.nearest_key(queries.double(), keys, index, distance)
    with pytest.raises(ValueError, match="keys: last dimension must be contiguous"):
        _C.nearest_key(queries, torch.ones(4, 3).T, index, distance)
    with pytest.raises(ValueError, match="index: one row for each query expected"):
        _C.nearest_key(queries, keys, index[:1], distance)
    with pytest.raises(ValueError, match="distance: must be contiguous"):
        _C.nearest_key(queries, keys, index, torch.zeros(2, 2)[:, 0])
    with pytest.raises(ValueError, match=r"radius: shape \(3,\) expected, got \(2,\)"):
        _C.nearest_key(queries, keys, index, distance, radius=distance)
    with pytest.raises(ValueError, match="scale: belongs to int8 keys"):
        _C.nearest_key(queries, keys, index, distance, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"indices, scores: shape \(B, k\) expected"):
        _C.max_inner_product(queries, keys, index, distance)
    codes, found = empty_codes(3, 4), start(2, 1)
    with pytest.raises(ValueError, match=r"codes: contiguous blocks \(1, 64\) expected"):
        _C.search_keys(queries, keys, *found, nearest=True, codes=(codes[0][:, :32], *codes[1:]))
    with pytest.raises(ValueError, match=r"step: shape \(3,\) expected, got \(2,\)"):
        _C.search_keys(queries, keys, *found, nearest=True, codes=(codes[0], codes[1][:2], *codes[2:]))
    with pytest.raises(ValueError, match="step, error, norm: must be given"):
        _C.search_keys(queries, keys, *found, nearest=True, codes=(codes[0], None, *codes[2:]))
    with pytest.raises(ValueError, match="scan_queries: needs rest and codes"):
        _C.search_keys(queries, keys, *found, nearest=True, scan_queries=queries)
    with pytest.raises(ValueError, match="rest: of keys and queries go together"):
        _C.search_keys(queries, keys, *found, nearest=True, codes=(*codes[:4], torch.ones(3)))
    with pytest.raises(ValueError, match="codes: contiguous blocks"):
        _C.encode_keys(torch.ones(40, 4), (codes[0], *(torch.ones(40) for _ in range(3)), None))
    with pytest.raises(ValueError, match="first: must not be negative"):
        _C.encode_keys(keys, codes, -1)


def test_attributes_serve_where_dlpack_exchange_does_not():
    queries, keys = torch.randn(2, 9)[:, 2:7].contiguous(), torch.randn(6, 9)[:, 2:7]
    found = [(torch.empty(2, dtype=torch.int64), torch.empty(2)) for _ in range(2)]
    for out, use_dlpack in zip(found, (True, False), strict=True):
        _C.nearest_key(queries, keys, *out, use_dlpack=use_dlpack)
    assert torch.equal(found[0][0], found[1][0])
