"""``routing_score`` on every backend against float64 from the rounded inputs; the decisions of ``route``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit
from fastedit.ops import backend, route, routing_score, routing_score_reference
from fastedit.testing.routing import ACTIVATIONS, error, layer, tokens

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def test_names_of_transformers_mean_the_same(served_by, device):
    base, memories = layer(16, 8, FP32, 1, device=device)
    x = tokens(2, 16, device=device)
    aliases = {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "swish": "silu",
        "linear": "identity",
    }
    for alias, name in aliases.items():
        assert torch.equal(routing_score(x, base, memories, alias), routing_score(x, base, memories, name))


@pytest.mark.parametrize("n_memories", [0, 1, 5, 9])
def test_any_number_of_memories(served_by, device, n_memories):
    base, memories = layer(18, 20, FP32, n_memories, device=device)
    x = tokens(2, 3, 18, device=device)
    scores = routing_score(x, base, memories, "silu")
    assert scores.shape == (2, 3, n_memories)
    assert error(scores, x, base, memories, "silu") < 2e-6
    stack = torch.stack(memories) if memories else x.new_zeros(0, 20, 18)
    assert torch.equal(routing_score(x, base, stack, "silu"), scores)


def test_an_unchanged_memory_scores_zero(served_by, device):
    base, memories = layer(40, 24, BF16, 1, device=device)
    for n_tokens in (1, 20):
        scores = routing_score(
            tokens(n_tokens, 40, dtype=BF16, device=device), base, [base, *memories], "gelu"
        )
        assert not scores[:, 0].any()
        assert (scores[:, 1] > 0).all()


def test_small_changes_are_resolved_on_a_cpu():
    """Differences of large outputs: a memory enters as its difference from the base."""
    base, memories = layer(600, 64, FP32, 1, distance=1e-4)
    for n_tokens in (2, 20):
        x = 10 * tokens(n_tokens, 600)
        reference = routing_score_reference(x, base, memories, "silu", metric="linear")
        scores = routing_score(x, base, memories, "silu", metric="linear")
        assert ((scores - reference).norm() / reference.norm()).item() < 1e-6


def test_second_run_gives_the_same_bits(served_by, device):
    base, memories = layer(50, 40, BF16, device=device)
    for n_tokens in (3, 20):
        x = tokens(n_tokens, 50, dtype=BF16, device=device)
        assert torch.equal(routing_score(x, base, memories, "silu"), routing_score(x, base, memories, "silu"))


def test_arguments_are_not_written_and_need_no_gradient(served_by, device):
    base, memories = layer(20, 16, FP32, device=device)
    base.requires_grad_()
    x = tokens(3, 20, device=device).requires_grad_()
    before = [t.clone() for t in (x, base, *memories)]
    assert not routing_score(x, base, memories, "silu").requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (x, base, *memories), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 300])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
def test_real_sizes(name, dtype, n_tokens, transposed):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    base, memories = layer(11008, 4096, dtype, 3, transposed, "cuda", distance=0.05)
    x = tokens(n_tokens, 11008, dtype=dtype, device="cuda")
    with backend.use_backend(name):
        scores = routing_score(x, base, memories, "silu", transposed=transposed)
    reference = routing_score_reference(x, base, memories, "silu", transposed)
    assert ((scores - reference).norm() / reference.norm()).item() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_in_a_graph_on_another_stream(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    base, memories = layer(256, 128, BF16, device="cuda")
    x = tokens(4, 256, dtype=BF16, device="cuda")
    with backend.use_backend(name):
        expected = routing_score(x, base, memories, "silu")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            routing_score(x, base, memories, "silu")
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            index, scores = route(routing_score(x, base, memories, "silu"), 0.5)
        graph.replay()
    assert torch.equal(scores, expected.mean(0))
    assert index.shape == ()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_rows_more_than_2_gib_apart(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    stride = (1 << 30) + 64  # elements of two bytes
    if torch.cuda.mem_get_info()[0] < 4 * 2 * stride:
        pytest.skip("needs 9 GB of free GPU memory")
    base, memories = layer(96, 3, BF16, 1, device="cuda")
    far = torch.empty(2 * stride + 96, dtype=BF16, device="cuda").as_strided((3, 96), (stride, 1))
    x = tokens(2, 96, dtype=BF16, device="cuda")
    far.copy_(base)
    with backend.use_backend(name):
        near = routing_score(x, base, memories, "silu")
        assert torch.allclose(routing_score(x, far, memories, "silu"), near)


# ---- what is refused ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    x, base = torch.ones(3, 4), torch.zeros(5, 4)
    one, two = [base], [base, base.T]
    cases = [
        (ValueError, r"x must have shape \(..., 4\) to fit base_weight, got \(4, 3\)", (x.T, base, one), {}),
        (ValueError, r"x must have shape \(..., 5\)", (x, base, one), {"transposed": True}),
        (ValueError, r"memories\[1\] must have shape \(5, 4\) like base_weight, got", (x, base, two), {}),
        (ValueError, r"base_weight must have 2 dimensions", (x, base[0], one), {}),
        (ValueError, r"bias must have shape \(5,\) to fit base_weight", (x, base, one), {"bias": x[0]}),
        (ValueError, "activation must be .*'gelu_tanh', got 'tanh'", (x, base, one, "tanh"), {}),
        (ValueError, "metric must be 'activated' or 'linear', got 'l2'", (x, base, one), {"metric": "l2"}),
        (ValueError, r"memories\[0\] must be on cpu like x, got meta", (x, base, [base.to("meta")]), {}),
        (TypeError, "x must be .* or float64, got int64", (x.long(), base, one), {}),
        (TypeError, "must be float64 if one of them is", (x, base, [base.double()]), {}),
        (TypeError, r"memories\[0\] must be a tensor, got float", (x, base, [1.0]), {}),
    ]
    for expected, match, args, options in cases:
        with pytest.raises(expected, match=match):
            routing_score(*(args if len(args) == 4 else (*args, "silu")), **options)


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    base, memories = layer(6, 5, FP32)
    with backend.use_backend("torch"):
        torch.library.opcheck(
            torch.ops.fastedit.routing_score.default, (tokens(2, 3, 6), base, memories, "silu", False, None)
        )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def decide(x, base, stack):
        return route(routing_score(2 * x, base, stack, "silu"), 0.1)

    base, memories = layer(6, 5, FP32)
    x = tokens(4, 6)
    index, scores = decide(x, base, torch.stack(memories))
    expected_index, expected = route(routing_score(2 * x, base, memories, "silu"), 0.1)
    assert torch.equal(index, expected_index)
    assert torch.allclose(scores, expected)


# ---- properties -----------------------------------------------------------------------------------------


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n_tokens=st.integers(0, 70),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 50),
    n_memories=st.integers(0, 3),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    activation=st.sampled_from(ACTIVATIONS),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_input_agrees_with_the_reference(
    n_tokens, d_in, d_out, n_memories, dtype, activation, transposed, seed
):
    base, memories = layer(d_in, d_out, dtype, n_memories, transposed, seed=seed)
    x, bias = tokens(n_tokens, d_in, dtype=dtype, seed=seed), tokens(d_out, seed=seed + 1)
    for name in ("torch", None):
        if name is None:
            scores = routing_score(x, base, memories, activation, transposed=transposed, bias=bias)
        else:
            with backend.use_backend(name):
                scores = routing_score(x, base, memories, activation, transposed=transposed, bias=bias)
        assert error(scores, x, base, memories, activation, transposed=transposed, bias=bias) < 2e-6


# ---- decisions ------------------------------------------------------------------------------------------


def decide_one(scores, thresholds, rule):
    """The rules as WISE's code takes them, one sample at a time."""
    if rule == "highest":
        beaten = [(s, -i) for i, (s, t) in enumerate(zip(scores, thresholds, strict=True)) if s > t]
        return -max(beaten)[1] if beaten else -1
    if rule == "merge":
        if all(s < t for s, t in zip(scores, thresholds, strict=True)):
            return -1
        return 0 if scores[0] > scores[1] else 1
    choice, best = (-1 if scores[0] < thresholds[0] else 0), scores[0]
    for i in range(1, len(scores)):
        if scores[i] > best and scores[i] > thresholds[i]:
            choice, best = i, scores[i]
    return choice


@pytest.mark.parametrize("rule", ["highest", "merge", "retrieve"])
def test_decisions_are_those_of_the_rule(rule):
    generator = torch.Generator().manual_seed(0)
    for m in (2,) if rule == "merge" else (1, 2, 4):
        scores = torch.randint(0, 5, (200, 1, m), generator=generator).float()  # many ties
        thresholds = (
            torch.full((m,), 2.0) if rule == "merge" else torch.randint(0, 5, (m,), generator=generator)
        )
        index, sample = route(scores, thresholds, rule=rule)
        assert torch.equal(sample, scores[:, 0])
        assert index.tolist() == [decide_one(s, thresholds.tolist(), rule) for s in scores[:, 0].tolist()]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_padding_is_not_looked_at(reduce):
    scores = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    _, expected = zip(
        *(route(s[keep], 0.5, reduce=reduce) for s, keep in zip(scores, mask, strict=True)), strict=True
    )
    scores[~mask] = float("nan")
    index, sample = route(scores, 0.5, mask, reduce=reduce)
    assert torch.allclose(sample, torch.stack(expected))
    assert index.shape == (3,)


def test_nothing_and_nan_choose_the_base_weight():
    scores = torch.tensor([[[float("nan"), float("nan")]], [[float("nan"), 3.0]]])
    for rule in ("highest", "merge", "retrieve"):
        assert route(scores, 1.0, rule=rule)[0].tolist() == [-1, 1]
    assert route(torch.ones(2, 3, 0), 1.0)[0].tolist() == [-1, -1]
    empty = route(torch.ones(2, 3, 1), 0.5, torch.zeros(2, 3, dtype=torch.bool))
    assert empty[0].tolist() == [-1, -1]
    assert not empty[1].any()
    assert route(torch.ones(2, 0, 1), 0.5)[0].tolist() == [-1, -1]


def test_route_says_what_is_wrong():
    scores = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="rule must be 'highest', 'merge' or 'retrieve', got 'first'"):
        route(scores, 1.0, rule="first")
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'max'"):
        route(scores, 1.0, reduce="sum")
    with pytest.raises(ValueError, match=r"threshold must have shape \(4,\) one for each memory, got \(3,\)"):
        route(scores, torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        route(scores, 1.0, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores must have shape \(..., T, m\), got \(4,\)"):
        route(scores[0, 0], 1.0)


def test_an_unavailable_backend_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(fastedit.BackendUnavailable, match="routing_score: backend 'cuda'"):
        with backend.use_backend("cuda"):
            base, memories = layer(6, 5, FP32)
            routing_score(tokens(2, 6), base, memories, "silu")
