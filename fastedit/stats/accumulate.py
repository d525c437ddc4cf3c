"""Sums of k kᵀ for several layers from one forward pass that stops where nothing more is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import NumericalError, UnsupportedModel
from ..models import describe


class _StopForward(Exception):
    """Ends a forward pass at the last layer of interest."""


class Accumulators:
    """Sums of k kᵀ over tokens, one float64 matrix per layer.

    The products of a batch are summed in float32 (float64 with ``dtype=torch.float64``) and then added to the
    layer's float64 sum, so the error does not grow with the number of tokens. Memory per layer: 8 d² bytes,
    beside the layer or on ``device``.

    Args:
        model: the model; its mode and hooks are as before after every call.
        layers: blocks, ascending.
        dtype: of the products.
        device: where the sums are kept; beside each layer if None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        description = describe(model)
        self.model = model
        self.layers = list(layers)
        self.projections = {layer: description.projection(layer) for layer in self.layers}
        self.sums: dict[int, torch.Tensor] = {}
        self._decoder = description.decoder
        self._embeddings = description.embeddings
        self._dtype = dtype
        self._device = device

    def add(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Add one batch: ``ids`` and ``attention_mask`` (B, T), int64, padded on the right.

        Raises:
            NumericalError: NaN or infinity among the keys of a real token; names the layer.
            UnsupportedModel: the forward pass did not come through a projection.
        """
        device = _input_device(self._embeddings)
        mask = None if bool(attention_mask.all()) else attention_mask.to(device, torch.bool)
        seen: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            stack.enter_context(torch.no_grad())
            for layer in self.layers:
                hook = self._hook(layer, mask, seen)
                stack.callback(self.projections[layer].module.register_forward_pre_hook(hook).remove)
            with contextlib.suppress(_StopForward):
                self._decoder(
                    input_ids=ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
                )
        if seen != self.layers:
            names = [self.projections[layer].name for layer in self.layers if layer not in seen]
            raise UnsupportedModel(f"the forward pass did not call {names or 'the layers in order'}")

    def load(self, layer: int, total: torch.Tensor) -> None:
        """Set the sum of one layer, as read from a checkpoint."""
        self.sums[layer] = total

    def _hook(
        self, layer: int, mask: torch.Tensor | None, seen: list[int]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._accumulate(layer, inputs[0], mask)
            seen.append(layer)
            if layer == self.layers[-1]:
                raise _StopForward

        return hook

    def _accumulate(self, layer: int, keys: torch.Tensor, mask: torch.Tensor | None) -> None:
        mask = None if mask is None else mask.to(keys.device)
        if self._dtype == torch.float64:
            keys = keys.double()
        total = self.sums.pop(layer, None)
        if total is None:
            total = torch.zeros(keys.shape[-1], keys.shape[-1], dtype=torch.float64)
        if self._device is None:
            total = total.to(keys.device)
            ops.covariance_(total, keys, mask)
        else:
            batch = torch.zeros(total.shape, dtype=self._dtype, device=keys.device)
            ops.covariance_(batch, keys, mask)
            total = total.to(self._device)
            total += batch.to(self._device)
        if not bool(torch.isfinite(total.diagonal()).all()):  # a bad key shows in its own square
            raise NumericalError(
                f"NaN or infinity in the keys of layer {layer} ({self.projections[layer].name}, "
                f"{keys.dtype}): no statistics were written. Load the model in float32 or bfloat16"
            )
        self.sums[layer] = total


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _input_device(embeddings: nn.Module) -> torch.device:
    """Where token ids go: beside the embeddings, or where a device map runs them if they are offloaded."""
    device = next(embeddings.parameters()).device
    if device.type != "meta":
        return device
    place = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if place is None else place)
