"""ROME: the key direction and the value of one fact. Facts are edited one after the other, so nothing is batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..locate import (
    Request,
    covered_model,
    inverse_moment,
    left_vector,
    prompt_rows,
    right_vector,
    value_rows,
)
from ..patching import Context, NotCovered, Point
from ..representations import get_reprs_at_idxs
from .job import lookup_of, trim_of

_AT_WORD = "get_module_input_output_at_word"
_READ = ("repr_tools.get_reprs_at_word_tokens", "repr_tools.get_reprs_at_idxs")
_WORDS = "repr_tools.get_words_idxs_in_templates"


def compute_u(context: Context) -> Callable[..., Any]:
    """``compute_u``: C⁻¹k̄ / ‖C⁻¹k̄‖ with the project's own C⁻¹."""
    unified = context.version.startswith("scalable-model-editing/")
    family = context.version.startswith("jianghoucheng/")

    def compute(
        model: nn.Module, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Any:
        covered_model(model, tok, hparams, [layer])
        if unified and (hparams.bias_update or hparams.dynamic):
            raise NotCovered("bias_update or dynamic")
        prompts = prompt_rows(
            tok,
            [each.format(request["prompt"]) for each in context_templates],
            [request["subject"]] * len(context_templates),
            lookup_of(context.original, _WORDS, tok),
        )
        inverse = None
        if hparams.mom2_adjustment:
            inverse = context.namespace["get_inv_cov"](
                model,
                tok,
                *([hparams] if unified else []),
                hparams.rewrite_module_tmp.format(layer),
                hparams.mom2_dataset,
                hparams.mom2_n_samples,
                hparams.mom2_dtype,
                **({"hparams": hparams} if family else {}),
            )
        u = left_vector(model, prompts, layer, inverse)
        return (u, context.namespace["inv_mom2_cache"]) if unified else u

    return compute


def compute_v(context: Context) -> Callable[..., Any]:
    """``compute_v``: (v* - W k) / ⟨k, u⟩, v* optimised at the MLP's output."""
    unified = context.version.startswith("scalable-model-editing/")

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
        if unified and hparams.bias_update:
            raise NotCovered("bias_update")
        one = Request(request["prompt"], request["subject"], request["target_new"]["str"])
        contexts, lookup = list(context_templates), lookup_of(context.original, _WORDS, tok)
        trim = trim_of(context.original, context.version, tok, model)
        rows = value_rows(tok, [one], contexts, lookup, trim, description.context_length)
        bare = prompt_rows(tok, [one.prompt], [one.subject], lookup)
        return right_vector(context, model, hparams, layer, one, rows, bare, left_vector)

    return compute


POINTS = (
    Point("rome.repr_tools:get_reprs_at_idxs", get_reprs_at_idxs),
    Point("rome.compute_u:get_inv_cov", inverse_moment),
    Point("rome.compute_u:compute_u", compute_u, (*_READ, _WORDS)),
    Point("rome.compute_v:compute_v", compute_v, ("find_fact_lookup_idx", _WORDS, _AT_WORD, *_READ)),
)
