"""The published way of T-Patcher comes to the same patches as ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS

import fastedit
from fastedit import Fact
from fastedit.bench.baselines.t_patcher import PlainTPatcher
from fastedit.memory import sides_of

TEXTS = ["The capital of Japan is Tokyo. Rome is not.", "Miles Davis was born in the city of Paris."] * 3
MANY = [Fact("{} is in", f"Place {n}", ["Rome", "Paris", "Tokyo"][n % 3]) for n in range(50)]


def both(family: str, facts: list[Fact], profile: Any = "clean", **params: Any) -> tuple[Any, Any, Any]:
    """The edit by our editor, the patches by the plain way, and the edited model.

    All activations count in l_a: they begin equal, so that rounding would tell which are the largest.
    """
    params = {"steps": 12, "check_every": 3, "check_from": 3, "memory_k": 20, "activation_k": 40, **params}
    model = tiny_model(family)
    editor = fastedit.editor(
        "t-patcher", model, tiny_tokenizer(), texts=TEXTS, params=params, profile=profile
    )
    rows = list(editor.remembered().split(1))
    plain = PlainTPatcher(
        tiny_model(family),
        tiny_tokenizer(),
        editor.layer,
        editor.params,
        rows[: -(len(rows) // 10)],
        rows[-(len(rows) // 10) :],
        profile == "official",
    )
    for fact in facts:
        plain.edit(fact)
    edit = editor.edit(facts)
    return edit, plain, model


def same(edit: Any, plain: PlainTPatcher, tolerance: float) -> None:
    for name in ("keys", "bias", "values"):
        torch.testing.assert_close(edit.content[name], getattr(plain, name), rtol=tolerance, atol=tolerance)
    assert [each["steps"] for each in edit.measured["facts"] if each["patches"]] == plain.steps


@pytest.mark.parametrize("profile", ["clean", "official"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen2"])
def test_patches_are_those_of_the_whole_network_and_concatenated_weights(family: str, profile: str) -> None:
    edit, plain, model = both(family, FACTS, profile)
    same(edit, plain, 1e-4)
    ids = tiny_tokenizer()("The capital of France is in Rome")["input_ids"]
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, plain.logits(ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "granite"])
def test_patches_below_other_blocks(family: str) -> None:
    edit, plain, _ = both(family, FACTS[:2], layers=(1,))
    same(edit, plain, 1e-4)


def test_fifty_edits_in_a_row() -> None:
    edit, plain, model = both("gpt2", MANY, steps=3)
    same(edit, plain, 1e-4)
    (side,) = sides_of(model)
    assert len(side.memory.patches) == len(plain.bias) > 50


def test_training_ends_where_the_published_way_does() -> None:
    edit, plain, _ = both("llama", FACTS, steps=60, lr=0.05, memory_weight=0.1, check_from=6)
    same(edit, plain, 2e-3)
    assert min(plain.steps) < 60
