"""Replacements for EasyEdit's MEMIT, EMMET and AlphaEdit, and for their value optimisation, keys and projectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...editors.sweep import weighted_mean
from ..locate import (
    FactorCache,
    Request,
    Writer,
    covered_model,
    covered_value_loss,
    describe_optimisation,
    keys_at,
    objective_of,
    optimised,
    prompt_rows,
)
from ..patching import Context, NotCovered, Point
from ..research.job import lookup_of
from ..research.memit import (
    Past,
    cache_of,
    pairs_of,
    set_factors,
    set_projectors,
    weight_name,
    write_and_remember,
    write_and_undo,
)
from ..research.projector import null_space
from .job import AT_WORDS, READ, WORDS, Job, get_cov, rows_of

_Z = ("find_fact_lookup_idx", WORDS)
_KS = (AT_WORDS, *(f"{AT_WORDS}.{path}" for path in READ))
_EXECUTE = (
    "compute_z",
    *(f"compute_z.{path}" for path in _Z),
    "compute_ks",
    *(f"compute_ks.{path}" for path in _KS),
    AT_WORDS,
    "get_cov",
    "upd_matrix_match_shape",
)

# -- execute functions ----------------------------------------------------------------------------------


def execute_memit(context: Context) -> Callable[..., Any]:
    """Targets together, one sweep over the layers, n × n systems on a factor of λC that is kept."""
    factors = FactorCache()

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        job = Job(context, model, tok, requests, hparams)
        weight = hparams.mom2_update_weight
        writer = Writer.of("memit", model, tok, hparams, job.contexts, covariance_weight=weight)
        set_factors(job, writer, factors, weight)
        write_and_undo(job, writer, cache_template)
        return pairs_of(job, writer)

    return execute


def execute_emmet(context: Context) -> Callable[..., Any]:
    """The same with the n × n system of the equality constraint."""
    factors = FactorCache()

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        job = Job(context, model, tok, requests, hparams)
        weight = hparams.mom2_update_weight
        settings = {"covariance_weight": weight, "ridge": hparams.emmet_lambda}
        writer = Writer.of("emmet", model, tok, hparams, job.contexts, **settings)
        set_factors(job, writer, factors, weight, ridge=hparams.update_norm_lambda)
        write_and_undo(job, writer, cache_template)
        return pairs_of(job, writer)

    return execute


# -- AlphaEdit ------------------------------------------------------------------------------------------


def execute_alphaedit(context: Context) -> Callable[..., Any]:
    """Keys of earlier batches instead of (d, d) matrices; ``cache_c`` becomes a matrix when somebody reads it."""

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, Tensor]:
        job = Job(context, model, tok, requests, hparams, always=True)
        P = context.namespace["P"]
        cache = cache_of(context.namespace["cache_c"], model, hparams, P)
        if cache.state is None:
            writer = Writer.of("alphaedit", model, tok, hparams, job.contexts, ridge=float(hparams.L2))
            set_projectors(writer, hparams, P)
            cache.state = Past(writer, model, dict(vars(hparams)), P)
        write_and_remember(job, cache, cache_template, undo=True)
        context.namespace["cache_c"] = cache
        deltas = {}
        for each in cache.state.writer.written:
            update = each.left.float() @ each.right.float().T
            transposed = job.description.projection(each.layer).transposed
            deltas[weight_name(job, each.layer)] = (update.T if transposed else update).cpu()
        return deltas

    return execute


def get_project(context: Context) -> Callable[..., Any]:
    """P of one layer, (d, d) float32 on the CPU, from a symmetric eigendecomposition in place of an SVD."""

    def project(model: nn.Module, tok: Any, layer: int, hparams: Any) -> Tensor:
        name = hparams.rewrite_module_tmp.format(layer)
        moment = get_cov(context, model, tok, name, hparams)
        return null_space(context, name, moment, float(hparams.nullspace_threshold))

    return project


# -- pieces by themselves -------------------------------------------------------------------------------


def compute_z(context: Context) -> Callable[..., Any]:
    """The value of one request, on a frozen prefix."""

    def compute(
        model: nn.Module, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        description = covered_model(model, tok, hparams, [layer])
        covered_value_loss(model, description, hparams, layer)
        one = Request(request["prompt"], request["subject"], request["target_new"])
        contexts = [each for group in context_templates for each in group]
        rows = rows_of(context.original, tok, [one], contexts, description.context_length, trim=True)
        values = optimised(model, [one], rows, objective_of(hparams, layer))
        if context.verbose:
            print(*describe_optimisation([one], values), sep="\n")
        return values.target[0].to(description.projection(layer).weight.dtype)

    return compute


def compute_ks(context: Context) -> Callable[..., Any]:
    """The keys of all requests, from a pass that ends at the layer and at the subjects."""

    def compute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        description = covered_model(model, tok, hparams, [layer])
        contexts = [each for group in context_templates for each in group]
        if not requests or not all(context_templates):
            raise NotCovered("there is no request, or a group of context templates is empty")
        prompts = prompt_rows(
            tok,
            [each.format(request["prompt"]) for request in requests for each in contexts],
            [request["subject"] for request in requests for _ in contexts],
            lookup_of(context.original, f"{AT_WORDS}.{WORDS}", tok),
        )
        weights = [1 / (len(context_templates) * len(group)) for group in context_templates for _ in group]
        keys = weighted_mean(keys_at(model, prompts, layer), weights)
        return keys.to(description.projection(layer).weight.dtype)

    return compute


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    alphaedit, sphere = f"{models}.alphaedit.AlphaEdit_main", f"{models}.SPHERE.SPHERE_main"
    found = [
        Point(f"{models}.memit.memit_main:execute_memit", execute_memit, _EXECUTE),
        Point(f"{models}.emmet.emmet_main:execute_emmet", execute_emmet, _EXECUTE),
        Point(f"{alphaedit}:execute_AlphaEdit", execute_alphaedit, _EXECUTE),
        Point(f"{alphaedit}:get_project", get_project, ("get_cov",)),
        Point(f"{sphere}:get_project", get_project, ("get_cov",)),
    ]
    for package in ("memit", "emmet", "alphaedit", "SPHERE"):
        found.append(Point(f"{models}.{package}.compute_z:compute_z", compute_z, _Z))
        found.append(Point(f"{models}.{package}.compute_ks:compute_ks", compute_ks, _KS))
    return found
