"""RECIPE: facts as keys in a store, a soft prompt in front of what asks for one (Chen et al. 2024, arXiv 2405.03279).

Nothing is trained for an edit: a batch of facts is one pass of a text encoder. What reads facts and makes prompts is
trained once for a model, see :mod:`fastedit.editors.recipe_training`; for what happens when the edited model is asked
see :mod:`fastedit.memory.recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import FasteditError, InvalidFact
from ..facts import Fact
from ..memory.fact_store import FactStore
from ..memory.recipe import RecipeMemory, knowledge_text, load_parts, require_model
from ..memory.side_module import SideModule
from ..models.describe import ModelDescription
from ..models.tokens import encode_prompt, target_ids
from .base import register_editor
from .memory_editor import Learned
from .retrieval import TextEditor
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class RecipeParams:
    """Hyper-parameters of RECIPE.

    Attributes:
        checkpoint: folder that training wrote.
        encoder: where the text encoder is, if the checkpoint does not hold it and it is not where it was.
        store: folder in which facts are kept beyond this process; it is made if there is none. "": in main memory.
        on_duplicate: which of several facts with the same prompt answers, ``"latest"`` or ``"first"``, or
            ``"error"``.
        index: ``"flat"``, or ``"faiss"`` for the largest stores; see
            :class:`fastedit.memory.fact_store.FactStore`.
        same_weights: refuse a checkpoint that was trained for this model with other weights or in another precision.
        tokenizer: folder of the base model's tokenizer, if the checkpoint's is not to serve.
    """

    checkpoint: str = ""
    encoder: str = ""
    store: str = ""
    on_duplicate: str = "latest"
    index: str = "flat"
    same_weights: bool = True
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.on_duplicate not in ("latest", "first", "error"):
            raise ValueError(f"on_duplicate must be one of latest, first, error, got {self.on_duplicate!r}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """None depends on the model."""
        return {}


_TOKENS_PER_BYTE = (
    11  # at most: one for each byte, after a normalisation (NFKC) that lengthens texts up to so much
)
_SPECIALS = 16  # tokens that a tokenizer may add to a text, at most


@register_editor("recipe")
class Recipe(TextEditor):
    """Puts facts into a store beside the whole model; see the module.

    Every edit can be reverted by itself, in any order: to take single facts off, edit one a call. If ``store`` names
    a folder, its facts are served from now on, and what is edited or reverted is written there before the call
    returns. Profile ``"official"`` looks facts up by all tokens of a call, target included, as the published
    evaluation does; otherwise by the prompt's (see :func:`fastedit.memory.prompts`).

    Args:
        model: the base model; it is never changed.
        tokenizer: its tokenizer.
        params: see :class:`RecipeParams`; ``checkpoint`` must be given.
        **options: see :class:`Editor`.

    Raises:
        FasteditError: the checkpoint, its encoder or the store cannot be loaded.
        BaseMismatch: the checkpoint is for another model, its encoder is another one now, or the store was filled
            with another checkpoint.
    """

    Params = RecipeParams
    memory_class = RecipeMemory

    def __init__(self, model: nn.Module, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        given: RecipeParams = self.params
        if not given.checkpoint:
            raise ValueError(
                "recipe needs a checkpoint that was trained for the model, params={'checkpoint': DIR}: make one with "
                "fastedit train recipe"
            )
        places = {"checkpoint": given.checkpoint, "encoder": given.encoder}
        found: dict[str, Any] = {
            name: str(Path(place).resolve())
            for name, place in places.items()
            if Path(place).is_dir() and place
        }
        if given.store:
            found["store"] = str(Path(given.store).resolve())
        self.params = dataclasses.replace(given, **found)
        self.parts = load_parts(self.params.checkpoint, self.params.encoder)
        require_model(self.parts, model, self.params.checkpoint, self.params.same_weights)
        self.parts.to(next(model.parameters()).device)
        if self.params.store:
            self._serve_store()

    @property
    def store(self) -> FactStore:
        """The facts that are served.

        Raises:
            FasteditError: there is no memory on the model.
        """
        side = self.side
        if side is None:
            raise FasteditError("the model has no recipe memory: edit a fact first")
        assert isinstance(side.memory, RecipeMemory)
        return side.memory.store

    @property
    def made_with(self) -> dict[str, str]:
        """The checkpoint's digest."""
        return {"checkpoint": self.parts.digest}

    def learn(self, facts: list[Fact], watch: Stopwatch) -> Learned:
        """The facts' keys."""
        self._check_room(facts)
        with watch.stage("encode"):
            return Learned({"keys": self.keys(facts)})

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """(n, dim) fp32 on the CPU: keys of facts, read as prompt and target.

        Raises:
            InvalidFact: one is longer than the encoder takes.
        """
        texts = [knowledge_text(fact.text, fact.target) for fact in facts]
        self.parts.encoder.check(texts)
        return self.parts.keys(texts)

    def _serve_store(self) -> SideModule:
        """The memory on the model, with the facts of the store's folder."""
        side = self.side
        if side is None:
            return self.serve()
        if side.memory.params["store"] != self.params.store:
            raise FasteditError(
                f"the model has a recipe memory already, with its facts in "
                f"{side.memory.params['store'] or 'main memory'}: take it off first (fastedit.memory.clear_memories)"
            )
        return side

    def new_memory(self) -> RecipeMemory:
        """An empty memory with this editor's checkpoint and tokenizer."""
        width = self.description.hidden_size
        memory = RecipeMemory(width, width, vars(self.params), self.profile, self.seed)
        memory.parts, memory.tokenizer = self.parts, self.tokenizer
        return memory

    def _check_room(self, facts: Sequence[Fact]) -> None:
        """Make sure that soft prompt, prompt and target fit into the model's context."""
        limit = self.description.context_length
        n_prompt = self.parts.networks.sizes.prompt_tokens
        for fact in facts:
            n_bytes = len(f"{fact.text}{fact.target}".encode())
            if limit is None or n_prompt + _TOKENS_PER_BYTE * n_bytes + _SPECIALS <= limit:
                continue
            try:
                target = target_ids(self.tokenizer, fact.target)
            except ValueError as error:
                raise InvalidFact(f"{fact.text!r}: {error}") from None
            n = n_prompt + len(encode_prompt(self.tokenizer, fact.text)) + len(target)
            if n > limit:
                raise InvalidFact(
                    f"{fact.text!r} takes {n} tokens with its soft prompt and its target, the model's context holds "
                    f"{limit}"
                )
