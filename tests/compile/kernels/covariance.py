"""What tests/compile/test_triton.py compiles of ``covariance`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
VARIANTS = {  # name: (dtype of x, of cov, masked, d)
    "bf16": ("bf16", "fp32", True, 4096),
    "bf16_small": ("bf16", "fp32", True, 768),
    "fp16_no_mask": ("fp16", "fp32", False, 4096),
    "fp32": ("fp32", "fp32", True, 4096),
    "bf16_to_fp64": ("bf16", "fp64", True, 4096),
}
QUICK = ("bf16",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import covariance as module

    dtype, cov, mask, d = VARIANTS[variant]
    block_d, block_t, warps, stages = module.configuration(
        architecture, getattr(torch, DTYPES[dtype]), getattr(torch, DTYPES[cov]), d
    )
    arguments = {
        "cov_ptr": "*" + cov, "x_ptr": "*" + dtype, "mask_ptr": "*u8" if mask else "*" + dtype,
        "T": "i32", "D": "i32", "stride_c0": "i32", "stride_c1": 1, "stride_xt": "i32", "stride_xd": 1,
        "stride_mask": 1 if mask else "i32", "HAS_MASK": mask, "BLOCK_D": block_d, "BLOCK_T": block_t,
        "FLUSH": max(1, 1024 // block_t), "PRECISION": "tf32x3",
    }  # fmt: skip
    divisible = ("cov_ptr", "x_ptr", "mask_ptr", "D", "stride_c0", "stride_xt")
    return module._covariance_kernel, arguments, divisible, warps, stages


def check(architecture, variant, result):
    assert result["matrix unit"] > 0
    assert result["cp.async.c"] > 0, "loads are not pipelined"
