"""Replacement for EasyEdit's UltraEdit: the solve for one turn's shifts, over the rows of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import ridge_factors
from ..locate import covering
from ..patching import Context, Point


def predict_param_shifts(context: Context) -> Callable[..., Any]:
    """``ULTRAEDIT.predict_param_shifts``: by module name, Hᵀ(HHᵀ + I)⁻¹V (d_in, d_out)."""

    def predict(self: Any, module_kv_map: Any) -> dict[str, Tensor]:
        space, size, shifts = context.namespace, self.config.editor_batch_size, {}
        for number, name in enumerate(self.config.inner_params):
            shape = space["get_shape"](space["get_module"](self.model, name))
            normaliser = self.lifelong_normalizer[str(shape)]
            pairs = [module_kv_map[number][index] for index in range(len(module_kv_map[number]))]
            keys = torch.cat([pair["keys"] for pair in pairs])
            gradients = torch.cat([pair["values_grad"] for pair in pairs])
            wanted = []
            with covering(), torch.no_grad():
                for start in range(0, len(keys), size):
                    rows = torch.cat((keys[start : start + size], gradients[start : start + size]), -1)
                    rows = space["pad_tensor"](rows, size, 0)
                    usual_keys, usual_gradients = normaliser(rows).split([shape[0], shape[1]], -1)
                    wanted.append(
                        -self.config.lr * usual_keys.square().sum(-1, keepdim=True) * usual_gradients
                    )
                values = torch.cat(wanted)[: len(keys)]
                left, right = ridge_factors(keys, values, 1.0)
                shift = (right @ left.T).to(keys.dtype)
            shifts[name] = shift.to(next(self.model.parameters()).device)
        return shifts

    return predict


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    return [
        Point(
            f"{models}.ultraedit.ULTRAEDIT:ULTRAEDIT.predict_param_shifts",
            predict_param_shifts,
            ("pad_tensor", "get_shape"),
        )
    ]
