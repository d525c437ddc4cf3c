"""temporary"""

import torch


def neuron_select(scores, mass, *, rule="at_least"):
    order = scores[0].argsort(descending=True, stable=True)
    run = scores[0][order].cumsum(0)
    total = run[-1]
    n = int((run <= mass * total).sum()) if rule == "prefix" else int((run < mass * total).sum()) + 1
    n = max(1, n)
    idx = order[:n].sort().values
    out = torch.full_like(scores, -1, dtype=torch.long)
    out[0, :n] = idx
    return None, out, torch.tensor([n])


def gather_square(m, i):
    return m[i][:, i]
