"""Argument checks of the operations: every message says what was expected and what came.

All checks but :func:`no_overlap` look at metadata only, so they also run on fake and meta tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger("fastedit.ops")
_said: set[str] = set()


def once(level: int, message: str) -> None:
    """Log ``message`` the first time it is given, and never again in this process."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def one_of(names: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def is_tensor(op: str, **values: object) -> None:
    """Raise TypeError for a value that is not a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on the device of the first one."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise ValueError(f"{op}: {name} must be on {first[1]} like {first[0]}, got {tensor.device}")


def dtype(op: str, allowed: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Raise TypeError unless the dtype of every given tensor is one of ``allowed``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = one_of([name_of(d) for d in allowed])
            raise TypeError(f"{op}: {name} must be {wanted}, got {name_of(tensor.dtype)}")


def matrix(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every given tensor has two dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} must have 2 dimensions, got shape {tuple(tensor.shape)}")


def square(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every given tensor is a square matrix."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
            raise ValueError(f"{op}: {name} must be a square matrix, got shape {tuple(tensor.shape)}")


def last_dim(op: str, size: int, like: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the last dimension of every given tensor is ``size`` (that of ``like``)."""
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.shape[-1] != size:
            raise ValueError(
                f"{op}: {name} must have shape (..., {size}) to fit {like}, got {tuple(tensor.shape)}"
            )


def shape(op: str, expected: Sequence[int], like: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor has the ``expected`` shape; ``like`` says why it must."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(
                f"{op}: {name} must have shape {tuple(expected)} {like}, got {tuple(tensor.shape)}"
            )


def choice(op: str, allowed: Sequence[str], **values: str) -> None:
    """Raise ValueError unless every given value is one of ``allowed``."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be {one_of([repr(a) for a in allowed])}, got {value!r}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last byte that the tensor's elements occupy."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * tensor.element_size()
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def no_overlap(op: str, written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a written tensor overlaps itself, another written one or a read one in memory.

    Two views whose ranges of bytes cross are refused even if no element is shared.
    """
    spans: list[tuple[int, int, int, str, bool]] = []
    for name, tensor in written:
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            continue
        if torch._debug_has_internal_overlap(tensor) == 1 and tensor.numel():
            raise ValueError(
                f"{op}: {name} is written, but several of its elements share one place in memory "
                f"(strides {tensor.stride()}): pass a clone"
            )
        if tensor.numel():
            spans.append((tensor.get_device(), *_extent(tensor), name, True))
    if not spans:
        return
    spans.extend((t.get_device(), *_extent(t), name, False) for name, t in read if t.numel())
    spans.sort()
    place, any_end, any_name, written_end, written_name = None, 0, "", 0, ""
    for device, start, end, name, is_written in spans:
        if device != place:
            place, any_end, written_end = device, 0, 0
        if start < (any_end if is_written else written_end):
            first, second = (name, any_name) if is_written else (written_name, name)
            raise ValueError(
                f"{op}: {first} is written and must not share memory with {second}: pass a clone"
            )
        if end > any_end:
            any_end, any_name = end, name
        if is_written and end > written_end:
            written_end, written_name = end, name
