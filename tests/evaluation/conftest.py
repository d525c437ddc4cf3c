"""Tiny models and a tokenizer for the evaluation tests."""

from __future__ import annotations

import pytest
import torch

SENTENCES = [
    "The capital of France is Paris.",
    "The river of Ulm is the Danube, not the Rhine.",
    "Ada Brook was born in Leeds in 1812 and lived in York.",
    "Who built the first mill? Hugh Vale built it.",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are too small for several threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer(*, bos: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


def make_model(kind: str, vocabulary: int):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=128,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def tiny(request):
    """A random model of each kind, with its tokenizer (Llama's puts a BOS in front)."""
    tokenizer = make_tokenizer(bos=request.param == "llama")
    return make_model(request.param, len(tokenizer)), tokenizer


@pytest.fixture
def tiny_llama():
    """A random Llama of one's own, to be changed by the test."""
    tokenizer = make_tokenizer(bos=True)
    return make_model("llama", len(tokenizer)), tokenizer
