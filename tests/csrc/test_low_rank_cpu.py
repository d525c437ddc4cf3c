"""fastedit._C.low_rank_update on the CPU, each instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (d_out, d_in, rank) around tiles of 12 x 32, tasks of 96 rows, runs of 256 steps
SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (9, 31, 1),
    (33, 65, 17),
    (64, 96, 128),
    (31, 33, 200),
    (100, 300, 2),
    (8, 32, 1024),
    (25, 70, 600),
    (12, 64, 257),
]
IDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def _problem(shape, dtype, transposed):
    """Stored weight, left, right, and the exact result in the stored orientation."""
    torch.manual_seed(0)
    d_out, d_in, rank = shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn((d_in, d_out) if transposed else (d_out, d_in)).to(dtype)
    left, right = torch.randn(d_out, rank, dtype=work), torch.randn(d_in, rank, dtype=work)
    delta = 0.37 * (left.double() @ right.double().T)
    return weight, left, right, weight.double() + (delta.T if transposed else delta)


def _half_unit(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of the dtype, at each element."""
    digits, smallest = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.ones_like(exact), (exponent - 1).clamp(min=smallest) - digits)


def _assert_nearest(out, exact, left, right, transposed):
    """One rounding to nearest: half a unit, and what float32 arithmetic adds before it."""
    size = 0.37 * (left.double().abs() @ right.double().abs().T)
    slack = (left.shape[1] + 2) * 2.0**-24 * ((size.T if transposed else size) + exact.abs())
    if out.dtype in (torch.float32, torch.float64):
        assert relative_error(out, exact) <= (2e-6 if out.dtype == torch.float32 else 1e-12)
    else:
        assert ((out.double() - exact).abs() <= _half_unit(exact, out.dtype) * 1.0001 + slack).all()
        assert (out == exact.to(out.dtype)).double().mean() >= 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(isa, shape, transposed, dtype):
    weight, left, right, exact = _problem(shape, dtype, transposed)
    norm = torch.full((1,), float("nan"), dtype=torch.float64)
    plain = weight.clone()
    _C.low_rank_update(weight, left, right, 0.37, transposed, False, 0, norm, isa=isa)
    _assert_nearest(weight, exact, left, right, transposed)
    assert norm.item() == pytest.approx(0.37 * (left.double() @ right.double().T).norm().item(), rel=2e-6)
    _C.low_rank_update(plain, left, right, 0.37, transposed, isa=isa)
    assert torch.equal(plain, weight)  # asking for the norm changes no bit


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_rows_apart_and_guards(isa, dtype, stochastic):
    torch.manual_seed(1)
    d_out, d_in, rank = 19, 45, 6
    work = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.full((d_out + 2, d_in + 21), float("nan"), dtype=dtype)
    weight = buffer[1:-1, 5 : 5 + d_in]
    weight.copy_(torch.randn(d_out, d_in))
    left = torch.full((d_out, rank + 3), float("nan"), dtype=work)[:, 1 : 1 + rank]
    right = torch.full((d_in, rank + 5), float("nan"), dtype=work)[:, 2 : 2 + rank]
    left.copy_(torch.randn(d_out, rank))
    right.copy_(torch.randn(d_in, rank))
    expected = weight.clone()
    _C.low_rank_update(expected, left.contiguous(), right.contiguous(), 0.5, False, stochastic, 3, isa=isa)
    _C.low_rank_update(weight, left, right, 0.5, False, stochastic, 3, isa=isa)
    assert torch.equal(weight, expected)
    assert weight.isfinite().all()
    assert int(buffer.isfinite().sum()) == d_out * d_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_same_bits_for_any_number_of_threads(isa, dtype, stochastic):
    results, norms = [], []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 5, 1):
            torch.set_num_threads(n)
            weight, left, right, _ = _problem((200, 333, 40), dtype, False)
            norm = torch.zeros(1, dtype=torch.float64)
            _C.low_rank_update(weight, left, right, 0.37, False, stochastic, 11, norm, isa=isa)
            results.append(weight)
            norms.append(norm.item())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert len(set(norms)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(
    "shape", [(7, 5, 3), (33, 65, 17), (24, 64, 300)], ids=lambda s: "x".join(map(str, s))
)
def test_residual_is_what_rounding_took(isa, shape, dtype, stochastic, carry):
    weight, left, right, exact = _problem(shape, dtype, False)
    buffer = torch.full((shape[0] + 2, shape[1] + 3), float("nan"))
    residual = buffer[1:-1, 2:-1]
    if carry:
        residual.copy_(torch.randn(shape[:2]) * 1e-3)
        exact = exact + residual
    plain = weight.clone()
    _C.low_rank_update(weight, left, right, 0.37, False, stochastic, 5, None, residual, carry, isa=isa)
    assert relative_error(weight.double() + residual, exact) < 1e-6
    assert int(buffer.isfinite().sum()) == residual.numel()
    if not carry:
        _C.low_rank_update(plain, left, right, 0.37, False, stochastic, 5, isa=isa)
        assert torch.equal(plain, weight)


def test_residual_of_what_is_not_finite_is_zero(isa):
    weight = torch.tensor([[float("inf"), float("nan"), 65504.0, 1.0]], dtype=torch.float16)
    residual = torch.full((1, 4), float("nan"))
    update = torch.tensor([[1.0], [1.0], [100.0], [2.0**-20]])
    _C.low_rank_update(weight, torch.ones(1, 1), update, 1.0, False, False, 0, None, residual, isa=isa)
    assert residual.tolist() == [[0.0, 0.0, 0.0, 2.0**-20]]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_rank_zero_changes_nothing(isa, dtype):
    weight, left, right, _ = _problem((5, 40, 0), dtype, False)
    before, norm = weight.clone(), torch.full((1,), float("nan"))
    _C.low_rank_update(weight, left, right, 1.0, False, False, 0, norm, isa=isa)
    assert torch.equal(weight, before)
    assert norm.item() == 0.0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weights(isa, shape):
    weight = torch.zeros(shape)
    _C.low_rank_update(weight, torch.zeros(shape[0], 2), torch.zeros(shape[1], 2), isa=isa)


def test_ties_go_to_even_and_special_values_survive(isa):
    for dtype, digits in ((torch.bfloat16, 7), (torch.float16, 10)):
        unit = 2.0**-digits
        weight = torch.tensor(
            [[1.0, 1.0 + unit, -1.0, float("inf"), float("-inf"), float("nan")]], dtype=dtype
        )
        update = torch.tensor([[unit / 2], [unit / 2], [-unit / 2], [1.0], [1.0], [1.0]])
        _C.low_rank_update(weight, torch.ones(1, 1), update, isa=isa)
        assert weight[0, :5].tolist() == [1.0, 1.0 + 2 * unit, -1.0, float("inf"), float("-inf")]
        assert weight[0, 5].isnan()
    largest = torch.tensor([[65504.0, 65504.0]], dtype=torch.float16)
    _C.low_rank_update(largest, torch.ones(1, 1), torch.tensor([[15.0], [16.0]]), isa=isa)
    assert largest.tolist() == [[65504.0, float("inf")]]
    small = torch.full((1, 40), 2.0**-24, dtype=torch.float16)
    _C.low_rank_update(small, torch.ones(1, 1), torch.full((40, 1), 0.5 * 2.0**-24), isa=isa)
    assert (small == 2.0**-23).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=IDS.get)
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(9, 37), (64, 128), (50, 33)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_stochastic_rounding_is_the_shared_definition(isa, dtype, transposed, shape):
    """Sums that float32 holds exactly, so that the bits are those of the definition in Python."""
    philox = pytest.importorskip("fastedit.ops.philox", reason="no fastedit.ops.philox", exc_type=ImportError)
    torch.manual_seed(2)
    d_out, d_in = shape
    seed = 0x9E3779B97F4A7C15
    weight = torch.randn(shape).to(dtype)
    weight[:, ::3] *= 2.0**-13  # float16: subnormal results, too
    left = torch.randint(-8, 9, (d_out, 2)).float()
    right = torch.randint(-8, 9, (d_in, 2)).float() * 2.0**-24
    exact = (weight.double() + left.double() @ right.double().T).float()
    random = philox.words(0, d_out * d_in, seed).reshape(shape)
    expected = philox.round_stochastically(exact, random, dtype)
    stored = weight.T.contiguous() if transposed else weight
    _C.low_rank_update(stored, left, right, 1.0, transposed, True, seed, isa=isa)
    assert torch.equal(stored.T if transposed else stored, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
def test_stochastic_rounding_keeps_the_expected_value(isa, dtype):
    weight = torch.ones(256, 256, dtype=dtype)
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    _C.low_rank_update(
        weight, torch.ones(256, 1), torch.full((256, 1), step * 0.3), 1.0, False, True, 5, isa=isa
    )
    assert set(weight.double().unique().tolist()) == {1.0, 1.0 + step}
    assert ((weight.double() - 1.0).mean() / step).item() == pytest.approx(0.3, abs=0.01)


def test_revert_with_the_opposite_factor_is_deterministic(isa):
    weight, left, right, _ = _problem((65, 70, 9), torch.bfloat16, False)
    other = weight.clone()
    for target in (weight, other):
        _C.low_rank_update(target, left, right, 0.5, isa=isa)
        _C.low_rank_update(target, left, right, -0.5, isa=isa)
    assert torch.equal(weight, other)


def test_rows_further_apart_than_32_bits():
    stride = 2**30 + 8
    try:
        buffer = torch.empty(stride + 40, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not enough memory for a row stride of 2 GiB")
    weight = buffer.as_strided((2, 40), (stride, 1))
    weight.fill_(1.0)
    _C.low_rank_update(weight, torch.ones(2, 1), torch.ones(40, 1), 2.0)
    assert (weight == 3.0).all()


def test_attributes_serve_where_dlpack_exchange_does_not():
    one, left, right, _ = _problem((20, 30, 4), torch.bfloat16, True)
    other = one.clone()
    _C.low_rank_update(one, left, right, 2.0, True)
    _C.low_rank_update(other, left, right, 2.0, True, use_dlpack=False)
    assert torch.equal(one, other)


def test_arguments_that_would_leave_memory_are_refused():
    weight, left, right = torch.zeros(4, 6), torch.zeros(4, 2), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"left: shape \(6, 2\) expected, got \(4, 2\)"):
        _C.low_rank_update(weight, left, right, 1.0, True)
    with pytest.raises(ValueError, match=r"right: shape \(6, 2\) expected, got \(6, 3\)"):
        _C.low_rank_update(weight, left, torch.zeros(6, 3))
    with pytest.raises(ValueError, match="weight: last dimension must be contiguous"):
        _C.low_rank_update(torch.zeros(6, 4).T, left, right)
    with pytest.raises(ValueError, match="weight: rows overlap"):
        _C.low_rank_update(torch.zeros(1, 6).expand(4, 6), left, right)
    with pytest.raises(TypeError, match="left: float32 expected, got bfloat16"):
        _C.low_rank_update(weight, left.bfloat16(), right)
    with pytest.raises(TypeError, match="left: with a float64 weight, float64 expected"):
        _C.low_rank_update(weight.double(), left, right)
    with pytest.raises(TypeError, match="weight"):
        _C.low_rank_update(weight.bool(), left, right)
    with pytest.raises(ValueError, match="out_norm: one element expected"):
        _C.low_rank_update(weight, left, right, 1.0, False, False, 0, torch.zeros(2))
    half = torch.zeros(4, 6, dtype=torch.bfloat16)
    for residual, match in (
        (torch.zeros(6, 4), r"residual: shape \(4, 6\)"),
        (torch.zeros(6, 4).T, "contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            _C.low_rank_update(half, left, right, residual=residual)
    with pytest.raises(TypeError, match="with a residual, bfloat16 or float16"):
        _C.low_rank_update(weight, left, right, residual=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="carry: needs a residual"):
        _C.low_rank_update(half, left, right, carry=True)
    with pytest.raises(ValueError, match="right: 2 dimensions expected"):
        _C.low_rank_update(weight, left, right[:, 0])
