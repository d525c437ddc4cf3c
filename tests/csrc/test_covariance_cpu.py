"""fastedit._C.covariance on the CPU, each instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
# dtype of x, dtype of cov, tolerance
DTYPES = [
    pytest.param(torch.float32, torch.float32, 2e-6, id="f32"),
    pytest.param(torch.bfloat16, torch.float32, 1e-5, id="bf16"),
    pytest.param(torch.float16, torch.float32, 1e-5, id="f16"),
    pytest.param(torch.float32, torch.float64, 1e-6, id="f32-f64"),
    pytest.param(torch.bfloat16, torch.float64, 1e-6, id="bf16-f64"),
    pytest.param(torch.float16, torch.float64, 1e-6, id="f16-f64"),
    pytest.param(torch.float64, torch.float64, 1e-12, id="f64"),
]
# tokens and columns around panels (32), slices (64, 128 steps), squares (128, 256) and chunks (2048 tokens)
SHAPES = [
    (1, 1),
    (2, 3),
    (5, 31),
    (127, 32),
    (129, 33),
    (257, 67),
    (300, 129),
    (131, 257),
    (2049, 40),
    (4099, 5),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def _symmetric(d: int, dtype: torch.dtype) -> torch.Tensor:
    a = torch.randn(d, d, dtype=dtype)
    return a + a.T


def _reference(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    x = x.double() if mask is None else x[mask].double()
    return cov.double() + x.T @ x


@pytest.mark.parametrize(("x_dtype", "cov_dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_matches_reference(isa, shape, masked, x_dtype, cov_dtype, tolerance):
    torch.manual_seed(0)
    n_tokens, d = shape
    x = torch.randn(n_tokens, d).to(x_dtype)
    cov = _symmetric(d, cov_dtype)
    mask = torch.rand(n_tokens) > 0.4 if masked else None
    expected = _reference(cov, x, mask)
    _C.covariance(cov, x, mask, isa=isa)
    assert relative_error(cov, expected) <= tolerance
    assert torch.equal(cov, cov.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_padded_rows_guards_and_strided_mask(isa, dtype):
    torch.manual_seed(1)
    n_tokens, d = 131, 45
    buffer = torch.full((n_tokens + 2, d + 19), float("nan"), dtype=dtype)
    x = buffer[1:-1, 7 : 7 + d]
    x.copy_(torch.randn(n_tokens, d))
    mask = (torch.rand(2 * n_tokens) > 0.5)[::2]
    x[~mask] = float("nan")  # what is masked is never multiplied, not even by zero
    around = torch.full((d * d + 128,), float("nan"))
    cov = around[64 : 64 + d * d].view(d, d)
    cov.zero_()
    expected = _reference(cov, x, mask)
    _C.covariance(cov, x, mask, isa=isa)
    assert relative_error(cov, expected) <= 2e-6
    assert around[:64].isnan().all()
    assert around[64 + d * d :].isnan().all()


def test_expanded_rows(isa):
    x = torch.arange(1.0, 8.0).expand(9, 7)
    cov = torch.zeros(7, 7)
    _C.covariance(cov, x, None, isa=isa)
    assert torch.equal(cov, 9 * torch.outer(x[0], x[0]))


@pytest.mark.parametrize("n_tokens", [0, 1, 300])
def test_nothing_to_add_changes_no_bit(isa, n_tokens):
    cov = torch.full((5, 5), -0.0)
    before = cov.clone()
    _C.covariance(cov, torch.randn(n_tokens, 5), torch.zeros(n_tokens, dtype=torch.bool), isa=isa)
    assert torch.equal(cov.view(torch.int32), before.view(torch.int32))


def test_no_columns(isa):
    _C.covariance(torch.zeros(0, 0), torch.zeros(4, 0), None, isa=isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def test_same_bits_for_any_number_of_threads(isa, dtype):
    torch.manual_seed(2)
    x = torch.randn(2500, 173).to(dtype)
    mask = torch.rand(2500) > 0.1
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            cov = torch.zeros(173, 173, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            _C.covariance(cov, x, mask, isa=isa)
            results.append(cov)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_layers_are_the_same_bits_as_single_calls(isa, n_threads):
    torch.manual_seed(5)
    widths = [33, 64, 5, 0, 130, 7, 41, 96, 1, 17, 300, 20, 21]  # enough narrow ones to be shared out
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    xs = [torch.randn(70 + 10 * i, d).to(dtypes[i % 3]) for i, d in enumerate(widths)]
    masks = [None if i % 2 else torch.rand(len(x)) > 0.3 for i, x in enumerate(xs)]
    covs = [_symmetric(d, torch.float64 if i % 4 == 1 else torch.float32) for i, d in enumerate(widths)]
    single = [cov.clone() for cov in covs]
    for args in zip(single, xs, masks, strict=True):
        _C.covariance(*args, isa=isa)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        _C.covariance_layers(covs, xs, masks, isa=isa)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(covs, single, strict=True))


def test_lists_of_layers_are_checked():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="lists of one length"):
        _C.covariance_layers([torch.zeros(4, 4)], [x, x], [None])
    with pytest.raises(ValueError, match="cov: shape"):
        _C.covariance_layers([torch.zeros(5, 5)], [x], [None])
    _C.covariance_layers([], [], [])


def test_many_tokens_lose_no_precision(isa):
    """Positive sums, where every rounding of a long running sum would show."""
    torch.manual_seed(3)
    x = (torch.rand(60_000, 8) + 0.5).to(torch.bfloat16)
    cov = torch.zeros(8, 8)
    for _ in range(3):
        _C.covariance(cov, x, None, isa=isa)
    assert relative_error(cov, 3 * _reference(torch.zeros(8, 8), x)) <= 1e-6


def test_special_values_of_float16(isa):
    x = torch.tensor([[6e-8, 65504.0, -6.1e-5], [1.0, 2.0**-14, 0.0]], dtype=torch.float16)
    cov = torch.zeros(3, 3, dtype=torch.float64)
    _C.covariance(cov, x, None, isa=isa)
    assert relative_error(cov, _reference(torch.zeros(3, 3), x)) <= 1e-6
    cov = torch.zeros(2, 2)
    _C.covariance(cov, torch.tensor([[float("inf"), 1.0]], dtype=torch.float16), None, isa=isa)
    assert cov.tolist() == [[float("inf"), float("inf")], [float("inf"), 1.0]]


def test_rows_further_apart_than_32_bits():
    stride = 2**30 + 8
    try:
        buffer = torch.empty(stride + 16, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not enough memory for a row stride of 2 GiB")
    x = buffer.as_strided((2, 16), (stride, 1))
    x.copy_(torch.randn(2, 16))
    cov = torch.zeros(16, 16)
    _C.covariance(cov, x, None)
    assert relative_error(cov, _reference(torch.zeros(16, 16), x)) <= 1e-6


def test_attributes_serve_where_dlpack_exchange_does_not():
    torch.manual_seed(4)
    x, mask = torch.randn(33, 21)[:, 3:17], torch.rand(33) > 0.5
    one, other = torch.zeros(14, 14), torch.zeros(14, 14)
    _C.covariance(one, x, mask)
    _C.covariance(other, x, mask, use_dlpack=False)
    assert torch.equal(one, other)
    with pytest.raises(TypeError, match="got one on meta"):
        _C.covariance(one, torch.zeros(3, 14, device="meta"), use_dlpack=False)
    with pytest.raises(TypeError, match="float16"):
        _C.covariance(one, torch.zeros(3, 14, dtype=torch.int64), use_dlpack=False)


def test_arguments_that_would_leave_memory_are_refused():
    cov, x = torch.zeros(4, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"cov: shape \(4, 4\) expected, got \(5, 5\)"):
        _C.covariance(torch.zeros(5, 5), x)
    with pytest.raises(ValueError, match="cov: must be contiguous"):
        _C.covariance(torch.zeros(4, 8)[:, :4], x)
    with pytest.raises(ValueError, match="x: last dimension must be contiguous"):
        _C.covariance(torch.zeros(3, 3), x.T)
    with pytest.raises(ValueError, match=r"mask: shape \(3,\) expected, got \(4,\)"):
        _C.covariance(cov, x, torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: bool expected, got float32"):
        _C.covariance(cov, x, torch.ones(3))
    with pytest.raises(TypeError, match="x: with a float32 cov"):
        _C.covariance(cov, x.double())
    with pytest.raises(TypeError, match="cov: float32 or float64 expected, got bfloat16"):
        _C.covariance(cov.bfloat16(), x)
    with pytest.raises(TypeError, match="tensor expected"):
        _C.covariance([1.0], x)
    with pytest.raises(TypeError, match="meta"):
        _C.covariance(cov, x.to("meta"))
    with pytest.raises(ValueError, match="isa"):
        _C.covariance(cov, x, isa="sse9")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torch before 2.5
def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.zeros(3, 4)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        _C.covariance(torch.zeros(4, 4), x)


def test_parameters_are_viewed_like_tensors():
    x = torch.nn.Parameter(torch.randn(6, 4))
    cov = torch.zeros(4, 4)
    _C.covariance(cov, x)
    assert relative_error(cov, _reference(torch.zeros(4, 4), x.detach())) <= 1e-6
