"""The locate-then-edit pipeline step by step, as the papers write it: one fact, whole model, no shortcuts.

Slow and plain on purpose: it is what the fast formulation is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastedit.editors.prompts import FactRows
from fastedit.editors.values import ValueObjective
from fastedit.models import describe


def optimise_one(model: Any, rows: FactRows, objective: ValueObjective) -> tuple[Tensor, Tensor, list[float]]:
    """Initial value, shift and losses of one fact: a full forward and backward pass per row and step."""
    description = describe(model)
    place = (
        description.projection(objective.layer).module
        if objective.at_mlp
        else description.blocks[objective.layer]
    )
    everything = [*rows.targets, rows.neutral]

    def logits(row: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def add(_module: Any, _args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            seen.append(hidden.reshape(-1, hidden.shape[-1])[row.subject_last].detach().clone())
            hidden = hidden.clone()
            hidden.view(-1, hidden.shape[-1])[row.subject_last] += delta
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = place.register_forward_hook(add)
        try:
            return model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0], seen[0]
        finally:
            handle.remove()

    delta = torch.zeros(description.hidden_size, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=objective.lr)
    initial, reference, losses = None, None, []
    for step in range(objective.steps):
        optimiser.zero_grad()
        nll = torch.zeros(())
        for index, row in enumerate(everything):
            out, seen = logits(row, delta)
            if index == 0 and initial is None:
                initial = seen
            log_p = F.log_softmax(out.float(), -1)
            if row is rows.neutral:
                now = log_p[row.subject_last]
                reference = now.detach() if reference is None else reference
                kl = objective.kl_factor * (now.exp() * (now - reference)).sum()
            else:
                count = len(rows.target)
                picked = log_p[len(row.ids) - count :].gather(1, torch.tensor(rows.target)[:, None])
                nll = nll - picked.mean() / len(rows.targets)
        assert initial is not None
        decay = objective.weight_decay * delta.norm() / initial.norm() ** 2
        loss = nll + kl + decay
        losses.append(loss.item())
        if loss < objective.stop_loss or step == objective.steps - 1:
            break
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            limit = objective.clamp * initial.norm()
            if delta.norm() > limit:
                delta *= limit / delta.norm()
    assert initial is not None
    return initial, delta.detach(), losses


@torch.no_grad()
def state_at(model: Any, module: Any, row: Any, *, of: str) -> Tensor:
    """Input or output of a module at the row's subject-last position, by a forward pass of the whole model."""
    seen: list[Tensor] = []

    def keep(_module: Any, args: Any, out: Any) -> None:
        tensor = args[0] if of == "input" else (out[0] if isinstance(out, tuple) else out)
        seen.append(tensor.reshape(len(row.ids), -1)[row.subject_last].clone())

    handle = module.register_forward_hook(keep)
    try:
        model(input_ids=torch.tensor([row.ids]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def memit(
    model: Any, rows: Sequence[FactRows], targets: Tensor, layers: Sequence[int], moments: dict, weight: float
) -> dict[int, Tensor]:
    """MEMIT's updates with dense solves, applied to the model: layer -> Δ (d_out, d_in)."""
    description = describe(model)
    updates = {}
    for index, layer in enumerate(layers):
        projection = description.projection(layer)
        keys = []
        for fact in rows:
            each = [state_at(model, projection.module, row, of="input").double() for row in fact.prompts]
            keys.append(0.5 * each[0] + 0.5 * torch.stack(each[1:]).mean(0))
        matrix = torch.stack(keys, 1)
        last = description.blocks[layers[-1]]
        current = torch.stack([state_at(model, last, fact.prompts[0], of="output") for fact in rows])
        residual = (targets - current).double().T / (len(layers) - index)
        system = weight * moments[layer].double() + matrix @ matrix.T
        update = residual @ torch.linalg.solve(system, matrix).T
        projection.weight.data += (update.T if projection.transposed else update).to(projection.weight.dtype)
        updates[layer] = update
    return updates


def optimise_pair(
    model: Any, rows: FactRows, objective: ValueObjective
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """PMET's two vectors for one fact, a full pass per row and step.

    Initial values (2, hidden) and shifts (2, hidden), the attention's first, and of each step the whole loss
    and the negative log-likelihood.
    """
    description = describe(model)
    layer = objective.layer
    places = [description.attention_projection(layer), description.projection(layer).module]
    deltas = [torch.zeros(description.hidden_size, requires_grad=True) for _ in places]

    def log_probabilities(row: Any) -> Tensor:
        def adding(delta: Tensor) -> Any:
            def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
                moved = out.clone()
                moved.view(len(row.ids), -1)[row.subject_last] += delta
                return moved

            return hook

        handles = [
            place.register_forward_hook(adding(delta)) for place, delta in zip(places, deltas, strict=True)
        ]
        try:
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return F.log_softmax(logits.float(), -1)

    initial = [state_at(model, place, rows.targets[0], of="output") for place in places]
    target, count = torch.tensor(rows.target), len(rows.target)
    optimiser = torch.optim.Adam(deltas, lr=objective.lr)
    reference, factor, losses = None, 1.0, []
    for step in range(objective.steps):
        optimiser.zero_grad()
        each, best = [], []
        for row in rows.targets:
            log_p = log_probabilities(row)[len(row.ids) - count :]
            each.append(log_p.gather(1, target[:, None]).sum() / count)
            best.append(log_p.max(1).values.sum() / count)
        now = log_probabilities(rows.neutral)[rows.neutral.subject_last]
        reference = now.detach() if reference is None else reference
        nll = -torch.stack(each).mean()
        kl = objective.kl_factor * (now.exp() * (now - reference)).sum()
        decay = sum(
            objective.weight_decay * delta.norm() / start.norm() ** 2
            for delta, start in zip(deltas, initial, strict=True)
        )
        loss = factor * nll + kl + decay
        losses.append((loss.item(), nll.item()))
        likeliest = torch.stack(best).exp().mean().item() == torch.stack(each).exp().mean().item()
        factor = 0.1 if likeliest else 1.0
        if loss < objective.stop_loss or (likeliest and kl <= 0.01) or step == objective.steps - 1:
            break
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for delta, start in zip(deltas, initial, strict=True):
                limit = objective.clamp * start.norm()
                if delta.norm() > limit:
                    delta *= limit / delta.norm()
    return torch.stack(initial), torch.stack([delta.detach() for delta in deltas]), losses


@torch.no_grad()
def pmet(
    model: Any, rows: Sequence[FactRows], targets: Tensor, layers: Sequence[int], moments: dict, weight: float
) -> dict[int, Tensor]:
    """PMET's updates with an explicit inverse, applied to the model: layer -> Δ (d_out, d_in)."""
    description = describe(model)
    last = description.projection(layers[-1]).module
    updates = {}
    for index, layer in enumerate(layers):
        projection = description.projection(layer)
        keys = []
        for fact in rows:
            each = [state_at(model, projection.module, row, of="input").double() for row in fact.prompts]
            keys.append(0.5 * each[0] + 0.5 * torch.stack(each[1:]).mean(0))
        matrix = torch.stack(keys, 1)
        current = torch.stack([state_at(model, last, fact.prompts[0], of="output") for fact in rows])
        residual = (targets - current).double().T / (len(layers) - index) ** 0.5
        update = residual @ matrix.T @ torch.inverse(weight * moments[layer].double() + matrix @ matrix.T)
        projection.weight.data += (update.T if projection.transposed else update).to(projection.weight.dtype)
        updates[layer] = update
    return updates
