"""The scripts for a machine with a GPU, as far as they go without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="not a source tree: no bench")


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_check_says_what_is_missing(tmp_path):
    script = str(BENCH / "gpu_check.sh")
    assert run("bash", "-n", script).returncode == 0
    fake = tmp_path / "python3"  # sees no GPU, whatever this machine has
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    said = run("bash", script, PATH=f"{tmp_path}:{os.environ['PATH']}", OUT=str(tmp_path / "out"))
    assert said.returncode == 1
    assert "torch sees no GPU on this machine" in said.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("covariance", "--shape", "512x512", "--dtype", "bfloat16"),
        ("low_rank", "--shape", "64x64x1", "--dtype", "float32"),
    ],
)
def test_tune_compiles_candidates_without_a_gpu(arguments, tmp_path):
    pytest.importorskip("triton")
    command = (sys.executable, str(BENCH / "tune.py"), *arguments, "--dry-run", "90", "--limit", "1")
    said = run(*command, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert said.returncode == 0, said.stderr
    row = json.loads(said.stdout.splitlines()[-1])
    assert row["STACK"] == 0, row
