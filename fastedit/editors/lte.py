"""LTE: the nearest facts are put in front of a prompt, for a model that was tuned to heed them (Jiang et al. 2024).

Learning to Edit (arXiv 2402.11905). Nothing is trained for an edit: the embedding of its prompt is kept, and a block
of text with the fact stands in front of the prompts that are about it. Whether the model then answers by the block,
and ignores it where it is beside the point, is what :mod:`fastedit.editors.lte_training` tunes it for. The tuned
model is a model of its own: load the folder ``merged`` that training wrote, or put the adapter into the base model by
:func:`load_adapter`. Without tuning this is a text prefix found by similarity.

In ``official`` the nearest fact is in front of every prompt, whatever it is about. Released weights expect the
wording that they were trained with: give it as ``template``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BaseMismatch, CorruptFile, FasteditError, InvalidFact
from ..facts import Fact
from ..io import read_json
from ..memory.sentences import DEFAULT_ENCODER
from ..memory.text_prefix import LteMemory, block_text, ids_in_front
from ..models.describe import ModelDescription, unwrap
from ..models.fingerprint import fingerprint
from ..models.tokens import encode_prompt, leading_specials
from .base import register_editor
from .memory_editor import Learned
from .retrieval import RetrievalEditor, as_mapping, n_target
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)

TEMPLATE = (
    "Where the following bears on what is asked, go by it; otherwise answer as if it were not there.\n"
    "[Updated Information]\n{facts}\n[Question]\n"
)
SETTINGS, MERGED = "lte.json", "merged"
FORMAT, VERSION = "fastedit-lte", 1
THRESHOLD = 0.65


@dataclass(frozen=True)
class LteParams:
    """Hyper-parameters of LTE. What is None comes from the adapter's folder, or by default.

    Attributes:
        adapter: folder that ``fastedit train lte`` wrote; the model must have that adapter in its weights. Empty: the
            model was not tuned here.
        template: the text in front of a prompt, with ``{facts}`` where the facts stand.
        encoder: folder or name of the sentence encoder.
        pooling: of its states: ``"mean"``, ``"cls"`` or ``"last"``.
        n_facts: at most so many facts are in front.
        threshold: of the cosine between a prompt and a fact's prompt, from which the fact is in front; None: 0.65, in
            ``official`` there is no threshold.
        tokenizer: folder of the base model's tokenizer, where a loaded edit finds it.
    """

    adapter: str = ""
    template: str | None = None
    encoder: str | None = None
    pooling: str | None = None
    n_facts: int = 1
    threshold: float | None = None
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.template is not None:
            require_template(self.template)
        if not 1 <= self.n_facts <= 16:
            raise ValueError(f"n_facts must be from 1 to 16, got {self.n_facts}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Nothing depends on the model."""
        return {}


@register_editor("lte")
class Lte(RetrievalEditor):
    """Puts facts in front of the prompts that are about them; see the module.

    Every edit can be reverted by itself, in any order.
    """

    Params = LteParams
    memory_class = LteMemory

    def __init__(self, model: nn.Module, tokenizer: Any, *, params: Any = None, **options: Any) -> None:
        given = {name: value for name, value in as_mapping(params).items() if value is not None}
        values: dict[str, Any] = {"template": TEMPLATE, "encoder": DEFAULT_ENCODER, "pooling": "mean"}
        if options.get("profile") != "official":
            values["threshold"] = THRESHOLD
        if adapter := given.get("adapter"):
            trained = trained_settings(adapter)
            require_tuned(model, trained, adapter)
            values |= {name: trained[name] for name in ("template", "encoder", "pooling")}
            given["adapter"] = str(Path(adapter).resolve())
        super().__init__(model, tokenizer, params={**values, **given}, **options)

    def new_memory(self) -> LteMemory:
        """An empty memory with this editor's settings, encoder and tokenizer."""
        width = self.description.hidden_size
        memory = LteMemory(width, width, vars(self.params), self.profile, self.seed)
        memory.encoder, memory.tokenizer = self.encoder, self.tokenizer
        return memory

    def learn(self, facts: list[Fact], watch: Stopwatch) -> Learned:
        """The embeddings of the facts' prompts.

        Raises:
            InvalidFact: a fact's block, its prompt and target are longer than the model's context, or its prompt is
                longer than the encoder takes.
        """
        limit = self.description.context_length
        for fact in facts:
            n = len(ids_in_front(self.tokenizer, block_text(self.params.template, [fact])))
            n += len(encode_prompt(self.tokenizer, fact.text)) - len(leading_specials(self.tokenizer))
            n += n_target(self.tokenizer, fact)
            if limit is not None and n > limit:
                raise InvalidFact(
                    f"{fact.text!r} takes {n} tokens with its block in front and its target, the context holds "
                    f"{limit}"
                )
        return Learned({"keys": self.keys(facts, watch)})


def require_template(template: str) -> None:
    """Make sure that a template names the place of the facts once.

    Raises:
        ValueError: it does not.
    """
    if template.count("{facts}") != 1:
        raise ValueError(f"the template must hold exactly one {{facts}}, got {template!r}")


def trained_settings(folder: str | Path) -> dict[str, Any]:
    """What training wrote into a folder.

    Raises:
        FasteditError: it did not write this folder.
        CorruptFile: the file is damaged, or of another version.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FasteditError(
            f"there is no {SETTINGS} in {folder}: name a folder that fastedit train lte wrote"
        )
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CorruptFile(f"{path} does not describe an LTE adapter of version {VERSION}")
    return content


def require_tuned(model: nn.Module, trained: dict[str, Any], folder: str) -> None:
    """Make sure that a model has the adapter in its weights.

    Raises:
        BaseMismatch: it is the model without the adapter.
    """
    found = fingerprint(model)
    if found == trained["base"]:
        raise BaseMismatch(
            f"the model does not have the adapter {folder} in its weights: load {Path(folder) / MERGED} in its "
            "place, or put it in by fastedit.editors.lte.load_adapter(model, folder)"
        )
    if found != trained["tuned"]:
        logger.warning(
            "the model is neither the one that %s was trained on nor that with the adapter in the same bits",
            folder,
        )


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a trained adapter into the weights of the model that it was trained on.

    Args:
        model: changed in place.
        folder: that ``fastedit train lte`` wrote.

    Returns:
        The model.

    Raises:
        FasteditError: peft is not installed, or the folder is none of ours.
        BaseMismatch: the adapter was trained on another model.
    """
    trained = trained_settings(folder)
    if fingerprint(model) != trained["base"]:
        raise BaseMismatch(
            f"the adapter {folder} was trained on another model, or on this one in another precision"
        )
    peft = import_peft()
    tuned: nn.Module = peft.PeftModel.from_pretrained(unwrap(model), str(folder)).merge_and_unload()
    return tuned.eval()


def import_peft() -> Any:
    """The module peft.

    Raises:
        FasteditError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise FasteditError("LTE tunes a LoRA adapter by peft: pip install 'fastedit-llm[peft]'") from error
    return peft
