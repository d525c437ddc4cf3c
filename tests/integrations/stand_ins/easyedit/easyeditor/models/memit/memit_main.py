"""MEMIT as a loop over requests, and whole systems of the keys' width."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from ..rome.layer_stats import layer_stats
from .compute_ks import compute_ks
from .compute_z import compute_z, get_module_input_output_at_words

CONTEXT_TEMPLATES_CACHE = None
COV_CACHE = {}


def execute_memit(model, tok, requests, hparams, cache_template=None):
    requests = prepared(requests)
    contexts = get_context_templates(model, tok)
    last = hparams.layers[-1]
    values = []
    for request in requests:
        file = cache_template and Path(
            str(cache_template).format(last, hparams.clamp_norm_factor, request["case_id"])
        )
        if file and file.exists():
            values.append(torch.from_numpy(np.load(file)["v_star"]))
            continue
        values.append(compute_z(model, tok, request, hparams, last, contexts))
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, v_star=values[-1].numpy())
    values = torch.stack(values, 1)
    deltas, before = {}, {}
    for index, layer in enumerate(hparams.layers):
        name = f"{hparams.rewrite_module_tmp.format(layer)}.weight"
        weight = model.get_parameter(name)
        before[name] = weight.detach().clone()
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T.double()
        _, present = get_module_input_output_at_words(
            model,
            tok,
            last,
            [request["prompt"] for request in requests],
            [request["subject"] for request in requests],
            hparams.layer_module_tmp,
            hparams.fact_token,
        )
        share = (values - present.T).double() / (len(hparams.layers) - index)
        moment = get_cov(
            model, tok, name.removesuffix(".weight"), "wikipedia", 100, "float32", hparams=hparams
        )
        adjusted = solved(moment.double(), keys, hparams)
        deltas[name] = adjusted, share
        with torch.no_grad():
            weight += upd_matrix_match_shape(share @ adjusted.T, weight.shape).float()
    with torch.no_grad():
        for name, bits in before.items():
            model.get_parameter(name).copy_(bits)
    return deltas


def solved(moment, keys, hparams):
    return torch.linalg.solve(hparams.mom2_update_weight * moment + keys @ keys.T, keys)


def prepared(requests):
    requests = deepcopy(requests)
    for request in requests:
        request["target_new"] = " " + request["target_new"].strip()
        if "{}" not in request["prompt"]:
            request["prompt"] = request["prompt"].replace(request["subject"], "{}")
    return requests


def get_cov(
    model,
    tok,
    layer_name,
    mom2_dataset,
    mom2_n_samples,
    mom2_dtype,
    inv=False,
    force_recompute=False,
    hparams=None,
):
    key = model.config._name_or_path.replace("/", "_"), layer_name
    if key not in COV_CACHE:
        stat = layer_stats(model, tok, layer_name, hparams.stats_dir, mom2_dataset, ["mom2"])
        COV_CACHE[key] = stat.mom2.moment()
    return COV_CACHE[key]


def upd_matrix_match_shape(matrix, shape):
    return matrix if matrix.shape == shape else matrix.T


def get_context_templates(model, tok):
    return [["{}"], CONTEXT_TEMPLATES_CACHE]
