"""Keys averaged over the contexts of a group, then over the groups."""

import torch

from .compute_z import get_module_input_output_at_words


def compute_ks(model, tok, requests, hparams, layer, context_templates):
    found = []
    for request in requests:
        groups = []
        for group in context_templates:
            keys, _ = get_module_input_output_at_words(
                model,
                tok,
                layer,
                [context.format(request["prompt"]) for context in group],
                [request["subject"]] * len(group),
                hparams.rewrite_module_tmp,
                hparams.fact_token,
            )
            groups.append(keys.mean(0))
        found.append(torch.stack(groups).mean(0))
    return torch.stack(found)
