"""Thin solves against dense ones in float64."""

from __future__ import annotations

import doctest
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import relative_error

import fastedit
from fastedit import NumericalError
from fastedit.ops import CovarianceFactor, DualSolver, Projector, RidgeSolver, ridge_factors, solve

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def covariance(d: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)
    return basis @ torch.diag(spectrum) @ basis.T


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("weight", [20.0, 1000.0, 15000.0])
def test_thin_solve_equals_the_dense_one(n: int, weight: float) -> None:
    """Compared as updates act, on the new keys and on old ones: entrywise, forming the system costs 1e-7."""
    matrix = covariance(300, 1e7)
    noise = torch.randn(300, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    keys = 10 * torch.linalg.cholesky(matrix) @ noise + 1e-3 * noise.flip(0)
    thin = CovarianceFactor(matrix, weight).regularised(keys)
    dense = torch.linalg.solve(weight * matrix + keys @ keys.T, keys)
    root = torch.linalg.cholesky(matrix).T
    assert relative_error(keys.T @ thin, keys.T @ dense) < 1e-8
    assert relative_error(root @ thin, root @ dense) < 1e-8


def test_thin_solve_satisfies_its_equation_as_well_as_the_dense_one() -> None:
    """Keys along directions that the covariance has hardly seen: forward errors grow, residuals do not."""
    matrix = covariance(300, 1e7)
    keys = torch.randn(300, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    system = matrix + keys @ keys.T
    thin = CovarianceFactor(matrix).regularised(keys)
    dense = torch.linalg.solve(system, keys)
    assert relative_error(system @ thin, keys) < max(10 * relative_error(system @ dense, keys), 1e-9)


def test_equality_constraint_is_the_limit_of_a_small_ridge() -> None:
    matrix = covariance(64, 1e3)
    keys = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    update = CovarianceFactor(matrix).regularised(keys, ridge=1e-12)
    torch.testing.assert_close(keys.T @ update, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_repeated_keys_are_no_obstacle() -> None:
    keys = torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    matrix = covariance(32, 1e2)
    dense = torch.linalg.solve(matrix + keys @ keys.T, keys)
    assert relative_error(CovarianceFactor(matrix).regularised(keys), dense) < 1e-8


def test_a_slightly_indefinite_covariance_is_solved_and_said(caplog: pytest.LogCaptureFixture) -> None:
    matrix = covariance(40, 1e3)
    values, vectors = torch.linalg.eigh(matrix)
    values[0] = -1e-9
    matrix = vectors @ torch.diag(values) @ vectors.T
    keys = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        thin = CovarianceFactor(matrix, 10.0, layer=3).regularised(keys)
    assert "layer 3" in caplog.text
    dense = torch.linalg.solve(10.0 * matrix + keys @ keys.T, keys)
    assert relative_error(thin, dense) < 1e-3


def test_nan_in_statistics_is_refused() -> None:
    matrix = covariance(8, 10.0)
    matrix[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="layer 5"):
        CovarianceFactor(matrix, layer=5)


def test_singular_statistics_name_the_layer() -> None:
    with pytest.raises(NumericalError, match="layer 2"):
        CovarianceFactor(torch.zeros(4, 4), layer=2)


# ---- CovarianceFactor: kept inverse, appended keys, restricted solves -----------------------------------


def seen_keys(matrix: torch.Tensor, n: int, seed: int, size: float = 3.0) -> torch.Tensor:
    """Keys with the second moment of ``matrix``, and a little in every direction."""
    noise = random(len(matrix), n, dtype=FP64, seed=seed)
    return size * torch.linalg.cholesky(matrix) @ noise + 1e-3 * noise.flip(0)


def assert_same_update(thin: torch.Tensor, expected: torch.Tensor, matrix: torch.Tensor, keys: torch.Tensor):
    """Compared as updates act: on the keys, and in the norm of the metric."""
    root = torch.linalg.cholesky(matrix).T
    assert relative_error(keys.T @ thin, keys.T @ expected) < 1e-8
    assert relative_error(root @ thin, root @ expected) < 1e-8


FORMS = [pytest.param({}, id="factor"), pytest.param({"inverse": True}, id="inverse")]


@pytest.mark.parametrize("ridge", [1.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_appended_keys_join_the_metric(form: dict[str, bool], ridge: float) -> None:
    """MEMIT with a cache, six batches: A = λC + Σ K Kᵀ."""
    matrix = covariance(200, 1e7)
    factor = CovarianceFactor(matrix, 20.0, **form)
    metric = 20.0 * matrix
    for i in range(6):
        keys = seen_keys(matrix, 9, seed=i)
        inner = torch.linalg.solve(metric, keys)
        expected = inner @ torch.linalg.inv(keys.T @ inner + ridge * torch.eye(9, dtype=FP64))
        thin = factor.regularised(keys, ridge)
        assert_same_update(thin, expected, matrix, keys)
        factor.append(keys)
        metric = metric + keys @ keys.T
    assert factor.rank == 54
    state = factor.state_dict()
    keys = seen_keys(matrix, 5, seed=9)
    other = CovarianceFactor(matrix, 20.0, **form)
    other.load_state_dict(state)
    assert torch.equal(other.regularised(keys), factor.regularised(keys))
    factor.truncate(0)
    fresh = CovarianceFactor(matrix, 20.0, **form)
    assert torch.equal(factor.regularised(keys), fresh.regularised(keys))


def test_a_kept_inverse_is_refined_or_given_up(caplog: pytest.LogCaptureFixture) -> None:
    matrix = covariance(200, 1e9)
    keys = seen_keys(matrix, 7, seed=1)
    kept = CovarianceFactor(matrix, inverse=True)
    assert kept._inverse is not None
    thin = CovarianceFactor(matrix).regularised(keys)  # the dense solve itself is only good to 1e-6 here
    root = torch.linalg.cholesky(matrix).T
    assert relative_error(root @ kept.regularised(keys), root @ thin) < 1e-7
    with caplog.at_level(logging.INFO):
        given_up = CovarianceFactor(
            covariance(200, 1e15) + 1e-16 * torch.eye(200, dtype=FP64), inverse=True, layer=4
        )
    assert given_up._inverse is None
    assert "layer 4 are too ill-conditioned" in caplog.text


@pytest.mark.parametrize("form", [*FORMS, pytest.param({"keep_matrix": True}, id="matrix")])
@pytest.mark.parametrize("left_out", [0, 1, 12, 60, 119, 120])
@pytest.mark.parametrize("appended", [0, 7])
def test_restricted_solve_is_that_of_the_submatrix(
    form: dict[str, bool], left_out: int, appended: int
) -> None:
    """NSE: (λC + C_p)_SS alone, by either route; ``left_out`` neurons are outside S."""
    matrix = covariance(120, 1e5)
    factor = CovarianceFactor(matrix, 15.0, **form)
    metric = 15.0 * matrix
    if appended:
        earlier = seen_keys(matrix, appended, seed=3)
        factor.append(earlier)
        metric = metric + earlier @ earlier.T
    keys = seen_keys(matrix, 6, seed=4)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    selected = order[left_out:]
    inner, inside = keys[selected], metric[selected][:, selected]
    expected = torch.linalg.solve(inside + inner @ inner.T, inner)
    for route in ("gathered", "complement", *(["iterated"] if "keep_matrix" in form else [])):
        factor.route = lambda *_, route=route: route
        thin = factor.restricted(keys, selected)
        assert thin.shape == (120 - left_out, 6)
        if left_out < 120:
            assert_same_update(thin, expected, inside, inner)


def test_the_route_of_a_restricted_solve_is_that_of_fewest_operations() -> None:
    factor = CovarianceFactor(covariance(60, 1e2), keep_matrix=True)
    assert factor.route(20, 2) == "gathered"
    assert factor.route(59, 2) == "complement"
    assert CovarianceFactor(covariance(800, 1e2), keep_matrix=True).route(720, 1) == "iterated"
    assert CovarianceFactor(covariance(800, 1e2)).route(720, 1) != "iterated"


@pytest.mark.parametrize(("condition", "left_out"), [(1e2, 20), (1e9, 100)], ids=["easy", "hard"])
@pytest.mark.parametrize("appended", [0, 9])
def test_iterated_solves_reach_the_tolerance_or_are_given_up(
    condition: float, left_out: int, appended: int
) -> None:
    matrix = covariance(300, condition)
    factor = CovarianceFactor(matrix, keep_matrix=True)
    metric = matrix.clone()
    if appended:
        earlier = seen_keys(matrix, appended, seed=3)
        factor.append(earlier)
        metric += earlier @ earlier.T
    selected = torch.randperm(300, generator=torch.Generator().manual_seed(0))[left_out:]
    inside, keys = metric[selected][:, selected], random(300 - left_out, 3, dtype=FP64)
    keys[:, 2] = 0
    solved = factor._solve_by_iteration(keys, selected)
    if condition > 1e3:
        assert solved is None
    else:
        assert solved is not None
        assert relative_error(inside @ solved, keys) < 1e-10


def test_restricted_after_a_truncation_is_as_if_the_rest_had_never_been() -> None:
    matrix = covariance(80, 1e4)
    batches = [seen_keys(matrix, n, seed=n) for n in (5, 3, 4)]
    keys, selected = seen_keys(matrix, 6, seed=9), torch.arange(0, 80, 2)
    factor, fresh = (CovarianceFactor(matrix, 7.0, keep_matrix=True) for _ in range(2))
    for batch in batches:
        factor.append(batch)
        factor.restricted(keys, selected)
    for batch in batches[:2]:
        fresh.append(batch)
    factor.truncate(8)
    assert torch.equal(factor.restricted(keys, selected), fresh.restricted(keys, selected))
    factor.append(batches[2])
    fresh.append(batches[2])
    assert torch.equal(factor.restricted(keys, selected), fresh.restricted(keys, selected))
    factor.truncate(0)
    never = CovarianceFactor(matrix, 7.0, keep_matrix=True)
    assert torch.equal(factor.restricted(keys, selected), never.restricted(keys, selected))


def test_restricted_refuses_wrong_indices() -> None:
    factor = CovarianceFactor(covariance(6, 10.0))
    with pytest.raises(ValueError, match="indices from 0 to 5"):
        factor.restricted(torch.ones(6, 1), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="each index once"):
        factor.restricted(torch.ones(6, 1), torch.tensor([1, 1]))


# ---- AlphaEdit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 3e-2, 2.0], ids=["nothing", "little", "much", "all"])
def test_projector_is_the_dense_one(threshold: float) -> None:
    matrix = covariance(60, 1e6)
    left, values, _ = torch.linalg.svd(matrix)
    kept = left[:, values < threshold]
    projector = Projector.from_second_moment(matrix, threshold)
    keys = random(60, 5, dtype=FP64)
    assert projector.dimension == kept.shape[1]
    assert projector.vectors.shape[1] <= 30
    torch.testing.assert_close(projector(keys), kept @ (kept.T @ keys), rtol=0, atol=1e-10)


@pytest.mark.parametrize("primal_from", [None, 10**9, 1], ids=["auto", "dual", "primal"])
@pytest.mark.parametrize("threshold", [1e-4, 3e-2, None], ids=["half", "most", "identity"])
def test_ridge_solver_is_the_published_system(primal_from: int | None, threshold: float | None) -> None:
    """(P(KKᵀ + C_p) + λ₂I) X = P K, eight batches; with ``auto`` the primal takes over on the way."""
    matrix, ridge = covariance(90, 1e6), 10.0
    projector = None if threshold is None else Projector.from_second_moment(matrix, threshold)
    dense = torch.eye(90, dtype=FP64) if projector is None else projector(torch.eye(90, dtype=FP64))
    solver = RidgeSolver(90, ridge, projector=projector, primal_from=primal_from)
    earlier = torch.zeros(90, 90, dtype=FP64)
    for i in range(8):
        keys = 3 * random(90, 7, dtype=FP64, seed=i)
        system = dense @ (keys @ keys.T + earlier) + ridge * torch.eye(90, dtype=FP64)
        assert relative_error(solver.solve(keys), torch.linalg.solve(system, dense @ keys)) < 1e-9
        solver.append(keys)
        earlier += keys @ keys.T
    assert solver.rank == 56
    assert (solver._inverse is not None) == (solver.primal_from <= 56)
    other = RidgeSolver(90, ridge, projector=projector, primal_from=primal_from)
    other.load_state_dict(solver.state_dict())
    keys = random(90, 3, dtype=FP64, seed=50)
    assert relative_error(other.solve(keys), solver.solve(keys)) < 1e-9
    solver.truncate(14)
    fresh = RidgeSolver(90, ridge, projector=projector, primal_from=primal_from)
    for i in range(2):
        fresh.append(3 * random(90, 7, dtype=FP64, seed=i))
    assert relative_error(solver.solve(keys), fresh.solve(keys)) < 1e-9
    with pytest.raises(ValueError, match="k must be between 0 and 14, got 15"):
        solver.truncate(15)


def test_a_solver_works_in_the_coordinates_of_few_directions() -> None:
    matrix = covariance(60, 1e6)
    projector = Projector.from_second_moment(matrix, 1e-5)
    assert not projector.removed
    keys = random(60, 4, dtype=FP64)
    torch.testing.assert_close(projector.expand(projector.coordinates(keys)), projector(keys))
    solver = RidgeSolver(60, 1.0, projector=projector)
    solver.append(keys)
    assert solver.features.shape == (projector.dimension, 4)
    with pytest.raises(ValueError, match=r"keys must have shape \(60, 4\)"):
        solver.solve(keys[:50])
    with pytest.raises(ValueError, match="keeps no direction"):
        RidgeSolver(60, 1.0, projector=Projector.from_second_moment(matrix, 0.0))


def test_a_primal_solver_is_rebuilt_and_refuses_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_REBUILD", 2)
    solver, dual = RidgeSolver(20, 1.0, primal_from=1), DualSolver(20, 1.0)
    for i in range(5):
        keys = random(20, 3, dtype=FP64, seed=i)
        solver.append(keys)
        dual.append(keys)
    keys = random(20, 2, seed=9)
    Y, factor = dual.solve(keys)
    assert relative_error(solver.solve(keys), Y @ torch.cholesky_inverse(factor)) < 1e-12
    keys[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        solver.append(keys)
    assert solver.rank == 15


# ---- UltraEdit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "d", "d_out"), [(1, 5, 3), (7, 20, 9), (20, 7, 9), (0, 4, 3), (6, 6, 1)])
@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_ridge_factors_are_the_primal_solution(tokens: int, d: int, d_out: int, ridge: float) -> None:
    features, values = random(tokens, d, dtype=FP64, seed=1), random(tokens, d_out, dtype=FP64, seed=2)
    left, right = ridge_factors(features, values, ridge)
    system = features.T @ features + ridge * torch.eye(d, dtype=FP64)
    expected = torch.linalg.solve(system, features.T @ values).T
    assert left.shape[1] == right.shape[1] == min(tokens, d)
    torch.testing.assert_close(left @ right.T, expected, rtol=1e-10, atol=1e-10)


def test_ridge_factors_refuse() -> None:
    with pytest.raises(ValueError, match="values must have shape"):
        ridge_factors(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="ridge must be positive"):
        ridge_factors(torch.ones(3, 2), torch.ones(3, 2), 0.0)
    with pytest.raises(NumericalError, match="must be finite"):
        ridge_factors(torch.ones(3, 2), torch.full((3, 2), float("nan")))


def test_documented_examples() -> None:
    assert doctest.testmod(solve, extraglobs={"torch": torch}).failed == 0
    docs = Path(__file__).parents[2] / "docs" / "ops"
    for page in ("low_rank.md", "solve.md"):
        assert doctest.testfile(str(docs / page), module_relative=False).failed == 0


# ---- DualSolver -----------------------------------------------------------------------------------------


def batches(d=300, n_batches=6, n=17, condition=1e7, ridge=1.0, seed=0):
    """Feature batches for which εI + G Gᵀ has about the given condition number at the end."""
    generator = torch.Generator().manual_seed(seed)
    total = n_batches * n
    left, _ = torch.linalg.qr(torch.randn(d, total, dtype=FP64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(total, total, dtype=FP64, generator=generator))
    values = torch.logspace(0, np.log10(np.sqrt(condition * ridge)), total, dtype=FP64)
    return list((left * values @ right).split(n, dim=1))


def dense(stored, batch, ridge):
    d = batch.shape[0]
    system = ridge * torch.eye(d, dtype=FP64) + batch @ batch.T
    if stored:
        system += torch.cat(stored, dim=1) @ torch.cat(stored, dim=1).T
    return torch.linalg.solve(system, batch)


@pytest.mark.parametrize("ridge", [1.0, 1e-3, 50.0])
def test_dual_solve_equals_the_dense_solve_over_six_batches(ridge):
    """LTE 8.1 for the kernel itself: d = 300, condition 1e7, six sequential batches, relative error < 1e-8."""
    parts = batches(ridge=ridge)
    solver = DualSolver(300, ridge)
    residual = random(40, 17, seed=5).double()
    for i, batch in enumerate(parts):
        Y, factor = solver.solve(batch)
        expected = dense(parts[:i], batch, ridge)
        assert relative_error(Y @ torch.cholesky_inverse(factor), expected) < 1e-8
        assert relative_error(solver.divide(residual, factor) @ Y.T, residual @ expected.T) < 1e-8
        solver.append(batch)
    features = torch.cat(parts, dim=1)
    gram = ridge * torch.eye(features.shape[1], dtype=FP64) + features.T @ features
    assert solver.rank == 6 * 17
    assert torch.equal(solver.features, features)
    assert relative_error(solver.factor @ solver.factor.T, gram) < 1e-12
    assert torch.equal(solver.factor, solver.factor.tril())


def test_dual_solve_with_float32_storage():
    parts = batches(condition=1e3)
    solver = DualSolver(300, 1.0, dtype=FP32)
    for i, batch in enumerate(parts):
        Y, factor = solver.solve(batch)
        assert relative_error(Y @ torch.cholesky_inverse(factor), dense(parts[:i], batch, 1.0)) < 1e-4
        solver.append(batch)
    assert solver.features.dtype == FP32
    assert solver.factor.dtype == FP64


def test_repeated_features_are_covered_by_the_ridge():
    batch = random(30, 4, seed=1).double()
    solver = DualSolver(30, 0.1)
    solver.append(batch)
    solver.append(batch)
    Y, factor = solver.solve(batch)
    assert relative_error(Y @ torch.cholesky_inverse(factor), dense([batch, batch], batch, 0.1)) < 1e-10


def test_truncating_restores_the_bits():
    parts = batches(d=40, n_batches=3, n=5)
    solver = DualSolver(40, 1.0)
    solver.append(parts[0])
    solver.append(parts[1])
    before = {name: value.clone() for name, value in solver.state_dict().items()}
    solver.append(parts[2])
    solver.truncate(10)
    after = solver.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = solver.solve(parts[2])
    solver.append(parts[2])
    solver.truncate(10)
    second = solver.solve(parts[2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="k must be between 0 and 10, got 11"):
        solver.truncate(11)


def test_state_goes_on_where_it_was():
    parts = batches(d=40, n_batches=3, n=5)
    solver, other = DualSolver(40, 1.0), DualSolver(40, 1.0)
    solver.append(parts[0])
    solver.append(parts[1])
    other.load_state_dict(solver.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(solver.solve(parts[2]), other.solve(parts[2]), strict=True))
    other.append(parts[2])
    assert solver.rank == 10
    with pytest.raises(ValueError, match=r"the state has ridge 1.0, this solver 2.0"):
        DualSolver(40, 2.0).load_state_dict(solver.state_dict())
    with pytest.raises(ValueError, match=r"features must have shape \(41, 10\)"):
        DualSolver(41, 1.0).load_state_dict(solver.state_dict())
    with pytest.raises(KeyError, match="no 'factor'"):
        other.load_state_dict({"features": parts[0]})


def test_append_reuses_only_the_solve_of_the_same_values():
    batch = random(12, 3, seed=1).double()
    solver, other = DualSolver(12, 1.0), DualSolver(12, 1.0)
    solver.solve(batch)
    batch.mul_(2)
    solver.append(batch)
    other.append(batch.clone())
    assert torch.equal(solver.factor, other.factor)


def test_dual_solver_refuses():
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge must be positive and finite"):
            DualSolver(4, ridge)
    with pytest.raises(ValueError, match="d must be at least 1"):
        DualSolver(0, 1.0)
    with pytest.raises(TypeError, match="dtype must be float64 or float32, got bfloat16"):
        DualSolver(4, 1.0, dtype=BF16)
    solver = DualSolver(4, 1.0)
    with pytest.raises(ValueError, match=r"features must have shape \(4, 2\) to fit d, got \(5, 2\)"):
        solver.solve(torch.ones(5, 2))
    with pytest.raises(TypeError, match="features must be floating point, got int64"):
        solver.solve(torch.ones(4, 2, dtype=torch.int64))
    bad = torch.ones(4, 3)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="features must be finite, but column 2 of 3 is not"):
        solver.append(bad)
    assert solver.rank == 0


def test_a_failed_factorisation_names_the_smallest_pivot_and_stores_nothing():
    solver = DualSolver(3, 1e-30)
    batch = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    with pytest.raises(
        fastedit.NumericalError, match=r"smallest pivot \S+ at column 1, ridge 1e-30.*raise the ridge"
    ):
        solver.append(batch)
    assert solver.rank == 0


def test_a_metric_given_by_its_inverse_is_the_dense_solve() -> None:
    """The same kernel with F and A⁻¹F for a metric A."""
    matrix = covariance(50, 1e4)
    solver = DualSolver(50, 1.0)
    metric = matrix.clone()
    for i in range(4):
        keys = random(50, 6, dtype=FP64, seed=i)
        solved = torch.linalg.solve(matrix, keys)
        Y, factor = solver.solve(keys, solved)
        expected = torch.linalg.solve(metric + keys @ keys.T, keys)
        assert relative_error(Y @ torch.cholesky_inverse(factor), expected) < 1e-9
        assert relative_error(solver.apply(keys, solved), torch.linalg.solve(metric, keys)) < 1e-9
        solver.append(keys, solved)
        metric = metric + keys @ keys.T


def test_appending_grows_room_by_doubling() -> None:
    solver = DualSolver(10, 1.0)
    rooms = []
    for i in range(9):
        solver.append(random(10, 1, seed=i))
        rooms.append(solver._factor.shape[0])
    assert rooms == [1, 2, 4, 4, 8, 8, 8, 8, 16]
