"""The plain way to train RECIPE has the losses that fastedit's training has."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from model_configs import tiny_model, tiny_tokenizer
from recipe_tiny import ROWS, SHORT, save_encoder

from fastedit.bench.baselines.recipe import PublishedRecipe
from fastedit.bench.retrieval_editing import published_batch
from fastedit.data import records_from
from fastedit.editors.recipe_training import RecipeTrainingParams, _Learner, examples_of
from fastedit.memory.encoder import TextEncoder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_the_training(family: str, tmp_path: Path) -> None:
    model, tokenizer, reader = tiny_model(family), tiny_tokenizer(), TextEncoder.load(save_encoder(tmp_path))
    settings = RecipeTrainingParams(**SHORT).resolved("official")
    examples, _ = examples_of(records_from(ROWS), (), tokenizer, float("inf"))
    learner = _Learner(model, tokenizer, settings, reader, "", "official", 0)
    reader.module.eval()
    learner.prepare(examples, False)
    loss, ours = learner.objective(examples, random.Random(1), settings.hinge)
    loss.backward()
    trained = [*learner.networks.parameters(), *reader.module.parameters()]
    gradients = [p.grad.clone() for p in trained if p.grad is not None]
    for parameter in trained:
        parameter.grad = None
    published = PublishedRecipe(model, reader, learner.networks, lr=1e-3, hinge=settings.hinge)
    batch = published_batch(learner, learner._draw(examples, random.Random(1)), examples)
    theirs = published.losses(batch)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-5), name
    theirs["loss"].backward()
    others = [p.grad for p in trained if p.grad is not None]
    assert len(others) == len(gradients) > 10
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6
    before = learner.networks.sentinel.detach().clone()
    published.step(batch)
    assert not learner.networks.sentinel.equal(before)
