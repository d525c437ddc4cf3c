"""Every Triton kernel compiles for every architecture without a GPU: no spills, the matrix unit, 16-byte accesses.

Compilation runs in a process of its own, one per architecture (this file as a script), because here kernels may
be interpreted and because a compiler that aborts must not take the tests with it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton_compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
if "constexprs" not in inspect.signature(triton_compiler.ASTSource.__init__).parameters:
    pytest.skip(
        "this Triton compiles through an older interface (3.3 or newer is needed)", allow_module_level=True
    )

ARCHITECTURES = (80, 90, 100, 120)
MATRIX_UNIT = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # elsewhere mma.sync
SHARED_LIMIT = {80: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use; 86 and 89 use the tiles of 80

# name: (kernel, dtype of x or weight, options)
VARIANTS = {
    "covariance_bf16": ("covariance", "bf16", {"mask": True}),
    "covariance_bf16_small": ("covariance", "bf16", {"mask": True, "d": 768}),
    "covariance_fp16_no_mask": ("covariance", "fp16", {"mask": False}),
    "covariance_fp32": ("covariance", "fp32", {"mask": True}),
    "covariance_bf16_to_fp64": ("covariance", "bf16", {"mask": True, "cov": "fp64"}),
    "low_rank_bf16": ("low_rank", "bf16", {}),
    "low_rank_fp32": ("low_rank", "fp32", {}),
    "low_rank_bf16_stochastic": ("low_rank", "bf16", {"stochastic": True}),
    "low_rank_bf16_stochastic_in_out": ("low_rank", "bf16", {"stochastic": True, "count_down": True}),
    "low_rank_fp16_stochastic_odd": ("low_rank", "fp16", {"stochastic": True, "aligned": False}),
    "low_rank_fp16_stochastic_odd_in_out": (
        "low_rank", "fp16", {"stochastic": True, "aligned": False, "count_down": True},
    ),
}  # fmt: skip
QUICK = ("covariance_bf16", "low_rank_bf16")


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


def check(architecture: int, result: dict) -> None:
    assert "error" not in result, result["error"]
    assert result["STACK"] == 0, "registers are spilled"
    assert result["LOCAL"] == 0, "local memory is used"
    assert result["shared"] <= SHARED_LIMIT[architecture] * 1024
    assert result[MATRIX_UNIT.get(architecture, "mma.sync")] > 0
    assert result["cp.async.c"] > 0, "loads are not pipelined"
    if result["kernel"] == "low_rank":
        assert result["weight accesses"] == ["ld.global.v4.b32", "st.global.v4.b32"]


@pytest.mark.parametrize("name", QUICK)
def test_compiles_for_hopper(name):
    pytest.importorskip("triton", reason="triton is not installed")
    check(90, compiled(90, QUICK)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture, name):
    pytest.importorskip("triton", reason="triton is not installed")
    check(architecture, compiled(architecture, tuple(VARIANTS))[name])


# ---- the process that compiles --------------------------------------------------------------------------


def compile_covariance(architecture, dtype, mask=True, cov="fp32", d=4096):
    import torch
    from fastedit.kernels import covariance as module

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    block_d, block_t, warps, stages = module.configuration(architecture, dtypes[dtype], dtypes[cov], d)
    signature = {
        "cov_ptr": "*" + cov, "x_ptr": "*" + dtype, "mask_ptr": "*u8" if mask else "*" + dtype,
        "T": "i32", "D": "i32", "stride_c0": "i32", "stride_c1": 1, "stride_xt": "i32", "stride_xd": 1,
        "stride_mask": 1 if mask else "i32", "HAS_MASK": mask, "BLOCK_D": block_d, "BLOCK_T": block_t,
        "FLUSH": max(1, 1024 // block_t), "PRECISION": "tf32x3",
    }  # fmt: skip
    divisible = ("cov_ptr", "x_ptr", "mask_ptr", "D", "stride_c0", "stride_xt")
    return compile_kernel(module._covariance_kernel, signature, divisible, architecture, warps, stages)


def compile_low_rank(architecture, dtype, stochastic=False, count_down=False, aligned=True):
    import torch
    from fastedit.kernels import low_rank as module

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    config = module.configuration(architecture, dtypes[dtype], stochastic and not aligned)
    block_rows, block_cols, block_r, warps, stages = config
    signature = {
        "w_ptr": "*" + dtype, "rows_ptr": "*fp32", "cols_ptr": "*fp32", "N_ROWS": "i32", "N_COLS": "i32",
        "R": "i32", "alpha": "fp32", "seed": "i64", "stride_w0": "i32", "stride_w1": 1, "stride_rows": "i32",
        "stride_cols": "i32", "STOCHASTIC": stochastic, "COUNT_DOWN": count_down, "ALIGNED": aligned,
        "SPLIT": dtype == "bf16", "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "BLOCK_R": block_r,
    }  # fmt: skip
    divisible = (
        "w_ptr",
        "rows_ptr",
        "cols_ptr",
        "N_ROWS",
        "N_COLS",
        "stride_w0",
        "stride_rows",
        "stride_cols",
    )
    return compile_kernel(module._low_rank_kernel, signature, divisible, architecture, warps, stages)


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


def measure(binary, kernel):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    result = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ptx = binary.asm["ptx"]
    for instruction in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.c"):
        result[instruction] = ptx.count(instruction)
    result["weight accesses"] = sorted(set(re.findall(r"(?:ld|st)\.global[.\w]*", ptx)))
    return {**result, "kernel": kernel, "shared": binary.metadata.shared}


def main():
    architecture, names = int(sys.argv[1]), sys.argv[2:]
    for name in names:
        kernel, dtype, options = VARIANTS[name]
        compile_it = {"covariance": compile_covariance, "low_rank": compile_low_rank}[kernel]
        try:
            result = measure(compile_it(architecture, dtype, **options), kernel)
        except Exception as error:  # the reason is the result
            result = {"error": repr(error)[:2000]}
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    main()
