"""Settings shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# Triton decides at import whether it interprets kernels, so this comes before any of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "editors")]


def pytest_collection_modifyitems(items: list) -> None:
    """Skip tests marked ``gpu`` where there is none, saying so."""
    import pytest

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, where names of folders are too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
