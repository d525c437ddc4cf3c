from __future__ import annotations

import json
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import data_folder, relative_error
from model_configs import tiny_model, tiny_tokenizer

from fastedit import NumericalError
from fastedit.models import describe, fingerprint
from fastedit.stats import accumulate, collect
from fastedit.stats.tokens import official_length, official_order, pack

TEXTS = [
    f"The capital of country {i} is city {i * 7 % 11}." + " It lies by a river." * (i % 5) for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def direct(model, tokenizer, texts, layer, n_tokens=None, max_length=128, **encode):
    """Sum of k kᵀ and number of tokens, text by text, without padding, in float64."""
    module = describe(model).projection(layer).module
    kept = []
    handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0].double()))
    left = 10**9 if n_tokens is None else n_tokens
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, **encode)["input_ids"][: min(max_length, left)]
            if ids:
                model(torch.tensor([ids]))
                left -= len(ids)
    handle.remove()
    keys = torch.cat(kept)
    return keys.T @ keys, len(keys)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon_new", "gpt_neox"])
def test_collect_matches_direct_computation(family, tokenizer):
    model = tiny_model(family)
    found = collect(model, tokenizer, TEXTS, layers=[2, 0], n_tokens=900, batch_tokens=200)
    assert list(found) == [0, 2]
    for layer, statistics in found.items():
        total, count = direct(model.double(), tokenizer, TEXTS, layer, 900)
        model.float()
        assert statistics.count == count == 900
        assert statistics.layer == layer
        assert statistics.module == describe(model).projection(layer).name
        assert statistics.second_moment.dtype == torch.float32
        assert torch.equal(statistics.second_moment, statistics.second_moment.T)
        assert relative_error(statistics.second_moment, total / count) < 2e-6


def test_collect_bfloat16_model_keeps_products_exact(tokenizer):
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = collect(model, tokenizer, TEXTS[:1], layers=[0, 1], n_tokens=20)
    for layer, statistics in found.items():
        total, count = direct(model, tokenizer, TEXTS[:1], layer, 20)
        assert relative_error(statistics.second_moment, total / count) < 2e-6


@pytest.mark.parametrize("batch_tokens", [128, 333, 10_000])
def test_collect_does_not_depend_on_padding(batch_tokens, tokenizer):
    model = tiny_model("gpt2", dtype=torch.float64, attn_implementation="eager")
    settings = {"layers": [1], "n_tokens": 777, "dtype": torch.float64}
    alone = collect(model, tokenizer, TEXTS, batch_tokens=1, **settings)[1]
    packed = collect(model, tokenizer, TEXTS, batch_tokens=batch_tokens, **settings)[1]
    assert packed.count == alone.count == 777
    assert relative_error(packed.second_moment, alone.second_moment) < 1e-12


def test_collect_stops_after_last_layer_and_leaves_model_alone(tokenizer):
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    later = model.model.layers[2].register_forward_pre_hook(lambda *_: calls.append("block"))
    last = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: calls.append("projection"))
    collect(model, tokenizer, TEXTS[:3], layers=[0, 1], n_tokens=50)
    later.remove()
    last.remove()
    assert calls == []
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("n_tokens", [1, 2, 100, 640])
def test_budget_is_exact(n_tokens, tokenizer):
    found = collect(tiny_model("gpt2"), tokenizer, TEXTS, layers=[0], n_tokens=n_tokens)
    assert found[0].count == n_tokens


def test_default_budget_is_ten_times_the_width(tokenizer):
    consumed = []
    texts = (consumed.append(text) or text for text in TEXTS * 100)
    statistics = collect(tiny_model("gpt2"), tokenizer, texts, layers=[0])[0]
    assert statistics.count == 640
    assert len(consumed) <= 100  # texts are read as they are needed


def test_too_few_tokens_warns(tokenizer, caplog):
    statistics = collect(tiny_model("gpt2"), tokenizer, TEXTS[:1], layers=[0])[0]
    assert statistics.count < 64
    assert f"the texts hold {statistics.count}" in caplog.text
    assert "singular" in caplog.text


def test_enough_tokens_is_silent(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        collect(tiny_model("gpt2"), tokenizer, TEXTS, layers=[0], n_tokens=700)
    assert caplog.text == ""


def test_bos_counts_and_is_recorded():
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer(add_bos=True)
    with_bos = collect(model, tokenizer, TEXTS[:4], layers=[0], n_tokens=10**6)[0]
    without = collect(model, tokenizer, TEXTS[:4], layers=[0], n_tokens=10**6, add_special_tokens=False)[0]
    assert with_bos.count == without.count + 4
    assert (with_bos.meta["bos"], without.meta["bos"]) == ("counted", "none")


def test_max_length_cuts_texts(tokenizer):
    model = tiny_model("llama")
    found = collect(model, tokenizer, TEXTS[:7], layers=[1], n_tokens=10**6, max_length=9)[1]
    total, count = direct(model, tokenizer, TEXTS[:7], 1, max_length=9)
    assert found.count == count
    assert found.meta["max_length"] == 9
    assert relative_error(found.second_moment, total / count) < 2e-6


def test_max_length_is_capped_by_the_context(tokenizer, caplog):
    found = collect(tiny_model("gpt2"), tokenizer, ["word " * 500], layers=[0], max_length=4096)[0]
    assert found.count == found.meta["max_length"] == 128
    assert "1 texts were cut at 128 tokens" in caplog.text


def test_meta_says_where_it_comes_from(tokenizer):
    model = tiny_model("gpt2")
    first = collect(model, tokenizer, TEXTS, layers=[0], n_tokens=300)[0].meta
    other = collect(model, tokenizer, TEXTS[1:], layers=[0], n_tokens=300)[0].meta
    assert first["model_fingerprint"] == fingerprint(model)
    assert first["texts_hash"] != other["texts_hash"]
    assert {"tokenizer_hash", "bos", "max_length", "versions", "n_texts"} <= first.keys()
    assert json.loads(json.dumps(first)) == first


def test_shuffle_depends_on_seed_only(tokenizer):
    model = tiny_model("gpt2")
    a, b, c = (
        collect(model, tokenizer, TEXTS, layers=[0], n_tokens=200, shuffle=True, seed=seed)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(a.second_moment, b.second_moment)
    assert not torch.equal(a.second_moment, c.second_moment)


def test_sums_on_another_device(tokenizer):
    model = tiny_model("gpt2")
    beside = collect(model, tokenizer, TEXTS, layers=[1], n_tokens=700)[1]
    apart = collect(model, tokenizer, TEXTS, layers=[1], n_tokens=700, accumulate_on="cpu")[1]
    assert relative_error(apart.second_moment, beside.second_moment) < 1e-6


def test_offloaded_model(tokenizer):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_model("llama")
    expected = collect(model, tokenizer, TEXTS, layers=[0, 1], n_tokens=700)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found = collect(model, tokenizer, TEXTS, layers=[0, 1], n_tokens=700)
    for layer, statistics in expected.items():
        assert torch.equal(statistics.second_moment, found[layer].second_moment)
        assert statistics.meta == found[layer].meta


def test_not_finite_keys_are_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="layer 1"):
        collect(model, tokenizer, TEXTS, layers=[0, 1, 2], n_tokens=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "0 to 2"),
        ({"layers": []}, "0 to 2"),
        ({"layers": [0], "profile": "paper"}, "profile"),
        ({"layers": [0], "dtype": torch.float16}, "dtype"),
        ({"layers": [0], "n_tokens": 0}, "n_tokens"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        collect(tiny_model("gpt2"), tokenizer, TEXTS, **settings)


def test_no_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no tokens"):
        collect(tiny_model("gpt2"), tokenizer, [""], layers=[0])


# ---- resuming ---------------------------------------------------------------------------------------------


class InterruptedOnceError(Exception):
    pass


def interrupt_after(monkeypatch, n_batches):
    """Make the collection fail at one batch, once; returns the list of batches that were computed."""
    original = accumulate.Accumulators.add
    sizes = []

    def add(self, ids, mask):
        if len(sizes) == n_batches:
            sizes.append(0)
            raise InterruptedOnceError
        sizes.append(int(mask.sum()))
        original(self, ids, mask)

    monkeypatch.setattr(accumulate.Accumulators, "add", add)
    return sizes


@pytest.mark.parametrize("n_batches", [1, 8, 11])
def test_resume_gives_the_same_bits(n_batches, tokenizer, tmp_path, monkeypatch):
    model = tiny_model("llama")
    settings = {"layers": [0, 1], "n_tokens": 2500, "batch_tokens": 160}
    texts = [f"{i} {text}" for i in range(8) for text in TEXTS]
    whole = collect(model, tokenizer, texts, **settings)

    settings.update(checkpoint=tmp_path / "state", checkpoint_seconds=0)
    sizes = interrupt_after(monkeypatch, n_batches)
    with pytest.raises(InterruptedOnceError):
        collect(model, tokenizer, iter(texts), **settings)
    resumed = collect(model, tokenizer, iter(texts), **settings)
    assert sum(sizes) == 2500  # nothing was computed twice
    for layer, statistics in whole.items():
        assert torch.equal(statistics.second_moment, resumed[layer].second_moment)
        assert statistics.count == resumed[layer].count
        assert statistics.meta == resumed[layer].meta


@pytest.mark.parametrize("change", ["texts", "model", "max_length", "layers", "damage"])
def test_resume_only_if_everything_fits(change, tokenizer, tmp_path, monkeypatch, caplog):
    model = tiny_model("llama")
    state = tmp_path / "state"
    settings = {"layers": [0, 1], "n_tokens": 900, "batch_tokens": 128, "max_length": 60}
    interrupt_after(monkeypatch, 2)
    texts = [f"{i} {text}" for i in range(4) for text in TEXTS]
    with pytest.raises(InterruptedOnceError):
        collect(model, tokenizer, texts, checkpoint=state, checkpoint_seconds=0, **settings)
    if change == "texts":
        texts = ["Another beginning.", *texts]
    elif change == "model":
        model = tiny_model("llama", seed=1)
    elif change == "damage":
        state.write_bytes(state.read_bytes()[:-100])
    else:
        settings[change] = {"max_length": 50, "layers": [1]}[change]
    again = collect(model, tokenizer, texts, checkpoint=state, checkpoint_seconds=0, **settings)
    fresh = collect(model, tokenizer, texts, **settings)
    for layer, statistics in fresh.items():
        assert torch.equal(statistics.second_moment, again[layer].second_moment)
        assert statistics.count == again[layer].count
    assert "starting anew" in caplog.text


# ---- the published sample and packing ---------------------------------------------------------------------


def published_batches(lengths, token_size):
    """The rule of the published ``length_collation``, on lengths."""
    batches, batch, width = [], [], 0
    for length in sorted(lengths, key=lambda n: -n):
        if length == 0:
            break
        if width * (len(batch) + 1) > token_size:
            batches.append(batch)
            batch, width = [], 0
        if not batch:
            width = length
        batch.append(length)
    return [*batches, batch] if batch else batches


@pytest.mark.parametrize("token_size", [1, 7, 64, 100, 10_000])
def test_packing_is_the_published_one(token_size):
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 101)]
    packed = pack([[1] * n for n in lengths], token_size)
    assert [[len(ids) for ids in batch] for batch in packed] == published_batches(lengths, token_size)


def test_official_profile(tokenizer):
    texts = [f"{i} {text}" for i in range(3) for text in TEXTS]
    model = tiny_model("gpt2")
    found = collect(model, tokenizer, texts, layers=[1], n_texts=110, profile="official")[1]
    sample = official_order(texts, 110)
    assert len(set(sample)) == 110
    assert sample[0] == texts[first_of_sample(len(texts))]
    total, count = direct(model, tokenizer, sample, 1)
    assert found.count == count
    assert found.meta["max_length"] == 128
    assert relative_error(found.second_moment, total / count) < 2e-6


def first_of_sample(n_texts):
    """First index of the published sample of ``n_texts``."""
    order = list(range(n_texts))
    random.Random(1).shuffle(order)
    return order[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "llama", "max_position_embeddings": 131072}, 131072),
        ({"model_type": "qwen2", "max_position_embeddings": 32768}, 4096),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}, 4096),
        ({"model_type": "mistral", "sliding_window": 1000}, 1000),
    ],
)
def test_official_length(config, expected):
    assert official_length(SimpleNamespace(**config)) == expected


# ---- golden -----------------------------------------------------------------------------------------------


def test_golden_second_moments():
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    golden = np.load(data_folder("golden", "cov.npz"))
    records = json.loads(data_folder("golden", "records.json").read_text())
    folder = data_folder("models", "factlm-llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end)
    texts = [
        f"{record[prompt]} {record[answer]}."
        for record in records
        for prompt, answer in (("prompt", "ground_truth"), ("locality_prompt", "locality_ground_truth"))
    ]
    layers = sorted(int(name[5:]) for name in golden.files if name.startswith("cov_L"))
    found = collect(model, tokenizer, texts, layers=layers, n_tokens=10**9, add_special_tokens=False)
    for layer in layers:
        assert found[layer].count == int(golden["n_tokens"]) == 12305
        assert relative_error(found[layer].second_moment, torch.tensor(golden[f"cov_L{layer}"])) < 1e-5
