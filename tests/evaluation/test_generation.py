"""Greedy answers and samples: independent of the batch, stopped where they should be."""

from __future__ import annotations

import pytest
import torch

from fastedit.evaluation.generation import Generation, Generator, _cut
from fastedit.evaluation.scoring import Unscorable

PROMPTS = [
    "The capital of France is",
    "Ulm",
    "Who built the first mill? Hugh",
    "Ada Brook was born in",
    "The river",
]


def _plain(model, tokenizer, prompt, n, stops):
    """Greedy decoding without cache or padding."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < n:
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
            if any(stop in tokenizer.decode(new) for stop in stops):
                break
    return new


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_the_plain_way(tiny, batch_size):
    model, tokenizer = tiny
    answers = Generator(model, tokenizer, batch_size=batch_size).greedy(PROMPTS, max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = _plain(model, tokenizer, prompt, 12, (".", "\n"))
        assert list(answer.ids[: len(expected)]) == expected
        assert answer.text == _cut(tokenizer.decode(expected), (".", "\n")).strip()


def test_the_models_own_settings_take_no_part(tiny_llama):
    model, tokenizer = tiny_llama
    expected = Generator(model, tokenizer).greedy(PROMPTS, max_new_tokens=8)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.3
    assert Generator(model, tokenizer).greedy(PROMPTS, max_new_tokens=8) == expected


def test_end_mark_and_stop_strings():
    assert _cut("Paris. It is", (".", "\n")) == "Paris"
    assert _cut("Paris\nLyon.", (".", "\n")) == "Paris"
    assert _cut("Paris", (".", "\n")) == "Paris"


def test_end_mark_ends_the_answer(tiny_llama):
    model, tokenizer = tiny_llama
    first = Generator(model, tokenizer).greedy(["Ulm"], max_new_tokens=4, stops=())[0]
    model.generation_config.eos_token_id = [0, first.ids[2]]
    ended = Generator(model, tokenizer).greedy(["Ulm"], max_new_tokens=4, stops=())[0]
    assert ended.ids == first.ids[: first.ids.index(first.ids[2])]


def test_long_and_empty_prompts_have_a_reason(tiny):
    answers = Generator(*tiny).greedy(["", "The river " * 30, "Ulm"], max_new_tokens=100)
    assert answers[0] == Unscorable("the prompt is empty")
    assert "exceed the 128" in answers[1].reason
    assert isinstance(answers[2], Generation)


def test_chat_template(tiny_llama):
    model, tokenizer = tiny_llama
    with pytest.raises(ValueError, match="chat template"):
        Generator(model, tokenizer, chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[answer]"
    )
    generator = Generator(model, tokenizer)
    assert generator.chat
    assert tokenizer.decode(generator._encode("Who?", 5)) == "[user] Who? [answer]"


def test_samples_do_not_depend_on_the_batch(tiny):
    model, tokenizer = tiny
    names = [f"record {i}" for i in range(len(PROMPTS))]
    one = Generator(model, tokenizer, batch_size=1).sample(PROMPTS, names, total=40, seed=3)
    assert Generator(model, tokenizer, batch_size=5).sample(PROMPTS, names, total=40, seed=3) == one
    assert Generator(model, tokenizer, batch_size=5).sample(PROMPTS, names, total=40, seed=4) != one
    for prompt, text in zip(PROMPTS, one, strict=True):
        assert text.startswith(prompt)


def test_the_best_token_alone_is_greedy(tiny_llama):
    model, tokenizer = tiny_llama
    new = _plain(model, tokenizer, "Ulm", 3, ())
    assert len(new) == 3
    total = len(tokenizer("Ulm")["input_ids"]) + 3
    assert Generator(model, tokenizer).sample(["Ulm"], ["a"], total=total, k=1) == [
        "Ulm" + tokenizer.decode(new)
    ]
