"""``low_rank_update_`` on every backend, and the shared random words."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops import backend, low_rank_update_, low_rank_update_reference
from fastedit.ops.philox import philox, round_stochastically, runs_of_words, words
from fastedit.testing.case import normal as random
from fastedit.testing.low_rank import DTYPES, exact, problem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def test_float64_weights_are_served_by_torch():
    weight, left, right = problem(9, 7, 3, FP64)
    target, _ = exact(weight, left.double(), right.double(), 0.5)
    low_rank_update_(weight, left.double(), right.double(), 0.5)
    assert relative_error(weight, target) < 1e-14
    assert backend.served("low_rank_update_") == "torch"


def test_parameters_are_updated_outside_the_graph(served_by, device):
    layer = torch.nn.Linear(6, 9, bias=False, device=device)
    before = layer.weight.detach().clone()
    left, right = random(9, 2, device=device), random(6, 2, device=device)
    version = layer.weight._version
    low_rank_update_(layer.weight, left, right)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight._version > version
    assert relative_error(layer.weight.detach().cpu() - before.cpu(), (left @ right.T).cpu()) < 1e-5


def test_lists(served_by, device):
    sizes = [(5, 4), (6, 3)]
    weights = [random(*s, dtype=BF16, device=device) for s in sizes]
    lefts = [random(s[0], 2, device=device) for s in sizes]
    rights = [random(s[1], 2, device=device) for s in sizes]
    singles = [w.clone() for w in weights]
    norms = [torch.zeros((), device=device) for _ in sizes]
    low_rank_update_(weights, lefts, rights, 0.5, rounding="stochastic", seed=9, out_norm=norms)
    for i, single in enumerate(singles):
        low_rank_update_(single, lefts[i], rights[i], 0.5, rounding="stochastic", seed=9 + i)
        assert torch.equal(single, weights[i])
        assert norms[i] > 0


def test_second_run_gives_the_same_bits(served_by, device):
    weight, left, right = problem(33, 30, 7, BF16, device)
    other = weight.clone()
    low_rank_update_(weight, left, right)
    low_rank_update_(other, left, right)
    assert torch.equal(weight, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"), [(4096, 14336, 100), (1600, 6400, 1), (4096, 11008, 1000)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_real_sizes(name, d_out, d_in, rank, dtype):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    weight, left, right = problem(d_out, d_in, rank, dtype, "cuda")
    target, _ = exact(weight, left, right, 0.02)
    norm = torch.zeros((), device="cuda")
    with backend.use_backend(name):
        low_rank_update_(weight, left, right, 0.02, out_norm=norm)
    best = relative_error(target.to(dtype), target)
    assert relative_error(weight.cpu(), target) < 1.01 * best + 2e-6
    assert norm > 0


# ---- the residual of rounding ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(1, 1, 1), (17, 5, 3), (40, 36, 17)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: str(d).removeprefix("torch."))
def test_weight_and_residual_are_the_float32_result(
    served_by, device, dtype, d_out, d_in, rank, transposed, rounding
):
    weight, left, right = problem(d_out, d_in, rank, dtype, device, transposed)
    target, _ = exact(weight, left, right, 0.7, transposed)
    expected, expected_residual = weight.cpu().clone(), torch.empty(weight.shape)
    options = {"transposed": transposed, "rounding": rounding, "seed": 4}
    residual = torch.full(weight.shape, float("nan"), device=device)
    low_rank_update_(weight, left, right, 0.7, residual=residual, **options)
    assert relative_error(weight.cpu().double() + residual.cpu(), target) < 2e-6
    low_rank_update_reference(expected, left.cpu(), right.cpu(), 0.7, residual=expected_residual, **options)
    assert relative_error(expected.double() + expected_residual, target) < 1e-7


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: str(d).removeprefix("torch."))
def test_carried_residuals_keep_the_sum_of_many_updates(served_by, device, dtype):
    """Each update is far below half a unit; without the carry all of them are lost."""
    weight = torch.ones(6, 7, dtype=dtype, device=device)
    plain, residual = weight.clone(), torch.zeros(6, 7, device=device)
    left, right = torch.full((6, 1), 2.0**-14, device=device), torch.ones(7, 1, device=device)
    for _ in range(8):
        low_rank_update_(weight, left, right, residual=residual, carry=True)
        low_rank_update_(plain, left, right)
    assert (plain == 1).all()
    assert (weight.double() + residual == 1 + 8 * 2.0**-14).all()


def test_residuals_of_any_stride(served_by, device):
    left, right = random(9, 2, device=device, seed=2), random(6, 2, device=device, seed=3)
    views = {
        "both transposed": (
            torch.zeros(6, 9, dtype=BF16, device=device).T,
            torch.empty(6, 9, device=device).T,
        ),
        "one transposed": (torch.zeros(9, 6, dtype=BF16, device=device), torch.empty(6, 9, device=device).T),
        "no contiguous dimension": (
            torch.zeros(18, 12, dtype=BF16, device=device)[::2, ::2],
            torch.empty(18, 12, device=device)[::2, ::2],
        ),
    }
    for name, (weight, residual) in views.items():
        low_rank_update_(weight, left, right, residual=residual)
        assert relative_error((weight.float() + residual).cpu(), (left @ right.T).cpu()) < 2e-6, name


def test_residual_with_nothing_to_add(served_by, device):
    weight = random(5, 4, dtype=BF16, device=device)
    before, residual = weight.clone(), torch.full((5, 4), float("nan"), device=device)
    low_rank_update_(
        weight, torch.ones(5, 0, device=device), torch.ones(4, 0, device=device), residual=residual
    )
    assert torch.equal(weight, before)
    assert (residual == 0).all()


def test_residual_of_what_is_not_finite_is_zero(served_by, device):
    weight = torch.tensor([[float("inf"), float("nan"), 65504.0, 1.0]], dtype=FP16, device=device)
    residual = torch.full((1, 4), float("nan"), device=device)
    update = torch.tensor([[1.0], [1.0], [100.0], [2.0**-20]], device=device)
    low_rank_update_(weight, torch.ones(1, 1, device=device), update, residual=residual)
    assert residual.tolist() == [[0.0, 0.0, 0.0, 2.0**-20]]


# ---- stochastic rounding --------------------------------------------------------------------------------


def test_philox_known_answers():
    """The published test vectors of Philox4x32-10 with a counter whose upper half is 0 (Random123)."""
    assert philox(torch.tensor(0), 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def philox_numpy(counter: int, seed: int) -> list[int]:
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 3, 2**34 + 1])
def test_words_by_element(seed, start):
    got = words(start, 9, seed).tolist()
    assert got == [philox_numpy(i // 4, seed)[i % 4] for i in range(start, start + 9)]
    assert runs_of_words(torch.tensor([start, start + 2]), 5, seed).tolist() == [got[:5], got[2:7]]


@pytest.mark.parametrize("seed", [3, 2**40 + 7, 2**64 - 3, -3], ids=["small", "wide", "top_bit", "negative"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(("d_out", "d_in"), [(8, 12), (7, 11), (36, 40)], ids=["aligned", "odd", "tiles"])
@pytest.mark.parametrize(
    ("dtype", "alpha"),
    [(BF16, 0.75), (FP16, 0.75), (FP16, 0.75 * 2.0**-20)],
    ids=["bfloat16", "float16", "float16_subnormal"],
)
def test_stochastic_rounding_is_the_same_function_everywhere(
    served_by, device, dtype, alpha, d_out, d_in, transposed, seed
):
    """With factors whose product is exact, every backend rounds the same float32 number: bits must agree."""
    weight = torch.zeros(d_in, d_out) if transposed else torch.zeros(d_out, d_in)
    weight = weight.to(dtype).to(device)
    left = (1 + torch.arange(d_out) / 64.0).reshape(-1, 1).to(device)
    right = (1 + torch.arange(d_in) / 128.0).reshape(-1, 1).to(device)
    expected = weight.cpu().clone()
    low_rank_update_reference(expected, left.cpu(), right.cpu(), alpha, transposed, "stochastic", seed)
    low_rank_update_(weight, left, right, alpha, transposed=transposed, rounding="stochastic", seed=seed)
    assert torch.equal(weight.cpu(), expected)


def test_stochastic_rounding_keeps_the_expected_value(served_by, device):
    """An update far below half a unit vanishes when rounding to nearest, and not on average."""
    weight = torch.ones(64, 64, dtype=BF16, device=device)
    left, right = torch.full((64, 1), 2.0**-11, device=device), torch.ones(64, 1, device=device)
    nearest = weight.clone()
    low_rank_update_(nearest, left, right)
    assert (nearest == 1).all()
    low_rank_update_(weight, left, right, rounding="stochastic", seed=1)
    assert set(weight.float().unique().tolist()) == {1.0, 1 + 2.0**-7}
    mean = weight.double().mean().item() - 1
    assert abs(mean - 2.0**-11) < 5 * 2.0**-7 * (1 / 16 * 15 / 16 / 4096) ** 0.5


def test_stochastic_rounding_at_the_ends_of_the_range():
    largest = torch.tensor([3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    random_words = torch.full((7,), 0xFFFF)
    out = round_stochastically(largest, random_words, BF16)
    assert out[:4].float().tolist() == [float("inf"), float("-inf"), float("inf"), float("-inf")]
    assert out[4].isnan()
    assert round_stochastically(largest, torch.zeros(7, dtype=torch.int64), BF16)[0] == torch.finfo(BF16).max
    tiny = torch.tensor([2.0**-24, -(2.0**-26), 1.5 * 2.0**-24])
    down, up = torch.zeros(3, dtype=torch.int64), torch.full((3,), 0x1FFF)
    assert round_stochastically(tiny, down, FP16).tolist() == [2.0**-24, 0.0, 2.0**-24]
    assert round_stochastically(tiny, up, FP16).tolist() == [2.0**-24, -(2.0**-24), 2.0**-23]
    exact_values = random(50, dtype=FP16).float()
    assert torch.equal(
        round_stochastically(exact_values, torch.full((50,), 0x1FFF), FP16).float(), exact_values
    )


# ---- what is refused ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    weight, left, right = problem(5, 4, 2, FP32)
    before = weight.clone()
    for error, match, args, options in [
        (
            ValueError,
            r"left must have shape \(5, 2\) because weight is \(d_out, d_in\)",
            (left[:4], right),
            {},
        ),
        (ValueError, r"right must have shape \(4, 2\) because .* left has rank 2", (left, left), {}),
        (
            ValueError,
            r"left must have shape \(4, 2\) because weight is stored",
            (left, right),
            {"transposed": True},
        ),
        (ValueError, r"left must have 2 dimensions, got shape \(5,\)", (left[:, 0], right), {}),
        (
            ValueError,
            "rounding must be 'nearest' or 'stochastic', got 'up'",
            (left, right),
            {"rounding": "up"},
        ),
        (ValueError, "alpha must be finite, got nan", (left, right), {"alpha": float("nan")}),
        (ValueError, "out_norm must have one element", (left, right), {"out_norm": torch.zeros(2)}),
        (
            TypeError,
            "out_norm must be float32 or float64",
            (left, right),
            {"out_norm": torch.zeros(1, dtype=BF16)},
        ),
        (
            TypeError,
            "weight, where a residual .*, must be .*, got float32",
            (left, right),
            {"residual": weight},
        ),
        (ValueError, "carry needs the residual", (left, right), {"carry": True}),
        (TypeError, "left must be .*, got int64", (left.long(), right), {}),
        (TypeError, "right must be a tensor, got NoneType", (left, None), {}),
        (ValueError, "right must be on cpu like weight, got meta", (left, right.to("meta")), {}),
    ]:
        with pytest.raises(error, match="low_rank_update_: " + match):
            low_rank_update_(weight, *args, **options)
    with pytest.raises(
        ValueError, match="lists must have one length, got 1 weight, 2 left, 1 right, 1 out_norm, 1 residual"
    ):
        low_rank_update_([weight], [left, left], [right])
    with pytest.raises(TypeError, match="left must be a list of tensors like weight"):
        low_rank_update_([weight], left, [right])
    assert torch.equal(weight, before)


def test_a_bad_item_leaves_all_weights_as_they_were():
    weights = [torch.zeros(3, 2), torch.zeros(3, 2)]
    with pytest.raises(ValueError, match="right must have shape"):
        low_rank_update_(weights, [torch.ones(3, 1)] * 2, [torch.ones(2, 1), torch.ones(3, 1)])
    assert not weights[0].any()


def test_shared_memory_is_refused():
    weight = torch.zeros(6, 6)
    with pytest.raises(ValueError, match="weight is written and must not share memory with left"):
        low_rank_update_(weight, weight[:, :2], torch.ones(6, 2))
    half = torch.zeros(6, 6, dtype=BF16)
    with pytest.raises(ValueError, match="residual is written and must not share memory with left"):
        square = torch.zeros(6, 6)
        low_rank_update_(half, square[:, :2], torch.ones(6, 2), residual=square)
    with pytest.raises(ValueError, match="residual must have shape"):
        low_rank_update_(half, torch.ones(6, 2), torch.ones(6, 2), residual=torch.zeros(6, 5))
    with pytest.raises(ValueError, match="several of its elements share one place"):
        low_rank_update_(torch.zeros(6).expand(6, 6), torch.ones(6, 2), torch.ones(6, 2))


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    op = torch.ops.fastedit.low_rank_update_.default
    weight, left, right = problem(5, 4, 2, BF16)
    with backend.use_backend("torch"):
        torch.library.opcheck(op, (weight, left, right))
        torch.library.opcheck(
            op, (weight.T.contiguous(), left, right, 0.5, True, "stochastic", 3, torch.zeros(()))
        )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weight, left, right, norm):
        low_rank_update_(weight, 2 * left, right, 0.5, out_norm=norm)
        return weight.sum() + norm

    weight, left, right = problem(5, 4, 2, FP32)
    norm = torch.zeros(())
    target, delta = exact(weight, left, right)
    total = step(weight, left, right, norm)
    assert relative_error(weight, target) < 1e-6
    assert relative_error(norm, delta.norm()) < 1e-6
    assert relative_error(total, target.sum() + delta.norm()) < 1e-5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    rank=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    alpha=st.floats(-4, 4, width=32),
)
def test_torch_and_the_automatic_choice_agree(d_out, d_in, rank, dtype, transposed, alpha):
    weight, left, right = problem(d_out, d_in, rank, dtype, transposed=transposed)
    target, _ = exact(weight, left, right, alpha, transposed)
    size = weight.double().norm() + abs(alpha) * left.norm() * right.norm()  # they may cancel in the result
    for name in ("torch", None):
        out = weight.clone()
        if name is None:
            low_rank_update_(out, left, right, alpha, transposed=transposed)
        else:
            with backend.use_backend(name):
                low_rank_update_(out, left, right, alpha, transposed=transposed)
        assert (out.double() - target).norm() <= {BF16: 5e-3, FP16: 6e-4, FP32: 1e-6}[dtype] * size
