"""GRACE's codebook: keys with a radius and a value each, and the rules by which it grows (Hartvigsen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import nearest_key

Expand = Literal["coverage", "moving_average"]
Label = tuple[int, ...]

_SAME = (
    1e-4  # keys nearer than this, relative to their norm, are of one prompt; two units of the dtype if larger
)
_SPLIT = 1e-5  # how much less than half the distance the older of two conflicting keys keeps


class Placement(NamedTuple):
    """What became of a fact.

    Attributes:
        action: ``"add"``, ``"split"`` (added beside a key with another answer, whose radius shrank), ``"expand"``,
            ``"overwrite"`` or ``"keep"``.
        row: the entry that answers the fact's own prompt, whose value is to be trained; None if none does.
        added: the entry that was added, if one was.
    """

    action: str
    row: int | None
    added: int | None


@dataclass(frozen=True)
class Rules:
    """How a codebook grows.

    Attributes:
        radius: of a new key.
        expand: what happens to a key whose answer a farther prompt shares: ``"coverage"`` its radius reaches that
            prompt; ``"moving_average"`` the key also moves half the way to it.
        official: labels are equal if the means of the published label tensors are (with their −100 for each prompt
            token), and a key is compared with the label at the mirrored place, since labels are
            put in front and keys behind; a prompt that is there already conflicts with itself. Else labels are
            compared as they are, and another answer for the same prompt overwrites the former.
    """

    radius: float
    expand: Expand = "coverage"
    official: bool = False


class Codebook:
    """Keys (n, d_in), values (n, d_out) and radii (n,), fp32, in arrays of doubling capacity.

    Every change is noted, so that :meth:`rollback` restores an earlier state bit for bit.

    Args:
        d_in: width of keys.
        d_out: width of values.
        rules: how it grows.
    """

    def __init__(self, d_in: int, d_out: int, rules: Rules) -> None:
        self.rules = rules
        self._keys, self._values, self._radii = torch.empty(0, d_in), torch.empty(0, d_out), torch.empty(0)
        self.labels: list[Label] = []
        self.prompt_lengths: list[int] = []
        self.owners: list[str | None] = []
        self._log: list[tuple[str, int, Any]] = []

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Tensor:
        """(n, d_in)."""
        return self._keys[: len(self)]

    @property
    def values(self) -> Tensor:
        """(n, d_out)."""
        return self._values[: len(self)]

    @property
    def radii(self) -> Tensor:
        """(n,)."""
        return self._radii[: len(self)]

    @property
    def n_bytes(self) -> int:
        """Bytes held, room to grow included."""
        return self._keys.nbytes + self._values.nbytes + self._radii.nbytes

    def to(self, device: torch.device) -> None:
        """Move to a device; does nothing if it is there."""
        if self._keys.device != device:
            self._keys, self._values, self._radii = (
                t.to(device) for t in (self._keys, self._values, self._radii)
            )

    def lookup(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest key of each query (B, d_in), if it covers it: index or −1 (B,), distance (B,)."""
        self.to(queries.device)
        return nearest_key(queries.float(), self.keys, self.radii)

    # -- growing ------------------------------------------------------------------------------------

    def place(self, key: Tensor, value: Tensor, label: Sequence[int], prompt_length: int) -> Placement:
        """Make room for a fact.

        Args:
            key: (d_in,), the query of its prompt, in the model's dtype.
            value: (d_out,), of a new entry.
            label: the target's ids.
            prompt_length: tokens of the prompt, for the official comparison of labels.
        """
        same = max(_SAME, 2 * torch.finfo(key.dtype).eps)
        key, label = key.float(), tuple(label)
        self.to(key.device)
        if not len(self):
            return self._settle("add", key, self._add(key, value, label, prompt_length))
        nearest, distances = nearest_key(key[None], self.keys)
        j, distance = int(nearest), float(distances)
        if distance > self.rules.radius + float(self._radii[j]):
            return self._settle("add", key, self._add(key, value, label, prompt_length))
        if not self._same_label(label, prompt_length, j):
            if not self.rules.official and distance <= same * float(key.norm()):
                self._set("label", j, label)
                return Placement("overwrite", j, None)
            added = self._add(key, value, label, prompt_length)
            self._set("radius", j, distance / 2 - _SPLIT)
            self._set("radius", added, distance / 2)
            return self._settle("split", key, added)
        if distance <= float(self._radii[j]):
            return self._settle("keep", key, None)
        self._set("radius", j, distance)
        if self.rules.expand == "moving_average":
            self._set("key", j, (self._keys[j] + key) / 2)
        return self._settle("expand", key, None)

    def set_value(self, row: int, value: Tensor) -> None:
        """Give an entry a new value."""
        self._set("value", row, value.to(self._values))

    def set_owner(self, row: int, owner: str) -> None:
        """Note which edit an entry's value comes from."""
        self._set("owner", row, owner)

    def _settle(self, action: str, key: Tensor, added: int | None) -> Placement:
        row = int(self.lookup(key[None])[0])
        return Placement(action, row if row >= 0 else None, added)

    def _same_label(self, label: Label, prompt_length: int, j: int) -> bool:
        if not self.rules.official:
            return self.labels[j] == label
        mirrored = len(self) - 1 - j
        return _mean(label, prompt_length) == _mean(self.labels[mirrored], self.prompt_lengths[mirrored])

    def _add(self, key: Tensor, value: Tensor, label: Label, prompt_length: int) -> int:
        n = len(self)
        if n == len(self._radii):
            room = max(64, n)
            self._keys, self._values, self._radii = (
                torch.cat((t, t.new_empty(room, *t.shape[1:])))
                for t in (self._keys, self._values, self._radii)
            )
        self._keys[n], self._values[n], self._radii[n] = key, value.to(self._values), self.rules.radius
        self.labels.append(label)
        self.prompt_lengths.append(prompt_length)
        self.owners.append(None)
        self._log.append(("add", n, None))
        return n

    # -- undoing ------------------------------------------------------------------------------------

    def mark(self) -> int:
        """The present state, for :meth:`rollback`."""
        return len(self._log)

    def rollback(self, mark: int) -> None:
        """Go back to a marked state; marks set after it are void."""
        while len(self._log) > mark:
            what, row, before = self._log.pop()
            if what == "add":
                self.labels.pop()
                self.prompt_lengths.pop()
                self.owners.pop()
            else:
                self._write(what, row, before)

    def _set(self, what: str, row: int, value: Any) -> None:
        before = self._column(what)[row]
        self._log.append((what, row, before.clone() if isinstance(before, Tensor) else before))
        self._write(what, row, value)

    def _write(self, what: str, row: int, value: Any) -> None:
        self._column(what)[row] = value

    def _column(self, what: str) -> Any:
        columns = {"key": self._keys, "value": self._values, "radius": self._radii}
        return {**columns, "label": self.labels, "owner": self.owners}[what]


def _mean(label: Label, prompt_length: int) -> float:
    """Mean of the published label tensor: −100 at the prompt's tokens, then the target's ids."""
    return (sum(label) - 100.0 * prompt_length) / (len(label) + prompt_length)
