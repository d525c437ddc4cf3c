"""The GRACE baseline does what the published code did, and what our editor does with its rules."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS

import fastedit
from fastedit import Fact
from fastedit.bench.baselines.grace import PublishedGrace
from fastedit.models import describe

CASES = [name for name in find_cases() if re.match("grace", name)]
QUICK = {"edit_lr": 0.1, "n_iter": 8, "eps": 1.0, "val_init": "warm"}


@pytest.fixture(params=CASES or ["none"])
def case(request: pytest.FixtureRequest) -> GoldenCase:
    if not CASES:
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no golden case of GRACE")
    return load_case(request.param)


@pytest.mark.slow
def test_every_edit_takes_the_stored_path(case: GoldenCase) -> None:
    model, tokenizer = case.load_model()
    published = PublishedGrace(model, tokenizer, case.hparams)
    for each in case.data["edits"]:
        number = each["edit"]
        published.edit(each["prompt"], " " + each["target"])
        stored = case.tensor(f"loss_e{number}").float()
        torch.testing.assert_close(published.losses[-1], stored, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(published.radii, case.tensor(f"eps_e{number}"), rtol=1e-6, atol=1e-9)
        if f"keys_e{number}" in case:
            torch.testing.assert_close(published.keys, case.tensor(f"keys_e{number}"), rtol=1e-4, atol=1e-5)
            values = case.tensor(f"values_e{number}")
            assert ((published.values - values).norm(dim=1) / values.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("radius", [0.5, 100.0], ids=["apart", "conflicting"])
def test_our_editor_with_the_published_rules_agrees(family: str, radius: float) -> None:
    hparams: dict[str, Any] = {**QUICK, "eps": radius}
    model, other = tiny_model(family), tiny_model(family)
    name = describe(other).projection(1).weight_name
    published = PublishedGrace(other, tiny_tokenizer(), {**hparams, "inner_params": [name]})
    params = {"layers": (1,), "lr": 0.1, "steps": 8, "radius": radius, "init": "warm"}
    editor = fastedit.editor("grace", model, tiny_tokenizer(), params=params, profile="official")
    facts = [*FACTS, Fact("The capital of {} is", "Japan", "Lyon")]
    for fact in facts:
        published.edit(fact.text, fact.target)
    editor.edit(facts)
    book = editor.side.memory.codebook
    torch.testing.assert_close(editor.losses, torch.stack(published.losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.keys, published.keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(book.radii, published.radii, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(book.values, published.values.detach(), rtol=1e-3, atol=1e-4)
