"""Replacements for EasyEdit's GRACE: the look-up in its codebook, and the training of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import nearest_key
from ..patching import Context, NotCovered, Point
from .frozen_blocks import FrozenBlocks

_IGNORED = -100
_REPLACEMENTS = ("replace_all", "replace_last", "replace_prompt")
_EXACT = (torch.float32, torch.bfloat16, torch.float16)


def look_up(context: Context) -> Callable[..., Tensor]:
    """``GRACEAdapter.forward``: the nearest key by exact distances, of keys in their own dtype.

    The codebook grows by the original's rules and through its methods, with the same distances: a radius that was set
    to a distance covers the query that it was set for.
    """

    def forward(self: Any, *args: Any) -> Tensor:
        hidden, known = args[0], "keys" in self.__dict__
        if hidden.dtype not in _EXACT or (known and self.keys.dtype not in _EXACT):
            raise NotCovered(f"states or keys of {hidden.dtype}")
        if self.replacement not in _REPLACEMENTS or (
            self.replacement == "replace_prompt" and len(hidden) > 1
        ):
            raise NotCovered(f"replacement {self.replacement!r} of {len(hidden)} rows")
        out: Tensor = self.layer(*args)
        if not self.training and not known:
            return out
        last = hidden.shape[1] - 1
        if not self.training and self.key_id == -1:
            self.key_id = last
        place = min(self.key_id, last)
        query = hidden[:, place]
        value = _first_value(self, out[:, place])
        if not known or not self.keys.numel():
            _set_codebook(self, self.init_key_value(query, value))
        elif self.iter == 0:
            _adapt(self, query, value)
        index, distance = nearest_key(query, self.keys)
        self.chosen_key = index.clamp(min=0)
        covered = (distance <= self.epsilons[self.chosen_key].view(-1))[:, None]
        chosen = self.values[self.chosen_key].to(out.dtype)
        if self.config.val_train == "adv" and self.training:
            chosen = context.namespace["perturb_values"](chosen, self.num_pert, self.device)
        if self.replacement == "replace_all":
            return torch.where(covered[:, None], chosen[:, None], out)
        where = place if self.replacement == "replace_last" else slice(place)
        out[:, where] = torch.where(covered, chosen, out[:, where])
        return out

    return forward


def _first_value(adapter: Any, out: Tensor) -> Any:
    """What a new key's value starts from; drawn in every pass, so that random numbers are those of the original."""
    if adapter.config.val_init == "cold":
        return nn.Parameter(torch.rand(1, adapter.value_shape, requires_grad=True, device=adapter.device))
    return nn.Parameter(out.detach(), requires_grad=True)


def _set_codebook(adapter: Any, parts: tuple[Any, ...]) -> None:
    adapter.keys, adapter.values, adapter.epsilons, adapter.key_labels, adapter.edit_ids = parts


def _adapt(adapter: Any, query: Tensor, value: Any) -> None:
    """Make room for an edit (Hartvigsen et al. 2023, algorithm 1): a new key, a split, or a wider radius."""
    index, distance = nearest_key(query, adapter.keys)
    index = index.clamp(min=0)
    if distance > adapter.init_epsilon + adapter.epsilons[index]:
        _set_codebook(adapter, adapter.add_key(query, value, adapter.edit_id))
    elif not adapter.label_match(adapter.edit_label, adapter.key_labels[index]):
        _set_codebook(adapter, adapter.add_key(query, value, adapter.edit_id))
        adapter.split_epsilons_in_half(index, distance)
    elif distance > adapter.epsilons[index]:
        if adapter.config.eps_expand == "moving_average":
            adapter.keys[index] = 0.5 * adapter.keys[index] + 0.5 * query
        if adapter.config.eps_expand in ("coverage", "moving_average"):
            adapter.epsilons[index] = distance


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
    module = f"{models}.grace.GRACE"
    helpers = ("init_key_value", "add_key", "label_match", "split_epsilons_in_half")
    used = ("cdist_float32", "perturb_values", *(f"GRACEAdapter.{name}" for name in helpers))
    return [
        Point(f"{module}:GRACEAdapter.forward", look_up, used),
        Point(f"{module}:GRACE.edit", edit, ("GRACEAdapter.forward",)),
    ]
