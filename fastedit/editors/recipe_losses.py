"""The losses that RECIPE is trained with (Chen et al. 2024, arXiv 2405.03279, and the published code).

Scores are t·⟨u, r⟩/√d, queries in rows; the last column is the sentinel's. A hinge leaves out what is won already:
a row counts only while the probability of what is wanted is less than ``hinge`` times the row's second greatest. None
leaves nothing out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-8


def neighbour_loss(scores: Tensor) -> Tensor:
    """Each query finds its own key among the batch's and the sentinel: mean −log(p + ε); scores (B, B + 1)."""
    return -(scores.softmax(1).diagonal() + EPSILON).log().mean()


def inside_loss(scores: Tensor, hinge: float | None) -> Tensor:
    """Each relevant query finds the sentinel among the other keys, its own left out; scores (B, B + 1)."""
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    others = torch.where(own, scores[:, -1:], scores[:, :-1])
    return _hinged(others.softmax(1), own.int().argmax(1), hinge)


def outside_loss(scores: Tensor, hinge: float | None) -> Tensor:
    """Each irrelevant query finds the sentinel among all keys; scores (m, B + 1)."""
    sentinel = torch.full((len(scores),), scores.shape[1] - 1, device=scores.device)
    return _hinged(scores.softmax(1), sentinel, hinge)


def _hinged(p: Tensor, wanted: Tensor, hinge: float | None) -> Tensor:
    """Mean −log(p + ε) of the ``wanted`` columns over the rows that are not won; 0 if there are none."""
    found = p.gather(1, wanted[:, None])[:, 0]
    if p.shape[1] < 2:
        return 0 * found.sum()
    kept = torch.ones_like(found) if hinge is None else (found < hinge * p.topk(2).values[:, 1]).to(p)
    return (-(found + EPSILON).log() * kept).sum() / kept.sum().clamp(min=1)


def edit_losses(
    logits: Tensor, labels: Tensor, n_first: int, before: Tensor, hinge: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hinge losses of two groups of tokens, and mean KL(before ‖ after) of further rows.

    Args:
        logits: (s + m, vocabulary) fp32 or fp64; the first s rows are scored. Overwritten.
        labels: (s,) int64.
        n_first: rows of the first group (edited prompts); the rest of the s are the second's (rephrasings).
        before: (m, vocabulary) log-probabilities without a prompt in front.
        hinge: see the module.

    Returns:
        The first group's Σ −log(p + ε) over kept tokens divided by their number (0 if there are none), the second's,
        and the KL (0 without rows). Differentiable once.
    """
    nll, p, second, kl = _EditLosses.apply(logits, labels, before)
    kept = torch.ones_like(p) if hinge is None else (p < hinge * second).to(p)
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
        ctx: Any, logits: Tensor, labels: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(labels)
        p_before = before.exp()
        kl = (p_before * (before - logits[n:].log_softmax(1))).sum(1)
        logits.sub_(logits.amax(1, keepdim=True))
        of_label = logits[:n].gather(1, labels[:, None])[:, 0].exp()
        second = logits[:n].topk(2).values[:, 1].exp()
        total = logits.exp_().sum(1)
        p, second = of_label / total[:n], second / total[:n]
        ctx.save_for_backward(labels, total, p, p_before)
        ctx.exponentials = logits
        ctx.mark_non_differentiable(p, second)
        return -(p + EPSILON).log(), p, second, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_nll: Tensor, _: Tensor, __: Tensor, of_kl: Tensor) -> tuple[Tensor, None, None]:
        labels, total, p, p_before = ctx.saved_tensors
        n = len(labels)
        # d nll = p / (p + ε) · (softmax − onehot(label)), d KL = softmax − before.
        weight = of_nll * p / (p + EPSILON)
        gradient = ctx.exponentials.div_(total[:, None])
        gradient[:n].mul_(weight[:, None]).scatter_add_(1, labels[:, None], -weight[:, None])
        gradient[n:].sub_(p_before).mul_(of_kl[:, None])
        return gradient, None, None
