"""Builds fastedit: pure Python always, and the compiled module fastedit._C where a compiler allows it.

Everything else about the package is in pyproject.toml. Environment variables:

    FASTEDIT_CPP         auto (default) | 0 | 1     compile fastedit._C; 1 makes a failure an error
    FASTEDIT_CUDA        auto (default) | 0 | 1     include the CUDA kernels; 1 makes a failure an error
    FASTEDIT_CUDA_ARCHS  "80;90a;120+PTX"           architectures to compile for; default: all that nvcc knows of
    CXX, CUDA_HOME, MAX_JOBS, NVCC_THREADS          as usual

The module links neither libtorch nor a shared CUDA runtime, so one binary serves every torch version and
also machines without a driver.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120+PTX")
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC's own AVX-512 headers set these off
# What the compiler must be able to do, beyond existing: C++17 with its library, and CPython's headers.
PROBE = """#include <Python.h>
#include <vector>
int main() { return int(std::vector<int>().size()); }
"""


class Unavailable(Exception):
    """A part of the build that this machine cannot do; the text says why."""


def wanted(name: str) -> str:
    """The value of one of the switches: "auto", "0" or "1"."""
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def say(text: str) -> None:
    """One line to the user; pip shows it with -v."""
    print(f"fastedit: {text}", file=sys.stderr, flush=True)


def last_lines(text: str, n: int = 3) -> str:
    """The end of a compiler's message, on one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-n:])


# --- C++ ------------------------------------------------------------------------------------------------


def python_include() -> list[str]:
    """Flags for CPython's headers."""
    return [f"-I{path}" for path in sorted({sysconfig.get_path(n) for n in ("include", "platinclude")})]


def probe(cxx: str, flags: list[str]) -> str | None:
    """Compile a few lines; None if that works, otherwise what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*cxx.split(), *CXX_FLAGS, *flags, *python_include()]
        command += ["-c", str(source), "-o", f"{source}.o"]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return None if run.returncode == 0 else last_lines(run.stderr) or f"exit status {run.returncode}"


def find_cxx() -> tuple[str, list[str]]:
    """A C++ compiler that works and its OpenMP flags; raises Unavailable if there is none."""
    if sys.platform != "linux":
        raise Unavailable(f"the compiled kernels are built on Linux only, this is {sys.platform}")
    named = os.environ.get("CXX")
    reasons = []
    for cxx in [named] if named else ["g++", "clang++", "c++"]:
        for openmp in (["-fopenmp"], []):
            problem = probe(cxx, openmp)
            if problem is None:
                return cxx, openmp
        reasons.append(f"{cxx}: {problem}")
    raise Unavailable("no working C++ compiler (" + "; ".join(reasons) + ")")


# --- CUDA -----------------------------------------------------------------------------------------------


def find_nvcc() -> str:
    """Path of nvcc; raises Unavailable if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and not home:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise Unavailable("no nvcc at build time" + (f" in CUDA_HOME={home}" if home else ""))
    return nvcc


def toolkit_root(nvcc: str) -> Path:
    """The folder of the toolkit; nvcc on PATH may be a wrapper, a dry run prints where the toolkit really is."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = next((line[7:].strip() for line in said.splitlines() if line.startswith("#$ TOP=")), None)
    return Path(top or Path(nvcc).resolve().parent.parent).resolve()


def static_cudart(nvcc: str) -> Path:
    """The CUDA runtime that goes into the module; raises Unavailable if the toolkit lacks it."""
    top = toolkit_root(nvcc)
    for sub in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (top / sub / "libcudart_static.a").exists():
            return top / sub / "libcudart_static.a"
    raise Unavailable(f"no libcudart_static.a under {top}")


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for: those asked for, or those of the default list that this nvcc knows."""
    asked = os.environ.get("FASTEDIT_CUDA_ARCHS")
    if asked:
        return [arch for arch in asked.replace(",", ";").replace(" ", ";").split(";") if arch]
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = {word.removeprefix("sm_") for word in listed.split()}
    archs = [arch for arch in DEFAULT_ARCHS if arch.removesuffix("+PTX").rstrip("a") in known]
    if not archs:
        raise Unavailable(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHS)}")
    if not archs[-1].endswith("+PTX"):
        # An older toolkit: newer GPUs are served by the driver from PTX, which 90a cannot provide.
        archs.append("90+PTX" if archs[-1] == "90a" else archs.pop() + "+PTX")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """Flags of nvcc for architectures: machine code for each, and PTX where asked."""
    flags = []
    for arch in archs:
        cc = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{cc},code=sm_{cc}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{cc},code=compute_{cc}")
    return flags


def version() -> str:
    """The package's version, which the module repeats so that a stale one is noticed."""
    scope: dict[str, str] = {}
    exec((ROOT / "fastedit" / "_version.py").read_text(), scope)
    return scope["__version__"]


class NinjaBuild(build_ext):
    """Compiles csrc/ into fastedit._C with ninja: g++ for .cpp, nvcc for .cu."""

    def run(self) -> None:
        """Build, or say why not and leave a package of pure Python."""
        try:
            super().run()
        except Unavailable as reason:
            if wanted("FASTEDIT_CPP") == "1":
                raise SystemExit(f"fastedit: FASTEDIT_CPP=1, but {reason}") from None
            say(f"installing without compiled kernels, torch and Triton serve instead: {reason}")

    def build_extension(self, ext: Extension) -> None:
        """Build with CUDA if possible, otherwise without; raises Unavailable if neither works."""
        cxx, openmp = find_cxx()
        try:
            import ninja  # noqa: F401
            import pybind11
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed (needed to build)") from None
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", *python_include()]
        cpp_flags = [*CXX_FLAGS, *openmp, *include, f"-DFASTEDIT_VERSION='\"{version()}\"'"]
        without_cuda = self.build_with_cuda(cxx, openmp, cpp_flags, include, out)
        if without_cuda:
            quoted = without_cuda.replace("\\", "/").replace('"', "").replace("'", "")
            flags = [*cpp_flags, f"-DFASTEDIT_NO_CUDA_REASON='\"{quoted}\"'"]
            self.compile("cpu", [cxx, *flags], [cxx, "-shared", *openmp], None, [], out)

    def build_with_cuda(self, cxx, openmp, cpp_flags, include, out) -> str | None:
        """Build with the CUDA kernels; None if that worked, otherwise why they are left out."""
        want = wanted("FASTEDIT_CUDA")
        if want == "0":
            return "FASTEDIT_CUDA=0 at build time"
        try:
            nvcc = find_nvcc()
            archs = cuda_archs(nvcc)
            libraries = [str(static_cudart(nvcc)), "-ldl", "-lrt", "-lpthread"]
            threads = os.environ.get("NVCC_THREADS", "2")
            cuda = [nvcc, "-O3", "-std=c++17", f"--threads={threads}", "--expt-relaxed-constexpr"]
            cuda += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
            cuda += [*include, *gencode(archs)]
            flags = [*cpp_flags, "-DFASTEDIT_WITH_CUDA", f"-DFASTEDIT_CUDA_ARCHS='\"{';'.join(archs)}\"'"]
            self.compile("cuda", [cxx, *flags], [cxx, "-shared", *openmp], cuda, libraries, out)
        except Unavailable as reason:
            if want == "1":
                raise SystemExit(f"fastedit: FASTEDIT_CUDA=1, but {reason}") from None
            say(f"building without CUDA kernels: {reason}")
            return str(reason)
        return None

    def compile(self, kind, cxx, link, cuda, libraries, out) -> None:
        """Write one ninja file and run it; raises Unavailable when a command fails."""
        # A folder of our own: setuptools throws its build_temp away after an editable install.
        work = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{kind}"
        work.mkdir(parents=True, exist_ok=True)
        join = " ".join
        link = [*link, "-Wl,--exclude-libs,ALL", "-Wl,-s"]
        text = [
            f"rule cxx\n  command = {join(cxx)} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {join(link)} $in {join(libraries)} -o $out",
        ]
        if cuda:
            text.append(
                f"rule cu\n  command = {join(cuda)} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
            )
        objects = []
        for source in sorted((ROOT / "csrc").rglob("*.c*")):
            rule = {".cpp": "cxx", ".cu": "cu"}.get(source.suffix)
            if rule is None or (rule == "cu" and not cuda):
                continue
            target = escape(work / (str(source.relative_to(ROOT)).replace("/", "_") + ".o"))
            text.append(f"build {target}: {rule} {escape(source)}")
            objects.append(target)
        text.append(f"build {escape(out)}: link {join(objects)}")
        (work / "build.ninja").write_text("\n".join(text) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        run = subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), *jobs])
        if run.returncode != 0:
            raise Unavailable(f"compiling the {kind} kernels failed (the compiler's message is above)")


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The compiled module, unless it is switched off."""
    if wanted("FASTEDIT_CPP") == "0":
        say("installing without compiled kernels, torch and Triton serve instead: FASTEDIT_CPP=0")
        return []
    # optional: setuptools must not look for a file that was not built
    return [Extension("fastedit._C", sources=[], optional=True)]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fastedit", "fastedit.*"]), "fastedit.kernels", "fastedit.bench"],
        package_dir={"fastedit.kernels": "kernels", "fastedit.bench": "bench"},
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
    )
