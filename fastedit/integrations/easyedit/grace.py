"""Replacement for EasyEdit's GRACE: the training of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..patching import Context, NotCovered, Point
from .frozen_blocks import FrozenBlocks

_IGNORED = -100


def edit(context: Context) -> Callable[..., None]:
    """``GRACE.edit``: a step takes the blocks from the adapter's own on, and the head where a label is."""

    def train(self: Any, config: Any, tokens: Any, edit_id: Any) -> None:
        adapter = self.model.get_submodule(self.layer.replace("[", ".").replace("]", ""))
        if config.n_iter < 1:
            raise NotCovered("n_iter is not positive")
        fixed = FrozenBlocks(self.model, adapter, tokens)
        labels = tokens["labels"]
        row, column = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
        if not len(row):
            raise NotCovered("there is no label")
        places, wanted, run = row * labels.shape[1] + column, labels[row, column + 1], fixed.above()
        adapter.key_id = (labels == _IGNORED).sum() - 1
        adapter.training, adapter.edit_label, adapter.edit_id = True, labels, edit_id
        self.losses = []
        optimizer: Any = None
        for step in range(config.n_iter):
            adapter.iter = step
            with torch.enable_grad():
                logits = fixed.runner.logits(run()[places.to(fixed.hidden.device)]).float()
                loss = F.cross_entropy(logits, wanted.to(logits.device))
            if optimizer is None:  # the first pass has made the value
                optimizer = torch.optim.Adam([adapter.values], config.edit_lr)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.detach().cpu().numpy())
        self.loss = loss
        adapter.training = False
        self.log_dict["chosen_key"] = adapter.chosen_key
        self.log_dict["nkeys"] = len(adapter.keys)

    return train


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    return [Point(f"{models}.grace.GRACE:GRACE.edit", edit, ("GRACEAdapter.forward",))]
