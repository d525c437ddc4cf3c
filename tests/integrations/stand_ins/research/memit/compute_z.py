import torch
import torch.nn.functional as F
from rome import repr_tools


def compute_z(model, tok, request, hparams, layer, context_templates):
    target = tok(request["target_new"]["str"])["input_ids"]
    tail = tok.decode(target[:-1])
    prompts = [c.format(request["prompt"]) + tail for group in context_templates for c in group] + ["{} is a"]
    places = [find_fact_lookup_idx(p, request["subject"], tok, hparams.fact_token) for p in prompts]
    rows = [tok(p.format(request["subject"]))["input_ids"] for p in prompts]
    block = dict(model.named_modules())[hparams.layer_module_tmp.format(layer)]
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    state = {}

    def add(module, args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        flat = hidden.view(-1, hidden.shape[-1])
        state.setdefault("initial", flat[state["place"]].detach().clone())
        flat[state["place"]] += delta
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handle = block.register_forward_hook(add)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
    for step in range(hparams.v_num_grad_steps):
        nll = 0
        for number, (row, place) in enumerate(zip(rows, places)):
            state["place"] = place
            log_p = F.log_softmax(model(input_ids=torch.tensor([row])).logits[0], -1)
            if number == len(rows) - 1:
                now = log_p[place]
                kl = (
                    (now.exp() * 0).sum()
                    if "kl" not in state
                    else F.kl_div(state["kl"], now, log_target=True, reduction="sum")
                )
                state.setdefault("kl", now.detach())
            else:
                scored = log_p[len(row) - len(target) :]
                nll = nll - scored.gather(1, torch.tensor(target)[:, None]).mean() / (len(rows) - 1)
        decay = hparams.v_weight_decay * delta.norm() / state["initial"].norm() ** 2
        loss = nll + hparams.kl_factor * kl + decay
        print("loss", loss.item())
        if loss < 5e-2 or step == hparams.v_num_grad_steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        limit = hparams.clamp_norm_factor * state["initial"].norm()
        with torch.no_grad():
            if delta.norm() > limit:
                delta *= limit / delta.norm()
    handle.remove()
    return state["initial"] + delta


def get_module_input_output_at_words(
    model, tok, layer, context_templates, words, module_template, fact_token_strategy
):
    return repr_tools.get_reprs_at_word_tokens(
        model, tok, context_templates, words, layer, module_template, fact_token_strategy[8:], track="both"
    )


def find_fact_lookup_idx(prompt, subject, tok, fact_token_strategy, verbose=True):
    return repr_tools.get_words_idxs_in_templates(tok, [prompt], [subject], fact_token_strategy[8:])[0][0]
