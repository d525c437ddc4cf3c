"""``fastedit.testing``: every backend passes every case of every op; kernels that are wrong are caught."""

from __future__ import annotations

import pytest
import torch

import fastedit.testing
from fastedit import BackendUnavailable, ops
from fastedit.ops import backend
from fastedit.testing import OPS, Case, cases, check_op
from fastedit.testing.case import name_of

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GROUPS = [(op, dtype) for op in OPS for dtype in dict.fromkeys(case.dtype for case in cases(op))]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype"), GROUPS, ids=[f"{op}-{name_of(dtype)}" for op, dtype in GROUPS])
def test_every_backend_passes(served_by, device, op, dtype):
    for case in cases(op, dtypes=[dtype]):
        try:
            case.check(getattr(ops, op), device, tf32x3=served_by in ("triton", "cuda"))
        except BackendUnavailable as reason:
            if dtype != FP64:  # the one that not every backend takes
                raise
            pytest.skip(str(reason))
        assert backend.served(op) == served_by or "lists" in case.needs, case


def test_each_op_has_cases_with_names_of_their_own():
    for op in OPS:
        names = [str(case) for case in cases(op)]
        assert len(names) == len(set(names)) > 20
        assert all(name.startswith(f"{op}-") and " " not in name for name in names)


# ---- kernels that are wrong -----------------------------------------------------------------------------


def covariance(cov, x, mask=None, lower=False, poisoned=False, flat=False, rounded=False):
    """A covariance as an author may write it, with one of the usual mistakes."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    if flat:  # reads the storage in the order of a contiguous tensor
        rows = x.as_strided(rows.shape, (rows.shape[1], 1))
    rows = rows.to(torch.promote_types(cov.dtype, x.dtype)) if not rounded else rows
    if mask is not None:
        keep = mask.reshape(-1)
        rows = rows * keep[:, None] if poisoned else rows[keep]
    product = (rows.T @ rows).to(cov.dtype)
    cov += product.tril() if lower else product


@pytest.mark.parametrize(
    ("mistake", "dtypes", "match"),
    [
        ("lower", [BF16], "covariance_-bfloat16-float32_cov-primes-all on cpu: cov has a relative error"),
        ("poisoned", [FP32], "float32-float32_cov-one-masked|primes-masked"),
        ("flat", [FP32], "covariance_-float32-x:_offset_columns"),
        ("rounded", [BF16], "bfloat16-float32_cov-.*relative error of .*, allowed are 1.0e-05"),
    ],
)
def test_mistakes_are_caught_and_the_case_is_named(mistake, dtypes, match):
    without = ["lists"]
    assert check_op("covariance_", covariance, dtypes=dtypes, without=without) > 20
    with pytest.raises(AssertionError, match=match):
        check_op(
            "covariance_", lambda *args: covariance(*args, **{mistake: True}), dtypes=dtypes, without=without
        )


def twice(function):
    """Does its work in place twice, or returns twice its result."""

    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        if out is None:
            function(*args, **kwargs)
            return None
        return tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out

    return wrong


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_function_is_caught_for_every_op(op):
    with pytest.raises(AssertionError, match=f"{op}-.* on cpu: "):
        check_op(op, twice(getattr(ops, op)), dtypes=[FP32])


def test_what_a_function_raises_is_told_with_the_case():
    def broken(cov, x, mask=None):
        raise RuntimeError("illegal memory access")

    with pytest.raises(AssertionError, match="one-all on cpu: RuntimeError: illegal memory access"):
        check_op("covariance_", broken)


def test_writing_outside_of_a_view_is_caught():
    def wide(param, grad, mask, lr, **options):
        ops.masked_sgd_(param, grad, mask, lr, **options)
        if not param.is_contiguous() and param.stride(1) == 1:
            param.as_strided((1,), (1,), param.storage_offset() + param.shape[1]).fill_(1.0)

    with pytest.raises(AssertionError, match="something outside of the view was written"):
        check_op("masked_sgd_", wide, dtypes=[FP32])


def test_cases_can_be_left_out():
    seen = []

    def plain(cov, x):
        seen.append(x.dtype)
        ops.covariance_(cov, x)

    n = check_op("covariance_", plain, dtypes=[FP32, FP16], without=["mask", "views", "lists", "float64_cov"])
    assert n == len(seen) > 5
    assert set(seen) == {FP32, FP16}
    assert check_op("covariance_", ops.covariance_, devices=["cpu", "cpu"], dtypes=[FP16]) == 2 * len(
        cases("covariance_", dtypes=[FP16])
    )


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="operation must be 'covariance_'.*got 'covariance'"):
        cases("covariance")
    with pytest.raises(
        ValueError, match="without must be 'float64_cov', 'lists', 'mask' or 'views', got 'norm'"
    ):
        cases("covariance_", without=["norm"])
    with pytest.raises(ValueError, match="no case of covariance_ is left"):
        cases("covariance_", dtypes=[torch.int8])


@pytest.mark.parametrize(
    "case", fastedit.testing.cases("covariance_", dtypes=[BF16], without=["lists"]), ids=str
)
def test_cases_as_tests_of_their_own(case):
    assert isinstance(case, Case)
    case.check(ops.covariance_)
