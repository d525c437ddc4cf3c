"""A sentence encoder for tests: texts are alike as far as they share tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from model_configs import tiny_tokenizer


def bag_of_tokens(folder: Path, seed: int = 0, positions: int = 256) -> Path:
    """Write an encoder without layers or positions whose mean state is the mean of random token vectors."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=320, max_position_embeddings=positions, **sizes))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
