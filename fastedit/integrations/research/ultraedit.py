"""UltraEdit: the solve for one turn's shifts, over the rows of its answer tokens instead of the layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import ridge_factors
from ..locate import covering
from ..patching import Context, NotCovered, Point


def predict_param_shifts(context: Context) -> Callable[..., Any]:
    """``ULTRAEDIT.predict_param_shifts``: by module name, Hᵀ(HHᵀ + I)⁻¹V, (d_in, d_out) float32.

    As published, the gradients of a last micro-batch that is not full are lost, and zeros stand in their place
    before they are normalised; ``fix=["ultra_floor_ceil"]`` uses them.
    """
    take_all = "ultra_floor_ceil" in context.fix

    def predict(self: Any) -> dict[str, Tensor]:
        config, space = self.config, context.namespace
        if config.editor.name != "ultraedit":
            raise NotCovered(f"editor {config.editor.name!r}")
        edits, size = config.dataset.n_edits, config.dataset.batch_size
        folder = (
            f"{config.editor.cache_dir}/{config.model.name}_{config.dataset.name}_{config.editor.name}"
            f"_{edits}_{config.num_seq}"
        )
        n_keys = math.ceil(edits / size)
        n_gradients = n_keys if take_all else math.ceil(edits // size)
        if n_gradients == 0:
            raise NotCovered("no micro-batch is full: the published code has no gradients")
        shifts = {}
        for number, name in enumerate(config.model.edit_modules):
            module = space["get_module"](self.model, name)
            d_in, d_out = space["get_shape"](module)
            normaliser = self.lifelong_normalizer[str((d_in, d_out))]

            def load(kind: str, count: int, number: int = number) -> Tensor:
                return torch.cat(
                    [torch.load(f"{folder}/{number}_{i}_{kind}.pth", weights_only=True) for i in range(count)]
                )

            keys, gradients = load("keys", n_keys), load("values_grad", n_gradients)
            with covering(), torch.no_grad():
                full = torch.zeros(len(keys), d_out, dtype=gradients.dtype, device=gradients.device)
                full[: len(gradients)] = gradients[: len(keys)]
                usual_keys, usual_gradients = normaliser(torch.cat((keys, full), -1)).split([d_in, d_out], -1)
                wanted = -config.editor.lr * usual_keys.square().sum(-1, keepdim=True) * usual_gradients
                left, right = ridge_factors(keys, wanted, 1.0)
                shift = (right @ left.T).to(keys.dtype)
            shifts[name] = shift.to(next(self.model.parameters()).device)
        return shifts

    return predict


def update_statistics(context: Context) -> Callable[..., Any]:
    """``RunningMeanStd.update`` with the correction that a batch's spread is not inflated, nor NaN for one row."""

    def update(self: Any, x: Tensor) -> None:
        n = self.n + x.shape[0]
        shift = x.mean(0) - self.mean
        self.mean += x.shape[0] * shift / n
        self.var += (x - x.mean(0)).square().sum(0) + self.n * x.shape[0] * shift.pow(2) / n
        self.std = (self.var / (n - 1 + torch.finfo(x.dtype).eps)).sqrt()
        self.n = n

    return update


POINTS = (
    Point(
        "editor.ultraedit:ULTRAEDIT.predict_param_shifts", predict_param_shifts, ("pad_tensor", "get_shape")
    ),
)
FIX_POINTS = (Point("nets:RunningMeanStd.update", update_statistics),)
