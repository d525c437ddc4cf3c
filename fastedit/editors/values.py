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
from typing import TypeVar

import torch
from torch import Tensor

from ..facts import Fact
from ..models.runner import BlockCalls, BlockRunner, Prefix
from ..progress import progress
from .prompts import FactRows
from .token_losses import token_losses

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
DIVERGED = "its loss stopped being finite"
_CPU_TOKENS_PER_THREAD = 256

Batch = TypeVar("Batch")


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
class ScoredTokens:
    """Where the head is needed in the suffixes of the rows of n facts.

    Attributes:
        place: (m,), flat (row · suffix + column) positions at which target tokens are scored.
        token: (m,), their ids.
        weight: (m,) fp32, of their log-probabilities in the fact's mean over tokens and contexts.
        owner: (m,), the facts they belong to.
        neutral: (n,), flat positions of the KL term.
    """

    place: Tensor
    token: Tensor
    weight: Tensor
    owner: Tensor
    neutral: Tensor

    @classmethod
    def of(cls, facts: Sequence[FactRows], suffix: int, device: torch.device) -> ScoredTokens:
        """Those of facts whose rows, the neutral one last, are cut to ``suffix`` columns from the subject on."""
        place: list[int] = []
        token: list[int] = []
        weight: list[float] = []
        owner: list[int] = []
        neutral: list[int] = []
        row = 0
        for number, fact in enumerate(facts):
            length = len(fact.target)
            for prompt in fact.targets:
                end = row * suffix + len(prompt.ids) - prompt.subject_last
                place += range(end - length, end)
                row += 1
            count = length * len(fact.targets)
            token += fact.target * len(fact.targets)
            weight += [1.0 / count] * count
            owner += [number] * count
            neutral.append(row * suffix)
            row += 1
        return cls(
            torch.tensor(place, device=device),
            torch.tensor(token, device=device),
            torch.tensor(weight, device=device),
            torch.tensor(owner, device=device),
            torch.tensor(neutral, device=device),
        )

    @property
    def wanted(self) -> Tensor:
        """(m + n,): all positions, scored ones first."""
        return torch.cat((self.place, self.neutral))

    def mean(self, per_token: Tensor, n: int) -> Tensor:
        """(n,): each fact's weighted sum of (m,) values."""
        device = per_token.device
        weighted = per_token * self.weight.to(device)
        return torch.zeros(n, device=device).index_add(0, self.owner.to(device), weighted)


@dataclass
class _Rows:
    """The suffixes of the rows of some facts, ready to be run from the edited layer up.

    ``fact`` says which fact a row belongs to; the last row of each fact is its neutral row. ``seen`` holds the flat
    positions of all tokens that count, None if these are all.
    """

    states: Tensor
    base: Tensor | None
    fact: Tensor
    calls: BlockCalls
    scored: ScoredTokens
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
    reference: list[Tensor] = []

    def loss(batch: _Rows, live: Tensor, delta: Tensor) -> Loss:
        before = reference[0][live] if reference else None
        nll, divergence, log_p = _forward(runner, batch, delta, objective, before)
        if not reference:
            reference.append(log_p)
        return Loss(nll, nll, objective.kl_factor * divergence)

    found = descend(
        initial, objective, lambda live: _prepare(runner, rows, chosen, recorded, live, objective), loss
    )
    for position in found.broken.nonzero().flatten().tolist():
        values.broken[chosen[position]] = DIVERGED
    values.initial[chosen] = initial.to(values.initial.device)
    values.mlp[chosen] = _mlp_contribution(runner, recorded.mlp[first], objective).to(values.mlp.device)
    values.shift[chosen] = found.shift.to(values.shift.device)
    values.losses[chosen] = found.losses.cpu()


@dataclass
class Loss:
    """One evaluation of n facts, without the weight decay; (n,) each.

    Attributes:
        fit: the negative log-likelihood as it is minimised.
        nll: as it is reported.
        kl: the KL term, with its factor.
        settled: facts that may stop, whatever their loss; None: none.
    """

    fit: Tensor
    nll: Tensor
    kl: Tensor
    settled: Tensor | None = None


@dataclass
class Descent:
    """What :func:`descend` found for n facts.

    Attributes:
        shift: of the shape of the initial values.
        losses: (n, steps, 4) fp64, see :class:`Values`.
        broken: (n,) bool, the loss stopped being finite.
    """

    shift: Tensor
    losses: Tensor
    broken: Tensor


def descend(
    initial: Tensor,
    objective: ValueObjective,
    prepare: Callable[[Tensor], Batch],
    evaluate: Callable[[Batch, Tensor, Tensor], Loss],
) -> Descent:
    """Adam on the shifts of the values of n facts, each as if it were alone; facts that are done leave the batch.

    Args:
        initial: (n, ..., hidden) fp32, the unedited values. Each vector has its own weight decay and its own clamp.
        objective: constants of the loss and its optimiser.
        prepare: makes what ``evaluate`` needs of the facts (k,) that are live.
        evaluate: the loss at shifts (k, ..., hidden), of such a batch and its facts.
    """
    n, device = len(initial), initial.device
    scale = initial.norm(dim=-1)
    shift = torch.zeros_like(initial)
    moments = torch.zeros_like(shift), torch.zeros_like(shift)
    losses = torch.full((n, objective.steps, 4), float("nan"), dtype=torch.float64, device=device)
    broken = torch.zeros(n, dtype=torch.bool, device=device)

    live = torch.arange(n, device=device)
    batch = prepare(live)
    done = torch.zeros_like(broken)
    for step in range(objective.steps):
        delta = shift[live].requires_grad_()
        with torch.enable_grad():
            at = evaluate(batch, live, delta)
            decay = objective.weight_decay * (delta.norm(dim=-1) / scale[live] ** 2).reshape(
                len(live), -1
            ).sum(1)
            loss = at.fit + at.kl + decay
            now = torch.stack((loss, at.nll, at.kl, decay), 1).detach().double()
            losses[live, step] = torch.where(done[:, None], losses[live, step], now)
            broken[live] |= ~done & ~now.isfinite().all(1)
            done |= (now[:, 0] < objective.stop_loss) | broken[live]
            if at.settled is not None:
                done |= at.settled
            last = step == objective.steps - 1
            if last or (step % 4 == 0 and bool(done.all())):
                break
            (gradient,) = torch.autograd.grad(loss.sum(), delta)
        moved = adam_step(shift[live], gradient.float(), moments, live, step + 1, objective.lr)
        moved = _clamped(moved, objective.clamp * scale[live])
        kept = done.reshape(-1, *[1] * (shift.dim() - 1))
        shift[live] = torch.where(kept, shift[live], moved)
        # Every few steps the facts that are done leave the batch, if they are many.
        if step % 4 == 3 and int(done.sum()) * 4 >= len(done):
            live = live[~done]
            if len(live) == 0:
                break
            batch = prepare(live)
            done = torch.zeros(len(live), dtype=torch.bool, device=device)
    return Descent(shift, losses, broken)


def _clamped(shift: Tensor, limit: Tensor) -> Tensor:
    """Shifts (..., hidden), each shortened to its limit (...) if it is longer."""
    norm = shift.norm(dim=-1)
    return torch.where((norm > limit)[..., None], shift * (limit / norm)[..., None], shift)


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
    rows_behind = runner.behind_shared_starts([row.ids for row in flat], [row.subject_last for row in flat])
    ids, begun = rows_behind.ids, rows_behind.begun
    starts = torch.tensor([row.subject_last for row in flat], device=ids.device)
    lengths = torch.tensor([len(row.ids) for row in flat], device=ids.device)
    suffix = int((lengths - starts).max())
    places = starts - begun
    columns = (places[:, None] + torch.arange(suffix, device=ids.device)).clamp(max=ids.shape[1] - 1)
    seen: dict[str, Tensor] = {}

    # Indexing copies, which matters: some models add to these tensors in place further on.
    def keep_block(_module: object, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        seen["block"] = at_columns(hidden, columns)

    def keep_mlp(_module: object, _args: object, out: Tensor) -> None:
        seen["mlp"] = at_columns(out.reshape(*ids.shape, -1), places[:, None])[:, 0]

    description = runner.description
    hooks = [(description.blocks[layer], keep_block), (description.projection(layer).module, keep_mlp)]
    shared = rows_behind.prefix
    _, pairs = runner.record(ids, rows_behind.mask, rows_behind.positions, hooks, shared)
    padding = None if shared is None else shared.mask.shape[1] - begun
    prefix = Prefix.before(starts, pairs, layer + 1, padding)
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

    base = recorded.mlp[index.to(recorded.mlp.device)] if _has_post_norm(runner, objective) else None
    return _Rows(
        states,
        base,
        torch.arange(len(live), device=states.device).repeat_interleave(per_fact),
        calls,
        ScoredTokens.of([rows[chosen[i]] for i in live.tolist()], suffix, states.device),
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
    states = runner.states_at(batch.calls, hidden, objective.layer + 1, batch.scored.wanted, batch.seen)
    logits = runner.logits(states).float()
    if reference is not None:
        reference = reference.to(logits.device)
    picked, divergence, log_p = token_losses(logits, batch.scored.token.to(logits.device), reference)
    nll = batch.scored.mean(picked, len(delta))
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
