"""Training of RECIPE the way its published code works (Chen et al. 2024, arXiv 2405.03279).

A step runs the language model four times (edited prompts, rephrasings and unrelated prompts behind soft prompts, and
unrelated prompts as they are) with logits of every token, and the encoder five times (knowledge, sentinel, and three
sets of queries). Soft prompts are put in by a hook on the first block, and the columns that fall off at the right are
padding that was added for it. No mask is passed: rows are padded on the right. Networks and encoder are given, so
that both sides can begin with the same weights; dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.memory.encoder import TextEncoder
from fastedit.memory.recipe import RecipeNetworks
from fastedit.models import describe

EPSILON = 1e-8
Row = tuple[list[int], list[int]]  # ids of a prompt, ids of its answer


@dataclass(frozen=True)
class PublishedBatch:
    """What a step is given.

    Attributes:
        knowledge: facts as text.
        first: queries that are to find their own fact.
        second: queries that are to find the sentinel among the other facts.
        unrelated: queries that are to find the sentinel among all facts.
        reliability: edited prompts with their answers.
        generality: rephrasings with their answers.
        locality: unrelated prompts with their answers.
    """

    knowledge: list[str]
    first: list[str]
    second: list[str]
    unrelated: list[str]
    reliability: list[Row]
    generality: list[Row]
    locality: list[Row]


@dataclass
class PublishedRecipe:
    """A frozen language model, and what is trained.

    Attributes:
        model: gradients flow through it, its weights have none.
        encoder: reads texts.
        networks: towers, generator and sentinel.
        lr: of Adam, for everything.
        hinge: of all losses that have one.
        train_encoder: whether the encoder is trained as well, as published.
    """

    model: Any
    encoder: TextEncoder
    networks: RecipeNetworks
    lr: float
    hinge: float = 1.2
    train_encoder: bool = True

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.encoder.module.requires_grad_(self.train_encoder)
        parameters = [*self.networks.parameters()]
        if self.train_encoder:
            parameters += self.encoder.module.parameters()
        self.optimiser = torch.optim.Adam(parameters, lr=self.lr)
        self.block: nn.Module = describe(self.model).blocks[0]

    def step(self, batch: PublishedBatch) -> dict[str, float]:
        """Losses, their gradient, Adam."""
        losses = self.losses(batch)
        self.optimiser.zero_grad()
        losses["loss"].backward()
        self.optimiser.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def losses(self, batch: PublishedBatch) -> dict[str, Tensor]:
        """``reliability``, ``generality``, ``locality``, ``contrastive`` and ``loss``, their sum."""
        keys = self.networks.keys(self.encoder.statistics(batch.knowledge))
        prompts = self.networks.prompts(keys)
        with torch.no_grad():
            before = self.logits(batch.locality, None)
        parts = {
            "reliability": self.hinge_loss(batch.reliability, prompts),
            "generality": self.hinge_loss(batch.generality, prompts),
            "locality": self.divergence(batch.locality, prompts, before),
            "contrastive": self.contrastive(batch, keys),
        }
        return {**parts, "loss": sum(parts.values(), torch.zeros(()))}

    # -- contrastive losses -------------------------------------------------------------------------

    def contrastive(self, batch: PublishedBatch, keys: Tensor) -> Tensor:
        """The neighbour-oriented term and both sentinel-oriented ones."""
        sentinel = self.networks.sentinel_key(self.encoder)
        candidates = torch.cat((keys, sentinel))

        def probabilities(texts: Sequence[str], own: bool) -> Tensor:
            queries = self.networks.queries(self.encoder.statistics(texts))
            scores = queries @ candidates.T / math.sqrt(keys.shape[1])
            if not own:  # the slot of a query's own key is overwritten by the sentinel's score
                scores = scores.clone()
                rows = torch.arange(len(texts))
                scores[rows, rows] = scores[:, -1]
                scores = scores[:, :-1]
            return scores.softmax(1)

        found = probabilities(batch.first, own=True)
        neighbour = -(found.diagonal() + EPSILON).log().mean()
        others = probabilities(batch.second, own=False)
        inside = self.kept(others.diagonal(), others)
        all_keys = probabilities(batch.unrelated, own=True)
        return neighbour + inside + self.kept(all_keys[:, -1], all_keys)

    def kept(self, wanted: Tensor, rows: Tensor) -> Tensor:
        """Mean −log p over the rows that are not won."""
        second = rows.topk(2).values[:, 1]
        keep = (wanted < self.hinge * second).float()
        return (-(wanted + EPSILON).log() * keep).sum() / keep.sum().clamp(min=1)

    # -- losses of the language model ---------------------------------------------------------------

    def hinge_loss(self, rows: Sequence[Row], prompts: Tensor) -> Tensor:
        """Σ −log p over the answers' tokens that are not won, divided by their number."""
        labels, mask = self.labels(rows)
        p = self.logits(rows, prompts).softmax(-1)
        wanted = p.gather(2, labels[..., None])[..., 0]
        second = p.topk(2, dim=-1).values[..., 1]
        keep = (wanted < self.hinge * second).float() * mask
        return (-(wanted + EPSILON).log() * keep).sum() / keep.sum().clamp(min=1)

    def divergence(self, rows: Sequence[Row], prompts: Tensor, before: Tensor) -> Tensor:
        """Mean KL(before ‖ after) over the answers' tokens."""
        _, mask = self.labels(rows)
        after = self.logits(rows, prompts).log_softmax(-1)
        p = before.softmax(-1)
        kl = (p * (before.log_softmax(-1) - after)).sum(-1)
        return (kl * mask).sum() / mask.sum()

    def labels(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Next tokens (B, T) int64, and (B, T) 1 where they are of the answer."""
        width = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        labels, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        for number, (prompt, answer) in enumerate(rows):
            whole = [*prompt, *answer]
            labels[number, : len(whole) - 1] = torch.tensor(whole[1:])
            mask[number, len(prompt) - 1 : len(whole) - 1] = 1
        device = next(self.model.parameters()).device
        return labels.to(device), mask.to(device)

    def logits(self, rows: Sequence[Row], prompts: Tensor | None) -> Tensor:
        """(B, T, vocabulary) at every token, with prompts (B, n, D) in front or without."""
        n = 0 if prompts is None else prompts.shape[1]
        width = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        ids = torch.zeros(len(rows), width + n, dtype=torch.long)
        for number, (prompt, answer) in enumerate(rows):
            whole = [*prompt, *answer[:-1]]
            ids[number, : len(whole)] = torch.tensor(whole)
        ids = ids.to(next(self.model.parameters()).device)
        if prompts is None:
            return self.model(input_ids=ids).logits

        def put_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            states = torch.cat((prompts.to(states), states[:, :-n]), 1)
            return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})

        handle = self.block.register_forward_pre_hook(put_in, with_kwargs=True)
        try:
            logits: Tensor = self.model(input_ids=ids).logits[:, n:]
        finally:
            handle.remove()
        return logits
