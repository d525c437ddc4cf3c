"""Second moment of activations, accumulated in place. Formula: Meng et al. 2022 (ROME), eq. 2, C = K Kᵀ."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

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
    ``x`` is float64), in chunks that are added to ``cov`` in its own dtype: relative to float64 about 1e-6,
    and for each of these additions a rounding of ``cov``, at most 2⁻²⁴ of it if it is float32. Over 10^7
    tokens of ordinary data that stays below 1e-5; where every batch is the same, or more is wanted, use a
    float64 ``cov``, whose error does not grow. The order of additions is fixed: a second run gives the same
    bits. Many calls of few tokens each are better made through :class:`CovarianceAccumulator`.
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
    rows = x if mask is None else x[mask]
    rows = rows.reshape(math.prod(rows.shape[:-1]), cov.shape[0]).to(cov.dtype)
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
    backend.compiled().covariance(into, rows, mask)
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
    backend.compiled().covariance_layers(*map(list, zip(*layers, strict=True)))
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


# ---- streams --------------------------------------------------------------------------------------------


class CovarianceAccumulator:
    """The second moment of a long stream of tokens that comes in small batches: Σ x xᵀ, and how many.

    Tokens are copied into a buffer, and go into the d × d sum when it is full. To read and write that sum
    takes a traffic of 3 d² numbers however few tokens are added: without a buffer, most of the time of a stream of
    small batches. A batch that would fill the buffer by itself is added without being copied.

    Error: a buffer's products are summed in float32 (float64 for float64 tokens), about 1e-6 relative at
    most, and added to the sum in its dtype. A float64 sum adds nothing to that, however long the stream. A float32
    sum is rounded once for every full buffer, each time by at most 2⁻²⁴ of itself: about 1e-6 in all for 10^7
    tokens of ordinary data.

    The same batches in the same order give the same bits, also through :meth:`state_dict`.

    Args:
        d: the width of tokens.
        dtype: of the sum, float64 or float32: 8 d² or 4 d² bytes.
        device: where the sum and the buffer are kept; tokens must be there.
        buffer_tokens: how many tokens are buffered, in the dtype of the first batch. With the default the
            traffic of the sum takes a few percent of the time of the products on a CPU.
        precision: see :func:`covariance_`.

    >>> acc = CovarianceAccumulator(3)
    >>> for batch in torch.eye(3).split(1):
    ...     acc.add(batch)
    >>> acc.result().diagonal().tolist(), acc.count
    ([1.0, 1.0, 1.0], 3)
    """

    def __init__(
        self,
        d: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        buffer_tokens: int = 8192,
        precision: str = "tf32x3",
    ) -> None:
        op = type(self).__name__
        if d < 0 or buffer_tokens < 1:
            raise ValueError(
                f"{op}: d must be at least 0 and buffer_tokens at least 1, got {d} and {buffer_tokens}"
            )
        if dtype not in _COV_DTYPES:
            raise TypeError(f"{op}: dtype must be float32 or float64, got {check.name_of(dtype)}")
        check.choice(op, _PRECISIONS, precision=precision)
        self.d = d
        self.buffer_tokens = buffer_tokens
        self.precision = precision
        self._total = torch.zeros(d, d, dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._rows: Tensor | None = None  # the buffer: its first _used rows hold tokens
        self._keep = torch.ones(buffer_tokens, dtype=torch.bool, device=device)
        self._used = 0
        self._masked = False  # whether a row of the buffer may not count

    @property
    def count(self) -> int:
        """How many tokens were added, masked ones left out; on a GPU this waits for the device."""
        return int(self._count)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of ``x``, (..., d), where ``mask``, (...), is True.

        Raises:
            ValueError: shapes or devices that do not fit.
            TypeError: a dtype that :func:`covariance_` does not take, or not that of earlier batches.
        """
        check.is_tensor("CovarianceAccumulator", x=x, **({} if mask is None else {"mask": mask}))
        _check(self._total, x, mask, self.precision)
        if self._rows is not None and x.dtype != self._rows.dtype:
            raise TypeError(
                f"CovarianceAccumulator: x must be {check.name_of(self._rows.dtype)} like the batches "
                f"before, got {check.name_of(x.dtype)}"
            )
        rows = x.detach().reshape(math.prod(x.shape[:-1]), self.d)
        keep = None if mask is None else mask.reshape(len(rows))
        self._count += len(rows) if keep is None else keep.sum()
        if len(rows) >= self.buffer_tokens:
            covariance_(self._total, rows, keep, precision=self.precision)
        else:
            self._store(rows, keep)

    def result(self) -> Tensor:
        """Σ x xᵀ so far: the accumulator's own (d, d) tensor, not a copy; later batches change it."""
        self._flush()
        return self._total

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything: sum, count, buffered tokens and their mask."""
        rows = self._total.new_zeros(0, self.d) if self._rows is None else self._rows[: self._used]
        state = {"total": self._total, "count": self._count, "rows": rows, "keep": self._keep[: self._used]}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state_dict` of an accumulator with the same width, dtype and buffer.

        Raises:
            ValueError: the state is of another width, or holds more tokens than the buffer.
            TypeError: the state is of another dtype.
        """
        op = "CovarianceAccumulator"
        check.shape(op, (self.d, self.d), f"because d is {self.d}", total=state["total"])
        check.dtype(op, (self._total.dtype,), total=state["total"])
        rows, keep = state["rows"], state["keep"]
        check.last_dim(op, self.d, "d", rows=rows)
        check.shape(op, rows.shape[:1], "like rows", keep=keep)
        if len(rows) > self.buffer_tokens:
            raise ValueError(f"{op}: the state holds {len(rows)} tokens, the buffer {self.buffer_tokens}")
        self._total.copy_(state["total"])
        self._count.copy_(state["count"])
        self._rows, self._used, self._masked = None, 0, False
        if len(rows):
            self._store(rows.to(self._total.device), keep.to(self._total.device))

    def _store(self, rows: Tensor, keep: Tensor | None) -> None:
        if self._rows is None:
            self._rows = torch.empty(self.buffer_tokens, self.d, dtype=rows.dtype, device=self._total.device)
        if self._used + len(rows) > self.buffer_tokens:
            self._flush()
        place = slice(self._used, self._used + len(rows))
        self._rows[place] = rows
        self._keep[place] = True if keep is None else keep
        self._masked |= keep is not None
        self._used += len(rows)

    def _flush(self) -> None:
        if self._used and self._rows is not None:
            keep = self._keep[: self._used] if self._masked else None
            covariance_(self._total, self._rows[: self._used], keep, precision=self.precision)
            self._used, self._masked = 0, False
