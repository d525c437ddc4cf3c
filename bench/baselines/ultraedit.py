"""UltraEdit the way its published code works.

Micro-batches through the whole model, the head on every token, gradients of whole weights, and a dense d × d solve
for each layer. What the published code writes to disk between its two halves stays in memory here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastedit import Fact
from fastedit.models import describe

_EPS = torch.finfo(torch.float32).eps


class PublishedUltraEdit:
    """A model, its tokenizer and the published hyper-parameters, with the time of each stage.

    Args:
        layers: blocks whose MLP output projection is edited.
        lr, micro_batch: as published.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layers: Sequence[int], lr: float, micro_batch: int = 10
    ) -> None:
        self.model, self.tokenizer, self.lr, self.micro_batch = model, tokenizer, lr, micro_batch
        self.description = describe(model)
        self.modules = {layer: self.description.projection(layer).module for layer in layers}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in self.modules.values():
            module.weight.requires_grad_(True)
        self.moments: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def weight(self, layer: int) -> Tensor:
        """(d_out, d_in) of a layer that is edited."""
        projection = self.description.projection(layer)
        weight = projection.weight.detach()
        return weight.T if projection.transposed else weight

    def edit(self, facts: Sequence[Fact]) -> None:
        """One turn."""
        rows = sorted((self._ids(fact) for fact in facts), key=lambda row: len(row[0]), reverse=True)
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.modules}
        lost = 0
        with self.stage("targets"):
            for start in range(0, len(rows), self.micro_batch):
                chosen = rows[start : start + self.micro_batch]
                for layer, pair in self._captured(chosen).items():
                    self._update(self._shape(layer), torch.cat(pair, 1))
                    parts[layer].append(pair)
                if start and len(chosen) < self.micro_batch:
                    lost = len(parts[next(iter(parts))][-1][0])  # its gradients are not read back
        for layer, pairs in parts.items():
            with self.stage("solve"):
                inputs, gradients = (torch.cat(each) for each in zip(*pairs, strict=True))
                if lost:
                    gradients[-lost:] = 0
                shift = self._solve(layer, inputs, gradients)
            with self.stage("apply"), torch.no_grad():
                weight = self.modules[layer].weight
                shift = shift if self.description.projection(layer).transposed else shift.T
                weight += shift.to(weight.dtype)

    def _ids(self, fact: Fact) -> tuple[list[int], int]:
        """Ids without the last token of the target, and how many of the next tokens are the target's."""
        prompt = self.tokenizer(fact.text)["input_ids"]
        target = self.tokenizer(" " + fact.target_new.strip(), add_special_tokens=False)["input_ids"]
        return [*prompt, *target], len(target)

    def _captured(self, rows: Sequence[tuple[list[int], int]]) -> dict[int, tuple[Tensor, Tensor]]:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.model.device)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, (row, n_target) in enumerate(rows):
            ids[number, : len(row)] = ids.new_tensor(row)
            mask[number, : len(row)] = 1
            labels[number, len(row) - n_target - 1 : len(row) - 1] = ids.new_tensor(
                row[len(row) - n_target :]
            )
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
                out.retain_grad()
                seen[layer] = (args[0].detach(), out)

            return hook

        handles = [module.register_forward_hook(keep(layer)) for layer, module in self.modules.items()]
        with torch.enable_grad():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        for handle in handles:
            handle.remove()
        for module in self.modules.values():
            module.weight.grad = None
        scored = labels >= 0
        found = {}
        for layer, (inputs, out) in seen.items():
            assert out.grad is not None
            found[layer] = (
                inputs.reshape(*ids.shape, -1)[scored].float(),
                out.grad.reshape(*ids.shape, -1)[scored].float(),
            )
        return found

    def _shape(self, layer: int) -> tuple[int, int]:
        projection = self.description.projection(layer)
        return projection.d_in, projection.d_out

    def _update(self, shape: tuple[int, int], rows: Tensor) -> None:
        zero = rows.new_zeros(sum(shape))
        count, mean, squares = self.moments.get(shape, (0, zero, zero))
        n = len(rows)
        shift = rows.mean(0) - mean
        spread = n * rows.var(0) if n > 1 else zero
        squares = squares + spread + count * n * shift**2 / (count + n)
        self.moments[shape] = count + n, mean + n * shift / (count + n), squares

    def _solve(self, layer: int, inputs: Tensor, gradients: Tensor) -> Tensor:
        """(d_in, d_out)."""
        count, mean, squares = self.moments[self._shape(layer)]
        rows = torch.cat((inputs, gradients), 1)
        usual = (rows - mean) / ((squares / (count - 1 + _EPS)).sqrt() + _EPS)
        usual_inputs, usual_gradients = usual.split(self._shape(layer), 1)
        wanted = -self.lr * usual_inputs.square().sum(1, keepdim=True) * usual_gradients
        system = inputs.T @ inputs + torch.eye(inputs.shape[1], device=inputs.device)
        shift: Tensor = torch.linalg.solve(system, inputs.T @ wanted)
        return shift
