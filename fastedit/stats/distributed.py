"""Data-parallel collection under ``torchrun``: who this process is, and the sum over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Group:
    """This process among those that collect together; (0, 1) when it is alone."""

    rank: int = 0
    world: int = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add ``tensor`` up over all processes, in place; any device, whatever the backend needs."""
        if self.world == 1:
            return tensor
        shared = tensor.to(_communication_device())
        distributed.all_reduce(shared)
        return tensor.copy_(shared) if shared is not tensor else tensor

    def total(self, number: int) -> int:
        """The sum of an integer over all processes."""
        return int(self.sum_(torch.tensor(number, dtype=torch.int64)))

    def wait(self) -> None:
        """Return when every process has come here."""
        self.total(0)


@contextmanager
def joined() -> Iterator[Group]:
    """Yield the group of processes.

    A process group that is initialised already is used and left alone. Otherwise, if ``WORLD_SIZE`` in the
    environment is above one (as ``torchrun`` sets it), one is made, NCCL with CUDA devices and gloo
    without, and taken down again at the end.
    """
    if not distributed.is_available():
        yield Group()
    elif distributed.is_initialized():
        yield Group(distributed.get_rank(), distributed.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _initialise()
        try:
            yield Group(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()
    else:
        yield Group()


def local_device() -> torch.device:
    """The CUDA device of this process (``LOCAL_RANK`` under ``torchrun``), or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _initialise() -> None:
    use_cuda = torch.cuda.is_available() and distributed.is_nccl_available()
    if use_cuda:
        torch.cuda.set_device(local_device())
    distributed.init_process_group("nccl" if use_cuda else "gloo")


def _communication_device() -> torch.device:
    if "nccl" in str(distributed.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
