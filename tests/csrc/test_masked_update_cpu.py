"""fastedit._C.masked_sgd, masked_adam and philox_bits on the CPU, each instruction set that the machine has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastedit.ops import BitMask, MaskedAdamState, PhiloxMask, use_backend

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = [name for name in ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1] if name != "avx512_bf16"]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in EPS]
# rows and columns around words (64), runs (1024), chunks (32 or 64 by 128), blocks (4096) and tasks (65536)
SHAPES = [(1, 1), (3, 7), (9, 63), (8, 64), (5, 65), (2, 1025), (33, 131), (65, 257), (1, 70001)]
PHILOX = PhiloxMask(11, 2, 5, 0.3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def _dense(mask, shape):
    with use_backend("torch"):
        return mask.dense(shape)


def _reference(param, grad, keep, lr, decay=0.0, scope="none", clamp_to=None, clamp=0.0):
    old = param.double()
    reached = {"all": torch.ones_like(keep), "masked": keep, "none": torch.zeros_like(keep)}[scope]
    out = old - lr * (torch.where(keep, grad.double(), 0.0) + torch.where(reached, decay * old, 0.0))
    return out if clamp_to is None else out.clamp(clamp_to.double() - clamp, clamp_to.double() + clamp)


def _assert_close(out, reference, ulps=1):
    allowed = ulps * EPS[out.dtype] * reference.abs().clamp(min=1.0) * 4
    assert bool(((out.double() - reference).abs() <= allowed).all())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_matches_reference(isa, dtype, shape):
    torch.manual_seed(0)
    start, grad = torch.randn(shape).to(dtype), torch.randn(shape)
    keep = _dense(PHILOX, shape)
    bits = BitMask.from_dense(keep).packed
    for scope in ("all", "masked", "none"):
        for bound in (None, start.float() + 0.01):
            expected = _reference(start, grad, keep, 0.25, 0.125, scope, bound, 0.02)
            for mask, key in ((None, PHILOX.key), (bits, [])):
                out = start.clone()
                _C.masked_sgd(out, grad, mask, key, 0.25, 0.125, scope, bound, 0.02, isa=isa)
                _assert_close(out, expected)
    out = start.clone()
    _C.masked_sgd(out, grad, None, [], 0.25, isa=isa)
    _assert_close(out, start.double() - 0.25 * grad.double())


@pytest.mark.parametrize("grad_dtype", [*EPS, torch.float64], ids=str)
def test_conversions_and_strides(isa, grad_dtype):
    torch.manual_seed(1)
    grad = torch.randn(131, 70).to(grad_dtype)
    keep = _dense(PHILOX, (131, 70))
    for dtype in EPS:
        start = torch.randn(131, 70).to(dtype)
        bound = (start.double() + 0.01).to(grad_dtype)
        expected = _reference(start, grad, keep, 0.25, 0.125, "all", bound, 0.02)
        store = torch.full((140, 150), float("nan"), dtype=dtype)
        for out in (start.clone(), start.T.contiguous().T, store[4:135, 5:145:2]):
            out.copy_(start)
            for g in (grad, grad.T.contiguous().T):
                out.copy_(start)
                _C.masked_sgd(out, g, None, PHILOX.key, 0.25, 0.125, "all", bound, 0.02, isa=isa)
                _assert_close(out, expected)
        assert store.isnan().sum() == store.numel() - start.numel()


def test_blocks_of_rows_count_on(isa):
    torch.manual_seed(2)
    start, grad = torch.randn(130, 71), torch.randn(130, 71)
    bits = BitMask.from_dense(_dense(PHILOX, (130, 71))).packed
    for mask, key in ((None, PHILOX.key), (bits, [])):
        results = []
        for step in (130, 7):
            out, state = start.clone(), MaskedAdamState(start, PHILOX)
            numbers = _C.AdamStep(0.1, 0.9, 0.999, 1e-8, 1, 0.0, False, "masked", 0.0)
            for r in range(0, 130, step):
                w, g = out[r : r + step], grad[r : r + step]
                _C.masked_sgd(w, g, mask, key, 0.25, start=71 * r, isa=isa)
                moments = (state.exp_avg, state.exp_avg_sq, state.offsets)
                _C.masked_adam(w, g, *moments, mask, key, numbers, start=71 * r, n=130 * 71, isa=isa)
            results.append((out, state.exp_avg))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_adam_matches_the_formula(isa, shape):
    torch.manual_seed(3)
    keep = _dense(PHILOX, shape)
    for start in (torch.randn(shape), torch.randn(shape[1], shape[0]).T):
        grad, state = torch.randn(shape), MaskedAdamState(start, PHILOX)
        m, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        out, expected = start.clone(memory_format=torch.preserve_format), start.double().clone()
        for step in (1, 2):
            numbers = _C.AdamStep(0.1, 0.5, 0.75, 1e-4, step, 0.125, True, "all", 0.0)
            _C.masked_adam(
                out,
                grad,
                state.exp_avg,
                state.exp_avg_sq,
                state.offsets,
                None,
                PHILOX.key,
                numbers,
                isa=isa,
            )
            m, v = 0.5 * m + 0.5 * grad, 0.75 * v + 0.25 * grad.double() ** 2
            expected *= 1 - 0.0125
            change = m / (1 - 0.5**step) / ((v / (1 - 0.75**step)).sqrt() + 1e-4)
            expected = torch.where(keep, expected - 0.1 * change, expected)
        _assert_close(out, expected, 4)
        torch.testing.assert_close(state.exp_avg.double(), m[keep], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.exp_avg_sq.double(), v[keep], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("indices", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_indices(isa, indices):
    torch.manual_seed(4)
    start, grad = torch.randn(40, 50), torch.randn(40, 50)
    keep = _dense(PHILOX, (40, 50))
    index = keep.flatten().nonzero()[:, 0].to(indices)
    out = start.clone()
    _C.masked_sgd(out, grad, index, [], 0.25, 0.125, "masked", isa=isa)
    _assert_close(out, _reference(start, grad, keep, 0.25, 0.125, "masked"))
    out, m, v = start.clone(), torch.zeros(len(index)), torch.zeros(len(index))
    _C.masked_adam(out, grad, m, v, None, index, [], _C.AdamStep(0.1, 0.5, 0.75, 0.0, 1, 0, False, "none", 0))
    _assert_close(out, torch.where(keep, start.double() - 0.1 * grad.double().sign(), start.double()))


def test_same_bits_for_any_number_of_threads(isa):
    torch.manual_seed(5)
    start, grad = torch.randn(300, 521), torch.randn(300, 521)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            out, turned = start.clone(), start.T.contiguous().T
            state = MaskedAdamState(start, PHILOX)
            numbers = _C.AdamStep(0.1, 0.9, 0.999, 1e-8, 1, 0.0, False, "masked", 0.0)
            for w in (out, turned):
                _C.masked_sgd(w, grad, None, PHILOX.key, 0.3, 0.01, "all", isa=isa)
                moments = (state.exp_avg, state.exp_avg_sq, state.offsets)
                _C.masked_adam(w, grad, *moments, None, PHILOX.key, numbers, isa=isa)
            bits = torch.empty(50_000, dtype=torch.uint8)
            _C.philox_bits(bits, 8, PHILOX.key, isa=isa)
            results.append((out, turned, state.exp_avg, bits))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_are_those_of_the_reference(isa):
    mask = PhiloxMask(-5, 2**32 - 1, 77, 0.37)
    for start, n_bytes in ((0, 1), (0, 1003), (40, 17), (2**34 - 64, 40)):
        bits, expected = (torch.empty(n_bytes, dtype=torch.uint8) for _ in range(2))
        _C.philox_bits(bits, start, mask.key, isa=isa)
        with use_backend("torch"):
            torch.ops.fastedit.philox_bits_(expected, start, mask.key)
        assert torch.equal(bits, expected)


def test_not_a_number(isa):
    start, grad, bound = torch.zeros(2, 70), torch.ones(2, 70), torch.zeros(2, 70)
    start[0, 3], bound[1, 66], grad[1, 1] = float("nan"), float("nan"), float("inf")
    keep = torch.zeros(2, 70, dtype=torch.bool)
    keep[1, 1] = True
    bits = torch.from_numpy(np.packbits(keep.numpy(), bitorder="little"))
    _C.masked_sgd(start, grad, bits, [], 1.0, 0.0, "all", bound, 0.5, isa=isa)
    assert start.isnan().nonzero().tolist() == [[0, 3], [1, 66]]
    assert start[1, 1] == -0.5


def test_attributes_serve_where_dlpack_exchange_does_not():
    one, other, grad = torch.zeros(9, 70), torch.zeros(9, 70), torch.randn(9, 70)
    _C.masked_sgd(one, grad, None, PHILOX.key, 1.0)
    _C.masked_sgd(other, grad, None, PHILOX.key, 1.0, use_dlpack=False)
    assert torch.equal(one, other)


def test_arguments_that_would_leave_memory_are_refused():
    param, grad = torch.zeros(4, 6), torch.ones(4, 6)
    key = PHILOX.key

    def refused(error, match, *args):
        with pytest.raises(error, match=match):
            _C.masked_sgd(*args)
        assert not param.any()

    refused(ValueError, r"grad: shape \(4, 6\) expected, got \(4, 5\)", param, grad[:, :5], None, key, 1.0)
    refused(ValueError, "param: 2 dimensions expected", param[0], grad, None, key, 1.0)
    refused(TypeError, "param: float32, bfloat16 or float16 expected", param.double(), grad, None, key, 1.0)
    refused(TypeError, "grad: .* expected, got int32", param, grad.int(), None, key, 1.0)
    refused(TypeError, "mask: uint8, int32 or int64 expected", param, grad, grad[0], [], 1.0)
    refused(ValueError, "mask: too few bytes", param, grad, torch.zeros(2, dtype=torch.uint8), [], 1.0)
    refused(ValueError, "indices must be sorted", param, grad, torch.tensor([1, 24]), [], 1.0)
    refused(ValueError, "indices must be sorted", param, grad, torch.tensor([-1]), [], 1.0)
    refused(ValueError, "leave all other entries", param, grad, torch.tensor([1]), [], 1.0, 0.1, "all")
    refused(ValueError, "philox: seed", param, grad, None, key[:2], 1.0)
    refused(ValueError, "decay_scope", param, grad, None, key, 1.0, 0.1, "most")
    with pytest.raises(ValueError, match="mask: too few bytes for 32 entries"):
        _C.masked_sgd(param, grad, torch.zeros(3, dtype=torch.uint8), [], 1.0, start=8)
    numbers, m = _C.AdamStep(0.1, 0.9, 0.99, 0.0, 1, 0, False, "none", 0), torch.zeros(24)
    with pytest.raises(ValueError, match="offsets: expected with this mask"):
        _C.masked_adam(param, grad, m, m.clone(), None, None, key, numbers)
    with pytest.raises(ValueError, match="exp_avg: too few"):
        _C.masked_adam(param, grad, m[:3], m.clone(), None, None, [], numbers)
    offsets = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="exp_avg: as many moments expected"):
        _C.masked_adam(param, grad, m[:0], m[:0].clone(), offsets, None, key, numbers)
    with pytest.raises(ValueError, match=r"offsets: shape \(2,\) expected"):
        _C.masked_adam(param, grad, m, m.clone(), offsets, None, key, numbers, n=5000)
    with pytest.raises(ValueError, match="multiple of 8"):
        _C.philox_bits(torch.zeros(3, dtype=torch.uint8), 4, key)
