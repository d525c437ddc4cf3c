"""What keeps long sequences of edits from drifting, whichever method edits: norm anchors, RECT, PRUNE."""

from __future__ import annotations

import torch
from torch import Tensor

from ..artefacts import LowRank

_RECT_EPS = 1e-8
_NORM_BOUND = 2.0  # a target longer than this many reference norms is given up


def anchor_norm(contribution: Tensor, shift: Tensor, reference: float) -> tuple[Tensor, Tensor]:
    """Norm-Anchor Scaling (arXiv 2602.02543): give what the MLP shall put out the norm of unedited values.

    Args:
        contribution: (n, d) v₀, what the MLP puts out now.
        shift: (n, d) δ, as optimised.
        reference: ν, the norm of v₀ + δ in the unedited model, from :func:`reference_norm`.

    Returns:
        The scaled shift ν v/‖v‖ − v₀ with v = v₀ + δ, and (n,) bool: the facts with ‖v‖ > 2ν, which the method
        gives up (their shift is 0).
    """
    value = contribution + shift
    norm = value.norm(dim=1)
    lost = norm > _NORM_BOUND * reference
    scaled = value * (reference / norm)[:, None] - contribution
    return torch.where(lost[:, None], torch.zeros_like(shift), scaled), lost


def reference_norm(values: Tensor) -> float:
    """ν: the mean norm of the rows of ``values`` (n, d), v₀ + δ, without the largest twentieth."""
    norms = values.norm(dim=1).sort().values
    return float(norms[: max(1, int(0.95 * len(norms)))].mean())


def rect(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """RECT (Gu et al. 2024, arXiv 2401.04700): only the largest relative changes of a weight are kept.

    Args:
        change: (d_out, d_in) fp32.
        weight: (d_out, d_in), before the change.
        keep: share of the entries with the largest \\|change / (weight + 1e-8)\\|; all that equal the last one
            are kept.

    Returns:
        (d_out, d_in) fp32, 0 where nothing is kept.
    """
    relative = (change / (weight.float() + _RECT_EPS)).abs()
    rank = int(relative.numel() * (1 - keep))
    if rank == 0:
        return change
    threshold = relative.flatten().kthvalue(rank).values
    return torch.where(relative >= threshold, change, 0.0)


def prune(change: LowRank, original: Tensor) -> LowRank | None:
    """PRUNE (Ma et al. 2024, arXiv 2405.16821): bound the singular values of all that was changed.

    Singular values σ of the total change above σ_max of the original weight become ln σ − ln σ_max + σ_max.

    Args:
        change: the total change of a weight, W − W₀.
        original: (d_out, d_in), W₀.

    Returns:
        What must be added to the edited weight; None if no singular value is above the bound.
    """
    bound = _largest_singular_value(original.double())
    q_left, r_left = torch.linalg.qr(change.left.double())
    q_right, r_right = torch.linalg.qr(change.right.double())
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
    over = sigma > bound
    if not bool(over.any()):
        return None
    target = sigma[over].log() - bound.log() + bound
    return LowRank(q_left @ (u[:, over] * (target - sigma[over])), q_right @ vt[over].T)


def _largest_singular_value(matrix: Tensor) -> Tensor:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].sqrt()
