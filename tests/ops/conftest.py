"""Backends and devices as fixtures; what is absent is skipped with the registry's reason."""

from __future__ import annotations

import os

import pytest
import torch

from fastedit.ops import backend


@pytest.fixture(params=backend.NAMES)
def served_by(request: pytest.FixtureRequest):
    """The name of a backend, chosen for the test; ``device_of`` says where it runs."""
    name = request.param
    reason = backend.missing(name, device_of(name), True)
    if reason:
        pytest.skip(f"{name}: {reason}")
    with backend.use_backend(name):
        yield name


def device_of(name: str) -> torch.device:
    """Where the tests run a backend: Triton on the CPU only if it is interpreted."""
    if name == "cuda":
        return torch.device("cuda")
    if name == "triton":
        return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
    return torch.device("cpu")


@pytest.fixture
def device(served_by: str) -> torch.device:
    return device_of(served_by)
