"""Optimiser steps on the entries that a sparse mask selects, in place, in one pass and without a stored mask.

Sources: Wang et al. 2024 (WISE), section 2.3.1, whose side memory is trained under a random mask by SGD with weight
decay and a bound on the distance from the original weight; Kingma & Ba 2015 (Adam), algorithm 1; Loshchilov &
Hutter 2019 (AdamW) for the decoupled decay; Salmon et al. 2011 for the random words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, check
from .masks import BLOCK, BitMask, IndexMask, Mask, PhiloxMask, _pack_bits, _unpack_bits, as_mask
from .philox import philox

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCOPES = ("all", "masked", "none")
_PIECE = 1 << 20  # entries that the torch backend works on at a time
_CACHED = 1 << 19  # entries of a product that the cpp backend multiplies out at a time

Gradient = Tensor | tuple[Tensor, Tensor]


# ---- checks ---------------------------------------------------------------------------------------------


def _check_key(op: str, key: list[int]) -> None:
    if len(key) not in (0, 4):
        raise ValueError(f"{op}: philox must hold seed, shard, layer and threshold, or nothing, got {key}")
    if key and not all(0 <= k < 1 << 32 for k in key[1:]):
        raise ValueError(f"{op}: shard, layer and threshold must be in [0, 2^32), got {key[1:]}")


def _check_bits(bits: Tensor, start: int, philox: list[int]) -> None:
    op = "philox_bits_"
    check.dtype(op, (torch.uint8,), bits=bits)
    if bits.dim() != 1 or not bits.is_contiguous():
        raise ValueError(f"{op}: bits must be contiguous, of 1 dimension, got shape {tuple(bits.shape)}")
    if start < 0 or start % 8:
        raise ValueError(f"{op}: start must be a multiple of 8, got {start}")
    _check_key(op, philox)
    if not philox:
        raise ValueError(f"{op}: philox must hold seed, shard, layer and threshold, got nothing")


def _check_common(
    op: str,
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    mask: Tensor | None,
    philox: list[int],
    lr: float,
    decay: float,
    decay_scope: str,
    clamp_to: Tensor | None,
    clamp: float,
) -> None:
    check.matrix(op, param=param, grad=grad)
    check.dtype(op, _DTYPES, param=param, grad=grad, right=right, clamp_to=clamp_to)
    if right is None:
        check.shape(op, param.shape, "like param", grad=grad)
    else:
        check.matrix(op, right=right)
        rank = grad.shape[1]
        check.shape(op, (param.shape[0], rank), f"because param is {tuple(param.shape)}", left=grad)
        check.shape(
            op,
            (param.shape[1], rank),
            f"because param is {tuple(param.shape)}, left of rank {rank}",
            right=right,
        )
    check.shape(op, param.shape, "like param", clamp_to=clamp_to)
    check.same_device(op, param=param, grad=grad, right=right, mask=mask, clamp_to=clamp_to)
    check.choice(op, _SCOPES, decay_scope=decay_scope)
    for name, value in {"lr": lr, "decay": decay, "clamp": clamp}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    _check_key(op, philox)
    if mask is None:
        return
    check.dtype(op, (torch.uint8, torch.int32, torch.int64), mask=mask)
    if mask.dim() != 1 or not mask.is_contiguous():
        raise ValueError(f"{op}: mask must be contiguous, of 1 dimension, got shape {tuple(mask.shape)}")
    if philox:
        raise ValueError(f"{op}: either mask or philox is given, got both")
    if mask.dtype == torch.uint8:
        check.shape(op, ((param.numel() + 7) // 8,), f"for {param.numel()} entries", mask=mask)
    elif clamp_to is not None or (decay and decay_scope == "all"):
        raise ValueError(
            f"{op}: indices serve only where no other entry changes: pass bits to clamp or decay all entries"
        )


def _check_sgd(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    mask: Tensor | None,
    philox: list[int],
    lr: float,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    _check_common("masked_sgd_", param, grad, right, mask, philox, lr, decay, decay_scope, clamp_to, clamp)


def _check_adam(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    philox: list[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    op = "masked_adam_"
    _check_common(
        op,
        param,
        grad,
        right,
        mask,
        philox,
        lr,
        weight_decay if decoupled else 0.0,
        decay_scope,
        clamp_to,
        clamp,
    )
    check.same_device(op, param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, offsets=offsets)
    work = _work_dtype(param)
    check.dtype(op, (work,), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check.shape(op, exp_avg.shape, "like exp_avg", exp_avg_sq=exp_avg_sq)
    if exp_avg.dim() != 1 or not exp_avg.is_contiguous() or not exp_avg_sq.is_contiguous():
        raise ValueError(f"{op}: exp_avg and exp_avg_sq must be contiguous, of 1 dimension")
    for name, value in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")
    for name, value in {"eps": eps, "weight_decay": weight_decay}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    if step < 1:
        raise ValueError(f"{op}: step counts from 1, got {step}")
    if weight_decay and not decoupled and decay_scope == "all":
        raise ValueError(
            f"{op}: a decay that is part of the gradient needs moments, which only selected entries have: "
            "decay_scope must be 'masked' or 'none', or decoupled=True"
        )
    if philox or (mask is not None and mask.dtype == torch.uint8):
        check.is_tensor(op, offsets=offsets)
        check.dtype(op, (torch.int64,), offsets=offsets)
        blocks = -(-param.numel() // BLOCK)
        check.shape(op, (blocks,), f"for {param.numel()} entries", offsets=offsets)
    else:
        count = param.numel() if mask is None else mask.numel()
        check.shape(op, (count,), "one for each selected entry", exp_avg=exp_avg)


backend.define("philox_bits_", "(Tensor(a!) bits, int start, int[] philox) -> ()", check=_check_bits)
backend.define(
    "masked_sgd_",
    "(Tensor(a!) param, Tensor grad, Tensor? right, Tensor? mask, int[] philox, float lr, float decay=0.0, "
    "str decay_scope='all', Tensor? clamp_to=None, float clamp=0.0) -> ()",
    check=_check_sgd,
)
backend.define(
    "masked_adam_",
    "(Tensor(a!) param, Tensor grad, Tensor? right, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? offsets, "
    "Tensor? mask, int[] philox, int step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay=0.0, bool decoupled=False, str decay_scope='masked', Tensor? clamp_to=None, "
    "float clamp=0.0) -> ()",
    check=_check_adam,
)


# ---- public functions -----------------------------------------------------------------------------------


def masked_sgd_(
    param: Tensor,
    grad: Gradient,
    mask: Mask | Tensor | None,
    lr: float,
    *,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float | None = None,
    transposed: bool = False,
) -> None:
    """One step of SGD on the entries that a mask selects, then a clamp, in one pass over ``param``.

    param -= lr · (mask ∘ grad + decay · param), then every entry into clamp_to ± clamp. Float32 arithmetic
    (float64 for a float64 param), rounded once to the param's dtype. The mask is regenerated or read as bits, and
    a gradient given as a product is multiplied out tile by tile (not by the ``cuda`` backend, which needs it whole).

    Args:
        param: (d_out, d_in), any strides, or of other dimensions and contiguous; bfloat16, float16, float32 or
            float64; modified in place, also where it requires a gradient.
        grad: like ``param``, any floating dtype and strides; or a pair (left, right) that stands for
            left rightᵀ: left (d_out, r), right (d_in, r).
        mask: a :class:`PhiloxMask`, :class:`BitMask` or :class:`IndexMask` over the entries of ``param`` in
            (d_out, d_in) order; or packed bits (uint8) or sorted indices (int32, int64); None selects all.
        lr: the learning rate, not negative.
        decay: weight decay, not negative.
        decay_scope: which entries decay: ``"all"`` (the published WISE), ``"masked"`` or ``"none"``.
        clamp_to: like ``param``, any floating dtype; with ``clamp``.
        clamp: how far an entry may lie from ``clamp_to``, not negative.
        transposed: ``param``, ``grad`` and ``clamp_to`` are stored (d_in, d_out), as in GPT-2; left, right and
            the order of entries keep their meaning.

    Raises:
        ValueError: shapes, devices or values that do not fit, ``param`` sharing memory with another argument.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    What stands in ``grad`` at entries not selected is never used, NaN included; entries that neither the mask, a
    decay nor a clamp reaches keep their value. NaN in param or clamp_to gives NaN. A second run gives the same bits.

    >>> param, grad = torch.ones(2, 4), torch.full((2, 4), 0.5)
    >>> masked_sgd_(param, grad, torch.tensor([0, 5]), lr=1.0)
    >>> param.tolist()
    [[0.5, 1.0, 1.0, 1.0], [1.0, 0.5, 1.0, 1.0]]
    """
    op = "masked_sgd_"
    dense = clamp_to is not None or (decay != 0 and decay_scope == "all")
    args = _arguments(op, param, grad, mask, clamp_to, clamp, transposed, dense)
    backend.call(
        op, args.param, args.grad, args.right, args.mask, args.key, float(lr), float(decay), decay_scope,
        args.clamp_to, args.clamp,
    )  # fmt: skip


class MaskedAdamState:
    """The moments of selected entries, and of nothing else, in the order in which entries are counted.

    Memory: 8 bytes for each selected entry (16 for a float64 param), and 8 for every 4096 entries.

    Args:
        param: whose entries; only shape, dtype and device are used.
        mask: as in :func:`masked_adam_`; counted here once, which waits for the device.

    Attributes:
        exp_avg, exp_avg_sq: (count,), float32 (float64 for a float64 param).
        offsets: (⌈n / 4096⌉,), int64, selected entries before every 4096; None with indices or without a mask.
        step: how many steps were taken.
        mask: the mask.
    """

    def __init__(self, param: Tensor, mask: Mask | Tensor | None) -> None:
        n = param.numel()
        self.mask = None if mask is None else as_mask("MaskedAdamState", mask, n)
        self.numel = n
        self.offsets: Tensor | None = None
        count = n
        if isinstance(self.mask, IndexMask):
            count = self.mask.indices.numel()
        elif isinstance(self.mask, BitMask) or (self.mask is not None and _key(self.mask)):
            self.offsets, count = self.mask.offsets(n, device=param.device)
        self.exp_avg = torch.zeros(count, dtype=_work_dtype(param), device=param.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs: the moments and the step; the mask is kept elsewhere."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a state with the same mask.

        Raises:
            KeyError: an entry is missing.
            ValueError: it has another number of selected entries.
        """
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if key not in state:
                raise KeyError(
                    f"MaskedAdamState.load_state_dict: no {key!r} in the state, got {sorted(state)}"
                )
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
        check.shape("MaskedAdamState.load_state_dict", self.exp_avg.shape, "to fit the mask", **moments)
        self.exp_avg.copy_(moments["exp_avg"])
        self.exp_avg_sq.copy_(moments["exp_avg_sq"])
        self.step = int(state["step"])

    def __repr__(self) -> str:
        return f"MaskedAdamState({self.exp_avg.numel()} of {self.numel} entries, step {self.step})"


def masked_adam_(
    param: Tensor,
    grad: Gradient,
    mask: Mask | Tensor | None,
    state: MaskedAdamState,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float | None = None,
    transposed: bool = False,
) -> None:
    """One step of Adam on the entries that a mask selects, then a clamp; moments exist for those entries only.

    For a selected entry w with gradient g, the formulas of ``torch.optim.Adam``, or of ``torch.optim.AdamW`` if
    ``decoupled``, with t = state.step + 1:

    - g += weight_decay · w, or, decoupled, w -= lr · weight_decay · w;
    - m += (1 - β₁)(g - m), v = β₂ v + (1 - β₂) g²;
    - w -= lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps).

    Then every entry, selected or not, into clamp_to ± clamp.

    Args:
        param: as in :func:`masked_sgd_`.
        grad: as in :func:`masked_sgd_`; the GPU backends need a product whole.
        mask: as in :func:`masked_sgd_`.
        state: a :class:`MaskedAdamState` made for this mask; modified in place.
        lr: the learning rate, not negative.
        betas: β₁ and β₂, in [0, 1).
        eps: not negative.
        weight_decay: not negative.
        decoupled: whether the decay acts on the weight directly (AdamW) instead of through the gradient.
        decay_scope: which entries decay: ``"masked"``, ``"none"`` or, only if ``decoupled``, ``"all"``.
        clamp_to: as in :func:`masked_sgd_`.
        clamp: as in :func:`masked_sgd_`.
        transposed: as in :func:`masked_sgd_`.

    Raises:
        ValueError: as :func:`masked_sgd_`; a state made for another mask; ``"all"`` without ``decoupled``.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    The step number is a host number: in a CUDA graph its bias correction would be repeated.

    >>> param, mask = torch.zeros(64, 64), PhiloxMask(seed=1, density=0.1)
    >>> state = MaskedAdamState(param, mask)
    >>> masked_adam_(param, torch.ones(64, 64), mask, state, lr=0.5)
    >>> state, param.unique().tolist()
    (MaskedAdamState(393 of 4096 entries, step 1), [-0.5, 0.0])
    """
    op = "masked_adam_"
    dense = clamp_to is not None or (decoupled and weight_decay != 0 and decay_scope == "all")
    if dense and isinstance(state.mask, IndexMask):
        raise ValueError(
            f"{op}: the state was made for indices, which serve only where no other entry changes: make mask and "
            "state from BitMask(mask.bits(n), n)"
        )
    if not _same_mask(mask, state.mask) or state.numel != param.numel():
        raise ValueError(f"{op}: the state was made for another mask: {state.mask} of {state.numel} entries")
    args = _arguments(op, param, grad, state.mask, clamp_to, clamp, transposed, dense)
    backend.call(
        op, args.param, args.grad, args.right, state.exp_avg, state.exp_avg_sq, state.offsets, args.mask, args.key,
        state.step + 1, float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), decoupled,
        decay_scope, args.clamp_to, args.clamp,
    )  # fmt: skip
    state.step += 1


@dataclass
class _Arguments:
    """Tensors as matrices in (d_out, d_in) orientation and the mask as the ops take it."""

    param: Tensor
    grad: Tensor
    right: Tensor | None
    mask: Tensor | None
    key: list[int]
    clamp_to: Tensor | None
    clamp: float


def _arguments(
    op: str,
    param: Tensor,
    grad: Gradient,
    mask: Mask | Tensor | None,
    clamp_to: Tensor | None,
    clamp: float | None,
    transposed: bool,
    dense: bool,
) -> _Arguments:
    check.is_tensor(op, param=param)
    left, right = grad if isinstance(grad, tuple) else (grad, None)
    check.is_tensor(op, grad=left, **({} if right is None else {"right": right}))
    if (clamp_to is None) != (clamp is None):
        raise ValueError(f"{op}: clamp_to and clamp must be given together")
    if clamp_to is not None:
        check.is_tensor(op, clamp_to=clamp_to)
        check.shape(op, param.shape, "like param", clamp_to=clamp_to)
    if right is None:
        check.shape(op, param.shape, "like param", grad=left)
    if mask is not None:
        mask = as_mask(op, mask, param.numel())
        if dense and isinstance(mask, IndexMask):
            mask = BitMask(mask.bits(mask.n), mask.n)
    tensor = (
        mask.packed if isinstance(mask, BitMask) else mask.indices if isinstance(mask, IndexMask) else None
    )
    if transposed:
        check.matrix(op, param=param)
        param = param.T
        clamp_to = None if clamp_to is None else clamp_to.T
        left = left.T if right is None else left
    return _Arguments(
        _matrix(op, param, written=True),
        _matrix(op, left) if right is None else left,
        right,
        tensor,
        [] if mask is None else _key(mask),
        None if clamp_to is None else _matrix(op, clamp_to),
        0.0 if clamp is None else float(clamp),
    )


def _key(mask: Mask) -> list[int]:
    return mask.key if isinstance(mask, PhiloxMask) else []


def _same_mask(given: Mask | Tensor | None, made_for: Mask | None) -> bool:
    if isinstance(given, Tensor):
        return given is getattr(made_for, "packed", None) or given is getattr(made_for, "indices", None)
    return given is made_for or (isinstance(given, PhiloxMask) and given == made_for)


def _matrix(op: str, tensor: Tensor, written: bool = False) -> Tensor:
    """A tensor of any number of dimensions as a matrix with its rows in the same order."""
    if tensor.dim() == 2:
        return tensor
    columns = tensor.shape[-1] if tensor.dim() else 1
    rows = math.prod(tensor.shape[:-1])
    if written and not tensor.is_contiguous():
        raise ValueError(
            f"{op}: param must have 2 dimensions or be contiguous, got shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(rows, columns)


def _work_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


# ---- references -----------------------------------------------------------------------------------------


def _clamped(value: Tensor, clamp_to: Tensor | None, clamp: float | None) -> Tensor:
    if clamp_to is None or clamp is None:
        return value
    middle = clamp_to.to(value.dtype)
    return torch.clamp(value, middle - clamp, middle + clamp)


def _whole(grad: Gradient) -> Tensor:
    return grad[0].double() @ grad[1].double().T if isinstance(grad, tuple) else grad.double()


def masked_sgd_reference(
    param: Tensor,
    grad: Gradient,
    mask: Mask | Tensor | None,
    lr: float,
    *,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float | None = None,
) -> None:
    """The same in plain torch with a dense mask, in float64; what every backend is tested against."""
    keep = _dense(param, mask)
    old = param.double()
    change = torch.where(keep, _whole(grad), 0.0)
    if decay_scope != "none" and decay:
        change = change + torch.where(keep | (decay_scope == "all"), decay * old, 0.0)
    changed = keep | bool(decay and decay_scope == "all")
    param.copy_(_clamped(torch.where(changed, old - lr * change, old), clamp_to, clamp))


def masked_adam_reference(
    param: Tensor,
    grad: Gradient,
    mask: Mask | Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float | None = None,
) -> None:
    """The same in plain torch with dense moments ``exp_avg`` and ``exp_avg_sq`` like ``param``, in float64."""
    keep = _dense(param, mask)
    value, g = param.double(), _whole(grad)
    if decoupled and weight_decay and decay_scope != "none":
        value = torch.where(keep | (decay_scope == "all"), value - lr * weight_decay * value, value)
    elif weight_decay and decay_scope != "none":
        g = g + weight_decay * value
    m = betas[0] * exp_avg.double() + (1 - betas[0]) * g
    v = betas[1] * exp_avg_sq.double() + (1 - betas[1]) * g * g
    exp_avg.copy_(torch.where(keep, m, exp_avg.double()))
    exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq.double()))
    m, v = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    param.copy_(_clamped(torch.where(keep, value - lr * m / (v.sqrt() + eps), value), clamp_to, clamp))


def _dense(param: Tensor, mask: Mask | Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(param, dtype=torch.bool)
    with backend.use_backend("torch"):
        return as_mask("reference", mask, param.numel()).dense(param.shape, device=param.device)


# ---- torch ----------------------------------------------------------------------------------------------


def _keep_philox(start: int, n: int, key: list[int], device: torch.device) -> Tensor:
    """Which of the entries start to start + n - 1 are selected: bool."""
    seed, shard, layer, threshold = key
    first = start // 4
    counters = torch.arange(first, (start + n + 3) // 4, device=device)
    words = philox(counters, seed, shard, layer).reshape(-1)[start - 4 * first :][:n]
    return words < threshold


def _philox_bits_torch(bits: Tensor, start: int, philox: list[int]) -> None:
    for i in range(0, bits.numel(), _PIECE // 8):
        piece = bits[i : i + _PIECE // 8]
        piece.copy_(_pack_bits(_keep_philox(start + 8 * i, 8 * piece.numel(), philox, bits.device)))


def _keep(start: int, n: int, mask: Tensor | None, key: list[int], device: torch.device) -> Tensor | None:
    """The dense mask of a piece; None where all are selected."""
    if mask is not None:
        bits = _unpack_bits(mask[start // 8 : (start + n + 7) // 8], start % 8 + n)
        return bits[start % 8 :]
    return _keep_philox(start, n, key, device) if key else None


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, slice, int]]:
    """Rectangles of entries that follow one another, and the index of their first entry."""
    rows, columns = shape
    step = max(1, _PIECE // max(1, columns))
    width = max(1, min(columns, _PIECE))
    for r in range(0, rows, step):
        for c in range(0, columns, width):
            yield slice(r, min(rows, r + step)), slice(c, min(columns, c + width)), r * columns + c


def _grad_piece(grad: Tensor, right: Tensor | None, r: slice, c: slice, work: torch.dtype) -> Tensor:
    if right is None:
        return grad[r, c].to(work)
    with backend.full_float32():
        return grad[r].to(work) @ right[c].to(work).T


def _grad_at(grad: Tensor, right: Tensor | None, rows: Tensor, columns: Tensor, work: torch.dtype) -> Tensor:
    if right is None:
        return grad[rows, columns].to(work)
    step = max(1, _PIECE // max(1, grad.shape[1]))
    parts = [
        (grad[r].to(work) * right[c].to(work)).sum(1)
        for r, c in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(parts)


def _is_indices(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.uint8


def _places(param: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices = indices.long()
    return indices // param.shape[1], indices % param.shape[1]


def _masked_sgd_torch(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    lr: float,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    """Pieces whose dense masks and copies stay small."""
    if param.numel() == 0:
        return
    param, work = param.detach(), _work_dtype(param)
    decay = 0.0 if decay_scope == "none" else decay
    if _is_indices(mask):
        at = _places(param, mask)  # type: ignore[arg-type]
        old, change = param[at].to(work), _grad_at(grad, right, *at, work)
        change = torch.add(change, old, alpha=decay) if decay else change
        param[at] = torch.sub(old, change, alpha=lr).to(param.dtype)
        return
    for r, c, start in _pieces(param.shape):
        into = param[r, c]
        old, change = into.to(work), _grad_piece(grad, right, r, c, work)
        keep = _keep(start, into.numel(), mask, key, param.device)
        if keep is not None:
            keep = keep.reshape(into.shape)
            change = torch.where(keep, change, 0)
        if decay:
            change = torch.add(change, old, alpha=decay)
        new = torch.sub(old, change, alpha=lr)
        if keep is not None and not (decay and decay_scope == "all"):
            new = torch.where(keep, new, old)
        into.copy_(_clamped(new, None if clamp_to is None else clamp_to[r, c], clamp))


def _adam_torch(
    value: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:
    """The new values of selected entries; their moments are updated in place."""
    if weight_decay and decoupled:
        value = torch.sub(value, value, alpha=lr * weight_decay)
    elif weight_decay:
        g = torch.add(g, value, alpha=weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    below = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    return torch.addcdiv(value, m, below, value=-lr / (1 - beta1**step))


def _masked_adam_torch(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    if param.numel() == 0:
        return
    param, work = param.detach(), _work_dtype(param)
    weight_decay = 0.0 if decay_scope == "none" else weight_decay
    numbers = (step, lr, beta1, beta2, eps, weight_decay, decoupled)
    if _is_indices(mask):
        at = _places(param, mask)  # type: ignore[arg-type]
        new = _adam_torch(param[at].to(work), _grad_at(grad, right, *at, work), exp_avg, exp_avg_sq, *numbers)
        param[at] = new.to(param.dtype)
        return
    done = 0
    for r, c, start in _pieces(param.shape):
        into = param[r, c]
        old, g = into.to(work), _grad_piece(grad, right, r, c, work)
        keep = _keep(start, into.numel(), mask, key, param.device)
        keep = torch.ones_like(into, dtype=torch.bool) if keep is None else keep.reshape(into.shape)
        values, g = old[keep], g[keep]
        m, v = (moments[done : done + values.numel()] for moments in (exp_avg, exp_avg_sq))
        done += values.numel()
        new = old
        if decoupled and weight_decay and decay_scope == "all":
            new = torch.sub(old, old, alpha=lr * weight_decay)
        new = new.masked_scatter(keep, _adam_torch(values, g, m, v, *numbers))
        into.copy_(_clamped(new, None if clamp_to is None else clamp_to[r, c], clamp))


# ---- compiled -------------------------------------------------------------------------------------------


def _blocks(
    param: Tensor, grad: Tensor, right: Tensor | None, clamp_to: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int]]:
    """Weight, gradient and bound as the compiled kernels take them, and the index of the first entry.

    A gradient given as a product is multiplied out for so many rows at a time that they stay in the cache; on a
    GPU, where kernels take whole tensors, for all.
    """
    param, clamp_to = param.detach(), None if clamp_to is None else clamp_to.detach()
    if param.device.type == "cuda":
        grad, right = (grad if right is None else _product(grad, right)), None
        grad, clamp_to = _narrow(grad), None if clamp_to is None else _narrow(clamp_to)
    if right is None:
        yield (*_flat(param, grad.detach(), clamp_to), 0)
        return
    left, right = grad.detach().float(), right.detach().float().T
    rows, columns = param.shape
    step = max(32, _CACHED // max(1, columns))
    buffer = param.new_empty((min(step, rows), columns), dtype=torch.float32)
    with backend.full_float32():
        for r in range(0, rows, step):
            block = slice(r, min(rows, r + step))
            piece = torch.mm(left[block], right, out=buffer[: block.stop - r])
            bound = None if clamp_to is None else clamp_to[block]
            yield param[block], piece, bound, r * columns


def _flat(param: Tensor, grad: Tensor, clamp_to: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One row of all entries where every tensor is contiguous: the longest runs."""
    if param.is_contiguous() and grad.is_contiguous() and (clamp_to is None or clamp_to.is_contiguous()):
        return param.view(1, -1), grad.view(1, -1), None if clamp_to is None else clamp_to.view(1, -1)
    return param, grad, clamp_to


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _product(left: Tensor, right: Tensor) -> Tensor:
    check.once(
        logging.INFO,
        "the cuda backend takes a gradient given as a product whole: the triton backend does not",
    )
    with backend.full_float32():
        return left.detach().float() @ right.detach().float().T


def _philox_bits_compiled(bits: Tensor, start: int, philox: list[int]) -> None:
    backend.compiled().philox_bits(bits, start, philox)


def _masked_sgd_compiled(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    lr: float,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    if param.numel() == 0:
        return
    if right is not None and _is_indices(mask):
        return _masked_sgd_torch(param, grad, right, mask, key, lr, decay, decay_scope)
    module = backend.compiled()
    for into, g, bound, start in _blocks(param, grad, right, clamp_to):
        module.masked_sgd(into, g, mask, key, lr, decay, decay_scope, bound, clamp, start=start)
    return None


def _masked_adam_compiled(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    if param.numel() == 0:
        return
    if right is not None and _is_indices(mask):
        return _masked_adam_torch(
            param, grad, right, exp_avg, exp_avg_sq, offsets, mask, key, step, lr, beta1, beta2, eps, weight_decay,
            decoupled, decay_scope,
        )  # fmt: skip
    module, n = backend.compiled(), param.numel()
    numbers = module.AdamStep(lr, beta1, beta2, eps, step, weight_decay, decoupled, decay_scope, clamp)
    for into, g, bound, start in _blocks(param, grad, right, clamp_to):
        module.masked_adam(into, g, exp_avg, exp_avg_sq, offsets, mask, key, numbers, bound, start=start, n=n)
    return None


# ---- Triton ---------------------------------------------------------------------------------------------


def _philox_bits_triton(bits: Tensor, start: int, philox: list[int]) -> None:
    from ..kernels.masked_update import philox_bits_triton

    philox_bits_triton(bits, start, philox)


def _masked_sgd_triton(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    lr: float,
    decay: float = 0.0,
    decay_scope: str = "all",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    from ..kernels.masked_update import masked_sgd_triton

    masked_sgd_triton(param, grad, right, mask, key, lr, decay, decay_scope, clamp_to, clamp)


def _masked_adam_triton(
    param: Tensor,
    grad: Tensor,
    right: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    key: list[int],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    decay_scope: str = "masked",
    clamp_to: Tensor | None = None,
    clamp: float = 0.0,
) -> None:
    from ..kernels.masked_update import masked_adam_triton

    if right is not None:
        with backend.full_float32():
            grad = grad.detach().float() @ right.detach().float().T
    masked_adam_triton(
        param, grad, exp_avg, exp_avg_sq, offsets, mask, key, step, lr, beta1, beta2, eps, weight_decay, decoupled,
        decay_scope, clamp_to, clamp,
    )  # fmt: skip


_FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Speeds relative to the torch backend: measured with AVX-512 for cpp, estimated for GPUs.
for _op, _compiled, _triton, _reference in (
    ("masked_sgd_", _masked_sgd_compiled, _masked_sgd_triton, _masked_sgd_torch),
    ("masked_adam_", _masked_adam_compiled, _masked_adam_triton, _masked_adam_torch),
):
    _symbol = _op.rstrip("_")
    backend.provide(_op, "cpp", _compiled, symbol=_symbol, device="cpu", dtypes=_FAST_DTYPES, speed=50.0)
    backend.provide(_op, "triton", _triton, device="cuda", dtypes=_FAST_DTYPES, speed=20.0)
    backend.provide(_op, "cuda", _compiled, symbol=_symbol, device="cuda", dtypes=_FAST_DTYPES, speed=20.0)
    backend.provide(_op, "torch", _reference)
backend.provide("philox_bits_", "cpp", _philox_bits_compiled, symbol="philox_bits", device="cpu", speed=50.0)
backend.provide("philox_bits_", "triton", _philox_bits_triton, device="cuda", speed=20.0)
backend.provide(
    "philox_bits_", "cuda", _philox_bits_compiled, symbol="philox_bits", device="cuda", speed=20.0
)
backend.provide("philox_bits_", "torch", _philox_bits_torch)
