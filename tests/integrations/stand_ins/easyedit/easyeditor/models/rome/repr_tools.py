"""Inputs and outputs of modules at the last token of a word."""

import torch


def get_words_idxs_in_templates(tok, context_templates, words, subtoken):
    return [
        [len(tok.encode(template.split("{}")[0] + word)) - 1]
        for template, word in zip(context_templates, words, strict=True)
    ]


def get_reprs_at_idxs(model, tok, contexts, idxs, layer, module_template, track="in"):
    seen = {}

    def keep(_module, args, out):
        seen["in"], seen["out"] = args[0], out[0] if isinstance(out, tuple) else out

    handle = model.get_submodule(module_template.format(layer)).register_forward_hook(keep)
    with torch.no_grad():
        rows = tok(contexts, padding=True, return_tensors="pt")
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    handle.remove()
    found = {
        kind: torch.stack([states[row, places].mean(0) for row, places in enumerate(idxs)])
        for kind, states in seen.items()
    }
    return (found["in"], found["out"]) if track == "both" else found[track]


def get_reprs_at_word_tokens(
    model, tok, context_templates, words, layer, module_template, subtoken, track="in"
):
    idxs = get_words_idxs_in_templates(tok, context_templates, words, subtoken)
    contexts = [template.format(word) for template, word in zip(context_templates, words, strict=True)]
    return get_reprs_at_idxs(model, tok, contexts, idxs, layer, module_template, track)
