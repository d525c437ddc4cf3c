"""Every Triton kernel compiles for every architecture without a GPU: no spills, the matrix unit, 16-byte accesses.

Compilation runs in a process of its own, one per architecture (this file as a script), because here kernels may
be interpreted and because a compiler that aborts must not take the tests with it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
triton_compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
if "constexprs" not in inspect.signature(triton_compiler.ASTSource.__init__).parameters:
    pytest.skip(
        "this Triton compiles through an older interface (3.3 or newer is needed)", allow_module_level=True
    )

ARCHITECTURES = (80, 90, 100, 120)
MATRIX_UNIT = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # elsewhere mma.sync
SHARED_LIMIT = {80: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use; 86 and 89 use the tiles of 80

# Bytes a thread. Triton 3.9 spills nothing; 3.7 spills up to 24 words in four of the kernels.
STACK_LIMIT = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 96

KERNELS = Path(__file__).parent / "kernels"  # one file for each hot path: VARIANTS, QUICK, launch, check


def load(stem: str) -> types.ModuleType:
    """The file ``kernels/<stem>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"compile_{stem}", KERNELS / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path.stem) for path in sorted(KERNELS.glob("*.py"))}
VARIANTS = {f"{stem}/{name}": options for stem, m in MODULES.items() for name, options in m.VARIANTS.items()}
QUICK = tuple(f"{stem}/{name}" for stem, m in MODULES.items() for name in m.QUICK)


@functools.cache
def compiled(architecture: int, names: tuple[str, ...]) -> dict[str, dict]:
    """What came out for each variant: registers, stack, shared memory, instruction counts; or an error."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": cache,
            "TRITON_DEFAULT_FP_FUSION": "1",
        }
        command = [sys.executable, __file__, str(architecture), *names]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    results = {}
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            results.update(json.loads(line))
    for name in names:
        results.setdefault(name, {"error": f"exit status {run.returncode}: {run.stderr[-2000:]}"})
    return results


def check(architecture: int, name: str, result: dict) -> None:
    assert "error" not in result, result["error"]
    assert result["STACK"] <= STACK_LIMIT, "registers are spilled"
    assert result["LOCAL"] == 0, "local memory is used"
    assert result["shared"] <= SHARED_LIMIT[architecture] * 1024
    MODULES[name.split("/")[0]].check(architecture, name.split("/")[1], result)


@pytest.mark.parametrize("name", QUICK)
def test_compiles_for_hopper(name):
    pytest.importorskip("triton", reason="triton is not installed")
    check(90, name, compiled(90, QUICK)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture, name):
    pytest.importorskip("triton", reason="triton is not installed")
    check(architecture, name, compiled(architecture, tuple(VARIANTS))[name])


# ---- the process that compiles --------------------------------------------------------------------------


def compile_kernel(kernel, arguments, divisible, architecture, warps, stages):
    """Compile with the hints that a launch on contiguous tensors of usual sizes would infer."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        name: value for name, value in arguments.items() if not isinstance(value, str) or name.isupper()
    }
    constants = {name: value for name, value in constants.items() if value not in ("i32", "i64")}
    signature = {name: "constexpr" if name in constants else kind for name, kind in arguments.items()}
    order = list(signature)
    hints = {(order.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measure(binary):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = {
            what: subprocess.run([tool, f"--dump-{what}", file.name], capture_output=True, text=True).stdout
            for what in ("resource-usage", "sass")
        }
    result = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said["resource-usage"])
    }
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", said["sass"])
    result["waits for wgmma"] = {n: waits.count(n) for n in sorted(set(waits))}
    result["FFMA"] = said["sass"].count(" FFMA ")
    ptx = binary.asm["ptx"]
    for instruction in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.c"):
        result[instruction] = ptx.count(instruction)
    result["matrix unit"] = result[MATRIX_UNIT.get(binary.metadata.target.arch, "mma.sync")]
    result["accesses"] = sorted(set(re.findall(r"\b(?:ld|st|atom|red)\.global[.\w]*", ptx)))
    return {**result, "shared": binary.metadata.shared}


def main():
    architecture, names = int(sys.argv[1]), sys.argv[2:]
    for name in names:
        stem, variant = name.split("/")
        try:
            kernel, arguments, divisible, warps, stages = MODULES[stem].launch(architecture, variant)
            result = measure(compile_kernel(kernel, arguments, divisible, architecture, warps, stages))
        except Exception as error:  # the reason is the result
            result = {"error": repr(error)[:2000]}
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    main()
