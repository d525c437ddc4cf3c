import torch

from .compute_z import get_module_input_output_at_words


def compute_ks(model, tok, requests, hparams, layer, context_templates):
    keys = []
    for request in requests:
        means = []
        for group in context_templates:
            templates = [context.format(request["prompt"]) for context in group]
            found, _ = get_module_input_output_at_words(
                model,
                tok,
                layer,
                templates,
                [request["subject"]] * len(group),
                hparams.rewrite_module_tmp,
                hparams.fact_token,
            )
            means.append(found.mean(0))
        keys.append(torch.stack(means).mean(0))
    return torch.stack(keys)
