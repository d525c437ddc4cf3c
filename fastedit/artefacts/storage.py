"""An edit on disk: one directory that is whole or absent.

``edit.json`` says what the edit is and holds the checksums; ``factors.safetensors`` holds the factors;
``originals.safetensors``, if kept, the matrices exactly as they were right before the edit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import BaseMismatch, CorruptFile, FasteditError
from ..facts import Fact
from ..io import atomic_directory, atomic_write_json, read_json, sha256_file
from .edit import Edit, MatrixRecord
from .factors import LowRank
from .render import digests
from .safetensors_file import explained, file_size, read_tensors, write_tensors

if TYPE_CHECKING:
    from ..memory.edit import MemoryEdit

logger = logging.getLogger(__name__)

FORMAT, MEMORY_FORMAT = "fastedit-edit", "fastedit-memory-edit"
VERSION = 1
_JSON, _FACTORS, _ORIGINALS = "edit.json", "factors.safetensors", "originals.safetensors"


@dataclass(frozen=True)
class Originals:
    """The matrices of a saved edit as they were right before it; read when asked for."""

    path: Path
    sha256: str

    def load(self) -> dict[str, Tensor]:
        """Read them.

        Raises:
            CorruptFile: the file is missing or damaged.
        """
        _verify(self.path, self.sha256)
        return read_tensors(self.path)


def save_edit(
    edit: Edit, directory: str | Path, *, keep_originals: bool = True, overwrite: bool = False
) -> Path:
    """Write an edit as one directory, atomically.

    Args:
        edit: an edit that has been committed or applied.
        directory: where; must not exist or be empty unless ``overwrite``.
        keep_originals: also store the matrices as they were before, so that the edit can be reverted exactly
            in a model saved with it. Costs their size. If their bits are not known any more, a warning is
            logged and the edit is saved without.
        overwrite: replace what is there.

    Returns:
        The directory.

    Raises:
        FasteditError: the edit was never applied to a model; the disk is full.
        FileExistsError: there is something already.
    """
    if not edit.matrices:
        raise FasteditError(f"{edit!r} was never applied to a model: commit or apply it before saving it")
    directory = Path(directory)
    originals = _originals(edit) if keep_originals else None
    with explained(directory), atomic_directory(directory, overwrite=overwrite) as temporary:
        write_tensors(temporary / _FACTORS, _tensors(edit))
        if originals is not None:
            write_tensors(temporary / _ORIGINALS, originals)
        seal(temporary, FORMAT, VERSION, edit.as_dict())
    return directory


def seal(directory: Path, format: str, version: int, content: Mapping[str, Any]) -> None:
    """Write ``edit.json`` beside the finished files of an edit, with their checksums and its own."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(directory.iterdir())
    }
    whole = {"format": format, "version": version, **content, "files": files}
    atomic_write_json(directory / _JSON, {**whole, "sha256": _checksum(whole)})


def load_edit(directory: str | Path) -> Edit | MemoryEdit:
    """Read an edit that its ``save`` wrote: a change of weights, or an edit of a memory.

    Originals are read only when they are needed.

    Raises:
        CorruptFile: there is none, or a file is missing, truncated or has a wrong checksum; names the file.
    """
    directory = Path(directory)
    path = directory / _JSON
    if not path.is_file():
        raise CorruptFile(f"there is no edit in {directory}: it has no {_JSON}")
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") == MEMORY_FORMAT:
        from ..memory.edit import load_memory_edit

        return load_memory_edit(directory)
    files = unseal(content, directory, FORMAT, VERSION, _FACTORS)
    tensors = read_tensors(directory / _FACTORS)
    try:
        edit = _build(content, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is not what {_FACTORS} belongs to: {error}") from error
    if _ORIGINALS in files:
        edit._originals = Originals(directory / _ORIGINALS, files[_ORIGINALS]["sha256"])
    return edit


def unseal(content: Any, directory: Path, format: str, version: int, needed: str) -> dict[str, Any]:
    """Check what :func:`seal` wrote: format, version, checksums, and that the file ``needed`` is whole.

    Args:
        content: of ``edit.json``; its own checksum is taken out.
        directory: the edit's.
        format: what is expected.
        version: what is expected.
        needed: name of the file with the tensors.

    Returns:
        File name → bytes and checksum.

    Raises:
        CorruptFile: anything is wrong; names the file.
    """
    _check_content(content, directory / _JSON, format, version, needed)
    files: dict[str, Any] = content["files"]
    for name, fields in files.items():
        if file_size(directory / name) != fields["bytes"]:
            raise CorruptFile(
                f"{directory / name} must have {fields['bytes']} bytes, it has "
                f"{file_size(directory / name)}: "
                "it is truncated or missing; copy the edit again, or make it again"
            )
    _verify(directory / needed, files[needed]["sha256"])
    return files


def _build(content: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    def group(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}:"
        return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}

    left, right = group("left"), group("right")
    names = list(content["matrices"])
    return Edit(
        method=content["method"],
        facts=[Fact(**fields) for fields in content["facts"]],
        factors={name: LowRank(left[name], right[name]) for name in names if name in left},
        params=content["params"],
        seed=content["seed"],
        profile=content["profile"],
        dense=group("dense"),
        measured=content["measured"],
        extras=group("extra"),
        base_fingerprint=content["base_fingerprint"],
        before_fingerprint=content["before_fingerprint"],
        matrices={name: MatrixRecord.from_dict(fields) for name, fields in content["matrices"].items()},
        created=content["created"],
        versions=content["versions"],
        _id=content["id"],
    )


def _tensors(edit: Edit) -> dict[str, Tensor]:
    result = {}
    for name, factors in edit.factors.items():
        result[f"left:{name}"], result[f"right:{name}"] = factors.left, factors.right
    result.update({f"dense:{name}": delta for name, delta in edit.dense.items()})
    result.update({f"extra:{name}": extra for name, extra in edit.extras.items()})
    return result


def _originals(edit: Edit) -> dict[str, Tensor] | None:
    try:
        originals = edit.originals()
    except BaseMismatch as error:
        logger.warning("saved without originals: %s", error)
        return None
    if digests(originals) != edit.before_digests:
        logger.warning(
            "%r is saved without originals: it stands elsewhere than where it was made, so what is "
            "beneath it "
            "now is not what it was made on",
            edit,
        )
        return None
    return originals


def _check_content(content: Any, path: Path, format: str, version: int, needed: str) -> None:
    if not isinstance(content, dict) or content.get("format") != format:
        raise CorruptFile(f"{path} does not describe an edit (format {format!r} was expected)")
    if content.get("version") != version:
        raise CorruptFile(
            f"{path} has version {content.get('version')}, this fastedit reads version {version}: use "
            "a newer one"
        )
    checksum = content.pop("sha256", None)
    if checksum != _checksum(content):
        raise CorruptFile(
            f"{path} has a wrong checksum: it was damaged or changed by hand; copy the edit again"
        )
    if needed not in content["files"]:
        raise CorruptFile(f"{path} names no {needed}")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _verify(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing; copy the edit again, or make it again")
    if sha256_file(path) != sha256:
        raise CorruptFile(
            f"{path} has a wrong checksum: it is damaged; copy the edit again, or make it again"
        )
