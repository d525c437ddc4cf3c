"""A fact to write into a model, and the checks made before any weight is touched."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidFact


@dataclass(frozen=True)
class Fact:
    """One fact: ``prompt`` with the subject filled in shall be continued by ``target_new``.

    Attributes:
        prompt: text with exactly one ``{}`` where the subject stands, e.g. ``"The capital of {} is"``.
        subject: the words that replace ``{}``.
        target_new: the answer to write, with or without its leading space.
        target_old: the present answer, if known.
        case_id: the record's name in its data set, kept for reports.
        locality: an unrelated text that the edit must leave alone, such as a question with its answer; editors
            that learn where an edit applies train on it.

    Raises:
        InvalidFact: no or several ``{}``; empty subject, target or locality; the old and new targets are equal.
    """

    prompt: str
    subject: str
    target_new: str
    target_old: str | None = None
    case_id: str | int | None = None
    locality: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidFact(f"{name} must be text, got {type(value).__name__}: {value!r}")
        if self.prompt.count("{}") != 1:
            raise InvalidFact(
                f"the prompt must hold exactly one {{}} for the subject, got {self.prompt.count('{}')}: "
                f"{self.prompt!r} (subject {self.subject!r})"
            )
        if not self.subject.strip():
            raise InvalidFact(f"the subject is empty: {self.prompt!r}")
        if not self.target_new.strip():
            raise InvalidFact(f"the target is empty: {self.text!r}")
        if self.target_old is not None and self.target_old.strip() == self.target_new.strip():
            raise InvalidFact(f"the new target equals the old one: {self.text!r} -> {self.target_new!r}")
        if self.locality is not None and not (isinstance(self.locality, str) and self.locality.strip()):
            raise InvalidFact(
                f"locality must be text that is not empty, or None, got {self.locality!r}: {self.text!r}"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def target(self) -> str:
        """The new target with one leading space, as it follows the prompt in running text."""
        return " " + self.target_new.strip()

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_filled(cls, prompt: str, subject: str, target_new: str, **fields: Any) -> Fact:
        """Build a fact from a prompt whose subject is already filled in.

        The subject's last occurrence becomes the ``{}``; a prompt that holds ``{}`` already is taken as
        it is. Case and Unicode normalisation are ignored if there is no exact occurrence.

        Raises:
            InvalidFact: the subject does not occur in the prompt.
        """
        if "{}" in prompt:
            return cls(prompt, subject, target_new, **fields)
        span = _last_occurrence(prompt, subject)
        if span is None:
            raise InvalidFact(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
        start, end = span
        template = prompt[:start].replace("{", "").replace("}", "") + "{}" + prompt[end:]
        return cls(template, prompt[start:end], target_new, **fields)


def _last_occurrence(text: str, subject: str) -> tuple[int, int] | None:
    start = text.rfind(subject) if subject.strip() else -1
    if start >= 0:
        return start, start + len(subject)
    # Fold case and accents character by character, so that positions stay those of the original text.
    folded = "".join(_fold(c) for c in text)
    wanted = "".join(_fold(c) for c in unicodedata.normalize("NFC", subject.strip()))
    start = folded.rfind(wanted) if wanted else -1
    return (start, start + len(wanted)) if start >= 0 else None


def _fold(character: str) -> str:
    base = unicodedata.normalize("NFKD", character)[:1].lower()
    return base if len(base) == 1 else character


def validate_facts(facts: Iterable[Fact | Mapping[str, Any]]) -> list[Fact]:
    """Check a batch of facts and return it as a list.

    Mappings are turned into :class:`Fact` (a prompt without ``{}`` must contain its subject).

    Raises:
        InvalidFact: an empty batch, a fact given twice, or two facts that contradict each other
            (same prompt and subject, different targets). The message names the facts by position.
    """
    checked: list[Fact] = []
    seen: dict[str, int] = {}
    for position, item in enumerate(facts):
        try:
            fact = item if isinstance(item, Fact) else _from_mapping(item)
        except InvalidFact as error:
            raise InvalidFact(f"fact {position}: {error}") from None
        key = " ".join(fact.text.split())
        if key in seen:
            first = checked[seen[key]]
            what = "given twice" if first.target == fact.target else "contradictory"
            raise InvalidFact(
                f"facts {seen[key]} and {position} are {what}: {fact.text!r} -> "
                f"{first.target_new.strip()!r} and {fact.target_new.strip()!r}; keep one of them"
            )
        seen[key] = position
        checked.append(fact)
    if not checked:
        raise InvalidFact("no facts were given: a batch must hold at least one")
    return checked


def _from_mapping(item: Mapping[str, Any]) -> Fact:
    missing = [name for name in ("prompt", "subject", "target_new") if name not in item]
    if missing:
        raise InvalidFact(f"the field(s) {', '.join(missing)} are missing; it has {sorted(item)}")
    known = {name: item[name] for name in ("target_old", "case_id", "locality") if item.get(name) is not None}
    return Fact.from_filled(item["prompt"], item["subject"], item["target_new"], **known)
