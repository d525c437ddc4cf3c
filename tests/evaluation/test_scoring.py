"""Teacher-forced scores: right tokens, right probabilities, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from helpers import data_folder

from fastedit.data import load_records
from fastedit.evaluation.scoring import Pair, PairScore, Scorer, Unscorable

PAIRS = [
    Pair("The capital of France is", "Lyon"),
    Pair("The capital of France is", "Paris"),
    Pair("Ada Brook was born in", "the town of Leeds"),
    Pair("Who built the first mill?", "Hugh Vale"),
    Pair("Ulm", "Zürich"),
    Pair("The river of Ulm, as everybody who has been there knows, is the", "Rhine"),
    Pair("x", "y"),
    Pair("The capital of France is", "  Lyon "),
    Pair("Ada Brook lived in", "York", joined=False),
    *(Pair("The river " * n + "is", "Danube") for n in range(1, 8)),
]


def _one_by_one(model, tokenizer, pair):
    """Log-probabilities by the plainest way: one text, no padding, all logits."""
    target = pair.target.strip()
    n = len(tokenizer(pair.prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{pair.prompt} {target}")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    return [logits[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1])]


def test_scores_equal_the_plain_way(tiny):
    model, tokenizer = tiny
    for pair, score in zip(PAIRS, Scorer(model, tokenizer, batch_size=4).score(PAIRS), strict=True):
        assert score.log_probs == pytest.approx(_one_by_one(model, tokenizer, pair), abs=1e-5), pair
        assert tokenizer.decode(score.target_ids).strip() == pair.target.strip()
        assert score.nll == pytest.approx(-sum(score.log_probs) / len(score.log_probs))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch(tiny, batch_size, side):
    model, tokenizer = tiny
    reference = Scorer(model, tokenizer, batch_size=1).score(PAIRS)
    scores = Scorer(model, tokenizer, batch_size=batch_size, padding_side=side).score(PAIRS)
    for expected, score in zip(reference, scores, strict=True):
        assert score.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
        assert score.argmax == expected.argmax
        assert score.target_ids == expected.target_ids


def test_head_sees_target_positions_only(tiny):
    model, tokenizer = tiny
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    scores = Scorer(model, tokenizer).score(PAIRS[:3])
    hook.remove()
    assert sum(seen) == sum(len(score.target_ids) for score in scores)


def test_what_cannot_be_scored_has_a_reason(tiny):
    model, tokenizer = tiny
    pairs = [Pair("The capital", " "), Pair(" ", "Lyon"), Pair("The river " * 60, "Rhine"), PAIRS[0]]
    scores = Scorer(model, tokenizer).score(pairs)
    reasons = [score.reason if isinstance(score, Unscorable) else "" for score in scores]
    assert "target is empty" in reasons[0]
    assert "prompt is empty" in reasons[1]
    assert "the model takes 128" in reasons[2]
    assert isinstance(scores[3], PairScore)


def test_logits_that_are_not_finite_are_no_score(tiny_llama):
    model, tokenizer = tiny_llama
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert "not finite" in Scorer(model, tokenizer).score(PAIRS[:1])[0].reason


def test_ties_are_counted_and_broken_by_lowest_id(tiny_llama):
    model, tokenizer = tiny_llama
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = Scorer(model, tokenizer).score(PAIRS[:1])[0]
    assert score.ties == len(score.target_ids)
    assert set(score.argmax) == {0}


def test_training_flags_are_put_back(tiny_llama):
    model, tokenizer = tiny_llama
    model.train()
    model.model.layers[0].eval()
    Scorer(model, tokenizer).score(PAIRS[:1])
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tiny_llama, dtype):
    model, tokenizer = tiny_llama
    reference = Scorer(model, tokenizer).score(PAIRS)
    scores = Scorer(model.to(dtype), tokenizer).score(PAIRS)
    tolerance = 1e-4 if dtype is torch.float64 else 1.0
    for expected, score in zip(reference, scores, strict=True):
        assert score.log_probs == pytest.approx(expected.log_probs, abs=tolerance)


def test_batch_size_must_be_positive(tiny):
    with pytest.raises(ValueError, match="batch_size"):
        Scorer(*tiny, batch_size=0)


@pytest.mark.parametrize(
    "name", ["tokenizers/gpt2", "tokenizers/gpt-neox", "tokenizers/llama2", "factlm-llama"]
)
def test_targets_begin_where_the_prompt_ends(tiny_llama, name):
    from transformers import AutoTokenizer

    folder = data_folder("models", name)
    records = load_records(data_folder("data", "counterfact", "counterfact-val.json.gz"), limit=150)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ValueError as error:  # a tokenizer saved by a newer transformers
        pytest.skip(str(error))
    scorer = Scorer(tiny_llama[0], tokenizer)
    for record in records:
        encoded = scorer.encode(Pair(record.fact.text, record.fact.target_new))
        assert encoded.start == len(tokenizer(record.fact.text)["input_ids"])
        assert tokenizer.decode(encoded.ids[encoded.start :]).strip() == record.fact.target_new
        assert scorer.encode(Pair(record.fact.text, record.fact.target_new, joined=False)).ids == encoded.ids
