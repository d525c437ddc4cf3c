"""The CPU kernels alone, without Python: on this processor, and cross-compiled for aarch64 under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "tests" / "csrc" / "portable.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source tree: no csrc"),
]


def build(compiler: str, flags: list[str], out: Path) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on PATH")
    command = [
        compiler,
        "-O2",
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        *flags,
        *map(str, SOURCES),
        "-o",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out


def check(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok  ") >= 8, run.stdout


def test_on_this_processor(tmp_path):
    check([str(build("g++", ["-fopenmp"], tmp_path / "portable"))])


def test_without_openmp(tmp_path):
    check([str(build("g++", ["-Wall", "-Wno-unknown-pragmas"], tmp_path / "portable"))])


def test_sanitized(tmp_path):
    """No read or write out of bounds, no undefined arithmetic."""
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    check([str(build("g++", flags, tmp_path / "portable"))])


def test_aarch64_under_qemu(tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64 on PATH (Debian: qemu-user)")
    binary = build("aarch64-linux-gnu-g++", ["-fopenmp", "-static"], tmp_path / "portable")
    check(["qemu-aarch64", str(binary)])
