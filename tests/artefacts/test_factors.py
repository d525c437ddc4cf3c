from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from fastedit.artefacts import LowRank


def low_rank(d_out: int, d_in: int, rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(d_out, rank, generator=generator), torch.randn(d_in, rank, generator=generator)
    )


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(7, 5, 3), (5, 7, 1), (4, 4, 0), (1, 9, 1)])
def test_norm_equals_the_dense_norm(d_out: int, d_in: int, rank: int) -> None:
    factors = low_rank(d_out, d_in, rank)
    dense = factors.left.double() @ factors.right.double().T
    assert factors.norm() == pytest.approx(dense.norm().item(), rel=1e-12)
    assert factors.shape == (d_out, d_in)
    assert factors.rank == rank
    assert factors.size_bytes == 4 * rank * (d_out + d_in)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("ranks", [(2, 3), (5, 5)], ids=["fits", "exceeds"])
def test_sum_is_the_sum_of_the_changes(d_out: int, d_in: int, ranks: tuple[int, int]) -> None:
    parts = [low_rank(d_out, d_in, rank, seed) for seed, rank in enumerate(ranks)]
    total = LowRank.sum(parts)
    assert total.rank <= min(d_out, d_in)
    assert relative_error(total.dense(), sum(p.left.double() @ p.right.double().T for p in parts)) < 2e-6


def test_factors_become_float32_detached_and_contiguous() -> None:
    left = torch.randn(3, 4, dtype=torch.float64, requires_grad=True).T
    factors = LowRank(left, torch.randn(5, 3, dtype=torch.bfloat16))
    assert factors.left.dtype == factors.right.dtype == torch.float32
    assert not factors.left.requires_grad
    assert factors.left.is_contiguous()


def test_wrong_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="one rank, got 2 and 3"):
        LowRank(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="must be a matrix"):
        LowRank(torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(TypeError, match="int64"):
        LowRank(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1))
