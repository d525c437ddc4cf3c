"""MELO: a low-rank block for each batch of edits, chosen by clusters of prompts (Yu et al. 2024, arXiv 2312.11795).

The query of a prompt is the output of the search layer's MLP at the prompt's last token. An index of clusters says
which block it leads to, if any. The block changes the output projections of some blocks above, at every token of the
sample, generated ones too. Only the block of the batch is trained, each from the model as it is, so blocks know
nothing of each other, and any edit can be taken off as if it had never been made.

The published settings search and change the MLP's input projections (``c_fc`` of GPT2-XL); here both are at its
output projections. Of the packaged settings for GPT2-XL, layers, ranks and rates are the published ones. The
published radius was chosen for queries of another place, and how far queries lie apart differs between models and
layers by orders of magnitude: in the clean profile it is measured (see :class:`MeloParams`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptFile, NumericalError
from ..facts import Fact
from ..memory.base import Decision, Memory, Routes
from ..memory.clusters import ClusterIndex
from ..memory.edit import MemoryEdit
from ..memory.lora_blocks import LoraBlocks, low_rank_change
from ..memory.routing import last_token
from ..models.describe import ModelDescription, Projection, describe
from ..models.runner import frozen
from ..models.tokens import encode_prompt
from ..progress import progress
from .base import register_editor
from .memory_editor import (
    Learned,
    MemoryEditor,
    TargetRow,
    UpperPass,
    depth_default,
    require_finite,
    together,
)

_HALVED = 0.5  # what the rate is multiplied by every ``halve_every`` steps
_PUBLISHED_RADIUS = 0.5
_RADIUS_SHARE = 0.25  # of the distance between unrelated texts
_N_UNRELATED, _UNRELATED_WORDS = 64, 8


@dataclass(frozen=True)
class MeloParams:
    """Hyper-parameters of MELO. Defaults are those published for GPT2-XL.

    Attributes:
        layers: the block whose output is searched by, one.
        targets: the blocks above whose output projections are changed.
        rank: of a block of edits.
        n_blocks: what a change is scaled by, and A begins uniform in ±1/√(rank · n_blocks). The published code
            reserves so many blocks; here there may be more.
        radius: of a new cluster. None: 0.5 as published in the official profile; else that of the memory on the
            model, or a quarter of how far the queries of unrelated texts lie apart: the median over pairs of 64
            sentences of the packaged neutral text, each cut after its eighth word, to three digits.
        lr: of Adam.
        steps: of Adam for each batch.
        halve_every: steps after which the rate is halved.
    """

    layers: tuple[int, ...]
    targets: tuple[int, ...]
    rank: int = 2
    n_blocks: int = 350
    radius: float | None = None
    lr: float = 1e-3
    steps: int = 50
    halve_every: int = 30

    def __post_init__(self) -> None:
        counts = ("rank", "n_blocks", "radius", "steps", "halve_every")
        given = {name: getattr(self, name) for name in counts}
        wrong = [f"{name} {value}" for name, value in given.items() if value is not None and value <= 0]
        if wrong:
            raise ValueError(f"expected positive numbers, got {', '.join(wrong)}")
        if not self.targets or sorted(set(self.targets)) != list(self.targets):
            raise ValueError(f"targets must be ascending and without repeats, got {self.targets}")
        if self.targets[0] <= max(self.layers):
            raise ValueError(
                f"targets must lie above the layer that is searched, {max(self.layers)}: got {self.targets}"
            )

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """Search at three quarters of the depth, change the next two blocks."""
        (layer,) = depth_default(description, 0.75)
        return {
            "layers": (layer,),
            "targets": tuple(range(layer + 1, min(layer + 3, description.n_layers))),
        }


class MeloMemory(Memory):
    """A :class:`ClusterIndex` and its :class:`LoraBlocks`, one for each edit.

    An edit's content: ``queries`` (n, d) in the model's dtype, for each target layer ``A.layer`` (d_in, rank) and
    ``B.layer`` (rank, d), fp32, and the facts' labels. Taking an edit out undoes the index's growth back to it, bit
    for bit, and places the later edits anew.
    """

    method = "melo"
    settings = ("targets", "rank", "n_blocks", "radius")

    def __init__(
        self, d_in: int, d_out: int, params: Mapping[str, Any], profile: str = "clean", seed: int = 0
    ) -> None:
        super().__init__(d_in, d_out, params, profile, seed)
        self.targets: tuple[int, ...] = tuple(params["targets"])
        self._shapes: dict[str, tuple[int, int]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.index = ClusterIndex(self.d_out, self.params["radius"], self.profile == "official")
        self.blocks = LoraBlocks(self.params["n_blocks"])
        self._edits: list[tuple[MemoryEdit, tuple[int, int]]] = []  # with the index's mark before it

    def attached_to(self, model: Any, projection: Projection, layer: int) -> None:
        """Look up the shapes of the targets."""
        description, rank = describe(model), self.params["rank"]
        for target in self.targets:
            above = description.projection(target)
            self._shapes[f"A.{target}"] = (above.d_in, rank)
            self._shapes[f"B.{target}"] = (rank, above.d_out)

    @property
    def upper_layers(self) -> tuple[int, ...]:
        """The targets."""
        return self.targets

    # -- serving ------------------------------------------------------------------------------------

    def route(self, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> Decision:
        """The block that the output at the last token leads to."""
        rows = torch.arange(len(outputs), device=outputs.device)
        block, distance = self.index.lookup(outputs[rows, last_token(tokens)])
        return Decision(torch.where(tokens.any(1), block, -1), score=distance)

    def apply(self, inputs: Tensor, outputs: Tensor, routes: Routes, tokens: Tensor | None) -> Tensor:
        """The outputs as they are: where it is searched nothing is changed."""
        return outputs

    def apply_above(self, layer: int, inputs: Tensor, outputs: Tensor, routes: Routes) -> Tensor:
        """The outputs with each sample's block."""
        return outputs + self.blocks.change(layer, inputs, routes.index)

    # -- content ------------------------------------------------------------------------------------

    def add(self, edit: MemoryEdit) -> None:
        """Place an edit's prompts, and append its block."""
        content, labels = edit.content, edit.about["labels"]
        shapes = {"queries": (len(labels), self.d_out), **self._shapes}
        wrong = [
            name for name, shape in shapes.items() if name not in content or content[name].shape != shape
        ]
        if wrong:
            raise CorruptFile(f"{edit!r} lacks {', '.join(wrong)} in the shape that this model needs")
        self._edits.append((edit, self.index.mark()))
        queries = content["queries"].to(self.index.centres.device)
        self.index.place(queries, [tuple(label) for label in labels], len(self.blocks))
        self.blocks.append({layer: (content[f"A.{layer}"], content[f"B.{layer}"]) for layer in self.targets})

    def remove(self, edit_id: str) -> None:
        """Undo the growth back to an edit, and add the later ones anew."""
        position = next(i for i, (edit, _) in enumerate(self._edits) if edit.id == edit_id)
        later = [edit for edit, _ in self._edits[position + 1 :]]
        self.index.rollback(self._edits[position][1])
        self.blocks.truncate(position)
        del self._edits[position:]
        for edit in later:
            self.add(edit)

    def owner(self, index: int) -> str | None:
        """The edit that a block belongs to."""
        return self._edits[index][0].id

    # -- reports ------------------------------------------------------------------------------------

    @property
    def n_entries(self) -> int:
        """Clusters."""
        return len(self.index)

    @property
    def n_bytes(self) -> int:
        """Bytes of index and blocks."""
        return self.index.n_bytes + self.blocks.n_bytes

    @property
    def prefill_flops(self) -> int:
        """A difference, a square and a sum for each element of each centre, and of the points of one cluster."""
        largest = max((len(cluster.points) for cluster in self.index.clusters), default=0)
        return 3 * (len(self.index) + largest) * self.d_out

    @property
    def token_flops(self) -> int:
        """The products with one block's factors."""
        return sum(2 * rows * columns for rows, columns in self._shapes.values())


@register_editor("melo")
class Melo(MemoryEditor):
    """Trains a low-rank block for each batch of facts, and notes which prompts lead to it.

    ``official`` has the published index (see :class:`fastedit.memory.clusters.ClusterIndex`), and its loss is the
    mean over all target tokens of the batch; ``clean`` takes the mean over the facts of their tokens' mean. In both
    the query is taken at the prompt's last token, in training as at inference.
    """

    Params = MeloParams
    memory_class = MeloMemory

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if self.params.targets[-1] >= self.description.n_layers:
            raise ValueError(
                f"targets {self.params.targets}: the model has blocks 0 to {self.description.n_layers - 1}"
            )
        if self.params.radius is None:
            self.params = replace(self.params, radius=self._radius())

    def learn(self, facts: list[Fact], rows: list[TargetRow], memory: Memory) -> Learned:
        """Train a block on the batch, and see where its prompts come to stand."""
        assert isinstance(memory, MeloMemory)
        queries = self._queries(rows)
        labels = [tuple(row.target) for row in rows]
        block = len(memory.blocks)
        mark = memory.index.mark()
        try:
            actions = memory.index.place(queries, labels, block)
            found, _ = memory.index.lookup(queries)
        finally:
            memory.index.rollback(mark)
        factors, losses = self._train(rows, block)
        require_finite(losses, facts)
        self.losses = losses
        tensors = {"queries": queries}
        for layer, (a, b) in factors.items():
            tensors |= {f"A.{layer}": a, f"B.{layer}": b}
        measured = [
            {"action": action, "routed": leads == block, "loss_before": first, "loss_after": last}
            for action, leads, first, last in zip(
                actions, found.tolist(), losses[:, 0].tolist(), losses[:, -1].tolist(), strict=True
            )
        ]
        return Learned(tensors, {"labels": labels}, {"facts": measured})

    def _radius(self) -> float:
        """The radius if none was given; see :class:`MeloParams`."""
        if self.profile == "official":
            return _PUBLISHED_RADIUS
        if self.side is not None:
            return float(self.side.memory.params["radius"])
        from ..stats.cache import neutral_sentences

        texts = [" ".join(text.split()[:_UNRELATED_WORDS]) for text in neutral_sentences()[:_N_UNRELATED]]
        prompts = [encode_prompt(self.tokenizer, text) for text in texts]
        with frozen(self.model):
            queries = self._queries([TargetRow(ids, len(ids), ids[-1:]) for ids in prompts])
        apart = float(torch.pdist(queries.float()).median())
        if not 0 < apart < math.inf:
            raise NumericalError(
                f"queries of unrelated texts lie {apart} apart: expected a positive number, give radius"
            )
        return float(f"{_RADIUS_SHARE * apart:.3g}")

    def _queries(self, rows: Sequence[TargetRow]) -> Tensor:
        """(n, d), the search layer's output at each prompt's last token."""
        queries: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in together(rows, range(len(rows))):
            upper = UpperPass(self.runner, [rows[i] for i in batch], self.layer, [rows[i].key for i in batch])
            for i, query in zip(batch, upper.outputs[:, 0], strict=True):
                queries[i] = query
        found = torch.stack(queries)
        return found.float() if found.dtype == torch.float64 else found  # look-ups are in float32

    # -- training -----------------------------------------------------------------------------------

    def _train(
        self, rows: Sequence[TargetRow], number: int
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
        """The block's factors by layer, and the rows' losses (n, steps)."""
        lowest, *others = self.params.targets
        parts = [
            (batch, UpperPass(self.runner, [rows[i] for i in batch], lowest, [0] * len(batch)))
            for batch in together(rows, range(len(rows)))
        ]
        weights = torch.tensor([len(row.target) if self.profile == "official" else 1 for row in rows])
        shares = weights / weights.sum()
        factors = self._initial(number)
        optimiser = torch.optim.Adam([each for pair in factors.values() for each in pair], lr=self.params.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, self.params.halve_every, _HALVED)
        losses = torch.full((len(rows), self.params.steps), float("nan"))
        for step in progress(range(self.params.steps), desc="training", unit="step", show=self.progress):
            optimiser.zero_grad()
            for batch, upper in parts:
                with torch.enable_grad(), self._changed(factors, others):
                    a, b = factors[lowest]
                    loss = upper.losses(
                        upper.outputs + low_rank_change(upper.inputs, a, b, self.params.n_blocks)
                    )
                    (loss * shares[batch].to(loss)).sum().backward()
                losses[batch, step] = loss.detach().float().cpu()
            optimiser.step()
            schedule.step()
        return {layer: (a.detach(), b.detach()) for layer, (a, b) in factors.items()}, losses

    def _initial(self, number: int) -> dict[int, tuple[Tensor, Tensor]]:
        """A uniform in ±1/√(rank · n_blocks), B zero, for each target."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rank = self.params.rank
        bound = (rank * self.params.n_blocks) ** -0.5
        factors = {}
        for layer in self.params.targets:
            projection = self.description.projection(layer)
            device = next(projection.module.parameters()).device
            a = (2 * torch.rand(projection.d_in, rank, generator=generator) - 1) * bound
            b = torch.zeros(rank, projection.d_out)
            factors[layer] = (a.to(device).requires_grad_(), b.to(device).requires_grad_())
        return factors

    @contextmanager
    def _changed(self, factors: Mapping[int, tuple[Tensor, Tensor]], layers: Sequence[int]) -> Iterator[None]:
        """The projections of these blocks with the changes that are being trained."""

        def hook(a: Tensor, b: Tensor) -> Any:
            def change(_module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                return (out + low_rank_change(args[0], a, b, self.params.n_blocks)).to(out.dtype)

            return change

        handles = [
            self.description.projection(layer).module.register_forward_hook(hook(*factors[layer]))
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
