"""IKE: in-context editing, with demonstrations in front of the prompt (Zheng et al. 2023, arXiv 2305.12740).

Nothing is trained. What stands in front of a prompt is made when the fact is edited: blocks of two lines, "New Fact"
and "Prompt", of facts that are like it; a block of the fact itself; and the fact again, over the prompt. The model
reads it once for each fact and keeps keys and values. With ``k=0`` there are no demonstrations: the plain text
prefix.

As published (profile ``"official"``): 32 examples nearest to the fact, copy, update and retain 4 : 12 : 16, the
nearest last, and the nearest stored fact in front of every prompt, for the method has no notion of scope: evaluations
hand it the fact that each prompt belongs to. In ``clean`` a prompt must be similar to the fact's, and examples about
the subject of the edit itself are not shown. EasyEdit takes 16 examples of one pool of all kinds, so that the ratio
is left to chance, the nearest first, and no block of the fact itself; nothing of this is here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InvalidFact
from ..facts import Fact
from ..memory.demonstrations import BLOCK, KINDS, Demonstrator, filled, load_examples
from ..memory.sentences import DEFAULT_ENCODER
from ..memory.text_prefix import IkeMemory, ids_in_front, packed
from ..models.describe import ModelDescription
from ..models.tokens import encode_prompt, leading_specials
from .base import register_editor
from .memory_editor import Learned
from .retrieval import RetrievalEditor, as_mapping, n_target
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)

PLAIN = "{fact}\n{prompt}"
THRESHOLD = 0.65


@dataclass(frozen=True)
class IkeParams:
    """Hyper-parameters of IKE.

    Attributes:
        k: demonstrations; 0 puts the fact alone in front.
        demonstrations: file of records to take them from; see also :class:`Ike`.
        ratio: copy : update : retain.
        order: ``"nearest_last"`` or ``"nearest_first"``.
        copy_block: a block of the fact itself behind the demonstrations.
        template: of a block, with ``{fact}`` and, at its end, ``{prompt}``; None: "New Fact" and "Prompt" as
            published, with ``k=0`` the fact and a new line.
        separator: between blocks.
        reserve: tokens of the context that are left for prompts and answers.
        encoder: folder or name of the sentence encoder.
        pooling: of its states: ``"mean"``, ``"cls"`` or ``"last"``.
        threshold: of the cosine between a prompt and the fact's prompt, from which the fact is in front; None: 0.65,
            in ``official`` there is no threshold.
        tokenizer: folder of the base model's tokenizer, where a loaded edit finds it.
    """

    k: int = 32
    demonstrations: str = ""
    ratio: tuple[float, ...] = (4, 12, 16)
    order: str = "nearest_last"
    copy_block: bool | None = None
    template: str | None = None
    separator: str = "\n\n"
    reserve: int = 64
    encoder: str = DEFAULT_ENCODER
    pooling: str = "mean"
    threshold: float | None = None
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.k < 0 or self.reserve < 1:
            raise ValueError(
                f"k must not be negative and reserve be positive, got {self.k} and {self.reserve}"
            )
        if len(self.ratio) != len(KINDS) or min(self.ratio) < 0 or not sum(self.ratio) > 0:
            raise ValueError(f"ratio must be three numbers, {' : '.join(KINDS)}, got {self.ratio}")
        if self.order not in ("nearest_last", "nearest_first"):
            raise ValueError(f"order must be one of nearest_last, nearest_first, got {self.order!r}")
        template = self.template
        if template is not None and (template.count("{fact}") != 1 or not template.endswith("{prompt}")):
            raise ValueError(f"the template must hold one {{fact}} and end in {{prompt}}, got {template!r}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Nothing depends on the model."""
        return {}


@register_editor("ike")
class Ike(RetrievalEditor):
    """Puts demonstrations and a fact in front of the prompts that are about it; see the module.

    Every edit can be reverted by itself, in any order. A saved edit holds its texts, so the demonstrations are needed
    for editing only.

    Args:
        model: the base model; it is never changed.
        tokenizer: its tokenizer.
        demonstrations: records or facts to demonstrate with, or a file of them, in the place of the hyper-parameter;
            not those that are to be edited or tested. Needed unless ``k`` is 0.
        params: see :class:`IkeParams`.
        **options: see :class:`Editor`.
    """

    Params = IkeParams
    memory_class = IkeMemory

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        demonstrations: str | Path | Iterable[Any] | None = None,
        params: Any = None,
        **options: Any,
    ) -> None:
        given = as_mapping(params)
        if isinstance(demonstrations, (str, Path)):
            given["demonstrations"], demonstrations = str(demonstrations), None
        super().__init__(model, tokenizer, params=given, **options)
        k, threshold, template, own = (
            getattr(self.params, name) for name in ("k", "threshold", "template", "copy_block")
        )
        if threshold is None and self.profile != "official":
            threshold = THRESHOLD
        self.params = dataclasses.replace(
            self.params,
            threshold=threshold,
            template=template or (BLOCK if k else PLAIN),
            copy_block=bool(k) if own is None else own,
        )
        self.demonstrator: Demonstrator | None = None
        if k:
            self.demonstrator = self._demonstrator(demonstrations)

    def _demonstrator(self, given: Iterable[Any] | None) -> Demonstrator:
        source = given if given is not None else self.params.demonstrations
        if isinstance(source, str) and not source:
            raise ValueError(
                f"ike needs records to take {self.params.k} demonstrations from: give demonstrations=..., or k=0 for "
                "the fact alone"
            )
        return Demonstrator(
            load_examples(source),
            self.encoder,
            self.params.template,
            self.params.ratio,
            self.seed,
            keep_subject=self.profile == "official",
        )

    def new_memory(self) -> IkeMemory:
        """An empty memory with this editor's settings, encoder and tokenizer."""
        width = self.description.hidden_size
        memory = IkeMemory(width, width, vars(self.params), self.profile, self.seed)
        memory.encoder, memory.tokenizer = self.encoder, self.tokenizer
        return memory

    def learn(self, facts: list[Fact], watch: Stopwatch) -> Learned:
        """The embeddings of the facts' prompts, and their texts.

        Raises:
            InvalidFact: not even a fact itself fits into the model's context, or its prompt is longer than the
                encoder takes.
        """
        keys = self.keys(facts, watch)
        with watch.stage("text"):
            texts = [self.text(fact) for fact in facts]
        short = sum(len(kinds) < self.params.k for _, kinds in texts)
        if short:
            logger.warning(
                "%d of %d facts have fewer than %d demonstrations: as many as the context of %s tokens and the "
                "examples allow",
                short,
                len(facts),
                self.params.k,
                self.description.context_length,
            )
        counts = {kind: [kinds.count(kind) for _, kinds in texts] for kind in KINDS}
        measured = {"demonstrations": counts, "tokens_in_front": [len(ids) for ids, _ in texts]}
        return Learned({"keys": keys, **packed([ids for ids, _ in texts])}, measured=measured)

    def text(self, fact: Fact) -> tuple[list[int], list[str]]:
        """Ids of what stands in front of the prompts that a fact is about, and the kinds of its demonstrations.

        As many demonstrations as fit are taken, the nearest ones.
        """
        found = [] if self.demonstrator is None else self.demonstrator.blocks(fact, self.params.k)
        room = self._room(fact)
        fitting = self._ids(fact, [])
        if len(fitting) > room:
            raise InvalidFact(
                f"{fact.text!r} takes {len(fitting)} tokens in front of a prompt without any demonstration, the "
                f"context of {self.description.context_length} has room for {room}: take a smaller reserve, or "
                "copy_block=False"
            )
        low, high = 0, len(found)
        whole = self._ids(fact, [block for _, block in found])
        if len(whole) <= room:
            return whole, [kind for kind, _ in found]
        while high - low > 1:  # with low blocks it fits, with high it does not
            middle = (low + high) // 2
            ids = self._ids(fact, [block for _, block in found[:middle]])
            if len(ids) <= room:
                low, fitting = middle, ids
            else:
                high = middle
        return fitting, [kind for kind, _ in found[:low]]

    def _ids(self, fact: Fact, blocks: list[str]) -> list[int]:
        params = self.params
        if params.order == "nearest_last":
            blocks = blocks[::-1]
        if params.copy_block:
            blocks = [*blocks, filled(params.template, fact, fact.text + fact.target)]
        text = params.separator.join([*blocks, filled(params.template, fact, "")])
        return ids_in_front(self.tokenizer, text)

    def _room(self, fact: Fact) -> float:
        """Tokens that may stand in front."""
        limit = self.description.context_length
        own = len(encode_prompt(self.tokenizer, fact.text)) - len(leading_specials(self.tokenizer))
        own += n_target(self.tokenizer, fact)
        return float("inf") if limit is None else limit - max(own, self.params.reserve)
