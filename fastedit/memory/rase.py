"""RASE's fact-patch memory: each fact has a patch, added for the prompts that are about it (Han et al. 2023).

The base weights stay as they are. A fact's patch is the change that an editor made of it alone, kept as factors: at
an edited projection a routed sample's outputs become y + x A_b B_b, a gather and two thin products, where b is the
fact that its prompt was matched to. Facts know nothing of each other, so their number does not wear the model down.

A prompt is matched once, at prefill, by a sentence encoder: the facts with the nearest keys are candidates, the gate
says whether the first of them is meant. A key is the embedding of the fact with its answer; two-way, a candidate's
score is the mean of that cosine and the one with the embedding of the fact's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CorruptFile
from ..models.describe import Projection, describe
from ..ops.key_index import KeyIndex
from .base import Decision, Memory, Routes
from .edit import MemoryEdit
from .lora_blocks import LoraBlocks
from .sentences import SentenceEncoder, base_tokenizer


@dataclass(frozen=True)
class GateSettings:
    """When the best candidate is meant.

    Attributes:
        best: its score is above this, or
        margin: it is further than this above the second, and
        spread: the standard deviation of all candidates' scores (n in the denominator) is above this.
        least: never below this.
    """

    best: float
    margin: float
    spread: float
    least: float

    def opens(self, scores: Tensor) -> Tensor:
        """(B,) bool for scores (B, k) in descending order; one candidate has no margin."""
        opened = scores[:, 0] > self.best
        if scores.shape[1] > 1:
            apart = scores[:, 0] - scores[:, 1] > self.margin
            opened = opened | (apart & (scores.std(1, correction=0) > self.spread))
        return opened & (scores[:, 0] >= self.least)


@dataclass(frozen=True)
class Patched:
    """A fact in the memory.

    Attributes:
        text: its prompt.
        subject: its subject, without regard to case.
        edit_id: the edit that it belongs to.
        sentence: (k,) fp32, the embedding of its prompt.
    """

    text: str
    subject: str
    edit_id: str
    sentence: Tensor


class RaseMemory(Memory):
    """Keys, prompts and patches of facts.

    An edit's content: ``keys`` and ``sentences`` (n, k) fp32, rows of norm one, and for each edited block ``A.layer``
    (n, d_in, r) and ``B.layer`` (n, r, d_out), fp32; in ``about`` the digest of the ``encoder``. Any edit can be
    taken off, as if it had never been made.

    A new fact replaces its near-duplicates: those with the same subject whose prompts' embeddings have a cosine above
    ``merge_above``; in ``official`` those whose keys have, whatever the subject.
    """

    method = "rase"
    reads = "ids"
    settings = (
        "layers",
        "above",
        "encoder",
        "pooling",
        "k",
        "gate_best",
        "gate_margin",
        "gate_spread",
        "gate_least",
        "merge_above",
    )

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.layer: int = params["layers"][0]
        names = ("best", "margin", "spread", "least")
        self.gate = GateSettings(**{name: params[f"gate_{name}"] for name in names})
        self.encoder: SentenceEncoder | None = None
        self.tokenizer: Any = None
        self._shapes: dict[int, tuple[int, int]] = {}
        self._edits: list[MemoryEdit] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.facts: dict[int, Patched] = {}  # by their number in the index and among the patches
        self.patches = LoraBlocks(1.0)
        self._edits = []
        self._index: KeyIndex | None = None
        self._of_subject: dict[str, set[int]] = {}

    def attached_to(self, model: nn.Module, projection: Projection, layer: int) -> None:
        """Load the encoder and find the tokenizer, unless they were given; look up the projections' shapes."""
        if self.encoder is None:
            self.encoder = SentenceEncoder.load(self.params)
        if self.tokenizer is None:
            self.tokenizer = base_tokenizer(model, self.params["tokenizer"])
        description = describe(model)
        for each in (self.layer, *self.upper_layers):
            there = description.projection(each)
            self._shapes[each] = (there.d_in, there.d_out)

    @property
    def upper_layers(self) -> tuple[int, ...]:
        """The other edited blocks."""
        return tuple(self.params["above"])

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """The fact that each prompt is about, by its text.

        Args:
            inputs: (B, T) token ids.
            outputs: not used.
            tokens: (B, T) bool.
        """
        nothing = torch.full((len(inputs),), -1, dtype=torch.int64, device=inputs.device)
        asked = tokens.any(1).nonzero()[:, 0]
        if not self.facts or not len(asked):
            return Decision(nothing, score=nothing.float())
        decode = self.tokenizer.decode
        texts = [decode(inputs[row][tokens[row]], skip_special_tokens=True) for row in asked.tolist()]
        assert self.encoder is not None
        index, score = self.match(self.encoder.embed(texts, inputs.device))
        return Decision(
            nothing.index_copy(0, asked, index.to(inputs.device)),
            score=torch.zeros(len(inputs), device=inputs.device).index_copy(
                0, asked, score.to(inputs.device)
            ),
        )

    def match(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The fact of each query (B, d), on the CPU, −1 for none; and its score. Both (B,).

        Where the memory has fewer facts than there should be candidates, the others count as scores of 0. In
        ``official`` they do not, and the gate must open before the candidates are ranked two-way as well.
        """
        assert self._index is not None
        k = min(self.params["k"], len(self._index))
        ids, scores = self._index.max_inner_product(queries, k=k, ties="highest")
        sentences = torch.stack([self.facts[number].sentence for number in ids.flatten().tolist()])
        both = (scores + (sentences.view(*ids.shape, -1) @ queries[:, :, None])[..., 0]) / 2
        ranked, order = both.sort(dim=1, descending=True, stable=True)
        if self.profile == "official":
            opened = self.gate.opens(ranked) & self.gate.opens(scores)
        else:
            opened = self.gate.opens(F.pad(ranked, (0, self.params["k"] - k)))
        first = ids.gather(1, order)[:, 0]
        return torch.where(opened, first, -1), ranked[:, 0]

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The outputs with the patches of the lowest edited block added."""
        return self.apply_above(self.layer, inputs, outputs, routes)

    def apply_above(self, layer: int, inputs: Tensor, outputs: Tensor, routes: Routes) -> Tensor:
        """The outputs of block ``layer`` with the patches added, in fp32."""
        return outputs.float() + self.patches.change(layer, inputs, routes.index)

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Take in an edit's facts; they replace their near-duplicates."""
        self._require(edit)
        self._edits.append(edit)
        self._put(edit)

    def _put(self, edit: MemoryEdit) -> None:
        content = edit.content
        keys, sentences = content["keys"].float(), content["sentences"].float()
        if self._index is None:
            self._index = KeyIndex(keys.shape[1])
        for row, fact in enumerate(edit.facts):
            new = Patched(fact.text, fact.subject.casefold().strip(), edit.id, sentences[row])
            for number in self._near_duplicates(new, keys[row]):
                self._drop(number)
            (number,) = self._index.add(keys[row : row + 1], radius=0.0).tolist()
            self.patches.append({n: (content[f"A.{n}"][row], content[f"B.{n}"][row]) for n in self._shapes})
            self.facts[number] = new
            self._of_subject.setdefault(new.subject, set()).add(number)

    def _drop(self, number: int) -> None:
        assert self._index is not None
        self._index.remove(torch.tensor([number]))
        self._of_subject[self.facts.pop(number).subject].discard(number)

    def _near_duplicates(self, new: Patched, key: Tensor) -> list[int]:
        assert self._index is not None
        limit = self.params["merge_above"]
        if self.profile != "official":
            same = sorted(self._of_subject.get(new.subject, ()))
            return [number for number in same if float(self.facts[number].sentence @ new.sentence) > limit]
        ids, scores = self._index.max_inner_product(key[None], k=min(32, max(1, len(self._index))))
        return [int(n) for n, score in zip(ids[0], scores[0], strict=True) if n >= 0 and score > limit]

    def remove(self, edit_id: str) -> None:
        """Put all other edits in anew."""
        kept = [edit for edit in self._edits if edit.id != edit_id]
        self.clear()
        self._edits = kept
        for edit in kept:
            self._put(edit)

    def _require(self, edit: MemoryEdit) -> None:
        assert self.encoder is not None
        content, n = edit.content, len(edit.facts)
        good = all(f"{side}.{layer}" in content for layer in self._shapes for side in "AB") and all(
            name in content and content[name].dim() == 2 and len(content[name]) == n
            for name in ("keys", "sentences")
        )
        for layer, (d_in, d_out) in self._shapes.items() if good else ():
            a, b = content[f"A.{layer}"], content[f"B.{layer}"]
            good &= a.dim() == b.dim() == 3 and len(a) == len(b) == n and a.shape[2] == b.shape[1]
            good &= a.shape[1] == d_in and b.shape[2] == d_out
        if not good:
            raise CorruptFile(
                f"{edit!r} must hold keys and sentences (n, k), and A.l (n, d_in, r) and B.l (n, r, d_out) of the "
                f"blocks {', '.join(map(str, self._shapes))}"
            )
        self.encoder.require(edit)

    # -- reports ------------------------------------------------------------------------------------

    def owner(self, index: int) -> str | None:
        """The edit of a fact."""
        return self.facts[index].edit_id if index in self.facts else None

    @property
    def n_entries(self) -> int:
        """Facts that can be routed to."""
        return len(self.facts)

    @property
    def n_bytes(self) -> int:
        """Bytes of keys, prompts, patches and the encoder."""
        held = sum(fact.sentence.nbytes for fact in self.facts.values()) + self.patches.n_bytes
        held += 0 if self._index is None else self._index.n_bytes
        return held + (0 if self.encoder is None else self.encoder.n_bytes)

    @property
    def prefill_flops(self) -> int:
        """A product and a sum for each element of each key; the encoder's pass comes on top."""
        return 0 if self._index is None else 2 * len(self._index) * self._index.dim

    @property
    def token_flops(self) -> int:
        """The two thin products, at every edited block."""
        return self.patches.token_flops
