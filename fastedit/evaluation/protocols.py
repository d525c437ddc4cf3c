"""The protocols that score records: what each asks of the model, and how it turns that into numbers.

A protocol is told a record and asks for scores of (prompt, target) pairs and for generated answers. The
evaluator collects what all protocols ask, runs the model once over it, and hands the answers back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import Item, Record, Snippets
from . import metrics
from .scoring import Pair, PairScore, Unscorable

Judge = Callable[[str, str, str], bool]


class NotApplicableError(Exception):
    """A record cannot be scored by a protocol; the message is the reason."""


@dataclass
class Answers:
    """What the model gave for one record.

    Attributes:
        pairs: scores by pair; texts: greedy answers by prompt; samples: sampled texts by prompt.
        pair_of, text_of and sample_of look them up and note what is missing in ``left_out``.
    """

    pairs: Mapping[Pair, PairScore | Unscorable]
    texts: Mapping[str, str | Unscorable]
    samples: Mapping[str, str | Unscorable]
    left_out: list[str] = field(default_factory=list)

    def pair_of(self, pair: Pair, what: str) -> PairScore | None:
        """The score of a pair; None, with the reason noted, if there is none."""
        return self._usable(self.pairs[pair], what)

    def text_of(self, prompt: str, what: str) -> str | None:
        """The greedy answer to a prompt; None, with the reason noted, if there is none."""
        return self._usable(self.texts[prompt], what)

    def sample_of(self, prompt: str, what: str) -> str | None:
        """The sampled text of a prompt; None, with the reason noted, if there is none."""
        return self._usable(self.samples[prompt], what)

    def _usable(self, value: Any, what: str) -> Any:
        if isinstance(value, Unscorable):
            self.left_out.append(f"{what}: {value.reason}")
            return None
        return value


@dataclass
class Row:
    """The numbers of one record.

    Attributes:
        metrics: name to value; a metric without items is absent.
        outputs: generated texts, for people to read.
        keep: what the unedited model's row keeps for comparison after the edit.
    """

    metrics: dict[str, float]
    outputs: dict[str, Any] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)


class Protocol(ABC):
    """One way of scoring records.

    ``id`` names it. ``pairs``, ``prompts`` and ``samples`` say what is asked of the model for a record.
    """

    id: str

    @abstractmethod
    def check(self, record: Record) -> None:
        """Raise :class:`NotApplicableError` with the reason if the record lacks what the protocol needs."""

    def pairs(self, record: Record) -> list[Pair]:
        """Teacher-forced pairs to score."""
        return []

    def prompts(self, record: Record) -> list[str]:
        """Prompts to answer greedily."""
        return []

    def samples(self, record: Record) -> list[str]:
        """Prompts to continue by sampling."""
        return []

    @abstractmethod
    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """The record's numbers.

        ``before`` is what the unedited model's row kept, None for that row itself.
        """

    def applies(self, record: Record) -> bool:
        """Whether the record has what the protocol needs."""
        try:
            self.check(record)
        except NotApplicableError:
            return False
        return True


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _put(into: dict[str, float], name: str, values: Sequence[float]) -> None:
    if values:
        into[name] = _mean(values)


class EasyEditTf(Protocol):
    """``easyedit.tf``: teacher-forced token accuracy.

    Reliability and generality are tacc against the new answer, portability tacc against its first answer,
    locality the share of positions where the argmax is that of the unedited model, right or wrong
    (``locality.gold`` is tacc against the right answer). ``old_answer`` is tacc of the answer that was right
    before. Kinds are averaged within a record first.
    """

    id = "easyedit.tf"

    def check(self, record: Record) -> None:
        """Every record has an edit prompt."""

    def pairs(self, record: Record) -> list[Pair]:
        """Prompts with their targets, joined with a space."""
        pairs = []
        for fact, rephrase in record.edits:
            pairs += [Pair(prompt, fact.target_new) for prompt in (fact.text, *rephrase)]
        if record.target_true:
            pairs.append(Pair(record.fact.text, record.target_true))
        items = [
            item
            for group in (record.locality, record.portability)
            for kind in group.values()
            for item in kind
        ]
        return pairs + [Pair(item.prompt, item.answers[0]) for item in items if item.answers]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        row = Row({})
        self._accuracy(row, answers, "reliability", [(f.text, f.target_new) for f in record.facts])
        if "reliability.tacc" not in row.metrics:
            raise NotApplicableError("; ".join(answers.left_out))
        rephrased = [(prompt, fact.target_new) for fact, rephrase in record.edits for prompt in rephrase]
        self._accuracy(row, answers, "generality", rephrased)
        if record.target_true:
            self._accuracy(row, answers, "old_answer", [(record.fact.text, record.target_true)])
        self._portability(row, record, answers)
        self._locality(row, record, answers, before)
        return row

    @staticmethod
    def _accuracy(row: Row, answers: Answers, name: str, asked: Iterable[tuple[str, str]]) -> None:
        scores = [s for p, t in asked if (s := answers.pair_of(Pair(p, t), name)) is not None]
        _put(row.metrics, f"{name}.tacc", [metrics.token_accuracy(s.hits) for s in scores])
        _put(row.metrics, f"{name}.exact", [metrics.exact_match(s.hits) for s in scores])

    def _portability(self, row: Row, record: Record, answers: Answers) -> None:
        means = []
        for kind, items in record.portability.items():
            values = [
                metrics.token_accuracy(s.hits) for _, s in self._scores(answers, f"portability.{kind}", items)
            ]
            _put(row.metrics, f"portability.{kind}.tacc", values)
            means += [_mean(values)] if values else []
        _put(row.metrics, "portability.tacc", means)

    def _locality(self, row: Row, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> None:
        agreed, right = [], []
        for kind, items in record.locality.items():
            scores = self._scores(answers, f"locality.{kind}", items)
            values, golds = [], []
            for number, score in scores:
                name = f"{kind}.{number}"
                row.keep[name] = list(score.argmax)
                kept = score.argmax if before is None else before.get(name)
                golds.append(metrics.token_accuracy(score.hits))
                if kept is None:
                    answers.left_out.append(f"locality.{name}: not scored before the edit")
                else:
                    values.append(metrics.agreement(list(kept), list(score.argmax)))
            _put(row.metrics, f"locality.{kind}.agreement", values)
            agreed += [_mean(values)] if values else []
            right += [_mean(golds)] if golds else []
        _put(row.metrics, "locality.agreement", agreed)
        _put(row.metrics, "locality.gold", right)

    @staticmethod
    def _scores(answers: Answers, what: str, items: Sequence[Item]) -> list[tuple[int, PairScore]]:
        scores = []
        for number, item in enumerate(items):
            if not item.answers:
                answers.left_out.append(f"{what}: the item has no answer")
                continue
            score = answers.pair_of(Pair(item.prompt, item.answers[0]), what)
            if score is not None:
                scores.append((number, score))
        return scores


class _CounterFact(Protocol):
    """What the CounterFact protocols share: rewrite, paraphrase and neighborhood prompts, two targets."""

    def check(self, record: Record) -> None:
        """The record needs a right answer that differs from the new one, and neighborhood prompts."""
        if not record.target_true or not record.neighborhood:
            raise NotApplicableError("the record has no target_true or no neighborhood prompts")

    def groups(self, record: Record) -> dict[str, list[str]]:
        """Prompts by group."""
        return {
            "rewrite": [record.fact.text],
            "paraphrase": record.rephrase,
            "neighborhood": record.neighborhood,
        }

    def targets(self, record: Record) -> tuple[str, str]:
        """The new and the right answer."""
        return record.fact.target_new, record.target_true or ""


class CfProb(_CounterFact):
    """``cf.prob``: whether the new answer is more probable than the right one, by length-normalised NLL.

    ES, PS and NS are the shares of prompts where the wanted answer has the lower NLL (equal is a failure),
    EM, PM and NM the mean differences of the geometric-mean token probabilities.
    """

    id = "cf.prob"

    def pairs(self, record: Record) -> list[Pair]:
        """Both targets on all prompts."""
        prompts = [prompt for group in self.groups(record).values() for prompt in group]
        return [Pair(prompt, target) for prompt in prompts for target in self.targets(record)]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        row = Row({})
        new, true = self.targets(record)
        for letter, (group, prompts) in zip("EPN", self.groups(record).items(), strict=True):
            wanted, other = [], []
            for prompt in prompts:
                pair = [answers.pair_of(Pair(prompt, target), group) for target in (new, true)]
                if pair[0] is not None and pair[1] is not None:
                    wanted.append(pair[0].nll)
                    other.append(pair[1].nll)
            if letter == "N":
                wanted, other = other, wanted
            if wanted:
                row.metrics[f"{letter}S"] = metrics.success(wanted, other)
                row.metrics[f"{letter}M"] = metrics.magnitude(wanted, other)
        if "ES" not in row.metrics:
            raise NotApplicableError("; ".join(answers.left_out))
        return row


class CfAcc(_CounterFact):
    """``cf.acc``: teacher-forced exact match of the new answer (rewrite, paraphrase) and of the right one."""

    id = "cf.acc"

    def _asked(self, record: Record) -> list[tuple[str, str, str]]:
        new, true = self.targets(record)
        return [
            (group, prompt, true if group == "neighborhood" else new)
            for group, prompts in self.groups(record).items()
            for prompt in prompts
        ]

    def pairs(self, record: Record) -> list[Pair]:
        """The wanted target on all prompts."""
        return [Pair(prompt, target) for _, prompt, target in self._asked(record)]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        values: dict[str, list[float]] = {}
        for group, prompt, target in self._asked(record):
            score = answers.pair_of(Pair(prompt, target), group)
            if score is not None:
                values.setdefault(group, []).append(metrics.exact_match(score.hits))
        if "rewrite" not in values:
            raise NotApplicableError("; ".join(answers.left_out))
        return Row({f"{group}.exact": _mean(value) for group, value in values.items()})


class ZsreMemit(Protocol):
    """``zsre.memit``: token accuracy of the right answer, ids of prompt and answer put together.

    The records must teach ``answers[0]`` (``load_records(path, zsre_answer="true")``). The neighborhood
    prompt is ``loc`` with a question mark, scored against its gold answer, not the unedited model.
    """

    id = "zsre.memit"

    def check(self, record: Record) -> None:
        """The record must be zsRE's and teach its right answer."""
        if not record.source.startswith("zsre"):
            raise NotApplicableError("the record is not from zsRE")
        if record.taught != "true":
            raise NotApplicableError("the record teaches `alt`: load it with zsre_answer='true'")

    @staticmethod
    def _asked(record: Record) -> list[tuple[str, Pair]]:
        fact = record.fact
        asked = [("rewrite", Pair(fact.text, fact.target_new, False))]
        asked += [("paraphrase", Pair(prompt, fact.target_new, False)) for prompt in record.rephrase]
        items = record.locality.get("neighborhood", [])
        return asked + [("neighborhood", Pair(i.prompt, i.answers[0], False)) for i in items if i.answers]

    def pairs(self, record: Record) -> list[Pair]:
        """Rewrite, paraphrase and neighborhood prompts."""
        return [pair for _, pair in self._asked(record)]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        values: dict[str, list[float]] = {}
        for group, pair in self._asked(record):
            score = answers.pair_of(pair, group)
            if score is not None:
                values.setdefault(group, []).append(metrics.token_accuracy(score.hits))
        if "rewrite" not in values:
            raise NotApplicableError("; ".join(answers.left_out))
        return Row({f"{group}.tacc": _mean(value) for group, value in values.items()})


class WisePpl(Protocol):
    """``wise.ppl``: perplexity of the new answer, a text, given the prompt (WISE's hallucination set).

    ``ppl`` is exp of the answer's length-normalised NLL, ``ppl.clipped`` at most 100, since a few records are above
    a thousand, ``nll`` its logarithm. Results also have the median and exp of the mean NLL
    (:func:`fastedit.evaluation.results.summarise`).
    """

    id = "wise.ppl"

    def check(self, record: Record) -> None:
        """The record must be of the flat format that WISE's sets have."""
        if record.source not in ("flat", "wise.temporal"):
            raise NotApplicableError(
                f"the record is of format {record.source}, not flat or wise.temporal as WISE's sets"
            )

    def pairs(self, record: Record) -> list[Pair]:
        """The prompt and the new answer."""
        return [Pair(record.fact.text, record.fact.target_new)]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        score = answers.pair_of(self.pairs(record)[0], "rewrite")
        if score is None:
            raise NotApplicableError("; ".join(answers.left_out))
        ppl = metrics.perplexity([-p for p in score.log_probs])
        return Row({"nll": score.nll, "ppl": ppl, "ppl.clipped": min(ppl, 100.0)})


class WiseOod(Protocol):
    """``wise.ood``: how surely the model says the new answer, and another text about the same thing (WISE, eq. 10).

    ``rewrite`` is the new answer after the prompt, ``ood`` the text ``ood_rephrase`` by itself, all of it after its
    first word. ``share`` is the share of tokens with a probability above 0.8; ``sure`` is 1 if the geometric mean of
    the tokens' probabilities is above 0.8. The published code has one key for both, where the second remains.
    """

    id = "wise.ood"

    def check(self, record: Record) -> None:
        """The record needs ``ood_rephrase``, a text of two words or more."""
        if len(str(record.raw.get("ood_rephrase") or "").split()) < 2:
            raise NotApplicableError("the record has no ood_rephrase")

    @staticmethod
    def _asked(record: Record) -> dict[str, Pair]:
        first, _, rest = str(record.raw["ood_rephrase"]).strip().partition(" ")
        return {"rewrite": Pair(record.fact.text, record.fact.target_new), "ood": Pair(first, rest)}

    def pairs(self, record: Record) -> list[Pair]:
        """The new answer after the prompt, and the text."""
        return list(self._asked(record).values())

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        row = Row({})
        for name, pair in self._asked(record).items():
            score = answers.pair_of(pair, name)
            if score is not None:
                row.metrics[f"{name}.share"] = metrics.share_probable([-p for p in score.log_probs])
                row.metrics[f"{name}.sure"] = metrics.share_probable([score.nll])
        if not row.metrics:
            raise NotApplicableError("; ".join(answers.left_out))
        return row


class Wild(Protocol):
    """``wild``: free greedy answers with natural stops.

    ``em`` (normalised, any alias), ``contains`` (a gold answer as whole words, the old answer not before
    it), ``f1`` (SQuAD) and, with a judge, ``judge``. Locality is equality of the whole answer with that of
    the unedited model, and ``em`` against the right answer. Of every list of prompts (rephrase, each kind of
    locality and portability) the first ``items_per_kind`` are asked; None asks all.
    """

    id = "wild"

    def __init__(self, *, judge: Judge | None = None, items_per_kind: int | None = 1) -> None:
        self.judge = judge
        self.items_per_kind = items_per_kind

    def check(self, record: Record) -> None:
        """Every record has an edit prompt."""

    def _asked(self, record: Record) -> list[tuple[str, str, list[str], list[str]]]:
        """(metric group, prompt, gold answers, rivals) of everything but locality."""
        asked = []
        for number, (fact, rephrase) in enumerate(record.edits):
            gold = record.answers_new if number == 0 else [fact.target_new.strip()]
            rivals = record.true_answers if number == 0 else [fact.target_old or ""]
            asked.append(("reliability", fact.text, gold, rivals))
            asked += [("generality", prompt, gold, rivals) for prompt in rephrase[: self.items_per_kind]]
        for kind, items in record.portability.items():
            asked += [(f"portability.{kind}", i.prompt, i.answers, []) for i in items[: self.items_per_kind]]
        return asked

    def _kept(self, record: Record) -> list[tuple[str, Item]]:
        return [
            (f"{kind}.{number}", item)
            for kind, items in record.locality.items()
            for number, item in enumerate(items[: self.items_per_kind])
        ]

    def prompts(self, record: Record) -> list[str]:
        """All prompts of the record, as they are."""
        return [prompt for _, prompt, _, _ in self._asked(record)] + [i.prompt for _, i in self._kept(record)]

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        row = Row({})
        values: dict[str, list[float]] = {}
        for group, prompt, gold, rivals in self._asked(record):
            answer = answers.text_of(prompt, group)
            if answer is None or not gold:
                continue
            row.outputs.setdefault(group, []).append(answer)
            for name, value in self._judged(prompt, answer, gold, rivals).items():
                values.setdefault(f"{group}.{name}", []).append(value)
        if "reliability.em" not in values:
            raise NotApplicableError("; ".join(answers.left_out) or "no answer is given")
        self._locality(row, record, answers, before, values)
        row.metrics |= {name: _mean(value) for name, value in values.items()}
        return row

    def _judged(self, prompt: str, answer: str, gold: list[str], rivals: list[str]) -> dict[str, float]:
        values = {
            "em": metrics.em(answer, gold),
            "contains": metrics.contains(answer, gold, rivals),
            "f1": metrics.f1(answer, gold),
        }
        if self.judge is not None:
            values["judge"] = float(self.judge(prompt, gold[0], answer))
        return values

    def _locality(
        self,
        row: Row,
        record: Record,
        answers: Answers,
        before: Mapping[str, Any] | None,
        values: dict[str, list[float]],
    ) -> None:
        for name, item in self._kept(record):
            answer = answers.text_of(item.prompt, f"locality.{name}")
            if answer is None:
                continue
            row.keep[name] = answer
            row.outputs.setdefault("locality", []).append(answer)
            kept = answer if before is None else before.get(name)
            if kept is None:
                answers.left_out.append(f"locality.{name}: not answered before the edit")
            else:
                values.setdefault("locality.agreement", []).append(float(answer == kept))
            if item.answers:
                values.setdefault("locality.em", []).append(metrics.em(answer, item.answers))


class CfGen(Protocol):
    """``cf.gen``: fluency and consistency of sampled text (top 5, 100 tokens with the prompt).

    Fluency is the n-gram entropy of each text, averaged; consistency the TF-IDF cosine of all texts with the
    reference snippets of the new answer, IDF fitted on all snippets. Without snippets there is fluency only.
    """

    id = "cf.gen"

    def __init__(self, snippets: Snippets | None = None) -> None:
        self.snippets = snippets
        texts = [text for group in snippets.texts.values() for text in group] if snippets else []
        self._tfidf = metrics.TfIdf(texts) if texts else None

    def check(self, record: Record) -> None:
        """The record needs generation prompts."""
        if not record.generation_prompts:
            raise NotApplicableError("the record has no generation prompts")

    def samples(self, record: Record) -> list[str]:
        """The record's generation prompts, one sample each."""
        return list(dict.fromkeys(record.generation_prompts))

    def row(self, record: Record, answers: Answers, before: Mapping[str, Any] | None) -> Row:
        """See the class."""
        given = [answers.sample_of(prompt, "generation") for prompt in record.generation_prompts]
        texts = [metrics.clean_generation(text) for text in given if text is not None]
        if not texts:
            raise NotApplicableError("; ".join(answers.left_out))
        row = Row({"fluency": _mean([metrics.ngram_entropy(text) for text in texts])}, {"texts": texts})
        if self._tfidf is not None and self.snippets is not None:
            reference = self.snippets.texts.get(_snippet_key(record))
            if reference:
                row.metrics["consistency"] = self._tfidf.similarity(" ".join(texts), " ".join(reference))
            else:
                answers.left_out.append("consistency: there are no snippets for the new answer")
        return row


def _snippet_key(record: Record) -> tuple[str, str]:
    rewrite = record.raw.get("requested_rewrite", {})
    return str(rewrite.get("relation_id")), str(rewrite.get("target_new", {}).get("id"))
