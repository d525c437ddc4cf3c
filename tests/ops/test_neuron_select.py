"""``neuron_select``, ``neuron_scores``, ``gather_square`` on every backend: equal to the reference, bit for bit."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit
from fastedit.ops import (
    backend,
    check,
    gather_square,
    gather_square_reference,
    neuron_scores,
    neuron_scores_reference,
    neuron_select,
    neuron_select_keys,
    neuron_select_reference,
)
from fastedit.testing.neuron_select import RULES, rows

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (BF16, FP16, FP32, FP64)]
NAN, INF = float("nan"), float("inf")


def same(out, reference):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(out, reference, strict=True))


def exact_count(row, mass, rule, total=None):
    """How many of the largest scores the rule takes, in exact arithmetic, for one rounded target."""
    values = sorted((Fraction(v) for v in row), reverse=True)
    target = Fraction(mass * float(sum(values)))
    prefix, count = Fraction(0), 0
    for value in values:
        if (prefix >= target) if rule == "at_least" else (prefix + value > target):
            break
        prefix, count = prefix + value, count + 1
    return max(count, 1)


# ---- selection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_hand_made_rows(served_by, device, rule):
    rest = [-1] * 4
    cases = [  # scores, mass, indices at_least, indices prefix
        ([1, 4, 2, 3], 0.7, [1, 3], [1, 3]),  # 7 of 10, exactly
        ([1, 4, 2, 3], 0.71, [1, 2, 3], [1, 3]),
        ([1, 4, 2, 3], 0.69, [1, 3], [1]),
        ([9, 1, 0, 0], 0.5, [0], [0]),  # the largest alone is too much: never empty
        ([2, 2, 2, 2], 0.5, [0, 1], [0, 1]),  # ties: the lowest indices
        ([2, 2, 2, 2], 0.51, [0, 1, 2], [0, 1]),
        ([1, 2, 2, 2], 0.4, [1, 2], [1]),
        ([1, 2, 2, 2], 0.1, [1], [1]),
        ([0, 0, 0, 0], 0.5, [0], [0, 1, 2, 3]),  # all prefixes of nothing hold nothing
        ([-0.0, 0, 3, -0.0], 0.99, [2], [2]),
        ([0, 5, 0, 1], 1.0, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 5, 0, 1], 3.0, [0, 1, 2, 3], [0, 1, 2, 3]),
    ]
    for row, mass, at_least, prefix in cases:
        expected = at_least if rule == "at_least" else prefix
        mask, indices, counts = neuron_select(torch.tensor(row, dtype=FP32, device=device), mass, rule=rule)
        assert (indices.tolist(), int(counts)) == ((expected + rest)[:4], len(expected)), (row, mass)
        assert mask.nonzero().flatten().tolist() == expected


def test_tenths_fall_where_one_expects(served_by, device):
    """Ten equal scores: p = k/10 takes k, although neither the scores nor p are decimal."""
    scores = torch.full((1, 10), 0.1, device=device)
    for k in (1, 2, 3, 7, 9):
        for rule in RULES:
            assert int(neuron_select(scores, k / 10, rule=rule).counts) == k


@pytest.mark.parametrize("rule", RULES)
def test_near_ties_are_decided_exactly(served_by, device, rule):
    """Targets at, just below and just above a prefix sum; orders of addition that would round differently."""
    generator = torch.Generator().manual_seed(1)
    row = torch.rand(60, generator=generator) + 2.0**-20
    row[::3] = row[0]
    total = math.fsum(row.tolist())
    prefix = row.sort(descending=True).values.double().cumsum(0)
    for k in (0, 7, 21, 58):
        share = prefix[k].item() / total
        for mass in (share, math.nextafter(share, 0), math.nextafter(share, 1)):
            expected = exact_count(row.tolist(), mass, rule)
            assert int(neuron_select(row.to(device), mass, rule=rule).counts) == expected


@pytest.mark.parametrize("dtype", [FP16, FP32, FP64], ids=["float16", "float32", "float64"])
def test_tiny_and_huge_scores(served_by, device, dtype):
    limits = torch.finfo(dtype)
    base = torch.arange(1, 20).to(FP64)
    cases = {
        "subnormal": (base * limits.smallest_normal / 64).to(dtype),
        "huge": (base * (limits.max / 32)).to(dtype),
        "both": torch.cat([base * (limits.max / 32), base * limits.smallest_normal]).to(dtype),
    }
    for name, scores in cases.items():
        for mass in (0.3, 0.8, 1 - 2.0**-53):
            for rule in RULES:
                out = neuron_select(scores.to(device), mass, rule=rule)
                assert same(out, neuron_select_reference(scores, mass, rule)), (name, mass, rule)


def test_tiny_and_extreme_shares(served_by, device):
    scores = rows(1, 20, "ties")
    for mass in (5e-324, 1e-300, 1 - 2.0**-53, 1.0, INF):
        for rule in RULES:
            out = neuron_select(scores.to(device), mass, rule=rule)
            assert same(out, neuron_select_reference(scores, mass, rule)), (mass, rule)


def test_a_row_longer_than_a_triton_program_holds(monkeypatch):
    kernels = pytest.importorskip("fastedit.kernels.neuron_select")
    monkeypatch.setattr(kernels, "_HELD", 0)
    monkeypatch.setattr(kernels, "_CHUNK", 32)
    with backend.use_backend("triton"):
        for dtype in (FP16, FP32):
            scores = rows(1, 70, "ties").to(dtype)
            try:
                backend.choose("neuron_select", scores)
            except fastedit.BackendUnavailable as reason:
                pytest.skip(str(reason))
            for rule in RULES:
                assert same(neuron_select(scores, 0.6, rule=rule), neuron_select_reference(scores, 0.6, rule))


def test_agrees_with_a_plain_float64_sort():
    """What one would write by hand, on data where no two sums are nearly equal."""
    for kind in ("normal", "heavy"):
        scores = rows(4, 6000, kind)
        ordered = scores.double().sort(dim=1, descending=True)
        before = ordered.values.cumsum(1) - ordered.values
        total = ordered.values.sum(1, keepdim=True)
        for mass in (0.2, 0.8, 0.99):
            keep = before < mass * total
            mask = torch.zeros_like(keep).scatter_(1, ordered.indices, keep)
            assert torch.equal(neuron_select(scores, mass).mask, mask)


def test_a_copy_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(check, "_said", set())
    scores = torch.ones(2, 3, 4).transpose(0, 1)
    with backend.use_backend("cpp"), caplog.at_level(logging.WARNING, "fastedit.ops"):
        try:
            backend.choose("neuron_select", scores)
        except fastedit.BackendUnavailable as reason:
            pytest.skip(str(reason))
        neuron_select(scores[0], 0.5)
        neuron_select(torch.ones(4, 6).T, 0.5)
        assert not caplog.records
        for _ in range(2):
            neuron_select(scores, 0.5)
    assert len(caplog.records) == 1
    assert "are copied" in caplog.text


# ---- scores ---------------------------------------------------------------------------------------------


def test_selection_by_keys(served_by, device):
    keys = rows(50, 9, "normal").to(device) - 0.5
    out = neuron_select_keys(keys, 0.6, rule="prefix")
    assert same(out, neuron_select_reference(keys.cpu().double().abs().sum(1), 0.6, "prefix"))


# ---- squares --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_indices_outside(served_by, device, index):
    matrix = torch.ones(4, 4, device=device)
    indices = torch.tensor([0, index], device=device)
    if served_by in ("torch", "cpp"):
        with pytest.raises(IndexError, match=r"every index must be in \[0, 4\)"):
            gather_square(matrix, indices)
    else:  # on a GPU nothing waits to look
        out = gather_square(matrix, indices)
        assert out.isnan().tolist() == [[False, True], [True, True]]


def test_selection_feeds_the_square(served_by, device):
    scores = rows(1, 30, "normal").to(device)[0]
    matrix = torch.randn(30, 30, device=device)
    mask, indices, count = neuron_select(scores, 0.8)
    assert torch.equal(gather_square(matrix, indices[: int(count)]), matrix[mask][:, mask])


# ---- all ------------------------------------------------------------------------------------------------


def test_second_run_gives_the_same_bits(served_by, device):
    scores, matrix = rows(3, 90, "ties").to(device), torch.randn(90, 90, device=device)
    assert same(neuron_select(scores, 0.7), neuron_select(scores, 0.7))
    assert torch.equal(neuron_scores(matrix), neuron_scores(matrix))


def test_wrong_arguments_are_named():
    scores, matrix = torch.ones(2, 3), torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"neuron_select: scores must have shape \(..., d\), got \(\)"):
        neuron_select(torch.tensor(1.0), 0.5)
    with pytest.raises(TypeError, match="neuron_select: scores must be .* or float64, got int64"):
        neuron_select(scores.long(), 0.5)
    with pytest.raises(TypeError, match="neuron_select: scores must be a tensor, got list"):
        neuron_select([1.0], 0.5)
    with pytest.raises(ValueError, match="rule must be 'at_least' or 'prefix', got 'top'"):
        neuron_select(scores, 0.5, rule="top")
    for mass in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="mass must be a positive share"):
            neuron_select(scores, mass)
    with pytest.raises(ValueError, match="at most 2\\^30 columns"):
        neuron_select(torch.ones(1).expand(2**30 + 1), 0.5)
    with pytest.raises(ValueError, match="neuron_scores: keys must have 2 dimensions"):
        neuron_scores(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"gather_square: matrix must be a square matrix, got shape \(2, 3\)"
    ):
        gather_square(scores, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"indices must have 1 dimension, got shape \(1, 1\)"):
        gather_square(matrix, torch.tensor([[0]]))
    with pytest.raises(TypeError, match="gather_square: indices must be int32 or int64, got bool"):
        gather_square(matrix, torch.tensor([True]))
    with pytest.raises(ValueError, match="indices must be on cpu like matrix, got meta"):
        gather_square(matrix, torch.tensor([0], device="meta"))


def test_opcheck():
    scores = torch.rand(2, 5)
    with backend.use_backend("torch"):
        torch.library.opcheck(torch.ops.fastedit.neuron_select.default, (scores, 0.5, "prefix"))
        torch.library.opcheck(torch.ops.fastedit.neuron_scores.default, (scores,))
        torch.library.opcheck(
            torch.ops.fastedit.gather_square.default, (torch.rand(5, 5), torch.tensor([0, 3]))
        )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(keys, matrix, fixed):
        mask, indices, counts = neuron_select_keys(2 * keys, 0.8)
        return mask, indices, counts, gather_square(matrix, fixed)

    keys, matrix, fixed = torch.randn(12, 4), torch.randn(12, 12), torch.tensor([5, 1])
    *selection, square = step(keys, matrix, fixed)
    assert same(selection, neuron_select_reference(keys.double().abs().sum(1), 0.8))
    assert torch.equal(square, gather_square_reference(matrix, fixed))


def test_parameters_and_inference_mode():
    keys = torch.nn.Parameter(torch.randn(6, 3))
    with torch.inference_mode():
        assert same(neuron_select_keys(keys, 0.5), neuron_select_keys(keys.detach(), 0.5))


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
    mass=st.floats(0.0, 1.2, exclude_min=True),
    rule=st.sampled_from(RULES),
)  # fmt: skip
def test_any_row_agrees_with_the_reference(values, mass, rule):
    for dtype in (FP32, FP64):
        scores = torch.tensor(values, dtype=dtype)
        with backend.use_backend("torch"):
            reference = neuron_select(scores, mass, rule=rule)
        assert same(neuron_select(scores, mass, rule=rule), reference)
        assert int(reference.counts) == int(reference.mask.sum()) >= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(1, 2**20), min_size=1, max_size=40),
    mass=st.floats(0.001, 0.999),
    rule=st.sampled_from(RULES),
)
def test_scores_on_the_grid_are_decided_in_exact_arithmetic(values, mass, rule):
    scores = torch.tensor(values, dtype=FP32)
    assert int(neuron_select(scores, mass, rule=rule).counts) == exact_count(values, mass, rule)


def test_the_example_of_the_documentation_runs():
    page = Path(__file__).resolve().parents[2] / "docs" / "ops" / "neuron_select.md"
    if not page.exists():
        pytest.skip("not a source tree: no docs")
    names = {}
    exec(page.read_text().split("```python\n")[1].split("```")[0], names)
    assert torch.equal(names["system"], torch.eye(int(names["count"])))


# ---- on a GPU -------------------------------------------------------------------------------------------


def gpu_backend(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return backend.use_backend(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("d", [6400, 11008, 14336, 18944, 70000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(name, d, dtype):
    with gpu_backend(name):
        for kind in ("normal", "heavy", "ties"):
            scores = rows(3, d, kind).to(dtype)
            for rule in RULES:
                out = neuron_select(scores.cuda(), 0.8, rule=rule)
                assert same(out, neuron_select_reference(scores, 0.8, rule)), (kind, rule)
        keys = rows(d, 5, "heavy").to(dtype)
        assert torch.equal(neuron_scores(keys.cuda()).cpu(), neuron_scores_reference(keys))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_captured_in_a_graph_and_on_another_stream(name):
    scores = rows(4, 3000, "normal").cuda()
    keys = rows(3000, 8, "heavy").cuda()
    expected = neuron_select_reference(scores.cpu(), 0.8)
    with gpu_backend(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert same(neuron_select(scores, 0.8), expected)
            neuron_scores(keys)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # fails on anything that waits for the host
            out = neuron_select(scores, 0.8)
            sums = neuron_scores(keys)
        scores.copy_(rows(4, 3000, "ties"))
        graph.replay()
        torch.cuda.synchronize()
    assert same(out, neuron_select_reference(scores.cpu(), 0.8))
    assert torch.equal(sums.cpu(), neuron_scores_reference(keys.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
def test_more_than_2_31_elements(name):
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    d = 46400  # d² > 2^31
    with gpu_backend(name):
        matrix = torch.zeros(d, d, dtype=BF16, device="cuda")
        indices = torch.tensor([0, d // 2, d - 1], device="cuda")
        matrix[indices[:, None], indices] = torch.arange(9.0, device="cuda").view(3, 3).to(BF16)
        assert gather_square(matrix, indices).float().cpu().flatten().tolist() == list(range(9))
        far = matrix.view(-1).as_strided((3, 50), (2**30, 1))
        far.copy_(rows(3, 50, "normal").to(BF16))
        assert same(neuron_select(far, 0.8), neuron_select_reference(far.cpu(), 0.8))
