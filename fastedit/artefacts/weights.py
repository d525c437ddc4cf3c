"""Finding the weights that an edit names in a live model, and writing them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, UnsupportedModel
from .render import EDITABLE

Place = Literal["cpu", "model"]


@dataclass(frozen=True, eq=False)
class Located:
    """A weight of a model.

    Attributes:
        name: the name asked for, as in the model's checkpoint.
        parameter_name: its first name in ``model.named_parameters()``; tied weights share it.
        aliases: all names of the parameter, ``parameter_name`` first.
        parameter: the parameter; writing into it changes the model.
        transposed: it is stored (d_in, d_out).
    """

    name: str
    parameter_name: str
    aliases: tuple[str, ...]
    parameter: nn.Parameter
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), however it is stored."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)


def locate(model: nn.Module, name: str) -> Located:
    """Find a weight by its checkpoint name in an unwrapped model.

    Raises:
        BaseMismatch: the model has no such weight.
        UnsupportedModel: it cannot be edited in place (quantised, offloaded, not a matrix).
    """
    module, parameter = _find(model, name)
    if not isinstance(parameter, nn.Parameter) or parameter.dtype not in EDITABLE:
        came = getattr(parameter, "dtype", type(parameter).__name__)
        raise UnsupportedModel(
            f"{name} must be a plain float64, float32, bfloat16 or float16 parameter to be edited, "
            f"got {came}: "
            "load the model without quantisation"
        )
    if parameter.is_meta:
        raise UnsupportedModel(
            f"{name} has no data here (meta device or offloaded): load the model with a device_map "
            "that keeps "
            "the edited blocks on a device, or edit its directory with `fastedit apply`"
        )
    if parameter.dim() != 2:
        raise UnsupportedModel(f"{name} must be a matrix to be edited, got shape {tuple(parameter.shape)}")
    aliases = tuple(n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter)
    return Located(name, aliases[0], aliases, parameter, stored_transposed(module))


def stored_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight (d_in, d_out); by its type, since shapes cannot tell."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _find(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    owner, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = None
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):  # wrapped by an adapter
        module = inner
    if module is None or not hasattr(module, attribute):
        like = [n for n, _ in model.named_parameters() if n.endswith(f".{'.'.join(name.split('.')[-3:])}")]
        raise BaseMismatch(
            f"the edit changes {name}, which this {type(model).__name__} does not have"
            + (f" (it has {like[0]})" if like else "")
            + ": apply the edit to the model it was made on"
        )
    return module, getattr(module, attribute)


@torch.no_grad()
def write(parameter: nn.Parameter, values: Tensor) -> None:
    """Copy values into a parameter in place: its address, ties and ``requires_grad`` stay."""
    parameter.copy_(values)


def copy_of(place: Located, where: Place) -> Tensor:
    """An exact copy of a weight, contiguous, on the CPU or beside the weight."""
    parameter = place.parameter.detach()
    copy = torch.empty(
        parameter.shape, dtype=parameter.dtype, device="cpu" if where == "cpu" else parameter.device
    )
    return copy.copy_(parameter)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done, so that weights are never left half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    former = signal.getsignal(signal.SIGINT)
    if former is None:  # set by other than Python code: leave it
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if pending and callable(former):
            former(*pending[0])
