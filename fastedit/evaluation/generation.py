"""Free text from a model: greedy answers with natural stops, and seeded top-k samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..models import encode_prompt, pad_batch, pad_id
from ..models.describe import unwrap
from ..progress import progress
from .scoring import Forward, Unscorable

STOPS = (".", "\n")


@dataclass(frozen=True)
class Generation:
    """A generated answer: its ids without prompt and end mark, and its text up to the first stop string."""

    text: str
    ids: tuple[int, ...]


class Generator:
    """Generates in batches with padding on the left, where results do not depend on the batch.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        batch_size: number of prompts a batch.
        chat: put each prompt into the tokenizer's chat template as one user message, no system message;
            None does so if the tokenizer has a template.
        show_progress: True, False, or None for a bar on a terminal only.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        chat: bool | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.forward = Forward(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat and not has_template:
            raise ValueError("chat=True needs a tokenizer with a chat template; this one has none")
        self.chat = has_template if chat is None else chat
        self.show_progress = show_progress

    def greedy(
        self, prompts: Sequence[str], *, max_new_tokens: int = 50, stops: Sequence[str] = STOPS
    ) -> list[Generation | Unscorable]:
        """Continue each prompt greedily until a stop string, the end mark or ``max_new_tokens``.

        The text is cut before the first stop string and stripped.
        """
        rows = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        results: list[Generation | Unscorable] = [
            row if isinstance(row, Unscorable) else Unscorable("not generated") for row in rows
        ]
        with self.forward.evaluating():
            for batch in self._batches(rows, "generating"):
                ids = [rows[i] for i in batch]
                for i, generated in zip(batch, self._greedy(ids, max_new_tokens, stops), strict=True):
                    results[i] = generated
        return results

    def _encode(self, prompt: str, new: int) -> list[int] | Unscorable:
        if not prompt.strip():
            return Unscorable("the prompt is empty")
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids = encode_prompt(self.tokenizer, prompt)
        limit = self.forward.context_length
        if limit is not None and len(ids) + new > limit:
            return Unscorable(
                f"a prompt of {len(ids)} tokens and {new} new ones exceed the {limit} of the model"
            )
        return ids

    def _batches(self, rows: Sequence[list[int] | Unscorable], desc: str) -> Any:
        order = [i for i, row in enumerate(rows) if not isinstance(row, Unscorable)]
        order.sort(key=lambda i: -len(rows[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return progress(batches, desc=desc, unit="batch", show=self.show_progress)

    def _greedy(self, rows: Any, new: int, stops: Sequence[str]) -> list[Generation]:
        from transformers import GenerationConfig, StoppingCriteriaList

        ids, mask, _ = (t.to(self.forward.device) for t in pad_batch(rows, pad_id(self.tokenizer), "left"))
        ends = self._end_ids()
        # Values are given where a model's own generation settings would otherwise take part.
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            pad_token_id=pad_id(self.tokenizer),
            eos_token_id=ends or None,
        )
        watch = StoppingCriteriaList([_stop_strings(self.tokenizer, ids.shape[1], stops)])
        out = unwrap(self.model).generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=watch
        )
        return [self._finish(row, ends, stops) for row in out[:, ids.shape[1] :].tolist()]

    def _end_ids(self) -> list[int]:
        config = getattr(unwrap(self.model), "generation_config", None)
        value = getattr(config, "eos_token_id", None)
        values = value if isinstance(value, list) else [value]
        return sorted({int(v) for v in [*values, self.tokenizer.eos_token_id] if v is not None})

    def _finish(self, ids: list[int], ends: Sequence[int], stops: Sequence[str]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Generation(_cut(text, stops).strip(), tuple(ids[:end]))

    def sample(
        self, prompts: Sequence[str], names: Sequence[str], *, total: int = 100, k: int = 5, seed: int = 0
    ) -> list[str | Unscorable]:
        """Sample each prompt's continuation to ``total`` tokens, prompt included, from the top ``k``.

        The end mark does not stop it. Each prompt has random numbers of its own, from ``seed`` and its entry
        in ``names``, so that the sample does not depend on the batch.

        Returns:
            Texts with their prompts (a prompt of ``total`` tokens or more comes back alone).
        """
        if self.forward.description is None:
            raise UnsupportedModel(f"sampling needs a model of transformers, got {type(self.model).__name__}")
        rows = [self._bare(prompt, total) for prompt in prompts]
        results: list[str | Unscorable] = [
            row if isinstance(row, Unscorable) else Unscorable("not generated") for row in rows
        ]
        with self.forward.evaluating():
            for batch in self._batches(rows, "sampling"):
                drawn = _draws([f"{seed}|{names[i]}|{prompts[i]}" for i in batch], total)
                for i, ids in zip(
                    batch, self._sample([rows[i] for i in batch], total, k, drawn), strict=True
                ):
                    results[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return results

    def _bare(self, prompt: str, total: int) -> list[int] | Unscorable:
        limit = self.forward.context_length
        if limit is not None and total > limit:
            return Unscorable(f"texts of {total} tokens exceed the {limit} that the model takes")
        return encode_prompt(self.tokenizer, prompt) if prompt.strip() else Unscorable("the prompt is empty")

    def _sample(self, rows: Any, total: int, k: int, drawn: Tensor) -> list[list[int]]:
        texts = [list(row) for row in rows]
        ids, mask, positions = (
            t.to(self.forward.device) for t in pad_batch(rows, pad_id(self.tokenizer), "left")
        )
        cache: Any = None
        steps = total - min(map(len, texts))
        for step in range(steps):
            states, cache = self.forward.run(ids, mask, positions, past_key_values=cache, use_cache=True)
            logits = torch.cat(list(self.forward.logits(states[:, -1])))
            top, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
            chance = top.softmax(dim=-1).cumsum(dim=-1)
            index = (chance < drawn[:, step, None].to(chance)).sum(dim=-1).clamp(max=top.shape[-1] - 1)
            ids = tokens.gather(1, index[:, None])
            for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
                if len(text) < total:
                    text.append(token)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return texts


def _draws(names: Sequence[str], n: int) -> Tensor:
    """Uniform numbers (rows, n), each row from its own name."""
    rows = []
    for name in names:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        rows.append(torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return torch.stack(rows)


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def _stop_strings(tokenizer: Any, start: int, stops: Sequence[str]) -> Any:
    """A stopping criterion that ends a row once its new text holds a stop string."""
    from transformers import StoppingCriteria

    class StopStrings(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
            found = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(found, dtype=torch.bool, device=input_ids.device)

    return StopStrings()
