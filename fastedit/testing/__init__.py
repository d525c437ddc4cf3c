"""Checks by which authors of kernels hold their own functions against fastedit's float64 references.

>>> import torch, fastedit.testing
>>> from fastedit.ops import covariance_
>>> checks = fastedit.testing.check_op("covariance_", covariance_, dtypes=[torch.float32], without=["lists"])

As tests of their own, one for each case:

>>> import pytest
>>> @pytest.mark.parametrize("case", fastedit.testing.cases("covariance_"), ids=str)
... def test_my_covariance(case):
...     case.check(my_covariance, "cuda")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ops import check
from .case import Case

__all__ = ["OPS", "Case", "cases", "check_op"]

_MODULES = {
    "covariance_": "covariance",
    "gather_square": "neuron_select",
    "low_rank_update_": "low_rank",
    "masked_adam_": "masked_update",
    "masked_sgd_": "masked_update",
    "max_inner_product": "retrieval",
    "nearest_key": "retrieval",
    "neuron_scores": "neuron_select",
    "neuron_select": "neuron_select",
    "routing_score": "routing",
    "ties_merge": "ties",
}
OPS = tuple(_MODULES)


def cases(op: str, *, dtypes: Iterable[torch.dtype] | None = None, without: Iterable[str] = ()) -> list[Case]:
    """The cases of an op: odd shapes, views, empty and poisoned inputs, each against the float64 reference.

    Args:
        op: one of ``OPS``, a function of :mod:`fastedit.ops`.
        dtypes: of the op's main argument; None: all.
        without: what the function to be checked does not do, such as ``"mask"`` or ``"views"``: the words in
            ``needs`` of the cases.

    Raises:
        ValueError: an unknown op or word; no case is left.
    """
    check.choice("fastedit.testing", OPS, operation=op)
    module = importlib.import_module(f".{_MODULES[op]}", __name__)
    found = [case for case in module.cases() if case.op == op]
    words = sorted(set().union(*(case.needs for case in found)))
    for word in (left_out := set(without)):
        check.choice("fastedit.testing", words, without=word)
    wanted = None if dtypes is None else set(dtypes)
    found = [case for case in found if (wanted is None or case.dtype in wanted) and not case.needs & left_out]
    if not found:
        raise ValueError(f"fastedit.testing: no case of {op} is left for dtypes {dtypes}, without {without}")
    return found


def check_op(
    op: str,
    function: Callable[..., Any],
    *,
    devices: Iterable[torch.device | str] = ("cpu",),
    dtypes: Iterable[torch.dtype] | None = None,
    without: Iterable[str] = (),
    tf32x3: bool | None = None,
) -> int:
    """Check a function against the reference of an op in all its cases.

    Args:
        op: as of :func:`cases`.
        function: takes what ``fastedit.ops.<op>`` takes, and does the same; arguments that a case does not need
            are not given.
        devices: where the arguments are.
        dtypes: as of :func:`cases`.
        without: as of :func:`cases`.
        tf32x3: accept what three TF32 products reach in place of one of float32; None: on GPUs.

    Returns:
        How many checks were made.

    Raises:
        AssertionError: the function is wrong, or raised something; names the first such case and what differs.
        ValueError: as of :func:`cases`.
    """
    found = cases(op, dtypes=dtypes, without=without)
    count = 0
    for device in devices:
        for case in found:
            case.check(function, device, tf32x3=tf32x3)
            count += 1
    return count
