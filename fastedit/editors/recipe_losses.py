"""The losses that RECIPE is trained with (Chen et al. 2024, arXiv 2405.03279, and the published code).

Scores are t·⟨u, r⟩/√d, queries in rows; the last column is the sentinel's. A hinge leaves out what is won already:
a row counts only while the probability of what is wanted is less than ``hinge`` times the row's second greatest. None
leaves nothing out. Published is −log(p + ε) with ε = 1e-8; it has no gradient where p is much less than ε, so a query
that begins far off never learns. With ε = 0 it is −log p, computed without underflow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def neighbour_loss(scores: Tensor, epsilon: float) -> Tensor:
    """Each query finds its own key among the batch's and the sentinel: mean −log(p + ε); scores (B, B + 1)."""
    return _nll(scores.log_softmax(1).diagonal(), epsilon).mean()


def inside_loss(scores: Tensor, hinge: float | None, epsilon: float) -> Tensor:
    """Each relevant query finds the sentinel among the other keys, its own left out; scores (B, B + 1)."""
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    others = torch.where(own, scores[:, -1:], scores[:, :-1])
    return _hinged(others.log_softmax(1), own.int().argmax(1), hinge, epsilon)


def outside_loss(scores: Tensor, hinge: float | None, epsilon: float) -> Tensor:
    """Each irrelevant query finds the sentinel among all keys; scores (m, B + 1)."""
    sentinel = torch.full((len(scores),), scores.shape[1] - 1, device=scores.device)
    return _hinged(scores.log_softmax(1), sentinel, hinge, epsilon)


def _hinged(log_p: Tensor, wanted: Tensor, hinge: float | None, epsilon: float) -> Tensor:
    """Mean −log(p + ε) of the ``wanted`` columns over the rows that are not won; 0 if there are none."""
    found = log_p.gather(1, wanted[:, None])[:, 0]
    if log_p.shape[1] < 2:
        return 0 * found.sum()
    kept = torch.ones_like(found)
    if hinge is not None:
        kept = (found < log_p.topk(2).values[:, 1] + math.log(hinge)).to(found)
    return (_nll(found, epsilon) * kept).sum() / kept.sum().clamp(min=1)


def _nll(log_p: Tensor, epsilon: float) -> Tensor:
    return -(log_p.exp() + epsilon).log() if epsilon else -log_p


def edit_losses(
    logits: Tensor, labels: Tensor, n_first: int, before: Tensor, hinge: float | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hinge losses of two groups of tokens, and mean KL(before ‖ after) of further rows.

    Args:
        logits: (s + m, vocabulary) fp32 or fp64; the first s rows are scored. Overwritten.
        labels: (s,) int64.
        n_first: rows of the first group (edited prompts); the rest of the s are the second's (rephrasings).
        before: (m, vocabulary) log-probabilities without a prompt in front.
        hinge: see the module.
        epsilon: likewise.

    Returns:
        The first group's Σ −log(p + ε) over kept tokens divided by their number (0 if there are none), the second's,
        and the KL (0 without rows). Differentiable once.
    """
    nll, log_p, second, kl = _EditLosses.apply(logits, labels, before, epsilon)
    kept = torch.ones_like(nll) if hinge is None else (log_p < second + math.log(hinge)).to(nll)
    groups = [slice(0, n_first), slice(n_first, len(labels))]
    first, rest = ((nll[rows] * kept[rows]).sum() / kept[rows].sum().clamp(min=1) for rows in groups)
    return first, rest, kl.sum() / max(1, len(kl))


class _EditLosses(torch.autograd.Function):
    """−log(p + ε) of labels and KL(before ‖ after), in one buffer.

    ``logits`` is overwritten, first by exponentials, then by its own gradient: a vocabulary is large, and each copy
    of the logits is a pass over memory.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, before: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(labels)
        p_before = before.exp()
        kl = (p_before * (before - logits[n:].log_softmax(1))).sum(1)
        logits.sub_(logits.amax(1, keepdim=True))
        of_label = logits[:n].gather(1, labels[:, None])[:, 0]
        second = logits[:n].topk(2).values[:, 1]
        total = logits.exp_().sum(1)
        log_p, second = of_label - total[:n].log(), second - total[:n].log()
        share = log_p.exp() / (log_p.exp() + epsilon) if epsilon else torch.ones_like(log_p)
        ctx.save_for_backward(labels, total, share, p_before)
        ctx.exponentials = logits
        ctx.mark_non_differentiable(log_p, second)
        return _nll(log_p, epsilon), log_p, second, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, of_nll: Tensor, _: Tensor, __: Tensor, of_kl: Tensor
    ) -> tuple[Tensor, None, None, None]:
        labels, total, share, p_before = ctx.saved_tensors
        n = len(labels)
        # d nll = p / (p + ε) · (softmax − onehot(label)), d KL = softmax − before.
        weight = of_nll * share
        gradient = ctx.exponentials.div_(total[:, None])
        gradient[:n].mul_(weight[:, None]).scatter_add_(1, labels[:, None], -weight[:, None])
        gradient[n:].sub_(p_before).mul_(of_kl[:, None])
        return gradient, None, None, None
