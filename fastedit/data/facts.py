"""Lists of facts as people write them: one line of text, JSON, JSON lines, CSV, or a data set's file."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from pathlib import Path

from ..errors import CorruptFile, InvalidFact
from ..facts import Fact
from .files import read_text
from .formats import load_records, records_from
from .records import Records
from .subjects import braced_fact

_LOGGER = logging.getLogger(__name__)
_ARROW = re.compile(r"\s*(?:->|→|=>)\s*")

# Parts of a file that say what must stay as it is, and are not to be edited in.
_KEPT_GROUPS = frozenset({"K_R", "locality"})


def parse_fact(text: str) -> Fact:
    """Read a fact from one line: the prompt with the subject in braces, an arrow, the new answer.

    >>> parse_fact("The capital of {France} is -> Lyon").text
    'The capital of France is'

    Raises:
        InvalidFact: no arrow, or not exactly one ``{subject}``.
    """
    parts = _ARROW.split(text.strip(), maxsplit=1)
    if len(parts) != 2 or not parts[1].strip():
        raise InvalidFact(
            f"expected 'The capital of {{France}} is -> Lyon', found no '-> answer' in {text!r}"
        )
    return braced_fact(parts[0], parts[1])


def load_facts(path: str | os.PathLike[str], *, on_skip: str = "raise") -> list[Fact]:
    """Read the facts of a file.

    Taken are: JSON, JSON lines and CSV with the fields of :class:`fastedit.Fact` (``target`` or ``answer``
    may stand for ``target_new``; the prompt holds ``{}``, or its subject in braces, or the subject filled
    in), text files with one ``The capital of {France} is -> Lyon`` a line (empty lines and lines that begin
    with ``#`` are left out), and every data set that :func:`load_records` reads. All may be gzipped.

    Args:
        path: the file.
        on_skip: ``"raise"`` refuses a file with a record that cannot be edited; ``"warn"`` logs how many
            were left out and why, and goes on.

    Raises:
        InvalidFact: a fact that cannot be used (``on_skip="raise"``), or no fact at all.
        CorruptFile: the file is cut off or not what its name says.
        ValueError: a format that is not known.
    """
    if on_skip not in ("raise", "warn"):
        raise ValueError(f"on_skip must be 'raise' or 'warn', got {on_skip!r}")
    records = _load(path)
    if records.skipped:
        shown = "; ".join(f"record {s.position}: {s.reason}" for s in records.skipped[:3])
        message = f"{path}: {len(records.skipped)} record(s) cannot be edited: {shown}"
        if on_skip == "raise":
            raise InvalidFact(message)
        _LOGGER.warning("%s", message)
    kept = [record for record in records if record.group in _KEPT_GROUPS]
    if kept:
        _LOGGER.info("%s: %d record(s) say what must stay as it is; they are not edited", path, len(kept))
    facts = [fact for record in records if record.group not in _KEPT_GROUPS for fact in record.facts]
    if not facts:
        raise InvalidFact(f"{path} holds no fact that can be edited")
    return facts


def _load(path: str | os.PathLike[str]) -> Records:
    name = Path(path).name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return records_from(_read_table(path, "\t" if name.endswith(".tsv") else ","), path=os.fspath(path))
    if name.endswith((".txt", ".facts")):
        return records_from(_read_lines(path), path=os.fspath(path))
    return load_records(path)


def _read_table(path: str | os.PathLike[str], delimiter: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter))
    if not rows:
        raise CorruptFile(f"{path} has no rows below its header")
    # A short row gives None for the missing columns, a long one a list under the key None.
    return [{k.strip(): v.strip() for k, v in row.items() if k and v and v.strip()} for row in rows]


def _read_lines(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                rows.append(parse_fact(line).as_dict())
            except InvalidFact as error:
                raise InvalidFact(f"{path}, line {number}: {error}") from None
    if not rows:
        raise CorruptFile(f"{path} has no line with a fact")
    return rows
