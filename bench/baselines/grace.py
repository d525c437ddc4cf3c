"""GRACE the way its published code works.

One request at a time and every step whole: prompt and answer through the whole model forward and backward, logits of
every token, distances to all keys anew, and an Adam over all values of which one is trained. Keys, values and radii
are stacked anew for every entry. Only what a layer and its weight are called comes from fastedit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.models import describe


@dataclass
class PublishedGrace:
    """A model, its tokenizer and the published hyper-parameters.

    Attributes:
        keys: (entries, d_in).
        values: (entries, d_out).
        radii: (entries,).
        labels: the entries' label rows; a new one is put in front, while its key is put behind.
        losses: of every edit (steps,).
    """

    model: Any
    tokenizer: Any
    hparams: dict[str, Any]
    losses: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        description = describe(self.model)
        (name,) = self.hparams["inner_params"]
        layers = {description.projection(i).weight_name: i for i in range(description.n_layers)}
        self.projection = description.projection(layers[name.replace("[", ".").replace("]", "")])
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        device = self.projection.weight.device
        self.keys = torch.empty(0, self.projection.d_in, device=device)
        self.values = torch.empty(0, self.projection.d_out, device=device)
        self.radii = torch.empty(0, device=device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    # -- one edit -------------------------------------------------------------------------------------------

    def edit(self, prompt: str, target: str) -> None:
        """Write one fact: the filled-in prompt, its answer with a leading space."""
        ids, labels = self.row(prompt, target)
        asks = int((labels == -100).sum()) - 1
        losses = []
        optimiser: torch.optim.Adam | None = None
        for step in range(self.hparams["n_iter"]):
            with self.stage("forward"), self.beside(asks, labels if step == 0 else None):
                logits = self.model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)
            losses.append(loss.detach().cpu())
            if optimiser is None:
                optimiser = torch.optim.Adam([self.values], lr=self.hparams["edit_lr"])
            with self.stage("backward"):
                optimiser.zero_grad()
                loss.backward()
            with self.stage("update"):
                optimiser.step()
        self.losses.append(torch.stack(losses))

    def row(self, prompt: str, target: str) -> tuple[Tensor, Tensor]:
        """The ids of prompt and answer (1, length), and as labels the same with −100 at the prompt's tokens."""
        ids = self.tokenizer(prompt + target, return_tensors="pt")["input_ids"].to(self.keys.device)
        labels = ids.clone()
        labels[:, : len(self.tokenizer(prompt)["input_ids"])] = -100
        return ids, labels

    @contextmanager
    def beside(self, asks: int, labels: Tensor | None) -> Iterator[None]:
        """The model with the codebook, which the token at ``asks`` asks; with ``labels`` it grows first."""

        def answer(_module: Any, args: Any, out: Tensor) -> Tensor:
            query = args[0].reshape(-1, self.keys.shape[1])[asks].detach()
            flat = out.reshape(-1, out.shape[-1])
            if labels is not None:
                self.grow(query, flat[asks].detach(), labels)
            distances = torch.cdist(self.keys, query[None])[:, 0]
            smallest, chosen = distances.min(0)
            covered = smallest <= self.radii[chosen]
            here = (torch.arange(len(flat), device=out.device) == asks)[:, None]
            return torch.where(here & covered, self.values[chosen], flat).reshape(out.shape)

        handle = self.projection.module.register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()

    # -- the codebook ---------------------------------------------------------------------------------------

    def grow(self, key: Tensor, value: Tensor, labels: Tensor) -> None:
        """Add an entry for a prompt, or split or widen the one that is nearest."""
        radius = self.hparams["eps"]
        if not len(self.keys):
            self.add(key, value, labels)
            return
        smallest, nearest = torch.cdist(self.keys, key[None])[:, 0].min(0)
        if smallest > radius + self.radii[nearest]:
            self.add(key, value, labels)
        elif labels.float().mean() != self.labels[nearest].float().mean():
            self.add(key, value, labels)
            self.radii[nearest] = smallest / 2 - 1e-5
            self.radii[-1] = smallest / 2
        elif smallest > self.radii[nearest]:
            self.radii[nearest] = smallest

    def add(self, key: Tensor, value: Tensor, labels: Tensor) -> None:
        """Stack an entry behind the others, its label in front."""
        self.keys = torch.vstack((self.keys, key[None]))
        self.values = nn.Parameter(torch.vstack((self.values.detach(), self.first(value)[None])))
        self.radii = torch.cat((self.radii, self.radii.new_tensor([self.hparams["eps"]])))
        self.labels = [labels, *self.labels]

    def first(self, value: Tensor) -> Tensor:
        """What a new value starts from."""
        return value if self.hparams["val_init"] == "warm" else torch.rand_like(value)
