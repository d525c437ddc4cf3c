"""What is put in front of a text: right in every model and batch, read once, and without any trace where nothing is."""

from __future__ import annotations

import pytest
import torch
from memory.toy import generate
from memory.toy_prefix import PROMPTS, ROUTES, asked, expected, with_prefix
from model_configs import FAMILIES, tiny_model

from fastedit.memory import prompts, route_info

MAIN = ["llama", "gpt2", "gptj", "qwen2"]


def rows_of(logits, inputs):
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


def ids_of(inputs):
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("text", [False, True], ids=["prompt", "text"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_definition(family, side, text):
    model, memory = with_prefix(family, text=text)
    base = tiny_model(family)
    inputs = asked(side=side)
    with torch.no_grad():
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for use_cache in (True, False):
            out = model(**inputs, position_ids=places, use_cache=use_cache)
            for ours, ids, index in zip(rows_of(out.logits, inputs), ids_of(inputs), ROUTES, strict=True):
                torch.testing.assert_close(ours, expected(base, memory.memory, ids, index), rtol=1e-4, atol=1e-5)
    assert [row[0]["route"] for row in route_info(model)] == ROUTES


@pytest.mark.parametrize("text", [False, True], ids=["prompt", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_stepwise_argmax_of_whole_forwards(family, text):
    model, side = with_prefix(family, text=text)
    base = tiny_model(family)
    inputs = asked()
    out = generate(model, inputs)
    assert len(side.memory.asked) == 1
    for row, ids, index in zip(out, ids_of(inputs), ROUTES, strict=True):
        for token in row.tolist():
            logits = expected(base, side.memory, ids, index)[-1]
            assert int(logits.argmax()) == token
            ids = [*ids, token]
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(out, generate(model, inputs, use_cache=False))
