"""RippleEdits gives an edit as a sentence with neither subject nor target marked; this finds both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import InvalidFact

# The data set's sentences are made from fixed patterns ("The name of the mother of S is T."); these are
# their shapes, the more particular first.
_OF = (
    "place of birth|place of death|place of burial|date of birth|date of death|country of citizenship|"
    "field of work|head of government|head of state"
)
_SHAPES = tuple(
    re.compile(pattern + r" (?P<target>.+)$")
    for pattern in (
        r"^The name of the [a-z ]+? which (?P<subject>.+) (?:is associated with|is a member of|plays in"
        r"|is part of|is the capital of) is",
        r"^The name of the award (?P<subject>.+) won is",
        r"^The number of children (?P<subject>.+) has is",
        r"^The name of the currency in (?P<subject>.+?) is",
        r"^The name of the anthem that is most likely to be performed in (?P<subject>.+?) is",
        rf"^The (?:names? of the )?(?:{_OF}) of (?P<subject>.+?) is",
        r"^The (?:names? of the )?position held by (?P<subject>.+?) is",
        r"^The (?:names? of the )?[a-z ]+? of (?P<subject>.+?) (?:is|are)",
        r"^(?P<subject>.+?) is followed by",
        r"^(?P<subject>.+?) follows",
    )
)


class RippleEdit(NamedTuple):
    """The parts of an edit sentence."""

    prompt: str
    subject: str
    target: str
    old: str | None


def read_ripple_edit(row: Mapping[str, Any]) -> RippleEdit:
    """Take the edit sentence of a RippleEdits record apart.

    Raises:
        InvalidFact: the sentence has none of the shapes of the data set.
    """
    edit = row["edit"]
    parts = _split(edit["prompt"])
    original = edit.get("original_fact")
    old = None
    if isinstance(original, Mapping) and original.get("prompt"):
        sentence = _sentence(original["prompt"])
        stem = parts.prompt + " "
        old = sentence[len(stem) :] if sentence.startswith(stem) else _split(original["prompt"]).target
    return parts._replace(old=old)


def _sentence(text: str) -> str:
    return text.strip().removesuffix(".")


def _split(text: str) -> RippleEdit:
    sentence = _sentence(text)
    for shape in _SHAPES:
        match = shape.match(sentence)
        if match:
            prompt = sentence[: match.start("target")].rstrip()
            return RippleEdit(prompt, match["subject"], match["target"], None)
    raise InvalidFact(f"subject and target cannot be told apart in the edit sentence {text!r}")
