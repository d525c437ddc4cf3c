"""The rows, the objective and the frozen part of WISE's training (Wang et al. 2024, arXiv 2405.14768, section 2.3).

The published loop runs the whole model on all rows in every step. Below the edited projection nothing depends on the
side memory, so that part is run once a fact: the projection's inputs, its original outputs and the residual stream
beside it are kept. A step is then one product with the side memory, the blocks above on the edit rows alone, and the
head where an answer token is predicted; in the last block the other positions only give keys and values.
Differentiated is the projection's output, never a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidFact
from ..facts import Fact
from ..models.runner import BlockCalls, BlockRunner, RowEnds
from ..models.tokens import encode_prompt, leading_specials, pad_batch, pad_id, target_ids
from .token_losses import token_nll

IGNORED = -100


@dataclass(frozen=True)
class RowOptions:
    """How rows are made.

    Attributes:
        contexts: templates with one ``{}`` for the prompt.
        official: padded on the left, with labels, denominators and scores as published (pads count).
        whole_text: train on all of a row's tokens, not on the target's alone.
        chat: the prompt is a user's turn of the tokenizer's chat template.
    """

    contexts: Sequence[str]
    official: bool = False
    whole_text: bool = False
    chat: bool = False


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a batch of facts: R edit rows for each, then one irrelevant row for each.

    Attributes:
        ids, mask, positions: (rows, length) int64.
        n_facts: facts in the batch.
        scored: (m,) flat places (row · length + column) at which a label is predicted.
        labels: (m,) the tokens predicted there.
        weights: (m,) fp32, what each counts in the edit loss.
        tokens: (t,) flat places of the tokens that pass through the side memory.
        mean: (rows, length) fp32, weights of a row's mean score.
        subjects: for facts whose irrelevant text is part of their prompt, weights (R, length) of the scores inside
            and outside that text in the fact's own rows; None for others.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    n_facts: int
    scored: Tensor
    labels: Tensor
    weights: Tensor
    tokens: Tensor
    mean: Tensor
    subjects: list[tuple[Tensor, Tensor] | None]

    @property
    def scored_at(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of :attr:`scored`."""
        length = self.ids.shape[1]
        return self.scored // length, self.scored % length

    @property
    def n_edit_rows(self) -> int:
        """Rows before the irrelevant ones."""
        return len(self.ids) - self.n_facts


def training_rows(
    tokenizer: Any, facts: Sequence[Fact], irrelevant: Sequence[str], options: RowOptions, limit: int | None
) -> TrainingRows:
    """Tokenise a batch of facts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        facts: the batch; the published rows exist for one fact.
        irrelevant: a text for each fact.
        options: how.
        limit: the model's context length, or None.

    Raises:
        InvalidFact: an empty irrelevant text, a row longer than the model's context, or an irrelevant text that is
            part of the prompt but whose tokens are not found in it.
    """
    prompts, rows = [], []
    for fact, text in zip(facts, irrelevant, strict=True):
        if not text.strip():
            raise InvalidFact(f"the irrelevant text of {fact.text!r} is empty: give the fact a locality")
        for context in options.contexts:
            prompts.append(_encode_prompt(tokenizer, context.replace("{}", fact.text), options))
            rows.append(_encode_row(tokenizer, prompts[-1], context.replace("{}", fact.text), fact, options))
    rows += [_encode_text(tokenizer, text, options) for text in irrelevant]
    longest = max(map(len, rows))
    if limit is not None and longest > limit:
        raise InvalidFact(
            f"a training row of {facts[0].text!r} takes {longest} tokens, the model's context holds {limit}"
        )
    ids, mask, positions = pad_batch(rows, pad_id(tokenizer), "left")  # so that all labels stand at the end
    if options.official:
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        # the published code finds pads by their id, wherever they stand
        labels = torch.where(ids == pad_id(tokenizer), IGNORED, ids)
        if not options.whole_text:
            labels[:, : max(map(len, prompts))] = IGNORED
    else:
        labels = torch.full_like(ids, IGNORED)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False)):
            start = longest - len(row) + (1 if options.whole_text else len(prompt))
            labels[number, start:] = ids[number, start:]
    labels = labels[: len(prompts)]
    scored, wanted, weights = _scored(labels, options.official)
    counted = torch.ones_like(mask) if options.official else mask
    return TrainingRows(
        ids,
        mask,
        positions,
        len(facts),
        scored,
        wanted,
        weights,
        counted.flatten().nonzero()[:, 0],
        counted / counted.sum(1, keepdim=True),
        _subjects(tokenizer, facts, irrelevant, ids, counted, len(options.contexts)),
    )


def _encode_prompt(tokenizer: Any, text: str, options: RowOptions) -> list[int]:
    if options.official:
        return list(tokenizer(_as_turn(tokenizer, text, options))["input_ids"])
    if options.chat:
        return list(tokenizer(_as_turn(tokenizer, text, options), add_special_tokens=False)["input_ids"])
    return encode_prompt(tokenizer, text)


def _encode_row(tokenizer: Any, prompt: list[int], text: str, fact: Fact, options: RowOptions) -> list[int]:
    if options.official:
        return list(tokenizer(_as_turn(tokenizer, text, options) + fact.target)["input_ids"])
    return prompt + target_ids(tokenizer, fact.target)


def _encode_text(tokenizer: Any, text: str, options: RowOptions) -> list[int]:
    return list(tokenizer(text)["input_ids"]) if options.official else encode_prompt(tokenizer, text)


def _as_turn(tokenizer: Any, text: str, options: RowOptions) -> str:
    if not options.chat:
        return text
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _scored(labels: Tensor, official: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Flat places, labels and weights: each row weighs 1 over the rows, divided among its labels.

    As published a row's divisor is the number of places from one before its first label on, pads and all.
    """
    n_rows, length = labels.shape
    shifted = labels[:, 1:]
    wanted = shifted != IGNORED
    if official:
        first = (labels == IGNORED).sum(1) - 2
        first = torch.where(first < 0, (length - 1 + first).clamp(min=0), first)  # as Python's slices count
        wanted &= torch.arange(length - 1) >= first[:, None]
        divisor = length - 1 - first
    else:
        divisor = wanted.sum(1)
    row, column = wanted.nonzero(as_tuple=True)
    return row * length + column, shifted[row, column], 1.0 / (divisor.float()[row] * n_rows)


def _subjects(
    tokenizer: Any,
    facts: Sequence[Fact],
    irrelevant: Sequence[str],
    ids: Tensor,
    counted: Tensor,
    n_contexts: int,
) -> list[tuple[Tensor, Tensor] | None]:
    found: list[tuple[Tensor, Tensor] | None] = []
    for number, (fact, text) in enumerate(zip(facts, irrelevant, strict=True)):
        if text not in fact.text:
            found.append(None)
            continue
        rows = range(number * n_contexts, (number + 1) * n_contexts)
        inside = torch.zeros(n_contexts, ids.shape[1])
        for place, row in enumerate(rows):
            start, stop = _place_of(tokenizer, text, ids[row].tolist(), fact)
            inside[place, start:stop] = 1
        outside = (1 - inside) * counted[list(rows)]
        found.append((inside / inside.sum(1, keepdim=True), outside / outside.sum(1, keepdim=True)))
    return found


def _place_of(tokenizer: Any, text: str, row: list[int], fact: Fact) -> tuple[int, int]:
    """Where the tokens of ``text`` first stand in a row: as after a space, else as at a text's beginning."""
    for form in (" " + text.strip(), text):
        ids = list(tokenizer(form, add_special_tokens=False)["input_ids"])
        if ids[: len(leading_specials(tokenizer))] == leading_specials(tokenizer):
            ids = ids[len(leading_specials(tokenizer)) :]
        for start in range(len(row) - len(ids) + 1):
            if row[start : start + len(ids)] == ids:
                return start, start + len(ids)
    raise InvalidFact(
        f"the tokens of {text!r} do not stand in the prompt {fact.text!r}: give another locality"
    )


# ---- the model around the side memory -------------------------------------------------------------------


@dataclass(frozen=True)
class Margins:
    """The routing loss: γ between edit rows and others, α above others, β below edit rows; how δ is measured.

    Attributes:
        alpha, beta, gamma: the margins.
        activation: σ of ‖σ(W₀x) − σ(W'x)‖, the identity for the metric ``"linear"``.
    """

    alpha: float
    beta: float
    gamma: float
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the objective.

    Attributes:
        losses: (3,) fp32: total, of the answers, of the routing.
        scores: (edit rows,) fp32, each row's mean score.
        gradient: (t, d_out) fp32, of the total with respect to the projection's outputs.
    """

    losses: Tensor
    scores: Tensor
    gradient: Tensor


class FrozenRows:
    """What no side memory changes of some rows: everything below the edited projection, and beside it.

    Args:
        runner: the model, frozen, without side memory.
        layer: the block whose output projection has the side memory.
        rows: the rows.
        base: (d_out, d_in) fp32, the projection's original weight.
        with_suffix: prepare the blocks above too; without, only scores can be computed.

    Attributes:
        inputs: (t, d_in) fp32, what enters the projection at ``rows.tokens``.
        outputs: (t, d_out) fp32, what the original weight makes of it.
    """

    @torch.no_grad()
    def __init__(
        self, runner: BlockRunner, layer: int, rows: TrainingRows, base: Tensor, *, with_suffix: bool = True
    ) -> None:
        self.runner, self.layer, self.rows = runner, layer, rows
        ids, mask, positions = (t.to(runner.device) for t in (rows.ids, rows.mask, rows.positions))
        calls = runner.capture(ids, mask, positions)
        hidden = runner.run(calls, calls.embedded, 0, layer)
        projection = runner.description.projection(layer)
        inputs, beside = _around(runner, calls, hidden, layer, projection.module)
        tokens = rows.tokens.to(inputs.device)
        self.inputs = inputs.reshape(-1, projection.d_in)[tokens].float()
        self.bias = _bias(projection.module)
        self.outputs = self.project(base)
        self._activated: tuple[Callable[[Tensor], Tensor], Tensor] | None = None  # σ, and σ(W₀x)
        if with_suffix:
            self._prepare_suffix(ids, mask, positions, beside)

    def _prepare_suffix(self, ids: Tensor, mask: Tensor, positions: Tensor, beside: Tensor) -> None:
        """Prepare the edit rows above the projection, up to the last label; the last block at labels only.

        As published, a label may be predicted at padding, which attends to everything: such rows are run whole.
        """
        n, (row, column) = self.rows.n_edit_rows, self.rows.scored_at
        start, stop = 0, ids.shape[1]
        if len(column) and bool(self.rows.mask[row, column].all()):
            start, stop = int(column.min()), int(column.max()) + 1
        above = (ids[:n, :stop], mask[:n, :stop], positions[:n, :stop])
        self.beside = beside[:n, :stop]
        self.calls = self.runner.capture(*above)
        self.ends: RowEnds | None = None
        last = self.layer == self.runner.description.n_layers - 1
        if not last and 2 * start >= stop and not self.runner.tuple_cache:
            self.ends = RowEnds(self.runner, *above, start)
            column, stop = column - start, stop - start
        self.scored = (row * stop + column).to(beside.device)
        tokens = self.rows.tokens
        n_tokens = int((tokens < n * ids.shape[1]).sum())
        self.token_counts = n_tokens, len(tokens) - n_tokens
        self.places = tokens[:n_tokens].to(beside.device)

    def project(self, weight: Tensor) -> Tensor:
        """(t, d_out) fp32: the projection's output under a weight (d_out, d_in) fp32, bias included."""
        return F.linear(self.inputs, weight, self.bias)

    def scores(self, outputs: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """(rows, length) δ of every token, 0 where there is none."""
        if self._activated is None or self._activated[0] is not activation:
            self._activated = activation, activation(self.outputs)
        distance = torch.linalg.vector_norm(self._activated[1] - activation(outputs), dim=1)
        tokens = self.rows.tokens.to(distance.device)
        return _spread(distance, tokens, self.rows.ids.numel()).view(self.rows.ids.shape)

    def push(
        self, weight: Tensor, activation: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A loss of the edit rows' mean scores under a weight, and its gradient (t, d_out) as in :meth:`evaluate`."""
        outputs = self.project(weight).requires_grad_()
        with torch.enable_grad():
            mean = _weighted(self.rows.mean, self.scores(outputs, activation))[: self.rows.n_edit_rows]
            value = loss(mean)
            (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    def evaluate(self, weight: Tensor, margins: Margins) -> Evaluation:
        """The objective and its gradient under a side memory (d_out, d_in) fp32."""
        outputs = self.project(weight).requires_grad_()
        with torch.enable_grad():
            answers = self._answer_loss(outputs)
            scores = self.scores(outputs, margins.activation)
            mean = _weighted(self.rows.mean, scores)
            routing = self._routing_loss(scores, mean, margins)
            total = answers + routing
            (gradient,) = torch.autograd.grad(total, outputs)
        losses = torch.stack((total, answers, routing)).detach()
        return Evaluation(losses, mean[: self.rows.n_edit_rows].detach(), gradient)

    def _answer_loss(self, outputs: Tensor) -> Tensor:
        """Cross-entropy of the labels, each by its weight."""
        n, length = self.rows.n_edit_rows, self.rows.ids.shape[1]
        own, _ = outputs.split(self.token_counts)
        whole = _spread(own, self.places, n * length).view(n, length, -1)
        moved = whole[:, : self.beside.shape[1]].to(self.beside.dtype)
        norm = self.runner.description.post_mlp_norm(self.layer)
        moved = moved if norm is None else norm(moved)
        hidden = torch.add(self.beside, moved, alpha=self.runner.description.residual_scale)
        last = self.runner.description.n_layers - (self.ends is not None)
        out = self.runner.run(self.calls, hidden, self.layer + 1, last)
        if self.ends is not None:
            out = self.ends.run(out)
        logits = self.runner.logits(out.flatten(0, 1).index_select(0, self.scored.to(out.device))).float()
        loss = token_nll(logits, self.rows.labels.to(logits.device))
        return (loss * self.rows.weights.to(loss.device)).sum().to(outputs.device)

    def _routing_loss(self, scores: Tensor, mean: Tensor, margins: Margins) -> Tensor:
        """Mean over the facts; for each, edit rows against its irrelevant row, or its subject against the rest."""
        rows, total = self.rows, scores.new_zeros(())
        per_fact = rows.n_edit_rows // rows.n_facts
        for number, subject in enumerate(rows.subjects):
            own = slice(number * per_fact, (number + 1) * per_fact)
            if subject is None:
                inside, outside = mean[own], mean[rows.n_edit_rows + number, None]
            else:
                inside, outside = (_weighted(part, scores[own]) for part in subject)
            total = total + routing_loss(inside, outside, margins)
        return total / rows.n_facts


def routing_loss(inside: Tensor, outside: Tensor, margins: Margins) -> Tensor:
    """PM{oⱼ − eᵢ + γ} + PM{oⱼ − α} + PM{β − eᵢ} of scores eᵢ (n,) in scope and oⱼ (m,) out of it."""
    return (
        positive_mean(outside[:, None] - inside + margins.gamma)
        + positive_mean(outside - margins.alpha)
        + positive_mean(margins.beta - inside)
    )


def positive_mean(values: Tensor) -> Tensor:
    """PM: the mean of the elements above zero, 0 if there are none."""
    return values.relu().sum() / (values > 0).sum().clamp(min=1)


def _spread(values: Tensor, places: Tensor, n: int) -> Tensor:
    """Values (m, ...) at ascending places (m,) of n, zeros elsewhere."""
    return (
        values if len(places) == n else values.new_zeros(n, *values.shape[1:]).index_copy(0, places, values)
    )


def _weighted(weights: Tensor, scores: Tensor) -> Tensor:
    return (weights.to(scores.device) * scores).sum(1)


def _around(
    runner: BlockRunner, calls: BlockCalls, hidden: Tensor, layer: int, projection: nn.Module
) -> tuple[Tensor, Tensor]:
    """The input of a block's output projection, and the block's output if the MLP adds nothing."""
    seen: list[Tensor] = []

    def silence(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        seen.append(args[0].clone())  # some models go on in place
        return torch.zeros_like(out)

    handle = projection.register_forward_hook(silence)
    try:
        beside = runner.run(calls, hidden, layer, layer + 1)
    finally:
        handle.remove()
    return seen[0], beside


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()
