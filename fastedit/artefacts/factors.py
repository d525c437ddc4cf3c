"""A low-rank change of a matrix, kept as its two factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``left rightᵀ``, of shape (d_out, d_in), which is added to a weight.

    Factors are kept in float32, detached and contiguous; other floating-point dtypes are converted.

    Attributes:
        left: (d_out, r).
        right: (d_in, r).

    Raises:
        ValueError: the factors are not two matrices of equal rank.
        TypeError: they are not floating point.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            factor = getattr(self, name)
            if not isinstance(factor, Tensor) or not factor.is_floating_point():
                came = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                raise TypeError(f"LowRank: {name} must be a floating-point tensor, got {came}")
            if factor.dim() != 2:
                raise ValueError(f"LowRank: {name} must be a matrix (d, r), got shape {tuple(factor.shape)}")
            object.__setattr__(self, name, factor.detach().to(torch.float32).contiguous())
        if self.left.shape[1] != self.right.shape[1]:
            raise ValueError(
                f"LowRank: left and right must have one rank, got {self.left.shape[1]} and "
                f"{self.right.shape[1]}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of each factor."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the change."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of both factors."""
        return 4 * (self.left.numel() + self.right.numel())

    def norm(self) -> float:
        """Frobenius norm of the change, in float64 from the r × r Gram matrices: never forms d × d."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    def dense(self) -> Tensor:
        """The change itself, (d_out, d_in), float32."""
        return self.left @ self.right.T

    def is_finite(self) -> bool:
        """Whether every element of both factors is finite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def to(self, device: torch.device | str) -> LowRank:
        """The same factors on another device."""
        return LowRank(self.left.to(device), self.right.to(device))

    @staticmethod
    def sum(parts: Sequence[LowRank]) -> LowRank:
        """The sum of several changes of one matrix: their factors side by side.

        If the ranks add up to more than a matrix of that shape can have, the sum is reduced to that rank.
        """
        left = torch.cat([part.left for part in parts], dim=1)
        right = torch.cat([part.right for part in parts], dim=1)
        d_out, d_in = left.shape[0], right.shape[0]
        if left.shape[1] <= min(d_out, d_in):
            return LowRank(left, right)
        product = left.double() @ right.double().T
        if d_out <= d_in:
            return LowRank(torch.eye(d_out, device=left.device), product.T)
        return LowRank(product, torch.eye(d_in, device=left.device))


class Change(NamedTuple):
    """What one edit does to one matrix: a low-rank part, a dense part (d_out, d_in), or both."""

    low_rank: LowRank | None
    dense: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        if self.low_rank is not None:
            return self.low_rank.shape
        return (0, 0) if self.dense is None else (self.dense.shape[0], self.dense.shape[1])

    def is_finite(self) -> bool:
        """Whether all of it is finite."""
        return (self.low_rank is None or self.low_rank.is_finite()) and (
            self.dense is None or bool(torch.isfinite(self.dense).all())
        )
