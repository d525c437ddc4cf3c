"""Tiny models, and edits with random factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastedit import Fact
from fastedit.artefacts import Edit, LowRank
from fastedit.models import describe

WIDTH, INNER = 16, 40


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices are tiny here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=WIDTH, n_inner=INNER, vocab_size=50, n_positions=32, **ids, **options
    )
    return GPT2LMHeadModel(config)


def _llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        vocab_size=50,
        max_position_embeddings=32,
        **options,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """``make_model("gpt2" | "llama", dtype, seed=0, **config)``: the same weights for the same arguments."""

    def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = {"gpt2": _gpt2, "llama": _llama}[kind](**options)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_edit() -> Callable[..., Edit]:
    """``make_edit(model, layers, rank, seed, scale)``: an edit with random factors, not committed."""

    def make(
        model: nn.Module, layers: Iterable[int] = (0, 1), rank: int = 3, seed: int = 0, scale: float = 0.1
    ) -> Edit:
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for layer in layers:
            projection = describe(model).projection(layer)
            left = torch.randn(projection.d_out, rank, generator=generator) * scale
            right = torch.randn(projection.d_in, rank, generator=generator) * scale
            factors[projection.weight_name] = LowRank(left, right)
        facts = [Fact("The capital of {} is", "France", f"Lyon {seed}", case_id=seed)]
        return Edit(method="memit", facts=facts, factors=factors, params={"layers": list(layers)}, seed=seed)

    return make


@pytest.fixture
def bits() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """A copy of a model's state."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def assert_bits() -> Callable[[nn.Module, dict[str, torch.Tensor]], None]:
    """All bits of a model's state are the given ones."""

    def check(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
        state = model.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor), name

    return check
