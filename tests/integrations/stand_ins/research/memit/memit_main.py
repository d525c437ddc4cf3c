from pathlib import Path

import numpy as np
import torch
from rome.layer_stats import layer_stats
from util import nethook

from .compute_ks import compute_ks
from .compute_z import compute_z, get_module_input_output_at_words

CONTEXT_TEMPLATES_CACHE = None
COV_CACHE = {}
STATS_DIR = "data/stats"


def apply_memit_to_model(model, tok, requests, hparams, cache_template=None):
    for name, (keys, values) in execute_memit(model, tok, requests, hparams, cache_template).items():
        weight = nethook.get_parameter(model, name)
        with torch.no_grad():
            weight += upd_matrix_match_shape(keys @ values.T, weight.shape).float()
    return model


def execute_memit(model, tok, requests, hparams, cache_template=None):
    contexts = get_context_templates(model, tok)
    zs = get_targets(model, tok, requests, hparams, contexts, cache_template)
    names = {layer: hparams.rewrite_module_tmp.format(layer) for layer in hparams.layers}
    weights = {layer: nethook.get_parameter(model, f"{name}.weight") for layer, name in names.items()}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    deltas = {}
    for i, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T.double()
        residual = (zs - current_zs(model, tok, requests, hparams)).double() / (len(hparams.layers) - i)
        cov = get_cov(
            model, tok, names[layer], hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
        ).double()
        adjusted = torch.linalg.solve(hparams.mom2_update_weight * cov + keys @ keys.T, keys)
        update = upd_matrix_match_shape(residual @ adjusted.T, weights[layer].shape)
        with torch.no_grad():
            weights[layer] += update.float()
        deltas[f"{names[layer]}.weight"] = adjusted, residual.detach()
    with torch.no_grad():
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    return deltas


def get_targets(model, tok, requests, hparams, contexts, cache_template):
    zs = []
    for request in requests:
        file = None
        if cache_template is not None:
            file = Path(
                str(cache_template).format(hparams.layers[-1], hparams.clamp_norm_factor, request["case_id"])
            )
        if file is not None and file.exists():
            zs.append(torch.from_numpy(np.load(file)["v_star"]))
            continue
        target = request["target_new"]["str"]
        spaced = {**request, "target_new": {"str": target if target[0] == " " else " " + target}}
        zs.append(compute_z(model, tok, spaced, hparams, hparams.layers[-1], contexts).detach())
        if file is not None:
            np.savez(file, v_star=zs[-1].numpy())
    return torch.stack(zs, 1)


def current_zs(model, tok, requests, hparams):
    prompts, subjects = [r["prompt"] for r in requests], [r["subject"] for r in requests]
    return get_module_input_output_at_words(
        model, tok, hparams.layers[-1], prompts, subjects, hparams.layer_module_tmp, hparams.fact_token
    )[1].T


def get_cov(
    model, tok, layer_name, mom2_dataset, mom2_n_samples, mom2_dtype, inv=False, force_recompute=False
):
    key = (model.config._name_or_path.replace("/", "_"), layer_name)
    if key not in COV_CACHE:
        stat = layer_stats(
            model,
            tok,
            layer_name,
            STATS_DIR,
            mom2_dataset,
            to_collect=["mom2"],
            sample_size=mom2_n_samples,
            precision=mom2_dtype,
        )
        COV_CACHE[key] = stat.mom2.moment().float()
    return COV_CACHE[key]


def upd_matrix_match_shape(matrix, shape):
    return matrix if matrix.shape == shape else matrix.T


def get_context_templates(model, tok):
    global CONTEXT_TEMPLATES_CACHE
    if CONTEXT_TEMPLATES_CACHE is None:
        CONTEXT_TEMPLATES_CACHE = [["{}"], ["The thing. {}", "Because of this. {}"]]
    return CONTEXT_TEMPLATES_CACHE
