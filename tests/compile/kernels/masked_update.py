"""What tests/compile/test_triton.py compiles of ``masked_update`` and what must come out."""

from __future__ import annotations

VARIANTS = {  # name: (kernel, dtype of weight, kind of mask, layout or flat, decays all and clamps)
    "sgd": ("sgd", "fp32", 1, "flat", True),
    "sgd_bf16_bits": ("sgd", "bf16", 2, "flat", False),
    "sgd_in_out": ("sgd", "fp32", 1, "tile", True),
    "sgd_product": ("sgd", "fp32", 1, "product", True),
    "adam": ("adam", "fp32", 1, "flat", True),
    "adam_bf16_strided": ("adam", "bf16", 2, "strided", False),
    "bits": ("bits", "fp32", 1, "flat", False),
    "listed": ("listed", "fp32", 1, "flat", False),
}
QUICK = ("sgd", "adam")


def launch(architecture, variant):
    """Kernel, its arguments, those that divide by 16, warps, stages: as on contiguous tensors of usual sizes."""
    from fastedit.kernels import masked_update as module

    name, dtype, kind, layout, dense = VARIANTS[variant]
    return {"sgd": _sgd, "adam": _adam, "bits": _bits, "listed": _listed}[name](
        module, architecture, dtype, kind, layout, dense
    )


PHILOX = {"seed": "i64", "shard": "i32", "layer": "i32", "threshold": "i64"}


def _sgd(module, architecture, dtype, kind, layout, dense):
    rows, columns, step, warps, stages = module.sgd_configuration(architecture, layout)
    strides = {f"stride_{t}{i}": "i32" if i == 0 else 1 for t in "wgt" for i in (0, 1)}
    if layout == "product":
        strides["stride_g1"] = "i32"
    arguments = {
        "w_ptr": "*" + dtype, "g_ptr": "*fp32", "right_ptr": "*fp32", "to_ptr": "*fp32", "bits_ptr": "*u8",
        "N_ROWS": 1 if layout == "flat" else "i32", "N_COLS": "i32", "RANK": "i32", "lr": "fp32", "decay": "fp32",
        "clamp": "fp32", **PHILOX, **strides, "KIND": kind, "DECAYS": True, "DECAYS_ALL": dense, "CLAMPS": dense,
        "PRODUCT": layout == "product", "COUNT_DOWN": layout == "tile", "ALIGNED": True, "BLOCK_ROWS": rows,
        "BLOCK_COLS": columns, "BLOCK_R": step,
    }  # fmt: skip
    divisible = (
        "w_ptr",
        "g_ptr",
        "right_ptr",
        "to_ptr",
        "bits_ptr",
        "N_COLS",
        "stride_w0",
        "stride_g0",
        "stride_t0",
    )
    divisible += () if layout == "flat" else ("N_ROWS",)
    divisible += ("RANK", "stride_g1") if layout == "product" else ()
    return module._sgd_kernel, arguments, divisible, warps, stages


def _adam(module, architecture, dtype, kind, layout, dense):
    arguments = {
        "w_ptr": "*" + dtype, "g_ptr": "*fp32", "to_ptr": "*fp32", "bits_ptr": "*u8", "m_ptr": "*fp32",
        "v_ptr": "*fp32", "offsets_ptr": "*i64", "N": "i32", "N_COLS": "i32",
        **dict.fromkeys(
            ("first_rate", "second", "second_rate", "rate", "correction", "eps", "gradient_decay",
             "weight_decay", "clamp"), "fp32",
        ),
        **PHILOX, **{f"stride_{t}{i}": "i32" for t in "wgt" for i in (0, 1)}, "KIND": kind,
        "FLAT": layout == "flat", "DECAYS_GRADIENT": False, "DECAYS": dense, "DECAYS_ALL": dense,
        "CLAMPS": dense, "BLOCK": module.MASK_BLOCK, "STEP": module._ADAM[layout == "flat"][0],
    }  # fmt: skip
    pointers = ("w_ptr", "g_ptr", "to_ptr", "bits_ptr", "m_ptr", "v_ptr", "offsets_ptr", "N")
    return module._adam_kernel, arguments, pointers, module._ADAM[layout == "flat"][1], 3


def _bits(module, architecture, dtype, kind, layout, dense):
    arguments = {"bits_ptr": "*u8", "N_BYTES": "i32", **PHILOX, "first": "i64", "BLOCK": module._BITS}
    return module._bits_kernel, arguments, ("bits_ptr", "N_BYTES"), 4, 3


def _listed(module, architecture, dtype, kind, layout, dense):
    numbers = ["lr", "decay", "first_rate", "second", "second_rate", "rate", "correction", "eps"]
    numbers.append("weight_decay")
    arguments = {
        "w_ptr": "*" + dtype, "g_ptr": "*fp32", "right_ptr": "*fp32", "indices_ptr": "*i32", "m_ptr": "*fp32",
        "v_ptr": "*fp32", "COUNT": "i32", "N": "i32", "N_COLS": "i32", "RANK": "i32",
        **dict.fromkeys(numbers, "fp32"),
        **{f"stride_{t}{i}": "i32" for t in "wg" for i in (0, 1)}, "DECAYS_GRADIENT": True,
        "DECAYS": True, "ADAM": True, "PRODUCT": True,
        "BLOCK": module._LISTED,
    }  # fmt: skip
    pointers = ("w_ptr", "g_ptr", "right_ptr", "indices_ptr", "m_ptr", "v_ptr")
    return module._listed_kernel, arguments, pointers, 4, 3


def check(architecture, variant, result):
    _name, dtype, _kind, layout, dense = VARIANTS[variant]
    assert not any(access.startswith(("atom", "red")) for access in result["accesses"])
    if layout == "product":
        assert result["matrix unit"] > 0
    elif dense and dtype == "fp32":
        assert "st.global.v4.b32" in result["accesses"], result["accesses"]
        assert "ld.global.v4.b32" in result["accesses"], result["accesses"]
