"""Thin solves: the d × d systems of editing methods through systems of the size of a batch.

Every method's update is Δ = R Xᵀ with X = (A + K Kᵀ)⁻¹K for n keys K (d, n), residuals R (d_out, n) and a metric A:
λC in MEMIT (Meng et al. 2022, eq. 14), λC + C_p where earlier keys are kept, λ₂I + C_p for keys projected on a null
space in AlphaEdit (Fang et al. 2025, eq. 14), I for the token features of UltraEdit (Gu et al. 2025). A is factored
once; with Woodbury's identity and the push-through identity X takes n × n and r × r systems, r the keys kept.

- :class:`DualSolver`: the core, appendable, in float64;
- :class:`CovarianceFactor`: λC, and λC + C_p, whole or restricted to a set of neurons (NSE);
- :class:`Projector` and :class:`RidgeSolver`: AlphaEdit;
- :func:`ridge_factors`: UltraEdit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import NumericalError
from . import check
from .neuron_select import gather_square

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20  # elements converted at a time
_JITTER = 1e-12
_MOST_REFINEMENT = 1e-6  # relative error of a kept inverse, which a step of refinement squares
_CG_STEPS, _CG_TOLERANCE = 40, 1e-10
_REBUILD = 50  # batches after which an inverse that was updated is computed afresh


# ---- the core -------------------------------------------------------------------------------------------


class DualSolver:
    """Solves (εI + G Gᵀ + F Fᵀ) X = F through systems of the size of F and G's columns.

    G (d, r) are the features of earlier batches, F (d, n) those of the next one; nothing of size d × d
    exists. Kept are G and L, the lower Cholesky factor of εI + GᵀG. With Q = L⁻¹GᵀF,

    - S = εI + FᵀF − QᵀQ (n, n),
    - Y = F − G L⁻ᵀQ (d, n),
    - X = (εI + G Gᵀ + F Fᵀ)⁻¹F = Y S⁻¹,

    by Woodbury's identity for εI + G Gᵀ and the push-through identity for F Fᵀ. So the update of an editor
    with residuals R (d_out, n) is Δ = R Xᵀ = (R S⁻¹) Yᵀ: ``left = solver.divide(R, factor)``, ``right = Y``.

    With a metric A in place of the identity, features stand for A^-½F, which need not be known: given F and
    A⁻¹F, all products are Fᵀ(A⁻¹F), Y is A⁻¹ times the above, and A⁻¹F is what is stored.

    Cost of a batch: 4drn + 2dn² + r²n floating-point operations; appending it copies nothing that is stored
    (room doubles when it has to grow). Gram matrices, factors and results are float64 whatever the dtype of
    the stored features.

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
        self._latest: tuple[Tensor, int, Tensor, Tensor, Tensor] | None = None

    @property
    def features(self) -> Tensor:
        """G, or A⁻¹G with a metric: (d, r), a view of what is stored."""
        return self._features[: self.rank].T

    @property
    def factor(self) -> Tensor:
        """L: (r, r), float64, the lower Cholesky factor of εI + GᵀG; a view of what is stored."""
        return self._factor[: self.rank, : self.rank]

    @property
    def device(self) -> torch.device | None:
        """Where features are kept; None before the first batch if it was not given."""
        return self._device

    def solve(self, features: Tensor, solved: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Solve for one batch; nothing is stored.

        Args:
            features: F, (d, n), floating point.
            solved: A⁻¹F, (d, n), with a metric A; for all batches of a solver or none.

        Returns:
            Y (d, n) and the lower Cholesky factor of S (n, n), both float64: X = Y S⁻¹.

        Raises:
            ValueError: a shape or device that does not fit, or features that are not finite.
            TypeError: features that are not floating point.
            fastedit.NumericalError: S is not positive definite in float64.
        """
        batch = self._take(features)
        stored = batch if solved is None else self._take(solved)
        Q = self._project(batch)
        S = batch.T @ stored - Q.T @ Q
        if solved is not None:
            S = (S + S.T) / 2
        S.diagonal().add_(self.ridge)
        factor = self._cholesky(S)
        self._latest = (features, features._version, stored, Q, factor)
        return self._complement(stored, Q), factor

    def apply(self, right: Tensor, solved: Tensor | None = None) -> Tensor:
        """ε(εI + G Gᵀ)⁻¹ right, or (A + G Gᵀ)⁻¹ right for ε = 1 and a metric A: (d, m), float64.

        Args:
            right: (d, m), floating point.
            solved: A⁻¹ right with a metric A.
        """
        batch = self._take(right)
        return self._complement(batch if solved is None else self._take(solved), self._project(batch))

    def divide(self, residual: Tensor, factor: Tensor) -> Tensor:
        """R S⁻¹: (d_out, n), float64, from R (d_out, n) and the factor that :meth:`solve` returned."""
        check.matrix("DualSolver.divide", residual=residual, factor=factor)
        check.last_dim("DualSolver.divide", factor.shape[0], "factor", residual=residual)
        return torch.cholesky_solve(residual.to(torch.float64).T, factor).T

    def append(self, features: Tensor, solved: Tensor | None = None) -> None:
        """Store a batch: G ← [G F], L ← [[L, 0], [Qᵀ, chol S]]; reuses the latest solve of that tensor.

        Raises:
            ValueError, TypeError, fastedit.NumericalError: as :meth:`solve`; nothing is stored then.
        """
        latest = self._latest
        if latest is None or latest[0] is not features or latest[1] != features._version:
            self.solve(features, solved)
            latest = self._latest
        assert latest is not None
        _, _, stored, Q, factor = latest
        start, end = self.rank, self.rank + stored.shape[1]
        self._reserve(end)
        self._features[start:end] = stored.T
        self._factor[:start, start:end] = 0
        self._factor[start:end, :start] = Q.T
        self._factor[start:end, start:end] = factor
        self.rank = end
        self._latest = None

    def truncate(self, k: int) -> None:
        """Keep the first ``k`` stored columns: what :meth:`append` did after them is undone exactly."""
        if not 0 <= k <= self.rank:
            raise ValueError(f"DualSolver.truncate: k must be between 0 and {self.rank}, got {k}")
        self.rank = k
        self._latest = None

    def to(self, device: torch.device | str) -> DualSolver:
        """Move what is stored to ``device``."""
        self._device = torch.device(device)
        self._features, self._factor = self._features.to(device), self._factor.to(device)
        self._latest = None
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
        self._latest = None

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
        if not _finite(batch):
            column = int((~batch.isfinite().all(dim=0)).nonzero()[0])
            raise ValueError(f"{op}: features must be finite, but column {column} of {batch.shape[1]} is not")
        return batch

    def _blocks(self) -> list[slice]:
        """Ranges of rows of d for which a float64 copy of the stored features stays in the cache."""
        step = max(1, _BLOCK // max(1, self.rank))
        return [slice(i, i + step) for i in range(0, self.d, step)]

    def _project(self, batch: Tensor) -> Tensor:
        """Q = L⁻¹GᵀF: (r, n)."""
        stored = self._features[: self.rank]
        if self.dtype == torch.float64:
            product = stored @ batch
        else:
            product = torch.zeros((self.rank, batch.shape[1]), dtype=torch.float64, device=batch.device)
            for rows in self._blocks():
                product.addmm_(stored[:, rows].to(torch.float64), batch[rows])
        # from the right: for a factor with room to grow the other form would copy it
        return torch.linalg.solve_triangular(self.factor.T, product.T, upper=True, left=False).T

    def _complement(self, batch: Tensor, Q: Tensor) -> Tensor:
        """Y = F − G L⁻ᵀQ: (d, n)."""
        if self.rank == 0:
            return batch.clone()
        weights = torch.linalg.solve_triangular(self.factor.T, Q, upper=True)
        stored = self._features[: self.rank]
        if self.dtype == torch.float64:
            return torch.addmm(batch, stored.T, weights, alpha=-1)
        Y = batch.clone()
        for rows in self._blocks():
            Y[rows].addmm_(stored[:, rows].to(torch.float64).T, weights, alpha=-1)
        return Y

    def _cholesky(self, S: Tensor) -> Tensor:
        return _definite(S, self.ridge, self.rank)

    def _reserve(self, rank: int) -> None:
        """Room for ``rank`` columns, twice as much when it has to grow; rows never written take no memory."""
        if rank <= self._features.shape[0]:
            return
        room = max(rank, 2 * self._features.shape[0])
        features, factor = self._features.new_empty((room, self.d)), self._factor.new_empty((room, room))
        features[: self.rank] = self.features.T
        factor[: self.rank, : self.rank] = self.factor
        self._features, self._factor = features, factor


def _finite(matrix: Tensor) -> bool:
    """Whether all elements are finite: by their sum, and one by one only where that is not."""
    return bool(matrix.sum().isfinite()) or bool(matrix.isfinite().all())


def _definite(S: Tensor, ridge: float, rank: int) -> Tensor:
    """The lower Cholesky factor of a batch's system."""
    factor, info = torch.linalg.cholesky_ex(S)
    failed = int(info)
    if failed == 0:
        return factor
    k = failed - 1
    top = torch.linalg.cholesky(S[:k, :k])
    column = torch.linalg.solve_triangular(top, S[:k, k : k + 1], upper=False)
    pivot = float(S[k, k] - column.square().sum())
    raise NumericalError(
        f"DualSolver: the Gram matrix of {S.shape[0]} new features (beside {rank} stored) is not positive "
        f"definite in float64: smallest pivot {pivot:.3g} at column {k}, ridge {ridge:.3g}, largest diagonal "
        f"{float(S.diagonal().max()):.3g}: raise the ridge, or drop repeated features"
    )


def _divide(solved: Tensor, system: Tensor) -> Tensor:
    """Solved · system⁻¹ (d, n), for a system (n, n) that need not be definite."""
    result, info = torch.linalg.solve_ex(system.T, solved.T)
    if int(info) != 0 or not bool(result.isfinite().all()):
        raise NumericalError(
            f"the {len(system)}x{len(system)} system of this batch is singular: are two facts the same?"
        )
    return result.T


# ---- MEMIT, EMMET, NSE ----------------------------------------------------------------------------------


class CovarianceFactor:
    """A = λC, factored once in float64 and kept; with earlier keys G appended, A = λC + G Gᵀ.

    With A = L Lᵀ the whitened keys F = L⁻¹K go through :class:`DualSolver`, and X = L⁻ᵀ F (I + FᵀF)⁻¹: two
    triangular solves and an n × n system instead of a d × d system per batch, and the same X. Where products
    are much faster than triangular solves, ``inverse`` keeps A⁻¹ instead: A⁻¹K is then N K and one step of
    refinement with the residual K − A N K, which squares the relative error of N.

    Args:
        second_moment: (d, d) C, the uncentred second moment of a layer's keys; symmetric, finite.
        weight: λ.
        layer: named in errors.
        inverse: keep λC and its inverse instead of the Cholesky factor; where refinement would not make up
            for C's condition, or C is not definite, the factor is kept all the same.
        keep_matrix: keep λC too, in the unused triangle of its factor, and λC with the keys appended as a
            second matrix once :meth:`restricted` needs it to gather from.

    Raises:
        NumericalError: C is not finite, or neither Cholesky nor LU can factor it.

    >>> factor = CovarianceFactor(2 * torch.eye(4))
    >>> keys = torch.eye(4)[:, :1]
    >>> factor.regularised(keys).T  # k / (2 + 1)
    tensor([[0.3333, 0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    >>> factor.append(keys)
    >>> factor.regularised(keys).T  # k / (2 + 1 + 1)
    tensor([[0.2500, 0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        second_moment: Tensor,
        weight: float = 1.0,
        *,
        layer: int | None = None,
        inverse: bool = False,
        keep_matrix: bool = False,
    ) -> None:
        check.square("CovarianceFactor", second_moment=second_moment)
        matrix = second_moment.double()
        if not bool(matrix.isfinite().all()):
            raise NumericalError(f"the statistics of layer {layer} are not finite: collect them again")
        matrix = weight * (matrix + matrix.T) / 2
        self.d = matrix.shape[0]
        self._matrix: Tensor | None = matrix
        self._inverse: Tensor | None = None
        self._cholesky, self._lu = _factor(matrix, layer)
        if inverse and self._cholesky is not None:
            candidate = torch.cholesky_inverse(self._cholesky)
            if _refinement(matrix, candidate) <= _MOST_REFINEMENT:
                self._inverse, self._cholesky = candidate, None
            else:
                logger.info("the statistics of layer %s are too ill-conditioned to keep their inverse", layer)
        self._diagonal: Tensor | None = None  # of λC, whose other elements stand above the factor's
        if self._cholesky is not None:
            if keep_matrix:
                self._diagonal = matrix.diagonal().clone()
                self._cholesky += matrix.triu_(1)
            self._matrix = None
        self._dual = DualSolver(self.d, 1.0)
        self._latest: tuple[Tensor, int, Tensor, Tensor | None] | None = None
        self._batches: list[int] = []  # the rank after each append
        self._folded: tuple[Tensor, int] | None = (
            None  # λC + GGᵀ of the first batches, and how many keys these hold
        )

    @property
    def rank(self) -> int:
        """The number of keys appended."""
        return self._dual.rank

    @property
    def _has_matrix(self) -> bool:
        return self._matrix is not None or self._diagonal is not None

    def solve(self, right: Tensor) -> Tensor:
        """(λC)⁻¹ right, float64, for right (d, n); keys appended play no part."""
        right = right.double()
        if self._inverse is not None and self._matrix is not None:
            solved = self._inverse @ right
            return torch.addmm(solved, self._inverse, right - self._matrix @ solved)
        if self._cholesky is not None:
            return torch.cholesky_solve(right, self._cholesky)
        assert self._lu is not None
        return torch.linalg.lu_solve(*self._lu, right)

    def regularised(self, keys: Tensor, ridge: float = 1.0) -> Tensor:
        """X (d, n), float64, with X = A⁻¹K (ridge·I + KᵀA⁻¹K)⁻¹; ridge 1 solves (A + KKᵀ) X = K.

        Args:
            keys: (d, n) K.
            ridge: 1 in MEMIT and NSE, its own λ in EMMET, 0 for an equality constraint.

        Raises:
            NumericalError: the n × n system is singular.
        """
        features, solved = self._whitened(keys)
        if self.rank == 0:  # needs no definiteness, which an LU factor does not promise
            solved = features if solved is None else solved
            system = features.T @ solved
            system.diagonal().add_(ridge)
            result = _divide(solved, system)
        else:
            Y, factor = self._dual.solve(features, solved)
            if ridge == 1.0:
                result = torch.cholesky_solve(Y.T, factor).T
            else:
                system = features.T @ Y
                system.diagonal().add_(ridge)
                result = _divide(Y, system)
        if self._cholesky is None:
            return result
        return torch.linalg.solve_triangular(self._cholesky.T, result, upper=True)

    def append(self, keys: Tensor) -> None:
        """A ← A + K Kᵀ, for keys (d, n); reuses what the latest :meth:`regularised` found for that tensor.

        Raises:
            ValueError, TypeError, NumericalError: as :meth:`DualSolver.append`; nothing is stored then.
        """
        self._dual.append(*self._whitened(keys))
        self._latest = None
        self._batches.append(self.rank)

    def truncate(self, k: int) -> None:
        """Keep the first ``k`` keys appended."""
        self._dual.truncate(k)
        self._latest = None
        self._batches = [*(rank for rank in self._batches if rank < k), *([k] if k else [])]
        if self._folded is not None and self._folded[1] > k:
            self._folded = None

    def state_dict(self) -> dict[str, Tensor]:
        """What :meth:`append` stored; the factor itself follows from C and λ."""
        return self._dual.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a factor of the same C and λ that was kept in the same form."""
        self._dual.load_state_dict(state)
        self._latest, self._folded = None, None
        self._batches = [self.rank] if self.rank else []

    def restricted(self, keys: Tensor, selected: Tensor, ridge: float = 1.0) -> Tensor:
        """X_S (s, n), float64: :meth:`regularised` for an update whose columns outside S stay zero (NSE).

        X_S = B (ridge·I + K_SᵀB)⁻¹ with B = A_SS⁻¹K_S, by the way that :meth:`route` names.

        Args:
            keys: (d, n) K; rows outside S are not used.
            selected: (s,) int64, the neurons of S, each once.
            ridge: as in :meth:`regularised`.

        Raises:
            ValueError: an index outside 0 … d − 1, or one that stands twice.
            NumericalError: A_SS or the n × n system is singular.
        """
        inside = torch.zeros(self.d, dtype=torch.bool, device=keys.device)
        if bool(((selected < 0) | (selected >= self.d)).any()):
            raise ValueError(
                f"CovarianceFactor.restricted: selected must hold indices from 0 to {self.d - 1}"
            )
        inside[selected] = True
        if int(inside.sum()) != len(selected):
            raise ValueError("CovarianceFactor.restricted: selected must hold each index once")
        s, n = len(selected), keys.shape[1]
        inner = keys[selected].double()
        route = self.route(s, n)
        solved = self._solve_by_iteration(inner, selected) if route == "iterated" else None
        if route == "complement":
            solved = self._solve_by_complement(keys, selected, (~inside).nonzero()[:, 0])
        if solved is None:
            solved = self._solve_gathered(inner, selected)
        system = inner.T @ solved
        system.diagonal().add_(ridge)
        return _divide(solved, system)

    def route(self, s: int, n: int) -> str:
        """How :meth:`restricted` solves for n keys and s of the d neurons: the way that takes fewest operations.

        ``"gathered"``: the Cholesky factor of A_SS, s³/3. ``"complement"``: where few neurons u are left out, the
        whole factor and Schur's identity A_SS⁻¹ = (A⁻¹)_SS − (A⁻¹)_SU ((A⁻¹)_UU)⁻¹ (A⁻¹)_US, 2d²(n + u) + u³/3.
        ``"iterated"``: for few keys of a large layer, conjugate gradients with (A⁻¹)_SS as preconditioner, counted as
        if all its steps were needed; if these do not reach a relative residual of 1e-10, the system is gathered after
        all.
        """
        u = self.d - s
        with_whole = 2 * self.d**2 + 4 * self.d * self.rank  # one solve with the whole factor
        product = 0 if self._has_matrix else s * s * (self.rank + 2 * self.d)
        costs = {
            "gathered": product + s**3 / 3 + 2 * s * s * n,
            "complement": with_whole * (n + u) + u**3 / 3,
        }
        if self._has_matrix:
            costs["iterated"] = _CG_STEPS * (with_whole + 2 * s * s) * n
        return min(costs, key=lambda name: costs[name])

    def _solve_by_iteration(self, inner: Tensor, selected: Tensor) -> Tensor | None:
        """A_SS⁻¹ inner by conjugate gradients (Hestenes and Stiefel 1952), each column its own; None if too slow."""
        system = gather_square(self._with_appended(), selected)

        def precondition(rest: Tensor) -> Tensor:
            padded = torch.zeros((self.d, rest.shape[1]), dtype=torch.float64, device=rest.device)
            padded[selected] = rest
            return self._solve_with_appended(padded)[selected]

        solved, rest = torch.zeros_like(inner), inner.clone()
        direction = ahead = precondition(rest)
        size = (rest * ahead).sum(0)
        limit = _CG_TOLERANCE * inner.norm(dim=0)
        for _ in range(_CG_STEPS):
            image = system @ direction
            step = size / (direction * image).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
            solved += step * direction
            rest -= step * image
            if bool((rest.norm(dim=0) <= limit).all()):
                return solved
            ahead = precondition(rest)
            size, before = (rest * ahead).sum(0), size
            direction = ahead + size / before.clamp_min(torch.finfo(torch.float64).tiny) * direction
        return None

    def _solve_gathered(self, inner: Tensor, selected: Tensor) -> Tensor:
        if self._has_matrix:
            system = gather_square(self._with_appended(), selected)
        else:
            assert self._cholesky is not None
            rows = self._cholesky[selected]
            system = rows @ rows.T
            if self.rank:
                kept = self._appended()[selected]
                system.addmm_(kept, kept.T)
        factor, info = torch.linalg.cholesky_ex(system)
        return torch.cholesky_solve(inner, factor) if int(info) == 0 else _divide(inner.T, system.T).T

    def _solve_by_complement(self, keys: Tensor, selected: Tensor, outside: Tensor) -> Tensor:
        right = torch.zeros((self.d, keys.shape[1] + len(outside)), dtype=torch.float64, device=keys.device)
        n = keys.shape[1]
        right[selected, :n] = keys[selected].double()
        right[outside, n + torch.arange(len(outside), device=keys.device)] = 1.0
        solved = self._solve_with_appended(right)
        corner, lower = solved[outside, n:], solved[outside, :n]
        return solved[selected, :n] - solved[selected, n:] @ torch.linalg.solve(
            (corner + corner.T) / 2, lower
        )

    def _solve_with_appended(self, right: Tensor) -> Tensor:
        """A⁻¹ right: (d, m)."""
        Y = self._dual.apply(*self._whiten(right))
        return Y if self._cholesky is None else torch.linalg.solve_triangular(self._cholesky.T, Y, upper=True)

    def _with_appended(self) -> Tensor:
        """λC + GGᵀ, (d, d) float64: a matrix of its own, to which each batch is added once, in order."""
        matrix, held = self._folded or (self._copy_of_matrix(), 0)
        for rank in self._batches:
            if rank > held:
                keys = self._appended(held, rank)
                matrix.addmm_(keys, keys.T)
                held = rank
        self._folded = matrix, held
        return matrix

    def _copy_of_matrix(self) -> Tensor:
        """λC, (d, d) float64."""
        if self._matrix is not None:
            return self._matrix.clone()
        assert self._cholesky is not None
        assert self._diagonal is not None
        matrix = self._cholesky.triu(1)
        matrix += matrix.T.clone()
        matrix.diagonal().copy_(self._diagonal)
        return matrix

    def _appended(self, start: int = 0, stop: int | None = None) -> Tensor:
        """G: (d, r), from what the dual solver stores; or its columns from ``start`` to ``stop``."""
        stored = self._dual.features[:, start:stop]
        if self._cholesky is not None:
            return self._cholesky.tril() @ stored
        assert self._matrix is not None
        return self._matrix @ stored

    def _whiten(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the dual solver takes: L⁻¹K, or K and (λC)⁻¹K."""
        keys = keys.double()
        if self._cholesky is None:
            return keys, self.solve(keys)
        return torch.linalg.solve_triangular(self._cholesky, keys, upper=False), None

    def _whitened(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, remembered for the latest keys."""
        if self._latest is None or self._latest[0] is not keys or self._latest[1] != keys._version:
            self._latest = (keys, keys._version, *self._whiten(keys))
        return self._latest[2], self._latest[3]


def _refinement(matrix: Tensor, inverse: Tensor) -> float:
    """How much of a solution a step of refinement changes, for random right-hand sides."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    right = torch.randn((len(matrix), 4), dtype=torch.float64, device=matrix.device, generator=generator)
    solved = inverse @ right
    return float((inverse @ (right - matrix @ solved)).norm() / solved.norm())


def _factor(matrix: Tensor, layer: int | None) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor, None
    jitter = _JITTER * float(matrix.diagonal().mean())
    matrix.diagonal().add_(jitter)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        logger.warning("the statistics of layer %s are nearly singular: jitter %.1e was added", layer, jitter)
        return factor, None
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    logger.warning(
        "the statistics of layer %s are not positive definite (smallest eigenvalue %.2e): using LU instead of "
        "Cholesky; more tokens would mend this",
        layer,
        smallest,
    )
    lu, pivots, bad = torch.linalg.lu_factor_ex(matrix)
    if int(bad) != 0:
        raise NumericalError(
            f"the statistics of layer {layer} are singular (smallest eigenvalue {smallest:.2e}): collect more "
            "tokens than the layer is wide"
        )
    return None, (lu, pivots)


# ---- AlphaEdit ------------------------------------------------------------------------------------------


class Projector:
    """P, the projection on directions in which a second moment is small, as its thinner set of eigenvectors.

    AlphaEdit keeps P as a (d, d) matrix, which takes 2d²n operations to apply; P K = K − V(VᵀK) takes 4dvn for
    the v directions that P removes, which are few (dozens of 14,336 in Llama 3).

    Args:
        vectors: (d, v), orthonormal columns, floating point.
        removed: the columns span what P removes (P = I − VVᵀ); otherwise what it keeps (P = VVᵀ).
    """

    def __init__(self, vectors: Tensor, *, removed: bool) -> None:
        check.matrix("Projector", vectors=vectors)
        self.vectors = vectors.double()
        self.removed = removed

    @classmethod
    def from_second_moment(cls, second_moment: Tensor, threshold: float) -> Projector:
        """Keeps the eigenvectors of C whose eigenvalue is below ``threshold``, by one ``eigh`` in float64."""
        check.square("Projector.from_second_moment", second_moment=second_moment)
        matrix = second_moment.double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return cls.from_spectrum(values, vectors, threshold)

    @classmethod
    def from_spectrum(cls, values: Tensor, vectors: Tensor, threshold: float) -> Projector:
        """The same from C's eigenvalues (d,), ascending, and eigenvectors (d, d), as ``eigh`` gives them."""
        kept = int((values < threshold).sum())
        if 2 * kept <= len(values):
            return cls(vectors[:, :kept].contiguous(), removed=False)
        return cls(vectors[:, kept:].contiguous(), removed=True)

    @property
    def dimension(self) -> int:
        """The number of directions that P keeps."""
        d, v = self.vectors.shape
        return d - v if self.removed else v

    @property
    def width(self) -> int:
        """The number of :meth:`coordinates`."""
        d, v = self.vectors.shape
        return d if self.removed else v

    def __call__(self, keys: Tensor) -> Tensor:
        """P K: (d, n), float64."""
        return self.expand(self.coordinates(keys))

    def coordinates(self, keys: Tensor) -> Tensor:
        """P K in the basis of what P keeps, VᵀK (v, n); P K itself (d, n) if V is what P removes. Float64.

        Products of such columns with each other are those of P K.
        """
        keys = keys.double()
        inside = self.vectors.T @ keys
        return keys - self.vectors @ inside if self.removed else inside

    def expand(self, coordinates: Tensor) -> Tensor:
        """The columns (d, n) that have these coordinates."""
        return coordinates if self.removed else self.vectors @ coordinates


class RidgeSolver:
    """X = (εI + P G GᵀP + P K KᵀP)⁻¹ P K for keys K and the earlier keys G: AlphaEdit's system with ε = λ₂.

    AlphaEdit solves (P(K Kᵀ + G Gᵀ) + λ₂I) Xᵀ = P K Rᵀ; as P is a projection its solution is Δ = R Xᵀ with this
    X. Where P keeps few directions, all of this is done in their coordinates (:meth:`Projector.coordinates`). Up to
    ``primal_from`` keys the solve is that of :class:`DualSolver`; beyond, where the r × r system is no longer the
    small one, the inverse Σ of εI + P G GᵀP is kept, Y = εΣF, and appending a batch is a downdate of Σ, computed
    afresh from the keys every 50 batches.

    Args:
        d: the width of keys.
        ridge: ε > 0.
        projector: P; None for the identity.
        primal_from: the number of keys from which on Σ is used; None: half of the directions that P keeps.
        dtype: of the stored keys, as in :class:`DualSolver`.
        device: where keys are kept; None: where the first batch is.
    """

    def __init__(
        self,
        d: int,
        ridge: float,
        *,
        projector: Projector | None = None,
        primal_from: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        self.projector = projector
        dimension = d if projector is None else projector.dimension
        if dimension == 0:
            raise ValueError(
                "RidgeSolver: the projector keeps no direction, so there is nothing to solve for"
            )
        self.primal_from = max(1, dimension // 2) if primal_from is None else primal_from
        width = d if projector is None else projector.width
        self._dual = DualSolver(width, ridge, dtype=dtype, device=device)
        self._inverse: Tensor | None = None  # Σ, once there are primal_from keys
        self._later: list[Tensor] = []  # features appended since; Σ stands for them and for those of the dual
        self._latest: tuple[Tensor, int, Tensor] | None = None

    @property
    def rank(self) -> int:
        """The number of keys stored."""
        return self._dual.rank + sum(batch.shape[1] for batch in self._later)

    @property
    def features(self) -> Tensor:
        """Coordinates of P G: (width, r)."""
        return torch.cat([self._dual.features, *self._later], dim=1) if self._later else self._dual.features

    def solve(self, keys: Tensor) -> Tensor:
        """X (d, n), float64; nothing is stored. Errors as :meth:`DualSolver.solve`."""
        features = self._projected(keys)
        if self._inverse is None:
            Y, factor = self._dual.solve(features)
        else:
            Y, factor = self._solve_primal(features)
        X = torch.cholesky_solve(Y.T, factor).T
        return X if self.projector is None else self.projector.expand(X)

    def append(self, keys: Tensor) -> None:
        """Store a batch. Errors as :meth:`DualSolver.append`; nothing is stored then."""
        features = self._projected(keys)
        if self._inverse is None:
            self._dual.append(features)
            self._switch()
        else:
            Y, factor = self._solve_primal(features)
            half = torch.linalg.solve_triangular(factor, Y.T, upper=False)  # Σ ← Σ − Y S⁻¹Yᵀ/ε
            self._inverse.addmm_(half.T, half, alpha=-1 / self._dual.ridge)
            self._later.append(features.to(self._dual.dtype))
            if len(self._later) % _REBUILD == 0:
                self._rebuild()
        self._latest = None

    def truncate(self, k: int) -> None:
        """Keep the first ``k`` keys stored; below ``primal_from`` exactly what was there before the others."""
        if not 0 <= k <= self.rank:
            raise ValueError(f"RidgeSolver.truncate: k must be between 0 and {self.rank}, got {k}")
        later = self.features[:, self._dual.rank : k] if k > self._dual.rank else None
        self._dual.truncate(min(k, self._dual.rank))
        self._later = [] if later is None else [later.clone()]
        self._latest = self._inverse = None
        self._switch()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of everything needed to go on: that of the dual solver, and ``later`` (width, r′)."""
        return {**self._dual.state_dict(), "later": self.features[:, self._dual.rank :].clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a solver with the same d, ridge, projector and ``primal_from``."""
        if "later" not in state:
            raise KeyError(f"RidgeSolver.load_state_dict: no 'later' in the state, got {sorted(state)}")
        self._dual.load_state_dict(state)
        later = state["later"].to(self._dual.features, copy=True)
        self._later = [later] if later.shape[1] else []
        self._latest = self._inverse = None
        self._switch()

    def _projected(self, keys: Tensor) -> Tensor:
        """Coordinates of P K in float64, remembered for the latest keys."""
        if self._latest is None or self._latest[0] is not keys or self._latest[1] != keys._version:
            check.is_tensor("RidgeSolver", keys=keys)
            check.matrix("RidgeSolver", keys=keys)
            d = self._dual.d if self.projector is None else len(self.projector.vectors)
            check.shape("RidgeSolver", (d, keys.shape[1]), "to fit d", keys=keys)
            features = keys.double() if self.projector is None else self.projector.coordinates(keys)
            self._latest = (keys, keys._version, features)
        return self._latest[2]

    def _solve_primal(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Y = εΣF and the Cholesky factor of S = εI + FᵀY, as the dual solver has them."""
        assert self._inverse is not None
        if not _finite(features):
            raise ValueError("RidgeSolver: keys must be finite")
        Y = self._dual.ridge * (self._inverse @ features)
        S = features.T @ Y
        S = (S + S.T) / 2
        S.diagonal().add_(self._dual.ridge)
        return Y, _definite(S, self._dual.ridge, self.rank)

    def _switch(self) -> None:
        if self.rank >= self.primal_from:
            self._rebuild()

    def _rebuild(self) -> None:
        """Σ from the keys."""
        features = self.features.double()
        system = features @ features.T
        system.diagonal().add_(self._dual.ridge)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))


# ---- UltraEdit ------------------------------------------------------------------------------------------


def ridge_factors(features: Tensor, values: Tensor, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors of the ridge regression ((HᵀH + εI)⁻¹HᵀV)ᵀ = left rightᵀ, for :func:`low_rank_update_`.

    By the push-through identity (HᵀH + εI)⁻¹Hᵀ = Hᵀ(HHᵀ + εI)⁻¹ the system has the size of the T rows, or of
    the d columns if these are fewer; the (d, d_out) matrix itself is not formed. Source: UltraEdit, eq. 8.

    Args:
        features: H (T, d), floating point, one row for each token.
        values: V (T, d_out), floating point.
        ridge: ε > 0.

    Returns:
        left (d_out, r) and right (d, r), float64, r = min(T, d).

    Raises:
        ValueError: shapes that do not fit, a ridge that is not positive.
        fastedit.NumericalError: the system is not positive definite, or features or values are not finite.

    >>> left, right = ridge_factors(torch.ones(1, 3), torch.ones(1, 2))
    >>> left @ right.T  # 1 / (3 + 1)
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """
    check.matrix("ridge_factors", features=features, values=values)
    check.shape("ridge_factors", (len(features), values.shape[1]), "to fit features", values=values)
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge_factors: ridge must be positive and finite, got {ridge}")
    H, V = features.double(), values.double()
    if H.shape[0] <= H.shape[1]:
        system, target, right = H @ H.T, V, H.T
    else:
        system, target = H.T @ H, H.T @ V
        right = torch.eye(H.shape[1], dtype=torch.float64, device=H.device)
    system.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(
        _definite(system, ridge, 0)
    )  # small, and a product is faster than two solves
    left = target.T @ inverse
    if not _finite(left):
        raise NumericalError("ridge_factors: features and values must be finite")
    return left, right
