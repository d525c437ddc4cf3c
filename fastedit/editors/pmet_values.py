"""PMET's target values: a shift of the attention's output and one of the MLP's, optimised together (2308.08742).

Like :mod:`fastedit.editors.values` this runs all facts together, on the positions from the subject's last
token on, over cached keys and values. The shifts enter inside the block, so that the cached prefix starts
with this block, and it is run again at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.runner import BlockCalls, BlockRunner, Prefix
from ..models.tokens import pad_batch
from ..progress import progress
from .prompts import FactRows
from .values import (
    DIVERGED,
    Descent,
    Loss,
    ScoredTokens,
    ValueObjective,
    Values,
    at_columns,
    descend,
    micro_batches,
    smaller_if_it_must,
)

SETTLED_NLL_FACTOR = 0.1
SETTLED_KL = 0.01


def optimise_pairs(
    runner: BlockRunner,
    rows: Sequence[FactRows],
    objective: ValueObjective,
    *,
    micro_batch: int | None = None,
    show_progress: bool | None = None,
) -> Values:
    """Optimise the two shifts of a batch of facts on the model's current weights; only the MLP's is returned.

    δ_attn and δ_mlp are added to the outputs of the attention's and of the MLP's output projection in block
    ``objective.layer``, at the subject's last token of every row. The loss is
    f · NLL + KL + weight_decay · (‖δ_attn‖ / ‖o_attn‖² + ‖δ_mlp‖ / ‖o_mlp‖²), where o are the unedited outputs
    under the bare prompt; each shift has its own clamp. The factor f is 1, but 0.1 in the step after one in
    which every target token was the likeliest of its position. A fact is done when its loss is below
    ``objective.stop_loss``, or when every target token is the likeliest and the KL term is at most 0.01.

    Args:
        runner: the model, frozen and in evaluation mode.
        rows: one per fact, each with the same number of contexts.
        objective: the layer and the constants of the loss and its optimiser.
        micro_batch: facts optimised together; None chooses by free memory.
        show_progress: see :func:`fastedit.progress.progress`.

    Returns:
        The MLP's values. In ``losses`` the negative log-likelihood stands without its factor, the total with
        it, and the weight decay is the sum of both terms. A fact whose loss stops being finite is reported in
        :attr:`Values.broken`; the others are not affected.

    Raises:
        UnsupportedModel: the block's attention output projection is not known.
    """
    n, hidden, device = len(rows), runner.description.hidden_size, runner.device
    initial, shift = torch.zeros(n, hidden, device=device), torch.zeros(n, hidden, device=device)
    losses = torch.full((n, objective.steps, 4), float("nan"), dtype=torch.float64)
    broken = torch.zeros(n, dtype=torch.bool)

    def run(chosen: list[int]) -> None:
        before, found = _optimise_together(runner, [rows[i] for i in chosen], objective)
        initial[chosen] = before[:, 1].to(device)
        shift[chosen] = found.shift[:, 1].to(device)
        losses[chosen] = found.losses.cpu()
        broken[chosen] = found.broken.cpu()

    with progress(total=n, desc="optimising targets", unit="fact", show=show_progress) as bar:
        for batch in micro_batches(runner, rows, objective, micro_batch):
            for chosen in smaller_if_it_must(batch, run):
                bar.update(len(chosen))
    reasons = dict.fromkeys(broken.nonzero().flatten().tolist(), DIVERGED)
    return Values(initial, shift, initial.clone(), losses, reasons)


@dataclass
class _Recorded:
    """What one full pass over the rows of a micro-batch leaves behind.

    Attributes:
        ids: (rows, suffix), tokens from the subject's last one on.
        starts: (rows,), the position of the subject's last token.
        lengths: (rows,), of the suffixes.
        states: (rows, suffix, hidden), at the entry of the block; None for the first block.
        initial: (n, 2, hidden) fp32, unedited outputs of the two projections under the bare prompt.
        prefix: keys and values before the suffixes, from the block on.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    states: Tensor | None
    initial: Tensor
    prefix: Prefix


@dataclass
class _Suffixes:
    """The suffixes of the rows of the facts still being optimised.

    Attributes:
        states: (rows, suffix, hidden), at the entry of the block.
        calls: the blocks' arguments.
        fact: (rows,), which fact a row belongs to; the last row of each fact is its neutral row.
        scored: where the head is needed.
    """

    states: Tensor
    calls: BlockCalls
    fact: Tensor
    scored: ScoredTokens


def _optimise_together(
    runner: BlockRunner, rows: Sequence[FactRows], objective: ValueObjective
) -> tuple[Tensor, Descent]:
    """Unedited outputs (n, 2, hidden), the attention's first, and the shifts of this shape."""
    recorded = _record(runner, rows, objective.layer)
    settled = torch.zeros(len(rows), dtype=torch.bool, device=recorded.initial.device)
    reference: list[Tensor] = []

    def loss(batch: _Suffixes, live: Tensor, delta: Tensor) -> Loss:
        nll, likeliest, log_p = _forward(runner, batch, delta, objective.layer)
        if not reference:
            reference.append(log_p.detach())
        divergence = F.kl_div(reference[0][live], log_p, log_target=True, reduction="none").sum(1)
        kl = objective.kl_factor * divergence
        factor = torch.ones_like(nll).masked_fill_(settled[live], SETTLED_NLL_FACTOR)
        settled[live] = likeliest
        return Loss(factor * nll, nll, kl, likeliest & (kl.detach() <= SETTLED_KL))

    def prepare(live: Tensor) -> _Suffixes:
        return _prepare(runner, rows, recorded, live, objective.layer)

    return recorded.initial, descend(recorded.initial, objective, prepare, loss)


def _record(runner: BlockRunner, rows: Sequence[FactRows], layer: int) -> _Recorded:
    """Run all rows once through the whole decoder; keep what the suffixes need."""
    description = runner.description
    flat = [row for fact in rows for row in (*fact.targets, fact.neutral)]
    ids, mask, positions = (t.to(runner.device) for t in pad_batch([row.ids for row in flat], pad_id=0))
    starts = torch.tensor([row.subject_last for row in flat], device=ids.device)
    lengths = torch.tensor([len(row.ids) for row in flat], device=ids.device) - starts
    columns = starts[:, None] + torch.arange(int(lengths.max()), device=ids.device)
    columns = columns.clamp(max=ids.shape[1] - 1)
    bare = torch.arange(0, len(flat), len(flat) // len(rows), device=ids.device)
    seen: dict[str, Tensor] = {}

    # Indexing copies, which matters: some models add to these tensors in place further on.
    def keep_states(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen["states"] = at_columns(out[0] if isinstance(out, tuple) else out, columns)

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            at = bare.to(out.device), starts[bare].to(out.device)
            seen[name] = out.reshape(*ids.shape, -1)[at].float()

        return hook

    hooks = [
        (description.attention_projection(layer), keep("attention")),
        (description.projection(layer).module, keep("mlp")),
        *([(description.blocks[layer - 1], keep_states)] if layer > 0 else []),
    ]
    _, pairs = runner.record(ids, mask, positions, hooks)
    return _Recorded(
        torch.gather(ids, 1, columns),
        starts,
        lengths,
        seen.get("states"),
        torch.stack((seen["attention"], seen["mlp"]), 1),
        Prefix.before(starts, pairs, layer),
    )


def _prepare(
    runner: BlockRunner, rows: Sequence[FactRows], recorded: _Recorded, live: Tensor, layer: int
) -> _Suffixes:
    """Select the rows of the facts that are still being optimised and record the blocks' arguments."""
    device = recorded.ids.device
    per_fact = len(rows[0].targets) + 1
    index = (live[:, None].to(device) * per_fact + torch.arange(per_fact, device=device)).reshape(-1)
    lengths = recorded.lengths[index, None]
    suffix = int(lengths.max())
    offsets = torch.arange(suffix, device=device)
    real = offsets < lengths
    prefix = recorded.prefix.select(index)
    calls = runner.capture(
        recorded.ids[index, :suffix],
        torch.cat((prefix.mask, real.long()), 1),
        recorded.starts[index, None] + offsets * real,
        prefix,
    )
    if recorded.states is None:
        states = calls.embedded
    else:
        states = recorded.states[index.to(recorded.states.device), :suffix]

    return _Suffixes(
        states,
        calls,
        torch.arange(len(live), device=states.device).repeat_interleave(per_fact),
        ScoredTokens.of([rows[i] for i in live.tolist()], suffix, states.device),
    )


def _forward(
    runner: BlockRunner, batch: _Suffixes, delta: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the block and all above it with the shifts (n, 2, hidden).

    Returns:
        Per fact the negative log-likelihood (n,), whether each target token is the likeliest (n,), and the
        log-probabilities at the neutral prompt (n, vocabulary).
    """
    description = runner.description
    attention, mlp = delta[batch.fact].unbind(1)
    with (
        description.attention_projection(layer).register_forward_hook(_adding(attention)),
        description.projection(layer).module.register_forward_hook(_adding(mlp)),
    ):
        out = runner.run(batch.calls, batch.states, layer, layer + 1)
    scored = batch.scored
    states = runner.states_at(batch.calls, out, layer + 1, scored.wanted)
    log_p = F.log_softmax(runner.logits(states).float(), dim=-1)
    split, place = len(scored.place), log_p.device
    picked = log_p[:split].gather(1, scored.token.to(place)[:, None])[:, 0]
    beaten = torch.zeros(len(delta), device=place).index_add(
        0, scored.owner.to(place), (picked < log_p[:split].amax(1)).float()
    )
    nll = scored.mean(-picked, len(delta))
    return nll.to(delta.device), (beaten == 0).to(delta.device), log_p[split:].to(delta.device)


def _adding(shift: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A forward hook that adds shift (rows, hidden) to the first position of each row, in float32."""

    def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        shaped = out.reshape(len(shift), -1, out.shape[-1])
        first = (shaped[:, 0].float() + shift.to(out.device)).to(out.dtype)
        return torch.cat((first[:, None], shaped[:, 1:]), 1).reshape(out.shape)

    return hook
