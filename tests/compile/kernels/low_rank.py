"""What tests/compile/test_triton.py compiles of ``low_rank`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
VARIANTS = {  # name: (dtype of weight, stochastic rounding, words counted down columns, 4 words a counter)
    "bf16": ("bf16", False, False, True),
    "fp32": ("fp32", False, False, True),
    "bf16_stochastic": ("bf16", True, False, True),
    "bf16_stochastic_in_out": ("bf16", True, True, True),
    "fp16_stochastic_odd": ("fp16", True, False, False),
    "fp16_stochastic_odd_in_out": ("fp16", True, True, False),
}
QUICK = ("bf16",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import low_rank as module

    dtype, stochastic, count_down, aligned = VARIANTS[variant]
    config = module.configuration(architecture, getattr(torch, DTYPES[dtype]), stochastic and not aligned)
    block_rows, block_cols, block_r, warps, stages = config
    arguments = {
        "w_ptr": "*" + dtype, "rows_ptr": "*fp32", "cols_ptr": "*fp32", "N_ROWS": "i32", "N_COLS": "i32",
        "R": "i32", "alpha": "fp32", "seed": "i64", "stride_w0": "i32", "stride_w1": 1, "stride_rows": "i32",
        "stride_cols": "i32", "STOCHASTIC": stochastic, "COUNT_DOWN": count_down, "ALIGNED": aligned,
        "SPLIT": dtype == "bf16", "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "BLOCK_R": block_r,
    }  # fmt: skip
    pointers = ("w_ptr", "rows_ptr", "cols_ptr")
    sizes = ("N_ROWS", "N_COLS", "stride_w0", "stride_rows", "stride_cols")
    return module._low_rank_kernel, arguments, pointers + sizes, warps, stages


def check(architecture, variant, result):
    assert result["matrix unit"] > 0
    assert result["cp.async.c"] > 0, "loads are not pipelined"
    assert result["accesses"] == ["ld.global.v4.b32", "st.global.v4.b32"]
