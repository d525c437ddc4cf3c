import torch
from memit.compute_ks import compute_ks
from memit.compute_z import compute_z, get_module_input_output_at_words
from memit.memit_main import (
    COV_CACHE,
    current_zs,
    get_context_templates,
    get_cov,
    get_targets,
    upd_matrix_match_shape,
)
from util import nethook


def apply_nse_to_model(model, tok, requests, hparams, cache_template=None, cache_c=None):
    contexts = get_context_templates(model, tok)
    zs = get_targets(model, tok, requests, hparams, contexts, cache_template)
    for _ in range(hparams.max_iterations - 1):
        far = (zs - current_zs(model, tok, requests, hparams)).norm(dim=0)
        chosen = ((far > hparams.alpha) & (far < hparams.upper_bound)).nonzero()[:, 0].tolist()
        if not chosen:
            break
        some = [requests[i] for i in chosen]
        for i, layer in enumerate(hparams.layers):
            name = hparams.rewrite_module_tmp.format(layer)
            keys = compute_ks(model, tok, some, hparams, layer, contexts).T
            mass, order = keys.abs().sum(1).sort(descending=True)
            S = order[: int((mass.cumsum(0) <= hparams.neuron_threshold * mass.sum()).nonzero()[-1]) + 1]
            residual = (zs[:, chosen] - current_zs(model, tok, some, hparams)) / (len(hparams.layers) - i)
            cov = get_cov(model, tok, name, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype)
            keys = keys.double()
            system = hparams.mom2_update_weight * cov.double() + cache_c[i].double() + keys @ keys.T
            update = torch.zeros(len(zs), len(keys), dtype=torch.float64)
            update[:, S] = residual.double() @ torch.linalg.solve(system[S][:, S], keys[S]).T
            weight = nethook.get_parameter(model, f"{name}.weight")
            with torch.no_grad():
                weight += upd_matrix_match_shape(update, weight.shape).float()
    for i, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        cache_c[i] += keys @ keys.T
    return model, cache_c
