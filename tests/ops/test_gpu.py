"""What only a GPU can get wrong: graphs, streams, devices, sizes beyond 2^31, accumulation on the matrix unit.

What can be, is run on every backend of this machine at small sizes too, so that the tests themselves are proved.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import relative_error

import fastedit
from fastedit.ops import (
    MaskedAdamState,
    PhiloxMask,
    backend,
    covariance_,
    low_rank_update_,
    low_rank_update_reference,
    masked_adam_,
    masked_sgd_,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ON_GPU = ["torch", "triton", "cuda"]


def random(*shape, dtype=FP32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


# Each case: the tensors that the op writes, and a call that does so in place. Sizes are no multiples of any tile.
def covariance_case(device, dtype=BF16):
    x, cov = random(75, 40, dtype=dtype, device=device), torch.zeros(40, 40, device=device)
    mask = torch.arange(75, device=device) % 4 != 1
    return [cov], lambda: covariance_(cov, x, mask)


def covariance_list_case(device):
    xs = [random(75, d, dtype=BF16, device=device, seed=d) for d in (24, 40)]
    covs = [torch.zeros(d, d, device=device) for d in (24, 40)]
    return covs, lambda: covariance_(covs, xs)


def low_rank_case(device, rank=20, rounding="nearest", dtype=BF16):
    weight = random(37, 44, dtype=dtype, device=device, seed=1)
    left, right = random(37, rank, device=device, seed=2), random(44, rank, device=device, seed=3)
    norm = torch.zeros((), device=device)
    return [weight, norm], lambda: low_rank_update_(
        weight, left, right, 0.5, rounding=rounding, seed=5, out_norm=norm
    )


MASK = PhiloxMask(seed=3, shard=1, layer=2, density=0.3)


def masked_sgd_case(device):
    param, start = (
        random(37, 44, dtype=BF16, device=device, seed=1),
        random(37, 44, dtype=BF16, device=device),
    )
    grad = random(37, 44, device=device, seed=2)
    return [param], lambda: masked_sgd_(param, grad, MASK, 0.1, decay=1e-3, clamp_to=start, clamp=2.0)


def masked_adam_case(device):
    param, grad = random(37, 44, device=device, seed=1), random(37, 44, device=device, seed=2)
    state = MaskedAdamState(param, MASK)

    def step():
        state.step = 0  # a graph replays the step it was captured with
        masked_adam_(param, grad, MASK, state)

    return [param, state.exp_avg, state.exp_avg_sq], step


def philox_bits_case(device):
    bits = torch.zeros(101, dtype=torch.uint8, device=device)
    return [bits], lambda: backend.call("philox_bits_", bits, 16, MASK.key)


def residual_case(device):
    weight, residual = random(37, 44, dtype=BF16, device=device, seed=1), torch.zeros(37, 44, device=device)
    left, right = random(37, 20, device=device, seed=2), random(44, 20, device=device, seed=3)
    return [weight, residual], lambda: low_rank_update_(
        weight, left, right, 0.5, residual=residual, carry=True
    )


CASES = {
    "covariance_": covariance_case,
    "covariance_ fp32": lambda device: covariance_case(device, FP32),
    "covariance_layers_": covariance_list_case,
    "low_rank_update_": low_rank_case,
    "low_rank_update_ rank 1": lambda device: low_rank_case(device, 1),
    "low_rank_update_ fp32": lambda device: low_rank_case(device, 17, dtype=FP32),
    "low_rank_update_ stochastic": lambda device: low_rank_case(device, 20, "stochastic"),
    "low_rank_update_ residual": residual_case,
    "masked_sgd_": masked_sgd_case,
    "masked_adam_": masked_adam_case,
    "philox_bits_": philox_bits_case,
}


def test_every_op_that_works_in_place_has_a_case():
    ops = {row.op for row in backend.table() if row.op.endswith("_")}
    assert not ops - {name.split()[0] for name in CASES}


def need(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")


def free_gigabytes(needed):
    if torch.cuda.mem_get_info()[0] < needed * 1e9:
        pytest.skip(f"needs {needed} GB of free GPU memory")


def results(written):
    return [t.cpu().clone() for t in written]


def runs(case, device, times=1):
    """What is written by so many calls in a row on fresh tensors."""
    written, call = CASES[case](device)
    for _ in range(times):
        call()
    return results(written)


# ---- on every backend of this machine -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_twenty_runs_give_the_same_bits(served_by, device, case):
    first = runs(case, device)
    for _ in range(19 if device.type == "cuda" else 1):
        for a, b in zip(first, runs(case, device), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "d_in", "rank"), [(5, 7, 1), (33, 40, 9), (64, 129, 17)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
def test_neighbours_in_memory_stay_as_they_are(served_by, device, dtype, rows, d_in, rank):
    """Everything written lies in the middle of a larger buffer of a pattern that no arithmetic gives."""

    def surrounded(height, width, kind):
        store = torch.full((height + 2, width + 24), -12345.0, dtype=kind, device=device)
        inner = store[1 : 1 + height, 8 : 8 + width]
        return store, inner.copy_(random(height, width, seed=9))

    def intact(store, inner):
        inner.fill_(-12345.0)
        return bool((store == torch.tensor(-12345.0, dtype=store.dtype)).all())

    left, right = random(rows, rank, device=device), random(d_in, rank, device=device, seed=1)
    store, weight = surrounded(rows, d_in, dtype)
    around, residual = surrounded(rows, d_in, FP32)
    if dtype == BF16:
        low_rank_update_(weight, left, right, residual=residual)
    else:
        low_rank_update_(weight, left, right)
    assert intact(store, weight)
    assert intact(around, residual)
    store, cov = surrounded(d_in, d_in, FP32)
    covariance_(cov, random(rows, d_in, dtype=dtype, device=device))
    assert intact(store, cov)


def diagonal_bias(device, n_tokens, d, dtype):
    """Mean and largest relative error of the diagonal, whose terms are all positive: truncation adds up there."""
    x = torch.empty(n_tokens, d, dtype=dtype, device=device)
    for t in range(0, n_tokens, 1 << 16):
        x[t : t + (1 << 16)] = random(min(1 << 16, n_tokens - t), d, seed=t).to(device)
    cov = torch.zeros(d, d, device=device)
    covariance_(cov, x)
    reference = torch.zeros(d, d, dtype=FP64, device=device)
    for part in x.split(1 << 14):
        part = part.double()
        reference += part.T @ part
    error = cov.double().diagonal() / reference.diagonal() - 1
    whole = (cov - reference).norm() / reference.norm()
    return error.mean().item(), error.abs().max().item(), whole.item()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bfloat16", "float16", "float32"])
def test_the_diagonal_is_not_biased(served_by, device, dtype):
    mean, largest, whole = diagonal_bias(device, 1_000_000 if device.type == "cuda" else 700, 40, dtype)
    assert abs(mean) < 1e-5
    assert largest < 2e-5
    assert whole < 1e-5


# ---- Triton: the parts of the kernels that only large inputs reach ---------------------------------------


@pytest.fixture
def triton_device():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = backend.missing("triton", device, True)
    if reason:
        pytest.skip(reason)
    return device


@pytest.mark.parametrize("cov_dtype", [FP32, FP64], ids=["float32", "float64"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_split_tokens_and_flushes(triton_device, monkeypatch, splits, cov_dtype):
    module = pytest.importorskip("fastedit.kernels.covariance")
    monkeypatch.setattr(module, "plan_splits", lambda *_: splits)
    monkeypatch.setattr(module, "_FLUSH_TOKENS", 64)
    monkeypatch.setattr(module, "_FLOAT64_CHUNK", 200)
    x = random(333, 70, dtype=BF16, device=triton_device)
    mask = torch.arange(333, device=triton_device) % 5 != 2
    x[~mask] = float("nan")
    cov = torch.eye(70, dtype=cov_dtype, device=triton_device)
    module.covariance_triton(cov, x, mask)
    kept = x[mask].double().cpu()
    assert relative_error(cov.cpu().double(), torch.eye(70, dtype=FP64) + kept.T @ kept) < 1e-6
    assert torch.equal(cov, cov.T)


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_precisions_of_float32(triton_device, precision):
    module = pytest.importorskip("fastedit.kernels.covariance")
    x, cov = random(100, 33, device=triton_device), torch.zeros(33, 33, device=triton_device)
    module.covariance_triton(cov, x, precision=precision)
    x = x.double().cpu()
    assert relative_error(cov.cpu(), x.T @ x) < (1e-6 if precision == "ieee" else 3e-6)
    with pytest.raises(ValueError, match="precision must be"):
        module.covariance_triton(cov, x, precision="tf32")


def test_split_plans():
    module = pytest.importorskip("fastedit.kernels.covariance")
    for tiles, n_tokens in [(1, 100), (1, 10**6), (91, 32768), (136, 32768), (300, 4096), (528, 32768)]:
        splits = module.plan_splits(n_tokens, tiles, 132)
        assert 1 <= splits <= 32
        rounds = -(-tiles * splits // 132)
        assert rounds * (n_tokens / splits) <= -(-tiles // 132) * n_tokens  # never slower than without
    assert (
        module.plan_splits(32768, 91, 132) > 1
    )  # GPT-2 XL: 91 tiles leave a third of 132 multiprocessors idle
    assert module.plan_splits(32768, 528, 132) == 1  # four full rounds


def test_bands_number_every_tile_once(triton_device):
    """Through the result: a tile numbered twice would be added twice, one left out would stay 0."""
    module = pytest.importorskip("fastedit.kernels.covariance")
    for n_tiles in (1, 8, 9, 17):  # bands of 8
        d = 32 * n_tiles - 5
        x, cov = torch.ones(1, d, dtype=BF16, device=triton_device), torch.zeros(d, d, device=triton_device)
        module.covariance_triton(cov, x, config=(32, 32, 1, 1))
        assert (cov == 1).all(), n_tiles


def truncated_sums(x, flush, block, guard):
    """The diagonal of xᵀx as a matrix unit sums it, and as it is.

    Products and sum are aligned to the largest exponent and cut off ``guard`` bits below a float32's last, ``block``
    tokens at a time; every ``flush`` tokens are added up with rounding.
    """
    products = x.astype(np.float64) ** 2
    total, sums = np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1])
    for t in range(0, len(x), block):
        part = products[t : t + block]
        exponent = np.floor(np.log2(np.maximum(np.maximum(part.max(0), sums), 1e-300)))
        grid = 2.0 ** (exponent - 23 - guard)
        sums = (np.floor(part / grid) * grid).sum(0) + np.floor(sums / grid) * grid
        unit = 2.0 ** (np.floor(np.log2(np.maximum(sums, 1e-300))) - 23)
        sums = np.floor(sums / unit) * unit
        if (t + block) % flush == 0:
            total, sums = total + sums.astype(np.float32), sums * 0
    return total + sums, products.sum(0)


@pytest.mark.parametrize(("block", "guard"), [(16, 2), (8, 1)], ids=["hopper", "ampere"])
def test_flushing_every_512_tokens_bounds_truncation(block, guard):
    """What is published of tensor cores' accumulation, simulated: the bound that both GPU kernels rely on."""
    x = random(16384, 64, dtype=BF16).float().numpy()
    errors = {}
    for flush in (512, 4096):
        got, exact = truncated_sums(x, flush, block, guard)
        errors[flush] = abs(float((got / exact - 1).mean()))
    assert errors[512] < 5e-6
    assert errors[4096] > 1e-5  # without flushes the target would be missed


# ---- on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_cuda_graphs(name, case):
    """Captured once, replayed three times: the same as four calls."""
    need(name)
    device = torch.device("cuda")
    with backend.use_backend(name):
        expected = runs(case, device, times=4)
        written, call = CASES[case](device)
        starts = [t.clone() for t in written]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles, sets attributes, makes the pool of scratch memory
        torch.cuda.current_stream().wait_stream(side)
        for tensor, start in zip(written, starts, strict=True):
            tensor.copy_(start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for tensor, start in zip(written, starts, strict=True):
            tensor.copy_(start)
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
    for got, want in zip(results(written), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ON_GPU)
def test_work_is_ordered_on_the_current_stream(name, case):
    """Inputs arrive late on a side stream: a kernel on another stream would read the old ones."""
    need(name)
    device = torch.device("cuda")
    with backend.use_backend(name):
        expected = runs(case, device)
        written, call = CASES[case](device)
        starts = [t.clone() for t in written]
        for tensor in written:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 85)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for tensor, start in zip(written, starts, strict=True):
                tensor.copy_(start)
            call()
        stream.synchronize()
    for got, want in zip(results(written), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ON_GPU)
def test_tensors_on_a_device_that_is_not_current(name, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; this machine has one")
    need(name)
    with backend.use_backend(name):
        expected = runs(case, torch.device("cuda:0"))
        with torch.cuda.device(0):
            got = runs(case, torch.device("cuda:1"))
            assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ON_GPU)
def test_weights_of_more_than_two_billion_elements(name, rounding):
    need(name)
    d_out, d_in = 65536, 32769  # rows are not aligned either
    free_gigabytes(40 if name == "torch" else 12)
    weight = torch.empty(d_out, d_in, dtype=BF16, device="cuda")
    weight.normal_(generator=torch.Generator("cuda").manual_seed(0))
    left, right = random(d_out, 3, device="cuda", seed=2), random(d_in, 3, device="cuda", seed=3)
    picks = [0, 1, 32767, 65519, 65535]
    before = weight[picks].cpu()
    with backend.use_backend(name):
        low_rank_update_(weight, left, right, 0.5, rounding=rounding, seed=3)
    target = before.double() + 0.5 * (left[picks].double() @ right.double().T).cpu()
    got = weight[picks].cpu()
    unit = torch.exp2(torch.floor(torch.log2(target.abs().clamp(min=2.0**-14)))) * 2.0**-7
    assert ((got.double() - target).abs() <= unit * (0.51 if rounding == "nearest" else 1.01)).all()
    if rounding == "stochastic":  # the words of the last elements come from counters beyond 2^29
        from fastedit.ops.philox import round_stochastically, words

        last = words(65535 * d_in, d_in, 3)
        exact = round_stochastically(target[-1].float(), last, BF16)
        assert (exact == got[-1]).double().mean() > 0.98  # all but sums on the edge of the float32 arithmetic


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_more_than_two_billion_activations(name):
    need(name)
    free_gigabytes(30)
    n_tokens, d = (1 << 31) // 256 + 777, 256
    x = torch.empty(n_tokens, d, dtype=BF16, device="cuda")
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones(n_tokens, dtype=torch.bool, device="cuda")
    mask[::3] = False
    reference = torch.zeros(d, d, dtype=FP64, device="cuda")
    for part, keep in zip(x.split(1 << 20), mask.split(1 << 20), strict=True):
        rows = part[keep].double()
        reference += rows.T @ rows
    cov = torch.zeros(d, d, device="cuda")
    with backend.use_backend(name):
        covariance_(cov, x, mask)
    assert ((cov - reference).norm() / reference.norm()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(("d", "n_tokens"), [(768, 1500), (1600, 9000), (2048, 9000), (3072, 9000)])
def test_widths_that_do_not_fill_the_gpu(name, d, n_tokens):
    """The tokens are split there, and partial sums go through a workspace."""
    need(name)
    x = random(n_tokens, d, dtype=BF16).to("cuda")
    reference = x.double().T @ x.double()
    for dtype in (FP32, FP64):
        cov = torch.zeros(d, d, dtype=dtype, device="cuda")
        with backend.use_backend(name):
            covariance_(cov, x)
        assert ((cov - reference).norm() / reference.norm()).item() < 1e-5
        assert torch.equal(cov, cov.T)


@pytest.mark.gpu
def test_float64_on_the_cuda_backend():
    need("cuda")
    x = random(1000, 333, dtype=FP64, device="cuda")
    for columns in (slice(0, 332), slice(0, 333), slice(0, 64), slice(0, 31)):
        part = x[:, columns]
        cov = torch.zeros(part.shape[1], part.shape[1], dtype=FP64, device="cuda")
        with backend.use_backend("cuda"):
            covariance_(cov, part)
        assert relative_error(cov, part.T @ part) < 1e-13


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 9, 16, 17, 100, 1024])
@pytest.mark.parametrize("carry", [False, True], ids=["alone", "carried"])
def test_ranks_and_residuals(name, rank, carry):
    need(name)
    weight = random(200, 333, dtype=BF16, device="cuda", seed=1)
    left, right = random(200, rank, device="cuda", seed=2), random(333, rank, device="cuda", seed=3)
    residual = random(200, 333, device="cuda", seed=4) * 1e-3
    expected, lost = weight.clone(), residual.clone()
    low_rank_update_reference(expected, left, right, 0.02, residual=lost, carry=carry)
    with backend.use_backend(name):
        low_rank_update_(weight, left, right, 0.02, residual=residual, carry=carry)
    magnitude = 1 + 0.02 * (left.abs() @ right.abs().T)
    got, want = weight.double() + residual, expected.double() + lost
    assert ((got - want).abs() <= 2.0**-14 * magnitude).all()  # the sum holds the float32 result
    assert (residual.abs() <= weight.double().abs() * 2.0**-8 + 1e-30).all()


def test_unavailable_backends_say_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with backend.use_backend("cuda"), pytest.raises(fastedit.BackendUnavailable):
        covariance_(torch.zeros(2, 2), torch.zeros(1, 2))
