"""EMMET: MEMIT with another system."""

import torch

from ..memit import memit_main
from ..memit.compute_ks import compute_ks
from ..memit.compute_z import compute_z, get_module_input_output_at_words
from ..memit.memit_main import get_cov, upd_matrix_match_shape

COV_CACHE = memit_main.COV_CACHE
__all__ = ["compute_ks", "compute_z", "get_cov", "get_module_input_output_at_words", "upd_matrix_match_shape"]


def execute_emmet(model, tok, requests, hparams, cache_template=None):
    original, memit_main.solved = memit_main.solved, _solved
    try:
        return getattr(memit_main.execute_memit, "__wrapped__", memit_main.execute_memit)(
            model, tok, requests, hparams, cache_template
        )
    finally:
        memit_main.solved = original


def _solved(moment, keys, hparams):
    matrix = hparams.mom2_update_weight * moment + hparams.update_norm_lambda * torch.eye(len(moment))
    inverse = torch.linalg.inv(matrix)
    system = keys.T @ inverse @ keys + hparams.emmet_lambda * torch.eye(keys.shape[1])
    return inverse @ keys @ torch.linalg.inv(system)


def get_context_templates(model, tok):
    return memit_main.get_context_templates(model, tok)
