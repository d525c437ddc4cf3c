"""Low-rank updates of a weight in place, W += α A Bᵀ, and the thin dual solve that yields A and B.

Sources: Meng et al. 2022 (MEMIT), eq. 14, Δ = R Kᵀ (C + K Kᵀ)⁻¹; Fang et al. 2025 (AlphaEdit), eq. 14. Both
have rank n for n facts; Woodbury's identity turns their d × d systems into n × n ones (:class:`DualSolver`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import NumericalError
from . import backend, check
from .philox import round_stochastically, runs_of_words, words

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
_ROUNDINGS = ("nearest", "stochastic")


def _check(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    op = "low_rank_update_"
    check.matrix(op, weight=weight, left=left, right=right)
    d_out, d_in = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
    stored = "weight is stored (d_in, d_out)" if transposed else "weight is (d_out, d_in)"
    check.shape(op, (d_out, left.shape[1]), f"because {stored}", left=left)
    check.shape(op, (d_in, left.shape[1]), f"because {stored} and left has rank {left.shape[1]}", right=right)
    check.dtype(op, _WEIGHT_DTYPES, weight=weight, left=left, right=right)
    check.choice(op, _ROUNDINGS, rounding=rounding)
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha must be finite, got {alpha}")
    if out_norm is not None:
        check.dtype(op, (torch.float32, torch.float64), out_norm=out_norm)
        if out_norm.numel() != 1:
            raise ValueError(f"{op}: out_norm must have one element, got shape {tuple(out_norm.shape)}")
    if residual is not None:
        check.dtype(op, _ROUNDED_DTYPES, **{"weight, where a residual is asked for,": weight})
        check.dtype(op, (torch.float32,), residual=residual)
        check.shape(op, weight.shape, "like weight as stored", residual=residual)
    elif carry:
        raise ValueError(f"{op}: carry needs the residual of earlier updates, got none")
    check.same_device(op, weight=weight, left=left, right=right, out_norm=out_norm, residual=residual)


backend.define(
    "low_rank_update_",
    "(Tensor(a!) weight, Tensor left, Tensor right, float alpha=1.0, bool transposed=False, "
    "str rounding='nearest', int seed=0, Tensor(b!)? out_norm=None, Tensor(c!)? residual=None, "
    "bool carry=False) -> ()",
    check=_check,
)


def low_rank_update_(
    weight: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    alpha: float = 1.0,
    *,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | Sequence[Tensor] | None = None,
    residual: Tensor | Sequence[Tensor] | None = None,
    carry: bool = False,
) -> None:
    """Add a low-rank matrix to a weight in one pass: weight += alpha · left rightᵀ.

    The product and the sum are float32 arithmetic (float64 for a float64 weight), rounded once to the
    weight's dtype; the product is never stored. Factors are converted to that precision first.

    Args:
        weight: (d_out, d_in), or (d_in, d_out) if ``transposed``; bfloat16, float16, float32 or float64; any
            strides; modified in place, also where it requires a gradient. Or a list, one for each layer.
        left: (d_out, r), floating point. A list if ``weight`` is one.
        right: (d_in, r), floating point. A list if ``weight`` is one.
        alpha: the factor of the product.
        transposed: the weight is stored (d_in, d_out), as in GPT-2; left and right keep their meaning.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"``: up or down with probabilities that keep
            the expected value (:func:`fastedit.ops.philox.round_stochastically`); for bfloat16 and float16.
        seed: what the random words depend on, besides the element's index in (d_out, d_in) order; 64 bits.
            Weight i of a list uses ``seed + i``.
        out_norm: one element, float32 or float64; receives ‖alpha · left rightᵀ‖, the Frobenius norm before
            rounding. A list if ``weight`` is one.
        residual: float32, of the shape in which ``weight``, bfloat16 or float16, is stored; receives what
            rounding took away, the float32 result minus the stored weight; 0 where the stored weight is not
            finite. A list if ``weight`` is one.
        carry: add what ``residual`` holds before rounding: weight + residual then follows the sum of all
            updates in float32, however small each is next to the weight.

    Raises:
        ValueError: shapes, devices or values that do not fit, ``weight`` sharing memory with another
            argument.
        TypeError: a dtype not listed.
        fastedit.BackendUnavailable: the backend chosen by name cannot serve.

    Whether factors are finite is not looked at: on a GPU that would wait for the device. In a list call
    everything else is checked before the first weight is written. A second run gives the same bits.
    """
    op = "low_rank_update_"
    if isinstance(weight, Tensor):
        given = {"out_norm": out_norm, "residual": residual}
        check.is_tensor(op, left=left, right=right, **{k: v for k, v in given.items() if v is not None})
        backend.call(
            op,
            weight,
            left,
            right,
            float(alpha),
            transposed,
            rounding,
            _signed(seed),
            out_norm,
            residual,
            carry,
        )
        return
    lists = {"left": left, "right": right, "out_norm": out_norm, "residual": residual}
    for name, items in lists.items():
        if isinstance(items, Tensor):
            raise TypeError(f"{op}: {name} must be a list of tensors like weight, got a tensor")
    full = {name: [None] * len(weight) if items is None else items for name, items in lists.items()}
    if any(len(items) != len(weight) for items in full.values()):
        lengths = ", ".join(f"{len(items)} {name}" for name, items in full.items())
        raise ValueError(f"{op}: lists must have one length, got {len(weight)} weight, {lengths}")
    calls = []
    for i, (w, a, b, norm, rest) in enumerate(zip(weight, *full.values(), strict=True)):
        given = {"out_norm": norm, "residual": rest}
        check.is_tensor(op, weight=w, left=a, right=b, **{k: v for k, v in given.items() if v is not None})
        calls.append((w, a, b, float(alpha), transposed, rounding, _signed(seed + i), norm, rest, carry))
        backend.check(op, *calls[-1])
    for args in calls:
        backend.call(op, *args)


def _signed(seed: int) -> int:
    """The 64-bit seed as the signed number that a schema's int holds."""
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


# ---- reference ------------------------------------------------------------------------------------------


def low_rank_update_reference(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    """The same in plain torch, computed in float64; what every backend is tested against."""
    delta = alpha * (left.double() @ right.double().T)
    start = weight.double()
    if carry and residual is not None:
        start = start + residual
    target = (start.T if transposed else start) + delta
    rounded = target
    if rounding == "stochastic" and weight.dtype != torch.float64:
        random = words(0, target.numel(), seed, target.device).reshape(target.shape)
        rounded = round_stochastically(target.float(), random, weight.dtype)
    weight.copy_(rounded.T if transposed else rounded)
    if out_norm is not None:
        out_norm.fill_(delta.norm())
    if residual is not None:
        lost = (target.T if transposed else target) - weight
        residual.copy_(lost.where(weight.isfinite(), 0.0))


# ---- backends -------------------------------------------------------------------------------------------


def _factors(left: Tensor, right: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in the working precision with contiguous rows: thin, so a copy costs next to nothing."""
    return left.detach().to(work).contiguous(), right.detach().to(work).contiguous()


def _write_norm(out_norm: Tensor | None, left: Tensor, right: Tensor, alpha: float) -> None:
    """‖α A Bᵀ‖ without the product: its square is α² Σ (AᵀA ∘ BᵀB), two thin Gram matrices in float64."""
    if out_norm is not None:
        left, right = left.double(), right.double()
        squared = ((left.T @ left) * (right.T @ right)).sum()
        out_norm.fill_(abs(alpha) * squared.clamp(min=0).sqrt())


def _low_rank_update_torch(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    """One fused product for a float32 weight; otherwise blocks of rows, whose float32 copy stays small."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = _factors(left, right, work)
    _write_norm(out_norm, left, right, alpha)
    rows, columns = (right, left) if transposed else (left, right)
    stored = weight.detach()
    with backend.full_float32():
        if stored.dtype == work:
            stored.addmm_(rows, columns.T, alpha=alpha)
            return
        step = max(1, (1 << 22) // max(1, stored.shape[1]))
        for r in range(0, stored.shape[0], step):
            block = stored[r : r + step]
            updated = block.to(work)
            if carry and residual is not None:
                updated += residual[r : r + step]
            updated.addmm_(rows[r : r + step], columns.T, alpha=alpha)
            if rounding == "stochastic":
                random = _block_words(r, block.shape, stored.shape[0], transposed, seed, weight.device)
                block.copy_(round_stochastically(updated, random, stored.dtype))
            else:
                block.copy_(updated)
            if residual is not None:
                residual[r : r + step] = (updated - block).where(block.isfinite(), 0.0)


def _block_words(
    row: int, size: torch.Size, n_rows: int, transposed: bool, seed: int, device: torch.device
) -> Tensor:
    """The random words of a block of stored rows, whose elements count in (d_out, d_in) order."""
    if not transposed:
        return words(row * size[1], size[0] * size[1], seed, device).reshape(size)
    # stored (d_in, d_out): element (i, o) has index o · d_in + i, and a block holds a range of i
    starts = torch.arange(size[1], device=device) * n_rows + row
    return runs_of_words(starts, size[0], seed).T


def _low_rank_update_compiled(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    left, right = _factors(left, right, torch.float32)
    if not weight.numel():
        return _write_norm(out_norm, left, right, alpha)
    into, lost = weight.detach(), None if residual is None else residual.detach()
    if into.stride(1) != 1 and into.shape[1] > 1 and into.stride(0) == 1:
        # the other orientation of a stored matrix
        into, lost, transposed = into.T, None if lost is None else lost.T, not transposed
    module = backend.extension()
    used, used_lost = _unit_stride(into, "weight"), None if lost is None else _unit_stride(lost, "residual")
    module.low_rank_update(  # type: ignore[union-attr]
        used,
        left,
        right,
        alpha,
        transposed,
        rounding == "stochastic",
        seed & 0xFFFFFFFFFFFFFFFF,
        out_norm,
        used_lost,
        carry,
    )
    if used is not into:
        into.copy_(used)
    if lost is not None and used_lost is not lost:
        lost.copy_(used_lost)
    return None


def _unit_stride(matrix: Tensor, name: str) -> Tensor:
    """The matrix, or a copy of it (said once) if the elements of a row are not adjacent."""
    if matrix.stride(1) == 1 or matrix.shape[1] == 1:
        return matrix
    check.once(
        logging.WARNING,
        f"low_rank_update_: rows of {name} are not contiguous (strides {matrix.stride()}): copied there and back",
    )
    return matrix.contiguous()


def _low_rank_update_triton(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    out_norm: Tensor | None = None,
    residual: Tensor | None = None,
    carry: bool = False,
) -> None:
    from ..kernels.low_rank import low_rank_update_triton

    left, right = _factors(left, right, torch.float32)
    _write_norm(out_norm, left, right, alpha)
    low_rank_update_triton(
        weight.detach(), left, right, alpha, transposed, rounding == "stochastic", seed, residual, carry
    )


_COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Speeds relative to the torch backend: measured on one core with AVX-512 for cpp, estimated for GPUs.
backend.provide(
    "low_rank_update_",
    "cpp",
    _low_rank_update_compiled,
    symbol="low_rank_update",
    device="cpu",
    dtypes=_COMPILED_DTYPES,
    speed={torch.bfloat16: 3.0, torch.float16: 3.0},
)
backend.provide(
    "low_rank_update_", "triton", _low_rank_update_triton, device="cuda", dtypes=_COMPILED_DTYPES, speed=3.0
)
backend.provide(
    "low_rank_update_",
    "cuda",
    _low_rank_update_compiled,
    symbol="low_rank_update",
    device="cuda",
    dtypes=_COMPILED_DTYPES,
    speed=3.0,
)
backend.provide("low_rank_update_", "torch", _low_rank_update_torch)


# ---- the dual solve -------------------------------------------------------------------------------------


class DualSolver:
    """Solves (εI + G Gᵀ + F Fᵀ) X = F through systems of the size of F and G's columns.

    G (d, r) are the features of earlier batches, F (d, n) those of the next one; nothing of size d × d
    exists. Kept are G and L, the lower Cholesky factor of εI + GᵀG. With Q = L⁻¹GᵀF,

    - S = εI + FᵀF − QᵀQ (n, n),
    - Y = F − G L⁻ᵀQ (d, n),
    - X = (εI + G Gᵀ + F Fᵀ)⁻¹F = Y S⁻¹,

    by Woodbury's identity for εI + G Gᵀ and the push-through identity for F Fᵀ. So the update of an editor
    with residuals R (d_out, n) is Δ = R Xᵀ = (R S⁻¹) Yᵀ: ``left = solver.divide(R, factor)``, ``right = Y``.

    Cost of a batch: 4drn + 2dn² + r²n floating-point operations. Gram matrices, factors and results are
    float64 whatever the dtype of the stored features.

    Args:
        d: the number of rows of features.
        ridge: ε > 0.
        dtype: of the stored features, float64 or float32; in float32, half the memory, the features count as
            rounded and results are good to about 1e-4 where εI + GᵀG is well conditioned.
        device: where features are kept; None: where the first batch is.

    >>> solver = DualSolver(8, ridge=1.0)
    >>> F = torch.eye(8)[:, :2]
    >>> Y, factor = solver.solve(F)
    >>> torch.allclose(Y @ torch.cholesky_inverse(factor), F.double() / 2)
    True
    >>> solver.append(F)
    >>> solver.rank
    2
    """

    def __init__(
        self,
        d: int,
        ridge: float,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        if d < 1:
            raise ValueError(f"DualSolver: d must be at least 1, got {d}")
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(
                f"DualSolver: ridge must be positive and finite, got {ridge}: the dual is ill-posed without"
            )
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"DualSolver: dtype must be float64 or float32, got {check.name_of(dtype)}")
        self.d = d
        self.ridge = float(ridge)
        self.dtype = dtype
        self.rank = 0
        self._device = None if device is None else torch.device(device)
        self._features = torch.empty((0, d), dtype=dtype, device=device)  # Gᵀ, with room to grow
        self._factor = torch.empty((0, 0), dtype=torch.float64, device=device)
        self._solved: tuple[Tensor, int, Tensor, Tensor] | None = None

    @property
    def features(self) -> Tensor:
        """G: (d, r), a view of what is stored."""
        return self._features[: self.rank].T

    @property
    def factor(self) -> Tensor:
        """L: (r, r), float64, the lower Cholesky factor of εI + GᵀG; a view of what is stored."""
        return self._factor[: self.rank, : self.rank]

    @property
    def device(self) -> torch.device | None:
        """Where features are kept; None before the first batch if it was not given."""
        return self._device

    def solve(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for one batch; nothing is stored.

        Args:
            features: F, (d, n), floating point.

        Returns:
            Y (d, n) and the lower Cholesky factor of S (n, n), both float64: X = Y S⁻¹.

        Raises:
            ValueError: a shape or device that does not fit, or features that are not finite.
            TypeError: features that are not floating point.
            fastedit.NumericalError: S is not positive definite in float64.
        """
        batch = self._take(features)
        Q = self._project(batch)
        S = batch.T @ batch - Q.T @ Q
        S.diagonal().add_(self.ridge)
        factor = self._cholesky(S)
        self._solved = (features, features._version, Q, factor)
        return self._complement(batch, Q), factor

    def divide(self, residual: Tensor, factor: Tensor) -> Tensor:
        """R S⁻¹: (d_out, n), float64, from R (d_out, n) and the factor that :meth:`solve` returned."""
        check.matrix("DualSolver.divide", residual=residual, factor=factor)
        check.last_dim("DualSolver.divide", factor.shape[0], "factor", residual=residual)
        return torch.cholesky_solve(residual.to(torch.float64).T, factor).T

    def append(self, features: Tensor) -> None:
        """Store a batch: G ← [G F], L ← [[L, 0], [Qᵀ, chol S]]; reuses the latest solve of that tensor.

        Raises:
            ValueError, TypeError, fastedit.NumericalError: as :meth:`solve`; nothing is stored then.
        """
        solved = self._solved
        if solved is None or solved[0] is not features or solved[1] != features._version:
            self.solve(features)
            solved = self._solved
        assert solved is not None
        _, _, Q, factor = solved
        batch = self._take(features).to(self.dtype)
        start, end = self.rank, self.rank + batch.shape[1]
        self._reserve(end)
        self._features[start:end] = batch.T
        self._factor[:start, start:end] = 0
        self._factor[start:end, :start] = Q.T
        self._factor[start:end, start:end] = factor
        self.rank = end
        self._solved = None

    def truncate(self, k: int) -> None:
        """Keep the first ``k`` stored columns: what :meth:`append` did after them is undone exactly."""
        if not 0 <= k <= self.rank:
            raise ValueError(f"DualSolver.truncate: k must be between 0 and {self.rank}, got {k}")
        self.rank = k
        self._solved = None

    def to(self, device: torch.device | str) -> DualSolver:
        """Move what is stored to ``device``."""
        self._device = torch.device(device)
        self._features, self._factor = self._features.to(device), self._factor.to(device)
        self._solved = None
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything needed to go on: ``features`` (d, r), ``factor`` (r, r), ``ridge`` ()."""
        return {
            "features": self.features.contiguous().clone(),
            "factor": self.factor.contiguous().clone(),
            "ridge": torch.tensor(self.ridge, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a solver with the same d and ridge.

        Raises:
            KeyError: an entry is missing.
            ValueError: it belongs to another d or ridge, or its shapes do not fit together.
        """
        for key in ("features", "factor", "ridge"):
            if key not in state:
                raise KeyError(f"DualSolver.load_state_dict: no {key!r} in the state, got {sorted(state)}")
        features, factor, ridge = state["features"], state["factor"], float(state["ridge"])
        if ridge != self.ridge:
            raise ValueError(
                f"DualSolver.load_state_dict: the state has ridge {ridge}, this solver {self.ridge}"
            )
        check.matrix("DualSolver.load_state_dict", features=features)
        rank = features.shape[1]
        check.shape("DualSolver.load_state_dict", (self.d, rank), "to fit d", features=features)
        check.shape("DualSolver.load_state_dict", (rank, rank), "to fit features", factor=factor)
        device = self._device if self._device is not None else features.device
        if rank:
            self._device = device
        self._features = features.T.to(device, self.dtype, copy=True).contiguous()
        self._factor = factor.to(device, torch.float64, copy=True)
        self.rank = rank
        self._solved = None

    def _take(self, features: Tensor) -> Tensor:
        """The checked batch in float64, as it will be stored."""
        op = "DualSolver.solve"
        check.is_tensor(op, features=features)
        check.matrix(op, features=features)
        check.shape(op, (self.d, features.shape[1]), "to fit d", features=features)
        if not features.is_floating_point():
            raise TypeError(f"{op}: features must be floating point, got {check.name_of(features.dtype)}")
        if self._device is None:
            self.to(features.device)
        elif features.device != self._features.device:
            raise ValueError(f"{op}: features must be on {self._features.device}, got {features.device}")
        batch = features.detach().to(self.dtype).to(torch.float64)
        bad = ~batch.isfinite().all(dim=0)
        if bad.any():
            column = int(bad.nonzero()[0])
            raise ValueError(f"{op}: features must be finite, but column {column} of {batch.shape[1]} is not")
        return batch

    def _blocks(self) -> list[slice]:
        """Ranges of rows of d for which a float64 copy of the stored features stays small."""
        step = self.d if self.dtype == torch.float64 else max(1, (1 << 24) // max(1, self.rank))
        return [slice(i, i + step) for i in range(0, self.d, step)]

    def _project(self, batch: Tensor) -> Tensor:
        """Q = L⁻¹GᵀF: (r, n)."""
        stored = self._features[: self.rank]
        product = torch.zeros((self.rank, batch.shape[1]), dtype=torch.float64, device=batch.device)
        for rows in self._blocks():
            product += stored[:, rows].to(torch.float64) @ batch[rows]
        return torch.linalg.solve_triangular(self.factor, product, upper=False)

    def _complement(self, batch: Tensor, Q: Tensor) -> Tensor:
        """Y = F − G L⁻ᵀQ: (d, n)."""
        if self.rank == 0:
            return batch.clone()
        weights = torch.linalg.solve_triangular(self.factor.T, Q, upper=True)
        stored = self._features[: self.rank]
        Y = batch.clone()
        for rows in self._blocks():
            Y[rows] -= stored[:, rows].to(torch.float64).T @ weights
        return Y

    def _cholesky(self, S: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(S)
        failed = int(info)
        if failed == 0:
            return factor
        k = failed - 1
        top = torch.linalg.cholesky(S[:k, :k])
        column = torch.linalg.solve_triangular(top, S[:k, k : k + 1], upper=False)
        pivot = float(S[k, k] - column.square().sum())
        raise NumericalError(
            f"DualSolver: the Gram matrix of {S.shape[0]} new features (beside {self.rank} stored) is not "
            f"positive definite in float64: smallest pivot {pivot:.3g} at column {k}, ridge "
            f"{self.ridge:.3g}, largest diagonal {float(S.diagonal().max()):.3g}: raise the ridge, or drop "
            "repeated features"
        )

    def _reserve(self, rank: int) -> None:
        """Room for ``rank`` columns, half as much again when it has to grow."""
        if rank <= self._features.shape[0]:
            return
        room = max(rank, self._features.shape[0] * 3 // 2)
        features = self._features.new_empty((room, self.d))
        factor = self._factor.new_empty((room, room))
        features[: self.rank] = self.features.T
        factor[: self.rank, : self.rank] = self.factor
        self._features, self._factor = features, factor
