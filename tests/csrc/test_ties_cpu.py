"""fastedit._C.ties_merge on the CPU, each instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch

from fastedit.ops import ties_merge_reference

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# entries around vectors (8, 16), tiles (512), ranges (65536: from there on a sample is taken)
SIZES = [1, 7, 17, 511, 513, 65536, 65537, 150_001]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def copies(n, m, dtype, step=1e-5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator).to(dtype)
    edits = [torch.randn(n, generator=generator).div(step).round() * step for _ in range(m)]
    return base, [(base.float() + e).to(dtype) for e in edits]


def merge(base, tensors, weights, keep, **options):
    """Run the compiled function into a poisoned output with guards around it."""
    n = base.numel()
    around = torch.full((n + 64,), float("nan"), dtype=base.dtype)
    status = torch.full((1,), -7, dtype=torch.int32)
    _C.ties_merge(around[32 : 32 + n], base, tensors, weights, keep, status, **options)
    assert around[:32].isnan().all()
    assert around[32 + n :].isnan().all()
    return around[32 : 32 + n], int(status)


def reference(base, tensors, weights, density, **options):
    return ties_merge_reference([t.float() for t in tensors], weights, density, base.float(), **options).to(
        base.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("n", SIZES)
def test_same_bits_as_the_reference(isa, n, dtype):
    base, tensors = copies(n, 3, dtype)
    weights, density = [1.0, 0.4, -0.6], 0.53
    out, status = merge(base, tensors, weights, [int(density * n)] * 3, isa=isa)
    assert status == 3
    assert torch.equal(out, reference(base, tensors, weights, density))


@pytest.mark.parametrize("step", [1e-5, 0.25, 3.0], ids=["distinct", "ties", "mostly_zero"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.7, 0.999])
def test_thresholds_and_ties_of_sampled_tensors(isa, step, density):
    n = 140_003
    base, tensors = copies(n, 2, torch.float32, step)
    keep = [int(density * n)] * 2
    for every in (False, True):
        out, _ = merge(base, tensors, [1.0, 1.0], keep, all_at_threshold=every, isa=isa)
        rule = "all" if every else "lowest_index"
        assert torch.equal(out, reference(base, tensors, [1.0, 1.0], density, at_threshold=rule)), every


@pytest.mark.parametrize("order", ["ascending", "descending", "one_range"])
def test_a_bracket_that_misses_or_overflows(isa, order):
    n = 300_000
    magnitude = torch.linspace(0, 1, n)
    if order == "descending":
        magnitude = magnitude.flip(0)
    if order == "one_range":  # the sample sees it, but one range holds all that is near the threshold
        magnitude = torch.where(
            torch.arange(n) < 60_000, 0.5 + 1e-6 * torch.rand(n), torch.arange(n) % 2 * 1.0
        )
    base = torch.zeros(n)
    for density in (0.3, 0.5):
        out, _ = merge(base, [magnitude], [1.0], [int(density * n)], isa=isa)
        assert torch.equal(out, reference(base, [magnitude], [1.0], density))


def test_majority_sign(isa):
    base, tensors = copies(70_000, 2, torch.float32, 0.5)
    for shift in (-0.5, 0.5):
        moved = [t + shift for t in tensors]
        out, _ = merge(base, moved, [1.0, 1.0], [70_000] * 2, majority=True, scale=0.3, isa=isa)
        assert torch.equal(out, reference(base, moved, [1.0, 1.0], 1.0, variant="ties_original", scale=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_same_bits_for_any_number_of_threads(isa, dtype):
    base, tensors = copies(200_003, 2, dtype, 0.25)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            results.append(merge(base, tensors, [1.0, 0.7], [90_000, 30_000], isa=isa)[0].clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_not_finite_is_reported_and_poisons(isa, dtype):
    base, tensors = copies(70_001, 3, dtype)
    tensors[2][0] = float("inf")
    tensors[1][70_000] = float("nan")
    out, status = merge(base, tensors, [1.0] * 3, [20_000] * 3, isa=isa)
    assert status == 1
    assert out.isnan().all()
    all_ones = torch.full((9,), -1, dtype=torch.int32).view(torch.float32)  # the NaN with the largest bits
    assert merge(torch.zeros(9), [all_ones], [1.0], [0], isa=isa)[1] == 0


def test_special_values_of_float16(isa):
    base = torch.tensor([0.0, 65504.0, 6e-8, -6.1e-5, 0.0], dtype=torch.float16)
    tensors = [torch.tensor([6e-8, -65504.0, 0.0, 6.1e-5, -0.0], dtype=torch.float16)]
    out, _ = merge(base, tensors, [1.0], [5], isa=isa)
    assert torch.equal(out, tensors[0])


def test_arguments_that_would_leave_memory_are_refused():
    base, status = torch.zeros(4), torch.zeros(1, dtype=torch.int32)

    def refused(
        error, match, out=base, base=base, tensors=(base,), weights=(1.0,), keep=(2,), status=status, **kw
    ):
        with pytest.raises(error, match=match):
            _C.ties_merge(out, base, list(tensors), list(weights), list(keep), status, **kw)

    refused(ValueError, r"out: shape \(4,\), contiguous, expected, got \(5,\)", out=torch.zeros(5))
    refused(ValueError, r"tensors: shape \(4,\), contiguous", tensors=[torch.zeros(8)[::2]])
    refused(ValueError, r"tensors: shape \(4,\), contiguous", tensors=[torch.zeros(2, 2)])
    refused(TypeError, "tensors: float32 expected, got float16", tensors=[base.half()])
    refused(TypeError, "base: float32, bfloat16 or float16 expected", base=base.double())
    refused(ValueError, "tensors: 1 to 128 expected, got 0", tensors=[], weights=[], keep=[])
    refused(ValueError, "weights and keep: one number for each tensor", weights=[])
    refused(ValueError, "keep: numbers of entries expected, got -1", keep=[-1])
    refused(TypeError, "status: int32 expected, got float32", status=torch.zeros(1))
    refused(ValueError, "status: one element expected", status=torch.zeros(2, dtype=torch.int32))
    refused(TypeError, "meta", tensors=[base.to("meta")])
    refused(ValueError, "isa", isa="sse9")


def test_attributes_serve_where_dlpack_exchange_does_not():
    base, tensors = copies(100, 2, torch.bfloat16)
    one, _ = merge(base, tensors, [1.0, 1.0], [50, 50])
    other, _ = merge(base, tensors, [1.0, 1.0], [50, 50], use_dlpack=False)
    assert torch.equal(one, other)
