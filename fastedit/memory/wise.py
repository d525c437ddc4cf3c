"""The memories of WISE: a side memory in training, finished shards, what they are merged to, and who answers.

Source: Wang et al. 2024 (WISE, arXiv 2405.14768), sections 2.3.2 (shards in random subspaces, merging, retrieval) and
2.3.1 (routing). The main memory is the model's own weight and never written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FasteditError, UnsupportedModel
from ..facts import Fact
from ..models.describe import Projection, text_config
from ..ops import BitMask, PhiloxMask, route, routing_score, ties_merge
from ..ops.masks import Mask
from ..ops.routing import activation_function
from .base import Decision, Memory, Routes

if TYPE_CHECKING:
    from .edit import MemoryEdit

UNSET = 1e9  # a threshold before any edit
OLD_SHARE, NEW_SHARE = 0.6, 0.4  # of the weight of a later merge: what was merged before, and what is new
_LONG = 100  # tokens from which on the published code routes by the greatest score


@dataclass(frozen=True)
class ShardPlan:
    """When side memories are finished and merged, and how.

    Attributes:
        density: share of the entries that a shard's edits may change.
        save_freq: edits in a shard.
        merge_freq: edits between merges, a multiple of ``save_freq``.
        retrieve: keep every merged memory and choose among them (WISE-Retrieve); else merge all into one.
        merge: variant of :func:`fastedit.ops.ties_merge`.
        merge_density: share of its changes that a memory keeps in a merge.
        merge_weight: λ, what the first merge's weights sum to.

    Raises:
        ValueError: a number out of range; ``merge_freq`` not a multiple of ``save_freq``.
    """

    density: float = 0.2
    save_freq: int = 500
    merge_freq: int = 1000
    retrieve: bool = True
    merge: str = "ties"
    merge_density: float = 0.53
    merge_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"mask_ratio must be above 0 and below 1, got {self.density}")
        if not 0 < self.merge_density <= 1:
            raise ValueError(f"merge_density must be above 0 and at most 1, got {self.merge_density}")
        for name in ("save_freq", "merge_freq"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        if self.merge_freq % self.save_freq:
            raise ValueError(
                f"merge_freq must be a multiple of save_freq, got {self.merge_freq} and {self.save_freq}"
            )
        if not self.merge_weight > 0:
            raise ValueError(f"merge_weight must be above 0, got {self.merge_weight}")

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> ShardPlan:
        """The plan in a method's hyper-parameters."""
        names = ("save_freq", "merge_freq", "retrieve", "merge", "merge_density", "merge_weight")
        return cls(params["mask_ratio"], **{name: params[name] for name in names})


@dataclass(eq=False)
class SideMemory:
    """One memory beside the main one.

    Attributes:
        weight: (d_out, d_in) fp32, on the device of the base weight and with its strides.
        threshold: the lowest mean score of an edit in it, before the activation ratio.
        mask: which entries training may change; None if it was merged, or has no edit yet.
        facts: positions, in the order of editing, of the facts in it.
    """

    weight: Tensor
    threshold: float = UNSET
    mask: Mask | None = None
    facts: list[int] = field(default_factory=list)


class WiseState:
    """All memories beside one projection, and the rules by which they are finished and merged.

    Args:
        base: (d_out, d_in), the projection's weight, by any strides; only read.
        plan: the schedule.
        seed: of the random masks.
        layer: of the projection; masks of different layers differ.

    Attributes:
        side: the memory in training.
        pending: finished shards that are not merged yet, oldest first.
        merged: what was merged: at most one memory, or with ``retrieve`` one for each merge.
        started: shards begun so far.
        facts: all that were edited, in order; those that were taken out as well, if others follow them.
        given: masks of the first shards, for exact replay; the random ones follow.
    """

    def __init__(self, base: Tensor, plan: ShardPlan, *, seed: int = 0, layer: int = 0) -> None:
        self.base, self.plan, self.seed, self.layer = base.detach(), plan, seed, layer
        self.pending: list[SideMemory] = []
        self.merged: list[SideMemory] = []
        self.facts: list[Fact] = []
        self.given: Sequence[Mask] = ()
        self.started = 0
        self.side = self._fresh()

    def _fresh(self) -> SideMemory:
        return SideMemory(self.base.to(torch.float32, copy=True))

    @property
    def memories(self) -> list[SideMemory]:
        """Those with edits in them, in the published list's order, the one in training last."""
        return [*self.merged, *self.pending, *([self.side] if self.side.facts else [])]

    @property
    def threshold(self) -> float:
        """The lowest mean score of any edit, which is the threshold if all are merged into one memory."""
        return min((memory.threshold for memory in self.memories), default=UNSET)

    # -- training -------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Edits until the side memory is finished."""
        return self.plan.save_freq - len(self.side.facts)

    def begin(self) -> SideMemory:
        """The side memory to train, with the mask of its shard."""
        if self.side.mask is None:
            self.side.mask = self._mask(self.started)
            self.started += 1
        return self.side

    def _mask(self, shard: int) -> Mask:
        if shard < len(self.given):
            return self.given[shard]
        return PhiloxMask(self.seed, shard, self.layer, self.plan.density)

    def end(self, facts: Sequence[Fact], score: float) -> None:
        """Take in facts that were trained; finish the shard, and merge, when it is time.

        Args:
            facts: at most as many as there is :attr:`room` for.
            score: the lowest mean score of an edit row's tokens among them.
        """
        if len(facts) > self.room:
            raise ValueError(f"the shard has room for {self.room} edits, got {len(facts)}")
        self.side.threshold = min(self.side.threshold, score)
        self.side.facts += range(len(self.facts), len(self.facts) + len(facts))
        self.facts += facts
        if self.room == 0:
            self._finish()
        if len(self.pending) == self.plan.merge_freq // self.plan.save_freq:
            self._merge()

    def finalise(self) -> None:
        """Finish the shard and merge now, whatever the schedule says; the next edit begins a new shard."""
        if self.side.facts:
            self._finish()
        if self.pending:
            self._merge()

    def forget(self, number: int) -> None:
        """Take one of :attr:`memories` out, with all facts in it.

        Raises:
            IndexError: there is none of that number.
        """
        memories = self.memories
        if not 0 <= number < len(memories):
            raise IndexError(f"there are {len(memories)} memories, numbered from 0, got {number}")
        gone = memories[number]
        self.merged = [memory for memory in self.merged if memory is not gone]
        self.pending = [memory for memory in self.pending if memory is not gone]
        if gone is self.side:
            self.side = self._fresh()

    def _finish(self) -> None:
        self.pending.append(self.side)
        self.side = self._fresh()

    def _merge(self) -> None:
        plan, parts = self.plan, list(self.pending)
        share = plan.merge_weight
        if not plan.retrieve and self.merged:
            share, parts = NEW_SHARE, [*parts, *self.merged]
        weights = [share / len(self.pending)] * len(self.pending)
        weights += [OLD_SHARE] * (len(parts) - len(weights))
        merged = SideMemory(
            self._ties([part.weight for part in parts], weights),
            min(part.threshold for part in parts),
            facts=sorted(fact for part in parts for fact in part.facts),
        )
        self.merged = [*self.merged, merged] if plan.retrieve else [merged]
        self.pending = []

    def _ties(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        merged = ties_merge(
            [tensor.contiguous() for tensor in tensors],
            None if self.plan.merge == "ties_original" else weights,
            1.0 if self.plan.merge == "sign" else self.plan.merge_density,
            self.base.float().contiguous(),
            variant=self.plan.merge,
        )
        return self._shaped(merged)

    def _shaped(self, weight: Tensor) -> Tensor:
        """With the strides of the base weight, so that all are read alike."""
        return torch.empty_like(self.base, dtype=torch.float32).copy_(weight)

    def copy(self) -> WiseState:
        """One that is trained without changing this one; finished memories are shared."""
        other = copy.copy(self)
        other.pending, other.merged, other.facts = list(self.pending), list(self.merged), list(self.facts)
        other.side = replace(self.side, weight=self.side.weight.clone(), facts=list(self.side.facts))
        return other

    # -- as an edit's content -------------------------------------------------------------------------------

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as :meth:`load` takes it: tensors by name, and what JSON can hold.

        A memory is stored as the entries in which it differs from the base weight: by the key of its random mask, or
        by a mask of bits, or whole if most of them differ.
        """
        tensors: dict[str, Tensor] = {}
        listed: list[dict[str, Any]] = []
        for kind, memories in (("merged", self.merged), ("pending", self.pending), ("side", [self.side])):
            for memory in memories:
                stored, about = self._packed(memory)
                tensors.update({f"{len(listed)}.{name}": tensor for name, tensor in stored.items()})
                listed.append(
                    {"kind": kind, "threshold": memory.threshold, "facts": list(memory.facts), **about}
                )
        facts = [fact.as_dict() for fact in self.facts]
        return tensors, {"started": self.started, "memories": listed, "facts": facts}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Take over what :meth:`content` gave; nothing changes if it raises."""
        found: dict[str, list[SideMemory]] = {"merged": [], "pending": [], "side": []}
        for number, fields in enumerate(about["memories"]):
            prefix = f"{number}."
            stored = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
            weight, mask = self._unpacked(stored, fields)
            memory = SideMemory(weight, fields["threshold"], mask, list(fields["facts"]))
            found[fields["kind"]].append(memory)
        facts = [Fact(**fields) for fields in about["facts"]]
        (self.side,) = found["side"] or [self._fresh()]
        self.merged, self.pending = found["merged"], found["pending"]
        self.facts, self.started = facts, about["started"]

    def _packed(self, memory: SideMemory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        n, mask = self.base.numel(), memory.mask
        about: dict[str, Any] = {"mask": None, "random": False}
        tensors: dict[str, Tensor] = {}
        if isinstance(mask, PhiloxMask):
            about["mask"] = {k: getattr(mask, k) for k in ("seed", "shard", "layer", "density")}
        elif mask is not None:
            tensors["mask"] = mask.bits(n, device="cpu")
        changed = BitMask.from_dense(memory.weight != self.base.float())
        if isinstance(mask, PhiloxMask) and not self._beyond(changed, mask):
            about["random"] = True
            tensors["values"] = mask.pack(memory.weight)
        elif changed.count(n) < n * 31 // 32:
            tensors["changed"], tensors["values"] = changed.bits(n), changed.pack(memory.weight)
        else:
            tensors["weight"] = memory.weight.contiguous()
        return tensors, about

    def _beyond(self, changed: BitMask, mask: Mask) -> bool:
        """Whether entries differ that the mask does not select."""
        n = self.base.numel()
        return bool((changed.bits(n) & ~mask.bits(n, device=changed.packed.device)).any())

    def _unpacked(
        self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> tuple[Tensor, Mask | None]:
        device, n = self.base.device, self.base.numel()
        mask: Mask | None = None
        if about["mask"] is not None:
            mask = PhiloxMask(**about["mask"])
        elif "mask" in tensors:
            mask = BitMask(tensors["mask"].to(device), n)
        if "weight" in tensors:
            return self._shaped(tensors["weight"]), mask
        where = mask if about["random"] else BitMask(tensors["changed"].to(device), n)
        assert where is not None
        values = where.unpack(tensors["values"].to(device), self.base.shape)
        chosen = where.dense(self.base.shape, device=device)
        return self._shaped(torch.where(chosen, values, self.base.float())), mask


class WiseMemory(Memory):
    """WISE beside one projection: scores a prompt against all memories in one pass, and lets the best answer.

    A memory's score for a token is ‖σ(W₀x) − σ(Vx)‖, for a prompt the mean over its tokens, and it may answer from
    ``activation_ratio`` times the lowest score of an edit on. WISE-Merge chooses between the merged memory and the
    one in training (and, but for the official profile, finished shards that wait for their merge); WISE-Retrieve
    among all. The official profile decides in every call, by all tokens.
    """

    method = "wise"
    whole_state = True
    settings = (
        "mask_ratio", "save_freq", "merge_freq", "retrieve", "merge", "merge_density", "merge_weight",
        "activation_ratio", "metric", "route_scope", "route_tokens", "route_reduce",
    )  # fmt: skip

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        official = profile == "official"
        self.route_scope = params["route_scope"] or ("per_call" if official else "prefill")
        self.route_tokens = params["route_tokens"] or ("all" if official else "prompt")
        self.reduce = params["route_reduce"] or ("official_len100" if official else "mean")
        self.metric = metric_of(params, profile)
        self.plan = ShardPlan.of(params)
        self._state: WiseState | None = None

    def attached_to(self, model: nn.Module, projection: Projection, layer: int) -> None:
        """Told where it stands."""
        self._projection = projection
        self.activation = model_activation(model)
        self._state = WiseState(self._base(), self.plan, seed=self.seed, layer=layer)

    @property
    def state(self) -> WiseState:
        """All memories, where the model is now.

        Raises:
            FasteditError: it does not stand at a projection yet.
        """
        state = self._state
        if state is None:
            raise FasteditError("this wise memory does not stand at a projection yet")
        state.base = self._base()
        for memory in (state.side, *state.pending, *state.merged):
            memory.weight = memory.weight.to(state.base.device)
        return state

    def _base(self) -> Tensor:
        weight = self._projection.weight.detach()
        return weight.T if self._projection.transposed else weight

    # -- serving --------------------------------------------------------------------------------------------

    @property
    def _bias(self) -> Tensor | None:
        bias = getattr(self._projection.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def candidates(self) -> tuple[str, list[SideMemory], list[float]]:
        """Rule of :func:`fastedit.ops.route`, the memories to choose from, and the least score of each."""
        state, ratio = self.state, self.params["activation_ratio"]
        side = [state.side] if state.side.facts else []
        if self.plan.retrieve:
            rule, chosen = ("retrieve" if side else "highest"), [*side, *state.merged, *state.pending]
            return rule, chosen, [ratio * memory.threshold for memory in chosen]
        waiting = [] if self.profile == "official" else state.pending
        chosen = [*state.merged, *waiting, *side]
        return "merge", chosen, [ratio * state.threshold] * len(chosen)

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """The memory of every sample; its score is the highest of all."""
        rule, memories, least = self.candidates
        n = len(inputs)
        if not memories:
            return Decision(torch.full((n,), -1, device=inputs.device))
        scores = routing_score(
            inputs,
            self.state.base,
            [memory.weight for memory in memories],
            self.activation,
            bias=self._bias,
            metric=self.metric,
        )
        thresholds = torch.tensor(least, device=scores.device, dtype=scores.dtype)
        long = self.reduce == "official_len100" and tokens.shape[1] > _LONG
        reduce = "max" if long or self.reduce == "max" else "mean"
        index, best = route(scores, thresholds, tokens, rule=rule, reduce=reduce)
        if long:  # one decision for the batch
            shared = best.mean(0, keepdim=True)[None]
            index, _ = route(shared, thresholds, rule=rule)
            index, best = index.expand(n), shared[0].expand(n, -1)
        index = torch.where(tokens.any(1), index, -1)
        return Decision(index, score=best.amax(1))

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """V x + b of the memory that each sample was routed to."""
        _, memories, _ = self.candidates
        x, bias = inputs.float(), self._bias
        bias = None if bias is None else bias.float()
        if routes.rows is None:
            return self._each_everywhere(x, bias, routes)
        (first, *others), (rows, *_) = routes.used, routes.rows
        if not others and len(rows) == len(x):
            return F.linear(x, memories[first].weight, bias)
        result = x.new_zeros(*x.shape[:2], self.d_out)
        for number, rows in zip(routes.used, routes.rows, strict=True):
            rows = rows.to(x.device)
            result.index_copy_(0, rows, F.linear(x[rows], memories[number].weight, bias))
        return result

    def _each_everywhere(self, x: Tensor, bias: Tensor | None, routes: Routes) -> Tensor:
        """The same where only the device knows which samples go where."""
        _, memories, _ = self.candidates
        index, (first, *others) = routes.index.to(x.device)[:, None, None], routes.used
        result = F.linear(x, memories[first].weight, bias)
        for number in others:
            result = torch.where(index == number, F.linear(x, memories[number].weight, bias), result)
        return result

    # -- content --------------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Become the state that the edit holds."""
        self.state.load(edit.content, edit.about)

    @classmethod
    def without(cls, state: MemoryEdit, gone: MemoryEdit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memories but those of one edit: shards are trained apart, each from the base weight.

        Raises:
            FasteditError: a memory holds its facts together with other edits', by their shard or by a merge; or later
                facts were trained against it by replay; or it is no training.
        """
        end = len(gone.about["facts"])
        facts = range(end - len(gone.facts), end)
        memories: list[dict[str, Any]] = state.about["memories"]
        of_others = [set(fields["facts"]) - set(facts) for fields in memories]
        shared = any(
            others and len(others) < len(fields["facts"])
            for others, fields in zip(of_others, memories, strict=True)
        )
        replayed = state.params["replay"] and any(fact >= end for others in of_others for fact in others)
        if not facts or replayed or (shared and state.id == gone.id):
            super().without(state, gone)
        if shared:
            raise FasteditError(
                f"{gone!r} cannot be taken off by itself: a wise memory holds its facts together with those of other "
                "edits, by their shard or by a merge. Revert the later edits first, newest first, or all of it"
            )
        kept = [n for n, fields in enumerate(memories) if not set(fields["facts"]) & set(facts)]
        tensors = {
            f"{place}.{name.partition('.')[2]}": tensor
            for place, number in enumerate(kept)
            for name, tensor in state.content.items()
            if name.startswith(f"{number}.")
        }
        # facts are named by their positions, so only the last ones may leave the list
        listed = state.about["facts"][: facts.start if end == len(state.about["facts"]) else None]
        return tensors, {**state.about, "memories": [memories[n] for n in kept], "facts": listed}

    def clear(self) -> None:
        """Forget everything."""
        state = self.state
        self._state = WiseState(state.base, state.plan, seed=state.seed, layer=state.layer)

    # -- reports --------------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """Memories that a prompt can be routed to."""
        return len(self.candidates[1])

    @property
    def n_bytes(self) -> int:
        """Bytes of all memories as they are served, 4 an entry."""
        state = self.state
        return sum(memory.weight.nbytes for memory in (state.side, *state.pending, *state.merged))

    @property
    def prefill_flops(self) -> int:
        """For each token of a prompt, its products with the main weight and all memories."""
        return 2 * self.d_in * self.d_out * (self.n_entries + 1)

    @property
    def token_flops(self) -> int:
        """One product with the memory chosen."""
        return 2 * self.d_in * self.d_out


def metric_of(params: Mapping[str, Any], profile: str) -> str:
    """How scores are measured: as the parameters say, else without activation in the paper's profile only."""
    return params["metric"] or ("linear" if profile == "paper" else "activated")


def model_activation(model: nn.Module) -> str:
    """The name of a model's MLP activation, as :func:`fastedit.ops.routing_score` takes it.

    Raises:
        UnsupportedModel: the config names none, or one that routing does not know.
    """
    config = text_config(model)
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    name = next((value for key in keys if isinstance(value := getattr(config, key, None), str)), "")
    try:
        activation_function(name)
    except ValueError as error:
        raise UnsupportedModel(
            f"the activation of this {config.model_type} model, {name!r}: {error}"
        ) from None
    return name
