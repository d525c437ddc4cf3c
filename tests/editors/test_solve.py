"""Thin solves against dense ones in float64 (conformance: solver)."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import relative_error

from fastedit import NumericalError
from fastedit.editors.solve import CovarianceFactor


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
