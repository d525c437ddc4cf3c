"""A model directory in the Hugging Face format, edited so that a reader sees the old weights or the new ones.

What decides which weights are in force is one file, replaced by one rename: ``model.safetensors`` itself, or,
for a sharded model, ``model.safetensors.index.json``, which names the shards; a shard with edits gets a new
file name, and the old one goes after the index has been swung. The record of the edits stands in that very
file (its metadata), so weights and record cannot disagree. ``fastedit/`` in the directory holds what a revert
needs: ``edits/<id>/`` and ``originals/``, both written before and swept after.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BaseMismatch, CorruptFile, FasteditError
from ..io import atomic_file, atomic_write_bytes, atomic_write_json, read_json
from .safetensors_file import (
    DTYPES,
    Entry,
    Header,
    encode_header,
    explained,
    read_header,
    read_tensor,
    rewrite,
    write_tensors,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORE, LOCK, RECORD = "fastedit", ".fastedit.lock", "fastedit"
_VERSION = 1
_SHARD = re.compile(r"(?P<stem>.+)\.fastedit-[0-9a-f]{12}\.safetensors$")


@dataclass
class MatrixState:
    """An edited matrix of a directory.

    Attributes:
        base_digest: of its original bits; names the file that keeps them.
        digest: of the bits it holds now.
        transposed: it is stored (d_in, d_out).
        masters: half precision with float32 masters.
        updates: ``{"edit", "weight", "backend", "device"}`` of each edit on it, oldest first.
    """

    base_digest: str
    digest: str
    transposed: bool
    masters: bool
    updates: list[dict[str, str]]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the edits on it, oldest first."""
        return tuple(update["edit"] for update in self.updates)


@dataclass
class Record:
    """The edits in a directory.

    Attributes:
        edits: what ``fastedit list`` shows of each, oldest first.
        matrices: tensor name in the files → its state.
        headers: original file name → checksum of its original header, kept to restore the file's exact bytes.
        index: checksum of the original index; empty for a single file.
    """

    edits: list[dict[str, Any]] = field(default_factory=list)
    matrices: dict[str, MatrixState] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    index: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        matrices = {name: vars(state) for name, state in self.matrices.items()}
        return {
            "version": _VERSION,
            "edits": self.edits,
            "matrices": matrices,
            "headers": self.headers,
            "index": self.index,
        }

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> Record:
        """Read a record back; CorruptFile names the file it stands in."""
        try:
            if content["version"] != _VERSION:
                raise CorruptFile(f"{path} was edited by another version of fastedit: use a newer one")
            matrices = {name: MatrixState(**state) for name, state in content["matrices"].items()}
            return cls(content["edits"], matrices, content["headers"], content["index"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path} holds a record of edits that cannot be read: {error}") from None


class ModelDirectory:
    """The weights of a model directory and the record of the edits in them.

    Args:
        path: a directory with ``model.safetensors``, or shards and their index.

    Raises:
        FasteditError: there are no weights in the safetensors format.
        CorruptFile: a file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        if (self.path / SINGLE).is_file():
            self.files = [SINGLE]
        elif (self.path / INDEX).is_file():
            self.index = self._read_index()
            self.files = sorted(set(self.index["weight_map"].values()))
        else:
            raise FasteditError(_no_weights(self.path))
        self.headers = {file: self._header(file) for file in self.files}
        self.where = {name: file for file, header in self.headers.items() for name in header.entries}
        self.record = self._read_record()

    # -- reading ------------------------------------------------------------------------------------

    def _read_index(self) -> dict[str, Any]:
        path = self.path / INDEX
        index = read_json(path)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise CorruptFile(f"{path} has no weight_map; get it again")
        return index

    def _header(self, file: str) -> Header:
        path = self.path / file
        if not path.is_file():
            raise CorruptFile(f"{self.path / INDEX} names {file}, which is missing; get it again")
        return read_header(path)

    def _read_record(self) -> Record:
        if self.index is not None:
            content = (self.index.get("metadata") or {}).get(RECORD)
            return Record() if content is None else Record.from_dict(content, self.path / INDEX)
        text = (self.headers[SINGLE].metadata or {}).get(RECORD)
        if text is None:
            return Record()
        try:
            return Record.from_dict(json.loads(text), self.path / SINGLE)
        except ValueError:
            raise CorruptFile(f"{self.path / SINGLE} holds a record of edits that is not JSON") from None

    def stored_names(self, names: Iterable[str]) -> list[str]:
        """The tensors of the files that are a weight with these names.

        Checkpoints may lack the model's prefix.

        Raises:
            BaseMismatch: there is none.
        """
        names = list(names)
        found = [name for name in names if name in self.where]
        if not found:
            for name in names:
                found += [n for n in self.where if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if not found:
            raise BaseMismatch(
                f"the edit changes {names[0]}, which the files in {self.path} do not hold: apply the "
                "edit to the "
                "model it was made on"
            )
        return list(dict.fromkeys(found))

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor."""
        return self.headers[self.where[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor as it stands in the files.

        Raises:
            FasteditError: it is quantised.
        """
        entry = self.entry(name)
        if entry.dtype not in DTYPES or len(entry.shape) != 2:
            raise FasteditError(
                f"{name} in {self.path} is {entry.dtype} of shape {entry.shape}; only float matrices "
                "can be edited: "
                "use the model without quantisation"
            )
        return read_tensor(self.headers[self.where[name]], name)

    def original(self, name: str) -> Tensor:
        """An edited tensor's bits from before its first edit."""
        path = self.original_path(self.record.matrices[name].base_digest)
        if not path.is_file():
            raise CorruptFile(
                f"{path} is missing, so {name} cannot be restored; copy the {STORE} folder back, or "
                "get the model again"
            )
        header = read_header(path)
        return read_tensor(header, next(iter(header.entries)))

    # -- the store ----------------------------------------------------------------------------------

    @property
    def store(self) -> Path:
        """Where what a revert needs is kept."""
        return self.path / STORE

    def edit_path(self, edit_id: str) -> Path:
        """Where an edit is kept."""
        return self.store / "edits" / edit_id

    def original_path(self, digest: str) -> Path:
        """Where original bits are kept: a tensor, a header or an index, by checksum."""
        return self.store / "originals" / digest

    def keep_original(self, digest: str, tensor: Tensor) -> None:
        """Store a tensor's original bits; does nothing if they are there."""
        path = self.original_path(digest)
        if not path.exists():
            with explained(path), atomic_file(path) as temporary:
                write_tensors(temporary, {"original": tensor})

    def _keep_bytes(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = self.original_path(digest)
        if not path.exists():
            with explained(path):
                atomic_write_bytes(path, data)
        return digest

    def _kept_bytes(self, digest: str) -> bytes:
        path = self.original_path(digest)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptFile(
                f"{path} is missing or damaged; copy the {STORE} folder back, or get the model again"
            )
        return data

    # -- writing ------------------------------------------------------------------------------------

    def commit(self, record: Record, changed: Mapping[str, Tensor]) -> None:
        """Put a new record and the matrices it speaks of in force, by one rename.

        Args:
            record: what shall be in force; everything it needs is in the store already.
            changed: tensor name → new content.
        """
        if self.index is None:
            self._commit_single(record, changed)
        else:
            self._commit_sharded(record, changed)

    def _commit_single(self, record: Record, changed: Mapping[str, Tensor]) -> None:
        header = self.headers[SINGLE]
        if record.edits:
            kept = self.record.headers.get(SINGLE) or self._keep_bytes(header.raw)
            record.headers = {SINGLE: kept}
            metadata = {"format": "pt", **(header.metadata or {}), RECORD: json.dumps(record.as_dict())}
            raw = encode_header(header.entries, metadata)
        else:
            raw = self._kept_bytes(self.record.headers[SINGLE])
        path = self.path / SINGLE
        with explained(path), atomic_file(path) as temporary:
            rewrite(header, temporary, changed, raw)

    def _commit_sharded(self, record: Record, changed: Mapping[str, Tensor]) -> None:
        renamed = {}
        for file in sorted({self.where[name] for name in changed}):
            new = self._shard_name(file, record)
            path = self.path / new
            with explained(path), atomic_file(path) as temporary:
                part = {name: tensor for name, tensor in changed.items() if self.where[name] == file}
                rewrite(self.headers[file], temporary, part, self.headers[file].raw)
            renamed[file] = new
        path = self.path / INDEX
        if not record.edits:
            data = self._kept_bytes(self.record.index)
        else:
            record.index = self.record.index or self._keep_bytes(path.read_bytes())
            index = dict(self.index or {})
            index["weight_map"] = {name: renamed.get(f, f) for name, f in index["weight_map"].items()}
            index["metadata"] = {**(index.get("metadata") or {}), RECORD: record.as_dict()}
            data = json.dumps(index, indent=2).encode()
        with explained(path):
            atomic_write_bytes(path, data)

    def original_file(self, file: str) -> str:
        """The name that a shard had before it was edited."""
        match = _SHARD.fullmatch(file)
        return f"{match['stem']}.safetensors" if match else file

    def _shard_name(self, file: str, record: Record) -> str:
        original = self.original_file(file)
        states = {
            name: state.digest
            for name, state in record.matrices.items()
            if self.where[name] == file and state.updates
        }
        if not states:
            return original
        content = hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()[:12]
        return f"{original.removesuffix('.safetensors')}.fastedit-{content}.safetensors"

    # -- tidying ------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what no record speaks of: leftovers of a run that was killed, and former shards."""
        self._sweep_shards()
        for name in (SINGLE, INDEX, *map(re.escape, self.files)):
            for file in self.path.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)
        keep = {
            *(state.base_digest for state in self.record.matrices.values()),
            *self.record.headers.values(),
            self.record.index,
        }
        remove_others(self.store / "originals", keep)
        remove_others(self.store / "edits", {edit["id"] for edit in self.record.edits})
        if not self.record.edits:
            remove_others(self.store, set())
            with contextlib.suppress(OSError):
                self.store.rmdir()

    def _sweep_shards(self) -> None:
        if self.index is None:
            return
        ours = {self.original_file(file) for file in self.files}
        for file in [*self.path.glob("*.safetensors"), *self.path.glob(".*.safetensors.*.tmp")]:
            name = file.name
            if name.endswith(".tmp"):
                name = re.sub(r"\.[^.]+\.tmp$", "", name.removeprefix("."))
            if name == file.name and name in self.files:
                continue
            if self.original_file(name) in ours:
                file.unlink(missing_ok=True)

    def refuse_links(self) -> None:
        """Refuse to edit a directory whose weights are links into a shared cache.

        Raises:
            FasteditError: they are.
        """
        for file in [*self.files, *([INDEX] if self.index is not None else [])]:
            if (self.path / file).is_symlink():
                raise FasteditError(
                    f"{self.path / file} is a link, probably into the cache of the Hugging Face hub, "
                    "which is not "
                    "changed in place: write a new directory instead (--out NEW_DIR)"
                )


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the directory's lock.

    Raises:
        FasteditError: another process holds it, or there is no such directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise FasteditError(f"there is no model directory {path}")
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FasteditError(
                f"another process is editing {path}: wait until it is done, then run this again"
            ) from None
        yield
    finally:
        os.close(handle)


def copy_model(source: str | Path, target: Path, *, weights: bool = True) -> None:
    """Copy a model directory file by file into ``target``, links resolved, without locks and leftovers.

    Args:
        source: the directory.
        target: an existing, empty directory.
        weights: with its weights and the record of edits; else everything but those.
    """
    directory = ModelDirectory(source)
    wanted = {*directory.files, *([INDEX] if directory.index is not None else [])} if weights else set()
    for item in sorted(Path(source).iterdir()):
        name = item.name
        if name == STORE:
            if weights and item.is_dir():
                shutil.copytree(item, target / name)
        elif name == LOCK or name.endswith(".tmp") or (item.is_dir() and name.startswith(".")):
            continue
        elif item.is_dir():
            shutil.copytree(item, target / name)
        elif name in wanted or not _is_weights(name):
            with explained(target / name):
                shutil.copy2(item, target / name)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json"))


def set_dtype(config: Path, dtype: str) -> None:
    """Write a dtype into a model's config.json, under the name that stands there."""
    if not config.is_file():
        return
    content = read_json(config)
    for key in [key for key in ("dtype", "torch_dtype") if key in content] or ["torch_dtype"]:
        content[key] = dtype
    atomic_write_json(config, content)


def remove_others(folder: Path, keep: set[str]) -> None:
    """Remove what is in a folder but for the names to keep, and the folder if nothing is left."""
    if not folder.is_dir():
        return
    for item in folder.iterdir():
        if item.name in keep:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _no_weights(path: Path) -> str:
    if not path.is_dir():
        return f"there is no model directory {path}"
    if list(path.glob("pytorch_model*.bin")):
        return (
            f"{path} holds weights as pytorch_model.bin only: load the model and save it with "
            "model.save_pretrained(directory), which writes safetensors, then edit that"
        )
    return (
        f"{path} holds neither {SINGLE} nor {INDEX}: give the directory of a model saved by save_pretrained"
    )
