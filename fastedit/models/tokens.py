"""Prompts as token ids: where the subject ends, what the target's ids are, how rows are padded.

Everything is asked of the tokenizer itself; nothing is concluded from a model's name. Positions count from
the left of the unpadded encoding, a BOS token included, so batches must be padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedModel

_METASPACE = "▁"


class TokenizedPrompt(NamedTuple):
    """A prompt's ids and the place of its subject.

    Attributes:
        ids: the prompt with the tokenizer's leading special tokens (BOS) and without trailing ones (EOS),
            since the prompt is to be continued.
        subject_last: index in ``ids`` of the subject's last token.
    """

    ids: list[int]
    subject_last: int


def tokenize_prompt(tokenizer: Any, template_text: str, subject: str) -> TokenizedPrompt:
    """Fill ``subject`` into the one ``{}`` of ``template_text`` and tokenise as :func:`encode_with_subject`.

    Raises:
        ValueError: not exactly one ``{}``, or an empty subject.
        UnsupportedModel: the tokenizer gives no character offsets.
    """
    if template_text.count("{}") != 1:
        raise ValueError(
            f"the template must hold exactly one {{}} for the subject, got {template_text.count('{}')}: "
            f"{template_text!r}"
        )
    start = template_text.index("{}")
    text = template_text.replace("{}", subject)
    return encode_with_subject(tokenizer, text, (start, start + len(subject)))


def encode_with_subject(tokenizer: Any, text: str, subject_span: tuple[int, int]) -> TokenizedPrompt:
    """Tokenise ``text``, whose subject is ``text[start:end]`` for ``subject_span = (start, end)``.

    The subject's last token is the one that contains its last character that is not white space. Where the
    tokenizer merges that character with what follows, it is the merged token; where it splits the character
    into several tokens (bytes), the last of them.

    Raises:
        ValueError: the span lies outside the text or holds only white space.
        UnsupportedModel: the tokenizer gives no character offsets.
    """
    start, end = subject_span
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise ValueError(f"the subject must be a non-empty part of the text, got {subject_span} of {text!r}")
    ids, offsets = _encode(tokenizer, text, add_special_tokens=True)
    index = _last_before(offsets, text, end)
    return TokenizedPrompt(ids[: len(ids) - len(_specials(tokenizer)[1])], index)


def subject_last_index(
    tokenizer: Any, text: str, subject_end: int, *, add_special_tokens: bool = True
) -> int:
    """Index, in the unpadded encoding of ``text``, of the token that holds character ``subject_end - 1``.

    White space at the subject's end is not counted as part of it. See :func:`encode_with_subject` for tokens
    that merge or split characters.

    Raises:
        ValueError: no token ends the subject (it is empty).
        UnsupportedModel: the tokenizer gives no character offsets.
    """
    _, offsets = _encode(tokenizer, text, add_special_tokens=add_special_tokens)
    return _last_before(offsets, text, subject_end)


def official_subject_last_index(tokenizer: Any, text: str, subject_end: int) -> int:
    """The index by the published formula, ``len(encode(prefix + subject)) - 1``.

    It is the index of :func:`subject_last_index` if the encoding of prefix and subject is a prefix of the
    encoding of the whole text. If not (a token merges the subject's end with what follows, the subject
    ends in white space, the tokenizer appends an EOS), it points at another token. Source: AlphaEdit,
    rome/repr_tools.py.
    """
    return len(tokenizer(text[:subject_end])["input_ids"]) - 1


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text to be continued: leading special tokens as the tokenizer adds them, no trailing ones."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) - len(_specials(tokenizer)[1])]


def target_ids(tokenizer: Any, target: str) -> list[int]:
    """Ids of a target that continues a prompt: no special tokens, and no token but the target's own.

    ``target`` is given with its leading space. Tokenizers of the SentencePiece kind put a space before any
    text by themselves; there the target's own space is left to them, so that ``" Lyon"`` is ``▁Lyon`` as in
    running text and not ``▁``, ``▁Lyon``. A BOS or UNK in front is dropped, as the published editors do.

    Raises:
        ValueError: nothing is left of the target.
    """
    text = target[1:] if target.startswith(" ") and _prepends_space(tokenizer) else target
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids and ids[0] in (tokenizer.bos_token_id, tokenizer.unk_token_id):
        ids = ids[1:]
    if not ids:
        raise ValueError(f"the target {target!r} has no tokens under {type(tokenizer).__name__}")
    return ids


def has_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token in front of a text."""
    leading = leading_specials(tokenizer)
    return bool(leading) and leading[0] == tokenizer.bos_token_id


def leading_specials(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text: none, a BOS, or several."""
    return _specials(tokenizer)[0]


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0. Padded positions are masked."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def pad_batch(
    list_of_ids: Sequence[Sequence[int]], pad_id: int, side: str = "right"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows of ids to one length.

    Args:
        list_of_ids: rows, none of them empty.
        pad_id: the id that fills up.
        side: ``"right"`` (what editing needs) or ``"left"`` (what batched generation needs).

    Returns:
        ids, attention_mask and position_ids, each (n_rows, longest) int64 on the CPU. Positions count from
        0 at each row's first real token; at padding they are 0.

    Raises:
        ValueError: no rows, an empty row, or another side.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    if not list_of_ids or not all(len(row) for row in list_of_ids):
        raise ValueError("there must be at least one row of ids, and no row may be empty")
    longest = max(len(row) for row in list_of_ids)
    ids = torch.full((len(list_of_ids), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for index, row in enumerate(list_of_ids):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
        positions[index, place] = torch.arange(len(row))
    return ids, mask, positions


def shared_starts(
    rows: Sequence[Sequence[int]], limits: Sequence[int], least: int = 4
) -> tuple[list[list[int]], list[int]]:
    """Beginnings that several token rows share, such as a context that prompts stand in.

    Rows that begin with the same ``least`` tokens share all that they have in common; the others share nothing.

    Args:
        rows: ids.
        limits: for each row, how many of its tokens a beginning may take.
        least: beginnings that are shorter are not worth sharing.

    Returns:
        The beginnings, the first of which is empty, and for each row the number of its own.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        if limit >= least:
            alike.setdefault(tuple(row[:least]), []).append(index)
    starts: list[list[int]] = [[]]
    of = [0] * len(rows)
    for members in alike.values():
        if len(members) == 1:
            continue
        length = min(limits[index] for index in members)
        columns = zip(*(rows[index][:length] for index in members), strict=True)
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        for index in members:
            of[index] = len(starts)
        starts.append(shared)
    return starts, of


def _encode(
    tokenizer: Any, text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} gives no character offsets, which are needed to find the subject's "
            "last token: load the fast tokenizer, AutoTokenizer.from_pretrained(..., use_fast=True), or "
            "convert it once with transformers.PreTrainedTokenizerFast and save it as tokenizer.json"
        )
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _last_before(offsets: list[tuple[int, int]], text: str, subject_end: int) -> int:
    """Index of the last token that starts before the subject's end, white space not counted.

    Tokens come in the order of the text, so this token holds the subject's last character whether or not
    offsets include the space before a word. Special tokens have empty offsets.
    """
    end = len(text[:subject_end].rstrip())
    inside = [index for index, (start, stop) in enumerate(offsets) if start < stop and start < end]
    if not inside:
        raise ValueError(f"no token ends at character {subject_end} of {text!r}: the subject is empty")
    return inside[-1]


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens added before and after a text."""
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(probe)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _prepends_space(tokenizer: Any) -> bool:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return bool(tokens) and str(tokens[0]).startswith(_METASPACE)
