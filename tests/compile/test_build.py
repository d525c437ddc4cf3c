"""The build: what it does without compilers, what ends up in the packages, what the module depends on."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "linux-vdso",
    "ld-linux",
    "libc",
    "libm",
    "libstdc++",
    "libgcc_s",
    "libgomp",
    "libpthread",
    "libdl",
    "librt",
)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree: no setup.py")


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastedit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module_path() -> Path:
    try:
        spec = importlib.util.find_spec("fastedit._C")
    except ImportError:
        spec = None
    if spec is None or not spec.origin:
        pytest.skip("fastedit._C was not built")
    return Path(spec.origin)


def _python(*args: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTEDIT_")} | variables
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


# ---- finding compilers ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
@pytest.mark.parametrize("cxx", ["/nonexistent/g++", "false"])
def test_missing_and_broken_compilers_are_named(setup_py, monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(setup_py.Unavailable, match=rf"no working C\+\+ compiler.*{re.escape(cxx)}"):
        setup_py.find_cxx()


def test_a_compiler_without_openmp_serves(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.sys, "platform", "linux")
    monkeypatch.setenv("CXX", "some-cxx")
    monkeypatch.setattr(setup_py, "probe", lambda cxx, flags: "no libomp" if flags else None)
    assert setup_py.find_cxx() == ("some-cxx", [])


def test_switches_take_three_values(setup_py, monkeypatch):
    for value, expected in (("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        monkeypatch.setenv("FASTEDIT_CUDA", value)
        assert setup_py.wanted("FASTEDIT_CUDA") == expected
    monkeypatch.setenv("FASTEDIT_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTEDIT_CUDA must be auto, 0 or 1"):
        setup_py.wanted("FASTEDIT_CUDA")


def test_cuda_home_without_nvcc_is_a_reason(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup_py.Unavailable, match="no nvcc at build time in CUDA_HOME"):
        setup_py.find_nvcc()


def test_architectures(setup_py, monkeypatch):
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "80; 90a,120+PTX")
    archs = setup_py.cuda_archs("nvcc")
    assert archs == ["80", "90a", "120+PTX"]
    assert setup_py.gencode(archs) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("sm_80 sm_86 sm_89 sm_90 sm_100 sm_120", ["80", "86", "89", "90a", "100", "120+PTX"]),
        ("sm_80 sm_86 sm_89 sm_90", ["80", "86", "89", "90a", "90+PTX"]),
        ("sm_70 sm_80 sm_86", ["80", "86+PTX"]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(setup_py, monkeypatch, known, expected):
    monkeypatch.delenv("FASTEDIT_CUDA_ARCHS", raising=False)
    listed = subprocess.CompletedProcess([], 0, stdout=known)
    monkeypatch.setattr(setup_py.subprocess, "run", lambda *args, **kwargs: listed)
    assert setup_py.cuda_archs("nvcc") == expected


# ---- building -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    build = [
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    run = _python(*build, cwd=ROOT, CXX="/nonexistent/g++")
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("fastedit: ")]
    assert len(said) == 1
    assert "installing without compiled kernels" in said[0]
    assert not list(tmp_path.rglob("*.so"))
    required = _python(*build, cwd=ROOT, CXX="/nonexistent/g++", FASTEDIT_CPP="1")
    assert required.returncode != 0
    assert "FASTEDIT_CPP=1, but no working C++ compiler" in required.stderr


def _copy_of_the_tree(to: Path) -> Path:
    ignore = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "out"
    )
    shutil.copytree(ROOT, to, ignore=ignore)
    return to


@pytest.mark.slow
def test_packages_hold_the_kernels(tmp_path):
    tree = _copy_of_the_tree(tmp_path / "tree")
    run = _python("setup.py", "-q", "sdist", "bdist_wheel", cwd=tree, FASTEDIT_CPP="0")
    assert run.returncode == 0, run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fastedit/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= inside
    assert "fastedit/py.typed" in inside
    assert not [
        name for name in inside if name.startswith(("kernels/", "csrc/", "tests/")) or name.endswith(".so")
    ]
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= held
    assert {"setup.py", "LICENSE", "kernels/__init__.py"} <= held


# ---- the module that is installed -----------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("ldd"), reason="no ldd")
def test_module_links_neither_torch_nor_cuda():
    run = subprocess.run(["ldd", str(_module_path())], capture_output=True, text=True, check=True)
    names = {Path(line.split()[0]).name for line in run.stdout.splitlines()}
    assert not {name for name in names if not name.startswith(LIBRARIES)}
    assert not {name for name in names if name.startswith(("libcudart", "libcuda"))}


def test_module_loads_without_torch(tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('fastedit._C', {str(_module_path())!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.info()\n"
        "print('torch' in sys.modules)\n"
    )
    run = _python("-c", code, cwd=tmp_path)
    if run.returncode != 0 and "libgomp" in run.stderr:
        pytest.skip("no libgomp outside torch on this machine")
    assert run.stdout.strip() == "False", run.stderr


def test_module_is_there_where_it_could_be_built(setup_py):
    """Without this, a broken build would show as skipped tests only."""
    if os.environ.get("FASTEDIT_CPP") == "0":
        pytest.skip("FASTEDIT_CPP=0: installed without compiled kernels on purpose")
    try:
        setup_py.find_cxx()
    except setup_py.Unavailable as reason:
        pytest.skip(str(reason))
    assert importlib.util.find_spec("fastedit._C") is not None, (
        "there is a C++ compiler, but fastedit._C is missing"
    )


def test_module_refuses_cuda_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    _module_path()
    from fastedit import _C

    assert not _C.info()["cuda_available"]
    assert _C.info()["cuda_reason"]
