"""Replacements for EasyEdit's MEMIT, EMMET, AlphaEdit and ROME."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...editors.prompts import FactRows
from ...editors.sweep import PromptSweep
from ...errors import NumericalError
from ...models.runner import BlockRunner, frozen
from ...ops import RidgeSolver, low_rank_update_
from ..patching import Context, NotCovered
from . import engine
from .engine import Factors, Insertion, Request

_PROBES = 8
_PROJECTOR_ERROR = 1e-4
_ROWS = 2048

Solver = Callable[[int, Tensor], Tensor]  # layer, keys (d, n) -> X (d, n) with Δ = R Xᵀ


# ---- what all of them share -----------------------------------------------------------------------------


@dataclass
class Job:
    """One call of an ``execute_*`` function, checked and prepared; nothing has changed yet."""

    model: nn.Module
    tok: Any
    hparams: Any
    requests: list[dict[str, Any]]
    runner: BlockRunner
    wanted: list[Request]
    rows: list[FactRows]
    weights: list[float]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The edited weights by the name the original gives them."""
        return {
            f"{self.hparams.rewrite_module_tmp.format(layer)}.weight": self.runner.description.projection(
                layer
            ).weight
            for layer in self.hparams.layers
        }


def prepare(context: Context, model: Any, tok: Any, requests: Any, hparams: Any, *, always: bool) -> Job:
    """Rewrite the requests as the original does and tokenise them.

    Args:
        context: of the point.
        model, tok, requests, hparams: the original's arguments.
        always: put ``{}`` for the subject also into prompts that have one already.
    """
    layers = list(hparams.layers)
    if layers != sorted(layers):
        raise NotCovered("the layers are not in ascending order")
    runner = engine.runner_for(model, tok, hparams, layers)
    engine.require_head(model, runner.description, hparams, layers[-1])
    requests = [dict(request) for request in deepcopy(requests)]
    for request in requests:
        if request["target_new"][0] != " ":
            request["target_new"] = " " + request["target_new"]
        if "{}" not in request["prompt"] and request["subject"] not in request["prompt"]:
            raise NotCovered("a subject does not occur in its prompt")
        if always or "{}" not in request["prompt"]:
            request["prompt"] = request["prompt"].replace(request["subject"], "{}")
    groups = context.namespace["get_context_templates"](model, tok)
    contexts = [template for group in groups for template in group]
    length = runner.description.context_length
    wanted = [Request(each["prompt"], each["subject"], each["target_new"]) for each in requests]
    rows = [engine.rows_of(tok, each, contexts, drop_special=True, length=length) for each in wanted]
    return Job(model, tok, hparams, requests, runner, wanted, rows, engine.group_weights(groups))


def target_values(job: Job, cache_template: str | None, say: Callable[[str], None]) -> Tensor:
    """(h, n) the targets: from the original's cache files where there are some, the others optimised together."""
    layer = job.hparams.layers[-1]
    files = [_cache_file(cache_template, layer, job.hparams, request) for request in job.requests]
    found: dict[int, Tensor] = {}
    for position, file in enumerate(files):
        if file is not None and file.exists():
            try:
                found[position] = torch.from_numpy(np.load(file)["v_star"])
            except Exception as error:  # as the original: any file that cannot be read is made again
                print(f"Error reading cache file due to {error}. Recomputing...")
    missing = [position for position in range(len(files)) if position not in found]
    dtype = next(job.runner.description.blocks[layer].parameters()).dtype
    if missing:
        wanted, rows = [job.wanted[i] for i in missing], [job.rows[i] for i in missing]
        values = engine.optimise(job.runner, wanted, rows, job.hparams, layer)
        for position, target in zip(missing, engine.target_in(values, dtype), strict=True):
            found[position] = target
            file = files[position]
            if file is not None:
                file.parent.mkdir(exist_ok=True, parents=True)
                np.savez(file, v_star=target.cpu().numpy())
        for request, norm, shift in zip(
            wanted, values.initial.norm(dim=1), values.shift.norm(dim=1), strict=True
        ):
            say(f"[{request.target}] Init norm {norm} | Delta norm {shift}")
    device = next(job.runner.description.blocks[layer].parameters()).device
    return torch.stack([found[position].to(device) for position in range(len(files))], dim=1)


def _cache_file(template: str | None, layer: int, hparams: Any, request: dict[str, Any]) -> Path | None:
    if template is None:
        return None
    return Path(str(template).format(layer, hparams.clamp_norm_factor, request["case_id"]))


def insert(
    job: Job,
    targets: Tensor,
    solve: Solver,
    take: Callable[[int, Tensor, Tensor, Tensor], None],
    say: Callable[[str], None],
) -> None:
    """Go through the layers from the bottom; the weights change on the way and are put back by the caller.

    Args:
        job: the call.
        targets: (h, n).
        solve: gives X.
        take: told layer, keys (d, n), X (d, n) and the layer's share of the residual (h, n), float64.
        say: prints.
    """
    layers = job.hparams.layers
    insertion = Insertion(job.runner, job.rows, job.weights, layers)
    for index, layer in enumerate(layers):
        projection = job.runner.description.projection(layer)
        place = projection.weight.device
        keys, present = insertion.at(layer)
        lacking = targets - present.to(targets)
        say(f"LAYER {layer}: z error {lacking.norm(dim=0).mean()}")
        keys = keys.to(place)
        share = lacking.to(place).double() / (len(layers) - index)
        right = solve(layer, keys)
        take(layer, keys, right, share)
        if index < len(layers) - 1:
            low_rank_update_(
                projection.weight.data, share.float(), right.float(), transposed=projection.transposed
            )


def printer(context: Context) -> Callable[[str], None]:
    """``print``, or nothing."""
    return print if context.verbose else _silent


def _silent(_text: str) -> None:
    pass


def covariance(context: Context, job: Job, layer: int) -> Tensor:
    """(d, d) the second moment as it lies in the original's COV_CACHE, put there by its ``get_cov`` if need be."""
    hparams, names = job.hparams, context.namespace
    module = hparams.rewrite_module_tmp.format(layer)
    key = job.model.config._name_or_path.replace("/", "_"), module
    if key not in names["COV_CACHE"]:
        names["get_cov"](
            job.model,
            job.tok,
            module,
            hparams.mom2_dataset,
            hparams.mom2_n_samples,
            hparams.mom2_dtype,
            hparams=hparams,
        )
    moment: Tensor = names["COV_CACHE"][key]
    return moment


# ---- MEMIT and EMMET ------------------------------------------------------------------------------------


def execute_memit(context: Context) -> Callable[..., Any]:
    """Targets together, one sweep, n × n systems on a factor of λC that is kept."""
    factors = Factors()

    def execute(
        model: Any, tok: Any, requests: Any, hparams: Any, cache_template: str | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        job = prepare(context, model, tok, requests, hparams, always=False)

        def solve(layer: int, keys: Tensor) -> Tensor:
            moment = covariance(context, job, layer)
            return factors.get(moment, hparams.mom2_update_weight, keys.device, layer=layer).regularised(keys)

        return _pairs(context, job, cache_template, solve)

    return execute


def execute_emmet(context: Context) -> Callable[..., Any]:
    """The same with the equality constraint's n × n system."""
    factors = Factors()

    def execute(
        model: Any, tok: Any, requests: Any, hparams: Any, cache_template: str | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        job = prepare(context, model, tok, requests, hparams, always=False)

        def solve(layer: int, keys: Tensor) -> Tensor:
            moment = covariance(context, job, layer)
            factor = factors.get(
                moment,
                hparams.mom2_update_weight,
                keys.device,
                added=hparams.update_norm_lambda,
                layer=layer,
            )
            return factor.regularised(keys, hparams.emmet_lambda)

        return _pairs(context, job, cache_template, solve)

    return execute


def _pairs(
    context: Context, job: Job, cache_template: str | None, solve: Solver
) -> dict[str, tuple[Tensor, Tensor]]:
    """By weight, the pair (X, residual) on the CPU that ``apply_*`` multiplies."""
    say, deltas = printer(context), {}
    names = dict(zip(job.hparams.layers, job.parameters, strict=True))

    def take(layer: int, _keys: Tensor, right: Tensor, share: Tensor) -> None:
        deltas[names[layer]] = right.cpu(), share.cpu()

    with engine.put_back(job.parameters):
        targets = target_values(job, cache_template, say)
        try:
            insert(job, targets, solve, take, say)
        except NumericalError as error:
            raise NotCovered(str(error)) from None
    return deltas


# ---- AlphaEdit ------------------------------------------------------------------------------------------


def execute_alphaedit(context: Context) -> Callable[..., Any]:
    """Keys of earlier batches in place of the (d, d) cache; the cache is kept up to date for everybody else."""
    memory = _KeyMemory()

    def execute(
        model: Any, tok: Any, requests: Any, hparams: Any, cache_template: str | None = None
    ) -> dict[str, Tensor]:
        job = prepare(context, model, tok, requests, hparams, always=True)
        say, names = printer(context), context.namespace
        projectors, cache = names["P"], names["cache_c"]
        solvers = memory.solvers(projectors, cache, list(hparams.layers), float(hparams.L2))
        number = {layer: index for index, layer in enumerate(hparams.layers)}
        weight_names = dict(zip(hparams.layers, job.parameters, strict=True))
        deltas: dict[str, Tensor] = {}
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def solve(layer: int, keys: Tensor) -> Tensor:
            inside = _product(projectors[number[layer]], keys)
            right = solvers[number[layer]].solve(inside)
            found[layer] = keys, inside
            return right

        def take(layer: int, _keys: Tensor, right: Tensor, share: Tensor) -> None:
            update = right.float() @ share.float().T
            projection = job.runner.description.projection(layer)
            deltas[weight_names[layer]] = (update if projection.transposed else update.T).cpu()

        with engine.put_back(job.parameters):
            targets = target_values(job, cache_template, say)
            try:
                insert(job, targets, solve, take, say)
            except NumericalError as error:
                raise NotCovered(str(error)) from None
        for layer, (keys, inside) in found.items():
            solvers[number[layer]].append(inside)
            kept = keys.to(cache.device, cache.dtype)
            cache[number[layer]].addmm_(kept, kept.T)
        memory.follow(projectors, cache)
        return deltas

    return execute


class _KeyMemory:
    """The keys behind a ``cache_c`` that only we have added to."""

    def __init__(self) -> None:
        self._of: tuple[int, int, int, int, float] | None = None
        self._solvers: list[RidgeSolver] = []

    def solvers(
        self, projectors: Tensor, cache: Tensor, layers: Sequence[int], ridge: float
    ) -> list[RidgeSolver]:
        """One for each layer, holding the keys of the batches so far.

        Raises:
            NotCovered: somebody else has added keys, or P is no orthogonal projector.
        """
        if len(projectors) != len(layers) or len(cache) != len(layers):
            raise NotCovered(
                f"P and cache_c are of {len(projectors)} and {len(cache)} layers, not of {len(layers)}"
            )
        if self._of == (*_identity(projectors, cache), ridge):
            return self._solvers
        if bool((cache != 0).any()):
            raise NotCovered("cache_c holds keys that were added before acceleration")
        for layer, matrix in zip(layers, projectors, strict=True):
            if not _is_projector(matrix):
                raise NotCovered(f"P of layer {layer} is no orthogonal projector")
        self._solvers = [RidgeSolver(projectors.shape[1], ridge) for _ in layers]
        self._ridge = ridge
        self.follow(projectors, cache)
        return self._solvers

    def follow(self, projectors: Tensor, cache: Tensor) -> None:
        """Take the present state of both for that of the solvers."""
        self._of = *_identity(projectors, cache), self._ridge


def _identity(projectors: Tensor, cache: Tensor) -> tuple[int, int, int, int]:
    return id(projectors), projectors._version, id(cache), cache._version


def _is_projector(matrix: Tensor) -> bool:
    """Whether P² = P = Pᵀ, on random vectors."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], _PROBES, generator=generator).to(matrix)
    once = matrix @ probes
    error = max(float((matrix @ once - once).norm()), float((matrix.T @ probes - once).norm()))
    return error <= _PROJECTOR_ERROR * float(probes.norm())


def _product(matrix: Tensor, keys: Tensor) -> Tensor:
    """P K (d, n), float64, on the device of the keys; P is taken over in pieces."""
    wide = keys.double()
    parts = [
        matrix[start : start + _ROWS].to(keys.device).double() @ wide
        for start in range(0, len(matrix), _ROWS)
    ]
    return torch.cat(parts)


# ---- single functions -----------------------------------------------------------------------------------


def compute_z(context: Context) -> Callable[..., Any]:
    """The target of one request on a frozen prefix."""

    def compute(
        model: Any, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        runner = engine.runner_for(model, tok, hparams, [layer])
        engine.require_head(model, runner.description, hparams, layer)
        wanted = Request(request["prompt"], request["subject"], request["target_new"])
        contexts = [template for group in context_templates for template in group]
        length = runner.description.context_length
        rows = engine.rows_of(tok, wanted, contexts, drop_special=True, length=length)
        values = engine.optimise(runner, [wanted], [rows], hparams, layer)
        block = next(runner.description.blocks[layer].parameters())
        return engine.target_in(values, block.dtype)[0].to(block.device)

    return compute


def compute_u(context: Context) -> Callable[..., Any]:
    """ROME's left vector; prompts are cut after the subject and the pass ends at the layer."""

    def compute(
        model: Any, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        runner = engine.runner_for(model, tok, hparams, [layer])
        rows = _rome_rows(runner, tok, request, context_templates)
        with frozen(model):
            keys = PromptSweep(runner, rows.prompts, layer).keys().mean(0)
        direction = keys.to(runner.description.projection(layer).weight.dtype)
        if hparams.mom2_adjustment:
            inverse = context.namespace["get_inv_cov"](
                model,
                tok,
                hparams.rewrite_module_tmp.format(layer),
                hparams.mom2_dataset,
                hparams.mom2_n_samples,
                hparams.mom2_dtype,
                hparams=hparams,
            ).to(direction)
            direction = inverse @ direction
        return direction / direction.norm()

    return compute


def compute_v(context: Context) -> Callable[..., Any]:
    """ROME's right vector; the value is optimised on a frozen prefix."""
    say = printer(context)

    def compute(
        model: Any,
        tok: Any,
        request: Any,
        hparams: Any,
        layer: int,
        left_vector: Tensor,
        context_templates: Any,
    ) -> Tensor:
        runner = engine.runner_for(model, tok, hparams, [layer])
        description = runner.description
        if max(hparams.v_loss_layer, layer) >= description.n_layers:
            raise NotCovered(f"there is no layer v_loss_layer {hparams.v_loss_layer}")
        if description.post_mlp_norm(layer) is not None:
            raise NotCovered("the model has a norm behind its MLP")
        projection = description.projection(layer)
        try:
            module = model.get_submodule(hparams.mlp_module_tmp.format(layer))
        except AttributeError as error:
            raise NotCovered(str(error)) from None
        if module is not description.mlp(layer) and module is not projection.module:
            raise NotCovered("mlp_module_tmp is not the block's MLP")
        rows = _rome_rows(runner, tok, request, context_templates)
        wanted = Request(request["prompt"], request["subject"], request["target_new"])
        values = engine.optimise(runner, [wanted], [rows], hparams, layer, at_mlp=True)
        dtype = projection.weight.dtype
        with frozen(model), torch.no_grad():
            key = PromptSweep(runner, rows.prompts[:1], layer).keys()[0].to(dtype)
            present = projection.module(key)
        target = engine.target_in(values, dtype)[0].to(present.device)
        right: Tensor = (target - present) / torch.dot(key, left_vector.to(key))
        say(f"Delta norm: {(target - present).norm().item()} | Right vector norm: {right.norm()}")
        return right

    return compute


def _rome_rows(runner: BlockRunner, tok: Any, request: Any, contexts: Sequence[str]) -> FactRows:
    wanted = Request(request["prompt"], request["subject"], request["target_new"])
    return engine.rows_of(tok, wanted, contexts, drop_special=False, length=runner.description.context_length)


def get_project(context: Context) -> Callable[..., Any]:
    """A symmetric eigendecomposition in float64 where the weight lies, in place of an SVD on the CPU."""
    from ...stats.null_space import projector

    def project(model: Any, tok: Any, layer: int, hparams: Any) -> Tensor:
        moment = context.namespace["get_cov"](
            model,
            tok,
            hparams.rewrite_module_tmp.format(layer),
            hparams.mom2_dataset,
            hparams.mom2_n_samples,
            hparams.mom2_dtype,
            hparams=hparams,
        )
        try:
            matrix, about = projector(moment, hparams.nullspace_threshold, layer)
        except NumericalError as error:
            raise NotCovered(str(error)) from None
        printer(context)(str(about.kept))
        return matrix.cpu()

    return project
