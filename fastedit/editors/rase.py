"""RASE: a memory of fact patches around any weight editor of ours (Han et al. 2023, EMNLP Findings).

Each fact is edited alone on the weights as they are, by the editor of your choice; the change is kept as factors and
the weights get their former bits back. A prompt that is matched to a fact is answered with its patch; see
:mod:`fastedit.memory.rase` for the gate and what it costs. With ROME, which its paper calls R-ROME, the name here is
``rase_rome``, since r-ROME is another method.

Any editor whose changes are at MLP output projections serves. ROME's and MEMIT's patches have rank one; those of
fine-tuning have full rank, so each takes the memory of the whole matrix. Memory editors decide themselves for which
prompts they answer, so they are not put inside. The published encoders were trained for the gate; here any sentence
encoder is taken as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts.factors import Change, LowRank
from ..errors import NumericalError, UnsupportedModel
from ..facts import Fact
from ..memory.rase import RaseMemory
from ..memory.sentences import DEFAULT_ENCODER
from ..models.describe import ModelDescription, describe
from ..progress import progress
from .base import Editor, editor_class, register_editor
from .locate_then_edit import LocateThenEdit
from .memory_editor import Learned
from .retrieval import RetrievalEditor, as_mapping
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RaseParams:
    """Hyper-parameters of RASE. Gate and number of candidates are the published ones.

    Attributes:
        layers: the lowest block that the editor changes, one; found by itself.
        above: the other blocks that it changes; found by themselves.
        editor: name of the method that makes the patches.
        editor_params: its hyper-parameters; those left out are as ever.
        encoder: folder or name of the sentence encoder.
        pooling: of its states: ``"mean"``, ``"cls"`` or ``"last"``.
        k: candidates of a prompt.
        gate_best: a prompt is about its best candidate if the score, a cosine, is above this; or
        gate_margin: it is so far above the second, and
        gate_spread: the candidates' scores have a standard deviation above this. In either case
        gate_least: the score is not below this; None: 0.5, in ``official`` there is no such bound. Without it, a few
            facts draw prompts that are about none of them.
        merge_above: a new fact replaces those of the same subject whose prompts' cosine with its own is above this.
        tokenizer: folder of the base model's tokenizer, where a loaded edit finds it.
    """

    layers: tuple[int, ...]
    above: tuple[int, ...] = ()
    editor: str = "rome"
    editor_params: Mapping[str, Any] = field(default_factory=dict)
    encoder: str = DEFAULT_ENCODER
    pooling: str = "mean"
    k: int = 5
    gate_best: float = 0.9
    gate_margin: float = 0.15
    gate_spread: float = 0.05
    gate_least: float | None = None
    merge_above: float = 0.95
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 32:
            raise ValueError(f"k must be from 1 to 32, got {self.k}")
        for name in ("gate_best", "gate_margin", "gate_spread", "merge_above"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Nothing depends on the model but what the editor decides."""
        return {}


@register_editor("rase")
class Rase(RetrievalEditor):
    """Edits facts one by one with another editor and keeps each change as a patch; see the module.

    Args:
        model: the base model; it ends with the bits it had.
        tokenizer: its tokenizer.
        params: see :class:`RaseParams`.
        profile: passed on to the editor as well. ``"official"`` compares facts by their keys alone when
            near-duplicates are sought, and asks the gate before the candidates are ranked two-way as well as after.
        seed: see :class:`Editor`; of the editor too.
        progress: see :class:`Editor`.
        **options: of the editor, such as ``statistics``.

    Attributes:
        inner: the editor that makes the patches.
    """

    Params = RaseParams
    memory_class = RaseMemory

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        params: Any = None,
        profile: Any = "clean",
        seed: int = 0,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        given = as_mapping(params)
        self._options = {"profile": profile, "seed": seed, "progress": False, **options}
        self._name = self._checked_name(str(given.get("editor", "rome")))
        self._model_tokenizer = (model, tokenizer)
        inner_params = dict(given.get("editor_params") or {})
        if "layers" in given and not inner_params.get("modules"):
            inner_params.setdefault("layers", given["layers"])
        self.inner = self._new_inner(inner_params or None)
        layers = edited_layers(describe(model), self.inner)
        given |= {
            "editor": self._name,
            "editor_params": dict(vars(self.inner.params)),
            "layers": layers[:1],
            "above": layers[1:],
        }
        if given.get("gate_least") is None:
            given["gate_least"] = -1.0 if profile == "official" else 0.5
        super().__init__(model, tokenizer, params=given, profile=profile, seed=seed, progress=progress)
        self.layer = layers[0]

    def _checked_name(self, name: str) -> str:
        return _checked_editor(name)

    def _new_inner(self, params: Any) -> Editor:
        model, tokenizer = self._model_tokenizer
        return editor_class(self._name)(model, tokenizer, params=params, **self._options)

    def new_memory(self) -> RaseMemory:
        """An empty memory with this editor's settings, encoder and tokenizer."""
        assert self.layer is not None
        lowest = self.description.projection(self.layer)
        memory = RaseMemory(lowest.d_in, lowest.d_out, vars(self.params), self.profile, self.seed)
        memory.encoder, memory.tokenizer = self.encoder, self.tokenizer
        return memory

    def learn(self, facts: list[Fact], watch: Stopwatch) -> Learned:
        """Keys, prompts and patches of a batch.

        Raises:
            InvalidFact: a fact cannot be edited, or is longer than the encoder takes.
            NumericalError: the patch of a fact is not finite; names it.
        """
        with watch.stage("embed"):
            texts = [fact.text + fact.target for fact in facts]
            self.encoder.check(texts)
            device = next(self.model.parameters()).device
            keys = self.encoder.embed(texts, device)
            sentences = self.encoder.embed([fact.text for fact in facts], device)
        patches = []
        with watch.stage("edit"):
            if isinstance(self.inner, LocateThenEdit):  # all are edited on the weights as they are
                self.inner.made_ahead.clear()
                self.inner.optimise_targets(facts)
            for fact in progress(facts, desc="patches", unit="fact", show=self.progress):
                patches.append(self.patch(fact))
        tensors = {"keys": keys, "sentences": sentences, **_stacked(patches)}
        ranks = [max((factors.rank for factors in patch.values()), default=0) for patch in patches]
        return Learned(tensors, measured={"ranks": ranks})

    def patch(self, fact: Fact) -> dict[int, LowRank]:
        """By block, the change that the editor makes of a fact alone; the model ends with the bits it had."""
        inner = self.inner
        if not isinstance(inner, LocateThenEdit):
            inner = self._new_inner(self.inner.params)  # nothing of an earlier fact is carried on
        edit = inner.edit([fact])
        edit.revert(self.model)
        names = {
            self.description.projection(layer).weight_name: layer
            for layer in (self.layer, *self.params.above)
            if layer is not None
        }
        found = {names[name]: as_factors(edit.change(name)) for name in edit.weight_names}
        if not all(factors.is_finite() for factors in found.values()):
            raise NumericalError(
                f"the patch of {fact.text!r} is not finite: take other settings of {self._name}"
            )
        empty = {layer: self.description.projection(layer) for layer in names.values() if layer not in found}
        none = {layer: LowRank(torch.zeros(p.d_out, 0), torch.zeros(p.d_in, 0)) for layer, p in empty.items()}
        return {**found, **none}


@register_editor("rase_rome")
class RaseRome(Rase):
    """RASE with ROME's patches; its edits are RASE edits."""

    def _checked_name(self, name: str) -> str:
        if name != "rome":
            raise ValueError(f"rase_rome makes its patches with rome, got editor={name!r}: take rase")
        return name


def _checked_editor(name: str) -> str:
    if name.startswith("rase"):
        raise ValueError("rase cannot be put inside of rase: choose another editor")
    if getattr(editor_class(name), "memory_class", None) is not None:
        raise ValueError(
            f"{name} is a memory editor and decides itself for which prompts it answers: rase keeps the patches of "
            "weight editors, such as rome, memit, alphaedit, nse, ultraedit or ft"
        )
    return name


def edited_layers(description: ModelDescription, editor: Editor) -> tuple[int, ...]:
    """The blocks whose MLP output projections an editor changes, ascending.

    Raises:
        UnsupportedModel: it changes other weights.
    """
    names = {description.projection(layer).weight_name: layer for layer in range(description.n_layers)}
    others = [name for name in editor.weight_names if name not in names]
    if others or not editor.weight_names:
        raise UnsupportedModel(
            f"rase adds patches at MLP output projections, {editor.method} changes "
            f"{', '.join(others[:3]) or 'weights that it does not name'}"
        )
    return tuple(sorted({names[name] for name in editor.weight_names}))


def as_factors(change: Change) -> LowRank:
    """What an edit adds to a weight, as factors: exact, with one identity if it is dense."""
    low_rank, dense = change
    parts = [] if low_rank is None else [low_rank]
    if dense is not None:
        d_out, d_in = dense.shape
        if d_out <= d_in:
            parts.append(LowRank(torch.eye(d_out), dense.T))
        else:
            parts.append(LowRank(dense, torch.eye(d_in)))
    return LowRank.sum(parts)


def _stacked(patches: Sequence[Mapping[int, LowRank]]) -> dict[str, Tensor]:
    """``A.layer`` (n, d_in, r) and ``B.layer`` (n, r, d_out), smaller ranks filled up with zeros."""
    tensors: dict[str, Tensor] = {}
    for layer in patches[0]:
        factors = [patch[layer] for patch in patches]
        rank, (d_out, d_in) = max(each.rank for each in factors), factors[0].shape
        a, b = torch.zeros(len(factors), d_in, rank), torch.zeros(len(factors), rank, d_out)
        for row, each in enumerate(factors):
            a[row, :, : each.rank], b[row, : each.rank] = each.right, each.left.T
        tensors |= {f"A.{layer}": a, f"B.{layer}": b}
    return tensors
