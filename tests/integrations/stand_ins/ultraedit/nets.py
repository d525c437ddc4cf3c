import torch
from torch import nn


class RunningMeanStd(nn.Module):
    def __init__(self, size):
        super().__init__()
        for name in ("mean", "var", "std"):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("n", torch.zeros(1))

    def update(self, x):
        n = self.n + len(x)
        delta = x.mean(0) - self.mean
        self.mean += len(x) * delta / n
        self.var += len(x) * x.var(0) + self.n * len(x) * delta.pow(2) / n
        self.std = (self.var / (n - 1 + torch.finfo(x.dtype).eps)).sqrt()
        self.n = n

    def forward(self, x):
        return (x - self.mean) / (self.std + torch.finfo(x.dtype).eps)
