"""The metrics, as pure functions on numbers and text.

Sources: Meng et al. 2022 (CounterFact success, magnitude, S, fluency, consistency); Yao et al. 2023
(token accuracy, agreement); arXiv 2502.11177 (normalised exact match); Rajpurkar et al. 2016 (token F1).
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Words, numbers with their inner marks, contracted endings, and single marks.
_WORDS = re.compile(
    r"(?:'(?:s|re|ve|ll|d|m)\b)|n't\b|\w+?(?=n't\b)|\d+(?:[.,:]\d+)*|[^\W\d_]+(?:[-.][^\W\d_]+)*|\w+|\.\.\.|--|[^\w\s]",
    re.IGNORECASE,
)
_TFIDF_WORDS = re.compile(r"\b\w\w+\b")


# --- accuracies on tokens -------------------------------------------------------------------------------


def token_accuracy(hits: Sequence[bool]) -> float:
    """tacc: the share of target tokens that are the argmax, the earlier target tokens given."""
    if not len(hits):
        raise ValueError("token_accuracy: the target has no tokens")
    return sum(map(bool, hits)) / len(hits)


def exact_match(hits: Sequence[bool]) -> float:
    """exact: 1 if every target token is the argmax, else 0."""
    if not len(hits):
        raise ValueError("exact_match: the target has no tokens")
    return float(all(hits))


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """The share of positions with the same argmax before and after the edit, right or wrong."""
    if len(before) != len(after) or not before:
        raise ValueError(f"agreement: two predictions of one length are needed, got {before!r} and {after!r}")
    return sum(b == a for b, a in zip(before, after, strict=True)) / len(before)


# --- probabilities --------------------------------------------------------------------------------------


def success(better: Sequence[float], worse: Sequence[float]) -> float:
    """The share of prompts where ``better`` has the lower length-normalised NLL; a tie is a failure."""
    _same_length("success", better, worse)
    return sum(b < w for b, w in zip(better, worse, strict=True)) / len(better)


def magnitude(better: Sequence[float], worse: Sequence[float]) -> float:
    """The mean of exp(−better) − exp(−worse): the difference of geometric-mean token probabilities."""
    _same_length("magnitude", better, worse)
    return sum(math.exp(-b) - math.exp(-w) for b, w in zip(better, worse, strict=True)) / len(better)


def _same_length(name: str, first: Sequence[float], second: Sequence[float]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{name}: two lists of one length are needed, got {len(first)} and {len(second)}")


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean; 0 if any value is 0."""
    if not len(values):
        raise ValueError("harmonic_mean: no values")
    if min(values) < 0:
        raise ValueError(f"harmonic_mean: a value is negative: {list(values)}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def perplexity(nll: Sequence[float], *, n_tokens: int | None = None) -> float:
    """Exp of the mean NLL over the scored tokens; infinite if that leaves the range of floats.

    Args:
        nll: the NLL of each scored token (N − 1 of a text of N tokens).
        n_tokens: another denominator; some published code divides by N.
    """
    if not len(nll):
        raise ValueError("perplexity: no scored tokens")
    mean = math.fsum(nll) / (n_tokens or len(nll))
    return math.exp(mean) if mean < 709.0 else math.inf


def share_probable(nll: Sequence[float], probability: float = 0.8) -> float:
    """The share of tokens whose probability is above ``probability`` (WISE's out-of-distribution score)."""
    if not len(nll):
        raise ValueError("share_probable: no scored tokens")
    return sum(value < -math.log(probability) for value in nll) / len(nll)


# --- text -----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Split text into words and marks, for :func:`ngram_entropy`.

    Like NLTK's word tokeniser in what matters for repetition: marks and the endings ``'s``, ``n't``,
    ``'re`` ... are tokens of their own, hyphenated words stay whole. Unlike it, straight quotes stay as they
    are, a full stop leaves its word whether or not it ends the text (``etc.`` gives two tokens), and
    there is no list of fixed phrases (``cannot``, ``gonna``). Averaged over texts of a hundred tokens the
    fluency differs from NLTK's by about 0.01 (1 after the usual times 100), on single texts by up to 0.2.
    """
    return _WORDS.findall(text)


def ngram_entropy(tokens: Sequence[str] | str) -> float:
    """Fluency of one text: the mean of 2/3·H₂ and 4/3·H₃, with Hₙ the entropy of its n-grams in bits.

    Repetition lowers it. Tables show it times 100. A text too short for an n-gram counts 0 for that n.
    """
    tokens = words(tokens) if isinstance(tokens, str) else list(tokens)
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


def _entropy(tokens: Sequence[str], n: int) -> float:
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return -math.fsum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0


def clean_generation(text: str) -> str:
    """Generated text as CounterFact scores it: NFKD, double newlines to spaces, the end mark removed."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ").replace("<|endoftext|>", "")


class TfIdf:
    """TF-IDF vectors with the definitions of scikit-learn's defaults.

    Lower-cased words of two or more characters; idf = ln((1 + n)/(1 + df)) + 1; vectors of length one.

    Args:
        texts: the collection from which the vocabulary and the document frequencies are taken.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        frequency: Counter[str] = Counter()
        n_texts = 0
        for text in texts:
            n_texts += 1
            frequency.update(set(self._terms(text)))
        if not frequency:
            raise ValueError("TfIdf: the texts hold no words")
        self.idf = {term: math.log((1 + n_texts) / (1 + df)) + 1 for term, df in frequency.items()}

    @staticmethod
    def _terms(text: str) -> list[str]:
        return _TFIDF_WORDS.findall(text.lower())

    def vector(self, text: str) -> dict[str, float]:
        """The vector of ``text``, sparse, of Euclidean length one (empty if no word is known)."""
        counts = Counter(term for term in self._terms(text) if term in self.idf)
        weights = {term: count * self.idf[term] for term, count in counts.items()}
        length = math.sqrt(math.fsum(w * w for w in weights.values()))
        return {term: w / length for term, w in weights.items()} if length else {}

    def similarity(self, first: str, second: str) -> float:
        """Consistency: the cosine of the two texts' vectors, 0 to 1."""
        a, b = self.vector(first), self.vector(second)
        return math.fsum(weight * b.get(term, 0.0) for term, weight in a.items())


def normalise_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, the words a, an, the removed, white space collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def em(answer: str, gold: Sequence[str]) -> float:
    """1 if the normalised answer equals one of the normalised gold answers."""
    normalised = normalise_answer(answer)
    return float(any(normalised == normalise_answer(g) for g in gold))


def contains(answer: str, gold: Sequence[str], others: Sequence[str] = ()) -> float:
    """1 if a gold answer stands in the answer as whole words and none of ``others`` stands before it.

    All are normalised first. An ``others`` entry that is itself part of the gold answer found at the same
    place does not count against it.
    """
    text = f" {normalise_answer(answer)} "
    found = [place for place in (_find(text, g) for g in gold) if place >= 0]
    if not found:
        return 0.0
    golds = {normalise_answer(g) for g in gold}
    rivals = (_find(text, o) for o in others if normalise_answer(o) not in golds)
    return float(not any(0 <= place < min(found) for place in rivals))


def _find(text: str, wanted: str) -> int:
    normalised = normalise_answer(wanted)
    return text.find(f" {normalised} ") if normalised else -1


def f1(answer: str, gold: Sequence[str]) -> float:
    """The best SQuAD token F1 of the answer against the gold answers."""
    return max(
        (_f1(normalise_answer(answer).split(), normalise_answer(g).split()) for g in gold), default=0.0
    )


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


# --- spread ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over records with its spread.

    Attributes:
        mean: the mean; ``se`` its standard error (0 for one record).
        low: lower end of the 95 % interval, ``high`` its upper end.
        n: number of records averaged.
        interval: how the interval was made: ``wilson`` or ``bootstrap``, ``none`` for a single value.
    """

    mean: float
    se: float
    low: float
    high: float
    n: int
    interval: str


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion."""
    if n <= 0:
        raise ValueError(f"wilson_interval: n must be positive, got {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, repeats: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over ``repeats`` resamples, from a fixed seed."""
    means = bootstrap_means(np.asarray(values, dtype=np.float64)[:, None], seed=seed, repeats=repeats)[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, *, seed: int = 0, repeats: int = 1000) -> np.ndarray:
    """Means of resamples of the rows of ``values`` (n, k), shape (repeats, k)."""
    if not len(values):
        raise ValueError("bootstrap: no values")
    generator = np.random.default_rng(seed)
    n = len(values)
    means = np.empty((repeats, values.shape[1]))
    for i in range(repeats):
        means[i] = values[generator.integers(0, n, n)].mean(axis=0)
    return means


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean, standard error and 95 % interval: Wilson's if all values are 0 or 1, else bootstrap.

    Raises:
        ValueError: no values, or one that is not finite: what cannot be scored must be excluded and counted.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"estimate: finite values are needed, got {array.size} with "
            f"{int((~np.isfinite(array)).sum())} not finite"
        )
    n, mean = int(array.size), float(array.mean())
    se = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    if np.isin(array, (0.0, 1.0)).all():
        low, high = wilson_interval(float(array.sum()), n)
        return Estimate(mean, se, low, high, n, "wilson")
    if n == 1:
        return Estimate(mean, se, mean, mean, n, "none")
    low, high = bootstrap_interval(array, seed=seed)
    return Estimate(mean, se, low, high, n, "bootstrap")
