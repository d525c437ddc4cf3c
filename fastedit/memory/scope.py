"""Scope classifiers: which prompts an edit is about, by the distance between embeddings (Mitchell et al. 2022).

An embedding is pooled from hidden states: those of a text encoder, or the base model's own. The embeddings of edits
are kept, since a classifier is frozen once it is in use, so a prompt costs one pass of the encoder, or none if the
base model's states serve. A trained classifier is a folder: ``serac.json`` (the settings), ``head.safetensors`` (a
linear map after the pooling, if it has one), ``encoder/`` and ``tokenizer/`` (the base model's, which reads ids).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artefacts.safetensors_file import read_tensors
from ..errors import CorruptFile, FasteditError, InvalidFact
from ..io import read_json
from ..models.fingerprint import fingerprint, weight_digest
from .routing import last_token

logger = logging.getLogger(__name__)

BASE = "base"
FORMAT, VERSION = "fastedit-serac", 1
SETTINGS, HEAD, ENCODER, TOKENIZER, COUNTERFACTUAL = (
    "serac.json",
    "head.safetensors",
    "encoder",
    "tokenizer",
    "counterfactual",
)
_CHOICES = {
    "pooling": ("cls", "mean", "last"),
    "similarity": ("distance", "cosine"),
}
_TOGETHER = 64  # texts encoded in one pass


@dataclass(frozen=True)
class ScopeSettings:
    """How similar two embeddings are, and from where on a prompt is in scope.

    Attributes:
        pooling: of the last hidden states: the first token's (``"cls"``), their ``"mean"``, or the ``"last"``
            token's.
        similarity: ``"distance"`` exp(−scale·‖e − x‖²), or ``"cosine"``.
        scale: see ``similarity``.
        threshold: a prompt is in scope if its similarity is greater.
        normalise: pooled states are divided by their norm before the head.
    """

    pooling: str
    similarity: str
    scale: float
    threshold: float
    normalise: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.scale > 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale must be positive, got {self.scale}")
        low = 0.0 if self.similarity == "distance" else -1.0
        if not low < self.threshold < 1:
            raise ValueError(
                f"the threshold of a {self.similarity} must be between {low:g} and 1, got {self.threshold}"
            )


class TextEncoder:
    """An encoder with its tokenizer, frozen.

    Args:
        module: a transformers encoder; called with what its tokenizer gives it returns ``last_hidden_state``.
        tokenizer: its own tokenizer.
    """

    def __init__(self, module: nn.Module, tokenizer: Any) -> None:
        self.module, self.tokenizer = module.eval().requires_grad_(False), tokenizer
        self.tokenizer.truncation_side = "left"  # the end of a prompt is what asks
        self._warned = False

    @classmethod
    def load(cls, folder: str | Path) -> TextEncoder:
        """Read an encoder from a folder or a name on the hub.

        Raises:
            FasteditError: it cannot be loaded; says why.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            return cls(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        except (OSError, ValueError, ImportError) as error:
            raise FasteditError(f"cannot load the scope classifier {folder}: {error}") from error

    @property
    def limit(self) -> int:
        """Number of tokens that it takes."""
        most = getattr(self.module.config, "max_position_embeddings", None)
        sizes = [self.tokenizer.model_max_length, *([most] if isinstance(most, int) and most > 0 else [])]
        return int(min(sizes))

    def check(self, texts: Sequence[str]) -> None:
        """Make sure that texts are no longer than the encoder takes.

        Raises:
            InvalidFact: one is; names it.
        """
        for text, ids in zip(texts, self._ids(texts), strict=True):
            if len(ids) > self.limit:
                raise InvalidFact(
                    f"{text!r} takes {len(ids)} tokens, the scope classifier's encoder holds {self.limit}"
                )

    def pooled(self, texts: Sequence[str], pooling: str) -> Tensor:
        """(n, d) pooled states of texts, in the encoder's dtype. Of a text that is too long, the end counts.

        Differentiable if the encoder's parameters are.
        """
        if not self._warned and any(len(ids) > self.limit for ids in self._ids(texts)):
            logger.warning("a prompt is longer than the encoder's %d tokens: its end decides", self.limit)
            self._warned = True
        device = next(self.module.parameters()).device
        parts = []
        for start in range(0, len(texts), _TOGETHER):
            batch = self.tokenizer(
                list(texts[start : start + _TOGETHER]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.limit,
            ).to(device)
            states = self.module(**batch).last_hidden_state
            parts.append(pool(states, batch["attention_mask"].bool(), pooling))
        return torch.cat(parts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), verbose=False)["input_ids"]


def pool(states: Tensor, tokens: Tensor, pooling: str) -> Tensor:
    """(B, d) of states (B, T, d) at tokens (B, T) bool; see :class:`ScopeSettings`.

    ``"cls"`` is the first marked token.
    """
    if pooling == "mean":
        weights = tokens.to(states) / tokens.sum(1, keepdim=True).clamp(min=1).to(states)
        return (states * weights[..., None]).sum(1)
    column = tokens.int().argmax(1) if pooling == "cls" else last_token(tokens)
    return states[torch.arange(len(states), device=states.device), column]


class Scope:
    """A classifier in use: pooled states to embeddings, distances to similarities.

    Attributes:
        settings: see :class:`ScopeSettings`.
        encoder: None if the base model's own states are pooled.
        layer: the block whose output is pooled then.
        weight: (k, d) fp32, the head; None if there is none.
        digest: what makes it this classifier; of edits that were embedded by another, nothing can be said.
    """

    def __init__(
        self,
        settings: ScopeSettings,
        *,
        encoder: TextEncoder | None = None,
        layer: int = 0,
        weight: Tensor | None = None,
    ) -> None:
        self.settings, self.encoder, self.layer, self.weight = settings, encoder, layer, weight
        self.digest = "-".join(
            (
                BASE if encoder is None else fingerprint(encoder.module),
                "plain" if weight is None else weight_digest(weight)[:16],
            )
        )

    def embed(self, pooled: Tensor) -> Tensor:
        """(n, k) fp32 embeddings of pooled states (n, d)."""
        return embeddings(
            pooled, self.settings, None if self.weight is None else self.weight.to(pooled.device)
        )

    def similarity(self, distances: Tensor) -> Tensor:
        """Similarities of distances between embeddings."""
        if self.settings.similarity == "cosine":
            return 1 - distances.square() / 2
        return torch.exp(-self.settings.scale * distances.square())

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device; does nothing if it is there."""
        if self.encoder is not None and next(self.encoder.module.parameters()).device != device:
            self.encoder.module.to(device)


def embeddings(pooled: Tensor, settings: ScopeSettings, weight: Tensor | None) -> Tensor:
    """(n, k) fp32: pooled states (n, d), normalised if the settings say so, through the head (k, d).

    For a cosine the result has norm one.
    """
    x = pooled.float()
    if settings.normalise:
        x = F.normalize(x, dim=1)
    if weight is not None:
        x = F.linear(x, weight)
    return F.normalize(x, dim=1) if settings.similarity == "cosine" else x


def default_settings(classifier: str, profile: str) -> dict[str, Any]:
    """Settings of a classifier that was not trained here.

    Published are the [CLS] state and a distance with scale 1. In ``clean`` an untrained encoder is used by the cosine
    of mean states, and the base model by that of the last token's states, in which prompts with the same answer are
    near each other.
    """
    if profile == "official":
        pooling = "last" if classifier == BASE else "cls"
        return {"pooling": pooling, "similarity": "distance", "scale": 1.0, "threshold": 0.5}
    if classifier == BASE:
        return {"pooling": "last", "similarity": "cosine", "scale": 1.0, "threshold": 0.83}
    return {"pooling": "mean", "similarity": "cosine", "scale": 1.0, "threshold": 0.85}


def trained_settings(folder: str | Path) -> dict[str, Any] | None:
    """What :mod:`fastedit.editors.serac_training` wrote into a folder; None if it did not make it.

    Raises:
        CorruptFile: the file is damaged, or of another version.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CorruptFile(f"{path} does not describe a SERAC classifier of version {VERSION}")
    return content


def load_scope(classifier: str, settings: Mapping[str, Any], layer: int) -> Scope:
    """Make a classifier ready.

    Args:
        classifier: ``"base"``, an encoder's folder or name, or a folder that training wrote.
        settings: all of :class:`ScopeSettings`.
        layer: for the base model's states.

    Raises:
        FasteditError: something cannot be loaded.
        CorruptFile: a file is damaged.
    """
    found = ScopeSettings(**settings)
    if classifier == BASE:
        return Scope(found, layer=layer)
    trained = trained_settings(classifier)
    if trained is None:
        return Scope(found, encoder=TextEncoder.load(classifier))
    folder = Path(classifier)
    encoder = TextEncoder.load(folder / ENCODER) if trained["backbone"] == ENCODER else None
    weight = read_tensors(folder / HEAD)["weight"] if (folder / HEAD).is_file() else None
    return Scope(found, encoder=encoder, layer=layer, weight=weight)
