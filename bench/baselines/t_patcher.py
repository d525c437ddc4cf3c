"""T-Patcher the way its published code works, to measure against and to compare results with.

Every step runs the whole network, clones the projection's weight to put the patches beside it, and puts one-row
memories together anew. Only what a layer and its weight are called comes from fastedit. The published code widens
both matrices of an MLP without a gate; to serve gated ones as well the keys' side is a product of its own here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastedit import Fact
from fastedit.memory.patches import mlp_activation
from fastedit.models import describe
from fastedit.models.tokens import encode_prompt, target_ids

COPIES = 8


@dataclass
class PlainTPatcher:
    """A model and its patches.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        layer: the block.
        settings: as of ``fastedit.editors.t_patcher.TPatcherParams``.
        memories: one-row tensors (1, d), to be left alone.
        held_out: the same, for validation.
        official: margins 0, labels smoothed, each example eight times.
        seed: of the values.
        steps: taken for each fact that was wrong.
        seconds: spent in ``forward``, ``backward`` and ``update`` of the training steps.
    """

    model: Any
    tokenizer: Any
    layer: int
    settings: Any
    memories: list[Tensor]
    held_out: list[Tensor]
    official: bool = False
    seed: int = 0
    steps: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        description = describe(self.model)
        self.mlp = description.mlp(self.layer)
        self.projection = description.projection(self.layer)
        self.activation = mlp_activation(self.model)
        d = description.hidden_size
        self.keys, self.bias, self.values = torch.empty(0, d), torch.empty(0), torch.empty(0, d)
        self.copies = COPIES if self.official else 1
        margins = (0.0, *self.settings.memory_margins)
        self.margins = (0.0, 0.0, 0.0) if self.official else (self.settings.activation_margin, *margins[1:])
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def patched(self, keys: Tensor, bias: Tensor, values: Tensor) -> Iterator[list[Tensor]]:
        """The model with these patches beside the finished ones; yields a list of the MLP's inputs."""
        queries: list[Tensor] = []
        module: Any = self.projection.module

        def remember(_module: Any, args: tuple[Tensor, ...]) -> None:
            queries.append(args[0].reshape(-1, args[0].shape[-1]))

        def wide(x: Tensor) -> Tensor:
            stored = module.weight.clone().detach()
            weight = stored.T if self.projection.transposed else stored
            weight = torch.cat((weight, self.values.T, values.T), 1)
            hidden = self.activation(
                F.linear(queries[-1], torch.cat((self.keys, keys)), torch.cat((self.bias, bias)))
            )
            x_wide = torch.cat((x.reshape(-1, x.shape[-1]), hidden), 1)
            return F.linear(x_wide, weight, getattr(module, "bias", None)).reshape(*x.shape[:-1], -1)

        handle = self.mlp.register_forward_pre_hook(remember)
        module.forward = wide
        try:
            yield queries
        finally:
            del module.forward
            handle.remove()

    def logits(self, ids: list[int]) -> Tensor:
        """(tokens, vocabulary) of the model with the finished patches."""
        d = self.keys.shape[1]
        with torch.no_grad(), self.patched(torch.empty(0, d), torch.empty(0), torch.empty(0, d)):
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def edit(self, fact: Fact) -> None:
        """Patch the wrong tokens of one fact."""
        s = self.settings
        prompt, target = encode_prompt(self.tokenizer, fact.text), target_ids(self.tokenizer, fact.target)
        ids = torch.tensor([[*prompt, *target[:-1]]])
        first, goal = len(prompt) - 1, torch.tensor(target)
        d = self.keys.shape[1]
        with torch.no_grad(), self.patched(torch.empty(0, d), torch.empty(0), torch.empty(0, d)) as seen:
            said = self.model(input_ids=ids, use_cache=False).logits[0, first:].argmax(-1)
            queries = seen[-1][first:].clone()
        wrong = (said != goal).nonzero().flatten()[: s.max_patches]
        if len(wrong):
            self._train(ids, first, goal, queries[wrong], wrong + first)
        self.memories += list(queries.split(1))
        self.held_out += list(queries.split(1))

    def _train(self, ids: Tensor, first: int, goal: Tensor, own: Tensor, places: Tensor) -> None:
        s = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.bias))
        keys = (own / own.norm(dim=1, keepdim=True) ** 2).requires_grad_()
        bias = torch.zeros(len(own)).requires_grad_()
        values = torch.randn(own.shape, generator=generator).requires_grad_()
        factors = torch.full(own.shape, s.amplify).requires_grad_()
        trained = [keys, bias, values, factors]
        optimiser = torch.optim.Adam(trained, lr=s.lr, weight_decay=s.weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=1, threshold=0.05
        )

        def run(memories: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, bool]:
            with self.patched(keys, bias, values * factors) as seen:
                logits = self.model(input_ids=ids, use_cache=False).logits[0, first:]
                a = (seen[-1][places] * keys).sum(1) + bias
            task = F.cross_entropy(logits, goal, label_smoothing=0.1 if self.official else 0.0)
            a_m = F.linear(torch.cat(memories), keys, bias)
            a, a_m = a.repeat(self.copies, 1), a_m[:, None].repeat(1, self.copies, 1)
            margin, m1, m2 = self.margins
            quiet = self._top(a_m - a + m1, s.memory_k) + self._top(a_m - m2, s.memory_k)
            return task, self._top(margin - a, s.activation_k), quiet, bool((logits.argmax(-1) == goal).all())

        unseen: list[float] = []
        for step in range(1, s.steps + 1):
            optimiser.zero_grad()
            with self.stage("forward"):
                task, active, quiet, _ = run(self.memories)
            with self.stage("backward"):
                (task + s.activation_weight * active + s.memory_weight * quiet).backward()
            with self.stage("update"):
                torch.nn.utils.clip_grad_norm_(trained, 5.0)
                optimiser.step()
            if step % s.check_every == 0:
                with torch.no_grad():
                    task, _, quiet, right = run(self.held_out)
                schedule.step(task)
                if step > s.check_from and right:
                    unseen.append(float(quiet))
                    if self._stalled(unseen):
                        break
        self.steps.append(step)
        self.keys = torch.cat((self.keys, keys.detach()))
        self.bias = torch.cat((self.bias, bias.detach()))
        self.values = torch.cat((self.values, (values * factors).detach()))

    @staticmethod
    def _top(values: Tensor, k: int) -> Tensor:
        flat = values.reshape(-1).exp()
        return flat.topk(min(k, len(flat))).values.mean()

    @staticmethod
    def _stalled(losses: list[float]) -> bool:
        best = 0
        for i, loss in enumerate(losses):
            best = i if loss < losses[best] - 1e-3 else best
        return best < len(losses) - 1
