"""Reading JSON and JSON lines, plain or gzipped, with errors that name the file."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

from ..errors import CorruptFile

_GZIP_MAGIC = b"\x1f\x8b"


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file; gzip is recognised by its first bytes, whatever the name says.

    Raises:
        CorruptFile: the compressed stream is cut off or damaged, or the bytes are not UTF-8.
        FileNotFoundError: there is no such file.
    """
    data = Path(path).read_bytes()
    if data[:2] == _GZIP_MAGIC:
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, OSError) as error:
            raise CorruptFile(
                f"{path} is not a whole gzip file ({error}): it may be truncated; get it again"
            ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{path} is not UTF-8 text ({error}); convert it or get it again") from None


def read_values(path: str | os.PathLike[str]) -> Any:
    """Read one JSON value, or JSON lines as a list.

    A name that holds ``.jsonl`` is read line by line; any other file is tried as one value first and then
    line by line, because some published ``.json`` files hold lines.

    Raises:
        CorruptFile: the file is empty, cut off or not JSON; the message names it and the place.
    """
    text = read_text(path)
    if not text.strip():
        raise CorruptFile(f"{path} is empty; JSON or JSON lines were expected")
    if ".jsonl" in Path(path).name.lower():
        return _read_lines(path, text)
    try:
        return json.loads(text)
    except ValueError as error:
        if _first_line_is_json(text):
            return _read_lines(path, text)
        raise _broken(path, error) from None


def _first_line_is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().splitlines()[0]), (dict, list))
    except ValueError:
        return False


def _read_lines(path: str | os.PathLike[str], text: str) -> list[Any]:
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise _broken(path, error, f"line {number}") from None
    return values


def _broken(path: str | os.PathLike[str], error: ValueError, place: str = "") -> CorruptFile:
    where = f", {place}" if place else ""
    return CorruptFile(f"{path}{where} is not whole JSON ({error}): it may be truncated; get it again")
