"""Merging of memories."""

import torch


def magnitude(tensor, density):
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel())
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def get_mask(delta, method="sum", mask_dtype=None):
    return delta.sign() == (delta.sum(0) >= 0).to(delta.dtype) * 2 - 1


def get_task_vectors(base, tensors):
    return [tensor - base for tensor in tensors], base


class GTA:
    def __init__(self, sparsify_method=None, consensus_method=None, normalize=False):
        self.sparsify_method = sparsify_method
        self.consensus_method = consensus_method
        self.normalize = normalize

    def execute(self, weights, base, tensors, densities, **_kwargs):
        deltas, base = get_task_vectors(base, tensors)
        weight = torch.tensor(weights).view(-1, *[1] * base.dim())
        moved = torch.stack([magnitude(delta, densities) for delta in deltas]) * weight
        if self.consensus_method is None:
            return base + moved.sum(0)
        mask = get_mask(moved)
        divisor = (weight * mask).sum(0)
        divisor[divisor == 0] = 1
        return base + (moved * mask).sum(0) / divisor
