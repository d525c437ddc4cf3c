"""Reading and rewriting safetensors files in a stream: one matrix in memory at a time, the rest as bytes.

The format (huggingface/safetensors : README.md): the header's length in eight bytes; the header, JSON; data.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CorruptFile, FasteditError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK = 1 << 24
_LARGEST_HEADER = 1 << 27


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype's name, shape, and its bytes' place in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        path: the file.
        entries: its tensors, in the order of their bytes.
        metadata: its ``__metadata__``, None if it has none.
        raw: the header exactly as it stands in the file, its length included.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None
    raw: bytes

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return max((entry.end for entry in self.entries.values()), default=0)


def read_header(path: str | Path) -> Header:
    """Read a file's header and check that the file is whole.

    Raises:
        CorruptFile: it is not a safetensors file, or is cut off.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LARGEST_HEADER + 1
        if length > min(_LARGEST_HEADER, size - 8):
            raise CorruptFile(f"{path} is not a whole safetensors file: its header is cut off; get it again")
        body = file.read(length)
    try:
        content = json.loads(body)
        metadata = content.pop("__metadata__", None)
        entries = {
            name: Entry(fields["dtype"], tuple(fields["shape"]), *fields["data_offsets"])
            for name, fields in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} has a header that is not safetensors ({error}); get the file again"
        ) from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    header = Header(path, entries, metadata, first + body)
    if len(header.raw) + header.data_bytes != size:
        raise CorruptFile(
            f"{path} must have {len(header.raw) + header.data_bytes} bytes by its header, it has "
            f"{size}: it is "
            "truncated or damaged; get it again"
        )
    return header


def read_tensor(header: Header, name: str) -> Tensor:
    """Read one tensor into memory of its own.

    Raises:
        KeyError: the file has no such tensor.
        TypeError: its dtype is not one that torch and fastedit share.
    """
    entry = header.entries[name]
    if entry.dtype not in _TORCH:
        raise TypeError(f"{name} in {header.path} has dtype {entry.dtype}, which cannot be read here")
    dtype = _TORCH[entry.dtype]
    if entry.end == entry.start:
        return torch.empty(entry.shape, dtype=dtype)
    data = bytearray(entry.end - entry.start)
    with open(header.path, "rb") as file:
        file.seek(len(header.raw) + entry.start)
        if file.readinto(data) != len(data):
            raise CorruptFile(f"{header.path} ends inside {name}: it is truncated; get it again")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file."""
    header = read_header(path)
    return {name: read_tensor(header, name) for name in header.entries}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B") if flat.numel() else memoryview(b"")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a new file. Not atomic by itself: use it on a temporary path."""
    entries, position = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = Entry(_NAMES[tensor.dtype], tuple(tensor.shape), position, position + size)
        position += size
    with explained(path), open(path, "wb") as file:
        file.write(encode_header(entries, {"format": "pt", **(metadata or {})}))
        for tensor in tensors.values():
            _write(file, tensor_bytes(tensor))


def rewrite(source: Header, path: str | Path, replaced: Mapping[str, Tensor], raw_header: bytes) -> None:
    """Write a copy of a file with some tensors replaced by others of the same dtype and shape.

    Args:
        source: the file to copy.
        path: the new file; not atomic by itself.
        replaced: tensor name → its new content.
        raw_header: the new header, describing the same tensors at the same places.

    Raises:
        ValueError: a replacement has another size than what it replaces.
    """
    for name, tensor in replaced.items():
        entry = source.entries[name]
        if (_NAMES[tensor.dtype], tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(
                f"rewrite: {name} must be {entry.dtype} of shape {entry.shape}, got {tensor.dtype}"
            )
    with explained(path), open(source.path, "rb") as old, open(path, "wb") as file:
        old.seek(len(source.raw))
        file.write(raw_header)
        position = 0
        for name, entry in source.entries.items():
            if name not in replaced:
                continue
            _copy(old, file, entry.start - position)
            _write(file, tensor_bytes(replaced[name]))
            old.seek(len(source.raw) + entry.end)
            position = entry.end
        _copy(old, file, source.data_bytes - position)


def convert(source: Header, path: str | Path, replaced: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Write a copy of a file with all floating-point tensors in another dtype; returns the bytes of its data.

    Args:
        source: the file to copy.
        path: the new file; not atomic by itself.
        replaced: tensor name → content to take instead, in any floating-point dtype.
        dtype: of all tensors that the file holds in float64, float32, float16 or bfloat16.
    """
    entries, position = {}, 0
    for name, entry in source.entries.items():
        size, kind = entry.end - entry.start, entry.dtype
        if kind in DTYPES:
            size, kind = size // DTYPES[kind].itemsize * dtype.itemsize, _NAMES[dtype]
        entries[name] = Entry(kind, entry.shape, position, position + size)
        position += size
    with explained(path), open(source.path, "rb") as old, open(path, "wb") as file:
        file.write(encode_header(entries, source.metadata))
        for name, entry in source.entries.items():
            if entry.dtype in DTYPES:
                tensor = replaced[name] if name in replaced else read_tensor(source, name)
                _write(file, tensor_bytes(tensor.to(dtype)))
            else:
                old.seek(len(source.raw) + entry.start)
                _copy(old, file, entry.end - entry.start)
    return position


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """A header with its length, padded to eight bytes."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, entry in entries.items():
        content[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn "no space left" into an error that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FasteditError(
            f"no space left on the disk while writing {path}: nothing was changed. Free some space "
            "and run this again"
        ) from error


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        block = source.read(min(_BLOCK, count))
        if not block:
            raise CorruptFile(f"{source.name} ends before its tensors do: it is truncated")
        _write(target, block)
        count -= len(block)


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    for start in range(0, len(data), _BLOCK):
        file.write(data[start : start + _BLOCK])


def file_size(path: str | Path) -> int:
    """Bytes of a file, 0 if there is none."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0
