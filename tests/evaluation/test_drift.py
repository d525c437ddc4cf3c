"""Drift on a fixed text and of weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastedit.evaluation import drift
from fastedit.evaluation.drift import DriftMeter, text_windows, weight_drift
from fastedit.models import describe

TEXT = "The river of Ulm is the Danube. Ada Brook lived in York. " * 6


def _log_probs(model, windows):
    with torch.no_grad():
        return [model(torch.tensor([w])).logits[0, :-1].double().log_softmax(-1) for w in windows]


def test_windows_hold_the_text_once(tiny):
    _, tokenizer = tiny
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    bos = tokenizer("a")["input_ids"][:-1]
    windows = text_windows(tokenizer, TEXT, length=30, context_length=128)
    assert [t for w in windows for t in w[len(bos) :]] == ids
    assert all(w[: len(bos)] == bos and len(w) <= 30 for w in windows)
    assert max(map(len, text_windows(tokenizer, TEXT, context_length=20))) == 20
    assert sum(len(w) - len(bos) for w in text_windows(tokenizer, TEXT, length=30, limit=50)) == 50
    with pytest.raises(ValueError, match="two are needed"):
        text_windows(tokenizer, "")


def test_perplexity_and_kl_equal_the_plain_way(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    windows = text_windows(tokenizer, TEXT, length=40)
    monkeypatch.setattr(
        "fastedit.evaluation.scoring._MAX_LOGITS", len(tokenizer) * 7
    )  # several parts a window
    meter = DriftMeter(model, tokenizer, windows, batch_size=3)
    plain = _log_probs(model, windows)
    sums, reference = meter.before()
    assert reference.mode == "exact"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    edited = _log_probs(model, windows)
    after = meter.after(reference)
    for w, before, p0, p1 in zip(after, sums, plain, edited, strict=True):
        ids = torch.tensor(windows[after.index(w)][1:])
        assert before.nll == pytest.approx(-p0.gather(1, ids[:, None]).sum().item(), rel=1e-5)
        assert w.nll == pytest.approx(-p1.gather(1, ids[:, None]).sum().item(), rel=1e-5)
        assert w.kl == pytest.approx((p0.exp() * (p0 - p1)).sum().item(), rel=1e-4)
        assert w.same == (p0.argmax(-1) == p1.argmax(-1)).sum().item()
        assert w.n == len(ids)


def test_unchanged_model_has_no_drift(tiny):
    model, tokenizer = tiny
    meter = DriftMeter(model, tokenizer, text_windows(tokenizer, TEXT, length=40))
    sums, reference = meter.before()
    for before, after in zip(sums, meter.after(reference), strict=True):
        assert after.kl == pytest.approx(0.0, abs=1e-6)
        assert after.same == after.n
        assert after.nll == pytest.approx(before.nll)


def test_large_vocabularies_keep_the_top(tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    meter = DriftMeter(model, tokenizer, text_windows(tokenizer, TEXT, length=40))
    exact = meter.before()[1]
    monkeypatch.setattr(drift, "EXACT_VOCABULARY", 10)
    monkeypatch.setattr(drift, "TOP", 100)
    top = meter.before()[1]
    assert (top.mode, top.ids[0].shape[1]) == ("top-100", 100)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    full, part = (sum(w.kl for w in meter.after(r)) for r in (exact, top))
    assert 0.8 * full < part <= full * (1 + 1e-6)  # merging events lowers KL


def test_collapse_is_seen(tiny_llama):
    model, tokenizer = tiny_llama
    meter = DriftMeter(model, tokenizer, text_windows(tokenizer, TEXT, length=40))
    reference = meter.before()[1]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert not any(w.finite for w in meter.after(reference))


def test_weight_drift_equals_the_dense_difference(tiny):
    model, _ = tiny
    projection = describe(model).projection(1)
    before = projection.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    edits = []
    for rank in (1, 3):
        left = torch.randn(projection.d_out, rank, generator=generator)
        right = torch.randn(projection.d_in, rank, generator=generator)
        edits.append(
            SimpleNamespace(factors={projection.weight_name: SimpleNamespace(left=left, right=right)})
        )
        with torch.no_grad():
            delta = left @ right.T
            projection.weight.add_(delta.T if projection.transposed else delta)
    (result,) = weight_drift(model, edits)
    dense = (projection.weight - before).double()
    assert result.name == projection.weight_name
    assert result.relative == pytest.approx((dense.norm() / before.norm()).item(), rel=1e-4)
    assert result.spectral == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-4)
    with torch.no_grad():
        projection.weight.copy_(before)
    assert math.isfinite(result.relative)
