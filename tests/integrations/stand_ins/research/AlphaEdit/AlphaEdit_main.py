import torch
from memit.compute_ks import compute_ks
from memit.compute_z import compute_z, get_module_input_output_at_words
from memit.memit_main import current_zs, get_context_templates, get_targets, upd_matrix_match_shape
from util import nethook


def apply_AlphaEdit_to_model(model, tok, requests, hparams, cache_template=None, cache_c=None, P=None):
    contexts = get_context_templates(model, tok)
    zs = get_targets(model, tok, requests, hparams, contexts, cache_template)
    for i, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        residual = (zs - current_zs(model, tok, requests, hparams)) / (len(hparams.layers) - i)
        system = P[i] @ (keys @ keys.T + cache_c[i]) + hparams.L2 * torch.eye(len(keys))
        weight = nethook.get_parameter(model, f"{hparams.rewrite_module_tmp.format(layer)}.weight")
        update = torch.linalg.solve(system, P[i] @ keys @ residual.T).T
        with torch.no_grad():
            weight += upd_matrix_match_shape(update, weight.shape)
    for i, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        cache_c[i] += keys @ keys.T
    return model, cache_c
