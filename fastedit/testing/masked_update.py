"""Cases of ``masked_sgd_`` and ``masked_adam_``: one rounding away from float64 with a dense mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import backend
from ..ops.masked_update import MaskedAdamState, masked_adam_reference, masked_sgd_reference
from ..ops.masks import BitMask, IndexMask, PhiloxMask
from .case import BF16, FP16, FP32, FP64, NAN, Case, case, normal, require, require_same, surrounded

DTYPES = (FP32, BF16, FP16, FP64)
SHAPES = {"one": (1, 1), "primes": (5, 17), "whole_words": (70, 64)}
EPS = {FP32: 2.0**-23, BF16: 2.0**-7, FP16: 2.0**-10, FP64: 2.0**-52}
LR, DECAY, CLAMP = 0.25, 2.0**-7, 0.02  # exact in float32, so that errors are those of the arithmetic
SGD = {  # decay scope (None: no decay), whether values are clamped, kind of mask
    "plain-philox": (None, False, "philox"),
    "decay_all-philox": ("all", False, "philox"),
    "decay_all_clamped-bits": ("all", True, "bits"),
    "decay_masked_clamped-philox": ("masked", True, "philox"),
    "decay_masked-bits": ("masked", False, "bits"),
    "decay_masked-indices": ("masked", False, "indices"),
    "decay_all_clamped-indices": ("all", True, "indices"),
    "decay_none-indices": ("none", False, "indices"),
    "decay_all_clamped-all": ("all", True, "all"),
}
ADAM = {  # weight decay, decoupled, scope, clamped, kind of mask
    "plain-philox": (0.0, False, "masked", False, "philox"),
    "l2_clamped-bits": (0.1, False, "masked", True, "bits"),
    "l2-indices": (0.1, False, "masked", False, "indices"),
    "decoupled_all_clamped-philox": (0.1, True, "all", True, "philox"),
    "decoupled_masked-indices": (0.1, True, "masked", False, "indices"),
    "decoupled_masked_clamped-philox": (0.1, True, "masked", True, "philox"),
    "decay_none-all": (0.1, True, "none", False, "all"),
}
Function = Callable[..., Any]
Mask = PhiloxMask | BitMask | IndexMask | None


def make_mask(kind: str, n: int, device: torch.device | str = "cpu", density: float = 0.3) -> Mask:
    """The same selection of n entries as words of Philox, as bits or as indices; or ``"all"``."""
    keep = PhiloxMask(seed=5, shard=1, layer=2, density=density)
    if kind == "philox":
        return keep
    if kind == "all":
        return None
    with backend.use_backend("torch"):
        dense = keep.dense((n,))
    if kind == "bits":
        return BitMask.from_dense(dense.to(device))
    return IndexMask(dense.nonzero()[:, 0].to(device), n)


def options_of(scope: str | None, clamps: bool, start: Tensor) -> dict[str, Any]:
    """Options of SGD: decay and bounds."""
    options: dict[str, Any] = {} if scope is None else {"decay": DECAY, "decay_scope": scope}
    if clamps:
        bound = start.float() + 0.005 * normal(*start.shape, seed=9).to(start.device)
        options |= {"clamp_to": bound, "clamp": CLAMP}
    return options


def to_cpu(value: Any) -> Any:
    """A tensor, several, or a mask on the CPU; what is none of them as it is."""
    if isinstance(value, tuple):
        return tuple(v.cpu() for v in value)
    if isinstance(value, BitMask):
        return BitMask(value.packed.cpu(), value.n)
    if isinstance(value, IndexMask):
        return IndexMask(value.indices.cpu(), value.n)
    return value.cpu() if isinstance(value, Tensor) else value


def sgd_reference(param: Tensor, grad: Any, mask: Mask, lr: float, **options: Any) -> tuple[Tensor, Tensor]:
    """The result in float64 and the size of its largest term: what an ulp is counted of."""
    out = param.cpu().double().clone()
    on_cpu = {name: to_cpu(value) for name, value in options.items()}
    masked_sgd_reference(out, to_cpu(grad), to_cpu(mask), lr, **on_cpu)
    whole = grad if not isinstance(grad, tuple) else grad[0].double() @ grad[1].double().T
    return out, torch.maximum(param.cpu().double().abs(), lr * whole.cpu().double().nan_to_num().abs())


def require_within_ulps(
    out: Tensor, reference: Tensor, scale: Tensor, ulps: float, what: str = "param"
) -> None:
    """Raise AssertionError unless the error is at most so many units in the last place of ``scale``."""
    error = (out.cpu().double() - reference).abs()
    allowed = ulps * EPS[out.dtype] * torch.maximum(scale, reference.abs())
    wrong = ~(error <= allowed)
    worst = (error / allowed.clamp(min=1e-300)).max().item() if error.numel() else 0.0
    require(
        not wrong.any(),
        f"{int(wrong.sum())} of {wrong.numel()} entries of {what} are off by more than {ulps} ulp (up to "
        f"{worst * ulps:.1f})",
    )


def cases() -> Iterator[Case]:
    """Every dtype, decay, clamp and kind of mask; products, views, poisoned gradients, nothing to do."""
    sgd, adam = partial(case, "masked_sgd_"), partial(case, "masked_adam_")
    for dtype in DTYPES:
        for shape, sizes in SHAPES.items():
            for name, (scope, clamps, kind) in SGD.items():
                needs = f"{kind} {'decay' if scope else ''} {'clamp' if clamps else ''}"
                given = {"dtype": dtype, "shape": sizes, "scope": scope, "clamps": clamps, "kind": kind}
                yield sgd(f"{shape}-{name}", dtype, _sgd, needs, **given)
    for dtype in (FP32, BF16):
        for transposed in (False, True):
            order = "in_out" if transposed else "out_in"
            for rank in (1, 37):
                needs = "product philox decay" + (" transposed" if transposed else "")
                given = {"dtype": dtype, "rank": rank, "transposed": transposed}
                yield sgd(f"gradient of rank {rank}-{order}", dtype, _product, needs, **given)
        for grad_dtype in (BF16, FP16, FP64):
            name = f"gradient in {str(grad_dtype).removeprefix('torch.')}"
            needs = "philox decay clamp gradients"
            yield sgd(name, dtype, _gradients, needs, dtype=dtype, grad_dtype=grad_dtype)
        for kind in ("philox", "bits", "indices", "all"):
            for step in (1, 2):
                name = f"inside a larger tensor-{kind}-{'every second column' if step == 2 else 'columns'}"
                yield sgd(name, dtype, _inside, f"{kind} views", dtype=dtype, kind=kind, step=step)
            yield sgd(f"column major-{kind}", dtype, _column_major, f"{kind} views", dtype=dtype, kind=kind)
            if kind != "all":
                yield sgd(f"poisoned gradient-{kind}", dtype, _poisoned, kind, dtype=dtype, kind=kind)
    for op, new in (("masked_sgd_", sgd), ("masked_adam_", adam)):
        for empty in ((0, 5), (5, 0)):
            yield new(f"empty {empty[0]}x{empty[1]}", FP32, _empty, "philox", op=op, shape=empty)
        yield new("nothing selected", FP32, _nothing, "philox decay", op=op)
    for dtype in (FP32, BF16, FP64):
        for shape, sizes in {"primes": (5, 17), "more_than_a_block": (66, 70)}.items():
            for name, (weight_decay, decoupled, scope, clamps, kind) in ADAM.items():
                options = {"weight_decay": weight_decay, "decoupled": decoupled, "decay_scope": scope}
                needs = f"{kind} {'decay' if weight_decay else ''} {'clamp' if clamps else ''}"
                given = {"dtype": dtype, "shape": sizes, "options": options, "clamps": clamps, "kind": kind}
                yield adam(f"{shape}-{name}", dtype, _adam, needs, **given)


def _sgd(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    shape: tuple[int, int],
    scope: str | None,
    clamps: bool,
    kind: str,
) -> None:
    param, grad = normal(*shape, dtype=dtype, device=device), normal(*shape, device=device, seed=1)
    mask = make_mask(kind, param.numel(), device)
    options = options_of(scope, clamps, param)
    reference, scale = sgd_reference(param, grad, mask, LR, **options)
    function(param, grad, mask, LR, **options)
    require_within_ulps(param, reference, scale, 1)


def _product(
    function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, rank: int, transposed: bool
) -> None:
    param = normal(21, 40, dtype=dtype, device=device)
    mask = make_mask("philox", param.numel(), device)
    ulps = 1 if dtype == BF16 else 4 + rank  # of sums of products; TF32x3 on a GPU
    for factor_dtype in (FP32, BF16):
        left = normal(21, rank, dtype=factor_dtype, device=device, seed=1)
        right = normal(40, rank, dtype=factor_dtype, device=device, seed=2)
        out = param.T.contiguous() if transposed else param.clone()
        options = {"decay": DECAY, "decay_scope": "masked"}
        function(out, (left, right), mask, LR, **options, **({"transposed": True} if transposed else {}))
        reference, scale = sgd_reference(param, (left, right), mask, LR, **options)
        require_within_ulps(out.T if transposed else out, reference, scale + rank**0.5, ulps)


def _gradients(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    param = normal(19, 40, dtype=dtype, device=device)
    grad = normal(19, 40, dtype=grad_dtype, device=device, seed=1)
    mask = make_mask("philox", param.numel())
    options = {"decay": DECAY, "clamp_to": param.clone().to(grad_dtype), "clamp": CLAMP}
    reference, scale = sgd_reference(param, grad, mask, LR, **options)
    function(param, grad, mask, LR, **options)
    require_within_ulps(param, reference, scale, 1)


def _inside(
    function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, kind: str, step: int
) -> None:
    grad, mask = normal(37, 44, device=device, seed=1), make_mask(kind, 37 * 44, device)
    with surrounded(37, 44, dtype, device, step) as param:
        param.copy_(normal(37, 44))
        reference, scale = sgd_reference(param, grad, mask, LR)
        function(param, grad, mask, LR)
        require_within_ulps(param, reference, scale, 1)


def _column_major(
    function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, kind: str
) -> None:
    param = normal(37, 44, dtype=dtype, device=device).T.contiguous().T
    grad, mask = normal(37, 44, device=device, seed=1), make_mask(kind, 37 * 44, device)
    for gradient in (grad, grad.T.contiguous().T):
        reference, scale = sgd_reference(param, gradient, mask, LR)
        function(param, gradient, mask, LR)
        require_within_ulps(param, reference, scale, 1)


def _poisoned(function: Function, device: torch.device, tf32x3: bool, dtype: torch.dtype, kind: str) -> None:
    """NaN in the gradient where nothing is selected."""
    param = normal(20, 33, dtype=dtype, device=device)
    grad, mask = normal(20, 33, device=device, seed=1), make_mask(kind, 660, device)
    assert mask is not None
    keep = to_cpu(mask).dense((20, 33)).to(device)
    reference, scale = sgd_reference(param, torch.where(keep, grad, 0.0), mask, LR)
    function(param, torch.where(keep, grad, NAN), mask, LR)
    require_within_ulps(param, reference, scale, 1)


def _call(function: Function, op: str, param: Tensor, grad: Tensor, mask: Mask, decay: float) -> None:
    if op == "masked_sgd_":
        options: dict[str, Any] = {"decay": decay, "decay_scope": "masked"} if decay else {}
        function(param, grad, mask, LR, **options)
    else:
        options = {"weight_decay": decay} if decay else {}
        function(param, grad, mask, MaskedAdamState(param, mask), **options)


def _empty(function: Function, device: torch.device, tf32x3: bool, op: str, shape: tuple[int, int]) -> None:
    param = torch.zeros(shape, device=device)
    _call(function, op, param, param.clone(), PhiloxMask(1, density=0.5), 0.0)


def _nothing(function: Function, device: torch.device, tf32x3: bool, op: str) -> None:
    param = normal(9, 50, device=device)
    param[0, :4] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-40])
    before = param.cpu().clone()
    _call(function, op, param, torch.full_like(param, 2.0), PhiloxMask(1, density=0.0), 0.1)
    require_same(param, before, "param, of which nothing was selected,")
    require((param.cpu().signbit() == before.signbit()).all(), "the sign of a zero has changed")


def _adam(
    function: Function,
    device: torch.device,
    tf32x3: bool,
    dtype: torch.dtype,
    shape: tuple[int, int],
    options: dict[str, Any],
    clamps: bool,
    kind: str,
) -> None:
    param = normal(*shape, dtype=dtype, device=device)
    mask = make_mask(kind, param.numel(), device)
    if clamps:
        options = {**options, "clamp_to": param.float() + 0.001, "clamp": CLAMP}
    state = MaskedAdamState(param, mask)
    reference = param.cpu().double().clone()
    on_cpu = {name: to_cpu(value) for name, value in options.items()}
    m, v = torch.zeros_like(reference), torch.zeros_like(reference)
    for step in (1, 2, 3):
        grad = normal(*shape, device=device, seed=step)
        function(param, grad, mask, state, 0.05, (0.8, 0.95), 1e-6, **options)
        masked_adam_reference(
            reference, grad.cpu(), to_cpu(mask), m, v, step, 0.05, (0.8, 0.95), 1e-6, **on_cpu
        )
        if dtype == BF16:
            reference = reference.to(BF16).double()
    require(state.step == 3, f"state.step must be 3 after three steps, not {state.step}")
    one = torch.ones_like(reference)
    require_within_ulps(param, reference, one, 2 if dtype == BF16 else 8)  # a rounding may fall the other way
    if dtype != BF16:
        packed = m.reshape(-1) if mask is None else to_cpu(mask).pack(m)
        require_within_ulps(state.exp_avg, packed, torch.ones_like(packed), 4, "state.exp_avg")
