"""Replacements for EasyEdit's ROME: the key direction and the value of one fact."""

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
)
from ..patching import Context, NotCovered, Point
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
        u = keys_at(model, prompts, layer).mean(0).to(description.projection(layer).weight.dtype)
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
            u = (inverse.to(u) @ u.unsqueeze(1)).squeeze()
        return u / u.norm()

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
        name = hparams.mlp_module_tmp.format(layer)
        with covering():
            is_mlp = dict(model.named_modules()).get(name) is description.mlp(layer)
        if not is_mlp or description.post_mlp_norm(layer) is not None:
            raise NotCovered(f"{name} is not what the block adds to its stream")
        if not 0 <= max(hparams.v_loss_layer, layer) < description.n_layers:
            raise NotCovered(f"there is no block {hparams.v_loss_layer}, v_loss_layer")
        one = Request(request["prompt"], request["subject"], request["target_new"])
        contexts, length = list(context_templates), description.context_length
        rows = rows_of(context.original, tok, [one], contexts, length, trim=False)
        values = optimised(model, [one], rows, objective_of(hparams, layer, at_mlp=True))
        bare = prompt_rows(tok, [one.prompt], [one.subject], lookup_of(context.original, WORDS, tok))
        with covering(), frozen(model):
            sweep = PromptSweep(BlockRunner(model), bare, layer)
            key, output = sweep.keys()[0], sweep.projected(layer)[0]
        divisor = torch.dot(key, left_vector.to(key))
        right = (values.target[0].to(output) - output) / divisor.to(output)
        if context.verbose:
            print(*describe_optimisation([one], values), sep="\n")
            print(f"Division Factor: {float(divisor)}", f"Right vector norm: {right.norm()}", sep="\n")
        return right.to(description.projection(layer).weight.dtype)

    return compute


def points(models: str) -> list[Point]:
    """The points in EasyEdit's package of methods."""
    at_word = "get_module_input_output_at_word"
    return [
        Point(f"{models}.rome.compute_u:compute_u", compute_u, (*READ, WORDS)),
        Point(
            f"{models}.rome.compute_v:compute_v", compute_v, ("find_fact_lookup_idx", WORDS, at_word, *READ)
        ),
    ]
