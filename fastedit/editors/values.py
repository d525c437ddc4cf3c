"""Optimising the target values of many facts at once (Meng et al. 2022; LTE family).

The published loop runs the whole model on seven rows per fact and step. Three facts make most of that
work constant: a change δ of the hidden state at the subject's last token cannot reach lower blocks,
cannot reach earlier positions, and is independent between facts. So lower blocks and prefixes are run
once, their attention keys and values are kept, and all facts are optimised together; each step runs the
upper blocks on the few positions from the subject on, and the head only where a token is scored. Only
the shift δ is differentiated, never a weight. Results equal those of the loop up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..facts import Fact
from ..models.runner import BlockCalls, BlockRunner, Prefix
from ..models.tokens import pad_batch
from ..progress import progress
from .prompts import FactRows
from .token_losses import token_losses

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
_CPU_TOKENS_PER_THREAD = 256


@dataclass(frozen=True)
class ValueObjective:
    """How target values are optimised.

    Attributes:
        layer: the block at which the value lives.
        at_mlp: the value is the MLP's output (ROME), not the block's output (MEMIT).
        steps: loss evaluations at most; one update fewer.
        lr: Adam's learning rate.
        clamp: ‖δ‖ stays within this multiple of the initial value's norm.
        weight_decay: factor of ‖δ‖ / ‖initial value‖².
        kl_factor: factor of KL(current ‖ initial) at the neutral prompt.
        stop_loss: a fact is done when its loss is below this.
    """

    layer: int
    at_mlp: bool = False
    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    stop_loss: float = 0.05


@dataclass
class Values:
    """Optimised target values of n facts.

    Attributes:
        initial: (n, hidden) fp32, the unedited value under the bare prompt.
        shift: (n, hidden) fp32, δ.
        mlp: (n, hidden) fp32, what the block's MLP adds to the residual stream there, or, if the value is the
            MLP's own output, that output.
        losses: (n, steps, 4) fp64: total, negative log-likelihood, KL, weight decay; NaN after the stop.
        broken: facts without a usable target, by position: the reason.
    """

    initial: Tensor
    shift: Tensor
    mlp: Tensor
    losses: Tensor
    broken: dict[int, str] = field(default_factory=dict)

    @property
    def target(self) -> Tensor:
        """(n, hidden) fp32, initial + δ."""
        return self.initial + self.shift

    def select(self, positions: Sequence[int]) -> Values:
        """The values of some of the facts, in the order given."""
        chosen = torch.tensor(positions, dtype=torch.long)
        parts = (self.initial, self.shift, self.mlp, self.losses)
        initial, shift, mlp, losses = (part[chosen.to(part.device)] for part in parts)
        broken = {new: self.broken[old] for new, old in enumerate(positions) if old in self.broken}
        return Values(initial, shift, mlp, losses, broken)

    @staticmethod
    def join(parts: Sequence[Values]) -> Values:
        """The values of several lots of facts, one lot after the other."""
        broken, count = {}, 0
        for part in parts:
            broken.update({count + position: reason for position, reason in part.broken.items()})
            count += len(part.initial)
        tensors = zip(*((part.initial, part.shift, part.mlp, part.losses) for part in parts), strict=True)
        initial, shift, mlp, losses = (torch.cat(each) for each in tensors)
        return Values(initial, shift, mlp, losses, broken)

    @property
    def final_loss(self) -> Tensor:
        """(n,) the negative log-likelihood of each target at its last evaluation."""
        count = (~self.losses[:, :, 1].isnan()).sum(1)
        return self.losses[torch.arange(len(count)), count - 1, 1]


def optimise_values(
    runner: BlockRunner,
    facts: Sequence[Fact],
    rows: Sequence[FactRows],
    objective: ValueObjective,
    *,
    micro_batch: int | None = None,
    show_progress: bool | None = None,
) -> Values:
    """Optimise the target values of a batch of facts on the model's current weights.

    Args:
        runner: the model, frozen and in evaluation mode.
        facts: named in errors only.
        rows: one per fact, each with the same number of contexts.
        objective: the loss and its optimiser.
        micro_batch: facts optimised together; None chooses by free memory.
        show_progress: see :func:`fastedit.progress.progress`.

    A fact whose loss stops being finite is reported in :attr:`Values.broken`; the others are not affected.
    """
    n, hidden = len(rows), runner.description.hidden_size
    device = runner.device
    values = Values(
        torch.zeros(n, hidden, device=device),
        torch.zeros(n, hidden, device=device),
        torch.zeros(n, hidden, device=device),
        torch.full((n, objective.steps, 4), float("nan"), dtype=torch.float64),
    )
    with progress(total=n, desc="optimising targets", unit="fact", show=show_progress) as bar:
        for batch in micro_batches(runner, rows, objective, micro_batch):
            for chosen in smaller_if_it_must(
                batch, lambda part: _optimise_together(runner, facts, rows, part, objective, values)
            ):
                bar.update(len(chosen))
    return values


def smaller_if_it_must(batch: list[int], run: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """Run a batch, or its halves if the device's memory does not hold it; gives what was run, part by part.

    Raises:
        torch.cuda.OutOfMemoryError: there is no memory for one fact alone.
    """
    try:
        run(batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    else:
        yield batch
        return
    torch.cuda.empty_cache()  # outside of the except clause, which keeps the failed run's tensors alive
    middle = len(batch) // 2
    logger.warning("no memory for %d facts at a time: trying %d", len(batch), middle)
    for half in (batch[:middle], batch[middle:]):
        yield from smaller_if_it_must(half, run)


@dataclass
class _Rows:
    """The suffixes of the rows of some facts, ready to be run from the edited layer up.

    ``fact`` says which fact a row belongs to; the last row of each fact is its neutral row. ``scored``
    holds flat (row · length + column) positions of scored tokens, ``token`` their ids, ``weight`` one over
    the number of tokens and contexts, ``owner`` the fact; ``neutral`` the flat positions of the KL term; ``seen`` the
    flat positions of all tokens that count, None if these are all.
    """

    states: Tensor
    base: Tensor | None
    fact: Tensor
    calls: BlockCalls
    scored: Tensor
    token: Tensor
    weight: Tensor
    owner: Tensor
    neutral: Tensor
    seen: Tensor | None


@dataclass
class _Recorded:
    """What the one full pass over the rows of a micro-batch leaves behind, per row."""

    ids: Tensor
    lengths: Tensor
    starts: Tensor
    states: Tensor
    mlp: Tensor
    prefix: Prefix


def _optimise_together(
    runner: BlockRunner,
    facts: Sequence[Fact],
    rows: Sequence[FactRows],
    chosen: list[int],
    objective: ValueObjective,
    values: Values,
) -> None:
    per_fact = len(rows[0].targets) + 1
    recorded = _record(runner, [rows[i] for i in chosen], objective.layer)
    first = torch.arange(len(chosen), device=recorded.states.device) * per_fact
    initial = (recorded.mlp[first] if objective.at_mlp else recorded.states[first, 0]).float()
    scale = initial.norm(dim=1)
    shift = torch.zeros_like(initial)
    moments = torch.zeros_like(shift), torch.zeros_like(shift)
    losses = torch.full(
        (len(chosen), objective.steps, 4), float("nan"), dtype=torch.float64, device=shift.device
    )
    reference: Tensor | None = None

    live = torch.arange(len(chosen), device=shift.device)
    batch = _prepare(runner, rows, chosen, recorded, live, objective)
    done = torch.zeros(len(live), dtype=torch.bool, device=shift.device)
    broken = torch.zeros(len(chosen), dtype=torch.bool, device=shift.device)
    for step in range(objective.steps):
        delta = shift[live].requires_grad_()
        with torch.enable_grad():
            nll, divergence, log_p = _forward(
                runner, batch, delta, objective, None if reference is None else reference[live]
            )
            if reference is None:
                reference = log_p
            kl = objective.kl_factor * divergence
            decay = objective.weight_decay * delta.norm(dim=1) / scale[live] ** 2
            loss = nll + kl + decay
            now = torch.stack((loss, nll, kl, decay), 1).detach().double()
            losses[live, step] = torch.where(done[:, None], losses[live, step], now)
            broken[live] |= ~done & ~now.isfinite().all(1)
            done |= (now[:, 0] < objective.stop_loss) | broken[live]
            last = step == objective.steps - 1
            if last or (step % 4 == 0 and bool(done.all())):
                break
            (gradient,) = torch.autograd.grad(loss.sum(), delta)
        moved = adam_step(shift[live], gradient.float(), moments, live, step + 1, objective.lr)
        norm = moved.norm(dim=1)
        limit = objective.clamp * scale[live]
        moved = torch.where((norm > limit)[:, None], moved * (limit / norm)[:, None], moved)
        shift[live] = torch.where(done[:, None], shift[live], moved)
        # Every few steps the facts that are done leave the batch, if they are many.
        if step % 4 == 3 and int(done.sum()) * 4 >= len(done):
            live = live[~done]
            if len(live) == 0:
                break
            batch = _prepare(runner, rows, chosen, recorded, live, objective)
            done = torch.zeros(len(live), dtype=torch.bool, device=shift.device)

    for position in broken.nonzero().flatten().tolist():
        values.broken[chosen[position]] = "its loss stopped being finite"
    losses = losses.cpu()
    values.initial[chosen] = initial.to(values.initial.device)
    values.mlp[chosen] = _mlp_contribution(runner, recorded.mlp[first], objective).to(values.mlp.device)
    values.shift[chosen] = shift.to(values.shift.device)
    values.losses[chosen] = losses


def adam_step(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], live: Tensor, step: int, lr: float
) -> Tensor:
    """One step of Adam on rows ``live`` (Kingma and Ba 2015), moments updated in place."""
    beta1, beta2 = ADAM_BETAS
    first = torch.lerp(moments[0][live], gradient, 1 - beta1)
    second = moments[1][live] * beta2 + gradient * gradient * (1 - beta2)
    moments[0][live], moments[1][live] = first, second
    denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(ADAM_EPS)
    return value - lr / (1 - beta1**step) * first / denominator


def _record(runner: BlockRunner, rows: Sequence[FactRows], layer: int) -> _Recorded:
    """Run all rows once through the whole decoder; keep what the suffixes need."""
    flat = [row for fact in rows for row in (*fact.targets, fact.neutral)]
    ids, mask, positions = (t.to(runner.device) for t in pad_batch([row.ids for row in flat], pad_id=0))
    starts = torch.tensor([row.subject_last for row in flat], device=ids.device)
    lengths = torch.tensor([len(row.ids) for row in flat], device=ids.device)
    suffix = int((lengths - starts).max())
    columns = (starts[:, None] + torch.arange(suffix, device=ids.device)).clamp(max=ids.shape[1] - 1)
    seen: dict[str, Tensor] = {}

    # Indexing copies, which matters: some models add to these tensors in place further on.
    def keep_block(_module: object, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        seen["block"] = at_columns(hidden, columns)

    def keep_mlp(_module: object, _args: object, out: Tensor) -> None:
        seen["mlp"] = at_columns(out.reshape(*ids.shape, -1), starts[:, None])[:, 0]

    description = runner.description
    hooks = [(description.blocks[layer], keep_block), (description.projection(layer).module, keep_mlp)]
    _, pairs = runner.record(ids, mask, positions, hooks)
    prefix = Prefix.before(starts, pairs, layer + 1)
    return _Recorded(torch.gather(ids, 1, columns), lengths, starts, seen["block"], seen["mlp"], prefix)


def at_columns(hidden: Tensor, columns: Tensor) -> Tensor:
    """Hidden (rows, length, d) at columns (rows, m): a copy (rows, m, d)."""
    columns = columns.to(hidden.device)
    return hidden[torch.arange(len(columns), device=hidden.device)[:, None], columns]


def _prepare(
    runner: BlockRunner,
    rows: Sequence[FactRows],
    chosen: list[int],
    recorded: _Recorded,
    live: Tensor,
    objective: ValueObjective,
) -> _Rows:
    """Select the rows of the facts that are still being optimised and record the blocks' arguments."""
    device = recorded.ids.device
    per_fact = len(rows[0].targets) + 1
    index = (live[:, None].to(device) * per_fact + torch.arange(per_fact, device=device)).reshape(-1)
    starts, lengths = recorded.starts[index], recorded.lengths[index]
    suffix = int((lengths - starts).max())
    offsets = torch.arange(suffix, device=device)
    prefix = recorded.prefix.select(index)
    counts = offsets < (lengths - starts)[:, None]
    mask = torch.cat((prefix.mask, counts.long()), 1)
    positions = starts[:, None] + offsets * counts
    if objective.layer + 1 < runner.description.n_layers:
        calls = runner.capture(recorded.ids[index, :suffix], mask, positions, prefix)
    else:  # the value is the last block's own: nothing is left to run
        calls = BlockCalls(recorded.states, [])
    states = recorded.states[index.to(recorded.states.device), :suffix]

    scored: list[int] = []
    token: list[int] = []
    weight: list[float] = []
    owner: list[int] = []
    neutral: list[int] = []
    for number, fact in enumerate(live.tolist()):
        fact_row = rows[chosen[fact]]
        contexts, target = fact_row.targets, fact_row.target
        for column, row in enumerate(contexts):
            end = len(row.ids) - row.subject_last
            flat = (number * per_fact + column) * suffix + end - len(target)
            scored += range(flat, flat + len(target))
            token += target
            weight += [1.0 / (len(target) * len(contexts))] * len(target)
            owner += [number] * len(target)
        neutral.append((number * per_fact + len(contexts)) * suffix)
    base = recorded.mlp[index.to(recorded.mlp.device)] if _has_post_norm(runner, objective) else None
    fact_of_row = torch.arange(len(live), device=states.device).repeat_interleave(per_fact)

    def tensor(items: list, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(items, dtype=dtype, device=states.device)

    return _Rows(
        states,
        base,
        fact_of_row,
        calls,
        tensor(scored),
        tensor(token),
        tensor(weight, torch.float32),
        tensor(owner),
        tensor(neutral),
        None if bool(counts.all()) else counts.flatten().nonzero()[:, 0].to(states.device),
    )


def _has_post_norm(runner: BlockRunner, objective: ValueObjective) -> bool:
    return objective.at_mlp and runner.description.post_mlp_norm(objective.layer) is not None


def _forward(
    runner: BlockRunner, batch: _Rows, delta: Tensor, objective: ValueObjective, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per fact: negative log-likelihood (n,), KL (n,) and log-probabilities (n, vocabulary) at the neutral prompt."""
    moved = batch.states[:, 0].float() + _reaching(runner, batch, delta, objective)
    hidden = torch.cat((moved.to(batch.states.dtype)[:, None], batch.states[:, 1:]), 1)
    wanted = torch.cat((batch.scored, batch.neutral))
    states = runner.states_at(batch.calls, hidden, objective.layer + 1, wanted, batch.seen)
    logits = runner.logits(states).float()
    if reference is not None:
        reference = reference.to(logits.device)
    picked, divergence, log_p = token_losses(logits, batch.token.to(logits.device), reference)
    nll = torch.zeros(len(delta), device=picked.device).index_add(
        0, batch.owner.to(picked.device), picked * batch.weight.to(picked.device)
    )
    return nll.to(delta.device), divergence.to(delta.device), log_p.to(delta.device)


def _reaching(runner: BlockRunner, batch: _Rows, delta: Tensor, objective: ValueObjective) -> Tensor:
    """What each row's δ adds to the residual stream: itself, or its way through a norm behind the MLP."""
    rows = delta[batch.fact]
    if objective.at_mlp:
        rows = rows * runner.description.residual_scale
    if batch.base is None:
        return rows
    norm = runner.description.post_mlp_norm(objective.layer)
    assert norm is not None
    base = batch.base.float()
    with torch.no_grad():
        before = norm(base.to(batch.states.dtype)).float()
    return norm((base + rows).to(batch.states.dtype)).float() - before


@torch.no_grad()
def _mlp_contribution(runner: BlockRunner, mlp: Tensor, objective: ValueObjective) -> Tensor:
    """What is added to the residual stream when the block's MLP puts out ``mlp``, in fp32."""
    norm = runner.description.post_mlp_norm(objective.layer)
    if objective.at_mlp:
        return mlp.float()
    return (mlp if norm is None else norm(mlp)).float() * runner.description.residual_scale


def micro_batches(
    runner: BlockRunner, rows: Sequence[FactRows], objective: ValueObjective, size: int | None
) -> list[list[int]]:
    """Positions of facts to optimise together, those with suffixes of like length in one batch.

    On a GPU a batch takes half of the free memory. On a CPU a few hundred tokens keep the matrix units busy,
    and more only leave the cache.
    """
    order = sorted(range(len(rows)), key=lambda i: _suffix(rows[i]))
    if size is not None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    budget = int(torch.cuda.mem_get_info(runner.device)[0]) // 2 if runner.device.type == "cuda" else None
    batches: list[list[int]] = []
    for position in order:
        grown = [*batches[-1], position] if batches else [position]
        tokens = len(grown) * (len(rows[position].targets) + 1) * _suffix(rows[position])
        if budget is None:
            fits = tokens <= _CPU_TOKENS_PER_THREAD * torch.get_num_threads()
        else:
            fits = _bytes(runner, [rows[i] for i in grown], tokens, objective) <= budget
        if batches and fits:
            batches[-1] = grown
        else:
            batches.append([position])
    return batches


def _suffix(row: FactRows) -> int:
    return max(len(prompt.ids) - prompt.subject_last for prompt in row.targets)


def _bytes(runner: BlockRunner, rows: Sequence[FactRows], tokens: int, objective: ValueObjective) -> int:
    """Memory of one backward pass: activations of the suffixes, keys and values of the prefixes, logits."""
    description = runner.description
    upper = description.n_layers - objective.layer
    width = 12 * description.hidden_size + 4 * description.projection(objective.layer).d_in
    contexts = len(rows[0].targets) + 1
    longest = max(len(prompt.ids) for row in rows for prompt in row.targets)
    vocabulary = next(description.head.parameters()).shape[0]
    scored = contexts * sum(len(row.target) for row in rows)
    prefix = len(rows) * contexts * longest * upper * 4 * description.hidden_size
    return 4 * (tokens * upper * width + prefix + 4 * scored * vocabulary)
