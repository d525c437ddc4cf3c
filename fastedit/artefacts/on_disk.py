"""Edits in model directories: apply, revert, list, export; whole or not at all, whenever the process dies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, CorruptFile, FasteditError, NumericalError
from ..io import atomic_directory, atomic_write_json
from ..models.fingerprint import weight_digest
from ..progress import progress
from .adapter import export_adapter
from .edit import Edit
from .model_directory import INDEX, RECORD, MatrixState, ModelDirectory, Record, copy_model, locked, set_dtype
from .position import check_position
from .render import HALF, Update, chosen_backend, render
from .safetensors_file import DTYPES, convert, encode_header, explained, rewrite
from .stack import stack_of
from .storage import load_edit, save_edit

if TYPE_CHECKING:
    from ..memory.edit import MemoryEdit

Format = Literal["full", "lora"]


def apply_to_directory(
    edit: Edit | MemoryEdit | str | Path,
    model_dir: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write an edit into the files of a model directory, where it can be reverted.

    Only files that hold edited matrices are written anew. Killed at any point, or with a full disk, the
    directory loads as it was before or as it is after.

    Args:
        edit: the edit or its directory. An edit of a memory is put beside the weights, which stay as they are.
        model_dir: ``model.safetensors``, or shards with their index, beside the config.
        out: a new directory for the edited model; ``model_dir`` stays as it is.
        force: apply it to another base or at another position as well.
        device: where to compute.

    Returns:
        One row as of :func:`list_directory`.

    Raises:
        BaseMismatch: the edit was made on other weights, or the files were changed by something else.
        FasteditError: the edit is there already; another process edits the directory; the disk is full.
    """
    loaded = load_edit(edit) if isinstance(edit, (str, Path)) else edit
    if out is not None:
        with explained(out), atomic_directory(out) as temporary:
            copy_model(model_dir, temporary)
            return _apply(loaded, temporary, force, device)
    with locked(model_dir):
        return _apply(loaded, Path(model_dir), force, device)


def revert_directory(
    model_dir: str | Path, which: str = "last", *, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Take edits out of a model directory; with the last one gone the files have their original bytes.

    Args:
        model_dir: the directory.
        which: ``"last"``, ``"all"``, or an edit's id or the start of it.
        device: where to compute, if other edits remain on a matrix.

    Returns:
        The rows of the edits that were taken out.

    Raises:
        FasteditError: there is no such edit; another process edits the directory; the disk is full.
        BaseMismatch: the files were changed by something else.
    """
    from ..memory.directory import memory_rows, remove_from_directory

    with locked(model_dir):
        directory = ModelDirectory(model_dir)
        gone = _chosen(_rows(directory), directory.path, which)
        ids = {row["id"] for row in gone}
        in_memory = ids & {row["id"] for row in memory_rows(directory.path)}
        if in_memory:
            remove_from_directory(directory.path, in_memory)
        if ids - in_memory:
            _revert_weights(directory, ids - in_memory, device)
        return gone


def list_directory(model_dir: str | Path) -> list[dict[str, Any]]:
    """The edits in a model directory, oldest first.

    Returns:
        A row for each: ``id``, ``method``, ``facts`` and ``matrices`` (how many), ``rank``, ``bytes``,
        ``applied`` (UTC).

    Raises:
        FasteditError: there are no weights in the safetensors format.
        CorruptFile: a file is damaged.
    """
    return _rows(ModelDirectory(model_dir))


def export(
    edits: Sequence[Edit | MemoryEdit | str | Path],
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Format = "full",
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    force: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Path:
    """Write an edited model as a plain directory for other programs, or the edits as a LoRA adapter.

    The result holds no record of edits and cannot be reverted; ``model`` stays as it is.

    Args:
        edits: edits or their directories, in order. May be empty for ``"full"``.
        model: a model directory or a live model. Edits that are on it already count as part of it.
        out: the new directory.
        format: ``"full"``: config, tokenizer and weights. ``"lora"``: a PEFT adapter of the given edits.
        dtype: of the weights of ``"full"``; None keeps each tensor's.
        tokenizer: saved along with a live model.
        force: apply edits made on another base as well.
        overwrite: replace what is at ``out``.
        device: where to compute for a model directory.

    Returns:
        ``out``.

    Raises:
        BaseMismatch: an edit does not fit the model.
        FasteditError: no weights, full disk, changes that a LoRA adapter cannot hold, or a memory, which is no
            change of weights.
    """
    given = [load_edit(edit) if isinstance(edit, (str, Path)) else edit for edit in edits]
    _refuse_memories(given, model)
    loaded = [edit for edit in given if isinstance(edit, Edit)]
    kind = _dtype(dtype)
    if format == "lora":
        return export_adapter(loaded, out, model, overwrite=overwrite)
    if format != "full":
        raise ValueError(f"format must be 'full' or 'lora', got {format!r}")
    with explained(out), atomic_directory(out, overwrite=overwrite) as temporary:
        if isinstance(model, nn.Module):
            _export_live(loaded, model, temporary, kind, tokenizer, force)
        else:
            _export_directory(loaded, Path(model), temporary, kind, force, device)
    return Path(out)


# ------------------------------------------------------------------ working on a directory


class _Work:
    """Edited matrices of a directory in memory, and the record that will speak of them."""

    def __init__(self, directory: ModelDirectory, device: str) -> None:
        self.directory = directory
        self.device = device
        self.record: Record = deepcopy(directory.record)
        self.changed: dict[str, Tensor] = {}
        self.originals: dict[str, Tensor] = {}
        self.edits: dict[str, Edit] = {}

    def add(self, edit: Edit, *, force: bool) -> dict[str, Any]:
        """Put an edit on top; nothing is written yet."""
        if any(row["id"] == edit.id for row in self.record.edits):
            raise FasteditError(f"{edit!r} is in {self.directory.path} already")
        if not edit.matrices:
            raise FasteditError(f"{edit!r} was never applied to a model: commit or apply it first")
        for name in edit.weight_names:
            aliases = edit.matrices[name].aliases or (name,)
            for stored in self.directory.stored_names((name, *aliases)):
                self._add_to(stored, edit, name, force)
        self.edits[edit.id] = edit
        row = _row(edit)
        self.record.edits.append(row)
        return row

    def remove(self, ids: set[str]) -> None:
        """Take edits out; those above them are applied again."""
        for stored, state in list(self.record.matrices.items()):
            remaining = [update for update in state.updates if update["edit"] not in ids]
            if len(remaining) == len(state.updates):
                continue
            self._current(stored)
            original = self._original(stored)
            state.updates = remaining
            self._render(stored, state, original)
            if not remaining:
                del self.record.matrices[stored]
        self.record.edits = [row for row in self.record.edits if row["id"] not in ids]

    def _add_to(self, stored: str, edit: Edit, name: str, force: bool) -> None:
        current = self._current(stored)
        state = self.record.matrices.get(stored)
        if state is None:
            digest = weight_digest(current)
            state = MatrixState(digest, digest, edit.matrices[name].transposed, current.dtype in HALF, [])
        _check_shape(edit, name, current, state.transposed)
        if not force:
            self._check_fits(edit, name, current, state)
        original = current if not state.updates else self._original(stored)
        self.originals[stored] = original
        change = edit.change(name)
        like = torch.empty(0, 0, dtype=torch.float32 if state.masters else current.dtype, device=self.device)
        backend = chosen_backend(change, like, edit.matrices[name].backend)
        update = {"edit": edit.id, "weight": name, "backend": backend, "device": str(like.device)}
        state.updates = [*state.updates, update]
        self.edits[edit.id] = edit
        self._render(stored, state, original)
        self.record.matrices[stored] = state

    def _check_fits(self, edit: Edit, name: str, current: Tensor, state: MatrixState) -> None:
        record = edit.matrices[name]
        dtype = str(current.dtype).removeprefix("torch.")
        widened = current.dtype in HALF and record.dtype == "float32" and not state.updates
        if widened and weight_digest(current.float()) == record.before_digest:
            return  # the edit was made on these weights, loaded in float32
        check_position(edit, name, state.digest, state.base_digest, state.ids, dtype)

    def _current(self, stored: str) -> Tensor:
        """The matrix as it is now; makes sure that nothing else changed the file."""
        if stored in self.changed:
            return self.changed[stored]
        tensor = self.directory.read(stored)
        state = self.record.matrices.get(stored)
        if state is not None and weight_digest(tensor) != state.digest:
            raise BaseMismatch(
                f"{stored} in {self.directory.path} was changed by something else since it was "
                "edited, so the edits "
                "on it can neither be reverted nor added to: get the model again. Nothing was touched"
            )
        return tensor

    def _original(self, stored: str) -> Tensor:
        if stored not in self.originals:
            original = self.directory.original(stored)
            digest = self.record.matrices[stored].base_digest
            if weight_digest(original) != digest:
                path = self.directory.original_path(digest)
                raise FasteditError(f"{path} is damaged, so {stored} cannot be restored; get the model again")
            self.originals[stored] = original
        return self.originals[stored]

    def _render(self, stored: str, state: MatrixState, original: Tensor) -> None:
        updates = [
            Update(u["edit"], self._edit(u["edit"]).change(u["weight"]), u["backend"], u["device"])
            for u in state.updates
        ]
        try:
            tensor, _ = render(
                original, updates, transposed=state.transposed, device=self.device, masters=state.masters
            )
        except NumericalError as error:
            raise NumericalError(f"{stored}: {error}") from None
        self.changed[stored] = tensor.cpu()
        state.digest = weight_digest(tensor)

    def _edit(self, edit_id: str) -> Edit:
        if edit_id not in self.edits:
            path = self.directory.edit_path(edit_id)
            edit = load_edit(path)
            if not isinstance(edit, Edit):
                raise CorruptFile(f"{path} must hold a change of weights, it holds an edit of a memory")
            self.edits[edit_id] = edit
        return self.edits[edit_id]


def _apply(edit: Edit | MemoryEdit, path: Path, force: bool, device: str) -> dict[str, Any]:
    if not isinstance(edit, Edit):
        from ..memory.directory import add_to_directory

        return add_to_directory(edit, path, force=force)
    directory = ModelDirectory(path)
    directory.refuse_links()
    directory.sweep()
    work = _Work(directory, device)
    row = work.add(edit, force=force)
    for stored, state in work.record.matrices.items():
        if stored in work.changed:
            directory.keep_original(state.base_digest, work.originals[stored])
    save_edit(edit, directory.edit_path(edit.id), keep_originals=False, overwrite=True)
    directory.commit(work.record, work.changed)
    ModelDirectory(path).sweep()
    return row


def _revert_weights(directory: ModelDirectory, ids: set[str], device: str) -> None:
    directory.refuse_links()
    directory.sweep()
    work = _Work(directory, device)
    work.remove(ids)
    directory.commit(work.record, work.changed)
    ModelDirectory(directory.path).sweep()


def _rows(directory: ModelDirectory) -> list[dict[str, Any]]:
    """Edits of the weights and of memories, oldest first."""
    from ..memory.directory import memory_rows

    rows = [*directory.record.edits, *memory_rows(directory.path)]
    return sorted(rows, key=lambda row: datetime.fromisoformat(row["applied"]))


def _refuse_memories(edits: Iterable[Edit | MemoryEdit], model: nn.Module | str | Path) -> None:
    from ..memory.directory import load_edits
    from ..memory.edit import cannot_merge
    from ..memory.side_module import sides_of

    found = [edit for edit in edits if not isinstance(edit, Edit)]
    if isinstance(model, nn.Module):
        found += [edit for side in sides_of(model) for edit in side.edits]
    else:
        found += load_edits(model)
    if found:
        raise cannot_merge(found)


def _chosen(rows: list[dict[str, Any]], path: Path, which: str) -> list[dict[str, Any]]:
    if not rows:
        raise FasteditError(f"there are no edits in {path}: nothing to revert")
    if which in ("last", "all"):
        return rows[-1:] if which == "last" else list(rows)
    found = [row for row in rows if row["id"].startswith(which)]
    if len(found) != 1 or not which:
        known = ", ".join(row["id"] for row in rows)
        problem = "no edit" if not found else f"{len(found)} edits"
        raise FasteditError(f"{problem} in {path} with an id like {which!r}; there are {known}")
    return found


def _row(edit: Edit) -> dict[str, Any]:
    return {
        "id": edit.id,
        "method": edit.method,
        "facts": len(edit.facts),
        "matrices": len(edit.weight_names),
        "rank": edit.rank,
        "bytes": edit.size_bytes,
        "applied": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _check_shape(edit: Edit, name: str, tensor: Tensor, transposed: bool) -> None:
    rows, columns = tensor.shape
    shape = (columns, rows) if transposed else (rows, columns)
    if edit.change(name).shape != shape:
        raise BaseMismatch(
            f"the change of {name} has shape {edit.change(name).shape}, the weight in the files is {shape} "
            "(d_out, d_in): apply the edit to the model it was made on"
        )
    if not edit.change(name).is_finite():
        raise NumericalError(f"the change of {name} is not finite: nothing was applied")


# ------------------------------------------------------------------ exporting


def _export_directory(
    edits: Iterable[Edit], source: Path, target: Path, dtype: torch.dtype | None, force: bool, device: str
) -> None:
    directory = ModelDirectory(source)
    work = _Work(directory, device)
    there = {row["id"] for row in directory.record.edits}
    for edit in edits:
        if edit.id not in there:
            work.add(edit, force=force)
    copy_model(source, target, weights=False)
    weight_map, total = {}, 0
    for file in progress(directory.files, desc="writing weights", unit="file"):
        header = directory.headers[file]
        path = target / directory.original_file(file)
        if dtype is None:
            metadata = {k: v for k, v in (header.metadata or {}).items() if k != RECORD}
            raw = encode_header(header.entries, {"format": "pt", **metadata})
            rewrite(header, path, {n: t for n, t in work.changed.items() if directory.where[n] == file}, raw)
            total += header.data_bytes
        else:
            total += convert(header, path, work.changed, dtype)
        weight_map.update(dict.fromkeys(header.entries, path.name))
    if directory.index is not None:
        metadata = {k: v for k, v in (directory.index.get("metadata") or {}).items() if k != RECORD}
        content = {**directory.index, "metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
        atomic_write_json(target / INDEX, content)
    if dtype is not None:
        set_dtype(target / "config.json", str(dtype).removeprefix("torch."))


def _export_live(
    edits: Iterable[Edit],
    model: nn.Module,
    target: Path,
    dtype: torch.dtype | None,
    tokenizer: Any,
    force: bool,
) -> None:
    stack = stack_of(model)
    model = stack.model
    pushed = []
    try:
        for edit in edits:
            if edit not in stack:
                stack.push(edit, force=force)
                pushed.append(edit)
        options: dict[str, Any] = {}
        if dtype is not None:
            options["state_dict"] = {
                name: tensor.to(dtype) if tensor.dtype in DTYPES.values() else tensor
                for name, tensor in model.state_dict().items()
            }
        model.save_pretrained(target, **options)  # type: ignore[operator]
    finally:
        for edit in reversed(pushed):
            stack.remove(edit)
    if dtype is not None:
        set_dtype(target / "config.json", str(dtype).removeprefix("torch."))
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found
