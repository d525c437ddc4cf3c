"""Keys and states read during the sweep equal those of whole forward passes after each edit."""

from __future__ import annotations

import pytest
import torch
from model_configs import FAMILIES, tiny_model, tiny_tokenizer
from oracle import state_at

from fastedit import Fact
from fastedit.editors import sweep as sweep_module
from fastedit.editors.prompts import fact_rows
from fastedit.editors.sweep import PromptSweep, weighted_mean
from fastedit.models.runner import BlockRunner, frozen

FACTS = [
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} plays the", "Miles Davis", "violin"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),
]
CONTEXTS = ["{}", "The thing. {}"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_5_sweep_equals_whole_passes_after_each_edit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_TOKENS_PER_CHUNK", 16)
    model = tiny_model(family)
    runner = BlockRunner(model)
    description = runner.description
    prompts = [row for fact in fact_rows(tiny_tokenizer(), FACTS, CONTEXTS, None) for row in fact.prompts]
    generator = torch.Generator().manual_seed(1)
    with frozen(model):
        sweep = PromptSweep(runner, prompts, 1)
        for layer in (1, 2):
            sweep.advance(layer)
            projection = description.projection(layer)
            keys = torch.stack([state_at(model, projection.module, row, of="input") for row in prompts])
            torch.testing.assert_close(sweep.keys(), keys, rtol=1e-4, atol=1e-5)
            last = description.blocks[2]
            states = torch.stack([state_at(model, last, row, of="output") for row in prompts])
            torch.testing.assert_close(sweep.outputs(2), states, rtol=1e-4, atol=1e-4)
            noise = torch.randn(projection.weight.shape, generator=generator)
            projection.weight.data += 0.1 * noise


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_branch_goes_on_by_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_TOKENS_PER_CHUNK", 16)
    model = tiny_model(family)
    runner = BlockRunner(model)
    prompts = [row for fact in fact_rows(tiny_tokenizer(), FACTS, CONTEXTS, None) for row in fact.prompts]
    with frozen(model):
        sweep = PromptSweep(runner, prompts, 1)
        branch = sweep.branch([4, 1, 0])
        branch.advance(2)
        expected = PromptSweep(runner, prompts, 2).keys()[[4, 1, 0]]
        torch.testing.assert_close(branch.keys(), expected, rtol=1e-4, atol=1e-5)
        assert (sweep.layer, branch.layer) == (1, 2)
        torch.testing.assert_close(sweep.keys(), PromptSweep(runner, prompts, 1).keys(), rtol=1e-4, atol=1e-5)


def test_weighted_mean_weighs_contexts_within_each_fact() -> None:
    rows = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    assert weighted_mean(rows, [0.25, 0.75]).tolist() == [[2.5], [17.5]]
