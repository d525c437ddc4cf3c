"""AlphaEdit with its key cache and projectors at module level."""

import torch

from ..memit.compute_ks import compute_ks
from ..memit.compute_z import compute_z, get_module_input_output_at_words
from ..memit.memit_main import get_context_templates, get_cov, prepared, upd_matrix_match_shape

P = None
cache_c = None


def execute_AlphaEdit(model, tok, requests, hparams, cache_template=None):
    requests = prepared(requests)
    contexts = get_context_templates(model, tok)
    last = hparams.layers[-1]
    values = [compute_z(model, tok, request, hparams, last, contexts) for request in requests]
    values = torch.stack(values, 1)
    deltas, before = {}, {}
    for index, layer in enumerate(hparams.layers):
        name = f"{hparams.rewrite_module_tmp.format(layer)}.weight"
        weight = model.get_parameter(name)
        before[name] = weight.detach().clone()
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        _, present = get_module_input_output_at_words(
            model,
            tok,
            last,
            [request["prompt"] for request in requests],
            [request["subject"] for request in requests],
            hparams.layer_module_tmp,
            hparams.fact_token,
        )
        share = (values - present.T) / (len(hparams.layers) - index)
        projector = P[index].double()
        wide = keys.double()
        system = projector @ (wide @ wide.T + cache_c[index].double())
        system += hparams.L2 * torch.eye(len(wide), dtype=torch.float64)
        update = torch.linalg.solve(system, projector @ wide @ share.T.double()).float()
        deltas[name] = upd_matrix_match_shape(update, weight.shape)
        with torch.no_grad():
            weight += deltas[name]
    for index, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        cache_c[index, :, :] += keys @ keys.T
    with torch.no_grad():
        for name, bits in before.items():
            model.get_parameter(name).copy_(bits)
    return deltas


def get_project(model, tok, layer, hparams):
    moment = get_cov(
        model, tok, hparams.rewrite_module_tmp.format(layer), "wikipedia", 100, "float32", hparams=hparams
    )
    left, values, _ = torch.linalg.svd(moment)
    kept = left[:, values < hparams.nullspace_threshold]
    return kept @ kept.T
