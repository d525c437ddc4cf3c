import torch

from . import repr_tools
from .layer_stats import layer_stats

STATS_DIR = "data/stats"
inv_mom2_cache = {}


def get_inv_cov(model, tok, layer_name, mom2_dataset, mom2_n_samples, mom2_dtype):
    key = (model.config._name_or_path.replace("/", "_"), layer_name)
    if key not in inv_mom2_cache:
        stat = layer_stats(
            model,
            tok,
            layer_name,
            STATS_DIR,
            mom2_dataset,
            ["mom2"],
            sample_size=mom2_n_samples,
            precision=mom2_dtype,
        )
        inv_mom2_cache[key] = torch.inverse(stat.mom2.moment()).float()
    return inv_mom2_cache[key]


def compute_u(model, tok, request, hparams, layer, context_templates):
    texts = [context.format(request["prompt"]) for context in context_templates]
    words = [request["subject"]] * len(texts)
    u = repr_tools.get_reprs_at_word_tokens(
        model, tok, texts, words, layer, hparams.rewrite_module_tmp, "last"
    ).mean(0)
    if hparams.mom2_adjustment:
        name = hparams.rewrite_module_tmp.format(layer)
        u = (
            get_inv_cov(model, tok, name, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype)
            @ u
        )
    return u / u.norm()
