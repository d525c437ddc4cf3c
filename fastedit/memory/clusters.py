"""MELO's index: clusters of prompts with a label, and the block that each prompt leads to (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import nearest_key

Label = tuple[int, ...]

NO_BLOCK = -1
_SPLIT = 1e-5  # by how much the two radii of a split differ from half the distance
_SAME = 1e-4  # points nearer than this, relative to their norm, are of one prompt; two units of the dtype if larger
_FIRST_ROOM = 64  # rows that a buffer begins with


class Cluster(NamedTuple):
    """Prompts of one answer.

    Attributes:
        label: ids of the answer.
        points: indices of the prompts, oldest first; of one without a block if all were forgotten.
    """

    label: Label
    points: tuple[int, ...]


class _State(NamedTuple):
    """A row before a change."""

    row: int
    cluster: Cluster
    centre: Tensor
    radius: Tensor


class ClusterIndex:
    """Centres (n, d) and radii (n,), points (m, d) and their blocks, fp32, in arrays of doubling capacity.

    A new prompt at distance d from the nearest centre, whose radius is r:

    - d > r + ``radius``: it begins a cluster, of radius ``radius``.
    - Its label is that cluster's: it joins; the centre moves to the mean of the points, the radius becomes the
      largest distance of a point from there, at least ``radius``.
    - Else it begins a cluster of radius d/2 + 1e-5, and the nearest one keeps d/2 − 1e-5; its points that lie
      outside now are forgotten. If none is left, its centre stands for "no block".

    Every change is noted, so that :meth:`rollback` restores an earlier state bit for bit.

    Args:
        d: width of queries.
        radius: of a new cluster.
        official: labels are equal if the sums of their ids are, and all prompts of a batch are compared with the
            centres as they were before the batch (into an empty index they all begin clusters). Else labels are
            compared as they are, prompts one after the other, and a prompt that is there already leads to its new
            block from then on.
    """

    def __init__(self, d: int, radius: float, official: bool = False) -> None:
        self.radius, self.official = radius, official
        self._centres, self._radii, self._points = torch.empty(0, d), torch.empty(0), torch.empty(0, d)
        self.clusters: list[Cluster] = []
        self.blocks: list[int] = []
        self._log: list[_State | tuple[int, int] | None] = []

    def __len__(self) -> int:
        return len(self.clusters)

    @property
    def centres(self) -> Tensor:
        """(n, d)."""
        return self._centres[: len(self)]

    @property
    def radii(self) -> Tensor:
        """(n,)."""
        return self._radii[: len(self)]

    @property
    def points(self) -> Tensor:
        """(m, d), forgotten ones included."""
        return self._points[: len(self.blocks)]

    @property
    def n_bytes(self) -> int:
        """Bytes held, room to grow included."""
        return self._centres.nbytes + self._radii.nbytes + self._points.nbytes

    def to(self, device: torch.device) -> None:
        """Move to a device; does nothing if it is there."""
        if self._centres.device != device:
            self._centres, self._radii, self._points = (
                t.to(device) for t in (self._centres, self._radii, self._points)
            )

    # -- looking up ---------------------------------------------------------------------------------

    def lookup(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The block of the nearest point in the nearest cluster.

        Args:
            queries: (B, d), any floating dtype.

        Returns:
            (B,) int64, the block, −1 if the nearest centre does not cover the query or its prompts were forgotten;
            and the distance to that centre (B,), fp32.
        """
        self.to(queries.device)
        queries = queries.float()
        cluster, distance = nearest_key(queries, self.centres, self.radii)
        block = torch.full_like(cluster, NO_BLOCK)
        blocks = torch.tensor(self.blocks, dtype=torch.int64, device=queries.device)
        for row in cluster.unique().tolist():
            if row >= 0:
                asking = cluster == row
                members = torch.tensor(self.clusters[row].points, device=queries.device)
                nearest, _ = nearest_key(queries[asking], self._points[members])
                block[asking] = blocks[members[nearest]]
        return block, distance

    # -- growing ------------------------------------------------------------------------------------

    def place(self, queries: Tensor, labels: Sequence[Label], block: int) -> list[str]:
        """Put the prompts of a batch into the index.

        Args:
            queries: (n, d), in the model's dtype.
            labels: ids of the answers.
            block: that they shall lead to.

        Returns:
            What became of each: ``"add"``, ``"join"``, ``"split"`` or ``"overwrite"``.
        """
        self.to(queries.device)
        same = max(_SAME, 2 * torch.finfo(queries.dtype).eps)
        rows = queries.float()
        if not self.official:
            return [self._place(row, label, block, same) for row, label in zip(rows, labels, strict=True)]
        if not len(self):
            return [self._add(row, label, block) for row, label in zip(rows, labels, strict=True)]
        nearest, distances = nearest_key(rows, self.centres)
        found = zip(nearest.tolist(), distances.tolist(), strict=True)
        return [
            self._settle(row, label, block, j, distance)
            for row, label, (j, distance) in zip(rows, labels, found, strict=True)
        ]

    def _place(self, query: Tensor, label: Label, block: int, same: float) -> str:
        if not len(self):
            return self._add(query, label, block)
        index, distances = nearest_key(query[None], self.centres)
        j, distance = int(index), float(distances)
        members = self.clusters[j].points
        nearest, gap = nearest_key(query[None], self._points[list(members)])
        if distance <= self.radius + float(self._radii[j]) and float(gap) <= same * float(query.norm()):
            self._lead(members[int(nearest)], block)
            if len(members) == 1:
                self._write(j, Cluster(label, members), self._centres[j].clone(), self._radii[j].clone())
            return "overwrite"
        return self._settle(query, label, block, j, distance)

    def _settle(self, query: Tensor, label: Label, block: int, j: int, distance: float) -> str:
        if distance > self.radius + float(self._radii[j]):
            return self._add(query, label, block)
        if self._same_label(label, self.clusters[j].label):
            self._join(j, query, block)
            return "join"
        added = len(self)
        self._add(query, label, block)
        self._write(added, self.clusters[added], query, query.new_tensor(distance / 2 + _SPLIT))
        self._shrink(j, distance / 2 - _SPLIT)
        return "split"

    def _same_label(self, one: Label, other: Label) -> bool:
        return sum(one) == sum(other) if self.official else one == other

    def _add(self, query: Tensor, label: Label, block: int) -> str:
        n = len(self)
        self._centres, self._radii = (_with_room(t, n) for t in (self._centres, self._radii))
        self._centres[n], self._radii[n] = query, self.radius
        self.clusters.append(Cluster(label, (self._point(query, block),)))
        self._log.append(None)
        return "add"

    def _join(self, j: int, query: Tensor, block: int) -> None:
        label, members = self.clusters[j]
        members = (*members, self._point(query, block))
        points = self._points[list(members)]
        centre = points.mean(0)
        radius = (points - centre).norm(dim=1).amax().clamp(min=self.radius)
        self._write(j, Cluster(label, members), centre, radius)

    def _shrink(self, j: int, radius: float) -> None:
        label, members = self.clusters[j]
        centre = self._centres[j].clone()
        inside = ((self._points[list(members)] - centre).norm(dim=1) <= radius).tolist()
        members = tuple(point for point, kept in zip(members, inside, strict=True) if kept)
        members = members or (self._point(centre, NO_BLOCK),)
        self._write(j, Cluster(label, members), centre, centre.new_tensor(radius))

    def _point(self, query: Tensor, block: int) -> int:
        """Keep a point; whatever refers to it is noted by itself."""
        m = len(self.blocks)
        self._points = _with_room(self._points, m)
        self._points[m] = query
        self.blocks.append(block)
        return m

    def _lead(self, point: int, block: int) -> None:
        self._log.append((point, self.blocks[point]))
        self.blocks[point] = block

    def _write(self, row: int, cluster: Cluster, centre: Tensor, radius: Tensor) -> None:
        before = _State(row, self.clusters[row], self._centres[row].clone(), self._radii[row].clone())
        self._log.append(before)
        self._set(_State(row, cluster, centre, radius))

    def _set(self, state: _State) -> None:
        self.clusters[state.row] = state.cluster
        self._centres[state.row], self._radii[state.row] = state.centre, state.radius

    # -- undoing ------------------------------------------------------------------------------------

    def mark(self) -> tuple[int, int]:
        """The present state, for :meth:`rollback`."""
        return len(self._log), len(self.blocks)

    def rollback(self, mark: tuple[int, int]) -> None:
        """Go back to a marked state; marks set after it are void."""
        steps, points = mark
        while len(self._log) > steps:
            before = self._log.pop()
            if before is None:
                self.clusters.pop()
            elif isinstance(before, _State):
                self._set(before)
            else:
                self.blocks[before[0]] = before[1]
        del self.blocks[points:]


def _with_room(rows: Tensor, n: int) -> Tensor:
    """Rows with room for one more behind the first n, at least twice as much as there was."""
    if n < len(rows):
        return rows
    return torch.cat((rows, rows.new_empty(max(_FIRST_ROOM, n), *rows.shape[1:])))
