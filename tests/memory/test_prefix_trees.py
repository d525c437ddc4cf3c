"""Texts behind continuous prompts, what they have in common read once: states and gradients of a row for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_configs import FAMILIES, HIDDEN, tiny_model
from torch import Tensor

import fastedit.memory.prefix_trees as trees_module
from fastedit.memory.prefix import prefixed_states
from fastedit.memory.prefix_trees import Tree, side_by_side, states_behind

TEXTS = [[5, 6, 7, 8], [5, 6, 9], [10, 11], [5, 6, 7, 8, 12, 13], [10], [14, 15, 16, 17, 18], [5, 6, 7, 8]]
PLACES = [range(3, 4), range(1, 3), range(1, 2), range(3, 6), range(1), range(2, 2), range(2, 4)]
OF = [0, 0, 1, 1, 2, 2, 0]
WINDOWS = {"mistral": {"sliding_window": 8}, "gemma3": {"sliding_window": 8}}


def prompts(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


def defined(model: Any, given: Tensor) -> list[Tensor]:
    """A pass for each text."""
    found = []
    for text, place, number in zip(TEXTS, PLACES, OF, strict=True):
        states = prefixed_states(model, torch.tensor([text]), None, given[number : number + 1])
        found.append(states[0, place.start : place.stop])
    return found


def assert_same(model: Any) -> None:
    ours, theirs = prompts(), prompts()
    found, wanted = states_behind(model, TEXTS, PLACES, ours, OF), defined(model, theirs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for states, leaf in ((found, ours), (wanted, theirs)):
        torch.cat(states)[:, ::3].square().sum().backward()
        assert leaf.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_a_row_for_each(family: str) -> None:
    assert_same(tiny_model(family).requires_grad_(False))


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_smaller_than_the_rows(family: str) -> None:
    assert_same(tiny_model(family, **WINDOWS[family]).requires_grad_(False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_these_families_read_in_common(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trees_module, "_one_by_one")
    assert_same(tiny_model(family).requires_grad_(False))


def test_without_prompts() -> None:
    model = tiny_model("gpt2")
    found = states_behind(model, TEXTS, PLACES)
    empty = torch.zeros(1, 0, HIDDEN)
    for text, place, states in zip(TEXTS, PLACES, found, strict=True):
        wanted = prefixed_states(model, torch.tensor([text]), None, empty)[0, place.start : place.stop]
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-5)


def test_a_tree_has_what_texts_share_once() -> None:
    tree = Tree.of([[7, 8, 9], [7, 8, 5], [6], [7, 8]], 2)
    assert tree.tokens == [0, 0, 7, 8, 9, 5, 6]
    assert tree.parents == [-1, 0, 1, 2, 3, 3, 1]
    assert tree.paths == [[2, 3, 4], [2, 3, 5], [6], [2, 3]]
    assert tree.seen.int().sum(1).tolist() == [1, 2, 3, 4, 5, 5, 3]
    assert tree.seen[5].tolist() == [True, True, True, True, False, True, False]


def test_trees_are_laid_out_for_the_least_work() -> None:
    assert side_by_side([5], 64) == [[0]]
    assert sorted(map(sorted, side_by_side([9, 1, 8, 2], 64))) == [[0, 1], [2, 3]]
    assert len(side_by_side([1000] * 4, 8)) == 4  # attention over long rows costs more than anything
    rows = side_by_side([3, 1, 4, 1, 5, 9], 768)
    assert sorted(number for row in rows for number in row) == list(range(6))
