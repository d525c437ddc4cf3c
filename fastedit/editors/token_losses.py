"""Losses of scored tokens without spare copies of the logits: vocabularies are large, and each copy is a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_losses(logits: Tensor, token: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of tokens, and KL(p ‖ reference) at the rows that are not scored.

    Args:
        logits: (s + n, vocabulary) fp32; the first s rows are scored. Overwritten, so they must be nobody else's:
            the output of a linear head, scaled or capped or not, is what autograd does not keep.
        token: (s,) int64.
        reference: (n, vocabulary) fp32, log-probabilities to compare the other rows with; None compares them with
            themselves, so that the KL is zero.

    Returns:
        (s,) the losses, (n,) the KL, and (n, vocabulary) the other rows' log-probabilities, which are not
        differentiable. Differentiable once.
    """
    return _TokenLosses.apply(logits, token, reference)


def token_nll(logits: Tensor, token: Tensor) -> Tensor:
    """(s,) -log p of ``token`` (s,) under ``logits`` (s, vocabulary) fp32, which are overwritten as above."""
    return _TokenLosses.apply(logits, token, None)[0]


class _TokenLosses(torch.autograd.Function):
    """-log p of tokens, and KL(p ‖ reference), in one buffer.

    ``logits`` is overwritten, first by the probabilities, then by its own gradient.

    The first rows of ``logits`` (rows, vocabulary) fp32 are scored at ``token``; the others are compared with
    ``reference``, log-probabilities of the same rows (None: with themselves, so that the KL is zero). Differentiable
    once. A vocabulary is large: log_softmax, gather and kl_div would allocate and fill it four times.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(token)
        log_p = logits[n:].log_softmax(1)
        logits.sub_(logits.amax(1, keepdim=True))
        of_token = logits[:n].gather(1, token[:, None])[:, 0]
        total = logits.exp_().sum(1)
        nll = total[:n].log() - of_token
        excess = torch.zeros_like(log_p) if reference is None else log_p - reference
        kl = (log_p.exp() * excess).sum(1)
        ctx.save_for_backward(token, total, excess, kl)
        ctx.exponentials = logits
        ctx.mark_non_differentiable(log_p)
        return nll, kl, log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_nll: Tensor, of_kl: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        token, total, excess, kl = ctx.saved_tensors
        n = len(token)
        # With p = exponentials / total: d nll = p - onehot(token), d KL = p (log p - reference - KL).
        gradient = ctx.exponentials.mul_((torch.cat((of_nll, of_kl)) / total)[:, None])
        gradient[:n].scatter_add_(1, token[:, None], -of_nll[:, None])
        gradient[n:].mul_(excess - kl[:, None])
        return gradient, None, None
