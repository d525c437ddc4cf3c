"""Second moment of activations, accumulated in place. Formula: Meng et al. 2022 (ROME), eq. 2, C = K Kᵀ."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, check

_X_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_COV_DTYPES = (torch.float32, torch.float64)


def _check(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    op = "covariance_"
    check.square(op, cov=cov)
    check.last_dim(op, cov.shape[0], "cov", x=x)
    check.shape(op, x.shape[:-1], "like x without its last dimension", mask=mask)
    check.dtype(op, _COV_DTYPES, cov=cov)
    check.dtype(op, _X_DTYPES, x=x)
    check.dtype(op, (torch.bool,), mask=mask)
    check.same_device(op, cov=cov, x=x, mask=mask)


backend.define("covariance_", "(Tensor(a!) cov, Tensor x, Tensor? mask=None) -> ()", check=_check)


def covariance_(
    cov: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None = None,
) -> None:
    """Add the second moment of ``x`` to ``cov``: cov += xᵀ diag(mask) x.

    Only one triangle is computed; the other is its mirror, so ``cov`` stays exactly symmetric. What stands
    in masked rows is never used, NaN included.

    Args:
        cov: (d, d), float32 or float64, symmetric; modified in place. Or a list, one for each layer.
        x: (..., d), bfloat16, float16, float32 or float64; any strides. A list if ``cov`` is one.
        mask: (...), bool, True where a token counts; None counts all. In a list call one mask for all layers,
            or a list.

    Raises:
        ValueError: shapes or devices that do not fit, ``cov`` sharing memory with another argument.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    In a list call everything is checked before the first ``cov`` is written.

    Error: products of bfloat16 and float16 are exact; sums within a call are kept in float32 (float64 if
    ``x`` is float64), in chunks that are added to ``cov`` in its own dtype; at most 1e-5 relative to float64
    up to 10^7 tokens. The order of additions is fixed: a second run gives the same bits.
    """
    if isinstance(cov, Tensor):
        check.is_tensor("covariance_", x=x)
        if mask is not None:
            check.is_tensor("covariance_", mask=mask)
        backend.call("covariance_", cov, x, mask)
        return
    if isinstance(x, Tensor):
        raise TypeError("covariance_: x must be a list of tensors like cov, got one tensor")
    masks = [mask] * len(cov) if mask is None or isinstance(mask, Tensor) else list(mask)
    if not len(cov) == len(x) == len(masks):
        raise ValueError(
            f"covariance_: lists must have one length, got {len(cov)} cov, {len(x)} x and {len(masks)} mask"
        )
    for c, rows, m in zip(cov, x, masks, strict=True):
        check.is_tensor("covariance_", cov=c, x=rows, **({} if m is None else {"mask": m}))
        backend.check("covariance_", c, rows, m)
    for c, rows, m in zip(cov, x, masks, strict=True):
        backend.call("covariance_", c, rows, m)


# ---- reference ------------------------------------------------------------------------------------------


def covariance_reference(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """The same in plain torch, computed in the dtype of ``cov``; what every backend is tested against."""
    rows = (x if mask is None else x[mask]).reshape(-1, cov.shape[0]).to(cov.dtype)
    full = cov + rows.T @ rows
    cov.copy_(full.tril() + full.tril(-1).T)


# ---- backends -------------------------------------------------------------------------------------------


def _rows(cov: Tensor, x: Tensor, mask: Tensor | None, unit_stride: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of x, (T, d), and mask as (T,); says once if that takes a copy of x."""
    n_tokens, d = math.prod(x.shape[:-1]), cov.shape[0]
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


def _covariance_torch(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
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


def _covariance_compiled(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    rows, mask = _rows(cov, x, mask, unit_stride=True)
    if rows.numel() == 0:
        return
    into = cov.detach()
    if x.dtype == torch.float64:
        into = into.double()  # the compiled kernels keep float64 sums of float64 tokens
    if not into.is_contiguous():
        check.once(logging.WARNING, "covariance_: cov is not contiguous and is copied there and back")
        into = into.contiguous()
    module = backend.extension()
    module.covariance(into, rows.detach(), mask)  # type: ignore[union-attr]
    if into.data_ptr() != cov.data_ptr():
        cov.copy_(into)


def _covariance_triton(cov: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    from ..kernels.covariance import covariance_triton

    rows, mask = _rows(cov, x, mask, unit_stride=False)
    covariance_triton(cov, rows, mask)


# Speeds relative to the torch backend: measured on one core with AVX-512 for cpp, estimated for GPUs.
backend.provide(
    "covariance_",
    "cpp",
    _covariance_compiled,
    symbol="covariance",
    key=1,
    device="cpu",
    speed={torch.bfloat16: 1.5, torch.float16: 1.5, torch.float32: 1.2},
)
backend.provide(
    "covariance_",
    "triton",
    _covariance_triton,
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    key=1,
    speed={torch.bfloat16: 8.0, torch.float16: 8.0, torch.float32: 2.0},
)
backend.provide(
    "covariance_",
    "cuda",
    _covariance_compiled,
    symbol="covariance",
    key=1,
    device="cuda",
    speed={torch.bfloat16: 6.0, torch.float16: 6.0, torch.float32: 1.0},
)
backend.provide("covariance_", "torch", _covariance_torch)
