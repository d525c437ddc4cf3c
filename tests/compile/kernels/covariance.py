"""What tests/compile/test_triton.py compiles of ``covariance`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
VARIANTS = {  # name: (dtype of x, of what is written, masked, d, precision, partial sums go to a workspace)
    "bf16": ("bf16", "fp32", True, 4096, "tf32x3", False),
    "bf16_small": ("bf16", "fp32", True, 192, "tf32x3", False),
    "bf16_split": ("bf16", "fp32", True, 1600, "tf32x3", True),
    "fp16_no_mask": ("fp16", "fp32", False, 4096, "tf32x3", False),
    "fp32": ("fp32", "fp32", True, 4096, "tf32x3", False),
    "fp32_ieee": ("fp32", "fp32", True, 4096, "ieee", False),
    "add_partials": ("fp32", "fp32", False, 4096, "", True),
    "add_partials_fp64": ("fp32", "fp64", False, 4096, "", True),
}
QUICK = ("bf16",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import covariance as module

    dtype, out, mask, d, precision, partial = VARIANTS[variant]
    if not precision:
        arguments = {
            "cov_ptr": "*" + out, "partials_ptr": "*fp32", "SPLITS": "i32", "D": "i32", "stride_c0": "i32",
            "stride_c1": 1, "BLOCK_D": 128, "ROWS": 32, "GROUP": 8,
        }  # fmt: skip
        return module._add_partials_kernel, arguments, ("cov_ptr", "partials_ptr", "D", "stride_c0"), 4, 3
    config = module.configuration(architecture, getattr(torch, DTYPES[dtype]), d, precision)
    block_d, block_t, warps, stages = config
    arguments = {
        "out_ptr": "*" + out, "x_ptr": "*" + dtype, "mask_ptr": "*u8" if mask else "*" + dtype, "T": "i32",
        "D": "i32", "SPLIT_TOKENS": "i32", "STEPS": "i32", "stride_c0": "i32", "stride_c1": 1,
        "stride_xt": "i32", "stride_xd": 1, "stride_mask": 1 if mask else "i32", "HAS_MASK": mask,
        "PARTIAL": partial, "BLOCK_D": block_d, "BLOCK_T": block_t, "GROUP": 8, "PRECISION": precision,
    }  # fmt: skip
    divisible = ("out_ptr", "x_ptr", "mask_ptr", "D", "stride_c0", "stride_xt")
    return module._covariance_kernel, arguments, divisible, warps, stages


def check(architecture, variant, result):
    precision = VARIANTS[variant][4]
    if not precision:
        assert "ld.global.v4.b32" in result["accesses"]
        return
    assert result["cp.async.c"] > 0, "loads are not pipelined"
    if precision == "ieee":
        assert result["FFMA"] > 0
        return
    assert result["matrix unit"] > 0
    if architecture == 90 and VARIANTS[variant][0] != "fp32":
        # one wait leaves a group in flight, in the loop; two wait for all, at a flush and at the end. The assembler
        # waits after every wgmma where it cannot prove that nothing else touches the accumulators.
        assert result["waits for wgmma"] == {"0": 2, "1": 1}
