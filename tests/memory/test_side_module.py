"""A side module leaves the model's parameters, names and files alone, and survives what is done to models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from memory.toy import Toy, add_toy, batch, generate, last_logits, with_toy
from model_configs import tiny_model
from transformers import AutoModelForCausalLM

from fastedit import FasteditError
from fastedit.memory import Memory, attach, clear_memories, route_info, sides_of
from fastedit.models.fingerprint import fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_and_files_are_those_of_the_base_model(family: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    model, _ = with_toy(family, everyone=True)
    assert fingerprint(model) == fingerprint(base)
    assert list(model.state_dict()) == list(base.state_dict())
    generate(model, batch())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(last_logits(loaded, batch()), last_logits(base, batch()), rtol=0, atol=1e-6)


def test_a_copy_has_a_memory_of_its_own() -> None:
    model, side = with_toy("llama")
    expected = last_logits(model, batch())
    other = copy.deepcopy(model)
    (twin,) = sides_of(other)
    assert twin is not side
    assert twin.memory is not side.memory
    torch.testing.assert_close(last_logits(other, batch()), expected, rtol=0, atol=0)
    assert len(side.memory.calls) == 1
    twin.memory.everyone = False
    assert not torch.equal(last_logits(other, batch()), expected)
    assert torch.equal(last_logits(model, batch()), expected)
    clear_memories(other)
    assert sides_of(other) == []
    assert sides_of(model) == [side]


def test_a_pickled_model_keeps_its_memory() -> None:
    model, _ = with_toy("llama")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(last_logits(again, batch()), last_logits(model, batch()))
    assert route_info(again) == route_info(model)


def test_models_change_precision() -> None:
    model, _ = with_toy("llama")
    model.to(torch.bfloat16)
    assert model.model(**batch()).last_hidden_state.dtype == torch.bfloat16
    model.to(torch.float64)
    assert model.model(**batch()).last_hidden_state.dtype == torch.float64


def test_device_maps() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, _ = with_toy("llama")
    expected = last_logits(model, batch())
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(last_logits(model, batch()), expected)


def test_suspended_is_the_base_model() -> None:
    model, side = with_toy("llama", everyone=True)
    base = last_logits(tiny_model("llama"), batch())
    with side.suspended():
        assert torch.equal(last_logits(model, batch()), base)
    assert not torch.equal(last_logits(model, batch()), base)


def test_gradients_flow_through_the_memory() -> None:
    model, side = with_toy("llama", everyone=True)
    side.memory.shifts.requires_grad_()
    model(**batch()).logits.sum().backward()
    assert side.memory.shifts.grad[0].abs().sum() > 0


def test_what_cannot_be_attached_is_refused() -> None:
    model, _ = with_toy("llama")
    with pytest.raises(FasteditError, match="has a toy memory already"):
        add_toy(model, 1)
    with pytest.raises(IndexError, match="layer must be 0 to 2"):
        attach(model, 7, Toy(64, 32))
    with pytest.raises(ValueError, match="from 10 to 32"):
        attach(model, 0, Toy(10, 32))
    assert len(sides_of(model)) == 1


@pytest.mark.parametrize("lacking", ["remove", "apply_above", "upper_layers"])
def test_a_memory_must_say_what_it_can_do_when_it_is_defined(lacking: str) -> None:
    body = {"remove": Toy.remove, "upper_layers": property(lambda self: (2,)), "apply_above": Toy.apply}
    del body[lacking]
    with pytest.raises(TypeError, match=lacking):
        type("Incomplete", (Memory,), body)
    if lacking == "remove":
        type("Whole", (Memory,), {**body, "whole_state": True})
