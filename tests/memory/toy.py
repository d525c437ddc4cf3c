"""A memory that needs no training, models to put it in, and batches to ask."""

from __future__ import annotations

from typing import Any

import torch
from model_configs import tiny_model, tiny_tokenizer
from torch import Tensor

from fastedit.memory import Decision, Memory, Routes, SideModule, attach
from fastedit.models import describe

FAMILIES = ["llama", "gpt2", "gptj", "qwen2"]
PROMPTS = [
    "The capital of France is",
    "Miles Davis plays the",
    "The Eiffel Tower is in the city of",
    "Rome",
    "The mother tongue of Danielle Darrieux is",
]


class Toy(Memory):
    """Routes by the sign of a fixed projection of the mean input; adds a constant to the outputs."""

    method = "toy"

    def __init__(self, d_in: int, d_out: int, *, everyone: bool | None = None, strength: float = 3.0) -> None:
        super().__init__(d_in, d_out, {})
        generator = torch.Generator().manual_seed(3)
        self.direction = torch.randn(d_in, generator=generator)
        self.shifts = strength * torch.randn(2, d_out, generator=generator)
        self.everyone = everyone
        self.cuts = (0.0, 0.5)
        self.calls: list[tuple[int, int]] = []
        self.applied: list[bool] = []  # was it the deciding call

    def scores(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        weights = tokens.float() / tokens.sum(1, keepdim=True).clamp(min=1)
        return (inputs.float() * weights[..., None]).sum(1) @ self.direction.to(inputs.device)

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        self.calls.append(tuple(tokens.shape))
        scores = self.scores(inputs, tokens)
        index = torch.where(scores > self.cuts[0], (scores > self.cuts[1]).long(), -1)
        if self.everyone is not None:
            index = torch.full_like(index, 0 if self.everyone else -1)
        return Decision(torch.where(tokens.any(1), index, -1), score=scores)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        self.applied.append(tokens is not None)
        return outputs + self.shifts.to(outputs)[routes.index.clamp(min=0)][:, None]

    def add(self, edit: Any) -> None:
        raise NotImplementedError

    def remove(self, edit_id: str) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    @property
    def n_entries(self) -> int:
        return 2

    @property
    def n_bytes(self) -> int:
        return self.shifts.nbytes


def with_toy(family: str, layer: int = 1, **options: Any) -> tuple[Any, SideModule]:
    """A tiny model with a toy memory."""
    dtype = options.pop("dtype", torch.float32)
    model = tiny_model(family, dtype)
    return model, add_toy(model, layer, **options)


def add_toy(model: Any, layer: int, method: str = "toy", **options: Any) -> SideModule:
    projection = describe(model).projection(layer)
    memory = Toy(projection.d_in, projection.d_out, **options)
    memory.method = method
    side = attach(model, layer, memory)
    with torch.no_grad():
        model(**batch())
    low, _, middle, _, high = side.router.last[side.key].score.sort().values.tolist()
    memory.cuts = (
        (low + middle) / 2,
        (middle + high) / 2,
    )  # some prompts are routed here, some there, some not
    memory.calls.clear()
    memory.applied.clear()
    return side


def batch(prompts: list[str] = PROMPTS, side: str = "left") -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"] + 1, "attention_mask": encoded["attention_mask"]}


def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits at each row's last real token."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    return logits[torch.arange(len(mask)), last]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """New tokens only; never stops early."""
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        out = model.generate(**inputs, **settings)
    return out[:, inputs["input_ids"].shape[1] :]
