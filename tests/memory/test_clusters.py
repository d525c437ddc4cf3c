"""MELO's index against the rules in plain Python, and its blocks against dense products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastedit.memory.clusters import NO_BLOCK, ClusterIndex
from fastedit.memory.lora_blocks import LoraBlocks


class Plain:
    """The rules one query at a time, in float64, with lists."""

    def __init__(self, radius: float, official: bool) -> None:
        self.r0, self.official = radius, official
        self.table: list[dict[str, Any]] = []

    def nearest(self, query: torch.Tensor) -> tuple[int, float]:
        distances = [float((query - row["centre"]).norm()) for row in self.table]
        return min(range(len(distances)), key=distances.__getitem__), min(distances)

    def place(self, queries: torch.Tensor, labels: list[tuple[int, ...]], block: int) -> list[str]:
        before = [self.nearest(q) if self.table else None for q in queries] if self.official else None
        empty = not self.table
        actions = []
        for i, (query, label) in enumerate(zip(queries, labels, strict=True)):
            found = before[i] if before is not None else self.nearest(query) if self.table else None
            if found is None or (self.official and empty):
                actions.append(self.add(query, label, block))
                continue
            j, d = found
            row = self.table[j]
            if d > row["radius"] + self.r0:
                actions.append(self.add(query, label, block))
                continue
            if not self.official:
                gaps = [float((query - point).norm()) for point, _ in row["points"]]
                if min(gaps) < 1e-6:
                    at = gaps.index(min(gaps))
                    row["points"][at] = (row["points"][at][0], block)
                    row["label"] = label if len(gaps) == 1 else row["label"]
                    actions.append("overwrite")
                    continue
            same = sum(label) == sum(row["label"]) if self.official else label == row["label"]
            if same:
                row["points"].append((query, block))
                points = torch.stack([point for point, _ in row["points"]])
                row["centre"] = points.mean(0)
                row["radius"] = max(float((points - row["centre"]).norm(dim=1).max()), self.r0)
                actions.append("join")
            else:
                self.add(query, label, block)
                self.table[-1]["radius"], row["radius"] = d / 2 + 1e-5, d / 2 - 1e-5
                kept = [p for p in row["points"] if float((p[0] - row["centre"]).norm()) <= row["radius"]]
                row["points"] = kept or [(row["centre"], NO_BLOCK)]
                actions.append("split")
        return actions

    def add(self, query: torch.Tensor, label: tuple[int, ...], block: int) -> str:
        self.table.append({"centre": query, "radius": self.r0, "label": label, "points": [(query, block)]})
        return "add"

    def lookup(self, query: torch.Tensor) -> int:
        j, d = self.nearest(query)
        row = self.table[j]
        if d > row["radius"]:
            return NO_BLOCK
        return min(row["points"], key=lambda point: float((query - point[0]).norm()))[1]


def stream(seed: int) -> list[tuple[torch.Tensor, list[tuple[int, ...]]]]:
    """Batches of prompts around a few middles, some of them met before, with few answers."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(6, 5, generator=generator)
    batches: list[tuple[torch.Tensor, list[tuple[int, ...]]]] = []
    for number in range(12):
        n = 1 + number % 4
        which = torch.randint(6, (n,), generator=generator)
        queries = middles[which] + 0.45 * torch.randn(n, 5, generator=generator)
        if number % 3 == 2:
            queries[0] = batches[number - 2][0][0]
        answers = [((1, 4), (2, 3), (7,))[int(i)] for i in torch.randint(3, (n,), generator=generator)]
        batches.append((queries, answers))
    return batches


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_streams_grow_the_index_by_the_rules(seed: int, official: bool) -> None:
    index, plain = ClusterIndex(5, 0.7, official), Plain(0.7, official)
    generator = torch.Generator().manual_seed(100 + seed)
    for block, (queries, labels) in enumerate(stream(seed)):
        assert index.place(queries, labels, block) == plain.place(queries.double(), labels, block)
        assert [cluster.label for cluster in index.clusters] == [row["label"] for row in plain.table]
        radii = torch.tensor([row["radius"] for row in plain.table], dtype=torch.float64)
        torch.testing.assert_close(index.radii.double(), radii, rtol=1e-6, atol=1e-7)
        centres = torch.stack([row["centre"] for row in plain.table])
        torch.testing.assert_close(index.centres.double(), centres, rtol=1e-5, atol=1e-6)
        asked = torch.cat((queries, torch.randn(20, 5, generator=generator)))
        blocks, distance = index.lookup(asked)
        for query, found, d in zip(asked.double(), blocks.tolist(), distance.tolist(), strict=True):
            j, exact = plain.nearest(query)
            assert d == pytest.approx(exact, rel=1e-5, abs=1e-6)
            if abs(exact - plain.table[j]["radius"]) > 1e-4:
                assert found == plain.lookup(query)


def test_the_streams_come_to_everything() -> None:
    for official, expected in (
        (False, {"add", "join", "split", "overwrite"}),
        (True, {"add", "join", "split"}),
    ):
        actions = set()
        for seed in range(6):
            index = ClusterIndex(5, 0.7, official)
            for block, (queries, labels) in enumerate(stream(seed)):
                actions |= set(index.place(queries, labels, block))
        assert actions == expected


def test_a_split_forgets_what_lies_outside() -> None:
    index = ClusterIndex(1, 1.0)
    point = torch.tensor([[0.0], [0.8], [1.6], [0.5]])
    assert index.place(point[:1], [(1,)], 0) == ["add"]
    assert index.place(point[1:2], [(1,)], 1) == ["join"]
    assert index.centres.item() == pytest.approx(0.4)
    assert index.place(point[2:3], [(2,)], 2) == ["split"]
    torch.testing.assert_close(index.radii, torch.tensor([0.6 - 1e-5, 0.6 + 1e-5]))
    assert index.lookup(torch.tensor([[0.3], [0.5], [1.2], [3.0]]))[0].tolist() == [0, 1, 2, -1]
    assert index.place(point[3:], [(3,)], 3) == ["split"]  # both points lie farther out than 0.05
    assert index.lookup(torch.tensor([[0.4], [0.41], [0.5]]))[0].tolist() == [-1, -1, 3]
    assert index.clusters[0].label == (1,)


def test_labels_of_equal_sum_are_one_in_the_official_index_only() -> None:
    points = torch.tensor([[0.0], [0.5]])
    for official, expected in ((True, "join"), (False, "split")):
        index = ClusterIndex(1, 1.0, official)
        index.place(points[:1], [(1, 4)], 0)
        assert index.place(points[1:], [(2, 3)], 1) == [expected]


def test_a_prompt_met_again_leads_to_its_new_block_in_the_clean_index() -> None:
    point = torch.tensor([[1.0, 2.0]])
    for official, expected in ((False, 1), (True, NO_BLOCK)):
        index = ClusterIndex(2, 1.0, official)
        index.place(point, [(1,)], 0)
        index.place(point, [(2,)], 1)
        assert index.lookup(point)[0].tolist() == [expected]


@pytest.mark.parametrize("official", [False, True])
def test_going_back_restores_every_bit(official: bool) -> None:
    index, states = ClusterIndex(5, 0.7, official), []
    for block, (queries, labels) in enumerate(stream(3)):
        states.append((index.mark(), copy.deepcopy(index)))
        index.place(queries, labels, block)
    for mark, before in reversed(states):
        index.rollback(mark)
        assert index.clusters == before.clusters
        assert index.blocks == before.blocks
        for name in ("centres", "radii", "points"):
            assert torch.equal(getattr(index, name), getattr(before, name))


@pytest.mark.parametrize("n", [0, 1, 26, 300])
def test_buffers_grow(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    points = 100 * torch.randn(n, 3, generator=generator)
    index = ClusterIndex(3, 1e-3)
    index.place(points, [(i,) for i in range(n)], 0)
    assert len(index) == n
    assert torch.equal(index.centres, points)
    queries = torch.cat((points, torch.zeros(1, 3)))
    assert index.lookup(queries)[0].tolist() == [0] * n + [NO_BLOCK]


def test_blocks_are_gathered_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks, factors = LoraBlocks(7.0), []
    for _ in range(11):
        factors.append((torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator)))
        blocks.append({3: factors[-1], 5: (factors[-1][0][:4], factors[-1][1])})
    inputs = torch.randn(4, 3, 6, generator=generator)
    index = torch.tensor([10, 0, 8, -1])
    found = blocks.change(3, inputs, index)
    for row, at in enumerate(index[:3].tolist()):
        a, b = factors[at]
        torch.testing.assert_close(found[row], inputs[row] @ (7.0 * a @ b), rtol=1e-5, atol=1e-5)
    blocks.truncate(9)
    blocks.append({3: factors[0], 5: (factors[0][0][:4], factors[0][1])})
    assert len(blocks) == 10
    torch.testing.assert_close(
        blocks.change(3, inputs, torch.full((4,), 9)), blocks.change(3, inputs, index * 0)
    )
    assert blocks.change(5, inputs[..., :4], index).shape == (4, 3, 4)
