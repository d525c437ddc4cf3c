"""The rules by which a codebook grows, on scripted streams of queries."""

from __future__ import annotations

import copy

import pytest
import torch

from fastedit.memory.codebook import Codebook, Rules

ZERO = torch.zeros(3)
CLEAN, OFFICIAL = Rules(1.0), Rules(1.0, official=True)


def at(*position: float) -> torch.Tensor:
    return torch.tensor([*position, *[0.0] * (2 - len(position))])


def run(rules: Rules, stream: list[tuple]) -> tuple[Codebook, list[str]]:
    """A codebook after (position, label, prompt length) and what became of each."""
    book = Codebook(2, 3, rules)
    actions = []
    for position, label, *length in stream:
        actions.append(book.place(at(*position), ZERO, label, *(length or [4])).action)
    return book, actions


def test_far_keys_are_added() -> None:
    book, actions = run(CLEAN, [((10.0,), [1]), ((12.001,), [2]), ((10.0, 5.0), [1])])
    assert actions == ["add"] * 3
    assert book.radii.tolist() == [1.0] * 3
    assert book.labels == [(1,), (2,), (1,)]


@pytest.mark.parametrize("rules", [CLEAN, OFFICIAL], ids=["clean", "official"])
def test_conflicts_split_the_distance(rules: Rules) -> None:
    book, actions = run(rules, [((10.0,), [1]), ((11.5,), [2]), ((11.0,), [3])])
    assert actions == ["add", "split", "split"]
    expected = [0.75 - 1e-5, 0.25 - 1e-5, 0.25]
    torch.testing.assert_close(book.radii, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_same_answer_expands() -> None:
    book, actions = run(CLEAN, [((10.0,), [1, 2]), ((11.5,), [1, 2]), ((11.2,), [1, 2])])
    assert actions == ["add", "expand", "keep"]
    assert book.radii.tolist() == [1.5]
    assert book.keys.tolist() == [[10.0, 0.0]]


def test_a_moving_average_goes_half_the_way() -> None:
    book, actions = run(Rules(1.0, "moving_average"), [((10.0,), [1]), ((11.5,), [1]), ((8.0,), [2])])
    assert actions == ["add", "expand", "add"]
    assert book.keys[0].tolist() == [10.75, 0.0]
    assert book.radii.tolist() == [1.5, 1.0]


def test_another_answer_for_the_same_prompt_overwrites() -> None:
    book, actions = run(CLEAN, [((10.0,), [1]), ((10.0,), [2]), ((10.0005,), [3])])
    assert actions == ["add", "overwrite", "overwrite"]
    assert book.labels == [(3,)]
    assert book.radii.tolist() == [1.0]


def test_officially_a_prompt_conflicts_with_itself_and_neither_fires() -> None:
    book = Codebook(2, 3, OFFICIAL)
    book.place(at(10.0), ZERO, [1], 4)
    again = book.place(at(10.0), ZERO, [2], 4)
    assert again == ("split", None, 1)
    torch.testing.assert_close(book.radii, torch.tensor([-1e-5, 0.0]))
    assert book.lookup(at(10.0)[None])[0].tolist() == [-1]


def test_official_labels_are_compared_by_their_means() -> None:
    # the same answer after a longer prompt conflicts; 12 + 14 tokens of another answer have the mean of 13 + 13
    _, actions = run(OFFICIAL, [((10.0,), [1], 4), ((11.5,), [1], 5)])
    assert actions == ["add", "split"]
    _, actions = run(OFFICIAL, [((10.0,), [12, 14], 4), ((11.5,), [13, 13], 4)])
    assert actions == ["add", "expand"]
    for stream in ([((10.0,), [1], 4), ((11.5,), [1], 5)], [((10.0,), [12, 14]), ((11.5,), [13, 13])]):
        _, actions = run(CLEAN, stream)
        assert actions == ["add", "expand" if stream[0][1] == [1] else "split"]


def test_official_labels_stand_in_front() -> None:
    """The second key is compared with the first one's label and the other way round."""
    stream = [((10.0,), [1]), ((20.0,), [2]), ((20.5,), [2])]
    assert run(OFFICIAL, stream)[1][-1] == "split"
    assert run(CLEAN, stream)[1][-1] == "keep"
    stream[-1] = ((20.5,), [1])
    assert run(OFFICIAL, stream)[1][-1] == "keep"
    assert run(CLEAN, stream)[1][-1] == "split"


def test_only_the_nearest_key_counts() -> None:
    book, _ = run(CLEAN, [((10.0,), [1])])
    book._set("radius", 0, 5.0)
    book.place(at(16.0), ZERO, [2], 4)
    book._set("radius", 1, 0.5)
    index, distance = book.lookup(torch.stack([at(14.0), at(12.0), at(16.2)]))
    assert index.tolist() == [-1, 0, 1]  # 14 is nearer to 16, which does not reach it
    torch.testing.assert_close(distance, torch.tensor([2.0, 2.0, 0.2]))


def test_radii_never_grow_back() -> None:
    book, actions = run(CLEAN, [((10.0,), [1]), *[((10.0 + 2.0 ** -(k + 1),), [k + 2]) for k in range(6)]])
    assert actions == ["add"] + ["split"] * 6
    assert book.radii.max() <= 0.25


@pytest.mark.parametrize("n", [0, 1, 26, 3000])
def test_lookup_agrees_with_float64(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    book = Codebook(7, 2, CLEAN)
    keys = torch.randn(n, 7, generator=generator)
    for i, key in enumerate(keys):
        book._add(key, torch.zeros(2), (i,), 1)
    queries = torch.randn(50, 7, generator=generator)
    index, distance = book.lookup(queries)
    if n == 0:
        assert (index == -1).all()
        assert distance.isinf().all()
        return
    exact = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
    best, where = exact.min(1)
    assert torch.equal(index, torch.where(best.float() <= 1.0, where, -1))
    torch.testing.assert_close(distance, best.float())


def test_rollback_restores_every_bit() -> None:
    book, _ = run(Rules(1.0, "moving_average"), [((10.0,), [1]), ((11.5,), [1]), ((14.0,), [2])])
    before, mark = copy.deepcopy(book), book.mark()
    for position, label in [((10.9,), [5]), ((11.5,), [1]), ((14.0,), [9]), ((30.0,), [3])]:
        placement = book.place(at(*position), ZERO, label, 4)
        if placement.row is not None:
            book.set_value(placement.row, torch.full((3,), 2.0))
            book.set_owner(placement.row, "x")
    assert len(book) > len(before)
    book.rollback(mark)
    for name in ("keys", "values", "radii"):
        assert torch.equal(getattr(book, name), getattr(before, name))
    assert (book.labels, book.owners, book.prompt_lengths) == (
        before.labels,
        before.owners,
        before.prompt_lengths,
    )
