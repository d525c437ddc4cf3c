"""What tests/compile/test_triton.py compiles of ``ties`` and what must come out."""

from __future__ import annotations

VARIANTS = {  # name: (kernel, dtype)
    "count": ("count", "fp32"),
    "count_bf16": ("count", "bf16"),
    "locate": ("locate", "fp32"),
    "histogram": ("histogram", "fp16"),
    "descend": ("descend", "fp32"),
    "tied": ("tied", "bf16"),
    "quota": ("quota", "fp32"),
    "merge": ("merge", "fp32"),
    "merge_bf16": ("merge", "bf16"),
    "merge_again": ("merge", "fp16"),
}
QUICK = ("count", "merge_bf16")

_TABLES = {
    "address_ptr": "*i64", "keep_ptr": "*i64", "weight_ptr": "*fp32", "bracket_ptr": "*i32", "counts_ptr": "*i32",
    "collected_ptr": "*i32", "state_ptr": "*i64", "bins_ptr": "*i64", "quota_ptr": "*i32", "status_ptr": "*i32",
    "votes_ptr": "*i64", "N": "i32", "M": "i32", "N_TILES": "i32", "CAPACITY": "i32", "scale": "fp32",
    "divisor": "fp32",
}  # fmt: skip


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    from fastedit.kernels import ties as module

    name, dtype = VARIANTS[variant]
    block, group, _, warps = module.configuration(False)
    kernel = getattr(module, f"_{name}_kernel")
    known = {
        **_TABLES, "base_ptr": "*" + dtype, "out_ptr": "*" + dtype, "ALIGNED": True, "GROUP": group,
        "BLOCK": 1024 if name in ("locate", "quota") else block, "SHIFT": 10, "WIDTH": 20, "ALL": False,
        "ELECT": True, "NORMALISE": True, "MAJORITY": variant == "merge_again", "AGAIN": variant == "merge_again",
    }  # fmt: skip
    arguments = {argument: known[argument] for argument in kernel.arg_names}
    divisible = tuple(argument for argument in arguments if argument.endswith("_ptr") or argument == "N")
    return kernel, arguments, divisible, warps if name not in ("locate", "quota", "descend") else 4, 3


def check(architecture, variant, result):
    assert result["matrix unit"] == 0
    if variant in ("count", "merge"):
        assert "ld.global.v4.b32" in result["accesses"], result["accesses"]
    if variant == "merge":
        assert "st.global.v4.b32" in result["accesses"], result["accesses"]
