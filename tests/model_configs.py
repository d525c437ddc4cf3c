"""Tiny, randomly initialised models of every family in the table, and a tokenizer to go with them.

    from model_configs import FAMILIES, tiny_model, tiny_tokenizer

Adding an architecture takes one entry here; every test over ``FAMILIES`` picks it up. Families that the
installed transformers does not know are skipped with that reason.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, NoReturn

import pytest
import torch

VOCABULARY = 320
HIDDEN = 32
LAYERS = 3

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_GPT2 = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 64,
    "tie_word_embeddings": True,
}
_LLAMA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 64}

# family -> (name of the config class, its fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt2_untied_square": ("GPT2Config", {**_GPT2, "n_inner": HIDDEN, "tie_word_embeddings": False}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{
                key: value
                for key, value in _LLAMA.items()
                if key not in ("num_hidden_layers", "num_attention_heads")
            },
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global"], LAYERS]],
            "tie_word_embeddings": True,
        },
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False}),
    "codegen": ("CodeGenConfig", {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoXConfig", _LLAMA),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_LLAMA, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", _GROUPED),
    "llama_tied_square": (
        "LlamaConfig",
        {**_GROUPED, "intermediate_size": HIDDEN, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", _LLAMA),
    "phi3": ("Phi3Config", {**_GROUPED, "original_max_position_embeddings": 128}),
    "olmo": ("OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmo3": ("Olmo3Config", {**_GROUPED, "sliding_window": 64}),
    "falcon": (
        "FalconConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 64},
    ),
    "falcon_sequential": (
        "FalconConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "falcon_new": (
        "FalconConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "stablelm": ("StableLmConfig", _GROUPED),
    "stablelm_parallel": ("StableLmConfig", {**_GROUPED, "use_parallel_residual": True}),
    "cohere": ("CohereConfig", {**_GROUPED, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2Config",
        {**_GROUPED, "logit_scale": 0.3, "tie_word_embeddings": True, "sliding_window": 64, "head_dim": 8},
    ),
    "granite": (
        "GraniteConfig",
        {**_GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "starcoder2": ("Starcoder2Config", {**_GROUPED, "tie_word_embeddings": True}),
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a family's tiny model. Skips the test if transformers does not know it."""
    import transformers

    name, fields = FAMILIES[family]
    config_class = getattr(transformers, name, None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return config_class(**{**_COMMON, **fields, **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in evaluation mode: vocabulary 320, hidden size 32, 3 blocks, context 128.

    All parameters are random, norms and biases too, so that a part left out shows in the numbers.
    ``changes`` replace fields of the configuration.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    with warnings.catch_warnings():
        # Old releases of transformers compile parts with torch.jit when they are imported.
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        model = AutoModelForCausalLM.from_config(config)
    return randomised(model, seed).to(dtype).eval()


def skip_old_layout(error: Exception) -> NoReturn:
    """Skip for the one reason that a family here may be refused, an old transformers' cache; raise all else."""
    if "layout of its own" not in str(error):
        raise error
    pytest.skip(str(error))


@torch.no_grad()
def randomised(model: Any, seed: int) -> Any:
    """Draw every parameter anew: matrices from N(0, 0.15²), vectors moved by N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


_SENTENCES = (
    "The capital of France is Paris. The capital of Japan is Tokyo.",
    "The mother tongue of Danielle Darrieux is French. Miles Davis plays the trumpet.",
    "The Eiffel Tower is in the city of Paris, and the Colosseum is in Rome.",
)


@lru_cache(maxsize=2)
def _trained(add_bos: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer.to_str()


def tiny_tokenizer(*, add_bos: bool = False) -> Any:
    """A fast byte-level BPE tokenizer of 300 tokens; ``<|endoftext|>`` (0) is bos, eos and pad."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(add_bos)),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=128,
    )
