"""UltraEdit: one backward pass a batch, and a linear solve (Gu et al. 2025, arXiv 2505.14679).

There is no target to optimise and no statistics: the gradient at a layer's output, where an answer token is
predicted, says what should have come out, and the layer's input there says when.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artefacts import Edit, LowRank, Transaction, stack_of
from ..artefacts.weights import stored_transposed
from ..errors import NumericalError
from ..facts import Fact, validate_facts
from ..models.describe import ModelDescription
from ..models.runner import frozen
from ..models.tokens import pad_batch
from ..ops import ridge_factors
from ..progress import progress
from .base import Editor, register_editor
from .prompts import FactRows, fact_rows
from .stopwatch import Stopwatch

_EPS = torch.finfo(torch.float32).eps  # added to standard deviations, as published


@dataclass(frozen=True)
class UltraEditParams:
    """Hyper-parameters of UltraEdit.

    Attributes:
        modules: path of a linear layer inside a block -> the blocks in which it is edited.
        lr: the size of a step, applied to normalised gradients.
        micro_batch: facts in one backward pass.
        ridge: of the solve, 1 as published.
    """

    modules: Mapping[str, tuple[int, ...]]
    lr: float = 1e-6
    micro_batch: int = 10
    ridge: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", {path: tuple(layers) for path, layers in self.modules.items()})
        if not any(self.modules.values()):
            raise ValueError("modules must name at least one layer, such as {'mlp.down_proj': [29, 30]}")

    @classmethod
    def defaults_for(cls, description: ModelDescription) -> dict[str, Any]:
        """The output projection in the blocks from two thirds of the depth to the last but one."""
        n_layers = description.n_layers
        first = min(n_layers - 1, int(0.65 * n_layers))
        return {"modules": {description.output_path: tuple(range(first, max(first + 1, n_layers - 1)))}}


@dataclass
class Normaliser:
    """Running mean and spread of rows (b, d), over the life of an editor (Welford's update for batches).

    Args:
        d: width of a row.
        official: with the published recurrence, which adds a batch's unbiased variance times b, not b - 1.
    """

    d: int
    official: bool = False
    count: int = 0
    mean: Tensor = field(init=False)
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.d)
        self.squares = torch.zeros(self.d)

    def update(self, rows: Tensor) -> None:
        """Take in rows (b, d) fp32."""
        b = len(rows)
        if b == 0:
            return
        self.mean, self.squares = self.mean.to(rows.device), self.squares.to(rows.device)
        total = self.count + b
        mean = rows.mean(0)
        if self.official:
            inside = b * rows.var(0) if b > 1 else torch.zeros_like(mean)
        else:
            inside = (rows - mean).square().sum(0)
        shift = mean - self.mean
        self.mean = self.mean + shift * (b / total)
        self.squares = self.squares + inside + shift.square() * (self.count * b / total)
        self.count = total

    def normalise(self, rows: Tensor) -> Tensor:
        """(rows - mean) / standard deviation."""
        spread = (self.squares / max(self.count - 1, 1)).sqrt()
        return (rows - self.mean) / (spread + _EPS)


@register_editor("ultraedit")
class UltraEdit(Editor):
    """Δ = Vᵀ(I + H Hᵀ)⁻¹H with a row of H (the input) and V (the wanted change of the output) per answer token.

    A batch is one turn of the published method. The only state is one :class:`Normaliser` for each shape of
    layer; it goes back when the last batches are taken off.
    """

    Params = UltraEditParams

    def __init__(self, model: nn.Module, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.places = _places(self.description, self.params.modules)
        self.normalisers: dict[tuple[int, int], Normaliser] = {}
        self._past: list[tuple[str, dict[tuple[int, int], Normaliser]]] = []  # edit, state after it

    def edit(self, facts: Iterable[Fact | Mapping[str, Any]]) -> Edit:
        """Write a batch of facts; see :meth:`Editor.edit`."""
        checked = validate_facts(facts)
        watch = Stopwatch()
        self._follow()
        before = copy.deepcopy(self.normalisers)
        try:
            with frozen(self.model):
                rows = fact_rows(self.tokenizer, checked, ["{}"], self.description.context_length)
                with watch.stage("gradients"):
                    captured = self._capture(checked, rows)
                with watch.stage("solve"):
                    factors = {f"{name}.weight": self._solve(name, *captured[name]) for name in self.places}
                with Transaction(self.model, self.weight_names) as transaction, watch.stage("apply"):
                    edit = transaction.commit(self._edit(checked, factors))
        except BaseException:
            self.normalisers = before
            raise
        self._past.append((edit.id, copy.deepcopy(self.normalisers)))
        edit.measured["seconds"] = {name: round(value, 4) for name, value in watch.seconds.items()}
        return edit

    @property
    def weight_names(self) -> list[str]:
        """The weights of the layers that are edited."""
        return [f"{name}.weight" for name in self.places]

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._follow()
        tensors, counts = {}, []
        for number, (shape, each) in enumerate(self.normalisers.items()):
            tensors[f"mean.{number}"], tensors[f"squares.{number}"] = each.mean, each.squares
            counts.append([*shape, each.count])
        return tensors, {"normalisers": counts}

    def _load_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        normalisers = {}
        for number, (d_out, d_in, count) in enumerate(about["normalisers"]):
            each = Normaliser(d_in + d_out, self.profile == "official", count)
            each.mean, each.squares = tensors[f"mean.{number}"], tensors[f"squares.{number}"]
            normalisers[d_out, d_in] = each
        self.normalisers, self._past = normalisers, []

    def _follow(self) -> None:
        """Take the state back to that after the last batch that is still on the model."""
        applied = {edit.id for edit in stack_of(self.model).edits}
        reverted = False
        while self._past and self._past[-1][0] not in applied:
            self._past.pop()
            reverted = True
        if reverted:
            self.normalisers = copy.deepcopy(self._past[-1][1]) if self._past else {}

    def _edit(self, facts: list[Fact], factors: dict[str, LowRank]) -> Edit:
        return Edit(
            method=self.method,
            facts=facts,
            params=vars(self.params),
            seed=self.seed,
            profile=self.profile,
            factors=factors,
        )

    # -- features and gradients ---------------------------------------------------------------------

    def _capture(self, facts: list[Fact], rows: list[FactRows]) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer name, inputs H (T, d_in) and gradients (T, d_out), fp32, a row for each answer token.

        The published code loses the gradients of a last micro-batch that is not full, and solves with zeros in their
        place; the official profile does so too.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].targets[0].ids), reverse=True)
        size = self.params.micro_batch
        loses_rest = self.profile == "official" and len(order) > size
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.places}
        with progress(total=len(rows), desc="reading gradients", unit="fact", show=self.progress) as bar:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                found = self._capture_together([rows[i] for i in chosen])
                for name, pair in found.items():
                    if not bool(pair[1].isfinite().all()):
                        named = ", ".join(repr(facts[i].text) for i in chosen)
                        raise NumericalError(f"the gradients of {named} are not finite: use a wider dtype")
                    self._normaliser(name).update(torch.cat(pair, 1))
                    lost = loses_rest and len(chosen) < size
                    parts[name].append((pair[0], torch.zeros_like(pair[1])) if lost else pair)
                bar.update(len(chosen))
        return {
            name: (torch.cat([x for x, _ in pairs]), torch.cat([g for _, g in pairs]))
            for name, pairs in parts.items()
        }

    def _capture_together(self, rows: Sequence[FactRows]) -> dict[str, tuple[Tensor, Tensor]]:
        device = next(self.description.embeddings.parameters()).device
        padded = pad_batch([row.targets[0].ids for row in rows], pad_id=0)
        ids, mask, positions = (tensor.to(device) for tensor in padded)
        scored = [
            (index, len(row.targets[0].ids) - len(row.target) + k)
            for index, row in enumerate(rows)
            for k in range(len(row.target))
        ]
        row_of, column_of = torch.tensor(scored, device=device).T
        target = torch.tensor([token for row in rows for token in row.target], device=device)
        with torch.enable_grad(), self._watched() as seen:
            hidden = self.description.decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            place = hidden.device
            logits = self.description.logits(hidden[row_of.to(place), column_of.to(place)]).float()
            loss = F.cross_entropy(logits, target.to(logits.device))
            gradients = torch.autograd.grad(loss, [seen[name][1] for name in self.places])
        found = {}
        for name, gradient in zip(self.places, gradients, strict=True):
            rows_here, columns_here = row_of.to(gradient.device), column_of.to(gradient.device)
            found[name] = (
                seen[name][0][rows_here, columns_here].float(),
                gradient[rows_here, columns_here].float(),
            )
        return found

    @contextmanager
    def _watched(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Keep input and output of the edited layers; the outputs are what is differentiated, no weight is."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(name: str) -> Any:
            def keep(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                if not out.requires_grad:
                    out = out.detach().requires_grad_()
                seen[name] = (args[0].detach(), out)
                return out.clone()  # some models add to this in place

            return keep

        handles = [module.register_forward_hook(watch(name)) for name, module in self.places.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    # -- the update ---------------------------------------------------------------------------------

    def _normaliser(self, name: str) -> Normaliser:
        module = self.places[name]
        d_out, d_in = _shape(module)
        if (d_out, d_in) not in self.normalisers:
            self.normalisers[d_out, d_in] = Normaliser(d_in + d_out, official=self.profile == "official")
        return self.normalisers[d_out, d_in]

    def _solve(self, name: str, inputs: Tensor, gradients: Tensor) -> LowRank:
        """Left (d_out, T) and right (d_in, T): the system of all answer tokens, not of all inputs' dimensions."""
        rows = self._normaliser(name).normalise(torch.cat((inputs, gradients), 1))
        usual_inputs, usual_gradients = rows.split([inputs.shape[1], gradients.shape[1]], 1)
        wanted = -self.params.lr * usual_inputs.square().sum(1, keepdim=True) * usual_gradients
        return LowRank(*(factor.float() for factor in ridge_factors(inputs, wanted, self.params.ridge)))


def _places(description: ModelDescription, modules: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """By dotted name, the linear layers to edit, lowest block first.

    Raises:
        ValueError: a block or layer that the model does not have.
    """
    found = {}
    for layer, path in sorted((layer, path) for path, layers in modules.items() for layer in layers):
        if not 0 <= layer < description.n_layers:
            raise ValueError(f"modules: the model has blocks 0 to {description.n_layers - 1}, got {layer}")
        try:
            module = description.blocks[layer].get_submodule(path)
        except AttributeError:
            linear = [
                name
                for name, part in description.blocks[layer].named_modules()
                if getattr(getattr(part, "weight", None), "ndim", 0) == 2
            ]
            raise ValueError(
                f"modules: the blocks of this model have no {path!r}; they have {', '.join(linear)}"
            ) from None
        if getattr(getattr(module, "weight", None), "ndim", 0) != 2:
            raise ValueError(f"modules: {path!r} is no linear layer")
        found[f"{description.block_names[layer]}.{path}"] = module
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, however its weight is stored."""
    rows, columns = next(p for n, p in module.named_parameters(recurse=False) if n == "weight").shape
    return (columns, rows) if stored_transposed(module) else (rows, columns)
