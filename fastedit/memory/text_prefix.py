"""Facts found by the prompt's text, and a text in front of the prompts that are about them: IKE's and LTE's memories.

A prompt and the prompts of facts are compared by the cosine of their sentence embeddings. What stands in front is
read by the model once for each entry (see :mod:`fastedit.memory.prefix`), so a long text costs its tokens once, and
after that only the attention to it.

A prompt is continued as the tokens it came in, so nothing can be put behind it, and the text in front is tokenised on
its own. Where a tokenizer puts a space before every text, a space at the end of the text in front is left to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CorruptFile
from ..facts import Fact
from ..models.tokens import _prepends_space, encode_prompt
from ..ops.key_index import KeyIndex
from .base import Decision
from .edit import MemoryEdit
from .prefix import Prefix, PrefixMemory
from .sentences import SentenceEncoder
from .side_module import SideModule


def ids_in_front(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a prompt with tokens of its own is joined to, with the special tokens a text begins with."""
    if text.endswith(" ") and _prepends_space(tokenizer):
        text = text[:-1]
    return encode_prompt(tokenizer, text)


@dataclass(frozen=True)
class Line:
    """A fact in the memory.

    Attributes:
        fact: the fact.
        edit_id: the edit that it belongs to.
        row: its place in that edit.
    """

    fact: Fact
    edit_id: str
    row: int


class TextMemory(PrefixMemory):
    """Facts by the embeddings of their prompts, and what text is put in front.

    An edit's content: ``keys`` (n, d) fp32, rows of norm one, and in ``about`` the digest of the ``encoder``. Any
    edit can be taken off, as if it had never been made. Of facts with the same prompt the newest answers.

    With ``threshold`` None the nearest fact is always in front; otherwise facts whose cosine with the prompt is above
    it, at most ``n_facts`` of them, the nearest first.
    """

    n_facts = 1

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.encoder: SentenceEncoder | None = None
        self._edits: dict[str, MemoryEdit] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.lines: dict[int, Line] = {}  # by their number in the index
        self._edits = {}
        self._answering: dict[str, int] = {}  # prompt -> the line that answers
        self._index: KeyIndex | None = None
        self._entries: list[tuple[int, ...]] = []  # lines that were in front together
        self._entry_of: dict[tuple[int, ...], int] = {}

    def attach_to(self, model: nn.Module) -> SideModule:
        """Stand beside a model; the encoder is loaded, if it was not given, and moved to the model's device."""
        if self.encoder is None:
            self.encoder = SentenceEncoder.load(self.params)
        self.encoder.encoder.module.to(next(model.parameters()).device)
        return super().attach_to(model)

    # -- serving ------------------------------------------------------------------------------------

    def find(self, texts: list[str]) -> Decision:
        """The facts that each text is about, as one entry."""
        if not self.lines:
            return Decision(torch.full((len(texts),), -1), score=torch.zeros(len(texts)))
        assert self.encoder is not None
        assert self._index is not None
        k = min(self.n_facts, len(self._index))
        threshold = self.params["threshold"]
        bound = None if threshold is None else torch.full((len(texts),), float(threshold))
        queries = self.encoder.embed(texts)
        ids, _ = self._index.max_inner_product(queries, bound, k, ties="highest")
        best = self._index.max_inner_product(queries, k=1)[1][:, 0]
        index = [self._entry(tuple(number for number in row if number >= 0)) for row in ids.tolist()]
        return Decision(torch.tensor(index), score=best)

    def _entry(self, numbers: tuple[int, ...]) -> int:
        if not numbers:
            return -1
        if numbers not in self._entry_of:
            self._entry_of[numbers] = len(self._entries)
            self._entries.append(numbers)
        return self._entry_of[numbers]

    def prefix(self, index: int) -> Prefix:
        """What is put in front of a prompt that is about these facts."""
        return Prefix(ids=self.ids([self.lines[number] for number in self._entries[index]]))

    @abstractmethod
    def ids(self, lines: Sequence[Line]) -> list[int]:
        """The text in front for these facts, the nearest first, as ids."""

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Take in an edit's facts."""
        self._require(edit)
        self._edits[edit.id] = edit
        self._put(edit)

    def _put(self, edit: MemoryEdit) -> None:
        keys = edit.content["keys"].float()
        if self._index is None:
            self._index = KeyIndex(keys.shape[1])
        for row, fact in enumerate(edit.facts):
            if fact.text in self._answering:
                older = self._answering[fact.text]
                self._index.remove(torch.tensor([older]))
                del self.lines[older]
            (number,) = self._index.add(keys[row : row + 1], radius=0.0).tolist()
            self.lines[number] = Line(fact, edit.id, row)
            self._answering[fact.text] = number

    def remove(self, edit_id: str) -> None:
        """Put all other edits in anew."""
        kept = [edit for edit in self._edits.values() if edit.id != edit_id]
        self.clear()
        for edit in kept:
            self._edits[edit.id] = edit
            self._put(edit)

    def _require(self, edit: MemoryEdit) -> None:
        keys = edit.content.get("keys")
        if keys is None or keys.dim() != 2 or len(keys) != len(edit.facts):
            raise CorruptFile(f"{edit!r} must hold a key for each of its facts")
        assert self.encoder is not None
        self.encoder.require(edit)

    # -- reports ------------------------------------------------------------------------------------

    def owner(self, index: int) -> str | None:
        """The edit of the nearest of an entry's facts."""
        return self.lines[self._entries[index][0]].edit_id if 0 <= index < len(self._entries) else None

    @property
    def n_entries(self) -> int:
        """Facts that can be found."""
        return len(self.lines)

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys, the texts' ids and the encoder; what the model has read of the texts is kept beside."""
        held = 0 if self._index is None else self._index.n_bytes
        held += sum(edit.size_bytes for edit in self._edits.values())
        return held + (0 if self.encoder is None else self.encoder.n_bytes)

    @property
    def prefill_flops(self) -> int:
        """A product and a sum for each element of each key; the encoder's pass and the text in front come on top."""
        return 0 if self._index is None else 2 * len(self._index) * self._index.dim


class LteMemory(TextMemory):
    """LTE's facts; the text in front is the template with the facts in the place of ``{facts}``."""

    method = "lte"
    settings = ("encoder", "pooling", "threshold", "n_facts", "template")

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.n_facts = params["n_facts"]

    def ids(self, lines: Sequence[Line]) -> list[int]:
        """The block of these facts."""
        text = block_text(self.params["template"], [line.fact for line in lines])
        return ids_in_front(self.tokenizer, text)


def block_text(template: str, facts: Sequence[Fact]) -> str:
    """The template with the facts in the place of ``{facts}``: a line each, numbered if there are several."""
    lines = [fact.text + fact.target for fact in facts]
    if len(lines) > 1:
        lines = [f"{number}. {line}" for number, line in enumerate(lines, 1)]
    return template.replace("{facts}", "\n".join(lines))


class IkeMemory(TextMemory):
    """IKE's facts, each with the text that was made for it.

    An edit's content, further: ``ids`` (m,) int32, the texts of all its facts one after the other, and ``lengths``
    (n,) int32.
    """

    method = "ike"
    settings = ("encoder", "pooling", "threshold")

    def ids(self, lines: Sequence[Line]) -> list[int]:
        """The text of the nearest fact."""
        content = self._edits[lines[0].edit_id].content
        ends = content["lengths"].long().cumsum(0).tolist()
        row = lines[0].row
        found: list[int] = content["ids"][ends[row - 1] if row else 0 : ends[row]].tolist()
        return found

    def _require(self, edit: MemoryEdit) -> None:
        super()._require(edit)
        ids, lengths = edit.content.get("ids"), edit.content.get("lengths")
        whole = ids is not None and lengths is not None and len(lengths) == len(edit.facts)
        if not whole or int(lengths.sum()) != len(ids) or int(lengths.min()) < 1:  # type: ignore[union-attr,arg-type]
            raise CorruptFile(f"{edit!r} must hold the ids of a text for each of its facts")


def packed(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The ``ids`` and ``lengths`` of :class:`IkeMemory`."""
    return {
        "ids": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
    }
