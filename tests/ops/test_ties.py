"""``ties_merge`` on every backend: the bits of the reference in float32, and float64 from the rounded inputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit
from fastedit.ops import backend, ties_merge, ties_merge_reference
from fastedit.ops.ties import VARIANTS
from fastedit.testing.ties import DTYPES, copies, expected, options_of, weights_of

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def skip_unsupported(served_by, base):
    try:
        backend.choose("ties_merge", base)
    except fastedit.BackendUnavailable as reason:
        pytest.skip(str(reason))


# ---- results --------------------------------------------------------------------------------------------


def test_exactly_k_entries_are_kept_the_lowest_indices_of_those_tied(served_by, device):
    base = torch.zeros(10, device=device)
    tensor = torch.tensor([1.0, -3.0, 1.0, 2.0, -1.0, 1.0, 0.0, 1.0, -1.0, 0.5], device=device)
    merged = ties_merge([tensor], None, 0.5, base)
    assert merged.tolist() == [1.0, -3.0, 1.0, 2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    merged = ties_merge([tensor], None, 0.5, base, at_threshold="all")
    assert merged.tolist() == [1.0, -3.0, 1.0, 2.0, -1.0, 1.0, 0.0, 1.0, -1.0, 0.0]


def test_by_hand(served_by, device):
    base = torch.tensor([10.0, 10.0, 10.0, 10.0], device=device)
    first = torch.tensor([12.0, 9.0, 10.0, 11.0], device=device)  # +2 -1 0 +1
    second = torch.tensor([11.0, 13.0, 10.0, 9.0], device=device)  # +1 +3 0 -1
    tensors = [first, second]
    assert ties_merge(tensors, [1.0, 3.0], 1.0, base).tolist() == [11.25, 13.0, 10.0, 9.0]
    assert ties_merge(tensors, [1.0, 1.0], 1.0, base).tolist() == [11.5, 13.0, 10.0, 11.0]
    assert ties_merge(tensors, None, 1.0, base, variant="magnitude").tolist() == [13.0, 12.0, 10.0, 10.0]
    normalised = ties_merge(tensors, None, 1.0, base, variant="magnitude", normalise=True)
    assert normalised.tolist() == [11.5, 11.0, 10.0, 10.0]
    assert ties_merge(tensors, None, 1.0, base, normalise=False).tolist() == [13.0, 13.0, 10.0, 11.0]
    original = ties_merge(tensors, None, 1.0, base, variant="ties_original", scale=0.5)
    assert original.tolist() == [10.75, 11.5, 10.0, 10.5]


def test_the_documented_example(capsys):
    page = Path(__file__).parents[2] / "docs" / "ops" / "ties.md"
    if not page.exists():
        pytest.skip("not a source tree: no docs/")
    exec(page.read_text().split("```python")[1].split("```")[0], {})
    assert capsys.readouterr().out == "tensor([1.5000, 3.0000, 0.0000, 1.0000])\n"


def test_original_resolves_zero_sums_by_the_majority(served_by, device):
    base = torch.zeros(5, device=device)
    tensors = [torch.tensor([1.0, 0.0, v, v, -v], device=device) for v in (-2.0, -3.0)]
    tensors[1][0] = -1.0  # the sums: 0, 0, -5, -5, +5
    assert ties_merge(tensors, None, 1.0, base, variant="ties_original")[:2].tolist() == [-1.0, 0.0]
    assert ties_merge(tensors, None, 1.0, base)[:2].tolist() == [1.0, 0.0]
    flipped = [-t for t in tensors]
    assert ties_merge(flipped, None, 1.0, base, variant="ties_original")[0].item() == 1.0


def test_weights_that_cancel_divide_by_one(served_by, device):
    base = torch.zeros(2, device=device)
    tensors = [torch.tensor([2.0, 1.0], device=device), torch.tensor([-3.0, 1.0], device=device)]
    assert ties_merge(tensors, [1.0, -1.0], 1.0, base).tolist() == [5.0, 1.0]
    assert ties_merge(tensors, [1.0, -1.0], 1.0, base, variant="magnitude", normalise=True).tolist() == [
        5.0,
        0.0,
    ]
    assert ties_merge(tensors, [0.0, 1.0], 1.0, base).tolist() == [-3.0, 1.0]


def test_against_float64(served_by, device):
    """Edits on a grid, so that float32 sums are exact and both elect alike: one rounding is left."""
    base, tensors = copies(500, 4, FP32, device, step=2.0**-7)
    base.mul_(2**10).round_().mul_(2.0**-10)
    tensors = [base + (t - base).mul(2**7).round() * 2.0**-7 for t in tensors]
    merged = ties_merge(tensors, [1.0, 0.5, 2.0, 1.0], 0.4, base)
    doubles = [t.cpu().double() for t in tensors]
    reference = ties_merge_reference(doubles, [1.0, 0.5, 2.0, 1.0], 0.4, base.cpu().double())
    assert (merged.cpu().double() - reference).abs().max() <= 4 * torch.finfo(FP32).eps


def test_fewer_changed_entries_than_kept_trims_nothing(served_by, device):
    base, tensors = copies(700, 2, FP32, device, share=0.3)
    assert torch.equal(ties_merge(tensors, None, 0.53, base), ties_merge(tensors, None, 1.0, base))


def test_inputs_are_not_changed_and_the_second_run_gives_the_same_bits(served_by, device):
    base, tensors = copies(800, 3, FP16, device)
    skip_unsupported(served_by, base)
    before = [t.clone() for t in (base, *tensors)]
    first = ties_merge(tensors, [1.0, 0.3, 0.7], 0.37, base)
    second = ties_merge(tensors, [1.0, 0.3, 0.7], 0.37, base)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *tensors), strict=True))


def test_parameters_serve_and_no_gradient_is_recorded(served_by, device):
    base, tensors = copies(40, 2, FP32, device)
    merged = ties_merge([torch.nn.Parameter(t) for t in tensors], None, 0.5, torch.nn.Parameter(base))
    assert torch.equal(merged.detach().cpu(), expected(base, tensors, None, 0.5))


# ---- what is not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_not_finite_raises_or_poisons(served_by, device, value, density):
    base, tensors = copies(300, 3, FP32, device)
    tensors[1][299] = value
    tensors[2][5] = value
    with pytest.raises(ValueError, match=r"ties_merge: tensors\[1\], base or their difference"):
        ties_merge(tensors, None, density, base)
    assert ties_merge(tensors, None, density, base, nonfinite="nan").isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # Triton's interpreter computes with NumPy
def test_a_base_or_a_difference_that_is_not_finite(served_by, device):
    base, tensors = copies(30, 2, FP32, device)
    base[7] = math.nan
    with pytest.raises(ValueError, match=r"tensors\[0\]"):
        ties_merge(tensors, None, 0.5, base)
    with pytest.raises(ValueError, match=r"tensors\[0\]"):
        ties_merge([torch.full((3,), 3e38, device=device)], None, 0.5, torch.full((3,), -3e38, device=device))


# ---- what is refused ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    base = torch.zeros(4)
    good = [torch.ones(4), torch.ones(4)]

    def refused(error, match, tensors=good, weights=None, density=0.5, base=base, **options):
        with pytest.raises(error, match=match):
            ties_merge(tensors, weights, density, base, **options)

    refused(ValueError, "ties_merge: tensors must be 1 to 128 tensors, got 0", tensors=[])
    refused(ValueError, "got 129", tensors=[base] * 129)
    refused(TypeError, "tensors must be a list of tensors, got one tensor", tensors=base)
    refused(TypeError, r"tensors\[1\] must be a tensor, got int", tensors=[base, 1])
    refused(ValueError, r"tensors\[1\] must have shape \(4,\) like base, got \(5,\)", [base, torch.ones(5)])
    refused(TypeError, r"tensors\[0\] must be float32, got float16", tensors=[base.half()])
    refused(TypeError, "base must be .* or float64, got int64", base=base.long())
    refused(ValueError, r"tensors\[0\] must be on cpu like base, got meta", tensors=[base.to("meta")])
    refused(ValueError, "weights must have one number for each of 2 tensors, got 1", weights=[1.0])
    refused(ValueError, "density must have one number for each of 2 tensors, got 3", density=[0.1] * 3)
    refused(ValueError, "weights must be finite", weights=[1.0, math.nan])
    refused(ValueError, "density must be above 0, got 0.0", density=0.0)
    refused(ValueError, "variant must be 'ties', 'magnitude', 'sign' or 'ties_original'", variant="dare")
    refused(ValueError, "at_threshold must be", at_threshold="random")
    refused(ValueError, "nonfinite must be", nonfinite="ignore")
    refused(ValueError, "the variant 'sign' does not trim", variant="sign")
    refused(ValueError, "unweighted mean", weights=[1.0, 2.0], variant="ties_original")
    refused(ValueError, "scale is the λ of the variant", scale=0.5)


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    op = torch.ops.fastedit.ties_merge.default
    base, tensors = copies(40, 2, FP32)
    with backend.use_backend("torch"):
        torch.library.opcheck(op, (base, tensors, [1.0, 2.0], [0.5, 0.5]))


def test_compiles_into_one_graph_and_follows_the_choice_at_run_time():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors, base):
        return ties_merge(tensors, [1.0, 0.5], 0.5, base) * 2

    base, tensors = copies(50, 2, FP32)
    reference = 2 * expected(base, tensors, [1.0, 0.5], 0.5)
    with backend.use_backend("torch"):
        assert torch.equal(step(tensors, base), reference)
        assert backend.served("ties_merge") == "torch"
    assert torch.equal(step(tensors, base), reference)
    assert backend.served("ties_merge") == backend.choose("ties_merge", base)


def test_fake_tensors_are_checked_and_not_computed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        base, tensor = torch.zeros(4, 6), torch.ones(4, 6)
        assert ties_merge([tensor, tensor.T.contiguous().T], None, 0.5, base).shape == (4, 6)
        with pytest.raises(ValueError, match="must have shape"):
            ties_merge([tensor[:3]], None, 0.5, base)


# ---- properties -----------------------------------------------------------------------------------------


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 90),
    m=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(VARIANTS),
    density=st.floats(0.01, 1.2),
    at_threshold=st.sampled_from(["lowest_index", "all"]),
    step=st.sampled_from([0.01, 0.5, 4.0]),
    seed=st.integers(0, 100),
)
def test_any_input_agrees_with_the_reference(n, m, dtype, variant, density, at_threshold, step, seed):
    base, tensors = copies(n, m, dtype, seed=seed, step=step)
    density = 1.0 if variant == "sign" else density
    options = {**options_of(variant), "at_threshold": at_threshold}
    reference = expected(base, tensors, weights_of(variant, m), density, **options)
    for name in ("torch", None):
        if name is None:
            merged = ties_merge(tensors, weights_of(variant, m), density, base, **options)
        else:
            with backend.use_backend(name):
                merged = ties_merge(tensors, weights_of(variant, m), density, base, **options)
        assert torch.equal(merged, reference)


# ---- on a GPU -------------------------------------------------------------------------------------------


def need(name):
    if reason := backend.missing(name, torch.device("cuda"), True):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("step", [0.25, 1e-4], ids=["ties", "distinct"])
@pytest.mark.parametrize("variant", ["ties", "magnitude", "ties_original"])
def test_real_sizes(name, dtype, step, variant):
    need(name)
    base, tensors = copies(3_000_001, 3, dtype, "cuda", step=step)
    merged_reference = expected(base, tensors, None, 0.53, variant=variant)
    with backend.use_backend(name):
        merged = ties_merge(tensors, None, 0.53, base, variant=variant)
        assert torch.equal(merged, ties_merge(tensors, None, 0.53, base, variant=variant))
    assert torch.equal(merged.cpu(), merged_reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_bracket_that_misses(name):
    """All entries near the threshold in one place: more than a tile or a range collects."""
    need(name)
    n = 1 << 21
    tensor = torch.linspace(0, 1, n, device="cuda")
    base = torch.zeros_like(tensor)
    with backend.use_backend(name):
        merged = ties_merge([tensor], None, 0.4, base)
    assert torch.equal(merged.cpu(), expected(base, [tensor], None, 0.4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_another_stream_and_a_captured_graph(name):
    need(name)
    base, tensors = copies(200_000, 2, FP32, "cuda")
    reference = expected(base, tensors, None, 0.53)
    with backend.use_backend(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            merged = ties_merge(tensors, None, 0.53, base)
        stream.synchronize()
        assert torch.equal(merged.cpu(), reference)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            merged = ties_merge(tensors, None, 0.53, base, nonfinite="nan")
        for seed in (1, 2):
            new_base, new_tensors = copies(200_000, 2, FP32, "cuda", seed=seed)
            for to, new in zip((base, *tensors), (new_base, *new_tensors), strict=True):
                to.copy_(new)
            graph.replay()
            assert torch.equal(merged.cpu(), expected(base, tensors, None, 0.53))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_than_2_to_the_31_entries(name):
    need(name)
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("needs 26 GB of free GPU memory")
    base = torch.zeros(n, dtype=BF16, device="cuda")
    tensor = base.clone()
    tensor[-5:] = 3.0
    tensor[::4099] = 1.0
    kept = -(-n // 4099)
    with backend.use_backend(name):
        merged = ties_merge([tensor], None, (kept - 2) / n, base)
    assert merged[-5:].tolist() == [3.0] * 5
    assert (merged != 0).sum().item() == int((kept - 2) / n * n)
