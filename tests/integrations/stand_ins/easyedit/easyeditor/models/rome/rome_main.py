"""ROME: both vectors of one fact."""

from .compute_u import compute_u
from .compute_v import compute_v


def execute_rome(model, tok, request, hparams, context_templates):
    layer = hparams.layers[0]
    left = compute_u(model, tok, request, hparams, layer, context_templates)
    return left, compute_v(model, tok, request, hparams, layer, left, context_templates)
