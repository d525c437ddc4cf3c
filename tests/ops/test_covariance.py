"""``covariance_`` on every backend against float64 from the rounded inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastedit.ops import CovarianceAccumulator, backend, covariance_, covariance_reference
from fastedit.testing.covariance import expected, symmetric, tokens

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# (dtype of x, dtype of cov): relative error to float64


def test_error_is_at_most_twice_that_of_torch(served_by, device):
    x = tokens(200, 48, BF16, device)
    reference = expected(torch.zeros(48, 48), x)
    cov = torch.zeros(48, 48, device=device)
    covariance_(cov, x)
    by_torch = relative_error(x.cpu().float().T @ x.cpu().float(), reference)
    assert relative_error(cov.cpu(), reference) <= 2 * by_torch + 5e-7


def test_second_run_gives_the_same_bits(served_by, device):
    x = tokens(67, 50, BF16, device)
    mask = torch.arange(67, device=device) % 5 != 0
    first, second = torch.zeros(50, 50, device=device), torch.zeros(50, 50, device=device)
    covariance_(first, x, mask)
    covariance_(second, x, mask)
    assert torch.equal(first, second)


def test_the_workspace_does_not_depend_on_the_default_dtype(served_by, device):
    x = tokens(200, 30, FP32, device)
    first, second = (torch.zeros(30, 30, dtype=FP64, device=device) for _ in range(2))
    covariance_(first, x)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(BF16)
        covariance_(second, x)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(first, second)


def test_the_strict_upper_triangle_of_cov_is_written_from_the_lower(served_by, device):
    d = 37
    cov = torch.zeros(d, d, device=device)
    upper = torch.ones(d, d, device=device).triu(1).bool()
    cov[upper] = float("nan")
    x = tokens(9, d, FP32, device)
    covariance_(cov, x)
    assert not cov.isnan().any()
    assert relative_error(cov.cpu(), expected(torch.zeros(d, d), x)) < 1e-5


def test_layers_of_several_dtypes_views_and_empty_ones(served_by, device):
    given = [(BF16, FP32, 5), (FP32, FP64, 40), (BF16, FP64, 33), (FP32, FP32, 1), (BF16, FP32, 0)]
    store = torch.full((60, 60), float("nan"), device=device)
    covs = [torch.zeros(d, d, dtype=cov, device=device) for _, cov, d in given]
    covs[1] = store[3:43, 5:45].double().zero_()
    covs[3] = store[50:51, 50:51].zero_()
    xs = [tokens(12, d, x, device, seed=d) for x, _, d in given]
    xs[2] = tokens(33, 12, BF16, device).T
    mask = (torch.arange(24, device=device) % 3 != 0)[::2]
    references = [expected(torch.zeros_like(cov), x, mask) for cov, x in zip(covs, xs, strict=True)]
    covariance_(covs, xs, mask)
    for cov, reference in zip(covs, references, strict=True):
        assert relative_error(cov.cpu(), reference) < 1e-5
        assert torch.equal(cov, cov.T)
    assert store.isnan().sum() == store.numel() - 1


def test_no_layers():
    covariance_([], [])
    covariance_([], [], [])


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_precision(served_by, device, precision):
    for dtype in (FP32, BF16):
        x = tokens(40, 35, dtype, device)
        mask = torch.arange(40, device=device) % 7 != 0
        cov, other = torch.zeros(35, 35, device=device), torch.zeros(35, 35, device=device)
        covariance_(cov, x, mask, precision=precision)
        covariance_([other], [x], [mask], precision=precision)
        assert relative_error(cov.cpu(), expected(torch.zeros(35, 35), x, mask)) < 2e-6
        assert torch.equal(cov, other)


def test_one_call_or_many_agree(served_by, device):
    x = tokens(60, 24, FP32, device)
    whole, pieces = torch.zeros(24, 24, device=device), torch.zeros(24, 24, device=device)
    covariance_(whole, x)
    for part in x.split(13):
        covariance_(pieces, part)
    assert relative_error(pieces, whole) < 1e-5


def test_column_blocks_of_the_torch_backend():
    d = 1100  # more than one block of columns, the last one short
    x = tokens(64, d, BF16)
    for cov_dtype in (FP32, FP64):
        cov = symmetric(d, cov_dtype)
        reference = expected(cov, x)
        with backend.use_backend("torch"):
            covariance_(cov, x)
        assert relative_error(cov, reference) < 1e-6
        assert torch.equal(cov, cov.T)


@pytest.mark.parametrize("n_tokens", [8191, 20000], ids=["below_chunk", "chunks"])
def test_many_tokens(n_tokens):
    """The automatic choice of this machine, over more than one chunk of tokens."""
    x = tokens(n_tokens, 40, BF16)
    cov = torch.zeros(40, 40)
    covariance_(cov, x)
    assert relative_error(cov, expected(torch.zeros(40, 40), x)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("d", [4096, 6400, 11008, 14336])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
def test_real_sizes(name, d, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(5000, d, device="cuda", generator=generator).add_(0.1).to(dtype)
    mask = torch.rand(5000, device="cuda", generator=generator) > 0.2
    x[~mask] = float("nan")
    reason = backend.missing(name, x.device, True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    cov, reference = torch.zeros(d, d, device="cuda"), torch.zeros(d, d, dtype=FP64, device="cuda")
    covariance_reference(reference, x, mask)
    with backend.use_backend(name):
        covariance_(cov, x, mask)
    assert ((cov - reference).norm() / reference.norm()).item() < 1e-5
    assert torch.equal(cov, cov.T)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
def test_rows_more_than_2_gib_apart(name):
    reason = backend.missing(name, torch.device("cuda"), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    stride = (1 << 30) + 64  # elements of two bytes
    if torch.cuda.mem_get_info()[0] < 4 * 2 * stride:
        pytest.skip("needs 9 GB of free GPU memory")
    store = torch.empty(2 * stride + 96, dtype=BF16, device="cuda")
    x = store.as_strided((3, 96), (stride, 1))
    x.copy_(tokens(3, 96, BF16, "cuda"))
    cov = torch.zeros(96, 96, device="cuda")
    with backend.use_backend(name):
        covariance_(cov, x)
    assert relative_error(cov.cpu(), expected(torch.zeros(96, 96), x)) < 1e-5


# ---- what is refused ------------------------------------------------------------------------------------


def refused(error, match, cov, x, mask=None):
    before = cov.clone() if isinstance(cov, torch.Tensor) else None
    with pytest.raises(error, match=match):
        covariance_(cov, x, mask)
    if before is not None:
        assert torch.equal(cov, before)


def test_wrong_arguments_are_named():
    cov, x = torch.zeros(4, 4), torch.ones(3, 4)
    refused(ValueError, r"covariance_: cov must be a square matrix, got shape \(4, 5\)", torch.zeros(4, 5), x)
    refused(
        ValueError,
        r"covariance_: x must have shape \(..., 4\) to fit cov, got \(3, 5\)",
        cov,
        torch.ones(3, 5),
    )
    refused(
        ValueError, r"covariance_: x must have shape \(..., 4\) to fit cov, got \(\)", cov, torch.tensor(1.0)
    )
    mask = torch.ones(2, dtype=torch.bool)
    refused(
        ValueError,
        r"covariance_: mask must have shape \(3,\) like x without its last dimension, got \(2,\)",
        cov, x, mask,
    )  # fmt: skip
    refused(TypeError, "covariance_: mask must be bool, got int64", cov, x, torch.ones(3, dtype=torch.int64))
    refused(TypeError, "covariance_: cov must be float32 or float64, got bfloat16", cov.to(BF16), x)
    refused(TypeError, "covariance_: x must be .* or float64, got int32", cov, x.int())
    refused(TypeError, "covariance_: x must be a tensor, got list", cov, [x])
    refused(TypeError, "covariance_: x must be a list of tensors like cov, got one tensor", [cov], x)
    refused(ValueError, "lists must have one length, got 1 cov, 2 x and 1 mask", [cov], [x, x])
    refused(ValueError, "covariance_: x must be on cpu like cov, got meta", cov, x.to("meta"))
    with pytest.raises(ValueError, match="covariance_: precision must be 'tf32x3' or 'ieee', got 'tf32'"):
        covariance_(cov, x, precision="tf32")
    with pytest.raises(TypeError, match="covariance_: cov must be a tensor, got int"):
        covariance_([1], [x])


def test_a_bad_layer_leaves_all_layers_as_they_were():
    covs = [torch.zeros(4, 4), torch.zeros(5, 5)]
    with pytest.raises(ValueError, match="x must have shape"):
        covariance_(covs, [torch.ones(3, 4), torch.ones(3, 4)])
    assert not covs[0].any()


def test_shared_memory_is_refused():
    store = torch.zeros(8, 4)
    refused(ValueError, "cov is written and must not share memory with x: pass a clone", store[:4], store)
    refused(
        ValueError, "several of its elements share one place", torch.zeros(1).expand(3, 3), torch.ones(2, 3)
    )
    covariance_(store[:4], store[4:])  # disjoint parts of one storage are fine


def test_layers_that_share_memory_are_refused():
    a, b, x = torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"cov\[\d\] is written and must not share memory with cov\[\d\]"):
        covariance_([a, b, a], [x, x, x])
    with pytest.raises(ValueError, match=r"cov\[1\] is written and must not share memory with x\[0\]"):
        covariance_([a, b], [b, x])
    with pytest.raises(ValueError, match=r"cov\[1\] is written and must not share memory with x\[0\]"):
        covariance_([a, b], [b, x.bfloat16()])  # also where layers go to different calls of a backend
    assert not a.any()
    assert not b.any()
    covariance_([a, b], [x, x])  # tokens may be shared


# ---- graphs ---------------------------------------------------------------------------------------------


def test_opcheck():
    op = torch.ops.fastedit.covariance_.default
    with backend.use_backend("torch"):
        torch.library.opcheck(
            op, (torch.zeros(5, 5), torch.ones(2, 3, 5), torch.ones(2, 3, dtype=torch.bool))
        )
        torch.library.opcheck(op, (torch.zeros(5, 5, dtype=FP64), torch.ones(3, 5, dtype=BF16), None, "ieee"))


def test_compiles_into_one_graph_and_follows_the_choice_at_run_time():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(cov, x, mask):
        covariance_([cov], [2 * x], [mask])
        covariance_(cov, x + 1)
        return cov.diagonal().sum()

    x, mask = tokens(6, 5, FP32), torch.arange(6) % 2 == 0
    reference = expected(expected(torch.zeros(5, 5), 2 * x, mask), x + 1)
    for name in ("torch", None):
        cov = torch.zeros(5, 5)
        if name is None:
            trace = step(cov, x, mask)
        else:
            with backend.use_backend(name):
                trace = step(cov, x, mask)
                assert backend.served("covariance_") == name
        assert relative_error(cov, reference) < 1e-6
        assert relative_error(trace, reference.diagonal().sum()) < 1e-6
    assert backend.served("covariance_") == backend.choose("covariance_", cov, x)


def test_fake_tensors_are_checked_and_not_computed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cov, x = torch.zeros(4, 4), torch.ones(3, 4)
        assert covariance_(cov, x) is None
        assert covariance_([cov, torch.zeros(3, 3)], [x, x[:, 1:]]) is None
        with pytest.raises(ValueError, match="x must have shape"):
            covariance_(cov, x[:, :3])


# ---- streams --------------------------------------------------------------------------------------------


def batches_of(sizes, d, dtype, device="cpu"):
    """Batches of (1, n) or (n,) tokens, every second one with a mask and NaN under it."""
    for i, n in enumerate(sizes):
        x, mask = tokens(n, d, dtype, device, seed=i), None
        if i % 2:
            mask = torch.arange(n, device=device) % 3 != 1
            x[~mask] = float("nan")
            x, mask = x[None], mask[None]
        yield x, mask


SIZES = (3, 1, 7, 0, 30, 2, 16, 5)  # below, at and above a buffer of 16


@pytest.mark.parametrize("cov_dtype", [FP32, FP64], ids=["float32", "float64"])
def test_accumulator_adds_up_all_batches(served_by, device, cov_dtype):
    total, count = torch.zeros(9, 9, dtype=FP64), 0
    acc = CovarianceAccumulator(9, dtype=cov_dtype, device=device, buffer_tokens=16)
    for x, mask in batches_of(SIZES, 9, BF16, device):
        acc.add(x, mask)
        total = expected(total, x, mask)
        count += x[..., 0].numel() if mask is None else int(mask.sum())
    assert acc.result().dtype == cov_dtype
    assert relative_error(acc.result().cpu(), total) < 2e-6
    assert torch.equal(acc.result(), acc.result().T)
    assert acc.count == count


def test_accumulator_goes_on_from_its_state_to_the_same_bits():
    given = list(batches_of(SIZES, 9, FP32))
    whole = CovarianceAccumulator(9, buffer_tokens=16)
    for x, mask in given:
        whole.add(x, mask)
    for stop in range(len(given)):
        first, second = (CovarianceAccumulator(9, buffer_tokens=16) for _ in range(2))
        for x, mask in given[:stop]:
            first.add(x, mask)
        second.add(given[0][0])  # forgotten
        second.load_state_dict(first.state_dict())
        for x, mask in given[stop:]:
            second.add(x, mask)
        assert torch.equal(second.result(), whole.result())
        assert second.count == whole.count


def test_accumulator_refuses_what_does_not_fit():
    acc = CovarianceAccumulator(4, buffer_tokens=8)
    acc.add(torch.ones(3, 4))
    before = acc.state_dict()
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4\)"):
        acc.add(torch.ones(3, 5))
    with pytest.raises(ValueError, match="mask must have shape"):
        acc.add(torch.ones(3, 4), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="x must be float32 like the batches before, got bfloat16"):
        acc.add(torch.ones(3, 4, dtype=BF16))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        acc.add([1.0])
    for bad, error, match in (
        (CovarianceAccumulator(5).state_dict(), ValueError, r"total must have shape \(4, 4\)"),
        (CovarianceAccumulator(4, dtype=FP32).state_dict(), TypeError, "total must be float64"),
        ({**before, "rows": torch.ones(9, 4), "keep": torch.ones(9).bool()}, ValueError, "holds 9 tokens"),
    ):
        with pytest.raises(error, match=match):
            acc.load_state_dict(bad)
    assert all(torch.equal(before[name], now) for name, now in acc.state_dict().items())
    for arguments in ({"d": -1}, {"d": 4, "buffer_tokens": 0}, {"d": 4, "precision": "tf32"}):
        with pytest.raises(ValueError, match="CovarianceAccumulator"):
            CovarianceAccumulator(**arguments)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got bfloat16"):
        CovarianceAccumulator(4, dtype=BF16)


@pytest.mark.parametrize("cov_dtype", [FP32, FP64], ids=["to_float32", "to_float64"])
def test_ten_million_tokens(cov_dtype):
    """Positive tokens, whose sums only grow: what is lost in adding would show on the diagonal as a bias."""
    x = tokens(2**20, 6, FP32).abs_().add_(0.5)
    acc = CovarianceAccumulator(6, dtype=cov_dtype)
    for batch in x.split(2000) * 10:
        acc.add(batch)
    assert acc.count == 10 * 2**20
    reference = 10 * expected(torch.zeros(6, 6), x)
    found = acc.result()
    assert relative_error(found, reference) < (5e-7 if cov_dtype == FP64 else 1e-5)
    bias = (found.double().diagonal() / reference.diagonal() - 1).mean().abs().item()
    assert bias < (1e-7 if cov_dtype == FP64 else 5e-6)


def test_examples():
    import doctest
    import importlib

    module = importlib.import_module("fastedit.ops.covariance")
    assert doctest.testmod(module).failed == 0
    page = Path(__file__).parents[2] / "docs" / "ops" / "covariance.md"
    assert doctest.testfile(str(page), module_relative=False).failed == 0


# ---- properties -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_tokens=st.integers(0, 40),
    d=st.integers(1, 24),
    x_dtype=st.sampled_from([BF16, FP16, FP32, FP64]),
    cov_dtype=st.sampled_from([FP32, FP64]),
    keep=st.one_of(st.none(), st.integers(0, 2**40 - 1)),
    seed=st.integers(0, 1000),
)
def test_any_input_agrees_with_the_reference(n_tokens, d, x_dtype, cov_dtype, keep, seed):
    x, cov = tokens(n_tokens, d, x_dtype, seed=seed), symmetric(d, cov_dtype)
    mask = (
        None
        if keep is None
        else torch.tensor([bool(keep >> i & 1) for i in range(n_tokens)], dtype=torch.bool)
    )
    reference = expected(cov, x, mask)
    for name in ("torch", None):
        out = cov.clone()
        if name is None:
            covariance_(out, x, mask)
        else:
            with backend.use_backend(name):
                covariance_(out, x, mask)
        assert relative_error(out, reference) < 1e-5
        assert torch.equal(out, out.T)
