"""RECIPE's losses and its retrieval, written out step by step from their definitions, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(row: list[Tensor]) -> list[Tensor]:
    greatest = max(float(value.detach()) for value in row)
    powers = [torch.exp(value - greatest) for value in row]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def score(u: Tensor, r: Tensor, scale: float) -> Tensor:
    return scale * torch.dot(u, r) / math.sqrt(len(u))


def second_largest(values: list[Tensor]) -> float:
    return sorted((float(value.detach()) for value in values), reverse=True)[1]


def neighbour(queries: Tensor, keys: Tensor, sentinel: Tensor, scale: float, epsilon: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, u in enumerate(queries):
        p = softmax([score(u, r, scale) for r in [*keys, sentinel]])
        total = total - torch.log(p[i] + epsilon)
    return total / len(queries)


def _mean_of_kept(rows: list[tuple[Tensor, list[Tensor]]], hinge: float, epsilon: float) -> Tensor:
    kept = [
        -torch.log(p + epsilon)
        for p, row in rows
        if len(row) > 1 and float(p.detach()) < hinge * second_largest(row)
    ]
    if not kept:
        return torch.zeros((), dtype=torch.float64)
    return sum(kept[1:], kept[0]) / len(kept)


def inside(
    queries: Tensor, keys: Tensor, sentinel: Tensor, scale: float, hinge: float, epsilon: float
) -> Tensor:
    rows = []
    for i, u in enumerate(queries):
        candidates = [score(u, r, scale) for j, r in enumerate(keys) if j != i]
        p = softmax([*candidates, score(u, sentinel, scale)])
        rows.append((p[-1], p))
    return _mean_of_kept(rows, hinge, epsilon)


def outside(
    queries: Tensor, keys: Tensor, sentinel: Tensor, scale: float, hinge: float, epsilon: float
) -> Tensor:
    rows = []
    for u in queries:
        p = softmax([score(u, r, scale) for r in [*keys, sentinel]])
        rows.append((p[-1], p))
    return _mean_of_kept(rows, hinge, epsilon)


def edit(logits: Tensor, labels: list[int], hinge: float, epsilon: float) -> Tensor:
    """Logits (s, V) of one group."""
    kept = []
    for row, label in zip(logits, labels, strict=True):
        p = softmax(list(row))
        if float(p[label].detach()) < hinge * second_largest(p):
            kept.append(-torch.log(p[label] + epsilon))
    return sum(kept[1:], kept[0]) / len(kept) if kept else torch.zeros((), dtype=torch.float64)


def kl(before: Tensor, after: Tensor) -> Tensor:
    """Mean KL(before ‖ after) of logits (m, V)."""
    total = torch.zeros((), dtype=torch.float64)
    for b, a in zip(before, after, strict=True):
        p, q = softmax(list(b)), softmax(list(a))
        total = total + sum((x * torch.log(x / y) for x, y in zip(p, q, strict=True)), torch.zeros(()))
    return total / len(before)


def retrieve(u: Tensor, keys: Tensor, sentinel: Tensor) -> int:
    """The newest of the keys of greatest inner product, if it beats the sentinel's; else −1."""
    best, found = float(torch.dot(u, sentinel)), -1
    for j, r in enumerate(keys):
        value = float(torch.dot(u, r))
        if value > best or (found >= 0 and value == best):
            best, found = value, j
    return found
