import torch


def get_words_idxs_in_templates(tok, context_templates, words, subtoken):
    assert subtoken == "last"
    heads = [template.split("{}")[0] + word for template, word in zip(context_templates, words)]
    return [[len(tok(head)["input_ids"]) - 1] for head in heads]


def get_reprs_at_word_tokens(
    model, tok, context_templates, words, layer, module_template, subtoken, track="in"
):
    idxs = get_words_idxs_in_templates(tok, context_templates, words, subtoken)
    texts = [template.format(word) for template, word in zip(context_templates, words)]
    return get_reprs_at_idxs(model, tok, texts, idxs, layer, module_template, track)


def get_reprs_at_idxs(model, tok, contexts, idxs, layer, module_template, track="in"):
    seen = {}

    def keep(module, args, out):
        seen["in"], seen["out"] = args[0] if args else None, out[0] if isinstance(out, tuple) else out

    found = {"in": [], "out": []}
    handle = dict(model.named_modules())[module_template.format(layer)].register_forward_hook(keep)
    for text, (place,) in zip(contexts, idxs):
        with torch.no_grad():
            model(input_ids=torch.tensor([tok(text)["input_ids"]]))
        for name, values in found.items():
            if seen[name] is not None:
                values.append(seen[name].reshape(-1, seen[name].shape[-1])[place])
    handle.remove()
    stacked = {name: torch.stack(values) if values else None for name, values in found.items()}
    return (stacked["in"], stacked["out"]) if track == "both" else stacked[track]
