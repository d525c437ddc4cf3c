"""UltraEdit against the published recurrence and the dense system."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from model_configs import tiny_model
from tiny import FACTS, bits, make, same_bits

from fastedit.editors.ultraedit import Normaliser

PARAMS = {"lr": 1e-3}


def rows(seed: int, count: int, d: int = 7) -> torch.Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_8_the_official_recurrence() -> None:
    """Step by step as published: the batch's unbiased variance times its size."""
    ours = Normaliser(7, official=True)
    mean, squares, count = torch.zeros(7), torch.zeros(7), 0
    for seed, size in enumerate((5, 2, 9)):
        batch = rows(seed, size)
        total = count + size
        shift = batch.mean(0) - mean
        squares = squares + size * batch.var(0, unbiased=True) + count * size * shift**2 / total
        mean, count = mean + size * shift / total, total
        ours.update(batch)
    torch.testing.assert_close(ours.mean, mean)
    torch.testing.assert_close(ours.squares, squares)
    probe = rows(9, 3)
    eps = torch.finfo(torch.float32).eps
    spread = (squares / (count - 1 + eps)).sqrt()
    torch.testing.assert_close(ours.normalise(probe), (probe - mean) / (spread + eps))


@pytest.mark.parametrize("profile", ["clean", "official"])
def test_8_micro_batches_are_the_published_ones(profile: str) -> None:
    """The longest first; the official profile loses the gradients of a last micro-batch that is not full."""
    editor = make("ultraedit", tiny_model("llama"), params={**PARAMS, "micro_batch": 2}, profile=profile)
    lengths: list[list[int]] = []
    solved: dict[str, torch.Tensor] = {}
    together, solve = editor._capture_together, editor._solve

    def watched(rows):  # type: ignore[no-untyped-def]
        lengths.append([len(row.targets[0].ids) for row in rows])
        return together(rows)

    def kept(name, inputs, gradients):  # type: ignore[no-untyped-def]
        solved[name] = gradients
        return solve(name, inputs, gradients)

    editor._capture_together, editor._solve = watched, kept
    editor.edit(FACTS[:3])
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in lengths] == [2, 1]
    for gradients in solved.values():
        assert bool(gradients[0].any())
        assert bool(gradients[-1].any()) == (profile == "clean")


@pytest.mark.parametrize("sizes", [(5, 2, 9), (1, 1, 1), (16,)])
def test_the_clean_normaliser_is_that_of_all_rows_at_once(sizes: tuple[int, ...]) -> None:
    ours = Normaliser(7)
    for seed, size in enumerate(sizes):
        ours.update(rows(seed, size))
    everything = torch.cat([rows(seed, size) for seed, size in enumerate(sizes)])
    torch.testing.assert_close(ours.mean, everything.mean(0))
    torch.testing.assert_close(ours.squares / (len(everything) - 1), everything.var(0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_8_the_update_is_the_dense_solve(family: str) -> None:
    """Features and gradients by torch's own autograd on whole weights, then the d × d system."""
    model = tiny_model(family)
    editor = make("ultraedit", model, params=PARAMS)
    captured = {}
    solve = editor._solve
    editor._solve = lambda name, x, g: captured.setdefault(name, (x, g)) and solve(name, x, g)
    edit = editor.edit(FACTS)
    for name, (inputs, gradients) in captured.items():
        hats = editor._normaliser(name).normalise(torch.cat((inputs, gradients), 1)).double()
        x_hat, g_hat = hats.split([inputs.shape[1], gradients.shape[1]], 1)
        wanted = -PARAMS["lr"] * x_hat.square().sum(1, keepdim=True) * g_hat
        H = inputs.double()
        dense = torch.linalg.solve(H.T @ H + torch.eye(H.shape[1]), H.T @ wanted)
        assert relative_error(edit.factors[f"{name}.weight"].dense().T, dense) < 1e-4


def test_gradients_are_those_of_the_weights() -> None:
    """The weight gradient of the mean loss is Σ gᵢ xᵢᵀ over answer tokens, for the highest edited layer."""
    model = tiny_model("llama")
    layer = len(list(model.model.layers)) - 1
    editor = make("ultraedit", model, params={"modules": {"mlp.down_proj": [layer]}})
    from fastedit.editors.prompts import fact_rows
    from fastedit.models.runner import frozen

    (row,) = fact_rows(editor.tokenizer, FACTS[:1], ["{}"], None)
    with frozen(model):
        (pair,) = editor._capture(FACTS[:1], [row]).values()
    weight = model.model.layers[layer].mlp.down_proj.weight.requires_grad_()
    logits = model(torch.tensor([row.targets[0].ids])).logits[0, -len(row.target) :]
    (gradient,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.target)), weight
    )
    answer_only = pair[1].T @ pair[0]
    assert relative_error(answer_only, gradient) < 1e-4


def test_state_goes_back_with_the_last_batches() -> None:
    model = tiny_model("llama")
    before = bits(model)
    editor = make("ultraedit", model, params=PARAMS)
    first = editor.edit(FACTS[:1])
    counts = {shape: each.count for shape, each in editor.normalisers.items()}
    middle = bits(model)
    second = editor.edit(FACTS[1:])
    changed = bits(model)
    second.revert()
    assert same_bits(model, middle)
    editor._follow()
    assert {shape: each.count for shape, each in editor.normalisers.items()} == counts
    editor.edit(FACTS[1:])
    assert same_bits(model, changed)
    for edit in (*editor._past,)[::-1]:
        assert edit[0]
    first.revert()
    assert not same_bits(model, before)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"mlp.down": [0]}, "have no 'mlp.down'; they have .*mlp.down_proj"),
        ({"mlp.down_proj": [99]}, "blocks 0 to"),
        ({"mlp": [0]}, "no linear layer"),
        ({}, "at least one layer"),
    ],
)
def test_modules_that_do_not_exist(modules: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("ultraedit", tiny_model("llama"), params={"modules": modules})
