"""What tests/compile/test_triton.py compiles of ``low_rank`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# name: (dtype of weight, rank, stochastic rounding, words counted down columns, 4 words a counter, residual)
VARIANTS = {
    "bf16": ("bf16", 100, False, False, True, False),
    "fp32": ("fp32", 100, False, False, True, False),
    "bf16_stochastic": ("bf16", 100, True, False, True, False),
    "bf16_stochastic_in_out": ("bf16", 100, True, True, True, False),
    "bf16_residual": ("bf16", 100, False, False, True, True),
    "bf16_residual_stochastic_in_out": ("bf16", 100, True, True, True, True),
    "bf16_stochastic_odd": ("bf16", 100, True, False, False, False),
    "fp16_stochastic_odd": ("fp16", 100, True, False, False, False),
    "fp16_stochastic_odd_in_out": ("fp16", 100, True, True, False, False),
    "bf16_rank_1": ("bf16", 1, False, False, True, False),
    "fp32_rank_1": ("fp32", 1, False, False, True, False),
    "bf16_rank_8": ("bf16", 8, True, False, True, True),
    "fp16_rank_8_odd_in_out": ("fp16", 8, True, True, False, False),
    "bf16_rank_12": ("bf16", 12, False, False, True, False),
    "prepare": ("bf16", 0, False, False, True, False),
}
QUICK = ("bf16",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import low_rank as module

    dtype, rank, stochastic, count_down, aligned, residual = VARIANTS[variant]
    if variant == "prepare":
        arguments = {
            "out_ptr": "*bf16", "rows_ptr": "*fp32", "cols_ptr": "*fp32", "N_ROWS": "i32", "N_COLS": "i32",
            "R": "i32", "stride_rows": "i32", "stride_cols": "i32", "R_PADDED": "i32", "SPLIT": True,
            "BLOCK": 1024,
        }  # fmt: skip
        return (
            module._prepare_factors_kernel,
            arguments,
            ("out_ptr", "rows_ptr", "cols_ptr", "R_PADDED"),
            4,
            3,
        )
    weight = getattr(torch, DTYPES[dtype])
    config = module.configuration(architecture, weight, rank, stochastic and not aligned, residual)
    block_rows, block_cols, block_r, warps, stages = config
    kind = module.product(weight, rank, residual)
    factor = "*bf16" if kind == "split" else "*fp32"
    arguments = {
        "w_ptr": "*" + dtype, "rows_ptr": factor, "cols_ptr": factor,
        "residual_ptr": "*fp32" if residual else "*" + dtype, "N_ROWS": "i32", "N_COLS": "i32", "R": "i32",
        "alpha": "fp32", "seed": "i64", "stride_w0": "i32", "stride_w1": 1, "stride_rows": "i32",
        "stride_cols": "i32", "stride_residual0": "i32", "stride_residual1": 1, "STOCHASTIC": stochastic,
        "COUNT_DOWN": count_down, "ALIGNED": aligned, "RESIDUAL": residual, "CARRY": residual,
        "PRODUCT": kind, "BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "BLOCK_R": block_r,
    }  # fmt: skip
    if kind == "outer" and rank == 1:
        arguments["R"] = arguments["stride_rows"] = arguments["stride_cols"] = 1
    pointers = ("w_ptr", "rows_ptr", "cols_ptr", "residual_ptr")
    sizes = ("N_ROWS", "N_COLS", "stride_w0", "stride_residual0")
    if kind != "outer":
        sizes += ("R", "stride_rows", "stride_cols")
    return module._low_rank_kernel, arguments, pointers + sizes, warps, stages


def check(architecture, variant, result):
    if variant == "prepare":
        return
    rank = VARIANTS[variant][1]
    assert "ld.global.v4.b32" in result["accesses"]
    assert "st.global.v4.b32" in result["accesses"]
    if rank <= 8:
        assert result["matrix unit"] == 0
        return
    assert result["accesses"] == ["ld.global.v4.b32", "st.global.v4.b32"]
    assert result["matrix unit"] > 0
    assert result["cp.async.c"] > 0, "loads are not pipelined"
