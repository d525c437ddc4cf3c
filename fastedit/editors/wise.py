"""WISE: edits in a side memory beside one projection, and a router that leaves all else alone.

Source: Wang et al. 2024, arXiv 2405.14768. Each fact is trained by SGD on the entries of the side memory that its
shard's random mask selects; finished shards are merged by TIES or kept apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..facts import Fact, validate_facts
from ..memory.wise import ShardPlan, WiseMemories, model_activation
from ..models.describe import ModelDescription
from ..models.runner import BlockRunner, frozen
from ..ops import masked_sgd_
from ..ops.masks import Mask
from ..ops.routing import activation_function
from ..progress import progress
from .base import Editor, register_editor
from .stopwatch import Stopwatch
from .templates import plain_text, sample_continuations
from .wise_training import FrozenRows, Margins, RowOptions, TrainingRows, positive_mean, training_rows

PREFIX_STARTS = ("I", "You", "Because", "Yes", "Q: ")
PREFIX_LENGTHS = (5, 10)
STOP_CHANGE, STOP_LOSS = 1e-4, 0.02
_REPLAY_MARGINS = 5.0, 20.0  # in the published code, whatever α and β are


@dataclass(frozen=True)
class WiseParams:
    """Hyper-parameters of WISE.

    Attributes:
        layers: the one block whose output projection gets the side memory.
        lr, steps: of SGD; at most so many steps for a fact.
        mask_ratio: ρ, share of the entries that a shard may change.
        alpha, beta, gamma: margins of the routing loss.
        activation_ratio: what part of the lowest score of an edit lets a memory serve.
        save_freq, merge_freq: edits in a shard, edits between merges.
        retrieve: keep merged memories apart and choose among them; else merge all into one.
        merge, merge_density, merge_weight: see :class:`fastedit.memory.wise.ShardPlan`.
        clamp: how far a weight may move from the original one; None: any distance.
        weight_decay: of SGD.
        decay_scope: which weights decay: ``"all"``, ``"masked"`` or ``"none"``; None: by the profile, ``"all"`` as
            published, else ``"masked"``.
        metric: ``"activated"`` measures scores behind the activation as the published code, ``"linear"`` as the paper
            says; None: by the profile.
        whole_text: train on prompt and target, not on the target alone.
        replay: with ``retrieve``, keep later memories off the facts of earlier ones.
        chat: prompts are a user's turn of the tokenizer's chat template.
        batch_size: facts trained together; 1 as published.
    """

    layers: tuple[int, ...]
    lr: float = 1.0
    steps: int = 70
    mask_ratio: float = 0.2
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    activation_ratio: float = 0.88
    save_freq: int = 500
    merge_freq: int = 1000
    retrieve: bool = True
    merge: str = "ties"
    merge_density: float = 0.53
    merge_weight: float = 1.0
    clamp: float | None = 1.0
    weight_decay: float = 1e-5
    decay_scope: str | None = None
    metric: str | None = None
    whole_text: bool = False
    replay: bool = False
    chat: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.plan()
        if len(self.layers) != 1:
            raise ValueError(f"layers: wise has a side memory in one layer, got {self.layers}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name, known in (
            ("decay_scope", ("all", "masked", "none")),
            ("metric", ("activated", "linear")),
            ("merge", ("ties", "magnitude", "sign", "ties_original")),
        ):
            if getattr(self, name) not in (*known, *([] if name == "merge" else [None])):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.replay and not self.retrieve:
            raise ValueError(
                "replay goes with retrieve=True: there is nothing to tell apart in one merged memory"
            )

    def plan(self) -> ShardPlan:
        """When shards are finished and merged."""
        return ShardPlan(
            self.mask_ratio,
            self.save_freq,
            self.merge_freq,
            self.retrieve,
            self.merge,
            self.merge_density,
            self.merge_weight,
        )

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """A block as deep in proportion as the published ones."""
        n_layers = description.n_layers
        return {"layers": (min(n_layers - 1, round(0.84 * n_layers)),)}


@register_editor("wise")
class Wise(Editor):
    """Trains W' ← W' − η (M ∘ ∂J/∂W' + decay · W') for J = loss of the answer + routing loss, one fact at a time.

    The model's own weights are never written.

    Args:
        model, tokenizer, **options: as for :class:`Editor`.
        contexts: templates with one ``{}`` for the prompt, of the edit rows; None samples the published number from
            the model, after the published first words, once.
        irrelevant: texts for facts without a ``locality``, taken in turn; None takes the packaged neutral text.
        masks: of the first shards, for exact replay; random ones follow.

    Attributes:
        memories: all memories.
        losses: for each group of facts trained together in the last batch, (steps, 3) fp64: total, of the answers, of
            the routing.
    """

    Params = WiseParams

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        contexts: Sequence[str] | None = None,
        irrelevant: Sequence[str] | None = None,
        masks: Sequence[Mask] = (),
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        params = self.params
        if self.profile == "official" and params.batch_size != 1:
            raise ValueError(
                f"the official profile trains one fact at a time, got batch_size {params.batch_size}"
            )
        if contexts is not None and (not contexts or any(context.count("{}") != 1 for context in contexts)):
            raise ValueError(f"contexts must be templates with one {{}} each, got {list(contexts)}")
        if irrelevant is not None and not (irrelevant and all(text.strip() for text in irrelevant)):
            raise ValueError("irrelevant must hold at least one text, and no empty one")
        (self.layer,) = params.layers
        self.runner = BlockRunner(model)
        self.metric = params.metric or ("linear" if self.profile == "paper" else "activated")
        self.decay_scope = params.decay_scope or ("all" if self.profile == "official" else "masked")
        self.activation = model_activation(model)
        used = activation_function("identity" if self.metric == "linear" else self.activation)
        self.margins = Margins(params.alpha, params.beta, params.gamma, used)
        projection = self.description.projection(self.layer)
        weight = projection.weight.detach()
        base = weight.T if projection.transposed else weight
        self.memories = WiseMemories(base, params.plan(), seed=self.seed, layer=self.layer, masks=masks)
        self.losses: list[Tensor] = []
        self._contexts = None if contexts is None else list(contexts)
        self._irrelevant = None if irrelevant is None else list(irrelevant)
        self._facts: list[Fact] = []  # all that were edited, in order

    @property
    def contexts(self) -> list[str]:
        """The templates of the edit rows; sampled at first use."""
        if self._contexts is None:
            self._contexts = sample_prefixes(self.runner, self.tokenizer, seed=self.seed)
        return self._contexts

    # -- training -------------------------------------------------------------------------------------------

    def _train(self, facts: Sequence[Fact], watch: Stopwatch) -> None:
        """Train a batch into the side memory; the memories are as before if anything fails."""
        before, known = self.memories.snapshot(), len(self._facts)
        try:
            with frozen(self.model):
                groups = self._groups(facts)
                self.losses = []
                with progress(total=len(facts), desc="editing", unit="fact", show=self.progress) as bar:
                    for group, rows in groups:
                        with watch.stage("prefix"):
                            fixed = FrozenRows(self.runner, self.layer, rows, self.memories.base.float())
                        with watch.stage("training"):
                            self.losses.append(self._train_group(group, fixed))
                        self._facts += group
                        with watch.stage("merge"):
                            self.memories.end(len(group))
                        bar.update(len(group))
        except BaseException:
            self.memories.restore(before)
            del self._facts[known:]
            raise

    def _groups(self, facts: Sequence[Fact]) -> list[tuple[list[Fact], TrainingRows]]:
        """Facts to train together, never across the end of a shard, with their rows."""
        groups, start, room = [], 0, self.memories.room
        while start < len(facts):
            size = min(self.params.batch_size, room)
            group = list(facts[start : start + size])
            groups.append((group, self._rows(group, len(self._facts) + start)))
            start += size
            room = room - size or self.params.save_freq
        return groups

    def _rows(self, facts: Sequence[Fact], position: int) -> TrainingRows:
        """The rows of facts, the first of which is the ``position``-th edited."""
        options = RowOptions(
            self.contexts, self.profile == "official", self.params.whole_text, self.params.chat
        )
        texts = [fact.locality or self._other_text(position + i) for i, fact in enumerate(facts)]
        return training_rows(self.tokenizer, facts, texts, options, self.description.context_length)

    def _other_text(self, position: int) -> str:
        if self._irrelevant is None:
            self._irrelevant = neutral_sentences()
        return self._irrelevant[position % len(self._irrelevant)]

    def _train_group(self, facts: Sequence[Fact], rows: FrozenRows) -> Tensor:
        """SGD until the loss is low and still, or for all steps; (steps taken, 3) losses before each."""
        params, memory = self.params, self.memories.begin()
        losses: list[Tensor] = []
        for step in range(params.steps):
            found = rows.evaluate(memory.weight, self.margins)
            still = _is_still(losses)
            if still or step == params.steps - 1:
                scores = found.scores.view(len(facts), -1)
                self.memories.record(float(scores.mean(1).min()))
            if still:
                break
            pairs = [(found.gradient, rows.inputs)]
            if params.replay and self.memories.merged:
                replayed, more = self._replay(memory.weight, step)
                found.losses[0] += replayed
                pairs += more
            losses.append(found.losses.double())
            self._update(memory.weight, memory.mask, pairs)
        trace = torch.stack(losses).cpu()
        if not bool(trace.isfinite().all()):
            named = ", ".join(repr(fact.text) for fact in facts)
            raise NumericalError(
                f"the loss of {named} stopped being finite: choose a lower lr, or a wider dtype"
            )
        return trace

    def _update(self, weight: Tensor, mask: Mask | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One step on the entries that the mask selects; the gradient is the product of outputs' and inputs'."""
        left, right = (torch.cat(parts).T for parts in zip(*pairs, strict=True))
        masked_sgd_(
            weight,
            (left, right),
            mask,
            self.params.lr,
            decay=self.params.weight_decay,
            decay_scope=self.decay_scope,
            clamp_to=None if self.params.clamp is None else self.memories.base,
            clamp=self.params.clamp,
        )

    def _replay(self, weight: Tensor, step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Scores of one fact of every merged memory pushed down, of one of the present group pushed up.

        Costs a pass through the lower blocks for each of them.
        """
        low, high = _REPLAY_MARGINS if self.profile == "official" else (self.params.alpha, self.params.beta)
        past = [memory.facts[step % len(memory.facts)] for memory in self.memories.merged]
        chosen = [(position, lambda s: positive_mean(s - low) / len(past)) for position in past]
        present = [position for memory in self.memories.pending for position in memory.facts]
        present += self.memories.side.facts
        if present:
            place = random.Random(f"{self.seed} {self.memories.count} {step}").randrange(len(present))
            chosen.append((present[place], lambda s: positive_mean(high - s)))
        total, pairs = torch.zeros((), device=weight.device), []
        for position, loss in chosen:
            rows = self._rows([self._facts[position]], position)
            base = self.memories.base.float()
            fixed = FrozenRows(self.runner, self.layer, rows, base, with_suffix=False)
            value, gradient = fixed.push(weight, self.margins.activation, loss)
            total += value
            pairs.append((gradient, fixed.inputs))
        return total, pairs


def _is_still(losses: Sequence[Tensor]) -> bool:
    """The published stop: the last two totals are as good as equal and the last is low."""
    if len(losses) < 2:
        return False
    last, before = float(losses[-1][0]), float(losses[-2][0])
    return abs(last - before) <= STOP_CHANGE and last <= STOP_LOSS


def sample_prefixes(runner: BlockRunner, tokenizer: Any, *, seed: int) -> list[str]:
    """The bare ``{}`` and ten templates: each of five first words continued by 5 and by 10 tokens.

    Sampled among the model's five best next tokens with a seed, where the published code uses whatever generation
    the model is configured for; braces are taken out.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = ["{}"]
    for more in PREFIX_LENGTHS:
        for start in PREFIX_STARTS:
            length = len(tokenizer(start)["input_ids"]) + more
            (ids,) = sample_continuations(runner, tokenizer, [start], length, generator)
            contexts.append(plain_text(tokenizer.decode(ids, skip_special_tokens=True)) + " {}")
    return contexts


def neutral_sentences() -> list[str]:
    """Sentences of the packaged neutral text, to train on what a fact is not about."""
    from ..stats.cache import neutral_texts

    sentences = [s.strip() for text in neutral_texts() for s in text.replace("\n", " ").split(". ")]
    return [s.rstrip(".") + "." for s in sentences if 4 <= len(s.split()) <= 30]
