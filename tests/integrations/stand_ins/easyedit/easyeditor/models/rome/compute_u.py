"""ROME's left vector."""

import torch

from . import repr_tools
from .layer_stats import layer_stats

inv_mom2_cache = {}


def get_inv_cov(model, tok, layer_name, mom2_dataset, mom2_n_samples, mom2_dtype, hparams=None):
    key = model.config._name_or_path.replace("/", "_"), layer_name
    if key not in inv_mom2_cache:
        stat = layer_stats(model, tok, layer_name, hparams.stats_dir, mom2_dataset, to_collect=["mom2"])
        inv_mom2_cache[key] = torch.inverse(stat.mom2.moment())
    return inv_mom2_cache[key]


def compute_u(model, tok, request, hparams, layer, context_templates):
    keys = repr_tools.get_reprs_at_word_tokens(
        model,
        tok,
        [template.format(request["prompt"]) for template in context_templates],
        [request["subject"]] * len(context_templates),
        layer,
        hparams.rewrite_module_tmp,
        "last",
    )
    u = get_inv_cov(
        model, tok, hparams.rewrite_module_tmp.format(layer), "", 1, "", hparams=hparams
    ) @ keys.mean(0)
    return u / u.norm()
