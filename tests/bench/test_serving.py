"""What the benchmark of serving sets up: memories built directly, routes as said, waits that are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.bench import serving
from fastedit.bench.editing import load
from fastedit.memory import sides_of

MEMORIES = ("grace", "wise")


@pytest.fixture(scope="module")
def setting() -> tuple[dict[str, Any], dict[str, serving.Inputs]]:
    """The demo model without and with each memory, sharing its parameters, and prompts."""
    model, tokenizer = load("demo")
    layer, (edited, unrelated) = serving.LAYERS["demo"], serving.prompts()
    inputs = {
        "edited": serving.encoded(tokenizer, edited, "cpu"),
        "unrelated": serving.encoded(tokenizer, unrelated, "cpu"),
    }
    models = {
        "unedited": model,
        "grace": serving.with_grace(model, layer, inputs["edited"]),
        "wise": serving.with_wise(model, layer, inputs["edited"], inputs["unrelated"], 2),
    }
    return models, inputs


def test_prompts_are_distinct() -> None:
    edited, unrelated = serving.prompts()
    assert len({*edited, *unrelated}) == 2 * serving.PROMPTS


def test_twins_share_parameters_but_no_memory(setting: Any) -> None:
    models, _ = setting
    pairs = zip(models["unedited"].parameters(), models["grace"].parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert sides_of(models["unedited"]) == []
    assert [sides_of(models[name])[0].memory.n_entries for name in MEMORIES] == [serving.ENTRIES, 2]


@pytest.mark.parametrize("name", MEMORIES)
def test_routes_are_as_the_prompts_say(name: str, setting: Any) -> None:
    models, inputs = setting
    assert serving.check_routes(name, models[name], "edited", inputs["edited"]) == 1
    assert serving.check_routes(name, models[name], "unrelated", inputs["unrelated"]) == 0
    two = {kind: models[kind] for kind in ("unedited", name)}
    serving.check_bits(two, inputs["unrelated"], 3)
    with pytest.raises(SystemExit, match="64 of 64 unrelated prompts are routed"):
        serving.check_routes(name, models[name], "unrelated", inputs["edited"])
    with pytest.raises(SystemExit, match="have changed"):
        serving.check_bits(two, inputs["edited"], 3)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_generated_token_waits_for_nothing_more(name: str, setting: Any) -> None:
    models, inputs = setting
    few = {key: value[:2] for key, value in inputs["edited"].items()}
    first, later = serving.waits(models["unedited"], few)
    assert serving.waits(models[name], few) == (first + 1, later)


def test_models_take_turns_at_every_token(setting: Any) -> None:
    models, inputs = setting
    few = {key: value[:2] for key, value in inputs["edited"].items()}
    found = serving.timed(models, few, 4, "cpu")
    assert list(found) == list(models)
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in found.values())


def test_a_generation_is_the_greedy_one(setting: Any) -> None:
    models, inputs = setting
    few = {key: value[:3] for key, value in inputs["edited"].items()}
    run, tokens = serving.Generation(models["wise"], few, "cpu"), []
    for _ in range(4):
        run.step()
        tokens.append(run.ids)
    expected = serving.generate(models["wise"], few, 4)[:, -4:]
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_waits_are_counted() -> None:
    with serving.Waits() as waits, serving.Lists() as lists:
        tensor = torch.ones(3)
        tensor.sum().item()
        tensor.nonzero()
        tensor.tolist()
        bool(tensor.any())
    assert (waits.count, lists.count) == (3, 1)
