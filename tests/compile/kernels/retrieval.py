"""What tests/compile/test_triton.py compiles of ``retrieval`` and what must come out."""

from __future__ import annotations

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "i8": "int8"}
VARIANTS = {  # name: (kernel, dtype of keys, queries, nearest, scale and alive, k)
    "bf16": ("scan", "bf16", 256, False, False, 1),
    "bf16_one": ("scan", "bf16", 1, False, False, 1),
    "fp16_nearest": ("scan", "fp16", 256, True, True, 1),
    "fp32": ("scan", "fp32", 256, True, False, 1),
    "fp32_one": ("scan", "fp32", 1, True, False, 1),
    "int8": ("scan", "i8", 256, False, True, 1),
    "int8_one": ("scan", "i8", 1, False, True, 1),
    "exact": ("exact", "bf16", 1, True, False, 1),
    "exact_64": ("exact", "fp32", 1, False, True, 64),
    "exact_int8": ("exact", "i8", 1, False, True, 4),
}
QUICK = ("bf16_one",)


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    import torch

    from fastedit.kernels import retrieval as module

    kernel, dtype, queries, nearest, options, k = VARIANTS[variant]
    block_b, block_n, block_d, warps, stages, exact_d, group = module.configuration(
        architecture, getattr(torch, DTYPES[dtype]), queries
    )
    optional = {"scale_ptr": "*fp32", "alive_ptr": "*u8" if options else "*fp32"}
    common = {
        "stride_qb": "i32", "stride_qd": 1, "stride_kn": "i32", "stride_kd": 1,
        "stride_scale": 1 if options else "i32", "stride_alive": 1 if options else "i32",
        "NEAREST": nearest, "HAS_SCALE": options and dtype == "i8", "HAS_ALIVE": options, "BLOCK_N": block_n,
    }  # fmt: skip
    divisible = [
        "queries_ptr",
        "keys_ptr",
        "scale_ptr",
        "alive_ptr",
        "upper_ptr",
        "D",
        "stride_qb",
        "stride_kn",
    ]
    if kernel == "scan":
        arguments = {
            "upper_ptr": "*fp32", "lower_ptr": "*fp32", "queries_ptr": "*fp32", "norms_ptr": "*fp32",
            "keys_ptr": "*" + dtype, **optional, "B": "i32", "N": "i32", "D": "i32", "TILES": "i32",
            "gamma": "fp32", "floor": "fp32", **common, "BLOCK_B": block_b, "BLOCK_D": block_d,
        }  # fmt: skip
        order = list_of(module._scan_kernel)
        return module._scan_kernel, {n: arguments[n] for n in order}, divisible, warps, stages
    arguments = {
        "values_ptr": "*fp64", "order_ptr": "*i64", "upper_ptr": "*fp32", "bar_ptr": "*fp32",
        "queries_ptr": "*fp32", "keys_ptr": "*" + dtype, **optional, "N": "i32", "D": "i32", "TILES": "i32",
        **common, "SIGN": 1, "K": k, "KEPT": max(2, k), "GROUP": group, "BLOCK_D": exact_d,
    }  # fmt: skip
    return module._exact_kernel, {n: arguments[n] for n in list_of(module._exact_kernel)}, divisible, 4, 3


def list_of(kernel):
    """The names of a kernel's arguments in their order."""
    return list(kernel.arg_names)


def check(architecture, variant, result):
    kernel, _, queries = VARIANTS[variant][:3]
    if kernel == "scan":
        few = queries == 1  # 16 queries are too few for the matrix units of sm_90 and sm_100
        assert result["mma.sync" if few else "matrix unit"] > 0
        assert result["cp.async.c"] > 0, "loads are not pipelined"
