"""Patches of T-Patcher: neurons beside an MLP, and the losses that keep them quiet elsewhere (Huang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..models.describe import text_config

Activation = Callable[[Tensor], Tensor]

_FIRST_ROOM = 64  # rows that a buffer begins with
_CONFIG_KEYS = ("hidden_activation", "hidden_act", "activation_function", "activation")


class Patches:
    """Neurons beside an MLP: y(q) = Σ_i act(k_i · q + b_i) v_i, fp32, in arrays of doubling capacity.

    Args:
        d: width of the residual stream, of queries and of outputs.
    """

    def __init__(self, d: int) -> None:
        self._keys, self._bias, self._values = torch.empty(0, d), torch.empty(0), torch.empty(0, d)
        self.owners: list[str] = []

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def keys(self) -> Tensor:
        """(n, d)."""
        return self._keys[: len(self)]

    @property
    def bias(self) -> Tensor:
        """(n,)."""
        return self._bias[: len(self)]

    @property
    def values(self) -> Tensor:
        """(n, d), a row for each patch: what it adds to the MLP's output for each unit of its activation."""
        return self._values[: len(self)]

    @property
    def n_bytes(self) -> int:
        """Bytes held, room to grow included."""
        return self._keys.nbytes + self._bias.nbytes + self._values.nbytes

    def to(self, device: torch.device) -> None:
        """Move to a device; does nothing if it is there."""
        if self._keys.device != device:
            self._keys, self._bias, self._values = (
                t.to(device) for t in (self._keys, self._bias, self._values)
            )

    def append(self, keys: Tensor, bias: Tensor, values: Tensor, owner: str) -> None:
        """Add patches: keys (m, d), bias (m,), values (m, d)."""
        n, m = len(self), len(bias)
        if n + m > len(self._bias):
            room = max(_FIRST_ROOM, 2 * len(self._bias), n + m)
            self._keys, self._bias, self._values = (
                torch.cat((t[:n], t.new_empty(room - n, *t.shape[1:])))
                for t in (self._keys, self._bias, self._values)
            )
        for buffer, new in ((self._keys, keys), (self._bias, bias), (self._values, values)):
            buffer[n : n + m] = new.to(buffer)
        self.owners += [owner] * m

    def remove(self, owner: str) -> None:
        """Take off the patches of an edit; the later ones move up."""
        kept = [i for i, other in enumerate(self.owners) if other != owner]
        for buffer in (self._keys, self._bias, self._values):
            buffer[: len(kept)] = buffer[kept]
        self.owners = [self.owners[i] for i in kept]

    def activations(self, queries: Tensor) -> Tensor:
        """What the nonlinearity is given, (..., n) fp32, of queries (..., d)."""
        self.to(queries.device)
        return nn.functional.linear(queries.float(), self.keys, self.bias)

    def added_to(self, outputs: Tensor, queries: Tensor, activation: Activation) -> Tensor:
        """The MLP's outputs (..., d) with what the patches add; a token that none answers keeps its bits.

        Args:
            outputs: of the MLP alone, any floating dtype.
            queries: (..., d), what the MLP was given.
            activation: the MLP's own nonlinearity.
        """
        hidden = activation(self.activations(queries))
        new = (outputs + hidden @ self.values).to(outputs.dtype)
        return torch.where((hidden != 0).any(-1, keepdim=True), new, outputs)


def mlp_activation(model: nn.Module) -> Activation:
    """The nonlinearity of a model's MLP.

    Raises:
        UnsupportedModel: the config names none.
    """
    from transformers.activations import ACT2FN

    config: Any = text_config(model)
    name = next((value for key in _CONFIG_KEYS if isinstance(value := getattr(config, key, None), str)), None)
    if name not in ACT2FN:
        raise UnsupportedModel(
            f"the nonlinearity of this {config.model_type} model's MLP is not known: its config has "
            f"{name!r} for {', '.join(_CONFIG_KEYS)}"
        )
    function: Activation = ACT2FN[name]
    return function


def top_mean_exp(values: Tensor, k: int, copies: int = 1) -> Tensor:
    """Mean of exp over the k largest of values (any shape), each of which counts ``copies`` times.

    Fewer than k (counted with copies) are all taken; without any the mean is 0.
    """
    count = min(k, values.numel() * copies)
    if count == 0:
        return values.new_zeros(())
    whole, rest = divmod(count, copies)
    top = values.flatten().topk(whole + (rest > 0)).values.exp()
    return (copies * top[:whole].sum() + rest * top[whole:].sum()) / count


def loudest(memories: Tensor, keys: Tensor, bias: Tensor, k: int) -> Tensor:
    """Each patch's k highest activations on remembered queries; no other can be among the k highest of all.

    Only these are differentiated, so that the backward pass reads k rows for each patch and not the whole memory.

    Args:
        memories: (m, d).
        keys: (n, d).
        bias: (n,).
        k: how many; all if there are fewer.

    Returns:
        (min(k, m), n).
    """
    with torch.no_grad():
        rows = (keys @ memories.T).topk(min(k, len(memories))).indices.T
    return torch.einsum("knd,nd->kn", memories[rows], keys) + bias


def activation_loss(own: Tensor, margin: float, k: int, copies: int = 1) -> Tensor:
    """l_a: the mean of the k largest exp(margin − a), of patches' activations (n,) at their own tokens."""
    return top_mean_exp(margin - own, k, copies)


def memory_loss(
    remembered: Tensor, own: Tensor, margins: tuple[float, float], k: int, copies: int = 1
) -> Tensor:
    """l_m1 + l_m2: means of the k largest exp(a_m − a + m1) and exp(a_m − m2).

    Args:
        remembered: (memory, n), a_m, the patches' activations on queries that they shall leave alone; the k highest
            of each patch will do.
        own: (n,), a, those at their own tokens.
        margins: m1 and m2.
        k: how many count.
        copies: how often each counts.
    """
    above = top_mean_exp(remembered - own + margins[0], k, copies)
    return above + top_mean_exp(remembered - margins[1], k, copies)
