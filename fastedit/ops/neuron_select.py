"""The fewest neurons that hold a share of the activation mass, their scores, and a matrix restricted to them.

Source: Jiang et al. 2024 (NSE, arXiv 2410.04045): scores Σ|K|, neurons by descending score up to a share p of
their sum, and the subsystem of those neurons. The rule ``"at_least"`` is the paper's, ``"prefix"`` that of its code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, check

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_RULES = ("at_least", "prefix")
_MAX_COLUMNS = 2**30  # indices are int32, and kernels may look a little beyond the last


class Selection(NamedTuple):
    """What :func:`neuron_select` returns."""

    mask: Tensor
    indices: Tensor
    counts: Tensor


def _columns(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size > _MAX_COLUMNS:
            raise ValueError(f"{op}: {name} must have at most 2^30 columns, got {size}")


def _check_select(scores: Tensor, mass: float, rule: str = "at_least") -> None:
    op = "neuron_select"
    if scores.dim() == 0:
        raise ValueError(f"{op}: scores must have shape (..., d), got ()")
    _columns(op, scores=scores.shape[-1])
    check.dtype(op, _DTYPES, scores=scores)
    check.choice(op, _RULES, rule=rule)
    if not mass > 0:
        raise ValueError(f"{op}: mass must be a positive share, got {mass}")


def _empty_selection(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape, dtype=torch.bool),
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty(scores.shape[:-1], dtype=torch.int32),
    )


def _check_scores(keys: Tensor) -> None:
    check.matrix("neuron_scores", keys=keys)
    check.dtype("neuron_scores", _DTYPES, keys=keys)


def _check_gather(matrix: Tensor, indices: Tensor) -> None:
    op = "gather_square"
    check.square(op, matrix=matrix)
    _columns(op, matrix=matrix.shape[0])
    if indices.dim() != 1:
        raise ValueError(f"{op}: indices must have 1 dimension, got shape {tuple(indices.shape)}")
    check.dtype(op, _DTYPES, matrix=matrix)
    check.dtype(op, (torch.int32, torch.int64), indices=indices)
    check.same_device(op, matrix=matrix, indices=indices)


backend.define(
    "neuron_select",
    "(Tensor scores, float mass, str rule='at_least') -> (Tensor, Tensor, Tensor)",
    lambda scores, mass, rule: _empty_selection(scores),
    check=_check_select,
)
backend.define(
    "neuron_scores",
    "(Tensor keys) -> Tensor",
    lambda keys: keys.new_empty(keys.shape[:1], dtype=torch.float64),
    check=_check_scores,
)
backend.define(
    "gather_square",
    "(Tensor matrix, Tensor indices) -> Tensor",
    lambda matrix, indices: matrix.new_empty(indices.shape * 2),
    check=_check_gather,
)


def neuron_select(scores: Tensor, mass: float, *, rule: str = "at_least") -> Selection:
    """Select in each row the smallest set of largest scores that holds a share ``mass`` of the row's sum.

    Equal scores are taken in ascending order of index. No row is sorted and, on a GPU, nothing waits for the host:
    all outputs have fixed shapes.

    Args:
        scores: (..., d), bfloat16, float16, float32 or float64, not negative; any strides. d <= 2^30.
        mass: the share p > 0. From 1 on everything is selected, whatever the rule.
        rule: ``"at_least"``: the fewest of the largest scores whose sum is >= p · total; ``"prefix"``: the
            most whose sum is <= p · total. Neither selects nothing: at least the largest score is taken.

    Returns:
        ``(mask, indices, counts)``: mask (..., d), bool; indices (..., d), int32: of each row the selected
        columns in ascending order, then -1; counts (...), int32: how many there are. Of one row,
        ``indices[:counts]`` is what :func:`gather_square` and indexing take.

    Raises:
        ValueError: a shape, rule or mass that does not fit.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    A row that holds a NaN, an infinity or a negative number (-0.0 is 0) has no answer: its count is 0, its mask
    False, its indices -1. No other row of d > 0 has count 0.

    Exactness: masses are compared as integers. Let 2^E be the least power of two above the row's largest score and
    b = 63 - (the number of bits of d); a score counts as its whole number of steps of 2^(E - b), and p · total is
    one rounded float64 product of p and the total. With d = 14336 a step is 2^-49 of 2^E: a float32 score is exact
    from 2^-25 of the largest up. No order of addition enters, so every backend selects the same set, on every run.
    """
    check.is_tensor("neuron_select", scores=scores)
    return Selection(*backend.call("neuron_select", scores, float(mass), rule))


def neuron_scores(keys: Tensor) -> Tensor:
    """Sum the magnitudes of each neuron's activations: out[i] = Σ_j |keys[i, j]|, |keys| never being stored.

    Args:
        keys: (d, n), bfloat16, float16, float32 or float64; any strides. Fastest if neighbouring neurons are
            neighbours in memory, as in the transpose of (n, d) tokens.

    Returns:
        (d,), float64, added in the order of j: the same bits from every backend. NaN and infinities spread.

    Raises:
        ValueError: ``keys`` is not a matrix.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.
    """
    check.is_tensor("neuron_scores", keys=keys)
    return backend.call("neuron_scores", keys)


def neuron_select_keys(keys: Tensor, mass: float, *, rule: str = "at_least") -> Selection:
    """Select neurons by the mass of their keys: ``neuron_select(neuron_scores(keys), mass, rule=rule)``.

    Args:
        keys: (d, n), as :func:`neuron_scores` takes it.
        mass: as in :func:`neuron_select`.
        rule: as in :func:`neuron_select`.

    Returns:
        ``(mask, indices, counts)`` of shapes (d,), (d,) and ().
    """
    return neuron_select(neuron_scores(keys), mass, rule=rule)


def gather_square(matrix: Tensor, indices: Tensor) -> Tensor:
    """Rows and columns of a square matrix at the same indices, in one pass: ``matrix[indices][:, indices]``.

    Args:
        matrix: (d, d), bfloat16, float16, float32 or float64; any strides. d <= 2^30.
        indices: (s,), int32 or int64, each in [0, d), in any order, repeated or not; any stride.

    Returns:
        (s, s), in the dtype of ``matrix``, contiguous.

    Raises:
        IndexError: an index outside [0, d), for a matrix in the memory of the processor. On a GPU the check would
            have to wait for the device: there such an index reads nothing, and its row and column are NaN.
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.
    """
    check.is_tensor("gather_square", matrix=matrix, indices=indices)
    return backend.call("gather_square", matrix, indices)


# ---- reference ------------------------------------------------------------------------------------------


def _grid_steps(scores: Tensor) -> Tensor:
    """float64 scores (B, d) as whole numbers of grid steps: cut from the bit patterns, so never rounded."""
    bits = scores.contiguous().view(torch.int64) & 0x7FFFFFFFFFFFFFFF  # without the sign of -0.0
    field = bits >> 52
    mantissa = (bits & 0xFFFFFFFFFFFFF) | ((field > 0).long() << 52)
    exponent = field.clamp(min=1)
    grid_bits = 63 - scores.shape[1].bit_length()
    shift = grid_bits - 53 + exponent - exponent.amax(1, keepdim=True)
    return torch.where(shift >= 0, mantissa << shift.clamp(min=0), mantissa >> (-shift).clamp(0, 63))


def neuron_select_reference(
    scores: Tensor, mass: float, rule: str = "at_least"
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch: sorted, added up in integers, cut; what every backend is tested against."""
    d = scores.shape[-1]
    if scores.numel() == 0:
        mask, indices, counts = _empty_selection(scores)
        return mask, indices, counts.zero_()
    rows = scores.reshape(-1, d).double()
    valid = ((rows >= 0) & rows.isfinite()).all(1, keepdim=True)
    rows = torch.where(valid, rows, 0)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    prefix = _grid_steps(rows).gather(1, order).cumsum(1)
    if mass >= 1:
        counts = torch.full_like(prefix[:, :1], d)
    else:
        target = mass * prefix[:, -1:].double()
        if rule == "at_least":
            counts = (prefix < target.ceil().long()).sum(1, keepdim=True) + 1
        else:
            counts = (prefix <= target.floor().long()).sum(1, keepdim=True)
    counts = torch.where(valid, counts.clamp(1, d), 0)
    position = torch.arange(d, device=rows.device)
    mask = rows.new_empty(rows.shape, dtype=torch.bool).scatter_(1, order, position < counts)
    indices = (
        (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
    )  # the selected first, in ascending order
    indices = torch.where(position < counts, indices, -1).int()
    return mask.reshape(scores.shape), indices.reshape(scores.shape), counts.int().reshape(scores.shape[:-1])


def neuron_scores_reference(keys: Tensor) -> Tensor:
    """The same in plain torch: magnitudes in float64, added in the order of columns."""
    out = keys.new_zeros(keys.shape[0], dtype=torch.float64)
    for column in keys.unbind(1):
        out += column.double().abs()
    return out


def gather_square_reference(matrix: Tensor, indices: Tensor) -> Tensor:
    """The same in plain torch, with the rows as an intermediate."""
    inside = (indices >= 0) & (indices < matrix.shape[0])
    if matrix.device.type == "cpu":
        if not inside.all():
            raise IndexError(f"gather_square: every index must be in [0, {matrix.shape[0]})")
        return matrix.index_select(0, indices).index_select(1, indices)
    if matrix.numel() == 0:
        return matrix.new_full(indices.shape * 2, float("nan"))
    safe = torch.where(inside, indices, 0)
    square = matrix.index_select(0, safe).index_select(1, safe)
    return square.masked_fill_(~(inside[:, None] & inside), float("nan"))


# ---- backends -------------------------------------------------------------------------------------------


def _rows(scores: Tensor, any_stride: bool = False) -> Tensor:
    """Scores as (B, d), of unit last stride unless ``any_stride``; says once if that takes a copy."""
    if scores.dim() == 2 and (any_stride or scores.stride(1) == 1):
        return scores
    d = scores.shape[-1]
    rows = scores.reshape(scores.shape[:-1].numel(), d)
    if d > 1 and rows.stride(1) != 1 and not any_stride:
        rows = rows.contiguous()
    if rows.numel() and rows.data_ptr() != scores.data_ptr():
        check.once(
            logging.WARNING,
            f"neuron_select: scores of shape {tuple(scores.shape)} and strides {scores.stride()} cannot be read as "
            "rows and are copied; a contiguous last dimension and evenly spaced rows avoid it",
        )
    return rows


def _select_into(
    fill: Callable[..., None], scores: Tensor, rows: Tensor, mass: float, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    mask, indices, counts = _empty_selection(scores)
    if scores.dim() == 2:
        fill(rows, mass, rule == "prefix", mask, indices, counts)
    else:
        fill(rows, mass, rule == "prefix", mask.view(rows.shape), indices.view(rows.shape), counts.view(-1))
    return mask, indices, counts


def _select_compiled(scores: Tensor, mass: float, rule: str = "at_least") -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(scores.detach(), any_stride=scores.device.type == "cpu")
    return _select_into(backend.compiled().neuron_select, scores, rows, mass, rule)


def _select_triton(scores: Tensor, mass: float, rule: str = "at_least") -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.neuron_select import neuron_select_triton

    return _select_into(neuron_select_triton, scores, _rows(scores), mass, rule)


def _scores_compiled(keys: Tensor) -> Tensor:
    out = keys.new_empty(keys.shape[:1], dtype=torch.float64)
    backend.compiled().neuron_scores(keys.detach(), out)
    return out


def _scores_triton(keys: Tensor) -> Tensor:
    from ..kernels.neuron_select import neuron_scores_triton

    out = keys.new_empty(keys.shape[:1], dtype=torch.float64)
    neuron_scores_triton(keys, out)
    return out


def _gather_compiled(matrix: Tensor, indices: Tensor) -> Tensor:
    out = matrix.new_empty(indices.shape * 2)
    backend.compiled().gather_square(matrix.detach(), indices, out)
    return out


def _gather_triton(matrix: Tensor, indices: Tensor) -> Tensor:
    from ..kernels.neuron_select import gather_square_triton

    out = matrix.new_empty(indices.shape * 2)
    gather_square_triton(matrix, indices, out)
    return out


# Speeds relative to the torch backend: measured on two cores with AVX-512 for cpp, estimated for GPUs.
backend.provide("neuron_select", "cpp", _select_compiled, symbol="neuron_select", device="cpu", speed=100.0)
backend.provide("neuron_select", "cuda", _select_compiled, symbol="neuron_select", device="cuda", speed=20.0)
backend.provide("neuron_select", "triton", _select_triton, device="cuda", speed=8.0)
backend.provide("neuron_select", "torch", neuron_select_reference)

backend.provide("neuron_scores", "cpp", _scores_compiled, symbol="neuron_scores", device="cpu", speed=4.0)
backend.provide("neuron_scores", "cuda", _scores_compiled, symbol="neuron_scores", device="cuda", speed=20.0)
backend.provide("neuron_scores", "triton", _scores_triton, device="cuda", speed=20.0)
backend.provide("neuron_scores", "torch", neuron_scores_reference)

backend.provide("gather_square", "cpp", _gather_compiled, symbol="gather_square", device="cpu", speed=2.0)
backend.provide("gather_square", "cuda", _gather_compiled, symbol="gather_square", device="cuda", speed=2.0)
backend.provide("gather_square", "triton", _gather_triton, device="cuda", speed=2.0)
backend.provide("gather_square", "torch", gather_square_reference)
