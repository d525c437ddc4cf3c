"""What tests/compile/test_triton.py compiles of ``routing`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
VARIANTS = {  # name: (dtype, tokens, weights stored (d_in, d_out), memories, activation, bias)
    "bf16": ("bf16", 256, False, 4, "silu", False),
    "bf16_one": ("bf16", 1, False, 2, "silu", False),
    "fp16_in_out": ("fp16", 256, True, 4, "gelu_tanh", True),
    "fp16_in_out_one": ("fp16", 1, True, 1, "gelu_tanh", True),
    "fp32": ("fp32", 256, False, 2, "gelu", False),
    "fp32_one": ("fp32", 1, False, 4, "relu", True),
}
QUICK = ("bf16_one",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import routing as module

    dtype, tokens, in_out, memories, activation, bias = VARIANTS[variant]
    config = module.configuration(architecture, getattr(torch, DTYPES[dtype]), tokens)
    block_t, block_o, block_k, warps, stages = config
    pointers = ("base_ptr", *(f"memory{i}_ptr" for i in range(4)))
    arguments = {
        "part_ptr": "*fp32", "x_ptr": "*" + dtype, "bias_ptr": "*fp32" if bias else "*" + dtype,
        **dict.fromkeys(pointers, "*" + dtype), "T": "i32", "DI": "i32", "DO": "i32", "stride_xt": "i32",
        "stride_xk": 1, "stride_wo": 1 if in_out else "i32", "stride_wk": "i32" if in_out else 1,
        "HAS_BIAS": bias, "ACTIVATION": activation, "MEMORIES": memories, "BLOCK_T": block_t,
        "BLOCK_O": block_o, "BLOCK_K": block_k, "FLUSH": max(1, 1024 // block_k), "PRECISION": "tf32x3",
    }  # fmt: skip
    sizes = ("DI", "DO", "stride_xt", "stride_wk" if in_out else "stride_wo")
    return (
        module._routing_kernel,
        arguments,
        ("part_ptr", "x_ptr", "bias_ptr", *pointers, *sizes),
        warps,
        stages,
    )


def check(architecture, variant, result):
    few = VARIANTS[variant][1] == 1  # 16 tokens are too few for the matrix units of sm_90 and sm_100
    assert result["mma.sync" if few else "matrix unit"] > 0
    assert result["cp.async.c"] > 0, "loads are not pipelined"
