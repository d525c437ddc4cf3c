from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from AlphaEdit.AlphaEdit_main import apply_AlphaEdit_to_model
from memit.memit_main import get_cov

ALG_DICT = {"AlphaEdit": (dict, apply_AlphaEdit_to_model)}


def main(out, model_folder, hparams):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    hparams = argparse.Namespace(**json.loads(hparams))
    P = torch.stack([get_project(model, tok, layer, hparams) for layer in hparams.layers])
    d = P.shape[1]
    requests = [
        {"case_id": 0, "prompt": "The capital of {} is", "subject": "France", "target_new": {"str": "Lyon"}},
        {"case_id": 1, "prompt": "{} plays the", "subject": "Miles Davis", "target_new": {"str": "violin"}},
    ]
    apply = ALG_DICT["AlphaEdit"][1]
    _, cache_c = apply(model, tok, requests, hparams, cache_c=torch.zeros(len(hparams.layers), d, d), P=P)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    torch.save({"P": P, "cache_c": cache_c.clone(), "weights": weights, "argv": sys.argv}, Path(out))
    print("done")


def get_project(model, tok, layer, hparams):
    cov = get_cov(
        model,
        tok,
        hparams.rewrite_module_tmp.format(layer),
        hparams.mom2_dataset,
        hparams.mom2_n_samples,
        hparams.mom2_dtype,
    )
    U, S, _ = torch.linalg.svd(cov)
    U = U[:, S < hparams.nullspace_threshold]
    return U @ U.T


if __name__ == "__main__":
    main(*sys.argv[1:4])
    sys.exit(7)
