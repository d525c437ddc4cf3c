"""A collection that was interrupted, on disk: the sums so far and how far they reach."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..io import atomic_file
from .tokens import Position

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Sums up to a point: all groups before ``group_start``, and ``n_batches`` batches of the next one.

    ``group_end`` is where that next group ends; it serves to recognise the texts.
    ``count`` is the number of tokens in the sums of this process.
    """

    group_start: Position
    group_end: Position
    n_batches: int
    count: int
    sums: Mapping[int, torch.Tensor]


class Checkpoint:
    """A file that is replaced, atomically, now and then.

    Args:
        path: the file.
        identity: hash of everything that must be the same for the file to be of use.
        seconds: least time between two writes.
    """

    def __init__(self, path: str | os.PathLike[str], *, identity: str, seconds: float) -> None:
        self.path = Path(path)
        self._identity = identity
        self._seconds = seconds
        self._written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written >= self._seconds

    def save(self, state: State) -> None:
        """Replace the file by ``state``."""
        progress = {
            "identity": self._identity,
            "group_start": asdict(state.group_start),
            "group_end": asdict(state.group_end),
            "n_batches": state.n_batches,
            "count": state.count,
        }
        tensors = {str(layer): total.cpu().contiguous() for layer, total in state.sums.items()}
        with atomic_file(self.path) as temporary:
            save_file(tensors, temporary, metadata={"fastedit": json.dumps(progress)})
        self._written = time.monotonic()

    def load(self) -> State | None:
        """The state on disk; None, with a warning, if it cannot serve, and None if there is none."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                progress = json.loads((file.metadata() or {})["fastedit"])
                if progress["identity"] != self._identity:
                    logger.warning("%s is of another collection: starting anew", self.path)
                    return None
                sums = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            start, end = Position(**progress["group_start"]), Position(**progress["group_end"])
            return State(start, end, progress["n_batches"], progress["count"], sums)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is not a whole checkpoint (%s): starting anew", self.path, error)
            return None
