"""SERAC: a cache of edits, a scope classifier and a counterfactual model (Mitchell et al. 2022, arXiv 2206.06520).

A prompt that the classifier finds in the scope of an edit is answered by the counterfactual model, which reads the
edit in front of it; all others by the base model. Nothing is trained for an edit: its embedding and its text are put
into the cache. See :mod:`fastedit.memory.serac` for what happens under ``generate()`` and what it costs, and
:mod:`fastedit.editors.serac_training` for how classifier and counterfactual model are trained.

Without training, ``"base"`` and ``"base"`` make it usable at once: prompts are compared by the base model's own
last-token states, and the base model itself reads the edit in its context. How well that works depends on the model.

Of the published variants, several heads, bounded embeddings and the cross-attention classifier are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidFact
from ..facts import Fact, validate_facts
from ..io import read_json
from ..memory.edit import Base, MemoryEdit
from ..memory.scope import BASE, COUNTERFACTUAL, default_settings, trained_settings
from ..memory.serac import Parts, SeracMemory, base_states, load_parts
from ..memory.side_module import SideModule, attach, detach, find_side
from ..models.describe import ModelDescription, describe
from ..models.tokens import encode_prompt, leading_specials, pad_batch, target_ids
from .base import Editor, register_editor
from .memory_editor import depth_default
from .stopwatch import Stopwatch

_TOGETHER = 64  # prompts in one pass of the base model


@dataclass(frozen=True)
class SeracParams:
    """Hyper-parameters of SERAC. What is None comes from the classifier's folder or by default.

    Attributes:
        layers: the block whose last-token states ``classifier="base"`` compares, one.
        classifier: ``"base"``, the folder or name of a text encoder, or a folder that training wrote.
        counterfactual: ``"base"``, or the folder or name of a causal language model with the base model's
            vocabulary; None takes the trained one beside the classifier, else the base model.
        mix: ``"hard"`` the answer of one model; ``"soft"`` log((1 − s)·p_base + s·p_cf + ε) for every prompt.
        separator: text between an edit and the prompt, for the counterfactual model.
        pooling: see :class:`fastedit.memory.scope.ScopeSettings`, as the next four.
        similarity: ``"distance"`` or ``"cosine"``.
        scale: of a distance.
        threshold: of the similarity.
        normalise: pooled states before the head.
        tokenizer: folder of the base model's tokenizer, where a loaded edit finds it.
    """

    layers: tuple[int, ...]
    classifier: str = BASE
    counterfactual: str | None = None
    mix: Literal["hard", "soft"] = "hard"
    separator: str | None = None
    pooling: str | None = None
    similarity: str | None = None
    scale: float | None = None
    threshold: float | None = None
    normalise: bool | None = None
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.mix not in ("hard", "soft"):
            raise ValueError(f"mix must be one of hard, soft, got {self.mix!r}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """States at four fifths of the depth."""
        return {"layers": depth_default(description, 0.8)}


@register_editor("serac")
class Serac(Editor):
    """Puts edits into a cache beside the whole model; see the module.

    Every edit can be reverted by itself, in any order: to take single lines off, edit one fact a call.

    Args:
        model: the base model; it is never changed.
        tokenizer: its tokenizer.
        classifier: see :class:`SeracParams`; a folder may be a path.
        counterfactual: likewise.
        **options: see :class:`Editor`.
    """

    Params = SeracParams
    memory_class = SeracMemory

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        classifier: str | Path | None = None,
        counterfactual: str | Path | None = None,
        params: Any = None,
        **options: Any,
    ) -> None:
        given = {"classifier": classifier, "counterfactual": counterfactual}
        chosen = {name: str(value) for name, value in given.items() if value is not None}
        if chosen:
            params = {**_as_mapping(params), **chosen}
        super().__init__(model, tokenizer, params=params, **options)
        if len(self.params.layers) != 1:
            raise ValueError(f"the states of one layer are compared, got layers {self.params.layers}")
        self.params = resolved(self.params, self.profile, tokenizer)
        self.parts: Parts = load_parts(vars(self.params), model, tokenizer)

    @property
    def side(self) -> SideModule | None:
        """The memory on the model; None before the first edit and after the last was taken off."""
        return find_side(self.model, None, self.method)

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> MemoryEdit:  # type: ignore[override]
        """Put a batch of facts into the cache; see :meth:`Editor.edit`."""
        checked = validate_facts(facts)
        watch = Stopwatch()
        prefixes = self.prefixes(checked)
        with watch.stage("embed"):
            vectors = self.embed(checked)
        side = self.side
        with watch.stage("apply"):
            edit = MemoryEdit(
                method=self.method,
                facts=checked,
                layer=None,
                tensors={"embeddings": vectors},
                about={
                    "prefixes": prefixes,
                    "leading": leading_specials(self.tokenizer),
                    "classifier": self.parts.scope.digest,
                    "counterfactual": self.parts.digest,
                },
                params=vars(self.params),
                seed=self.seed,
                profile=self.profile,
                base=Base.of(self.model, None),
                beneath=() if side is None else tuple(each.id for each in side.edits),
            )
            fresh = attach(self.model, None, self.new_memory()) if side is None else None
            try:
                edit.apply(self.model)
            except BaseException:
                if fresh is not None:
                    detach(self.model, fresh)
                raise
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        edit.measured.update(self.overhead())
        return edit

    def new_memory(self) -> SeracMemory:
        """An empty memory with this editor's settings and models."""
        memory = SeracMemory(
            self.description.hidden_size,
            self.description.hidden_size,
            vars(self.params),
            self.profile,
            self.seed,
        )
        memory.parts = self.parts
        return memory

    def embed(self, facts: Sequence[Fact]) -> Tensor:
        """(n, k) fp32 on the CPU: the facts' embeddings, from their prompts; in ``official`` with their targets.

        Raises:
            InvalidFact: one is longer than the encoder takes.
        """
        scope = self.parts.scope
        texts = [edit_text(fact, self.profile, scope.encoder) for fact in facts]
        if scope.encoder is None:
            pooled = pooled_by_base(self.model, self.tokenizer, texts, scope.layer, scope.settings.pooling)
        else:
            scope.encoder.check(texts)
            with torch.no_grad():
                pooled = scope.encoder.pooled(texts, scope.settings.pooling)
        return scope.embed(pooled).cpu()

    def prefixes(self, facts: Sequence[Fact]) -> list[list[int]]:
        """Ids of what the counterfactual model reads in front of a prompt, for each fact.

        Raises:
            InvalidFact: with the fact's own prompt and target it is longer than a model's context.
        """
        other = self.parts.counterfactual
        limits = [self.description.context_length, describe(other or self.model).context_length]
        limit = min((limit for limit in limits if limit is not None), default=None)
        found = []
        for fact in facts:
            prefix = edit_prefix(self.tokenizer, fact, self.params.separator)
            n = (
                len(prefix)
                + len(encode_prompt(self.tokenizer, fact.text))
                + len(_target(self.tokenizer, fact))
            )
            if limit is not None and n > limit:
                raise InvalidFact(
                    f"{fact.text!r} takes {n} tokens with its edit in front and its target, the context holds {limit}"
                )
            found.append(prefix)
        return found

    def overhead(self) -> dict[str, Any]:
        """Size of the memory, and how large the counterfactual model is beside the base model."""
        side = self.side
        if side is None:
            return {}
        other = self.parts.counterfactual
        count = [sum(p.numel() for p in module.parameters()) for module in (other or self.model, self.model)]
        return {
            "memory_entries": side.memory.n_entries,
            "memory_bytes": side.memory.n_bytes,
            "prefill_flops": side.memory.prefill_flops,
            "counterfactual_size": count[0] / count[1],
        }


def resolved(params: SeracParams, profile: str, tokenizer: Any) -> SeracParams:
    """The hyper-parameters with nothing left open: given over trained over default."""
    trained = None if params.classifier == BASE else trained_settings(params.classifier)
    values: dict[str, Any] = {"normalise": False, **default_settings(params.classifier, profile)}
    counterfactual = BASE
    layers = params.layers
    if trained is not None:
        values = dict(trained["settings"])
        layers = tuple(trained["layers"])
        if (Path(params.classifier) / COUNTERFACTUAL).is_dir():
            counterfactual = params.classifier
    values |= {
        "counterfactual": counterfactual,
        "separator": (trained or {}).get("separator", " " if profile == "official" else "\n"),
    }
    values |= {name: getattr(params, name) for name in values if getattr(params, name) is not None}
    values |= {
        "classifier": _absolute(params.classifier),
        "counterfactual": _absolute(values["counterfactual"]),
    }
    where = params.tokenizer or str(getattr(tokenizer, "name_or_path", ""))
    return dataclasses.replace(params, layers=layers, tokenizer=where, **values)


def _as_mapping(params: Any) -> dict[str, Any]:
    if isinstance(params, SeracParams):
        return dict(vars(params))
    return dict(read_json(params)) if isinstance(params, (str, Path)) else dict(params or {})


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name != BASE and Path(name).is_dir() else name


def edit_prefix(tokenizer: Any, fact: Fact, separator: str) -> list[int]:
    """Ids of the edit as the counterfactual model reads it: prompt, target, separator."""
    return encode_prompt(tokenizer, fact.text + fact.target + separator)


def edit_text(fact: Fact, profile: str, encoder: Any) -> str:
    """The edit as the classifier reads it: its prompt; in ``official`` prompt [SEP] target [SEP]."""
    if profile != "official":
        return fact.text
    separator = getattr(getattr(encoder, "tokenizer", None), "sep_token", None)
    if separator is None:
        return fact.text + fact.target
    return f"{fact.text} {separator}{fact.target} {separator}"


@torch.no_grad()
def pooled_by_base(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layer: int, pooling: str
) -> Tensor:
    """(n, d) pooled states of texts after block ``layer`` of the base model."""
    rows = [encode_prompt(tokenizer, text) for text in texts]
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(rows), _TOGETHER):
        ids, mask, _ = pad_batch(rows[start : start + _TOGETHER], 0)
        parts.append(base_states(model, ids.to(device), mask.to(device), layer, pooling))
    return torch.cat(parts)


def _target(tokenizer: Any, fact: Fact) -> list[int]:
    try:
        return target_ids(tokenizer, fact.target)
    except ValueError as error:
        raise InvalidFact(f"{fact.text!r}: {error}") from None
