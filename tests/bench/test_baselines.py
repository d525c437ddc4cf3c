"""The baselines that benchmarks measure against do what the published code did."""

from __future__ import annotations

import copy

import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from helpers import relative_error
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, make

from fastedit import Fact
from fastedit.bench.baselines.locate_then_edit import Published
from fastedit.bench.baselines.ultraedit import PublishedUltraEdit
from fastedit.models import describe

METHODS = {"memit": "memit", "alphaedit": "alphaedit", "nse": "nse", "rome": "rome"}
CASES = [name for name in find_cases() if name.startswith(("memit", "alphaedit", "nse_thr0", "rome_1"))]
CASES = [name for name in CASES if name not in ("memit_seq", "memit_rect")]


@pytest.fixture(params=CASES or ["none"])
def case(request: pytest.FixtureRequest) -> GoldenCase:
    if not CASES:
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no golden/index.json")
    return load_case(request.param)


@pytest.mark.slow
def test_the_first_batch_changes_the_weights_as_published(case: GoldenCase) -> None:
    model, tokenizer = case.load_model()
    published = Published(model, tokenizer, case.hparams, case.data["context_templates"], case.covariance())
    before = {layer: published.weight(layer).clone() for layer in published.layers}
    facts = case.batches[0]
    if case.method == "alphaedit":
        published.projectors = case.null_spaces()
    if case.method == "nse":
        published.nse(facts, published.targets_of(facts))
    else:
        getattr(published, METHODS[case.method])(facts)
    for layer in published.layers:
        change = published.weight(layer) - before[layer]
        assert relative_error(change, case.tensor(f"delta_b0_L{layer}")) < 1e-3
        assert torch.isfinite(change).all()
    assert set(published.seconds) >= {"targets", "keys", "solve", "apply"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ultraedit_is_the_editor_in_the_official_profile(family: str) -> None:
    """Two turns, the second with a micro-batch that is not full; there are no golden vectors of it."""
    facts = [*FACTS[:2], Fact("The {} is painted", "house by the sea", "blue and white")]
    model = tiny_model(family)
    published = PublishedUltraEdit(copy.deepcopy(model), tiny_tokenizer(), [0, 1], 1e-3, micro_batch=2)
    path = describe(model).output_path
    params = {"modules": {path: [0, 1]}, "lr": 1e-3, "micro_batch": 2}
    editor = make("ultraedit", model, params=params, profile="official")
    before = {layer: published.weight(layer).clone() for layer in (0, 1)}
    for turn in (facts[:2], facts[:3]):
        published.edit(turn)
        editor.edit(turn)
    for layer, was in before.items():
        projection = describe(model).projection(layer)
        ours = (projection.weight.T if projection.transposed else projection.weight).detach() - was
        assert relative_error(ours, published.weight(layer) - was) < 1e-3
    assert set(published.seconds) == {"targets", "solve", "apply"}
