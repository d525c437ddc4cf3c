"""fastedit._C.routing_score on the CPU, each instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch

from fastedit.ops import routing_score_reference

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]
ISAS = ORDER[: ORDER.index(_C.info()["cpu_isa"]) + 1]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "identity")
# (tokens, d_in, d_out) around vectors (4, 8, 16), panels (8, 16, 64), chunks (8, 64, 256), tasks (8, 24, 32, 96, 512)
SHAPES = [
    (1, 1, 1), (1, 257, 33), (2, 300, 31), (3, 256, 515), (5, 40, 97), (8, 511, 20), (9, 65, 25), (16, 64, 96),
    (40, 259, 23), (64, 130, 100), (65, 31, 49), (130, 33, 24), (300, 20, 7),
]  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def problem(n_tokens, d_in, d_out, dtype, transposed, seed=0):
    torch.manual_seed(seed)
    base = torch.randn(d_out, d_in) / d_in**0.5
    memories = [(base + 0.2 * torch.randn(d_out, d_in) / d_in**0.5).to(dtype) for _ in range(2)]
    weights = [base.to(dtype), *memories]
    if transposed:
        weights = [w.T.contiguous() for w in weights]
    return torch.randn(n_tokens, d_in).to(dtype), weights, torch.randn(d_out)


def check(isa, x, weights, bias, activation, transposed):
    scores = torch.full((x.shape[0], len(weights) - 1), float("nan"))
    _C.routing_score(x, weights[0], weights[1:], scores, activation, transposed, bias, isa=isa)
    args = (activation, transposed, bias)
    reference = routing_score_reference(x, weights[0], weights[1:], *args)
    scale = routing_score_reference(x, weights[0], [torch.zeros_like(weights[0])], *args).norm()
    assert (scores - reference).abs().max() <= 2e-6 * (scale / x.shape[0] ** 0.5 + reference.norm())
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(isa, shape, transposed, dtype):
    x, weights, bias = problem(*shape, dtype, transposed)
    activation = ACTIVATIONS[sum(shape) % len(ACTIVATIONS)]
    check(isa, x, weights, bias if transposed else None, activation, transposed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(isa, activation):
    x = torch.linspace(-60, 60, 997)[:, None]
    one = torch.ones(1, 1)
    scores = torch.empty(997, 1)
    _C.routing_score(x, 0 * one, [one], scores, activation, isa=isa)
    expected = routing_score_reference(x, 0 * one, [one], activation)
    assert ((scores - expected).abs() <= 4e-7 * expected + 1e-7).all()


@pytest.mark.parametrize("shape", [(3, 700, 200), (70, 40, 100), (300, 40, 60)], ids=["few", "many", "tasks"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
def test_same_bits_for_any_number_of_threads(shape, transposed):
    x, weights, bias = problem(*shape, torch.bfloat16, transposed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = torch.empty(shape[0], 2)
            _C.routing_score(x, weights[0], weights[1:], scores, "silu", transposed, bias)
            results.append(scores)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_scratch_of_an_earlier_call_does_not_matter(isa):
    big_x, big_weights, _ = problem(70, 300, 100, torch.float32, False)
    poison = torch.full_like(big_x, float("nan"))
    for n_tokens in (1, 3, 20):
        for transposed in (False, True):
            scores = torch.empty(70, 2)
            _C.routing_score(poison, big_weights[0], big_weights[1:], scores, "silu", isa=isa)
            assert scores.isnan().all()
            x, weights, bias = problem(n_tokens, 45, 37, torch.bfloat16, transposed)
            check(isa, x, weights, bias, "silu", transposed)


def test_surroundings_are_kept(isa):
    x, weights, bias = problem(5, 20, 30, torch.float32, False)
    store = torch.full((7, 2), -1.0)
    _C.routing_score(x, weights[0], weights[1:], store[1:6], "silu", False, bias, isa=isa)
    assert (store[0] == -1).all()
    assert (store[6] == -1).all()


def test_attributes_serve_where_dlpack_exchange_does_not():
    x, weights, bias = problem(5, 20, 30, torch.float32, False)
    one, other = torch.empty(5, 2), torch.empty(5, 2)
    _C.routing_score(x, weights[0], weights[1:], one, "silu", False, bias)
    _C.routing_score(x, weights[0], weights[1:], other, "silu", False, bias, use_dlpack=False)
    assert torch.equal(one, other)


def test_arguments_that_would_leave_memory_are_refused():
    x, (base, *memories), bias = problem(3, 4, 5, torch.float32, False)
    scores = torch.zeros(3, 2)
    turned, half = [base.T.contiguous()], torch.zeros(3, 4)[:, :2]
    cases = [
        (ValueError, r"x: shape \(3, 4\) expected, got \(3, 5\)", (torch.ones(3, 5), base, memories, scores)),
        (ValueError, r"memories: shape \(5, 4\) expected, got \(4, 5\)", (x, base, turned, scores)),
        (ValueError, r"scores: shape \(3, 2\) expected, got \(2, 3\)", (x, base, memories, scores.T)),
        (ValueError, "scores: must be contiguous", (x, base, memories, half)),
        (ValueError, "x: last dimension must be contiguous", (torch.ones(4, 3).T, base, memories, scores)),
        (TypeError, "base_weight: float32, bfloat16 or float16", (x, base.double(), memories, scores)),
        (TypeError, "scores: float32 expected", (x, base, memories, scores.double())),
    ]
    for error, match, args in cases:
        with pytest.raises(error, match=match):
            _C.routing_score(*args, "silu")
    args = (x, base, memories, scores)
    with pytest.raises(ValueError, match=r"bias: shape \(5,\), contiguous"):
        _C.routing_score(*args, "silu", False, torch.ones(4))
    with pytest.raises(TypeError, match="bias: float32 expected"):
        _C.routing_score(*args, "silu", False, bias.double())
    with pytest.raises(ValueError, match="activation: identity, relu"):
        _C.routing_score(*args, "tanh")
    with pytest.raises(ValueError, match="isa"):
        _C.routing_score(x, base, memories, scores, "silu", isa="sse9")
