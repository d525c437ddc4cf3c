"""ROME's right vector: MEMIT's optimisation at the MLP's output."""

from types import SimpleNamespace

import torch

from ..memit.compute_z import compute_z
from . import repr_tools


def compute_v(model, tok, request, hparams, layer, left_vector, context_templates):
    at_mlp = SimpleNamespace(**{**vars(hparams), "layer_module_tmp": hparams.mlp_module_tmp})
    whole = getattr(compute_z, "__wrapped__", compute_z)
    target = whole(model, tok, request, at_mlp, layer, [context_templates])
    key, output = get_module_input_output_at_word(
        model,
        tok,
        layer,
        request["prompt"],
        request["subject"],
        hparams.rewrite_module_tmp,
        hparams.fact_token,
    )
    return (target - output) / torch.dot(key, left_vector)


def get_module_input_output_at_word(
    model, tok, layer, context_template, word, module_template, fact_token_strategy
):
    key, output = repr_tools.get_reprs_at_word_tokens(
        model, tok, [context_template], [word], layer, module_template, "last", "both"
    )
    return key[0], output[0]


def find_fact_lookup_idx(prompt, subject, tok, fact_token_strategy, verbose=True, input_prompt=None):
    return repr_tools.get_words_idxs_in_templates(tok, [prompt], [subject], "last")[0][0]
