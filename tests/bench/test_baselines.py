"""The baselines that benchmarks measure against do what the published code did."""

from __future__ import annotations

import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from helpers import relative_error

from fastedit.bench.baselines.locate_then_edit import Published

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
