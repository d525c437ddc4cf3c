"""MEMIT and its relatives: whole execute and apply functions, and the value optimisation and keys by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...editors.sequential import InStep
from ...editors.sweep import weighted_mean
from ...ops import CovarianceFactor, RidgeSolver
from ..key_cache import KeyCache
from ..locate import (
    FactorCache,
    Request,
    Writer,
    covered_model,
    covered_value_loss,
    describe_optimisation,
    kept_weights,
    keys_at,
    objective_of,
    optimised,
    prompt_rows,
    value_rows,
)
from ..patching import Context, NotCovered, Point
from .ahead import ReadAhead, weights_stamp
from .job import Job, lookup_of, spaced, trim_of
from .projector import recalled_projector

_PACKAGES = ("memit", "AlphaEdit", "nse", "emmet")
_WORDS = "repr_tools.get_words_idxs_in_templates"
_AT_WORDS = "get_module_input_output_at_words"
_READ = tuple(f"{_AT_WORDS}.repr_tools.{name}" for name in ("get_reprs_at_word_tokens", "get_reprs_at_idxs"))
_Z = ("find_fact_lookup_idx", _WORDS)
_KS = (_AT_WORDS, *_READ)
_EXECUTE = (
    "compute_z",
    *(f"compute_z.{path}" for path in _Z),
    "compute_ks",
    *(f"compute_ks.{path}" for path in _KS),
    _AT_WORDS,
    "upd_matrix_match_shape",
)


# -- execute functions that return factors and leave the model as it was -------------------------------------


def execute_memit(context: Context) -> Callable[..., Any]:
    """``execute_memit`` of kmeng01/memit and of the AlphaEdit family."""
    factors = FactorCache()

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        job = Job(context, model, tok, requests, hparams)
        writer = _memit_writer(job, factors)
        write_and_undo(job, writer, cache_template)
        return pairs_of(job, writer)

    return execute


def execute_memit_of_either(context: Context) -> Callable[..., Any]:
    """``execute_memit`` of ``memit.memit_main``, by the version met."""
    unified = context.version.startswith("scalable-model-editing/")
    return execute_memit_unified(context) if unified else execute_memit(context)


def execute_memit_unified(context: Context) -> Callable[..., Any]:
    """``execute_memit`` of unified-model-editing, whose result also holds norms."""
    factors = FactorCache()

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, tuple[Any, ...]]:
        _require_no_objective(hparams)
        job = Job(context, model, tok, requests, hparams)
        writer = _memit_writer(job, factors, ridge=hparams.update_norm_lambda)
        zs, _ = write_and_undo(job, writer, cache_template)
        norms = {"C_inv_norm": None, "D_inv_norm": None, "D_norm": None}
        return _with_norms(job, writer, zs, {each.layer: norms for each in writer.written})

    return execute


def execute_emmet(context: Context) -> Callable[..., Any]:
    """``execute_emmet`` of unified-model-editing."""
    factors = FactorCache()
    inverse_norms: dict[int, tuple[CovarianceFactor, float]] = {}

    def execute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, cache_template: Any = None
    ) -> dict[str, tuple[Any, ...]]:
        _require_no_objective(hparams)
        job = Job(context, model, tok, requests, hparams)
        ridge = hparams.emmet_lambda if len(job.requests) > 1 else 0.0
        writer = Writer.of(
            "emmet",
            model,
            tok,
            hparams,
            job.contexts,
            covariance_weight=hparams.mom2_update_weight,
            ridge=ridge,
        )
        set_factors(job, writer, factors, hparams.mom2_update_weight, ridge=hparams.update_norm_lambda)
        zs, _ = write_and_undo(job, writer, cache_template)
        norms = {}
        for each in writer.written:
            factor = writer.editor.factor(each.layer)
            if each.layer not in inverse_norms or inverse_norms[each.layer][0] is not factor:
                identity = torch.eye(factor.d, dtype=torch.float64, device=each.keys.device)
                inverse_norms[each.layer] = factor, float(factor.solve(identity).norm())
            keys = each.keys.double()
            system = keys.T @ factor.solve(keys)
            system.diagonal().add_(ridge)
            norms[each.layer] = {
                "C_inv_norm": inverse_norms[each.layer][1],
                "D_norm": float(system.norm()),
                "D_inv_norm": float(torch.linalg.inv(system).norm()),
            }
        return _with_norms(job, writer, zs, norms)

    return execute


def _memit_writer(job: Job, factors: FactorCache, ridge: float = 0.0) -> Writer:
    weight = job.hparams.mom2_update_weight
    writer = Writer.of("memit", job.model, job.tokenizer, job.hparams, job.contexts, covariance_weight=weight)
    set_factors(job, writer, factors, weight, ridge=ridge)
    return writer


def set_factors(job: Job, writer: Writer, factors: FactorCache, weight: float, **options: Any) -> None:
    """Give the writer a factor of weight · C for each layer; ``options`` are those of :meth:`FactorCache.get`."""
    for layer in job.hparams.layers:
        device = job.description.projection(layer).weight.device
        writer.set_factor(
            layer, factors.get(job.covariance(layer), weight, layer=layer, device=device, **options)
        )


def write_and_undo(
    job: Job, writer: Writer, cache_template: Any, *, undo: bool = True
) -> tuple[Tensor, dict[int, Tensor]]:
    """Write, then put the weights' bits back if ``undo``; the values (n, hidden) and, by layer, the keys."""
    job.say_requests()
    values = job.values(cache_template)
    with kept_weights(job.weights, undo=undo):
        norms = job.norms()
        keys = writer.write(job.rows, values)
        job.say(*writer.describe(norms) if job.context.verbose else ())
    job.say(f"Deltas successfully computed for {list(job.weights)}")
    return values.target, keys


def pairs_of(job: Job, writer: Writer) -> dict[str, tuple[Tensor, Tensor]]:
    """By weight, the factors of what was written, (d_in, n) and (d_out, n) float64 on the CPU."""
    return {weight_name(job, each.layer): (each.right.cpu(), each.left.cpu()) for each in writer.written}


def _require_no_objective(hparams: Any) -> None:
    if hparams.calculate_objective_value:
        raise NotCovered("calculate_objective_value needs the features that the statistics were made of")


def _with_norms(
    job: Job, writer: Writer, zs: Tensor, norms: Mapping[int, Mapping[str, float | None]]
) -> dict[str, tuple[Any, ...]]:
    """The factors, no distances, and the norms that unified-model-editing writes into its results."""
    result = {}
    for each in writer.written:
        current = zs.T.to(each.residual.device) - each.residual * each.share
        update = ((each.left.T @ each.left) * (each.right.T @ each.right)).sum().clamp(min=0).sqrt()
        weight, ridge = job.hparams.mom2_update_weight, job.hparams.update_norm_lambda
        moment = weight * job.covariance(each.layer).double()
        moment.diagonal().add_(ridge)
        inside = {
            "zs_norm": float(zs.norm(dim=1).mean()),
            "cur_zs_norm": float(current.norm(dim=0).mean()),
            "layer_ks_norm": float(each.keys.double().norm(dim=0).mean()),
            "adj_norm": float(each.right.norm(dim=0).mean()),
            "residual_norm": float(each.left.norm(dim=0).mean()),
            "inside_update_norm": float(update),
            "pseudo_inverse": False,
            **norms[each.layer],
            "cov": float(moment.norm()),
        }
        result[weight_name(job, each.layer)] = (each.right.cpu(), each.left.cpu(), None, None, None, inside)
    return result


def weight_name(job: Job, layer: int) -> str:
    """The parameter that is edited in a layer."""
    return job.description.projection(layer).weight_name


# -- functions that change the model and keep the keys of earlier batches -------------------------------------


@dataclass
class Past:
    """What belongs to a :class:`KeyCache`: the writer whose solvers hold its keys, and what it was made for."""

    writer: Writer
    model: nn.Module
    settings: dict[str, Any]
    P: Any = None


def cache_of(given: Any, model: nn.Module, hparams: Any, P: Any = None) -> KeyCache:
    """Our cache behind the caller's ``cache_c``: the one we gave back, or a new one for a matrix of zeros.

    Raises:
        NotCovered: a matrix that we did not make, that was changed since, or that belongs to something else.
    """
    if isinstance(given, KeyCache):
        past: Past = given.state
        if given.changed:
            raise NotCovered("cache_c was changed by somebody else")
        if past.model is not model or past.settings != vars(hparams) or past.P is not P:
            raise NotCovered("cache_c belongs to another model, other settings or another P")
        return given
    if not isinstance(given, Tensor) or given.dim() != 3 or len(given) != len(hparams.layers):
        raise NotCovered(f"cache_c is no stack of {len(hparams.layers)} matrices")
    if bool(given.any()):
        raise NotCovered("cache_c holds keys that are not known one by one")
    return KeyCache(given)


def apply_alphaedit(context: Context) -> Callable[..., Any]:
    """``apply_AlphaEdit_to_model`` of the AlphaEdit repository."""

    def apply(
        model: nn.Module,
        tok: Any,
        requests: Any,
        hparams: Any,
        cache_template: Any = None,
        cache_c: Any = None,
        P: Any = None,
    ) -> tuple[nn.Module, Tensor]:
        cache = cache_of(cache_c, model, hparams, P)
        job = Job(context, model, tok, requests, hparams)
        if cache.state is None:
            writer = Writer.of("alphaedit", model, tok, hparams, job.contexts, ridge=float(hparams.L2))
            set_projectors(writer, hparams, P)
            cache.state = Past(writer, model, dict(vars(hparams)), P)
        write_and_remember(job, cache, cache_template)
        return model, cache

    return apply


def set_projectors(writer: Writer, hparams: Any, P: Any) -> None:
    """Give the writer solvers of ridge L2 on the thin form of each layer's P.

    Raises:
        NotCovered: no stack of orthogonal projectors.
    """
    editor: Any = writer.editor
    if not isinstance(P, Tensor) or P.dim() != 3 or len(P) != len(hparams.layers):
        raise NotCovered(f"P is no stack of {len(hparams.layers)} projectors")
    for index, layer in enumerate(hparams.layers):
        projection = editor.description.projection(layer)
        projector = recalled_projector(projection.name, P[index], projection.weight.device)
        solver = RidgeSolver(projection.d_in, float(hparams.L2), projector=projector)
        editor._solvers[layer] = solver, InStep(solver)


def apply_nse(context: Context) -> Callable[..., Any]:
    """``apply_nse_to_model`` of the NSE repository."""

    def apply(
        model: nn.Module,
        tok: Any,
        requests: Any,
        hparams: Any,
        cache_template: Any = None,
        cache_c: Any = None,
    ) -> tuple[nn.Module, Tensor]:
        cache = cache_of(cache_c, model, hparams)
        job = Job(context, model, tok, requests, hparams)
        stored = {"gpt2-xl": True, "EleutherAI_gpt-j-6B": False, "Llama3-8B": False}.get(hparams.model_name)
        if any(job.description.projection(layer).transposed is not stored for layer in hparams.layers):
            raise NotCovered(
                f"model_name {hparams.model_name!r} does not say how this model stores its weights"
            )
        if cache.state is None:
            writer = Writer.of(
                "nse",
                model,
                tok,
                hparams,
                job.contexts,
                covariance_weight=hparams.mom2_update_weight,
                tolerance=hparams.alpha,
                upper_bound=hparams.upper_bound,
                max_sweeps=hparams.max_iterations,
                mass=hparams.neuron_threshold,
            )
            _choose_some_neurons(writer, force="nse_p_overflow" in context.fix)
            set_factors(
                job,
                writer,
                FactorCache(),
                hparams.mom2_update_weight,
                keep_matrix=hparams.neuron_threshold < 1,
            )
            cache.state = Past(writer, model, dict(vars(hparams)))
        write_and_remember(job, cache, cache_template)
        return model, cache

    return apply


def _choose_some_neurons(writer: Writer, *, force: bool) -> None:
    """Where one neuron holds more than the wanted mass, the published selection fails: so do we, or take that one."""
    editor: Any = writer.editor
    choose = editor.neurons

    def chosen(keys: Tensor) -> Tensor:
        neurons = choose(keys)
        if len(neurons):
            return neurons
        if not force:
            raise NotCovered(
                "one neuron holds more than neuron_threshold of the mass: fix=['nse_p_overflow']"
            )
        return keys.abs().sum(1).argmax()[None]

    editor.neurons = chosen


def execute_memit_seq(context: Context) -> Callable[..., Any]:
    """``execute_memit`` of the AlphaEdit repository's ``memit_seq_main``."""

    def execute(
        model: nn.Module,
        tok: Any,
        requests: Any,
        hparams: Any,
        cache_template: Any = None,
        cache_c: Any = None,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        cache = cache_of(cache_c, model, hparams)
        job = Job(context, model, tok, requests, hparams)
        _prepare_seq(job, cache)
        write_and_remember(job, cache, cache_template, undo=True)
        return pairs_of(job, cache.state.writer), cache

    return execute


def apply_memit_seq(context: Context) -> Callable[..., Any]:
    """``apply_memit_seq_to_model`` of the AlphaEdit repository, which as published does not hand on ``cache_c``."""

    def apply(
        model: nn.Module,
        tok: Any,
        requests: Any,
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        cache_template: Any = None,
        cache_c: Any = None,
    ) -> tuple[nn.Module, Tensor]:
        if "memit_seq_cache" not in context.fix:
            raise NotCovered("as published it loses cache_c and fails: accelerate(fix=['memit_seq_cache'])")
        if copy:
            raise NotCovered("copy=True")
        cache = cache_of(cache_c, model, hparams)
        job = Job(context, model, tok, requests, hparams)
        _prepare_seq(job, cache)
        write_and_remember(job, cache, cache_template)
        return model, cache

    return apply


def _prepare_seq(job: Job, cache: KeyCache) -> None:
    if cache.state is None:
        weight = job.hparams.mom2_update_weight
        writer = Writer.of(
            "memit-cache", job.model, job.tokenizer, job.hparams, job.contexts, covariance_weight=weight
        )
        set_factors(job, writer, FactorCache(), weight)
        cache.state = Past(writer, job.model, dict(vars(job.hparams)))


def write_and_remember(job: Job, cache: KeyCache, cache_template: Any, *, undo: bool = False) -> None:
    """Write into the model, and add the keys under the weights written to the cache and its solvers."""
    writer: Writer = cache.state.writer
    _, keys = write_and_undo(job, writer, cache_template, undo=undo)
    writer.editor.history.add("", keys)
    cache.add_keys([keys[layer].cpu() for layer in job.hparams.layers])


# -- pieces by themselves ----------------------------------------------------------------------------------------


def compute_z(context: Context) -> Callable[..., Any]:
    """``compute_z`` for one request: its steps take the blocks above the layer and the tokens from the subject on."""
    fix = "nse_raw_target" in context.fix
    ahead = ReadAhead()

    def compute(
        model: nn.Module, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        description = covered_model(model, tok, hparams, [layer])
        covered_value_loss(model, description, hparams, layer)
        contexts = [each for group in context_templates for each in group]

        def make(requests: Sequence[Mapping[str, Any]]) -> Tensor:
            facts = []
            for each in requests:
                target = each["target_new"]["str"]
                facts.append(Request(each["prompt"], each["subject"], spaced(target) if fix else target))
            rows = value_rows(
                tok,
                facts,
                contexts,
                lookup_of(context.original, _WORDS, tok),
                trim_of(context.original, context.version, tok, model),
                description.context_length,
            )
            values = optimised(model, facts, rows, objective_of(hparams, layer))
            if context.verbose:
                print(*describe_optimisation(facts, values), sep="\n")
            return values.target

        edited = [description.projection(each).weight for each in hparams.layers]
        return ahead.take(
            request,
            (weights_stamp(model, edited), repr(vars(hparams)), layer, contexts, id(tok)),
            make,
        )

    return compute


def compute_ks(context: Context) -> Callable[..., Any]:
    """``compute_ks``: the keys of all requests, from a pass that ends at the layer and at the subjects."""

    def compute(
        model: nn.Module, tok: Any, requests: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        covered_model(model, tok, hparams, [layer])
        contexts = [each for group in context_templates for each in group]
        if not requests or not all(context_templates):
            raise NotCovered("there is no request, or a group of context templates is empty")
        prompts = prompt_rows(
            tok,
            [each.format(request["prompt"]) for request in requests for each in contexts],
            [request["subject"] for request in requests for _ in contexts],
            lookup_of(
                context.original,
                "get_module_input_output_at_words.repr_tools.get_words_idxs_in_templates",
                tok,
            ),
        )
        weights = [1 / (len(context_templates) * len(group)) for group in context_templates for _ in group]
        return weighted_mean(keys_at(model, prompts, layer), weights)

    return compute


POINTS = (
    Point("memit.memit_main:execute_memit", execute_memit_of_either, _EXECUTE),
    Point("memit.memit_rect_main:execute_memit", execute_memit, _EXECUTE),
    Point("memit.memit_seq_main:execute_memit", execute_memit_seq, _EXECUTE),
    Point("memit.memit_seq_main:apply_memit_seq_to_model", apply_memit_seq, ("execute_memit", *_EXECUTE)),
    Point("AlphaEdit.AlphaEdit_main:apply_AlphaEdit_to_model", apply_alphaedit, _EXECUTE),
    Point("nse.nse_main:apply_nse_to_model", apply_nse, _EXECUTE),
    Point("emmet.emmet_main:execute_emmet", execute_emmet, _EXECUTE),
    *(Point(f"{package}.compute_z:compute_z", compute_z, _Z) for package in _PACKAGES),
    *(Point(f"{package}.compute_ks:compute_ks", compute_ks, _KS) for package in _PACKAGES),
)
