"""Edits as a PEFT LoRA adapter: the factors are the adapter, at scale one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FasteditError
from ..io import atomic_directory, atomic_write_json
from .edit import Edit
from .factors import LowRank
from .safetensors_file import explained, write_tensors


def export_adapter(
    edits: Sequence[Edit], directory: str | Path, model: Any = None, *, overwrite: bool = False
) -> Path:
    """Write edits as one LoRA adapter that ``peft.PeftModel.from_pretrained(base, directory)`` loads.

    A base model with the adapter computes what the edited model computes, up to float32 rounding. Several
    edits are merged by putting their factors side by side, in the order given.

    Args:
        edits: at least one; all of one base model.
        directory: where; must not exist or be empty unless ``overwrite``.
        model: the base model, its name or its directory, to be named in the adapter's config.
        overwrite: replace what is there.

    Returns:
        The directory.

    Raises:
        FasteditError: an edit has dense changes or changes a tied weight, which LoRA cannot express.
        ValueError: no edits.
    """
    if not edits:
        raise ValueError("export_adapter: give at least one edit")
    merged, transposed = _merged(edits)
    if len(set(transposed.values())) > 1:
        raise FasteditError(
            "some edited weights are Conv1D and others Linear, which one LoRA adapter cannot hold: "
            "export the "
            "model in full instead"
        )
    config = _config(merged, any(transposed.values()), _base_name(model))
    directory = Path(directory)
    with explained(directory), atomic_directory(directory, overwrite=overwrite) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", _tensors(merged))
        atomic_write_json(temporary / "adapter_config.json", config)
    return directory


def _merged(edits: Iterable[Edit]) -> tuple[dict[str, LowRank], dict[str, bool]]:
    """Module name → its factors, and whether it stores its weight transposed."""
    parts: dict[str, list[LowRank]] = {}
    transposed: dict[str, bool] = {}
    for edit in edits:
        if edit.dense:
            raise FasteditError(
                f"{edit!r} changes single elements ({', '.join(edit.dense)}), which a LoRA adapter "
                "cannot hold: "
                "export the model in full instead"
            )
        for name, factors in edit.factors.items():
            record = edit.matrices.get(name)
            if record is None:
                raise FasteditError(f"{edit!r} was never applied to a model: commit or apply it first")
            if record.aliases:
                raise FasteditError(
                    f"{name} is tied to {', '.join(n for n in record.aliases if n != name)}, and an "
                    "adapter would "
                    "change one of them only: export the model in full instead"
                )
            module = name.removesuffix(".weight")
            if factors.rank:
                parts.setdefault(module, []).append(factors)
            transposed[module] = record.transposed
    return {module: LowRank.sum(factors) for module, factors in parts.items()}, transposed


def _tensors(merged: dict[str, LowRank]) -> dict[str, Tensor]:
    result = {}
    for module, factors in merged.items():
        result[f"base_model.model.{module}.lora_A.weight"] = factors.right.T.contiguous()
        result[f"base_model.model.{module}.lora_B.weight"] = factors.left
    return result


def _config(merged: dict[str, LowRank], fan_in_fan_out: bool, base: str | None) -> dict[str, Any]:
    ranks = {module: factors.rank for module, factors in merged.items()}
    largest = max(ranks.values(), default=1)
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "modules_to_save": None,
    }


def _base_name(model: Any) -> str | None:
    if model is None or isinstance(model, (str, Path)):
        return None if model is None else str(model)
    return getattr(getattr(model, "config", None), "_name_or_path", "") or None
