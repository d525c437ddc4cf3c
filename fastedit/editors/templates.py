"""Context templates: short texts put before a prompt, so that keys and values hold in running text.

Sampled from the model itself as Meng et al. do, but with a seed and once per editor, so that a run can be
repeated; they are stored in the edit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.runner import BlockRunner

START_WORDS = ("The", "Therefore", "Because", "I", "You")
_TOP_K = 5


def sample_contexts(
    runner: BlockRunner, tokenizer: Any, lengths: Sequence[tuple[int, int]], *, seed: int, keep_specials: bool
) -> list[str]:
    """Sample context templates; the first one returned is the bare ``{}``.

    Args:
        runner: the model.
        tokenizer: its tokenizer.
        lengths: (total length in tokens, number of samples); samples are spread over the start words.
        seed: of the sampler.
        keep_specials: leave special tokens such as BOS in the text, as the published code does.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = ["{}"]
    for length, count in lengths:
        starts = [START_WORDS[i % len(START_WORDS)] for i in range(count)]
        for ids in sample_continuations(runner, tokenizer, starts, length, generator):
            text = plain_text(tokenizer.decode(ids, skip_special_tokens=not keep_specials))
            contexts.append(text + ". {}")
    return contexts


@torch.no_grad()
def sample_continuations(
    runner: BlockRunner, tokenizer: Any, starts: Sequence[str], length: int, generator: torch.Generator
) -> list[list[int]]:
    """Top-k samples of ``length`` tokens in all, as ids, one for each of ``starts``, without a stop at EOS."""
    rows: list[list[int]] = []
    for start in starts:
        ids = list(tokenizer(start)["input_ids"])
        while len(ids) < length:
            logits = _last_logits(runner, ids)
            top = torch.topk(logits.float().cpu(), min(_TOP_K, len(logits)))
            choice = torch.multinomial(torch.softmax(top.values, 0), 1, generator=generator)
            ids.append(int(top.indices[choice]))
        rows.append(ids)
    return rows


def _last_logits(runner: BlockRunner, ids: list[int]) -> Tensor:
    row = torch.tensor([ids], device=runner.device)
    hidden = runner.description.decoder(input_ids=row, use_cache=False).last_hidden_state
    return runner.description.logits(hidden[:, -1])[0]


def plain_text(text: str) -> str:
    """Sampled text without what would break a template: braces, empty lines, odd characters."""
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("<|endoftext|>", "")
    return text.replace("{", " ").replace("}", " ")
