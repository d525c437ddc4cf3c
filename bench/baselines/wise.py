"""WISE the way its published code works.

One request at a time and every step whole: all rows through the whole model, logits of every token, a dense gradient
times a stored 64-bit mask, SGD with weight decay over the whole matrix, a clamp between two bounds, and TIES by
sorting. Only what a layer and its weight are called comes from fastedit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from fastedit.models import describe
from fastedit.models.describe import text_config


@dataclass
class PublishedWise:
    """A model, its tokenizer, the published hyper-parameters, and one 0/1 mask a side memory.

    Attributes:
        losses: of every edit (steps, 3): total, of the answer, of the routing.
        sides: finished side memories minus the original weight.
        merges: merged memories minus the original weight.
        threshold: the lowest score of an edit so far.
    """

    model: Any
    tokenizer: Any
    hparams: dict[str, Any]
    contexts: Sequence[str]
    masks: Sequence[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    sides: list[Tensor] = field(default_factory=list)
    merges: list[Tensor] = field(default_factory=list)
    threshold: float = 1e9
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.description = describe(self.model)
        (name,) = self.hparams["inner_params"]
        layers = {self.description.projection(i).weight_name: i for i in range(self.description.n_layers)}
        self.projection = self.description.projection(int(layers[name.replace("[", ".").replace("]", "")]))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.tokenizer.padding_side = "left"
        stored = self.projection.weight.data
        self.original = (stored.T if self.projection.transposed else stored).clone().contiguous()
        self.side, self.merged = self.original.clone(), self.original.clone()
        self.memories: list[Tensor] = []
        self.count = 0
        config = text_config(self.model)
        name = getattr(config, "hidden_act", None) or config.activation_function
        self.activation = ACT2FN[name]
        self.mask = torch.empty(0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    # -- one edit -------------------------------------------------------------------------------------------

    def edit(self, prompt: str, target: str, irrelevant: str) -> None:
        """Write one fact: the filled-in prompt, its answer with a leading space, an unrelated text."""
        if self.count % self.hparams["save_freq"] == 0:
            self.mask = self.masks[len(self.sides)].to(torch.int64).reshape(self.original.shape)
        tokens, labels = self.rows(prompt, target, irrelevant)
        side = self.side.requires_grad_()
        optimiser = torch.optim.SGD([side], lr=self.hparams["edit_lr"], weight_decay=1e-5)
        history: list[float] = [0.0, 1e9]
        losses = []
        steps = self.hparams["n_iter"]
        for step in range(steps):
            with self.stage("forward"):
                answer, routing, score = self.objective(tokens, labels, side)
            if abs(history[-1] - history[-2]) <= 1e-4 and history[-1] <= 0.02:
                self.threshold = min(self.threshold, score)
                break
            if step == steps - 1:
                self.threshold = min(self.threshold, score)
            loss = answer + routing
            losses.append(torch.stack((loss, answer, routing)).detach().double())
            history.append(float(loss.detach()))
            with self.stage("backward"):
                optimiser.zero_grad()
                loss.backward()
            with self.stage("update"):
                assert side.grad is not None
                side.grad *= self.mask
                optimiser.step()
                bound = self.hparams["norm_constraint"]
                with torch.no_grad():
                    side[:] = torch.clamp(side, min=self.original - bound, max=self.original + bound)
        self.losses.append(torch.stack(losses))
        self.side = side.detach()
        self.count += 1
        if self.count % self.hparams["save_freq"] == 0:
            self.memories.append(self.side.clone())
            self.sides.append(self.side - self.original)
            self.side = self.original.clone()
        if self.count % self.hparams["merge_freq"] == 0:
            with self.stage("merge"):
                self.merge()

    def rows(self, prompt: str, target: str, irrelevant: str) -> tuple[dict[str, Tensor], Tensor]:
        """The padded rows, the irrelevant one last, and the labels of the others' answers."""
        prompts = [context.replace("{}", prompt) for context in self.contexts]
        tokens = self.tokenizer(
            [text + target for text in prompts] + [irrelevant], return_tensors="pt", padding=True
        )
        width = self.tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"].shape[1]
        labels = tokens["input_ids"].clone()
        labels[:, :width] = -100
        labels[tokens["input_ids"] == self.tokenizer.pad_token_id] = -100
        device = self.original.device
        return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}, labels.to(device)

    def objective(
        self, tokens: dict[str, Tensor], labels: Tensor, side: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Loss of the answer, loss of the routing, and the edit rows' mean score."""
        outputs: list[Tensor] = []

        def replace(_module: Any, args: Any, out: Tensor) -> Tensor:
            bias = getattr(self.projection.module, "bias", None)
            new = F.linear(args[0], side, bias)
            outputs.extend((F.linear(args[0], self.original, bias), new))
            return new

        handle = self.projection.module.register_forward_hook(replace)
        try:
            logits = self.model(**tokens, use_cache=False).logits
        finally:
            handle.remove()
        shift = labels[:-1, 1:]
        flat = logits[:-1, :-1].reshape(-1, logits.shape[-1])
        nll = F.cross_entropy(flat, shift.reshape(-1), reduction="none", ignore_index=-100).view(shift.shape)
        first = (labels[:-1] == -100).sum(1) - 2
        counted = (torch.arange(shift.shape[1], device=shift.device) >= first[:, None]).float()
        answer = ((nll * counted).sum(1) / counted.sum(1)).mean()
        base, new = outputs
        score = torch.norm(self.activation(base) - self.activation(new), dim=-1).mean(1)
        inside, outside = score[:-1], score[-1:]
        routing = (
            _positive_mean(outside.view(-1, 1) - inside + self.hparams["gamma"])
            + _positive_mean(outside - self.hparams["alpha"])
            + _positive_mean(self.hparams["beta"] - inside)
        )
        return answer, routing, float(inside.detach().mean())

    # -- merging --------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """TIES of the finished memories, later of them and what was merged before."""
        tensors, share = list(self.memories), self.hparams["weights"]
        weights = [share / len(tensors)] * len(tensors)
        if self.merges:
            weights = [0.4 / len(tensors)] * len(tensors) + [0.6]
            tensors.append(self.merged)
        self.merged = ties_by_sort(self.original, tensors, weights, self.hparams["densities"])
        self.merges.append(self.merged - self.original)
        self.memories, self.side = [], self.original.clone()


def ties_by_sort(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim by a sorted top-k, elect signs, mean of those that agree; whole temporaries throughout."""
    deltas = []
    for tensor in tensors:
        delta = (tensor - base).view(-1)
        mask = torch.zeros_like(delta)
        mask[torch.topk(delta.abs(), int(density * delta.numel()), largest=True).indices] = 1
        deltas.append((delta * mask).view(base.shape))
    stacked = torch.stack(deltas)
    factors = torch.tensor(weights, device=base.device).view(-1, *[1] * base.dim())
    weighted = stacked * factors
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = (weighted.sign() == sign).to(base.dtype)
    divisor = (factors * agrees).sum(0)
    divisor[divisor == 0] = 1.0
    return base + (weighted * agrees).sum(0) / divisor


def _positive_mean(values: Tensor) -> Tensor:
    positive = values[values > 0]
    return positive.mean() if len(positive) else values.sum() * 0.0
