"""A memory that puts something in front of texts by their words, and what must come out of it by definition."""

from __future__ import annotations

from typing import Any

import torch
from memory.toy import PROMPTS
from model_configs import HIDDEN, tiny_model, tiny_tokenizer
from torch import Tensor

from fastedit.memory import Decision, attach
from fastedit.memory.prefix import Prefix, PrefixMemory, PrefixSide
from fastedit.models import describe

WORDS = {"France": 0, "Miles": 1, "Danielle": 0}
ROUTES = [0, 1, None, None, 0]
"""Of PROMPTS."""


class ToyPrefix(PrefixMemory):
    """Finds entries by words; entries 0 and 1 have fixed random prompts of n and n + 2 vectors."""

    method = "toy_prefix"

    def __init__(self, *, n: int = 3, text: bool = False, bos: bool = False, words: Any = None) -> None:
        super().__init__(HIDDEN, HIDDEN, {})
        self.tokenizer = tiny_tokenizer(add_bos=bos)
        self.words = WORDS if words is None else words
        generator = torch.Generator().manual_seed(5)
        self.prompts = [0.5 * torch.randn(n + 2 * i, HIDDEN, generator=generator) for i in range(2)]
        self.texts = ["Rome is in Italy. ", "The capital of Japan is Tokyo. "] if text else None
        self.asked: list[list[str]] = []
        self.made: list[int] = []

    def find(self, texts: list[str]) -> Decision:
        self.asked.append(texts)
        index = [next((i for word, i in self.words.items() if word in text), -1) for text in texts]
        return Decision(torch.tensor(index), score=torch.tensor(index).float())

    def prefix(self, index: int) -> Prefix:
        self.made.append(index)
        if self.texts is not None:
            return Prefix(ids=self.tokenizer(self.texts[index])["input_ids"])
        return Prefix(embeddings=self.prompts[index])

    def add(self, edit: Any) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def remove(self, edit_id: str) -> None:
        raise NotImplementedError

    @property
    def n_entries(self) -> int:
        return 2

    @property
    def n_bytes(self) -> int:
        return sum(prompt.nbytes for prompt in self.prompts)


def with_prefix(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, PrefixSide]:
    """A tiny model with a toy memory in front of it; ``changes`` of its config."""
    model = tiny_model(family, dtype, **options.pop("changes", {}))
    side = attach(model, None, ToyPrefix(**options))
    assert isinstance(side, PrefixSide)
    return model, side


def asked(prompts: list[str] = PROMPTS, side: str = "left", bos: bool = False) -> dict[str, Tensor]:
    """Ids as the tokenizer gives them: the memory reads them."""
    tokenizer = tiny_tokenizer(add_bos=bos)
    tokenizer.padding_side = side
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@torch.no_grad()
def expected(base: Any, memory: ToyPrefix, ids: list[int], index: int | None) -> Tensor:
    """(T, vocabulary) logits of one row by the definition: embeddings in front, official positions."""
    decoder = describe(base).decoder
    if index is None:
        return base(input_ids=torch.tensor([ids])).logits[0]
    prefix = memory.prefix(index)
    table = getattr(decoder, "wpe", None)
    tokens = torch.tensor(ids)
    if prefix.ids is not None:
        own = 1 if prefix.ids[0] == ids[0] == 0 else 0
        whole = base(input_ids=torch.tensor([prefix.ids + ids[own:]])).logits[0]
        kept = whole[len(prefix.ids) :]
        return torch.cat((torch.full((own, kept.shape[1]), torch.nan), kept))
    n = len(prefix)
    prompt = prefix.embeddings.to(base.dtype)
    places = torch.arange(n + len(ids))
    if table is not None:
        places = (places - n).clamp(min=0)
        prompt = prompt - table.weight[0]
    whole = torch.cat((prompt, base.get_input_embeddings()(tokens)))[None]
    ones = torch.ones(whole.shape[:2]).long()  # else positions that repeat are taken for packed texts
    return base(inputs_embeds=whole, attention_mask=ones, position_ids=places[None]).logits[0, n:]


__all__ = ["PROMPTS", "ROUTES", "ToyPrefix", "asked", "expected", "with_prefix"]
