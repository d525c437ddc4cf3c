"""Norm anchors, RECT and PRUNE."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from model_configs import tiny_model
from tiny import FACTS, bits, make, same_bits

from fastedit import NumericalError
from fastedit.artefacts import Edit, LowRank
from fastedit.editors.restraint import anchor_norm, prune, rect, reference_norm
from fastedit.models import describe

PARAMS = {"steps": 6, "lr": 0.02, "layers": (0, 1)}


def test_anchored_values_have_the_reference_norm_and_long_ones_are_given_up() -> None:
    contribution = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    shift = torch.tensor([[0.0, 4.0], [30.0, 0.0]])
    scaled, lost = anchor_norm(contribution, shift, 10.0)
    assert lost.tolist() == [False, True]
    value = contribution[0] + scaled[0]
    assert value.norm() == pytest.approx(10.0)
    torch.testing.assert_close(value / 10, torch.tensor([0.6, 0.8]))
    assert not scaled[1].any()


def test_reference_norm_leaves_out_the_largest_twentieth() -> None:
    assert reference_norm(torch.diag(torch.tensor([1.0] * 19 + [1000.0]))) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["memit", "pmet", "alphaedit", "nse", "rome"])
def test_a_norm_anchor_holds_for_every_method_with_targets(method: str) -> None:
    model = tiny_model("llama")
    params = {**PARAMS, "layers": (1,)} if method == "rome" else dict(PARAMS)
    anchor = make(method, model, params=params).measure_norm_anchor(FACTS)
    assert anchor > 0
    editor = make(method, model, params={**params, "norm_anchor": anchor})
    values = []
    unusable = editor._unusable
    editor._unusable = lambda found: (unusable(found), values.append(found))[0]
    edit = editor.edit(FACTS)
    for each in values:
        torch.testing.assert_close(
            (each.mlp + each.shift).norm(dim=1), torch.full((len(each.mlp),), anchor), rtol=1e-4, atol=0
        )
    assert edit.params["norm_anchor"] == pytest.approx(anchor)


def test_facts_beyond_the_anchor_are_set_aside() -> None:
    editor = make("memit", tiny_model("llama"), params={**PARAMS, "norm_anchor": 1e-6})
    with pytest.raises(NumericalError, match="twice the norm anchor"):
        editor.edit(FACTS)


def test_rect_keeps_the_largest_relative_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    change, weight = torch.randn(20, 30, generator=generator), torch.randn(20, 30, generator=generator)
    kept = rect(change, weight, 0.4)
    relative = (change / (weight + 1e-8)).abs()
    chosen = kept != 0
    assert int(chosen.sum()) == 600 - 360 + 1  # all from the 360th smallest up
    assert relative[chosen].min() >= relative[~chosen].max()
    assert torch.equal(kept[chosen], change[chosen])
    assert torch.equal(rect(change, weight, 1.0), change)


def test_rect_edits_revert_to_the_bits() -> None:
    model = tiny_model("gpt2")
    before = bits(model)
    edit = make("memit", model, params={**PARAMS, "rect": 0.3}).edit(FACTS)
    for name, dense in edit.dense.items():
        assert 0.25 < float((dense != 0).float().mean()) < 0.35, name
    edit.revert()
    assert same_bits(model, before)


def test_prune_bounds_singular_values_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(12, 16, generator=generator)
    bound = torch.linalg.matrix_norm(original.double(), 2)
    change = LowRank(torch.randn(12, 3, generator=generator) * 4, torch.randn(16, 3, generator=generator))
    correction = prune(change, original)
    assert correction is not None
    pruned = change.dense().double() + correction.dense().double()
    before, after = torch.linalg.svdvals(change.dense().double())[:3], torch.linalg.svdvals(pruned)[:3]
    expected = torch.where(before > bound, before.log() - bound.log() + bound, before)
    torch.testing.assert_close(after, expected.sort(descending=True).values, rtol=1e-5, atol=1e-5)
    assert prune(LowRank(change.left * 1e-3, change.right), original) is None


def test_prune_of_a_model_is_an_edit_that_reverts() -> None:
    model = tiny_model("llama")
    editor = make("memit", model, params=PARAMS)
    editor.edit(FACTS)
    middle = bits(model)
    description = describe(model)
    assert editor.prune() is None  # these small changes are within the bound
    assert same_bits(model, middle)
    weight = description.projection(0).weight_name
    big = LowRank(torch.ones(description.hidden_size, 1) * 50, torch.ones(description.projection(0).d_in, 1))
    Edit(method="test", facts=FACTS, factors={weight: big}).apply(model)
    changed = bits(model)
    edit = editor.prune()
    assert edit is not None
    assert list(edit.factors) == [weight]
    assert not same_bits(model, changed)
    edit.revert()
    assert same_bits(model, changed)
    assert relative_error(dict(model.named_parameters())[weight].detach(), changed[weight]) == 0
