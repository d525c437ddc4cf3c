"""A tiny text encoder, and a RECIPE checkpoint for a tiny model that finds the facts it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_configs import tiny_model, tiny_tokenizer

from fastedit import Fact
from fastedit.data import records_from
from fastedit.editors.recipe_training import train

_WORDS = [
    ("Tokyoland", "Oslo"),
    ("Romeland", "Lima"),
    ("Cairoland", "Bonn"),
    ("Parisland", "Delhi"),  # this and the next are held out of training with seed 0
    ("Egyptland", "Paris"),
]
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"The capital of {name} is",
        "subject": name,
        "target_new": city,
        "rephrase": [f"{name} is governed from"],
        "locality": {"near": [{"prompt": f"{city} plays the", "ground_truth": "drum"}]},
        "portability": {},
    }
    for name, city in _WORDS
]
FACTS = [Fact("The capital of {} is", name, city) for name, city in _WORDS[:3]]
PROMPTS = [
    FACTS[0].text,
    f"{FACTS[1].subject} is governed from",
    FACTS[2].text,
    "Oslo plays the",
    "Bonn plays the",
]
ROUTES = [FACTS[0].target_new, FACTS[1].target_new, FACTS[2].target_new, None, None]
SHORT = {
    "dim": 16,
    "batch": 4,
    "lr": 1e-2,
    "generator_lr": 1e-2,
    "encoder_lr": 1e-3,
    "validate_every": 1000,
    "holdout": 0.3,
}


def save_encoder(folder: Path, *, kind: str = "bert", seed: int = 0) -> Path:
    """A random encoder that takes 48 tokens."""
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    common: dict[str, Any] = {"vocab_size": 320, "initializer_range": 0.5, **sizes}
    if kind == "roberta":
        module: Any = RobertaModel(RobertaConfig(max_position_embeddings=49, pad_token_id=0, **common))
    else:
        module = BertModel(BertConfig(max_position_embeddings=48, **common))
    module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, *, seed: int = 0, steps: int = 60, **changes: Any) -> Path:
    """A checkpoint for the tiny llama, in which FACTS were seen in training."""
    encoder = save_encoder(folder / f"encoder{seed}")
    out = folder / f"checkpoint{seed}"
    records = records_from(ROWS)
    params = {**SHORT, "steps": steps, "train_encoder": False, **changes}
    train(
        tiny_model("llama"),
        tiny_tokenizer(),
        records,
        out,
        encoder=encoder,
        params=params,
        seed=seed,
        progress=False,
    )
    return out
