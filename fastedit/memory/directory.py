"""Memories in model directories, beside the weights.

``fastedit_memory/`` in a directory holds each edit in a folder of its own and ``memory.json``, which lists those in
force, oldest first. It is replaced by one rename, so a reader sees the memory before or after, never in between.
``transformers`` reads the directory as the base model; :func:`load_model` attaches the memories as well.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artefacts.model_directory import ModelDirectory, remove_others
from ..artefacts.safetensors_file import explained
from ..errors import BaseMismatch, CorruptFile
from ..io import atomic_directory, atomic_write_json, read_json
from ..models.describe import unwrap
from ..models.fingerprint import weight_digest
from .edit import MemoryEdit, load_memory_edit, require_compatible

logger = logging.getLogger(__name__)

FOLDER = "fastedit_memory"
_LIST, _FORMAT, _VERSION = "memory.json", "fastedit-memory", 1


def memory_rows(model_dir: str | Path) -> list[dict[str, Any]]:
    """The memory edits in a model directory, oldest first; a row each as of ``list_directory``.

    Raises:
        CorruptFile: the list is damaged.
    """
    path = Path(model_dir) / FOLDER / _LIST
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (
        _FORMAT,
        _VERSION,
    ):
        raise CorruptFile(f"{path} is no list of memory edits of version {_VERSION}")
    return list(content["edits"])


def load_edits(model_dir: str | Path) -> list[MemoryEdit]:
    """The memory edits in a model directory, oldest first.

    Raises:
        CorruptFile: the list or an edit is damaged or missing.
    """
    return [load_memory_edit(Path(model_dir) / FOLDER / _place(row)) for row in memory_rows(model_dir)]


def _place(row: dict[str, Any]) -> str:
    """The folder of an edit: its id, or another if its content was written anew."""
    return str(row.get("folder", row["id"]))


def add_to_directory(edit: MemoryEdit, model_dir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Put an edit on top of those in a model directory, whose lock is held; returns its row.

    Raises:
        BaseMismatch: it was made on other weights, or the memory there has other settings.
        FasteditError: it is there already, or would replace edits that it does not hold.
    """
    model_dir = Path(model_dir)
    rows = memory_rows(model_dir)
    directory = ModelDirectory(model_dir)
    directory.refuse_links()
    if not force:
        _check_weight(edit, directory)
    there = [
        other for other in load_edits(model_dir) if (other.method, other.layer) == (edit.method, edit.layer)
    ]
    require_compatible(edit, there, force)
    folder = model_dir / FOLDER
    edit.save(folder / edit.id, overwrite=True)
    row = _row(edit)
    _commit(folder, [*rows, row])
    return row


def remove_from_directory(model_dir: str | Path, ids: Iterable[str]) -> None:
    """Take edits out of a model directory, whose lock is held.

    Raises:
        FasteditError: the newest state of a memory was trained on top of one of them and stays. Nothing changes.
    """
    ids, folder = set(ids), Path(model_dir) / FOLDER
    rows = {row["id"]: row for row in memory_rows(model_dir)}
    rest = [row for row in rows.values() if row["id"] not in ids]
    for number, row in enumerate(rest):
        lost = [rows[each] for each in row["beneath"] if each in ids and each in rows]
        if row["whole_state"] and lost:
            rest[number] = _without(folder, row, lost)
    _commit(folder, rest)


def _without(folder: Path, row: dict[str, Any], lost: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the content of an edit without those beneath it that are taken out, in a new folder; its new row."""
    from ..editors.memory_editor import memory_class

    edit = load_memory_edit(folder / _place(row))
    for other in lost:
        gone = load_memory_edit(folder / _place(other))
        edit.take_over(memory_class(edit.method).without(edit, gone), gone)
    names = (f"{edit.id}-{number}" for number in itertools.count(1))
    place = next(name for name in names if not (folder / name).exists())
    edit.save(folder / place)
    return {**row, "folder": place, "bytes": edit.size_bytes, "beneath": list(edit.beneath)}


def attach_saved(model: nn.Module, model_dir: str | Path) -> list[MemoryEdit]:
    """Attach the memories of a directory to the model that was loaded from it.

    If the weights are not those that the memories were made on (another precision, later weight edits), this is
    logged as a warning: keys may not be met any more.
    """
    edits = load_edits(model_dir)
    for edit in edits:
        try:
            edit.apply(model)
        except BaseMismatch as error:
            logger.warning(
                "the memory in %s is used on other weights than it was made on: %s", model_dir, error
            )
            edit.apply(model, force=True)
    return edits


def save_model(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, *, overwrite: bool = False
) -> Path:
    """Write a model with its memories as one directory, whole or not at all.

    Other programs read it as the base model, by the usual names of its weights.

    Args:
        model: a model of transformers.
        directory: where; must not exist or be empty unless ``overwrite``.
        tokenizer: saved along.
        overwrite: replace what is there.

    Returns:
        The directory.
    """
    from .side_module import sides_of

    directory = Path(directory)
    edits = [edit for side in sides_of(model) for edit in side.edits if not edit.released]
    with explained(directory), atomic_directory(directory, overwrite=overwrite) as temporary:
        unwrap(model).save_pretrained(temporary)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for edit in edits:
            edit.save(temporary / FOLDER / edit.id)
        if edits:
            _commit(temporary / FOLDER, [_row(edit) for edit in edits])
    return directory


def load_model(directory: str | Path, **options: Any) -> Any:
    """Load a model that :func:`save_model` or ``fastedit edit --save-model`` wrote, with its memories attached.

    Args:
        directory: of the model; any model directory or name will do.
        **options: for ``AutoModelForCausalLM.from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        The model, in evaluation mode.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    attach_saved(model, directory)
    return model


def _commit(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put a new list in force, then remove what it does not name."""
    folder.mkdir(exist_ok=True)
    atomic_write_json(folder / _LIST, {"format": _FORMAT, "version": _VERSION, "edits": list(rows)})
    remove_others(folder, {_LIST, *map(_place, rows)} if rows else set())


def _row(edit: MemoryEdit) -> dict[str, Any]:
    from ..editors.memory_editor import memory_class

    return {
        "id": edit.id,
        "method": edit.method,
        "facts": len(edit.facts),
        "matrices": 0,
        "rank": 0,
        "bytes": edit.size_bytes,
        "applied": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "layer": edit.layer,
        "beneath": list(edit.beneath),
        "whole_state": memory_class(edit.method).whole_state,
    }


def _check_weight(edit: MemoryEdit, directory: ModelDirectory) -> None:
    """Make sure that the projection in the files has the bits that the edit was made beside."""
    (stored, *_) = directory.stored_names((edit.base.weight,))
    weight = directory.read(stored).to(getattr(torch, edit.base.dtype))
    if weight_digest(weight) != edit.base.digest:
        raise BaseMismatch(
            f"{edit!r} does not fit {directory.path}: {stored} has other bits than the weight it was made beside. To "
            "apply it all the same, pass force=True (--force). Nothing was touched"
        )
