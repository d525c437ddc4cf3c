"""The batched, prefix-cached optimisation equals one plain run per fact (conformance: targets)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_configs import FAMILIES, skip_old_layout, tiny_model, tiny_tokenizer
from oracle import optimise_one

from fastedit import Fact, UnsupportedModel
from fastedit.editors.prompts import fact_rows
from fastedit.editors.values import ValueObjective, Values, optimise_values
from fastedit.models.runner import BlockRunner, frozen

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} plays the", "Miles Davis", "violin and the flute"),
    Fact("The mother tongue of {}, so they say, is", "Danielle Darrieux", "English"),
    Fact("{}", "Tokyo", "is a river"),
]
CONTEXTS = ["{}", "The thing. {}", "Because of this, and that. {}"]


def run(model: Any, objective: ValueObjective, facts: list[Fact], **options: Any) -> tuple[list, Values]:
    rows = fact_rows(tiny_tokenizer(), facts, CONTEXTS, 128)
    with frozen(model):
        try:
            return rows, optimise_values(BlockRunner(model), facts, rows, objective, **options)
        except UnsupportedModel as error:
            skip_old_layout(error)


@pytest.mark.parametrize("at_mlp", [False, True], ids=["block", "mlp"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_4_targets_equal_the_plain_loop(family: str, at_mlp: bool) -> None:
    model = tiny_model(family)
    objective = ValueObjective(layer=0, at_mlp=at_mlp, steps=6, lr=0.3, clamp=2.0, stop_loss=0.5)
    rows, values = run(model, objective, FACTS)
    for index, row in enumerate(rows):
        with frozen(model):
            initial, shift, losses = optimise_one(model, row, objective)
        torch.testing.assert_close(values.initial[index], initial, rtol=1e-5, atol=1e-5)
        done = ~values.losses[index, :, 0].isnan()
        assert int(done.sum()) == len(losses)
        torch.testing.assert_close(values.losses[index, done, 0].tolist(), losses, rtol=1e-3, atol=1e-3)
        scale = (initial + shift).norm()
        assert (values.target[index] - initial - shift).norm() < 1e-3 * scale


def test_4_facts_stop_on_their_own_and_leave_the_batch() -> None:
    """With a generous threshold facts stop at different steps; those that stay are not disturbed."""
    model = tiny_model("llama")
    _, unstopped = run(model, ValueObjective(layer=0, steps=25, clamp=4.0, stop_loss=0.0), FACTS)
    middle = unstopped.losses[:, 10, 0].mean().item()
    objective = ValueObjective(layer=0, steps=25, clamp=4.0, stop_loss=middle)
    rows, values = run(model, objective, FACTS)
    steps = (~values.losses[:, :, 0].isnan()).sum(1).tolist()
    assert len(set(steps)) > 1, f"the facts should stop at different steps, got {steps}"
    for index, row in enumerate(rows):
        with frozen(model):
            _, shift, losses = optimise_one(model, row, objective)
        assert steps[index] == len(losses)
        assert (values.shift[index] - shift).norm() < 1e-3 * shift.norm().clamp(min=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_do_not_change_results(micro_batch: int) -> None:
    objective = ValueObjective(layer=1, steps=8)
    _, together = run(tiny_model("gpt2"), objective, FACTS)
    _, split = run(tiny_model("gpt2"), objective, FACTS, micro_batch=micro_batch)
    torch.testing.assert_close(together.shift, split.shift, rtol=1e-3, atol=1e-4)


def test_shift_stays_within_the_clamp() -> None:
    objective = ValueObjective(layer=0, steps=10, lr=5.0, clamp=0.5)
    _, values = run(tiny_model("llama"), objective, FACTS)
    assert (values.shift.norm(dim=1) <= 0.5 * values.initial.norm(dim=1) * (1 + 1e-5)).all()


def test_no_weight_gets_a_gradient_or_moves() -> None:
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run(model, ValueObjective(layer=0, steps=3), FACTS)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_half_precision_models_keep_fp32_targets() -> None:
    _, exact = run(tiny_model("llama"), ValueObjective(layer=0, steps=8), FACTS)
    _, half = run(tiny_model("llama", dtype=torch.bfloat16), ValueObjective(layer=0, steps=8), FACTS)
    assert half.shift.dtype == torch.float32
    cosine = torch.cosine_similarity(exact.target, half.target)
    assert cosine.min() > 0.9


def test_a_loss_that_is_not_finite_is_reported() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    _, values = run(model, ValueObjective(layer=0, steps=3), FACTS[:1])
    assert values.broken == {0: "its loss stopped being finite"}


def test_a_batch_without_memory_is_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastedit.editors import values as module

    model, objective = tiny_model("llama"), ValueObjective(layer=0, steps=4, lr=0.1)
    _, whole = run(model, objective, FACTS, micro_batch=4)
    together, sizes = module._optimise_together, []

    def short_of_memory(runner: Any, facts: Any, rows: Any, chosen: list[int], *rest: Any) -> None:
        sizes.append(len(chosen))
        if len(chosen) > 1:
            raise torch.cuda.OutOfMemoryError("no memory")
        together(runner, facts, rows, chosen, *rest)

    monkeypatch.setattr(module, "_optimise_together", short_of_memory)
    _, parts = run(model, objective, FACTS, micro_batch=4)
    torch.testing.assert_close(parts.shift, whole.shift, rtol=1e-3, atol=1e-4)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert "no memory for 4 facts at a time" in caplog.text

    def never(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(module, "_optimise_together", never)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(model, objective, FACTS)
