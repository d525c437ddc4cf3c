"""Fine-tuning against the plain loop: whole model, one fact at a time, torch's own autograd and Adam."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from model_configs import FAMILIES, skip_old_layout, tiny_model, tiny_tokenizer
from tiny import FACTS, bits, make, same_bits, target_loss

from fastedit import Fact, InvalidFact, NumericalError, UnsupportedModel
from fastedit.editors.fine_tune import FineTuneLParams, FineTuneParams
from fastedit.editors.prompts import fact_rows
from fastedit.models import describe

METHODS = ("ft", "ft-l", "ft-m")
FEW = {"layers": (1,), "steps": 4, "lr": 2e-3}
MORE = [*FACTS, Fact("{} was born in", "Marie Curie", "Rome"), Fact("The capital of {} is", "Italy", "Oslo")]


def nll(model: Any, row: Any, objective: str) -> torch.Tensor:
    """A fact's loss by the definitions, on the whole model."""
    prompt = row.targets[0].ids[: len(row.targets[0].ids) - len(row.target) + 1]
    if objective == "prompt_last":
        log_p = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        return -log_p[row.target].mean()
    whole = torch.tensor([[*prompt, *row.target]])
    log_p = model(whole).logits[0, :-1].float().log_softmax(-1)
    each = -log_p.gather(1, whole[0, 1:, None])[:, 0]
    return each.mean() if objective == "sentence" else each[-len(row.target) :].mean()


def plain_loop(
    model: Any, facts: Sequence[Fact], params: FineTuneParams, objective: str, size: int, centres: Any = None
) -> None:
    """Fine-tune in place: every weight but those of the layers is frozen, mini-batches in order."""
    rows = fact_rows(tiny_tokenizer(), facts, ["{}"], None)
    weights = [describe(model).projection(layer).weight for layer in params.layers]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    start = [weight.detach().clone() for weight in weights] if centres is None else centres
    optimiser = torch.optim.Adam(weights, lr=params.lr)
    for _ in range(params.steps):
        seen = []
        for first in range(0, len(rows), size):
            losses = torch.stack([nll(model, row, objective) for row in rows[first : first + size]])
            seen += losses.tolist()
            if losses.mean() < params.stop_loss:
                continue
            optimiser.zero_grad()
            losses.mean().backward()
            optimiser.step()
            if params.epsilon is not None:
                with torch.no_grad():
                    for weight, centre in zip(weights, start, strict=True):
                        weight.copy_(weight.clamp(centre - params.epsilon, centre + params.epsilon))
        if sum(seen) / len(seen) < params.stop_loss:
            break
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def same_change(model: Any, plain: Any, before: dict[str, torch.Tensor], tolerance: float = 1e-3) -> None:
    names = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        expected = names[name] - before[name]
        if not bool(expected.any()):
            assert torch.equal(parameter, before[name]), name
            continue
        assert relative_error(parameter - before[name], expected) < tolerance, name


@pytest.mark.parametrize("objective", ["target", "prompt_last", "sentence"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2", "gemma2", "olmo2", "falcon", "granite"])
def test_it_is_the_plain_loop(family: str, objective: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    before = bits(model)
    editor = make("ft", model, params={**FEW, "objective": objective, "micro_batch": 2})
    editor.edit(MORE)
    plain_loop(plain, MORE, editor.params, objective, len(MORE))
    same_change(model, plain, before)


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 2), (2,)], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2"])
def test_several_layers_and_the_last(family: str, layers: tuple[int, ...]) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    before = bits(model)
    editor = make("ft-m", model, params={**FEW, "layers": layers})
    editor.edit(MORE)
    plain_loop(plain, MORE, editor.params, "target", len(MORE))
    same_change(model, plain, before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mini_batches_are_steps_of_their_own(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    before = bits(model)
    editor = make("ft", model, params={**FEW, "mini_batch": 2, "micro_batch": 1})
    editor.edit(MORE)
    plain_loop(plain, MORE, editor.params, "target", 2)
    same_change(model, plain, before)


@pytest.mark.parametrize("profile", ["clean", "official"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_bound_of_two_batches(family: str, profile: str) -> None:
    """Around the original weights, or, in the official profile, around those before each batch."""
    model, plain = tiny_model(family), tiny_model(family)
    before = bits(model)
    params = {**FEW, "epsilon": 3e-3}
    editor = make("ft-l", model, params=params, profile=profile)
    objective = "prompt_last" if profile == "official" else "target"
    original = [describe(plain).projection(1).weight.detach().clone()] if profile == "clean" else None
    for facts in (MORE[:3], MORE[3:]):
        editor.edit(facts)
        plain_loop(plain, facts, editor.params, objective, len(facts), original)
    same_change(model, plain, before)
    moved = max(float((value - before[name]).abs().max()) for name, value in bits(model).items())
    assert (moved < 3e-3 * 1.001) if profile == "clean" else (3.1e-3 < moved < 6e-3 * 1.001)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_learns_and_reverts_to_the_bits(family: str) -> None:
    model = tiny_model(family)
    before, loss = bits(model), target_loss(model, FACTS)
    try:
        edit = make("ft-m", model, params={"layers": (0, 1), "steps": 8, "lr": 2e-3}).edit(FACTS)
    except UnsupportedModel as error:
        skip_old_layout(error)
    assert target_loss(model, FACTS) < loss
    edit.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before, loss = bits(model), target_loss(model, FACTS)
    editor = make(
        method,
        model,
        params={"layers": (1,), "steps": 8, "lr": 4e-3, "epsilon": 0.05 if method == "ft-l" else None},
    )
    edits = [editor.edit(FACTS[:2]), editor.edit(FACTS[2:])]
    assert target_loss(model, FACTS) < loss
    for edit in edits:
        edit.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize(
    ("method", "profile", "objective"),
    [
        ("ft", "clean", "target"),
        ("ft", "official", "prompt_last"),
        ("ft", "paper", "target"),
        ("ft-l", "clean", "target"),
        ("ft-l", "official", "prompt_last"),
        ("ft-m", "clean", "target"),
        ("ft-m", "official", "target"),
    ],
)
def test_objectives_by_profile(method: str, profile: str, objective: str) -> None:
    editor = make(method, tiny_model("llama"), params=FEW, profile=profile)
    assert editor.objective == objective
    edit = editor.edit(FACTS[:1])
    assert edit.params["objective"] == objective
    assert edit.params["layers"] == [1]
    assert (edit.params["epsilon"] is None) == (method != "ft-l")


def test_training_stops_when_the_loss_is_small() -> None:
    model = tiny_model("llama")
    params = {"layers": (0, 1, 2), "steps": 200, "lr": 2e-3, "stop_loss": 2.0}
    edit = make("ft", model, params=params).edit(FACTS[:2])
    facts = edit.measured["facts"]
    assert facts[0]["steps"] < 200
    assert sum(fact["nll_optimised"] for fact in facts) / 2 < 2.0
    assert target_loss(model, FACTS[:2]) < 2.01
    again = make("ft", model, params=params).edit(FACTS[:2])
    assert again.measured["facts"][0]["steps"] == 1
    assert not bool(next(iter(again.dense.values())).any())


def test_a_loss_that_is_not_finite_leaves_the_bits() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before = {name: value.nan_to_num() for name, value in bits(model).items()}
    with pytest.raises(NumericalError, match="the loss of 'The capital of France is'.* is not finite"):
        make("ft", model, params=FEW).edit(FACTS)
    assert all(torch.equal(value.nan_to_num(), before[name]) for name, value in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_that_diverges_leaves_the_bits() -> None:
    model = tiny_model("llama")
    before = bits(model)
    with pytest.raises(NumericalError):
        make("ft", model, params={**FEW, "lr": 1e38}).edit(FACTS)
    assert same_bits(model, before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"objective": "all"}, "objective must be one of target, prompt_last, sentence, got 'all'"),
        ({"lr": "5e-4"}, "lr must be a finite number, not negative, got '5e-4'"),
        ({"epsilon": "5e-4"}, "epsilon must be a finite number"),
        ({"epsilon": -1.0}, "epsilon must be a finite number"),
        ({"steps": 0}, "steps must be a whole number above 0"),
        ({"mini_batch": 0}, "mini_batch must be a whole number above 0"),
        ({"layers": (7,)}, "blocks 0 to 2"),
    ],
)
def test_wrong_settings_are_named(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("ft", tiny_model("llama"), params={**FEW, **params})


def test_ft_l_has_a_bound() -> None:
    with pytest.raises(ValueError, match="without a bound the method is ft"):
        FineTuneLParams((0,), epsilon=None)
    editor = make("ft-l", tiny_model("llama"))
    assert editor.params.layers == (0,)
    assert editor.params.epsilon == 2e-3


@pytest.mark.parametrize("batch", [[], [FACTS[0], FACTS[0]], [Fact("{} " + "very " * 200, "France", "Lyon")]])
def test_a_bad_batch_is_refused_before_any_weight_changes(batch: list) -> None:
    model = tiny_model("llama")
    before = bits(model)
    with pytest.raises(InvalidFact):
        make("ft", model, params=FEW).edit(batch)
    assert same_bits(model, before)


def test_a_bound_does_not_take_back_what_other_methods_wrote() -> None:
    model = tiny_model("llama")
    make("memit", model, params={"steps": 4, "layers": (1,)}).edit(FACTS[:1])
    middle = bits(model)
    with pytest.raises(ValueError, match="the memit edit .* has changed it"):
        make("ft-l", model, params=FEW).edit(FACTS[1:])
    assert same_bits(model, middle)
    make("ft-l", model, params=FEW, profile="official").edit(FACTS[1:])
    make("ft-l", model, params={**FEW, "layers": (0,)}).edit(FACTS[1:])


def test_a_saved_state_keeps_the_original_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    params = {**FEW, "epsilon": 3e-3}
    editor = make("ft-l", model, params=params)
    editor.edit(MORE[:3])
    editor.save_state(tmp_path / "state")
    copied = copy.deepcopy(model)
    resumed = make("ft-l", copied, params=params)
    resumed.load_state(tmp_path / "state")
    editor.edit(MORE[3:])
    resumed.edit(MORE[3:])
    assert same_bits(copied, bits(model))
