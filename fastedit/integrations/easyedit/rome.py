"""Replacements for EasyEdit's ROME: the key direction and the value of one fact; C⁻¹; keys read by other methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..locate import Request, covered_model, inverse_moment, left_vector, prompt_rows, right_vector
from ..patching import Context, NotCovered, Point
from ..representations import get_reprs_at_idxs
from ..research.job import lookup_of
from .job import READ, WORDS, rows_of


def compute_u(context: Context) -> Callable[..., Any]:
    """``compute_u``: C⁻¹k̄ / ‖C⁻¹k̄‖ with EasyEdit's own C⁻¹."""

    def compute(
        model: nn.Module, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        description = covered_model(model, tok, hparams, [layer])
        prompts = prompt_rows(
            tok,
            [each.format(request["prompt"]) for each in context_templates],
            [request["subject"]] * len(context_templates),
            lookup_of(context.original, WORDS, tok),
        )
        inverse = None
        if hparams.mom2_adjustment:
            inverse = context.namespace["get_inv_cov"](
                model,
                tok,
                hparams.rewrite_module_tmp.format(layer),
                hparams.mom2_dataset,
                hparams.mom2_n_samples,
                hparams.mom2_dtype,
                hparams=hparams,
            )
        return left_vector(model, prompts, layer, inverse).to(description.projection(layer).weight)

    return compute


def compute_v(context: Context) -> Callable[..., Any]:
    """``compute_v``: (v* - W k) / ⟨k, u⟩, v* optimised at the MLP's output."""

    def compute(
        model: nn.Module,
        tok: Any,
        request: Any,
        hparams: Any,
        layer: int,
        left_vector: Tensor,
        context_templates: Any,
    ) -> Tensor:
        description = covered_model(model, tok, hparams, [layer])
        if not 0 <= max(hparams.v_loss_layer, layer) < description.n_layers:
            raise NotCovered(f"there is no block {hparams.v_loss_layer}, v_loss_layer")
        one = Request(request["prompt"], request["subject"], request["target_new"])
        contexts, length = list(context_templates), description.context_length
        rows = rows_of(context.original, tok, [one], contexts, length, trim=False)
        bare = prompt_rows(tok, [one.prompt], [one.subject], lookup_of(context.original, WORDS, tok))
        right = right_vector(context, model, hparams, layer, one, rows, bare, left_vector)
        return right.to(description.projection(layer).weight.dtype)

    return compute


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    at_word = "get_module_input_output_at_word"
    return [
        Point(f"{models}.rome.repr_tools:get_reprs_at_idxs", get_reprs_at_idxs),
        *(
            Point(f"{models}.{package}.compute_u:get_inv_cov", inverse_moment)
            for package in ("rome", "r_rome")
        ),
        Point(f"{models}.rome.compute_u:compute_u", compute_u, (*READ, WORDS)),
        Point(
            f"{models}.rome.compute_v:compute_v", compute_v, ("find_fact_lookup_idx", WORDS, at_word, *READ)
        ),
    ]
