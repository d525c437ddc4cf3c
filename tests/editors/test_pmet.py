"""PMET: the pair of shifts and the whole edit equal a plain run, fact by fact, with whole forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import FAMILIES, skip_old_layout, tiny_model, tiny_tokenizer
from oracle import optimise_pair, pmet
from tiny import CONTEXTS, FACTS, bits, make, moments, same_bits

import fastedit
from fastedit import Fact, UnsupportedModel
from fastedit.cli.main import main
from fastedit.editors.pmet_values import optimise_pairs
from fastedit.editors.prompts import fact_rows
from fastedit.editors.values import ValueObjective, Values
from fastedit.models import describe
from fastedit.models.runner import BlockRunner, frozen

MIXED = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} plays the", "Miles Davis", "violin and the flute"),
    Fact("The mother tongue of {}, so they say, is", "Danielle Darrieux", "English"),
    Fact("{}", "Tokyo", "is a river"),
]
# Targets of one token right behind the subject: they become the likeliest within a few steps.
EASY = [
    Fact("{}", "Tokyo", "is"),
    Fact("{}", "France", "the"),
    Fact("{}", "Rome", "in"),
    Fact("I saw {}", "Paris", "of"),
]


def run(model: Any, objective: ValueObjective, facts: list[Fact], **options: Any) -> tuple[list, Values]:
    rows = fact_rows(tiny_tokenizer(), facts, CONTEXTS, 128)
    with frozen(model):
        try:
            return rows, optimise_pairs(BlockRunner(model), rows, objective, **options)
        except UnsupportedModel as error:
            skip_old_layout(error)


def compare(model: Any, objective: ValueObjective, facts: list[Fact]) -> tuple[list[torch.Tensor], Values]:
    """Compare with the plain loop and return its shifts (2, hidden) of each fact."""
    rows, values = run(model, objective, facts)
    shifts = []
    for index, row in enumerate(rows):
        with frozen(model):
            initial, shift, losses = optimise_pair(model, row, objective)
        torch.testing.assert_close(values.initial[index], initial[1], rtol=1e-5, atol=1e-5)
        done = ~values.losses[index, :, 0].isnan()
        torch.testing.assert_close(
            values.losses[index, done, :2], torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=1e-4
        )
        expected = initial[1] + shift[1]
        assert (values.target[index] - expected).norm() < 1e-4 * expected.norm()
        shifts.append(shift)
    return shifts, values


def sharpened(family: str) -> Any:
    """A model whose head is sure enough of itself for a shift to make a token likely."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_targets_equal_the_plain_loop(family: str) -> None:
    objective = ValueObjective(
        layer=1, at_mlp=True, steps=5, lr=0.2, clamp=4.0, weight_decay=0.05, kl_factor=1.0
    )
    # seed 1: no gradient so near zero that rounding in float32 decides its first step, as Adam divides by its size
    compare(tiny_model(family, seed=1), objective, MIXED)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2", "gemma2"])
def test_targets_of_the_first_and_of_the_last_block_equal_the_plain_loop(family: str) -> None:
    model = tiny_model(family)
    compare(model, ValueObjective(layer=0, at_mlp=True, steps=6, lr=0.3, clamp=2.0), MIXED)
    # a shift in the last block reaches no position but its own
    compare(model, ValueObjective(layer=2, at_mlp=True, steps=6, lr=0.3, clamp=2.0), MIXED[3:])


def test_each_shift_has_its_own_clamp() -> None:
    model = tiny_model("llama")
    objective = ValueObjective(layer=1, at_mlp=True, steps=6, lr=2.0, clamp=0.5)
    shifts, values = compare(model, objective, MIXED)
    limits = 0.5 * values.initial.norm(dim=1)
    assert (values.shift.norm(dim=1) <= limits * (1 + 1e-5)).all()
    assert any(mlp.norm() > 0.999 * limit for (_, mlp), limit in zip(shifts, limits, strict=True))
    assert any(attention.norm() > 1.1 * limit for (attention, _), limit in zip(shifts, limits, strict=True))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_likeliest_targets_weigh_less_and_stop_the_loop(family: str) -> None:
    """Facts enter and leave the phase with a tenth of the likelihood; some stop far above the loss's threshold."""
    objective = ValueObjective(
        layer=1, at_mlp=True, steps=30, lr=0.3, clamp=8.0, kl_factor=0.005, weight_decay=0.1
    )
    _, values = compare(sharpened(family), objective, EASY)
    weighs_less = values.losses[:, :, 0] < values.losses[:, :, 1]
    assert weighs_less.any()
    assert not weighs_less.all()


def test_a_settled_fact_stops_before_its_loss_is_low() -> None:
    objective = ValueObjective(
        layer=1, at_mlp=True, steps=30, lr=0.3, clamp=8.0, kl_factor=0.0, weight_decay=0.1
    )
    _, values = compare(sharpened("llama"), objective, EASY)
    steps = (~values.losses[:, :, 0].isnan()).sum(1)
    assert (steps < 30).all()
    for index, count in enumerate(steps.tolist()):
        assert values.losses[index, count - 1, 0] > objective.stop_loss


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_do_not_change_results(micro_batch: int) -> None:
    objective = ValueObjective(layer=1, at_mlp=True, steps=8, lr=0.2)
    _, together = run(tiny_model("gpt2"), objective, MIXED)
    _, split = run(tiny_model("gpt2"), objective, MIXED, micro_batch=micro_batch)
    torch.testing.assert_close(together.shift, split.shift, rtol=1e-3, atol=1e-4)


def test_half_precision_models_keep_fp32_targets() -> None:
    objective = ValueObjective(layer=1, at_mlp=True, steps=8, lr=0.1)
    _, exact = run(tiny_model("llama"), objective, MIXED)
    _, half = run(tiny_model("llama", dtype=torch.bfloat16), objective, MIXED)
    assert half.shift.dtype == torch.float32
    assert torch.cosine_similarity(exact.target, half.target).min() > 0.9


def test_a_fact_without_a_finite_loss_is_reported_and_the_others_are_not_touched() -> None:
    """One fact has a token that the other has not, and that token's embedding is not finite."""
    objective = ValueObjective(layer=0, at_mlp=True, steps=5, lr=0.2)
    model = tiny_model("llama")
    rows, whole = run(model, objective, MIXED[:2])
    kept, spoilt = ({*rows[i].targets[0].ids, *rows[i].neutral.ids} for i in (0, 1))
    with torch.no_grad():
        model.model.embed_tokens.weight[min(spoilt - kept - set(rows[0].targets[1].ids))] = float("nan")
    _, values = run(model, objective, MIXED[:2])
    assert values.broken == {1: "its loss stopped being finite"}
    torch.testing.assert_close(values.shift[0], whole.shift[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen2", "gemma", "gemma2", "granite", "falcon"])
def test_edit_equals_the_plain_pipeline(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    params = {"steps": 6, "lr": 0.1, "weight_decay": 0.05, "layers": (0, 1), "covariance_weight": 20.0}
    editor = make("pmet", model, params=params)
    before = bits(model)
    edit = editor.edit(FACTS)
    rows = fact_rows(tiny_tokenizer(), FACTS, CONTEXTS, None)
    with frozen(plain):
        runs = [optimise_pair(plain, row, editor.objective()) for row in rows]
        targets = torch.stack([initial[1] + shift[1] for initial, shift, _ in runs])
        updates = pmet(plain, rows, targets, (0, 1), moments(plain), 20.0)
    assert set(edit.factors) == {describe(plain).projection(layer).weight_name for layer in updates}
    for layer, expected in updates.items():
        change = edit.factors[describe(plain).projection(layer).weight_name].dense().double()
        assert (change - expected).norm() <= 1e-4 * expected.norm()
    edit.revert()
    assert same_bits(model, before)


def test_settings_are_those_published_for_gpt_j() -> None:
    params = fastedit.editor("pmet", tiny_model("llama"), tiny_tokenizer()).params
    assert (params.steps, params.lr, params.clamp, params.weight_decay, params.kl_factor) == (
        30,
        0.2,
        0.75,
        0.5,
        1.0,
    )


def test_a_model_without_a_known_attention_projection_is_refused_at_once() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.mix = attention.o_proj
    del attention.o_proj
    with pytest.raises(
        UnsupportedModel, match=r"model\.layers\.1 was not found: looked for self_attn\.o_proj"
    ):
        make("pmet", model, params={"layers": (0, 1)})


def test_the_command_edits_with_pmet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    fact = "The capital of {France} is -> Lyon"
    options = ["--method", "pmet", "--set", "steps=4", "lr=0.05", "layers=0-1", "--json"]
    out = str(tmp_path / "edit")
    assert main(["edit", str(tmp_path / "model"), "--fact", fact, "--out", out, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["method"] == "pmet"
    assert said["params"]["kl_factor"] == 1.0
    assert fastedit.load_edit(out).method == "pmet"
