"""Texts to collect statistics from: readers that stream, and a hash that says which texts were used."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import CorruptFile

_SUFFIXES = (".txt", ".json", ".jsonl")
_LONGEST_PARAGRAPH = 2_000  # characters; a file with a text a line would else be one text, and cut


class TextHash:
    """SHA-256 over texts in order; where one text ends and the next begins counts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        """Take in one more text."""
        data = text.encode("utf-8", "surrogatepass")
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def hexdigest(self) -> str:
        """Hexadecimal hash of all texts added so far."""
        return self._digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of ``texts`` in order."""
    digest = TextHash()
    for text in texts:
        digest.add(text)
    return digest.hexdigest()


def read_texts(*paths: str | os.PathLike[str], stdin: TextIO | None = None) -> Iterator[str]:
    """Yield the texts of files one after the other, reading as they are consumed.

    ``.txt``: one text a paragraph (paragraphs are parted by empty lines; after 2,000
    characters one ends with its line). ``.json``: a list of strings or of objects with a ``"text"``.
    ``.jsonl``: one string or object with a ``"text"`` a line. Each may end in ``.gz``. ``-`` is standard
    input, read as paragraphs. Empty texts are left out.

    Args:
        paths: files, or ``"-"``.
        stdin: what ``-`` stands for; ``sys.stdin`` by default.

    Raises:
        FileNotFoundError: a file does not exist; raised here, before anything is read.
        ValueError: a file name ends in nothing known.
        CorruptFile: broken compression, UTF-8 or JSON, or a record without text; names file and place.
    """
    names = [str(path) for path in paths]
    for name in names:
        if name == "-":
            continue
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no text file {name}")
        _kind(name)
    return (text for name in names for text in _read(name, stdin))


def _read(name: str, stdin: TextIO | None) -> Iterator[str]:
    if name == "-":
        yield from _paragraphs(stdin if stdin is not None else sys.stdin)
        return
    reader = {".txt": _paragraphs, ".json": _json, ".jsonl": _json_lines}[_kind(name)]
    try:
        with _open(name) as file:
            yield from reader(file)
    except (EOFError, OSError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, _NoTextError) as error:
        raise CorruptFile(f"{name} cannot be read as text: {error}") from error


class _NoTextError(Exception):
    """A record that holds no text; becomes a CorruptFile that names the file."""


def _kind(name: str) -> str:
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{name}: expected a name ending in .txt, .json or .jsonl, each with or without .gz")
    return suffix


def _open(name: str) -> TextIO:
    if name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(name), encoding="utf-8")
    return open(name, encoding="utf-8")


def _paragraphs(file: TextIO) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in file:
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > _LONGEST_PARAGRAPH):
            yield "".join(lines).strip()
            lines, length = [], 0
    if lines:
        yield "".join(lines).strip()


def _json(file: TextIO) -> Iterator[str]:
    records = json.load(file)
    if not isinstance(records, list):
        raise _NoTextError(f"expected a list of texts, got {type(records).__name__}")
    for i, record in enumerate(records):
        yield from _text(record, f"entry {i}")


def _json_lines(file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise _NoTextError(f"line {number} is not whole JSON ({error})") from None
            yield from _text(record, f"line {number}")


def _text(record: Any, place: str) -> Iterator[str]:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise _NoTextError(f'{place} is neither a string nor an object with a "text" that is one')
    if text.strip():
        yield text
