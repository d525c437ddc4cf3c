"""What RECIPE, RASE, LTE and IKE share: facts are found by text, and each edit can be taken off by itself."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import InvalidFact
from ..facts import Fact, validate_facts
from ..io import read_json
from ..memory.edit import Base, MemoryEdit
from ..memory.sentences import SentenceEncoder
from ..memory.side_module import SideModule, attach, detach, find_side
from ..models.tokens import target_ids
from .base import Editor
from .memory_editor import Learned
from .stopwatch import Stopwatch


class TextEditor(Editor):
    """Base of editors whose memory finds facts by the text of a prompt.

    A method gives its :attr:`memory_class`, :meth:`learn`, :meth:`new_memory` and :attr:`made_with`.

    Attributes:
        layer: the block that the memory stands beside; None for the whole model.
    """

    memory_class: ClassVar[type[Any]]
    layer: int | None = None

    @property
    def side(self) -> SideModule | None:
        """The memory on the model; None before the first edit and after the last was taken off."""
        return find_side(self.model, self.layer, self.memory_class.method)

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> MemoryEdit:  # type: ignore[override]
        """Put a batch of facts into the memory; see :meth:`Editor.edit`."""
        checked = validate_facts(facts)
        watch = Stopwatch()
        side = self.side
        with ExitStack() as stack:
            if side is not None:
                stack.enter_context(side.suspended())
            learned = self.learn(checked, watch)
        with watch.stage("apply"):
            edit = MemoryEdit(
                method=self.memory_class.method,
                facts=checked,
                layer=self.layer,
                tensors=learned.tensors,
                about={**learned.about, **self.made_with},
                params=vars(self.params),
                seed=self.seed,
                profile=self.profile,
                base=Base.of(self.model, self.layer),
                beneath=() if side is None else tuple(each.id for each in side.edits),
                measured=learned.measured,
            )
            fresh = self.serve() if side is None else None
            try:
                edit._join(self.model)
            except BaseException:
                if fresh is not None:
                    detach(self.model, fresh)
                raise
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        edit.measured.update(self.overhead())
        return edit

    @abstractmethod
    def learn(self, facts: list[Fact], watch: Stopwatch) -> Learned:
        """What is kept of a batch. The memory on the model is suspended; the model is left as it is."""

    @property
    @abstractmethod
    def made_with(self) -> dict[str, str]:
        """The digest of what makes an edit's keys, by the name under which the memory looks for it."""

    @abstractmethod
    def new_memory(self) -> Any:
        """An empty memory with this editor's settings, encoder and tokenizer."""

    def serve(self) -> SideModule:
        """Put an empty memory on the model, which has none."""
        return attach(self.model, self.layer, self.new_memory())

    def overhead(self) -> dict[str, Any]:
        """Size of the memory and its work beside that of the model; the encoder's pass comes on top."""
        side = self.side
        if side is None:
            return {}
        memory = side.memory
        return {
            "memory_entries": memory.n_entries,
            "memory_bytes": memory.n_bytes,
            "prefill_flops": memory.prefill_flops,
            "token_flops": memory.token_flops,
        }


class RetrievalEditor(TextEditor):
    """Base of editors whose memory finds facts by their sentence embeddings.

    The hyper-parameters name the ``encoder``, its ``pooling`` and the folder of the base model's ``tokenizer``.

    Args:
        model: see :class:`Editor`.
        tokenizer: see :class:`Editor`.
        **options: see :class:`Editor`.

    Attributes:
        encoder: reads facts and prompts.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        where = self.params.tokenizer or str(getattr(tokenizer, "name_or_path", ""))
        encoder = self.params.encoder
        if Path(encoder).is_dir():
            encoder = str(Path(encoder).resolve())
        self.params = dataclasses.replace(self.params, tokenizer=where, encoder=encoder)
        self.encoder = SentenceEncoder.load(vars(self.params))

    @property
    def made_with(self) -> dict[str, str]:
        """The encoder's digest."""
        return {"encoder": self.encoder.digest}

    def keys(self, facts: list[Fact], watch: Stopwatch) -> Tensor:
        """(n, d) fp32 on the CPU: the embeddings of the facts' prompts.

        Raises:
            InvalidFact: one is longer than the encoder takes.
        """
        texts = [fact.text for fact in facts]
        with watch.stage("embed"):
            self.encoder.check(texts)
            return self.encoder.embed(texts, next(self.model.parameters()).device)


def as_mapping(params: Any) -> dict[str, Any]:
    """Hyper-parameters as they were given, an object, a mapping or a JSON file, as a mapping of their values."""
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return dict(vars(params))
    return dict(read_json(params)) if isinstance(params, (str, Path)) else dict(params or {})


def n_target(tokenizer: Any, fact: Fact) -> int:
    """Number of tokens of a fact's target; InvalidFact if it has none."""
    try:
        return len(target_ids(tokenizer, fact.target))
    except ValueError as error:
        raise InvalidFact(f"{fact.text!r}: {error}") from None
