"""The memories of WISE: the main weight, a side memory in training, finished shards, and what they are merged to.

Source: Wang et al. 2024 (WISE, arXiv 2405.14768), sections 2.3.2 (shards in random subspaces, merging) and 2.3.1
(routing among memories). The main weight is the model's own and never written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..models.describe import text_config
from ..ops import PhiloxMask, ties_merge
from ..ops.masks import Mask
from ..ops.routing import activation_function

UNSET = 1e9  # a threshold before any edit
OLD_SHARE, NEW_SHARE = 0.6, 0.4  # of the weight of a later merge: what was merged before, and what is new


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


@dataclass(eq=False)
class SideMemory:
    """One side memory.

    Attributes:
        weight: (d_out, d_in) fp32, on the device of the base weight and with its strides.
        threshold: the lowest mean score of an edit in it, before the activation ratio.
        masks: which entries may differ from the base weight; None if all may.
        facts: positions, in the order of editing, of the facts in it.
    """

    weight: Tensor
    threshold: float = UNSET
    mask: Mask | None = None
    facts: list[int] = field(default_factory=list)


class WiseMemories:
    """All memories of one projection, and the rules by which they are finished and merged.

    Args:
        base: (d_out, d_in), the projection's weight, by any strides; only read.
        plan: the schedule.
        seed: of the random masks.
        layer: of the projection; masks of different layers differ.
        masks: given masks, for the first shards; the random ones follow.

    Attributes:
        side: the memory in training.
        pending: finished shards that are not merged yet, oldest first.
        merged: what was merged: one memory, or with ``retrieve`` one for each merge.
        started: shards begun so far.
        count: edits so far.
    """

    def __init__(
        self, base: Tensor, plan: ShardPlan, *, seed: int = 0, layer: int = 0, masks: Sequence[Mask] = ()
    ) -> None:
        self.base, self.plan, self.seed, self.layer = base.detach(), plan, seed, layer
        self.given = list(masks)
        for mask in self.given:
            mask.check_size(base.numel())
        self.reset()

    def reset(self) -> None:
        """Forget every edit."""
        self.threshold = UNSET  # of all edits so far; merging into one memory has but this one
        self.pending: list[SideMemory] = []
        self.merged: list[SideMemory] = []
        self.started = self.count = 0
        self.side = self._fresh()

    def _fresh(self) -> SideMemory:
        return SideMemory(self.base.to(torch.float32, copy=True))

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

    def record(self, score: float) -> None:
        """Take in the mean score of an edit: thresholds are the lowest of theirs."""
        self.side.threshold = min(self.side.threshold, score)
        self.threshold = min(self.threshold, score)

    def end(self, n_edits: int) -> None:
        """Count edits that were trained; finish the shard, and merge, when it is time.

        Raises:
            ValueError: more than there was :attr:`room` for.
        """
        if n_edits > self.room:
            raise ValueError(f"the shard has room for {self.room} edits, got {n_edits}")
        self.side.facts += range(self.count, self.count + n_edits)
        self.count += n_edits
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

    def _finish(self) -> None:
        self.pending.append(self.side)
        self.side = self._fresh()

    def _merge(self) -> None:
        plan, parts = self.plan, self.pending
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
        density = 1.0 if self.plan.merge == "sign" else self.plan.merge_density
        merged = ties_merge(
            [tensor.contiguous() for tensor in tensors],
            None if self.plan.merge == "ties_original" else weights,
            density,
            self.base.float().contiguous(),
            variant=self.plan.merge,
        )
        return torch.empty_like(self.side.weight).copy_(merged)

    # -- going back -----------------------------------------------------------------------------------------

    def snapshot(self) -> WiseMemories:
        """A copy that further training does not change; finished memories are shared."""
        other = copy.copy(self)
        other.pending, other.merged = list(self.pending), list(self.merged)
        other.side = replace(self.side, weight=self.side.weight.clone(), facts=list(self.side.facts))
        return other

    def restore(self, snapshot: WiseMemories) -> None:
        """Go back to a snapshot, which is not to be used afterwards."""
        self.__dict__.update(snapshot.__dict__)


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
