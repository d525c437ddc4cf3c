"""From the original bits of a matrix and the edits on it to the bits it has now.

This one function decides what an edited weight is, in memory and on disk: an edited matrix always equals
:func:`render` of its original and the edits on it, bit for bit, whatever was pushed and removed before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BackendUnavailable, NumericalError
from ..models.fingerprint import weight_digest
from ..ops import backend, low_rank_update_
from .factors import Change

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
EDITABLE = (torch.float64, torch.float32, *HALF)
_WORTH_THREADS = 1 << 23  # bytes; fewer are hashed before threads have started


@dataclass(frozen=True)
class Update:
    """One edit's change of one matrix, and how it was computed, so that it can be computed again.

    Attributes:
        edit_id: the edit.
        change: what it adds.
        backend: the backend of ``low_rank_update_`` that served; empty if none was needed.
        device: the device it ran on, such as ``"cpu"`` or ``"cuda:0"``.
    """

    edit_id: str
    change: Change
    backend: str
    device: str


def chosen_backend(change: Change, work: Tensor, recorded: str = "") -> str:
    """The backend that will serve a change of ``work``.

    A backend chosen by name (``use_backend``, ``FASTEDIT_BACKEND``) comes first, then the one the edit was
    made with if it can serve here, then the automatic choice.
    """
    if change.low_rank is None:
        return ""
    if recorded and backend.requested() is None:
        with contextlib.suppress(BackendUnavailable, ValueError), backend.use_backend(recorded):
            return backend.choose("low_rank_update_", work)
    return backend.choose("low_rank_update_", work)


def working_copy(original: Tensor, device: torch.device | str, masters: bool) -> Tensor:
    """A fresh tensor to add changes to: float32 for half precision with masters, else the same dtype."""
    dtype = torch.float32 if masters and original.dtype in HALF else original.dtype
    work = torch.empty(original.shape, dtype=dtype, device=device)
    return work.copy_(original.detach())


def advance_(work: Tensor, update: Update, *, transposed: bool) -> Tensor:
    """Add one update to ``work`` on the device and with the backend it was first computed with.

    Returns:
        ``work``, modified in place, or a new tensor if it has to be on another device.
    """
    if str(work.device) != update.device and _exists(update.device):
        work = work.to(update.device)
    low_rank, dense = update.change
    if low_rank is not None:
        with _serving(update.backend, work):
            left, right = low_rank.left.to(work.device), low_rank.right.to(work.device)
            low_rank_update_(work, left, right, transposed=transposed)
    if dense is not None:
        delta = dense.to(work.device)
        work += delta.T if transposed else delta
    return work


def render(
    original: Tensor,
    updates: Sequence[Update],
    *,
    transposed: bool,
    device: torch.device | str = "cpu",
    masters: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The bits of a matrix with ``updates`` on it.

    In half precision with ``masters`` the changes add up in float32 and are rounded once, so that changes
    below half a unit in the last place are not lost one after the other.

    Args:
        original: the matrix before its first edit, as stored; not modified.
        updates: oldest first.
        transposed: it is stored (d_in, d_out).
        device: where the result shall be.
        masters: keep float32 masters of half-precision matrices.

    Returns:
        The matrix in the original's dtype, and its float32 master (None if it has none).

    Raises:
        NumericalError: the result is not finite in the matrix's dtype.
    """
    if not updates:
        return original.to(device), None
    work = working_copy(original, updates[0].device if _exists(updates[0].device) else device, masters)
    for update in updates:
        work = advance_(work, update, transposed=transposed)
    return settle(work.to(device), original.dtype)


def settle(work: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Round a working copy to the matrix's dtype; returns (matrix, master or None)."""
    matrix = work.to(dtype)
    largest = torch.linalg.vector_norm(work, ord=float("inf")) if work.numel() else 0.0  # NaN if there is one
    if not largest <= torch.finfo(dtype).max and not torch.isfinite(matrix).all():
        raise NumericalError(
            f"the edited matrix is not finite in {str(dtype).removeprefix('torch.')}: the edit is too "
            "large for "
            "this precision; use fewer facts a batch, a stronger regularisation, or load the model "
            "in bfloat16"
        )
    return matrix, (work if work.dtype != dtype else None)


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """:func:`fastedit.models.weight_digest` of several tensors at once (hashing releases the GIL)."""
    if len(tensors) < 2 or sum(tensor.nbytes for tensor in tensors.values()) < _WORTH_THREADS:
        return {name: weight_digest(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(max_workers=min(8, len(tensors))) as pool:
        return dict(zip(tensors, pool.map(weight_digest, tensors.values()), strict=True))


def _exists(device: str) -> bool:
    kind = torch.device(device)
    return kind.type != "cuda" or (kind.index or 0) < torch.cuda.device_count()


@contextlib.contextmanager
def _serving(name: str, work: Tensor) -> Iterator[None]:
    if not name:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(backend.use_backend(name))
            backend.choose("low_rank_update_", work)
        except (BackendUnavailable, ValueError) as error:
            stack.close()
            logger.warning("the backend of the first application cannot serve, so bits may differ: %s", error)
        yield
