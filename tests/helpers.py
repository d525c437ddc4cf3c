"""Helpers shared by the tests: where real data lie, errors relative to a reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def data_folder(*parts: str) -> Path:
    """A path in the folder of real data and golden vectors; skips the test, saying why, if there is none."""
    root = os.environ.get("FASTEDIT_TEST_DATA")
    if not root:
        pytest.skip("FASTEDIT_TEST_DATA is unset: no folder with data/, golden/ and models/")
    path = Path(root).joinpath(*parts).resolve()
    if not path.exists():
        pytest.skip(f"FASTEDIT_TEST_DATA has no {'/'.join(parts)}")
    return path


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64 (0 for two empty or zero tensors)."""
    out, reference = out.double(), reference.double()
    scale = reference.norm().item()
    error = (out - reference).norm().item()
    return error / scale if scale else error
