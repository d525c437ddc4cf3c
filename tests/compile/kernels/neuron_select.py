"""What tests/compile/test_triton.py compiles of ``neuron_select`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
VARIANTS = {  # name: (kernel, dtype, d, rule)
    "fp32": ("select", "fp32", 6400, "at_least"),
    "fp32_prefix": ("select", "fp32", 6400, "prefix"),
    "fp32_long": ("select", "fp32", 14336, "at_least"),
    "fp32_small": ("select", "fp32", 768, "at_least"),
    "bf16": ("select", "bf16", 6400, "at_least"),
    "fp16": ("select", "fp16", 6400, "prefix"),
    "fp64": ("select", "fp64", 6400, "at_least"),
    "fp64_long": ("select", "fp64", 14336, "prefix"),
    "scores_bf16": ("scores", "bf16", 14336, ""),
    "scores_fp32": ("scores", "fp32", 14336, ""),
    "gather_fp32": ("gather", "fp32", 14336, ""),
    "gather_bf16": ("gather", "bf16", 14336, ""),
    "gather_fp64": ("gather", "fp64", 14336, ""),
}
QUICK = ("fp32_long",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import neuron_select as module

    kernel, dtype, d, rule = VARIANTS[variant]
    if kernel == "scores":
        arguments = {
            "keys_ptr": "*" + dtype, "out_ptr": "*fp64", "D": "i32", "N": "i32", "stride_kd": 1, "stride_kn": "i32",
            "BLOCK": 64,
        }  # fmt: skip
        return module._neuron_scores_kernel, arguments, ("keys_ptr", "out_ptr", "D", "stride_kn"), 2, 3
    if kernel == "gather":
        arguments = {
            "matrix_ptr": "*" + dtype, "indices_ptr": "*i32", "out_ptr": "*" + dtype, "D": "i32", "S": "i32",
            "stride_m0": "i32", "stride_m1": 1, "stride_i": 1, "ROWS": 8, "BLOCK": 128,
        }  # fmt: skip
        return module._gather_square_kernel, arguments, ("matrix_ptr", "indices_ptr", "out_ptr"), 4, 3
    torch_dtype = getattr(torch, DTYPES[dtype])
    held, block, chunk, warps = module.configuration(d)
    arguments = {
        "scores_ptr": "*" + dtype, "mask_ptr": "*u8", "indices_ptr": "*i32", "counts_ptr": "*i32", "D": "i32",
        "stride_row": "i32", "GRID": "i32", "mass_bits": "i64", "ALL": False, "PREFIX": rule == "prefix",
        "MANTISSA": 52 if dtype == "fp64" else 23, "KEY_BITS": 63 if dtype == "fp64" else 31,
        "LOW_BITS": module._LOW_BITS[torch_dtype], "HELD": held, "BLOCK": block,
        "CHUNK": chunk,
    }  # fmt: skip
    divisible = ("scores_ptr", "mask_ptr", "indices_ptr", "counts_ptr", "D", "stride_row")
    return module._neuron_select_kernel, arguments, divisible, warps, 3


def check(architecture, variant, result):
    assert result["matrix unit"] == 0
    assert not any("atom" in access or "red" in access for access in result["accesses"])
