"""From texts to batches: tokenise, spend the token budget exactly, sort by length, pack."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from .texts import TextHash

_CHUNK = 100  # texts tokenised at once; the group of the published code


@dataclass(frozen=True)
class Position:
    """How far into the texts a collection has come; with the hash of the texts before that point."""

    n_texts: int = 0
    n_tokens: int = 0
    texts_hash: str = TextHash().hexdigest()


class TokenStream:
    """Token sequences of a stream of texts, in groups to be sorted and packed.

    The budget is spent in the order of the texts: the text that would exceed it is cut, so that exactly
    ``n_tokens`` tokens come out if the texts hold that many. This does not depend on how sequences are
    batched later, nor on the number of processes.

    Args:
        texts: the texts, read once, as they are needed.
        tokenizer: a Hugging Face tokenizer.
        n_tokens: the budget, or None for everything.
        max_length: tokens kept of one text, special tokens included.
        group_tokens: a group ends with the hundred texts that bring it to this many tokens.
        add_special_tokens: whether the tokenizer adds its BOS and the like; these tokens count.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        n_tokens: int | None,
        max_length: int,
        group_tokens: int,
        add_special_tokens: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.n_tokens = n_tokens
        self.max_length = max_length
        self.group_tokens = group_tokens
        self.add_special_tokens = add_special_tokens
        self.group_start = Position()
        self.n_cut = 0  # texts that reach max_length, and may have lost their end
        self._texts = iter(texts)
        self._hash = TextHash()
        self._n_texts = 0
        self._count = 0

    @property
    def position(self) -> Position:
        """Where the stream stands: after the last group that came out."""
        return Position(self._n_texts, self._count, self._hash.hexdigest())

    def skip_to(self, start: Position, end: Position) -> bool:
        """Pass over the texts before ``start``; False, and nothing is passed over, if they differ.

        The texts before ``end`` are compared: where the group that begins at ``start`` ended when first read.
        """
        read = list(islice(self._texts, end.n_texts))
        before, digest = TextHash(), TextHash()
        for number, text in enumerate(read):
            if number < start.n_texts:
                before.add(text)
            digest.add(text)
        same = (before.hexdigest(), digest.hexdigest()) == (start.texts_hash, end.texts_hash)
        self._texts = chain(read[start.n_texts :] if same else read, self._texts)
        if same:
            self._hash, self._n_texts, self._count = before, start.n_texts, start.n_tokens
        return same

    def groups(self) -> Iterator[list[list[int]]]:
        """Yield groups of non-empty token sequences; ``group_start`` is where the last one began."""
        while not self._spent():
            self.group_start = self.position
            group = self._group()
            if group is None:
                return
            yield group

    def _group(self) -> list[list[int]] | None:
        group: list[list[int]] = []
        size = 0
        while size < self.group_tokens and not self._spent():
            texts = list(islice(self._texts, _CHUNK))
            if not texts:
                break
            for text, ids in zip(texts, self._encode(texts), strict=True):
                if self._spent():
                    break
                self._hash.add(text)
                self._n_texts += 1
                self.n_cut += len(ids) >= self.max_length
                if self.n_tokens is not None:
                    ids = ids[: self.n_tokens - self._count]
                if ids:
                    group.append(ids)
                    size += len(ids)
                    self._count += len(ids)
        return group or None

    def _spent(self) -> bool:
        return self.n_tokens is not None and self._count >= self.n_tokens

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=self.add_special_tokens,
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
        )["input_ids"]


def pack(sequences: Iterable[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Sort sequences by length, longest first, and cut them into batches.

    A batch holds at most ``batch_tokens`` tokens with its padding, or one sequence if that is longer. The
    rule is that of the published code (kmeng01/memit : rome/tok_dataset.py, ``length_collation``).
    """
    batches: list[list[list[int]]] = []
    for ids in sorted(sequences, key=len, reverse=True):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(ids)
    return batches


def official_order(texts: Iterable[str], n_texts: int | None) -> list[str]:
    """The published sample: ``random.Random(1)`` shuffles all texts, the first ``n_texts`` are taken.

    Source: kmeng01/memit : util/runningstats.py, ``FixedRandomSubsetSampler``.
    """
    return shuffled(texts, seed=1)[:n_texts]


def shuffled(texts: Iterable[str], seed: int) -> list[str]:
    """All texts, in an order that depends on ``seed`` alone; holds them in memory."""
    texts = list(texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    return [texts[i] for i in order]


def official_length(config: Any) -> int:
    """The length to which the published code cuts texts: the context, with its cap for two families.

    Source: zjunlp/EasyEdit and jianghoucheng/AlphaEdit : rome/layer_stats.py.

    Raises:
        ValueError: the configuration states no context length.
    """
    model_type = getattr(config, "model_type", "")
    if "mistral" in model_type:
        return getattr(config, "sliding_window", None) or 4096
    if "qwen2" in model_type:
        return 4096
    for name in ("n_positions", "max_sequence_length", "max_position_embeddings", "seq_length"):
        if hasattr(config, name):
            return getattr(config, name)
    raise ValueError(f"the configuration of {model_type!r} states no context length: give max_length")
