"""The CUDA kernels, compiled without a GPU: no spills, and the instructions they were written for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=os.path.join(HOME, "bin") if HOME else None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in CUDA_HOME"),
    pytest.mark.skipif(not CUDA.exists(), reason="not a source tree: no csrc/cuda"),
]


def _compile(source: str, arch: str, kind: str, out: Path) -> str:
    """Compile device code only, to PTX or a cubin; returns what the assembler reports."""
    command = [NVCC, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-{kind}"]
    command += [f"-arch=sm_{arch}", str(CUDA / source), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu") if path.stem != "device"))
def test_no_spills(source, arch, tmp_path):
    report = _compile(source, arch, "cubin", tmp_path / "kernel.cubin")
    kernels = report.count("Compiling entry function")
    assert kernels > 0
    clean = report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    assert clean == kernels, report
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 255
    assert "warning" not in report.lower()


def test_tensor_cores_and_asynchronous_copies(tmp_path):
    out = tmp_path / "kernel.ptx"
    _compile("covariance.cu", "80", "ptx", out)
    ptx = out.read_text()
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ptx
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums have one owner and one order


def test_weights_move_in_16_byte_accesses(tmp_path):
    out = tmp_path / "kernel.ptx"
    _compile("low_rank.cu", "80", "ptx", out)
    ptx = out.read_text()
    assert re.search(r"ld\.global\.v4", ptx)
    assert re.search(r"st\.global\.v4", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)
