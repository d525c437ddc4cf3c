"""fastedit._C.neuron_select, neuron_scores and gather_square on the CPU, each instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from fastedit.ops import neuron_scores_reference, neuron_select_reference

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
    pytest.param(torch.float64, id="f64"),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def _outputs(n_rows: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs full of what must be overwritten."""
    return (
        torch.ones(n_rows, d, dtype=torch.uint8).view(torch.bool),
        torch.full((n_rows, d), 77, dtype=torch.int32),
        torch.full((n_rows,), 77, dtype=torch.int32),
    )


def _select(scores: torch.Tensor, mass: float, rule: str, isa: str) -> tuple[torch.Tensor, ...]:
    out = _outputs(*scores.shape)
    _C.neuron_select(scores, mass, rule == "prefix", *out, isa=isa)
    return out


def _check(scores: torch.Tensor, mass: float, rule: str, isa: str) -> None:
    out, reference = _select(scores, mass, rule, isa), neuron_select_reference(scores, mass, rule)
    for got, expected in zip(out, reference, strict=True):
        assert torch.equal(got, expected), (tuple(scores.shape), mass, rule)


# around vectors (8, 16) and the length from which bounds are guessed (4096)
@pytest.mark.parametrize("d", [1, 7, 8, 15, 16, 17, 33, 100, 4095, 4096, 6401])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa, dtype, d):
    generator = torch.Generator().manual_seed(d)
    normal = torch.randn(2, d, generator=generator)
    for scores in (normal.abs(), (3 * normal).exp().clamp(max=6e4), (2 * normal).round().abs()):
        for mass in (1e-6, 0.5, 0.8, 0.999):
            for rule in ("at_least", "prefix"):
                _check(scores.to(dtype), mass, rule, isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_wrong_guesses_of_the_bounds_cost_time_only(isa, dtype):
    """Rows whose sample (runs of 16 at even distances) knows nothing of the others, in either direction."""
    d = 8192
    sampled = torch.zeros(d, dtype=torch.bool)
    for r in range(64):
        start = (d - 16) * r // 63
        sampled[start : start + 16] = True
    noise = torch.rand(d, generator=torch.Generator().manual_seed(0)) + 0.5
    for inside, outside in ((1e-6, 1.0), (1.0, 1e-4), (0.0, 1.0), (1.0, 0.0), (1e-30, 1.0)):
        scores = (noise * torch.where(sampled, inside, outside)).to(dtype)[None]
        for mass in (0.05, 0.5, 0.95):
            for rule in ("at_least", "prefix"):
                _check(scores, mass, rule, isa)


def test_all_equal_and_one_large(isa):
    for scores in (
        torch.full((1, 5000), 0.3),
        torch.cat([torch.full((1, 5000), 1e-3), torch.full((1, 1), 1e9)], 1),
    ):
        for mass in (0.1, 0.8, 1 - 2.0**-53):
            for rule in ("at_least", "prefix"):
                _check(scores, mass, rule, isa)


@pytest.mark.parametrize("d", [5, 40, 5000])
def test_invalid_rows(isa, d):
    scores = torch.rand(4, d)
    for i, value in enumerate((float("nan"), float("inf"), -1e-30)):
        for place in (0, d // 2, d - 1):
            bad = scores.clone()
            bad[i, place] = value
            _check(bad, 0.5, "at_least", isa)
            _check(bad, 1.0, "prefix", isa)
    scores[3, d - 1] = -0.0
    _check(scores, 1.0, "at_least", isa)


def test_outputs_end_where_they_end(isa):
    """Guards around outputs whose rows are no multiple of a vector."""
    for d in (1, 15, 17, 31, 100):
        scores = torch.rand(3, d)
        mask, indices = (
            torch.full((3 * d + 64,), 7, dtype=torch.uint8),
            torch.full((3 * d + 64,), 77, dtype=torch.int32),
        )
        counts = torch.empty(3, dtype=torch.int32)
        inner = slice(32, 32 + 3 * d)
        _C.neuron_select(
            scores,
            0.9,
            False,
            mask[inner].view(torch.bool).view(3, d),
            indices[inner].view(3, d),
            counts,
            isa=isa,
        )
        assert (mask[:32] == 7).all()
        assert (mask[32 + 3 * d :] == 7).all()
        assert (indices[:32] == 77).all()
        assert (indices[32 + 3 * d :] == 77).all()
        assert set(mask[inner].tolist()) <= {0, 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(isa, dtype):
    store = torch.rand(40, 300).to(dtype)
    for scores in (store[::2, 3:90], store.T, store[:, ::3]):
        _check(scores, 0.7, "at_least", isa)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_any_number_of_threads(isa, n_threads):
    scores, keys = torch.rand(9, 5000), torch.randn(3000, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        _check(scores, 0.8, "prefix", isa)
        out = torch.full((3000,), 7.0, dtype=torch.float64)
        _C.neuron_scores(keys, out, isa=isa)
        assert torch.equal(out, neuron_scores_reference(keys))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (65, 33), (2100, 5)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_scores(isa, shape, dtype):
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(4).exp().neg().to(dtype)
    for view in (keys, keys.T.contiguous().T, keys[::2, ::3]):
        out = torch.full((view.shape[0],), float("nan"), dtype=torch.float64)
        _C.neuron_scores(view, out, isa=isa)
        assert torch.equal(out, neuron_scores_reference(view))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 63, 64, 65, 200, 333])
def test_square(isa, d, dtype):
    matrix = torch.randn(d, d + 5).to(dtype)[:, :d]
    generator = torch.Generator().manual_seed(d)
    for share in (0.05, 0.2, 0.6, 1.0):
        picked = torch.nonzero(torch.rand(d, generator=generator) < share).flatten()
        for indices in (picked, picked.flip(0), picked.int()):
            n = indices.shape[0]
            guarded = torch.full((n * n + 64,), float("nan"), dtype=dtype)
            out = guarded[32 : 32 + n * n].view(n, n)
            _C.gather_square(matrix, indices, out, isa=isa)
            assert torch.equal(out, matrix[indices][:, indices])
            assert guarded[:32].isnan().all()
            assert guarded[32 + n * n :].isnan().all()


def test_index_outside_writes_nothing(isa):
    for bad in ([0, -1], [3, 0], [2**40, 1]):
        out = torch.full((2, 2), 7.0)
        with pytest.raises(IndexError, match=r"every index must be in \[0, 3\)"):
            _C.gather_square(torch.zeros(3, 3), torch.tensor(bad), out, isa=isa)
        assert (out == 7).all()


def test_attributes_serve_where_dlpack_exchange_does_not():
    scores = torch.rand(3, 50)
    one, other = _outputs(3, 50), _outputs(3, 50)
    _C.neuron_select(scores, 0.5, False, *one)
    _C.neuron_select(scores, 0.5, False, *other, use_dlpack=False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_arguments_that_would_leave_memory_are_refused():
    scores = torch.rand(2, 4)
    mask, indices, counts = _outputs(2, 4)
    with pytest.raises(TypeError, match="indices: int32 expected, got int64"):
        _C.neuron_select(scores, 0.5, False, mask, indices.long(), counts)
    with pytest.raises(ValueError, match=r"mask: shape \(2, 4\) expected, got \(1, 4\)"):
        _C.neuron_select(scores, 0.5, False, mask[:1], indices, counts)
    with pytest.raises(ValueError, match="indices: must be contiguous"):
        _C.neuron_select(scores, 0.5, False, mask, torch.zeros(4, 2, dtype=torch.int32).T, counts)
    with pytest.raises(ValueError, match=r"counts: shape \(2,\) expected, got \(1,\)"):
        _C.neuron_select(scores, 0.5, False, mask, indices, counts[:1])
    with pytest.raises(ValueError, match="mass: a positive number expected"):
        _C.neuron_select(scores, float("nan"), False, mask, indices, counts)
    with pytest.raises(TypeError, match="out: float64 expected, got float32"):
        _C.neuron_scores(scores, torch.zeros(2))
    with pytest.raises(ValueError, match=r"matrix: shape \(2, 2\) expected, got \(2, 4\)"):
        _C.gather_square(scores, indices[0], torch.zeros(4, 4))
    with pytest.raises(TypeError, match="out: float32 expected, got float64"):
        _C.gather_square(torch.zeros(2, 2), torch.tensor([0]), torch.zeros(1, 1, dtype=torch.float64))
