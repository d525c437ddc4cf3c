from __future__ import annotations

import logging

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer

from fastedit.stats import cache, collect, ensure
from fastedit.stats.cache import cache_directory

TEXTS = [f"Sentence {i} of a text about rivers, hills and {i * 13 % 7} birds." for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def collections(monkeypatch):
    """The settings of every collection that is really made."""
    made = []

    def counted(*args, **settings):
        made.append(settings)
        return collect(*args, **settings)

    monkeypatch.setattr(cache, "collect", counted)
    return made


def equal(a, b):
    return all(torch.equal(a[layer].second_moment, b[layer].second_moment) for layer in a | b)


def test_collects_once_and_says_so(tokenizer, tmp_path, collections, caplog):
    model = tiny_model("gpt2")
    first = ensure(model, tokenizer, [0, 1], texts=TEXTS, cache_dir=tmp_path)
    assert f"the {len(TEXTS)} texts given" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = ensure(model, tokenizer, [1, 0], texts=iter(TEXTS), cache_dir=tmp_path)
    assert "come from" in caplog.text
    assert len(collections) == 1
    assert equal(first, again)
    assert first[0].count == 640
    files = sorted(path.name for path in tmp_path.glob("stats/*/*/*"))
    assert files == ["layer_000.safetensors", "layer_001.safetensors"]


def test_other_texts_settings_layers_or_weights_are_collected(tokenizer, tmp_path, collections):
    model = tiny_model("gpt2")
    ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path)
    ensure(model, tokenizer, [0], texts=TEXTS[1:], cache_dir=tmp_path)
    ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path, max_length=5)
    ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path, n_tokens=700)
    ensure(model, tokenizer, [0, 2], texts=TEXTS, cache_dir=tmp_path)
    ensure(tiny_model("gpt2", seed=1), tokenizer, [0], texts=TEXTS, cache_dir=tmp_path)
    assert len(collections) == 6


def test_damaged_cache_is_made_again(tokenizer, tmp_path, collections, caplog):
    model = tiny_model("gpt2")
    first = ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path)
    (file,) = tmp_path.glob("stats/*/*/layer_000.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    again = ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path)
    assert equal(first, again)
    assert len(collections) == 2
    assert "made again" in caplog.text


@pytest.fixture
def neutral(monkeypatch):
    monkeypatch.setattr(cache, "neutral_texts", lambda: TEXTS[:10])


def test_without_texts_the_neutral_text_serves(tokenizer, tmp_path, collections, neutral, caplog):
    model = tiny_model("gpt2")
    first = ensure(model, tokenizer, [0], cache_dir=tmp_path)
    assert first[0].count < 640  # none is counted twice
    assert "packaged neutral text" in caplog.text
    assert "640 tokens were asked for" in caplog.text
    assert equal(first, ensure(model, tokenizer, [0], cache_dir=tmp_path))
    assert len(collections) == 1


def test_without_texts_better_statistics_in_the_cache_serve(
    tokenizer, tmp_path, collections, neutral, caplog
):
    model = tiny_model("gpt2")
    ensure(model, tokenizer, [0], texts=TEXTS[:2], cache_dir=tmp_path)
    ensure(model, tokenizer, [0], cache_dir=tmp_path)
    best = ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path, n_tokens=900)
    ensure(model, tokenizer, [0], texts=TEXTS, cache_dir=tmp_path)
    assert len(collections) == 4
    assert equal(best, ensure(model, tokenizer, [0], cache_dir=tmp_path))
    assert len(collections) == 4


def test_packaged_text_is_there():
    pytest.importorskip("fastedit.demo")
    texts = cache.neutral_texts()
    assert len(texts) > 50
    assert all(text.strip() for text in texts)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTEDIT_CACHE", raising=False)
    assert cache_directory().parts[-2:] == (".cache", "fastedit")
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "env"))
    assert cache_directory() == tmp_path / "env"
    assert cache_directory(tmp_path / "given") == tmp_path / "given"
