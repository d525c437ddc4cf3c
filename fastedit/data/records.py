"""The normalised form of a data set's record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

from ..facts import Fact


class Item(NamedTuple):
    """A prompt to test with, and the answers that count (the first is the official one)."""

    prompt: str
    answers: list[str]


class Skipped(NamedTuple):
    """A record that cannot be used: where it stands in its file, and why."""

    position: int
    reason: str


@dataclass(frozen=True)
class Record:
    """One record of a data set, whatever its file looks like.

    Attributes:
        fact: what is to be edited (the first fact, if the record has several).
        rephrase: other wordings of the same prompt, subject filled in.
        locality: by kind, prompts whose answers must not change, with the answers that are right.
        portability: by kind, prompts whose answers follow from the edit.
        true_answers: the answers that were right before the edit, the official one first.
        aliases: other spellings of the new answer.
        neighborhood: CounterFact's neighborhood prompts, whose right answer is ``target_true``.
        generation_prompts: CounterFact's prompts for free text.
        more: further edits of the same record (MQuAKE, conflict and round edits), with their rephrasings.
        position: place in the file, counted from 0.
        source: the name of the file format, such as ``counterfact`` or ``zsre.mend``.
        group: the part of the file the record comes from, where a file has parts (Sanitation).
        taught: ``"true"`` if the new answer is the one the data set holds to be right (zsRE as MEMIT uses
            it, known facts), else ``"new"``.
        notes: what had to be decided to read the record, in words.
        raw: the record as it stands in the file.
    """

    fact: Fact
    rephrase: list[str] = field(default_factory=list)
    locality: dict[str, list[Item]] = field(default_factory=dict)
    portability: dict[str, list[Item]] = field(default_factory=dict)
    true_answers: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    neighborhood: list[str] = field(default_factory=list)
    generation_prompts: list[str] = field(default_factory=list)
    more: list[tuple[Fact, list[str]]] = field(default_factory=list)
    position: int = 0
    source: str = "facts"
    group: str = ""
    taught: str = "new"
    notes: list[str] = field(default_factory=list)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def facts(self) -> list[Fact]:
        """All facts of the record, in the order in which they are edited, with a text that they must leave alone."""
        facts = [self.fact, *(fact for fact, _ in self.more)]
        item = next((items[0] for items in self.locality.values() if items), None)
        if item is None:
            return facts
        text = " ".join(part.strip() for part in (item.prompt, *item.answers[:1]) if part.strip())
        return [fact if fact.locality else replace(fact, locality=text or None) for fact in facts]

    @property
    def edits(self) -> list[tuple[Fact, list[str]]]:
        """All facts of the record with their rephrasings."""
        return [(self.fact, self.rephrase), *self.more]

    @property
    def target_true(self) -> str | None:
        """The official right answer before the edit, if the record has one."""
        return self.true_answers[0] if self.true_answers else None

    @property
    def answers_new(self) -> list[str]:
        """The new answer and its other spellings."""
        first = self.fact.target_new.strip()
        return [first, *(a for a in self.aliases if a.strip() != first)]

    @property
    def name(self) -> str:
        """The record's own id, or its position."""
        return str(self.position if self.fact.case_id is None else self.fact.case_id)


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """The records of one file, and the ones that could not be used.

    Attributes:
        records: usable records in file order.
        skipped: the others, with the reason; nothing is left out silently.
        path: the file; ``sha256`` its hash, so that a report can say what it was made from.
    """

    records: list[Record]
    skipped: list[Skipped] = field(default_factory=list)
    path: str = ""
    sha256: str = ""

    @property
    def source(self) -> str:
        """The format names found in the file."""
        return ", ".join(sorted({record.source for record in self.records}))

    @property
    def facts(self) -> list[Fact]:
        """All facts of all records."""
        return [fact for record in self.records for fact in record.facts]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self.records[index], self.skipped, self.path, self.sha256)
        return self.records[index]


def flatten_answers(value: Any) -> list[str]:
    """All answers in ``value`` as one list: text, a list, or lists in lists; order kept, empty text dropped.

    ``{"value": ..., "aliases": [...]}`` and ``{"str": ...}`` are taken too. The official scorers use the
    first.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        parts = [value[key] for key in ("str", "value", "label", "answer", "aliases") if key in value]
        return [leaf for part in parts for leaf in flatten_answers(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in flatten_answers(part)]
    return [str(value)]


def answer_groups(value: Any) -> list[list[str]]:
    """The two levels of RippleEdits answers: every group must be met, by any of its members."""
    if isinstance(value, (str, Mapping)) or value is None:
        value = [value]
    groups = [flatten_answers(part) for part in value]
    return [group for group in groups if group]
