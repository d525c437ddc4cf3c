"""A matrix of earlier keys, Σ k kᵀ, that is only formed when somebody reads it.

The published code keeps C_p = G Gᵀ, (layers, d, d) float32, and hands it from batch to batch. Our solvers need only
the keys G. So what is handed back is a tensor of that shape which holds G, and becomes the matrix at the first use
that is not ours; from then on it is one, and changes made to it count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class KeyCache(torch.Tensor):
    """(layers, d, d) float32 on the CPU, zero until keys are added; any operation of torch may be applied to it.

    Args:
        like: gives shape, dtype and device; its values are not read.
        state: what belongs to the keys, such as a solver; kept as attribute ``state``.
    """

    state: Any
    _keys: list[list[Tensor]]
    _matrix: Tensor | None
    _seen: float

    @staticmethod
    def __new__(cls, like: Tensor, state: Any = None) -> KeyCache:  # noqa: D102
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.state = state
        made._keys = [[] for _ in range(like.shape[0])]
        made._matrix = None
        made._seen = 0.0
        return made

    def __init__(self, like: Tensor, state: Any = None) -> None:
        super().__init__()

    def add_keys(self, keys: Sequence[Tensor]) -> None:
        """Add k kᵀ of new keys, (d, n) for each layer."""
        for index, new in enumerate(keys):
            self._keys[index].append(new)
            if self._matrix is not None:
                new = new.to(self._matrix.device, self._matrix.dtype)
                self._matrix[index].addmm_(new, new.T)
        if self._matrix is not None:
            self._seen = _checksum(self._matrix)

    @property
    def changed(self) -> bool:
        """Somebody has written to the matrix: it is no longer that of the keys."""
        return self._matrix is not None and _checksum(self._matrix) != self._seen

    def dense(self) -> Tensor:
        """The matrix as a plain tensor, formed at the first call; writing to it changes this object."""
        if self._matrix is None:
            matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for index, parts in enumerate(self._keys):
                if parts:
                    keys = torch.cat([part.to(self.device, self.dtype) for part in parts], 1)
                    torch.mm(keys, keys.T, out=matrix[index])
            self._matrix, self._seen = matrix, _checksum(matrix)
        return self._matrix

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.dense() if isinstance(value, KeyCache) else value

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs or {})))

    def numpy(self, *, force: bool = False) -> Any:
        """The matrix as a NumPy array that shares its memory."""
        return self.dense().numpy(force=force)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = [sum(part.shape[1] for part in parts) for parts in self._keys]
        return f"KeyCache(shape={tuple(self.shape)}, keys by layer={held}, formed={self._matrix is not None})"


def _checksum(matrix: Tensor) -> float:
    """Tells a matrix that was written to from one that was not; version counters do not see writes to views."""
    return float(matrix.sum(dtype=torch.float64))
