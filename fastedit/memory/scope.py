"""Scope classifiers: which prompts an edit is about, by the distance between embeddings (Mitchell et al. 2022).

An embedding is pooled from hidden states: those of a text encoder, or the base model's own. The embeddings of edits
are kept, since a classifier is frozen once it is in use, so a prompt costs one pass of the encoder, or none if the
base model's states serve. A trained classifier is a folder: ``serac.json`` (the settings), ``head.safetensors`` (a
linear map after the pooling, if it has one), ``encoder/`` and ``tokenizer/`` (the base model's, which reads ids).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artefacts.safetensors_file import read_tensors
from ..errors import CorruptFile
from ..io import read_json
from ..models.fingerprint import fingerprint, weight_digest
from .encoder import TextEncoder

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
