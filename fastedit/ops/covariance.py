"""Second moment of activations, accumulated in place. Formula: Meng et al. 2022 (ROME), eq. 2, C = K Kᵀ."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backend, check

_X_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_COV_DTYPES = (torch.float32, torch.float64)


_PRECISIONS = ("tf32x3", "ieee")


def _check(cov: Tensor, x: Tensor, mask: Tensor | None = None, precision: str = "tf32x3") -> None:
    op = "covariance_"
    check.square(op, cov=cov)
    check.last_dim(op, cov.shape[0], "cov", x=x)
    check.dtype(op, _COV_DTYPES, cov=cov)
    check.dtype(op, _X_DTYPES, x=x)
    check.same_device(op, cov=cov, x=x, mask=mask)
    check.choice(op, _PRECISIONS, precision=precision)
    if mask is not None:
        check.shape(op, x.shape[:-1], "like x without its last dimension", mask=mask)
        check.dtype(op, (torch.bool,), mask=mask)


def _check_layers(
    x: Sequence[Tensor], cov: Sequence[Tensor], mask: Sequence[Tensor | None], precision: str = "tf32x3"
) -> None:
    if not len(cov) == len(x) == len(mask):
        raise ValueError(
            f"covariance_: lists must have one length, got {len(cov)} cov, {len(x)} x and {len(mask)} mask"
        )
    for c, rows, m in zip(cov, x, mask, strict=True):
        _check(c, rows, m, precision)


backend.define(
    "covariance_",
    "(Tensor(a!) cov, Tensor x, Tensor? mask=None, str precision='tf32x3') -> ()",
    check=_check,
)
backend.define(
    "covariance_layers_",
    "(Tensor[] x, Tensor(a!)[] cov, Tensor?[] mask, str precision='tf32x3') -> ()",
    check=_check_layers,
)


def covariance_(
    cov: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None = None,
    *,
    precision: str = "tf32x3",
) -> None:
    """Add the second moment of ``x`` to ``cov``: cov += xᵀ diag(mask) x.

    Only one triangle is computed; the other is its mirror, so ``cov`` stays exactly symmetric. What stands
    in masked rows is never used, NaN included.

    Args:
        cov: (d, d), float32 or float64, symmetric; modified in place. Or a list, one for each layer; widths,
            dtypes and devices may differ.
        x: (..., d), bfloat16, float16, float32 or float64; any strides. A list if ``cov`` is one.
        mask: (...), bool, True where a token counts; None counts all. In a list call one mask for all layers,
            or a list.
        precision: of the products of a float32 ``x``, at least: ``"tf32x3"``, on a GPU's matrix unit, each
            factor as the sum of two TF32 numbers, good to about 2⁻²¹; or ``"ieee"``, float32 multiply-adds.
            Products of other dtypes are exact, and a CPU uses ``"ieee"`` in any case.

    Raises:
        ValueError: shapes or devices that do not fit, ``cov`` sharing memory with another argument.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    In a list call everything is checked before the first ``cov`` is written.

    Error: products of bfloat16 and float16 are exact; sums within a call are kept in float32 (float64 if
    ``x`` is float64), in chunks that are added to ``cov`` in its own dtype; at most 1e-5 relative to float64
    up to 10^7 tokens. The order of additions is fixed: a second run gives the same bits. Many calls of few
    tokens each are better made through :class:`CovarianceAccumulator`.
    """
    op = "covariance_"
    if isinstance(cov, Tensor):
        if not isinstance(x, Tensor) or not (mask is None or isinstance(mask, Tensor)):
            check.is_tensor(op, x=x, **({} if mask is None else {"mask": mask}))
        backend.call(op, cov, x, mask, precision)
        return
    if isinstance(x, Tensor):
        raise TypeError("covariance_: x must be a list of tensors like cov, got one tensor")
    covs, xs = list(cov), list(x)
    masks = [mask] * len(covs) if mask is None or isinstance(mask, Tensor) else list(mask)
    for c, rows, m in zip(covs, xs, masks, strict=False):
        check.is_tensor(op, cov=c, x=rows, **({} if m is None else {"mask": m}))
    groups = _groups(covs, xs, masks)
    if not covs and not xs and not masks:
        return
    if len(groups) == 1 and not torch.compiler.is_compiling():  # graphs of older torch know no written lists
        backend.call("covariance_layers_", xs, covs, masks, precision)
        return
    backend.check("covariance_layers_", xs, covs, masks, precision)
    if torch.compiler.is_compiling():
        for c, rows, m in zip(covs, xs, masks, strict=True):
            backend.call(op, c, rows, m, precision)
        return
    for group in groups:
        backend.call("covariance_layers_", *map(list, zip(*group, strict=True)), precision)


def _groups(
    covs: list[Tensor], xs: list[Tensor], masks: list[Tensor | None]
) -> list[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Layers that one backend can serve in one call: of one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for c, rows, m in zip(covs, xs, masks, strict=False):
        groups.setdefault((rows.device, rows.dtype), []).append((rows, c, m))
    return list(groups.values())


# ---- reference ------------------------------------------------------------------------------------------


def covariance_reference(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """The same in plain torch, computed in the dtype of ``cov``; what every backend is tested against."""
    rows = (x if mask is None else x[mask]).reshape(-1, cov.shape[0]).to(cov.dtype)
    full = cov + rows.T @ rows
    cov.copy_(full.tril() + full.tril(-1).T)


# ---- backends -------------------------------------------------------------------------------------------


def _rows(cov: Tensor, x: Tensor, mask: Tensor | None, unit_stride: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of x, (T, d), and mask as (T,); says once if that takes a copy of x."""
    d = cov.shape[0]
    if x.dim() == 2 and (not unit_stride or d <= 1 or x.stride(1) == 1):
        return x, mask
    n_tokens = math.prod(x.shape[:-1])
    rows = x.reshape(n_tokens, d)
    if unit_stride and d > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    if rows.numel() and rows.data_ptr() != x.data_ptr():
        check.once(
            logging.WARNING,
            f"covariance_: x of shape {tuple(x.shape)} and strides {x.stride()} cannot be read as rows and "
            "is copied; a contiguous last dimension and evenly spaced rows avoid it",
        )
    return rows, None if mask is None else mask.reshape(n_tokens)


def _covariance_torch(cov: Tensor, x: Tensor, mask: Tensor | None = None, precision: str = "tf32x3") -> None:
    """One triangle in column blocks, tokens in chunks whose float32 copy stays small."""
    d = cov.shape[0]
    rows, mask = _rows(cov, x, mask, unit_stride=False)
    if mask is not None and x.device.type == "cpu":
        rows, mask = rows[mask], None
    if rows.numel() == 0:
        return
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = d if d < 1024 else 512 if x.device.type == "cpu" else 1024
    step = min(8192, max(512, (1 << 24) // d))
    with backend.full_float32():
        for t in range(0, rows.shape[0], step):
            chunk = rows[t : t + step]
            if mask is not None:  # on a GPU: dropping rows would wait for their number
                chunk = torch.where(mask[t : t + step, None], chunk, 0)
            chunk = chunk.to(work)
            for j in range(0, d, width):
                below = cov[j:, j : j + width]
                if work == cov.dtype:
                    below.addmm_(chunk[:, j:].T, chunk[:, j : j + width])
                else:
                    below += chunk[:, j:].T @ chunk[:, j : j + width]
    strip = 128 if x.device.type == "cpu" else 1024  # narrow ones stay in the cache while they are turned
    for j in range(0, d, strip):
        k = min(j + strip, d)
        corner = cov[j:k, j:k]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        cov[j:k, k:] = cov[k:, j:k].contiguous().T


def _as_compiled(cov: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments as the compiled kernels take them; ``cov`` may come out as a copy."""
    rows, mask = _rows(cov, x, mask, unit_stride=True)
    into = cov.detach()
    if x.dtype == torch.float64:
        into = into.double()  # the compiled kernels keep float64 sums of float64 tokens
    if not into.is_contiguous():
        check.once(logging.WARNING, "covariance_: cov is not contiguous and is copied there and back")
        into = into.contiguous()
    return into, rows.detach(), mask


def _covariance_compiled(
    cov: Tensor, x: Tensor, mask: Tensor | None = None, precision: str = "tf32x3"
) -> None:
    into, rows, mask = _as_compiled(cov, x, mask)
    backend.extension().covariance(into, rows, mask)  # type: ignore[union-attr]
    if into.data_ptr() != cov.data_ptr():
        cov.copy_(into)


def _covariance_triton(cov: Tensor, x: Tensor, mask: Tensor | None = None, precision: str = "tf32x3") -> None:
    from ..kernels.covariance import covariance_triton

    rows, mask = _rows(cov, x, mask, unit_stride=False)
    covariance_triton(cov, rows, mask, precision)


def _layers_cpp(
    x: Sequence[Tensor], cov: Sequence[Tensor], mask: Sequence[Tensor | None], precision: str = "tf32x3"
) -> None:
    """All layers by one team of threads."""
    layers = [_as_compiled(*layer) for layer in zip(cov, x, mask, strict=True)]
    backend.extension().covariance_layers(*map(list, zip(*layers, strict=True)))  # type: ignore[union-attr]
    for c, (into, _, _) in zip(cov, layers, strict=True):
        if into.data_ptr() != c.data_ptr():
            c.copy_(into)


def _one_by_one(one: Callable[..., None]) -> Callable[..., None]:
    def layers(
        x: Sequence[Tensor], cov: Sequence[Tensor], mask: Sequence[Tensor | None], precision: str = "tf32x3"
    ) -> None:
        for c, rows, m in zip(cov, x, mask, strict=True):
            one(c, rows, m, precision)

    return layers


# Speeds relative to the torch backend: measured with AVX-512 for cpp, estimated for GPUs.
_HALVES_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)
_SPEEDS = {
    "cpp": dict(zip(_HALVES_AND_FLOAT, (1.8, 1.8, 1.6), strict=True)),
    "triton": dict(zip(_HALVES_AND_FLOAT, (8.0, 8.0, 2.0), strict=True)),
    "cuda": dict(zip(_HALVES_AND_FLOAT, (6.0, 6.0, 1.0), strict=True)),
}
for _name, _one, _device, _dtypes in (
    ("cpp", _covariance_compiled, "cpu", ()),
    ("triton", _covariance_triton, "cuda", _HALVES_AND_FLOAT),
    ("cuda", _covariance_compiled, "cuda", ()),
    ("torch", _covariance_torch, (), ()),
):
    _symbol = "covariance" if _one is _covariance_compiled else ""
    _many, _many_symbol = (
        (_layers_cpp, "covariance_layers") if _name == "cpp" else (_one_by_one(_one), _symbol)
    )
    _speed = _SPEEDS.get(_name, 1.0)
    backend.provide(
        "covariance_", _name, _one, symbol=_symbol, key=1, device=_device, dtypes=_dtypes, speed=_speed
    )
    backend.provide(
        "covariance_layers_", _name, _many, symbol=_many_symbol, device=_device, dtypes=_dtypes, speed=_speed
    )
