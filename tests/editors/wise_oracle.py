"""WISE step by step on the whole model: one row at a time without padding, dense masks, torch's own SGD.

Slow and plain on purpose: it is what the cached formulation is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from fastedit import Fact
from fastedit.models import describe
from fastedit.models.tokens import encode_prompt, target_ids


@dataclass
class Settings:
    """Of :class:`fastedit.editors.wise.WiseParams`, by the same names."""

    lr: float
    steps: int
    alpha: float
    beta: float
    gamma: float
    clamp: float | None = None
    weight_decay: float = 1e-5
    whole_text: bool = False


class Oracle:
    """One side memory of one model, in the clean profile.

    Attributes:
        side: (d_out, d_in), trained in place by :meth:`train`.
    """

    def __init__(self, model: Any, tokenizer: Any, layer: int, contexts: Sequence[str], linear: bool = False):
        self.model, self.tokenizer, self.contexts = model, tokenizer, contexts
        self.projection = describe(model).projection(layer)
        stored = self.projection.weight.detach()
        self.base = (stored.T if self.projection.transposed else stored).clone()
        self.side = self.base.clone()
        config = model.config
        names = ("hidden_activation", "hidden_act", "activation_function")
        name = next(value for key in names if (value := getattr(config, key, None)))
        self.activation = (lambda y: y) if linear else ACT2FN[name]

    def run(self, ids: list[int], side: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (length, vocabulary) through a side memory, and the score of every token (length,)."""
        bias = getattr(self.projection.module, "bias", None)
        seen: list[Tensor] = []

        def replace(_module: Any, args: Any, out: Tensor) -> Tensor:
            new = F.linear(args[0], side, bias)
            old = F.linear(args[0], self.base, bias)
            seen.append(torch.norm(self.activation(old) - self.activation(new), dim=-1).reshape(-1))
            return new.reshape(out.shape)

        handle = self.projection.module.register_forward_hook(replace)
        try:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        return logits, seen[0]

    def rows(self, fact: Fact) -> list[tuple[list[int], int]]:
        """Ids of every edit row, and how many of them are the prompt's."""
        target = target_ids(self.tokenizer, fact.target)
        prompts = [encode_prompt(self.tokenizer, c.replace("{}", fact.text)) for c in self.contexts]
        return [(prompt + target, len(prompt)) for prompt in prompts]

    def objective(
        self, fact: Fact, side: Tensor, settings: Settings, spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the answer, loss of the routing, mean score; ``spans``: the subject's tokens in every row."""
        answers, inside, outside, means = [], [], [], []
        for number, (ids, start) in enumerate(self.rows(fact)):
            logits, scores = self.run(ids, side)
            start = 1 if settings.whole_text else start
            answers.append(F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])))
            means.append(scores.mean())
            if spans:
                a, b = spans[number]
                inside.append(scores[a:b].mean())
                outside.append(torch.cat((scores[:a], scores[b:])).mean())
        if not spans:
            inside = means
            assert fact.locality is not None
            outside = [self.run(encode_prompt(self.tokenizer, fact.locality), side)[1].mean()]
        pairs = [o - e + settings.gamma for o in outside for e in inside]
        routing = (
            mean_of_positive(pairs)
            + mean_of_positive([o - settings.alpha for o in outside])
            + mean_of_positive([settings.beta - e for e in inside])
        )
        return torch.stack(answers).mean(), routing, torch.stack(means).mean()

    def train(
        self, facts: Sequence[Fact], mask: Tensor, settings: Settings, replay: Any = None, **how: Any
    ) -> tuple[Tensor, float]:
        """(steps, 3) losses, and the lowest mean score before the last step; all facts in every step."""
        side = self.side.clone().requires_grad_()
        optimiser = torch.optim.SGD([side], lr=settings.lr, weight_decay=0.0)
        losses = []
        for step in range(settings.steps):
            parts = [self.objective(fact, side, settings, **how) for fact in facts]
            answer, routing = (torch.stack([part[i] for part in parts]).mean() for i in range(2))
            total = answer + routing + (0 if replay is None else replay(self, side, step))
            losses.append(torch.stack((total, answer, routing)).detach().double())
            score = min(float(part[2].detach()) for part in parts)
            optimiser.zero_grad()
            total.backward()
            assert side.grad is not None
            with torch.no_grad():
                side.grad.add_(side, alpha=settings.weight_decay).mul_(mask)
                optimiser.step()
                if settings.clamp is not None:
                    side.copy_(torch.clamp(side, self.base - settings.clamp, self.base + settings.clamp))
        self.side = side.detach()
        return torch.stack(losses), score


def mean_of_positive(values: Sequence[Tensor]) -> Tensor:
    """Of those above zero; 0 if none is."""
    positive = [value for value in values if float(value.detach()) > 0]
    return torch.stack(positive).mean() if positive else torch.zeros(())
