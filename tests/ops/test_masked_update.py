"""``masked_sgd_``, ``masked_adam_`` and the masks on every backend against float64 with a dense mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops import (
    BitMask,
    IndexMask,
    MaskedAdamState,
    PhiloxMask,
    backend,
    masked_adam_,
    masked_sgd_,
)
from fastedit.testing.masked_update import make_mask, options_of, require_within_ulps, sgd_reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LR, DECAY, CLAMP = 0.25, 2.0**-7, 0.02  # exact in float32, so that errors are those of the arithmetic


def values(shape, dtype=FP32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


# ---- SGD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["philox", "bits", "indices", "all"])
def test_views_and_storage_orders_give_the_same_bits(served_by, device, kind):
    shape = (37, 44)
    param, grad = values(shape, FP32, device), values(shape, FP32, device, 1)
    mask = make_mask(kind, param.numel(), device)
    bound = param + 0.01
    dense = {} if kind == "indices" else {"clamp_to": bound, "clamp": CLAMP}
    expected = param.clone()
    masked_sgd_(expected, grad, mask, LR, **dense)

    store = torch.full((40, 100), float("nan"), device=device)
    layouts = {
        "transposed": param.T.contiguous().T,
        "columns of a larger one": store[2:39, 5:49],
        "every second column": store[1:38, 10:98:2],
    }
    for name, out in layouts.items():
        store.fill_(float("nan"))
        out.copy_(param)
        masked_sgd_(out, grad.T.contiguous().T if name == "transposed" else grad, mask, LR, **dense)
        assert torch.equal(out, expected), name
        if name != "transposed":
            assert store.isnan().sum() == store.numel() - param.numel(), name
    out = param.T.contiguous()
    turned = {"clamp_to": bound.T, "clamp": CLAMP} if dense else {}
    masked_sgd_(out, grad.T, mask, LR, transposed=True, **turned)
    assert torch.equal(out.T, expected)
    out = param.reshape(37, 4, 11).clone()  # more dimensions
    more = {"clamp_to": bound.reshape(37, 4, 11), "clamp": CLAMP} if dense else {}
    masked_sgd_(out, grad.reshape(37, 4, 11), mask, LR, **more)
    assert torch.equal(out.reshape(shape), expected)


def test_unselected_gradients_are_never_used_and_other_nans_stay(served_by, device):
    param, grad = values((20, 33), FP32, device), values((20, 33), FP32, device, 1)
    mask = PhiloxMask(3, density=0.4)
    keep = mask.dense(param.shape, device=device)
    clean = param.clone()
    masked_sgd_(clean, grad, mask, LR, decay=DECAY)
    grad[~keep] = float("nan")
    out = param.clone()
    masked_sgd_(out, grad, mask, LR, decay=DECAY)
    assert torch.equal(out, clean)

    param[3, 4], param[5, 6] = float("nan"), float("inf")
    bound = torch.zeros_like(param)
    bound[7, 8] = float("nan")
    masked_sgd_(param, torch.where(keep, grad, 0.0), mask, LR, clamp_to=bound, clamp=1.0)
    assert param.isnan().nonzero().tolist() == [[3, 4], [7, 8]]
    assert param[5, 6] == 1.0


def test_what_nothing_reaches_keeps_its_value(served_by, device):
    param = values((9, 50), FP32, device)
    param[0, :4] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-40])
    grad = torch.full_like(param, 2.0)
    for mask in (
        PhiloxMask(1, density=0.0),
        IndexMask(torch.zeros(0, dtype=torch.int64, device=device), 450),
    ):
        out = param.clone()
        masked_sgd_(out, grad, mask, LR, decay=DECAY, decay_scope="masked")
        masked_adam_(out, grad, mask, MaskedAdamState(out, mask), weight_decay=0.1)
        assert torch.equal(out, param)
        assert torch.equal(out.signbit(), param.signbit())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty(served_by, device, shape):
    param = torch.zeros(shape, device=device)
    mask = PhiloxMask(1, density=0.5)
    masked_sgd_(param, param.clone(), mask, LR)
    masked_adam_(param, param.clone(), mask, MaskedAdamState(param, mask))
    assert mask.count(0) == 0
    assert mask.bits(0).shape == (0,)


def test_second_run_gives_the_same_bits(served_by, device):
    results = []
    for _ in range(2):
        param, grad = values((50, 91), FP32, device), values((50, 91), FP32, device, 1)
        mask = PhiloxMask(8, density=0.2)
        state = MaskedAdamState(param, mask)
        masked_sgd_(param, grad, mask, LR, decay=DECAY)
        masked_adam_(param, grad, mask, state)
        results.append((param, state.exp_avg))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- Adam -----------------------------------------------------------------------------------------------


def test_adam_is_torch_optim_adam(served_by, device):
    """With every entry selected, the optimiser of torch."""
    start, mask = values((13, 29), FP32, device), PhiloxMask(0, density=1.0)
    for decoupled, optimiser in ((False, torch.optim.Adam), (True, torch.optim.AdamW)):
        param, state = start.clone(), MaskedAdamState(start, mask)
        theirs = torch.nn.Parameter(start.clone())
        optim = optimiser([theirs], lr=0.01, weight_decay=0.1)
        for step in range(3):
            theirs.grad = values((13, 29), FP32, device, step)
            optim.step()
            masked_adam_(param, theirs.grad, mask, state, 0.01, weight_decay=0.1, decoupled=decoupled)
        torch.testing.assert_close(param, theirs.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", ["philox", "bits", "indices"])
def test_adam_on_any_storage_order(served_by, device, kind):
    shape = (70, 66)
    param, grad = values(shape, FP32, device), values(shape, FP32, device, 1)
    mask = make_mask(kind, param.numel(), device)
    expected, state = param.clone(), MaskedAdamState(param, mask)
    masked_adam_(expected, grad, mask, state)
    for out, flip in ((param.T.contiguous().T, False), (param.T.contiguous(), True)):
        other = MaskedAdamState(param, mask)
        masked_adam_(out, grad.T.contiguous() if flip else grad, mask, other, transposed=flip)
        assert torch.equal(out.T if flip else out, expected)
        assert torch.equal(other.exp_avg_sq, state.exp_avg_sq)
    store = torch.zeros(70, 90, device=device)
    store[:, 3:69] = param
    masked_adam_(store[:, 3:69], grad, mask, MaskedAdamState(param, mask))
    assert torch.equal(store[:, 3:69], expected)


def test_adam_takes_the_gradient_as_a_product(served_by, device):
    param, left, right = (values(s, FP32, device, i) for i, s in enumerate([(70, 66), (70, 9), (66, 9)]))
    mask, whole = PhiloxMask(4, density=0.2), param.clone()
    masked_adam_(param, (left, right), mask, MaskedAdamState(param, mask), 0.1)
    masked_adam_(whole, left @ right.T, mask, MaskedAdamState(whole, mask), 0.1)
    torch.testing.assert_close(param, whole, rtol=1e-5, atol=1e-4)  # signs of gradients near 0


def test_the_state_holds_selected_entries_only():
    param, mask = torch.zeros(300, 200), PhiloxMask(1, density=0.1)
    state = MaskedAdamState(param, mask)
    assert state.exp_avg.numel() == mask.count(param.numel())
    assert state.offsets.numel() == 15
    masked_adam_(param, torch.ones_like(param), mask, state)
    again = MaskedAdamState(param, mask)
    again.load_state_dict(state.state_dict())
    assert again.step == 1
    assert torch.equal(again.exp_avg, state.exp_avg)
    with pytest.raises(KeyError, match="exp_avg_sq"):
        again.load_state_dict({"exp_avg": state.exp_avg, "step": 1})
    with pytest.raises(ValueError, match="to fit the mask"):
        again.load_state_dict({**state.state_dict(), "exp_avg": torch.zeros(3)})
    for other in (PhiloxMask(2, density=0.1), None, torch.tensor([1])):
        with pytest.raises(ValueError, match="made for another mask"):
            masked_adam_(param, torch.ones_like(param), other, state)
    with pytest.raises(ValueError, match="made for another mask"):
        masked_adam_(torch.zeros(3, 3), torch.ones(3, 3), mask, state)


# ---- masks ----------------------------------------------------------------------------------------------


def test_philox_bits_are_the_same_on_every_backend(served_by, device):
    for seed, shard, layer in ((0, 0, 0), (7, 1, 27), (-1, 2**32 - 1, 2**32 - 1), (2**63 + 12345, 500, 3)):
        for density in (0.0, 1e-3, 0.2, 0.5, 1.0 - 2**-20, 1.0):
            mask = PhiloxMask(seed, shard, layer, density)
            bits = mask.bits(1027, device=device)
            with backend.use_backend("torch"):
                assert torch.equal(bits.cpu(), mask.bits(1027))


def test_philox_counters_beyond_32_bits(served_by, device):
    """Entries around 2^34, where the counter's low word turns over."""
    start = 2**34 - 512
    key = PhiloxMask(9, 3, 4, 0.4).key
    bits, reference = (torch.empty(128, dtype=torch.uint8, device=d) for d in (device, "cpu"))
    torch.ops.fastedit.philox_bits_(bits, start, key)
    with backend.use_backend("torch"):
        torch.ops.fastedit.philox_bits_(reference, start, key)
    assert torch.equal(bits.cpu(), reference)


def test_philox_is_the_published_generator():
    """Known answers of Random123's kat_vectors for Philox4x32-10."""
    from fastedit.ops.philox import philox

    words = philox(torch.tensor([0]), 0)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = 0xFFFFFFFF
    words = philox(torch.tensor([-1]), -1, ones, ones)
    assert [w & ones for w in words[0].tolist()] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.5, 0.9])
def test_density_and_overlap_are_within_five_sigma(density):
    n = 1 << 20
    masks = [PhiloxMask(1, shard, layer, density) for shard in (0, 1, 2) for layer in (0, 1)]
    masks.append(PhiloxMask(2, 0, 0, density))
    dense = [mask.dense((n,)) for mask in masks]

    def check(count, p):
        assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5

    for i, one in enumerate(dense):
        check(int(one.sum()), density)
        for other in dense[:i]:
            check(int((one & other).sum()), density**2)


def test_counts_offsets_pack_and_unpack():
    n = 3 * 4096 + 77
    for kind in ("philox", "bits", "indices"):
        mask = make_mask(kind, n)
        dense = mask.dense((n,))
        assert mask.count(n) == int(dense.sum())
        offsets, count = mask.offsets(n)
        assert count == int(dense.sum())
        assert offsets.tolist() == [int(dense[: 4096 * b].sum()) for b in range(4)]
        x = values((n,))
        assert torch.equal(mask.pack(x), x[dense])
        assert torch.equal(mask.unpack(mask.pack(x), (n,), fill=2.0), torch.where(dense, x, 2.0))
        assert torch.equal(mask.bits(n), torch.from_numpy(np.packbits(dense.numpy(), bitorder="little")))
        with pytest.raises(ValueError, match="as many as are selected"):
            mask.unpack(x[:5], (n,))


def test_bits_replay_a_mask_of_numpy():
    """The masks of published WISE code are draws of NumPy's legacy generator."""
    shape, density = (50, 60), 0.2
    np.random.seed(3)
    published = np.random.choice([1, 0], size=3000, p=[density, 1 - density])
    uniform = np.random.RandomState(3).random_sample(3000)
    mask = BitMask(torch.from_numpy(np.packbits(uniform < density, bitorder="little")), 3000)
    assert torch.equal(mask.dense(shape).long(), torch.from_numpy(published).reshape(shape))
    param = torch.zeros(shape)
    masked_sgd_(param, torch.ones(shape), mask, 1.0)
    assert torch.equal(param, -mask.dense(shape).float())


def test_masks_given_as_tensors():
    param, grad = values((7, 9)), values((7, 9), seed=1)
    dense = values((63,), seed=2) > 0.5
    expected = param.clone()
    masked_sgd_(expected, grad, BitMask.from_dense(dense), LR)
    packed = torch.from_numpy(np.packbits(dense.numpy(), bitorder="little"))
    for mask in (packed, dense.nonzero()[:, 0], dense.nonzero()[:, 0].int()):
        out = param.clone()
        masked_sgd_(out, grad, mask, LR)
        assert torch.equal(out, expected)
        out = param.clone()
        masked_sgd_(out, grad, mask, LR, decay=0.0, clamp_to=param, clamp=1e9)  # indices become bits
        assert torch.equal(out, expected)


# ---- what is refused ------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    param, grad, mask = torch.zeros(4, 6), torch.ones(4, 6), PhiloxMask(1, density=0.5)

    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match):
            masked_sgd_(*args, **options)
        assert not param.any()

    refused(ValueError, r"grad must have shape \(4, 6\) like param", param, grad[:3], mask, 1.0)
    refused(TypeError, "grad must be .* got int32", param, grad.int(), mask, 1.0)
    refused(TypeError, "param must be .* got int32", param.int(), grad, mask, 1.0)
    refused(TypeError, "grad must be a tensor, got list", param, [1.0], mask, 1.0)
    refused(ValueError, "lr must be finite and not negative, got nan", param, grad, mask, float("nan"))
    refused(ValueError, "decay must be finite", param, grad, mask, 1.0, decay=-1.0)
    refused(ValueError, "decay_scope must be 'all', 'masked' or 'none', got 'some'", param, grad, mask, 1.0,
            decay_scope="some")  # fmt: skip
    refused(ValueError, "clamp_to and clamp must be given together", param, grad, mask, 1.0, clamp=1.0)
    refused(ValueError, "clamp must be finite and not neg", param, grad, mask, 1.0, clamp_to=grad, clamp=-1.0)
    refused(ValueError, "grad must be on cpu like param", param, grad.to("meta"), mask, 1.0)
    refused(ValueError, "must not share memory with grad", param, param, mask, 1.0)
    refused(ValueError, "param must have 2 dimensions or be contiguous", param.reshape(2, 2, 6)[:, :, ::2],
            torch.ones(2, 2, 3), mask, 1.0)  # fmt: skip
    refused(
        ValueError, r"right must have shape \(6, 2\)", param, (torch.ones(4, 2), torch.ones(5, 2)), mask, 1.0
    )
    refused(
        ValueError, r"left must have shape \(4, 2\)", param, (torch.ones(3, 2), torch.ones(6, 2)), mask, 1.0
    )
    refused(TypeError, "mask must be uint8, int32 or int64, got bool", param, grad, grad > 0, 1.0)
    refused(
        TypeError, "mask must be a PhiloxMask, BitMask, IndexMask or tensor, got str", param, grad, "x", 1.0
    )
    bits = torch.zeros(2, dtype=torch.uint8)
    refused(ValueError, r"packed must have shape \(3,\) for 24 entries, got \(2,\)", param, grad, bits, 1.0)
    for indices in ([0, 0], [3, 2], [-1, 2], [0, 24]):
        refused(ValueError, r"sorted, each once, in \[0, 24\)", param, grad, torch.tensor(indices), 1.0)
    refused(ValueError, "mask of 25 entries, the tensor has 24", param, grad,
            BitMask(torch.zeros(4, dtype=torch.uint8), 25), 1.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5"):
        PhiloxMask(1, density=1.5)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\^32\)"):
        PhiloxMask(1, layer=-1)


def test_wrong_arguments_of_adam_are_named():
    param, grad, mask = torch.zeros(4, 6), torch.ones(4, 6), PhiloxMask(1, density=0.5)
    state = MaskedAdamState(param, mask)
    for match, options in {
        "beta1 must be": {"betas": (1.0, 0.9)},
        "eps must be finite": {"eps": -1.0},
        "weight_decay must be finite": {"weight_decay": -1.0},
        "decay_scope must be 'masked' or 'none', or decoupled": {"weight_decay": 0.1, "decay_scope": "all"},
    }.items():
        with pytest.raises(ValueError, match=match):
            masked_adam_(param, grad, mask, state, **options)
    listed = IndexMask(torch.tensor([3]), 24)
    with pytest.raises(ValueError, match="serve only where no other entry changes"):
        masked_adam_(param, grad, listed, MaskedAdamState(param, listed), clamp_to=grad, clamp=1.0)
    assert state.step == 0
    assert not param.any()


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    mask, ops = PhiloxMask(3, density=0.5), torch.ops.fastedit
    param, grad = torch.zeros(5, 6), torch.ones(5, 6)
    state = MaskedAdamState(param, mask)
    with backend.use_backend("torch"):
        torch.library.opcheck(ops.masked_sgd_.default, (param, grad, None, None, mask.key, 0.1))
        torch.library.opcheck(ops.philox_bits_.default, (torch.zeros(3, dtype=torch.uint8), 0, mask.key))
        torch.library.opcheck(
            ops.masked_adam_.default,
            (param, grad, None, state.exp_avg, state.exp_avg_sq, state.offsets, None, mask.key,
             1, 0.1, 0.9, 0.99, 1e-8),
        )  # fmt: skip


def test_compiles_into_one_graph():
    mask = PhiloxMask(3, density=0.5)
    bits = mask.bits(60)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(param, grad):
        masked_sgd_(param, 2 * grad, mask, 0.1, decay=0.1)
        masked_sgd_(param, grad, bits, 0.1)
        return param.sum()

    param, grad = values((6, 10)), values((6, 10), seed=1)
    expected = param.clone()
    masked_sgd_(expected, 2 * grad, mask, 0.1, decay=0.1)
    masked_sgd_(expected, grad, bits, 0.1)
    total = step(param, grad)
    torch.testing.assert_close(param, expected)
    torch.testing.assert_close(total, expected.sum())


def test_parameters_that_require_gradients_are_updated():
    param = torch.nn.Parameter(values((6, 10)))
    grad = torch.ones(6, 10)
    before = param.detach().clone()
    masked_sgd_(param, grad, None, 0.5)
    assert torch.equal(param.detach(), before - 0.5)


# ---- properties -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    density=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    kind=st.sampled_from(["philox", "bits"]),
    dtype=st.sampled_from([FP32, BF16]),
    scope=st.sampled_from([None, "all", "masked"]),
    clamps=st.booleans(),
    turned=st.booleans(),
    lr=st.floats(0, 2),
)
def test_any_step_agrees_with_the_reference(
    rows, columns, density, seed, kind, dtype, scope, clamps, turned, lr
):
    param, grad = values((rows, columns), dtype), values((rows, columns), seed=1)
    mask = PhiloxMask(seed, density=density)
    if kind == "bits":
        mask = BitMask(mask.bits(rows * columns), rows * columns)
    options = options_of(scope, clamps, param)
    reference, scale = sgd_reference(param, grad, mask, lr, **options)
    out = param.T.contiguous().T if turned else param
    masked_sgd_(out, grad, mask, lr, **options)
    require_within_ulps(out, reference, scale, 2)  # the step's numbers are rounded too


# ---- GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(4096, 14336), (1600, 6400), (999, 1001)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_real_sizes(name, shape, dtype):
    if reason := backend.missing(name, torch.device("cuda"), True):
        pytest.skip(f"{name}: {reason}")
    generator = torch.Generator("cuda").manual_seed(0)
    param = torch.randn(*shape, device="cuda", generator=generator).to(dtype)
    grad = torch.randn(*shape, device="cuda", generator=generator)
    mask = PhiloxMask(5, 1, 27, 0.2)
    options = {"decay": DECAY, "clamp_to": param.float(), "clamp": CLAMP}
    reference, scale = sgd_reference(param, grad, mask, LR, **options)
    with backend.use_backend(name):
        for start in (param, param.T.contiguous().T):
            out = start.clone(memory_format=torch.preserve_format)
            masked_sgd_(out, grad, mask, LR, **options)
            require_within_ulps(out, reference, scale, 1)
        state, out = MaskedAdamState(param, mask), param.clone()
        masked_adam_(out, grad, mask, state)
    with backend.use_backend("torch"):
        other, expected = MaskedAdamState(param, mask), param.clone()
        masked_adam_(expected, grad, mask, other)
    torch.testing.assert_close(state.exp_avg_sq, other.exp_avg_sq, rtol=1e-6, atol=0)
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_graphs_and_streams(name):
    if reason := backend.missing(name, torch.device("cuda"), True):
        pytest.skip(f"{name}: {reason}")
    param, grad = values((300, 500), FP32, "cuda"), values((300, 500), FP32, "cuda", 1)
    mask = PhiloxMask(5, density=0.2)
    expected = param.clone()
    with backend.use_backend(name):
        for _ in range(3):
            masked_sgd_(expected, grad, mask, LR, decay=DECAY)
        scratch = param.clone()
        masked_sgd_(scratch, grad, mask, LR, decay=DECAY)  # compiled before the capture
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            masked_sgd_(param, grad, mask, LR, decay=DECAY)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(param, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_than_2_31_entries(name):
    if reason := backend.missing(name, torch.device("cuda"), True):
        pytest.skip(f"{name}: {reason}")
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    n = (1 << 31) + 4096 + 5
    param, grad = (torch.zeros(n, dtype=BF16, device="cuda") for _ in range(2))
    grad.fill_(1.0)
    mask = PhiloxMask(5, density=0.25)
    with backend.use_backend(name):
        masked_sgd_(param, grad, mask, 1.0)
    tail = slice(n - 4101, n)
    bits = torch.empty(513, dtype=torch.uint8)
    with backend.use_backend("torch"):
        torch.ops.fastedit.philox_bits_(bits, n - 4101, mask.key)
    keep = np.unpackbits(bits.numpy(), bitorder="little")[:4101]
    assert torch.equal(param[tail].cpu().float(), -torch.from_numpy(keep).float())
    assert abs(-param.float().mean().item() - 0.25) < 1e-3


def test_the_examples_of_the_documentation_run():
    import doctest
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "ops" / "masked_update.md"
    if not page.exists():
        pytest.skip("not a source tree: no docs")
    results = doctest.testfile(str(page), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0
    for name in ("masked_update", "masks"):
        module = __import__(f"fastedit.ops.{name}", fromlist=[name])
        assert doctest.testmod(module).failed == 0
