"""WISE: edits in a side memory beside one projection, and a router that leaves all else alone.

Source: Wang et al. 2024, arXiv 2405.14768. Each fact is trained by SGD on the entries of the side memory that its
shard's random mask selects; finished shards are merged by TIES or kept apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FasteditError, NumericalError
from ..facts import Fact
from ..memory.base import Memory
from ..memory.edit import Base, MemoryEdit
from ..memory.side_module import detach
from ..memory.wise import ShardPlan, SideMemory, WiseMemory, WiseState, metric_of, model_activation
from ..models.describe import ModelDescription
from ..models.runner import BlockRunner
from ..ops import masked_sgd_
from ..ops.masks import Mask
from ..ops.routing import activation_function
from ..progress import progress
from .base import register_editor
from .memory_editor import Learned, MemoryEditor, TargetRow
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
        route_scope: ``"prefill"`` decides once for a prompt, ``"per_call"`` in every call.
        route_tokens: ``"prompt"`` decides by the prompt's tokens, ``"all"`` by all real tokens of a call.
        route_reduce: what of its tokens' scores is a prompt's: ``"mean"``, ``"max"``, or ``"official_len100"``: over
            100 tokens the mean over the batch of the greatest. None, for each: as published in the official profile,
            else the first.
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
    route_scope: str | None = None
    route_tokens: str | None = None
    route_reduce: str | None = None

    def __post_init__(self) -> None:
        ShardPlan.of(vars(self))
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
            ("route_scope", ("prefill", "per_call")),
            ("route_tokens", ("prompt", "all")),
            ("route_reduce", ("mean", "max", "official_len100")),
        ):
            if getattr(self, name) not in (*known, *([] if name == "merge" else [None])):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.replay and not self.retrieve:
            raise ValueError(
                "replay goes with retrieve=True: there is nothing to tell apart in one merged memory"
            )

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """A block as deep in proportion as the published ones."""
        n_layers = description.n_layers
        return {"layers": (min(n_layers - 1, round(0.84 * n_layers)),)}


@register_editor("wise")
class Wise(MemoryEditor):
    """Trains W' ← W' − η (M ∘ ∂J/∂W' + decay · W') for J = loss of the answer + routing loss, one fact at a time.

    The model's own weights are never written. An edit holds the whole memory after it. The newest can be reverted by
    itself, and so can an older one whose facts fill memories of their own; taking off all gives back the model as it
    was.

    Args:
        model, tokenizer, **options: as for :class:`Editor`.
        contexts: templates with one ``{}`` for the prompt, of the edit rows; None samples the published number from
            the model, after the published first words, once.
        irrelevant: texts for facts without a ``locality``, taken in turn; None takes the packaged neutral text.
        masks: of the first shards, for exact replay; random ones follow.

    Attributes:
        losses: for each group of facts trained together in the last batch, (steps, 3) fp64: total, of the answers, of
            the routing.
    """

    Params = WiseParams
    memory_class = WiseMemory

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
        for mask in masks:
            mask.check_size(self.projection.d_in * self.projection.d_out)
        self.decay_scope = params.decay_scope or ("all" if self.profile == "official" else "masked")
        linear = metric_of(vars(params), self.profile) == "linear"
        used = activation_function("identity" if linear else model_activation(model))
        self.margins = Margins(params.alpha, params.beta, params.gamma, used)
        self.masks = list(masks)
        self.losses: list[Tensor] = []
        self._contexts = None if contexts is None else list(contexts)
        self._irrelevant = None if irrelevant is None else list(irrelevant)

    @property
    def contexts(self) -> list[str]:
        """The templates of the edit rows; sampled at first use."""
        if self._contexts is None:
            self._contexts = sample_prefixes(self.runner, self.tokenizer, seed=self.seed)
        return self._contexts

    def new_memory(self) -> WiseMemory:
        """An empty memory that knows the projection."""
        memory = WiseMemory(
            self.projection.d_in, self.projection.d_out, vars(self.params), self.profile, self.seed
        )
        memory.attached_to(self.model, self.projection, self.layer)
        return memory

    # -- what changes the memory ----------------------------------------------------------------------------

    def finalize(self) -> MemoryEdit:
        """Finish the shard in training and merge now, whatever the schedule says; call it once after the last fact.

        Raises:
            FasteditError: there is no memory on the model.
        """
        state = self._present().copy()
        state.finalise()
        return self._put(state)

    def forget(self, number: int) -> MemoryEdit:
        """Take one memory out, with all facts in it: a merged one, a waiting shard, or the one in training.

        Args:
            number: counts the merged ones, then the waiting ones, then the one in training.

        Raises:
            FasteditError: there is no memory on the model.
            IndexError: there is none of that number.
        """
        state = self._present().copy()
        state.forget(number)
        return self._put(state)

    def reset(self) -> None:
        """Take the whole memory off the model."""
        side = self.side
        if side is not None:
            edits = list(side.edits)
            detach(self.model, side)
            for edit in edits:
                edit._note(self.model, applied=False)

    @property
    def state(self) -> WiseState | None:
        """The memories on the model; None before the first edit."""
        side = self.side
        return None if side is None else side.memory.state  # type: ignore[attr-defined]

    def _present(self) -> WiseState:
        state = self.state
        if state is None:
            raise FasteditError("there is no wise memory on this model: edit it first")
        return state

    def _put(self, state: WiseState) -> MemoryEdit:
        """Make a state that was changed without training the newest edit."""
        side = self.side
        assert side is not None
        tensors, about = state.content()
        return MemoryEdit(
            method=self.method,
            facts=[],
            layer=self.layer,
            tensors=tensors,
            about=about,
            params=vars(self.params),
            seed=self.seed,
            profile=self.profile,
            base=Base.of(self.model, self.layer),
            beneath=tuple(edit.id for edit in side.edits),
        ).apply(self.model)

    # -- training -------------------------------------------------------------------------------------------

    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Train a batch on a copy of the memories."""
        assert isinstance(memory, WiseMemory)
        state = memory.state.copy()
        state.given = self.masks
        watch, losses = Stopwatch(), []
        groups, base = self._groups(facts, state), state.base.float()
        with progress(total=len(facts), desc="editing", unit="fact", show=self.progress) as bar:
            for group, group_rows in groups:
                with watch.stage("prefix"):
                    fixed = FrozenRows(self.runner, self.layer, group_rows, base)
                with watch.stage("training"):
                    trace, score = self._train(group, fixed, state)
                with watch.stage("merge"):
                    state.end(group, score)
                losses.append(trace)
                bar.update(len(group))
        self.losses = losses
        tensors, about = state.content()
        measured = {
            "steps": [len(trace) for trace in losses],
            "loss": [float(trace[-1, 0]) for trace in losses],
            "training": {name: round(value, 4) for name, value in watch.seconds.items()},
        }
        return Learned(tensors, about, measured)

    def _groups(self, facts: Sequence[Fact], state: WiseState) -> list[tuple[list[Fact], TrainingRows]]:
        """Facts to train together, never across the end of a shard, with their rows."""
        groups, start, room = [], 0, state.room
        while start < len(facts):
            size = min(self.params.batch_size, room)
            group = list(facts[start : start + size])
            groups.append((group, self._training_rows(group, len(state.facts) + start)))
            start += size
            room = room - size or self.params.save_freq
        return groups

    def _training_rows(self, facts: Sequence[Fact], position: int) -> TrainingRows:
        """The rows of facts, the first of which is the ``position``-th edited."""
        options = RowOptions(
            self.contexts, self.profile == "official", self.params.whole_text, self.params.chat
        )
        texts = [fact.locality or self._other_text(position + i) for i, fact in enumerate(facts)]
        return training_rows(self.tokenizer, facts, texts, options, self.description.context_length)

    def _other_text(self, position: int) -> str:
        if self._irrelevant is None:
            from ..stats.cache import neutral_sentences

            self._irrelevant = neutral_sentences()
        return self._irrelevant[position % len(self._irrelevant)]

    def _train(self, facts: Sequence[Fact], rows: FrozenRows, state: WiseState) -> tuple[Tensor, float]:
        """SGD until the loss is low and still, or for all steps.

        Returns:
            (steps taken, 3) fp64, the losses before each, and the lowest mean score of a fact when it ended.
        """
        params, memory = self.params, state.begin()
        losses: list[Tensor] = []
        for step in range(params.steps):
            found = rows.evaluate(memory.weight, self.margins)
            score = found.scores.view(len(facts), -1).mean(1).min()
            if _is_still(losses):
                break
            pairs = [(found.gradient, rows.inputs)]
            total = found.losses
            if params.replay and state.merged:
                replayed, more = self._replay(state, step)
                total = total + torch.stack((replayed, *torch.zeros_like(total[1:])))
                pairs += more
            losses.append(total.double())
            self._update(memory, state, pairs)
        trace = torch.stack(losses).cpu()
        if not bool(trace.isfinite().all()) or not bool(memory.weight.isfinite().all()):
            named = ", ".join(repr(fact.text) for fact in facts)
            raise NumericalError(
                f"training {named} left the finite numbers: choose a lower lr, or load the model in a wider dtype"
            )
        return trace, float(score)

    def _update(self, memory: SideMemory, state: WiseState, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One step on the entries that the mask selects; the gradient is the product of outputs' and inputs'."""
        left, right = pairs[0]
        if len(pairs) > 1:
            left, right = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        masked_sgd_(
            memory.weight,
            (left.T, right.T),
            memory.mask,
            self.params.lr,
            decay=self.params.weight_decay,
            decay_scope=self.decay_scope,
            clamp_to=None if self.params.clamp is None else state.base,
            clamp=self.params.clamp,
        )

    def _replay(self, state: WiseState, step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Scores of one fact of every merged memory pushed down, of one of the present group pushed up.

        Costs a pass through the lower blocks for each of them.
        """
        alpha, beta = self.params.alpha, self.params.beta
        low, high = _REPLAY_MARGINS if self.profile == "official" else (alpha, beta)
        n_past, chosen = len(state.merged), []
        for merged in state.merged:
            position = merged.facts[step % len(merged.facts)]
            chosen.append((position, lambda scores: positive_mean(scores - low) / n_past))
        present = [position for memory in (*state.pending, state.side) for position in memory.facts]
        if present:
            place = random.Random(f"{self.seed} {len(state.facts)} {step}").randrange(len(present))
            chosen.append((present[place], lambda scores: positive_mean(high - scores)))
        weight = state.side.weight
        total, pairs = torch.zeros((), device=weight.device), []
        for position, loss in chosen:
            rows = self._training_rows([state.facts[position]], position)
            fixed = FrozenRows(self.runner, self.layer, rows, state.base.float(), with_suffix=False)
            value, gradient = fixed.push(weight, self.margins.activation, loss)
            total = total + value
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
