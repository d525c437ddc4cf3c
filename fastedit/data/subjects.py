"""From a prompt as a file gives it to a prompt with ``{}`` for the subject."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InvalidFact
from ..facts import Fact

_BRACED = re.compile(r"^(?P<before>[^{}]*)\{(?P<subject>[^{}]+)\}(?P<after>[^{}]*)$", re.DOTALL)


def braced_fact(prompt: str, target: str, **fields: Any) -> Fact:
    """Build a fact from a prompt that marks its subject with braces, such as ``The capital of {France} is``.

    Raises:
        InvalidFact: not exactly one pair of braces, or nothing in them.
    """
    match = _BRACED.match(prompt)
    if match is None:
        raise InvalidFact(
            f"put the subject, and nothing else, in braces, as in 'The capital of {{France}} is': {prompt!r}"
        )
    before, subject, after = match.group("before", "subject", "after")
    return Fact(f"{before}{{}}{after}".strip(), subject.strip(), target.strip(), **fields)


def fact_of(
    prompt: str, subject: str | None, target: str, old: str | None, case_id: Any, notes: list[str]
) -> Fact:
    """Build a fact from a file's fields; what had to be decided is added to ``notes``.

    The subject's only occurrence becomes ``{}``; of several the last one, which is noted. Without an exact
    occurrence, case and accents are ignored. Without a subject the whole prompt stands for it, so that
    methods which need one work at the prompt's last token.

    Raises:
        InvalidFact: the subject does not occur; the prompt or the target is empty.
    """
    for what, value in (("prompt", prompt), ("target", target)):
        if not isinstance(value, str):
            raise InvalidFact(f"the {what} must be text, got {type(value).__name__}: {value!r}")
    if not prompt.strip():
        raise InvalidFact("the prompt is empty")
    if old is not None and old.strip() == target.strip():
        notes.append("the new answer equals the old one, which is left out")
        old = None
    fields = {name: value for name, value in (("target_old", old), ("case_id", case_id)) if value is not None}
    if subject is None or not str(subject).strip():
        if "{}" not in prompt and _BRACED.match(prompt):
            return braced_fact(prompt, target, **fields)
        notes.append("no subject is given: the whole prompt stands for it")
        return Fact("{}", prompt, target, **fields)
    subject = str(subject)
    count = prompt.count(subject) if "{}" not in prompt else 1
    if count > 1:
        notes.append(f"the subject occurs {count} times in the prompt: the last one counts")
    fact = Fact.from_filled(prompt, subject, target, **fields)
    if count == 0:
        notes.append(f"the subject {subject!r} is spelled {fact.subject!r} in the prompt")
    return fact
