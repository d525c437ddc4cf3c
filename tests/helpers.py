"""Helpers shared by the tests: where real data lie, errors relative to a reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastedit.testing.case import relative_error

__all__ = ["data_folder", "relative_error"]


def data_folder(*parts: str) -> Path:
    """A path in the folder of real data and golden vectors; skips the test, saying why, if there is none."""
    root = os.environ.get("FASTEDIT_TEST_DATA")
    if not root:
        pytest.skip("FASTEDIT_TEST_DATA is unset: no folder with data/, golden/ and models/")
    path = Path(root).joinpath(*parts).resolve()
    if not path.exists():
        pytest.skip(f"FASTEDIT_TEST_DATA has no {'/'.join(parts)}")
    return path
