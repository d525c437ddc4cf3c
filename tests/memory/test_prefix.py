"""What is put in front of a text: right in every model and batch, read once, no trace where there is nothing."""

from __future__ import annotations

import pytest
import torch
from memory.toy import generate
from memory.toy_prefix import ROUTES, asked, expected, with_prefix
from model_configs import FAMILIES, tiny_model

from fastedit.memory import prompts, route_info
from fastedit.memory.prefix import prefixed_states
from fastedit.models import describe

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
                torch.testing.assert_close(
                    ours, expected(base, memory.memory, ids, index), rtol=1e-4, atol=1e-5
                )
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


@pytest.mark.parametrize("family", FAMILIES)
def test_training_states_are_those_of_serving(family):
    model, side = with_prefix(family)
    side.memory.words = {"France": 0, "Danielle": 0}
    inputs = asked(side="right")
    hit = torch.tensor([True, False, False, False, True])
    with torch.no_grad():
        served = model(**inputs).logits
    prompt = side.memory.prompts[0].clone().requires_grad_()
    states = prefixed_states(model, **_named(inputs), prompts=prompt.expand(5, -1, -1), hit=hit)
    ours = describe(model).logits(states)
    for a, b in zip(rows_of(ours, inputs), rows_of(served, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours[hit].square().mean(), prompt)
    assert gradient.abs().min() > 0
    all_hit = prefixed_states(model, **_named(inputs), prompts=prompt.expand(5, -1, -1))
    torch.testing.assert_close(all_hit[hit], states[hit], rtol=1e-4, atol=1e-5)


def _named(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}
