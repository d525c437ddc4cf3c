"""Editors on tiny random models: facts, statistics, and comparing bits."""

from __future__ import annotations

from typing import Any

import torch
from model_configs import tiny_tokenizer

import fastedit
from fastedit import Fact
from fastedit.editors.base import editor_class
from fastedit.editors.locate_then_edit import LocateThenEdit
from fastedit.editors.memory_editor import target_rows
from fastedit.editors.prompts import fact_rows
from fastedit.memory import prompts
from fastedit.models import describe

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} plays the", "Miles Davis", "violin"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),
]
CONTEXTS = ["{}", "The thing. {}", "Because of this. {}"]
QUICK = {"steps": 6}


def moments(model: Any) -> dict[int, torch.Tensor]:
    """Some positive definite statistics for every layer."""
    description = describe(model)
    generator = torch.Generator().manual_seed(5)
    result = {}
    for layer in range(description.n_layers):
        d = description.projection(layer).d_in
        sample = torch.randn(d, 4 * d, generator=generator)
        result[layer] = sample @ sample.T / (4 * d)
    return result


def make(method: str, model: Any, **options: Any) -> Any:
    """An editor with few steps and given statistics and contexts, as far as the method has them."""
    if issubclass(editor_class(method), LocateThenEdit):
        options = {"params": QUICK, "statistics": moments(model), "contexts": CONTEXTS, **options}
    return fastedit.editor(method, model, tiny_tokenizer(), **options)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def target_loss(model: Any, facts: list[Fact]) -> float:
    """Mean cross-entropy of the facts' target tokens after their prompts."""
    total = torch.zeros(())
    for row in fact_rows(tiny_tokenizer(), facts, ["{}"], None):
        logits = model(input_ids=torch.tensor([row.targets[0].ids])).logits[0, -len(row.target) :]
        total += torch.nn.functional.cross_entropy(logits.float(), torch.tensor(row.target))
    return float(total) / len(facts)


def ask(texts: list[str]) -> dict[str, torch.Tensor]:
    """Prompts as a batch, padded on the left."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits(model: Any, texts: list[str]) -> torch.Tensor:
    """(texts, length, vocabulary) of prompts, padded on the left."""
    inputs = ask(texts)
    return model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits


@torch.no_grad()
def losses(model: Any, facts: list[Fact]) -> torch.Tensor:
    """Each target's mean negative log-likelihood, the route decided by the prompt."""
    found = []
    for row in target_rows(tiny_tokenizer(), facts, None):
        with prompts(model, [row.n_prompt]):
            out = model(input_ids=torch.tensor([row.ids])).logits[0, row.key :]
        found.append(torch.nn.functional.cross_entropy(out.float(), torch.tensor(row.target)))
    return torch.stack(found)
