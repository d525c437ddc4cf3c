"""Metrics on worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit.evaluation import metrics


def test_fluency_worked_value():
    tokens = ["a", "b", "a", "b", "a"]
    assert metrics._entropy(tokens, 2) == pytest.approx(1.0)
    assert metrics._entropy(tokens, 3) == pytest.approx(0.918296, abs=1e-6)
    assert metrics.ngram_entropy(tokens) == pytest.approx(0.945531, abs=1e-6)
    assert metrics.ngram_entropy("a b a b a") == pytest.approx(0.945531, abs=1e-6)
    assert metrics.ngram_entropy("") == 0.0
    assert metrics.ngram_entropy("one two") == 0.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [((98.90, 94.22, 67.88), 84.6106), ((96.14, 78.42, 87.66), 86.8029), ((50.0, 0.0, 90.0), 0.0)],
)
def test_harmonic_mean_worked_values(values, expected):
    assert metrics.harmonic_mean(values) == pytest.approx(expected, abs=1e-4)


def test_success_and_magnitude_worked_values():
    assert metrics.success([1.0, 3.0], [2.0, 2.0]) == 0.5
    assert metrics.magnitude([1.0, 3.0], [2.0, 2.0]) == pytest.approx(0.073498, abs=1e-6)
    assert metrics.success([2.0], [2.0]) == 0.0  # equal counts as failure on both sides


def test_token_accuracy_and_exact_worked_value():
    hits = [True, False, True]
    assert metrics.token_accuracy(hits) == pytest.approx(2 / 3)
    assert metrics.exact_match(hits) == 0.0
    assert metrics.exact_match([True]) == 1.0


def test_locality_worked_value():
    assert metrics.agreement([5, 7], [5, 8]) == 0.5
    assert metrics.token_accuracy([a == g for a, g in zip([5, 8], [5, 8], strict=True)]) == 1.0
    with pytest.raises(ValueError, match="one length"):
        metrics.agreement([1], [1, 2])


def test_normalisation_worked_values():
    assert metrics.normalise_answer("The  Eiffel-Tower.") == "eiffeltower"
    assert metrics.normalise_answer("An apple") == metrics.normalise_answer("apple")
    assert metrics.em("An apple", ["pear", "Apple!"]) == 1.0


def test_perplexity_worked_values():
    assert metrics.perplexity([1.0, 2.0]) == pytest.approx(4.4817, abs=1e-4)
    assert metrics.perplexity([1.0, 2.0], n_tokens=3) == pytest.approx(2.7183, abs=1e-4)
    assert metrics.perplexity([1e6]) == math.inf


def test_share_probable_worked_value():
    assert -math.log(0.8) == pytest.approx(0.22314, abs=1e-5)
    assert metrics.share_probable([0.1, 0.3, 0.2]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "gold", "others", "expected"),
    [
        ("It is Paris, the capital", ["Paris"], [], 1.0),
        ("It is Parisian", ["Paris"], [], 0.0),
        ("Lyon, not Paris", ["Paris"], ["Lyon"], 0.0),
        ("Paris, not Lyon", ["Paris"], ["Lyon"], 1.0),
        ("Paris", ["Paris"], ["paris"], 1.0),
        ("the Beatles", ["Beatles", "Wings"], [], 1.0),
        ("", ["Paris"], [], 0.0),
        ("Paris", [""], [], 0.0),
    ],
)
def test_contains(answer, gold, others, expected):
    assert metrics.contains(answer, gold, others) == expected


def test_f1():
    assert metrics.f1("the city of Lyon", ["Lyon city"]) == pytest.approx(0.8)
    assert metrics.f1("Lyon Lyon", ["Lyon"]) == pytest.approx(2 / 3)
    assert metrics.f1("", ["Lyon"]) == 0.0


def test_words_split_like_a_treebank():
    text = "Don't stop: the well-known U.S. cost 3,500.50 dollars (he's sure)..."
    expected = [
        "Do",
        "n't",
        "stop",
        ":",
        "the",
        "well-known",
        "U.S",
        ".",
        "cost",
        "3,500.50",
        "dollars",
        "(",
        "he",
    ]
    assert metrics.words(text) == [*expected, "'s", "sure", ")", "..."]


def test_clean_generation():
    assert metrics.clean_generation("a\n\nb ﬁ<|endoftext|>") == "a b fi"


def test_tfidf_by_hand():
    tfidf = metrics.TfIdf(["red mill", "red barn"])
    rare = math.log(3 / 2) + 1
    assert tfidf.idf == pytest.approx({"red": 1.0, "mill": rare, "barn": rare})
    length = math.sqrt(1 + rare * rare)
    assert tfidf.vector("Red mill!") == pytest.approx({"red": 1 / length, "mill": rare / length})
    assert tfidf.similarity("red mill", "red barn") == pytest.approx(1 / length**2)
    assert tfidf.similarity("red mill", "xyz") == 0.0


def test_wilson_interval():
    low, high = metrics.wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert metrics.wilson_interval(0, 10)[0] == 0.0
    assert metrics.wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_bootstrap_covers_the_mean_and_repeats():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = metrics.bootstrap_interval(values, seed=5)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert metrics.bootstrap_interval(values, seed=5) == (low, high)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_estimate_holds_its_mean(values):
    result = metrics.estimate(values)
    assert result.n == len(values)
    assert result.low - 1e-9 <= result.mean <= result.high + 1e-9 or result.interval == "bootstrap"


def test_estimate_names_its_interval():
    assert metrics.estimate([1.0, 0.0, 1.0]).interval == "wilson"
    assert metrics.estimate([0.5, 0.25]).interval == "bootstrap"
    assert metrics.estimate([0.5]).interval == "none"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_nan_enters_a_mean(values):
    with pytest.raises(ValueError, match="finite"):
        metrics.estimate(values)
