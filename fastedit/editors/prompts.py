"""The token rows that locate-then-edit methods run: facts in contexts, with and without their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidFact
from ..facts import Fact
from ..models.tokens import TokenizedPrompt, encode_with_subject, target_ids

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class FactRows:
    """All rows of one fact.

    Attributes:
        prompts: one row per context, cut after the subject's last token (enough for keys and states).
        targets: one row per context, prompt followed by the target without its last token.
        neutral: the row of the KL term, ``"{subject} is a"`` cut after the subject's last token.
        target: ids of the target.
    """

    prompts: list[TokenizedPrompt]
    targets: list[TokenizedPrompt]
    neutral: TokenizedPrompt
    target: list[int]


def fact_rows(
    tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str], context_length: int | None
) -> list[FactRows]:
    """Tokenise every fact in every context.

    Args:
        tokenizer: a Hugging Face tokenizer with offsets.
        facts: the batch.
        contexts: templates with one ``{}`` for the prompt; the first is the bare ``{}``.
        context_length: the model's, or None if it has no limit.

    Raises:
        InvalidFact: a target without tokens, or a row longer than the model's context; names the fact.
    """
    rows = []
    for fact in facts:
        target = target_ids(tokenizer, fact.target)
        if not target:
            raise InvalidFact(f"the target {fact.target_new!r} of {fact.text!r} has no tokens")
        continuation = tokenizer.decode(target[:-1])
        before, after = fact.prompt.split("{}")
        prompts, targets = [], []
        for context in contexts:
            head, tail = context.split("{}")
            start = head + before
            row = _with_tail(tokenizer, start, fact.subject, after + tail, continuation, target[:-1])
            targets.append(row)
            prompts.append(_cut(row))
        before, after = KL_PROMPT.split("{}")
        neutral = _cut(_encode(tokenizer, before, fact.subject, after))
        longest = max(len(row.ids) for row in targets)
        if context_length is not None and longest > context_length:
            raise InvalidFact(
                f"{fact.text!r} with its target takes {longest} tokens, the model's context holds {context_length}"
            )
        rows.append(FactRows(prompts, targets, neutral, target))
    return rows


def _encode(tokenizer: Any, before: str, subject: str, after: str) -> TokenizedPrompt:
    return encode_with_subject(tokenizer, before + subject + after, (len(before), len(before) + len(subject)))


def _with_tail(
    tokenizer: Any, before: str, subject: str, after: str, continuation: str, tail: list[int]
) -> TokenizedPrompt:
    """The row of the whole text; if its last tokens are not ``tail``, prompt and tail are joined as ids."""
    whole = _encode(tokenizer, before, subject, after + continuation)
    if not tail or whole.ids[-len(tail) :] == tail:
        return whole
    prompt = _encode(tokenizer, before, subject, after)
    return TokenizedPrompt([*prompt.ids, *tail], prompt.subject_last)


def _cut(row: TokenizedPrompt) -> TokenizedPrompt:
    return TokenizedPrompt(row.ids[: row.subject_last + 1], row.subject_last)
