"""ROME: the key direction and the value of one fact. Facts are edited one after the other, so nothing is batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...editors.sweep import PromptSweep
from ...models.runner import BlockRunner, frozen
from ..locate import (
    Request,
    covered_model,
    covering,
    describe_optimisation,
    keys_at,
    objective_of,
    optimised,
    prompt_rows,
    value_rows,
)
from ..patching import Context, NotCovered, Point
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
        u = keys_at(model, prompts, layer).mean(0)
        if hparams.mom2_adjustment:
            settings = (
                hparams.rewrite_module_tmp.format(layer),
                hparams.mom2_dataset,
                hparams.mom2_n_samples,
                hparams.mom2_dtype,
            )
            inverse = context.namespace["get_inv_cov"]
            if unified:
                matrix = inverse(model, tok, hparams, *settings)
            else:
                matrix = inverse(model, tok, *settings, **({"hparams": hparams} if family else {}))
            u = (matrix @ u.to(matrix.device).unsqueeze(1)).squeeze()
        u = u / u.norm()
        return (u, context.namespace["inv_mom2_cache"]) if unified else u

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
        if context.version.startswith("scalable-model-editing/") and hparams.bias_update:
            raise NotCovered("bias_update")
        with covering():
            is_mlp = dict(model.named_modules()).get(hparams.mlp_module_tmp.format(layer)) is description.mlp(
                layer
            )
        if not is_mlp or description.post_mlp_norm(layer) is not None:
            raise NotCovered(
                f"{hparams.mlp_module_tmp.format(layer)} is not what the block adds to its stream"
            )
        one = Request(request["prompt"], request["subject"], request["target_new"]["str"])
        lookup = lookup_of(context.original, _WORDS, tok)
        rows = value_rows(
            tok,
            [one],
            list(context_templates),
            lookup,
            trim_of(context.original, context.version, tok, model),
            description.context_length,
        )
        values = optimised(model, [one], rows, objective_of(hparams, layer, at_mlp=True))
        bare = prompt_rows(tok, [one.prompt], [one.subject], lookup)
        with covering(), frozen(model):
            sweep = PromptSweep(BlockRunner(model), bare, layer)
            key, output = sweep.keys()[0], sweep.projected(layer)[0]
        target, divisor = values.target[0], torch.dot(key, left_vector.to(key.device, key.dtype))
        right = (target - output.to(target.device)) / divisor.to(target.device)
        if context.verbose:
            print(*describe_optimisation([one], values), sep="\n")
            print(f"Division Factor: {float(divisor)}", f"Right vector norm: {right.norm()}", sep="\n")
        return right

    return compute


POINTS = (
    Point("rome.compute_u:compute_u", compute_u, (*_READ, _WORDS)),
    Point("rome.compute_v:compute_v", compute_v, ("find_fact_lookup_idx", _WORDS, _AT_WORD, *_READ)),
)
