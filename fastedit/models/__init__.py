"""What editing needs to know of a model and its tokenizer, and nothing else.

>>> from fastedit.models import describe, tokenize_prompt
>>> description = describe(model)                                            # doctest: +SKIP
>>> description.projection(5).weight_name                                    # doctest: +SKIP
'model.layers.5.mlp.down_proj.weight'
>>> tokenize_prompt(tokenizer, "The capital of {} is", "France")             # doctest: +SKIP
TokenizedPrompt(ids=[464, 3139, 286, 4881, 318], subject_last=3)
"""

from __future__ import annotations

from .describe import ModelDescription, Projection, describe
from .fingerprint import fingerprint, tokenizer_digest, weight_digest
from .tokens import (
    TokenizedPrompt,
    encode_prompt,
    encode_with_subject,
    has_bos,
    leading_specials,
    official_subject_last_index,
    pad_batch,
    pad_id,
    subject_last_index,
    target_ids,
    tokenize_prompt,
)

__all__ = [
    "ModelDescription",
    "Projection",
    "TokenizedPrompt",
    "describe",
    "encode_prompt",
    "encode_with_subject",
    "fingerprint",
    "has_bos",
    "leading_specials",
    "official_subject_last_index",
    "pad_batch",
    "pad_id",
    "subject_last_index",
    "target_ids",
    "tokenize_prompt",
    "tokenizer_digest",
    "weight_digest",
]
