"""The value of one request: the whole model on all its rows in every step."""

import torch

from ..rome import repr_tools


def compute_z(model, tok, request, hparams, layer, context_templates):
    target = tok.encode(request["target_new"], add_special_tokens=False)
    if target[0] in (tok.bos_token_id, tok.unk_token_id):
        target = target[1:]
    templates = [
        context.format(request["prompt"]) + tok.decode(target[:-1])
        for group in context_templates
        for context in group
    ] + ["{} is a"]
    rows = tok(
        [template.format(request["subject"]) for template in templates], padding=True, return_tensors="pt"
    )
    places = [find_fact_lookup_idx(each, request["subject"], tok, hparams.fact_token) for each in templates]
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    initial = {}

    def move(_module, _args, out):
        hidden = out[0] if isinstance(out, tuple) else out
        initial.setdefault("value", hidden[0, places[0]].detach().clone())
        moved = hidden.clone()
        for row, place in enumerate(places):
            moved[row, place] = moved[row, place] + delta
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    model.requires_grad_(False)
    optimizer = torch.optim.Adam([delta], lr=hparams.v_lr)
    before = None
    for step in range(hparams.v_num_grad_steps):
        handle = model.get_submodule(hparams.layer_module_tmp.format(layer)).register_forward_hook(move)
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        handle.remove()
        log_p = logits.log_softmax(2)
        nll = 0
        for row in range(len(templates) - 1):
            end = int(rows["attention_mask"][row].sum())
            nll = nll - log_p[row, range(end - len(target), end), target].mean() / (len(templates) - 1)
        neutral = log_p[-1, places[-1]]
        before = neutral.detach().clone() if before is None else before
        kl = (neutral.exp() * (neutral - before)).sum()
        norm = initial["value"].norm()
        loss = nll + hparams.kl_factor * kl + hparams.v_weight_decay * delta.norm() / norm**2
        if loss < 5e-2 or step == hparams.v_num_grad_steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= (hparams.clamp_norm_factor * norm / delta.norm()).clamp(max=1)
    return initial["value"] + delta.detach()


def get_module_input_output_at_words(
    model, tok, layer, context_templates, words, module_template, fact_token_strategy, track=None
):
    options = {
        "model": model,
        "tok": tok,
        "layer": layer,
        "module_template": module_template,
        "subtoken": "last",
    }
    return repr_tools.get_reprs_at_word_tokens(
        context_templates=context_templates, words=words, track=track or "both", **options
    )


def find_fact_lookup_idx(prompt, subject, tok, fact_token_strategy, verbose=True):
    return repr_tools.get_words_idxs_in_templates(tok, [prompt], [subject], "last")[0][0]
