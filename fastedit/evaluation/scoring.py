"""Teacher-forced scores of (prompt, target) pairs, many at a time and independent of the batch.

A pair is the text ``prompt + " " + target`` tokenised as one string; the target's tokens are found by
character offsets. Only the hidden states that predict a target token go through the output head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..memory.serac import answers
from ..models import (
    ModelDescription,
    describe,
    encode_prompt,
    leading_specials,
    pad_batch,
    pad_id,
    target_ids,
)
from ..models.describe import unwrap
from ..progress import progress

# Logits are made for at most this many elements at once, 256 MB in float32.
_MAX_LOGITS = 1 << 26


class Pair(NamedTuple):
    """What to score: ``joined`` text, or ids of both parts put together (``joined=False``)."""

    prompt: str
    target: str
    joined: bool = True


@dataclass(frozen=True)
class PairScore:
    """The score of one pair, a value per target token.

    Attributes:
        log_probs: natural log of p(token | prompt, earlier target tokens).
        argmax: id of the most probable token at that place, the lowest of equals.
        target_ids: the target's own ids.
        ties: number of places where several tokens share the highest logit.
    """

    log_probs: tuple[float, ...]
    argmax: tuple[int, ...]
    target_ids: tuple[int, ...]
    ties: int = 0

    @property
    def hits(self) -> list[bool]:
        """Whether each target token is the argmax."""
        return [a == t for a, t in zip(self.argmax, self.target_ids, strict=True)]

    @property
    def nll(self) -> float:
        """The length-normalised negative log-likelihood of the target."""
        return -math.fsum(self.log_probs) / len(self.log_probs)


class Unscorable(NamedTuple):
    """Stands for a score that cannot be had, with the reason in words."""

    reason: str


class _Encoded(NamedTuple):
    ids: list[int]
    start: int


class Forward:
    """Runs a model without gradients and in eval mode, and gives logits at chosen places only.

    Args:
        model: a causal language model of transformers, or anything that is called with ``input_ids`` and
            ``attention_mask`` and returns an object with ``logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.description: ModelDescription | None
        try:
            self.description = describe(model)
        except UnsupportedModel:
            self.description = None
        body = self.description.decoder if self.description else unwrap(model)
        self._body = body
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters

    @property
    def device(self) -> torch.device:
        """Where the ids must be."""
        parameter = next(iter(self._embeddings().parameters()), None)
        if parameter is None or parameter.is_meta:
            return torch.device(getattr(self.model, "device", "cpu"))
        return parameter.device

    @property
    def context_length(self) -> int | None:
        """Number of tokens the model takes, if it says so."""
        return self.description.context_length if self.description else None

    def _embeddings(self) -> nn.Module:
        return self.description.embeddings if self.description else self.model

    def step(self, rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
        """Hidden states of padded rows, and the mask.

        For a model without description, and one whose memory answers for the whole model, logits instead.
        """
        ids, mask, positions = (t.to(self.device) for t in pad_batch(rows, pad, side))
        return self.run(ids, mask, positions, use_cache=False)[0], mask

    def run(self, ids: Tensor, mask: Tensor, positions: Tensor, **more: Any) -> tuple[Tensor, Any]:
        """One call of the model: the states (batch, time, ...) and its cache, if it was asked for one."""
        if self._takes_positions:
            more["position_ids"] = positions
        if self.description is None:
            more.pop("use_cache", None)
            return self.model(input_ids=ids, attention_mask=mask, **more).logits, None
        if answers(self.model):
            out = self.model(input_ids=ids, attention_mask=mask, **more)
            return out.logits, getattr(out, "past_key_values", None)
        out = self._body(input_ids=ids, attention_mask=mask, **more)
        return out.last_hidden_state, getattr(out, "past_key_values", None)

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Logits (rows, vocabulary) of ``states`` (rows, ...) in float32 or better, a chunk at a time."""
        if self.description is None or answers(self.model):
            yield from (part.float() for part in states.split(max(1, _MAX_LOGITS // states.shape[-1])))
            return
        size = getattr(self.description.head, "out_features", None) or 1 << 17
        for part in states.split(max(1, _MAX_LOGITS // size)):
            logits = self.description.logits(part)
            yield logits if logits.dtype == torch.float64 else logits.float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout; the model's training flags are put back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


class Scorer:
    """Scores pairs in batches.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        batch_size: number of pairs a batch; results do not depend on it.
        padding_side: ``"right"`` or ``"left"``; results do not depend on it either.
        show_progress: True, False, or None for a bar on a terminal only.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        padding_side: str = "right",
        show_progress: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.forward = Forward(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.padding_side = padding_side
        self.show_progress = show_progress
        self._leading = len(leading_specials(tokenizer))

    def encode(self, pair: Pair) -> _Encoded | Unscorable:
        """Ids of a pair and the index of the first target token, or the reason why there are none."""
        prompt, target = pair.prompt, pair.target.strip()
        if not target:
            return Unscorable("the target is empty")
        if not prompt.strip():
            return Unscorable("the prompt is empty")
        ids, start = self._joined(prompt, target) if pair.joined else self._concatenated(prompt, target)
        limit = self.forward.context_length
        if limit is not None and len(ids) > limit:
            return Unscorable(f"prompt and target have {len(ids)} tokens, the model takes {limit}")
        if not 0 < start < len(ids):
            return Unscorable("no target token follows the prompt")
        return _Encoded(ids, start)

    def _joined(self, prompt: str, target: str) -> tuple[list[int], int]:
        text = f"{prompt} {target}"
        if not getattr(self.tokenizer, "is_fast", False):  # no offsets: what both encodings share is prompt
            ids, alone = encode_prompt(self.tokenizer, text), encode_prompt(self.tokenizer, prompt)
            pairs = zip(ids, alone, strict=False)
            start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(alone)))
            return ids, start
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        inside = [i for i, (begin, end) in enumerate(offsets) if begin < end and end > len(prompt)]
        if not inside:
            return ids, len(ids)
        return ids[: inside[-1] + 1], inside[0]

    def _concatenated(self, prompt: str, target: str) -> tuple[list[int], int]:
        start = encode_prompt(self.tokenizer, prompt)
        return [*start, *target_ids(self.tokenizer, " " + target)], len(start)

    def score(self, pairs: Sequence[Pair]) -> list[PairScore | Unscorable]:
        """Score every pair; the result has the order of ``pairs``."""
        encoded = [self.encode(pair) for pair in pairs]
        results: list[PairScore | Unscorable] = [e if isinstance(e, Unscorable) else _NONE for e in encoded]
        rows = [(i, e) for i, e in enumerate(encoded) if isinstance(e, _Encoded)]
        rows.sort(key=lambda row: -len(row[1].ids))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        with self.forward.evaluating():
            for batch in progress(batches, desc="scoring", unit="batch", show=self.show_progress):
                for (index, _), score in zip(batch, self._score([e for _, e in batch]), strict=True):
                    results[index] = score
        return results

    def _score(self, batch: Sequence[_Encoded]) -> list[PairScore | Unscorable]:
        from ..memory.routing import prompts

        with prompts(self.forward.model, [e.start for e in batch]):  # answers do not route a memory
            states, mask = self.forward.step(
                [e.ids for e in batch], pad_id(self.tokenizer), self.padding_side
            )
        shift = (mask.argmax(dim=1) if self.padding_side == "left" else torch.zeros(len(batch))).tolist()
        places = [(r, int(shift[r]) + i - 1) for r, e in enumerate(batch) for i in range(e.start, len(e.ids))]
        wanted = [e.ids[i] for e in batch for i in range(e.start, len(e.ids))]
        rows, columns = (torch.tensor(part, device=states.device) for part in zip(*places, strict=True))
        log_probs, argmax, tied = self._at(states[rows, columns], torch.tensor(wanted))
        scores: list[PairScore | Unscorable] = []
        done = 0
        for e in batch:
            part = slice(done, done + len(e.ids) - e.start)
            done = part.stop
            if not all(map(math.isfinite, log_probs[part])):
                scores.append(Unscorable("the model gives logits that are not finite"))
                continue
            target = tuple(e.ids[e.start :])
            scores.append(PairScore(tuple(log_probs[part]), tuple(argmax[part]), target, sum(tied[part])))
        return scores

    def _at(self, states: Tensor, wanted: Tensor) -> tuple[list[float], list[int], list[bool]]:
        """Log-probability of ``wanted`` (rows,), argmax and tie flag of each row of ``states``."""
        log_probs: list[float] = []
        argmax: list[int] = []
        tied: list[bool] = []
        for logits in self.forward.logits(states):
            ids = wanted[len(log_probs) : len(log_probs) + len(logits)].to(logits.device)
            best = logits == logits.amax(dim=-1, keepdim=True)
            picked = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
            log_probs.extend(picked.double().tolist())
            argmax.extend(best.int().argmax(dim=-1).tolist())
            tied.extend((best.sum(dim=-1) > 1).tolist())
        return log_probs, argmax, tied


_NONE = Unscorable("not scored")
