"""Demonstrations of editing in a context: how a new fact is copied, followed, and left aside (Zheng et al. 2023).

A demonstration is a block of two lines, a fact and a prompt with its answer. *Copy* asks the fact's own prompt,
*update* a rephrasing, whose answer is the new one as well, *retain* a prompt that the fact does not bear on, with its
true answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Record, load_records
from ..errors import InvalidFact
from ..facts import Fact, validate_facts
from .sentences import SentenceEncoder

KINDS = ("copy", "update", "retain")
BLOCK = "New Fact: {fact}\nPrompt: {prompt}"


@dataclass(frozen=True)
class Example:
    """A fact to demonstrate with.

    Attributes:
        fact: the fact.
        rephrased: other wordings of its prompt.
        unrelated: prompts that it does not bear on, with their true answers.
    """

    fact: Fact
    rephrased: list[str] = field(default_factory=list)
    unrelated: list[tuple[str, str]] = field(default_factory=list)

    def can(self, kind: str) -> bool:
        """Whether it can be shown as a demonstration of this kind."""
        return kind == "copy" or bool(self.rephrased if kind == "update" else self.unrelated)

    def block(self, kind: str, template: str, rng: random.Random) -> str:
        """The demonstration as text."""
        prompt, answer = self.fact.text, self.fact.target_new
        if kind == "update":
            prompt = rng.choice(self.rephrased)
        elif kind == "retain":
            prompt, answer = rng.choice(self.unrelated)
        return filled(template, self.fact, f"{prompt} {answer.strip()}")


def filled(template: str, fact: Fact, prompt: str) -> str:
    """A block: ``{fact}`` is the fact with its answer, ``{prompt}`` a prompt."""
    return template.replace("{fact}", fact.text + fact.target).replace("{prompt}", prompt)


def examples_of(items: Iterable[Record | Fact | Mapping[str, Any]]) -> list[Example]:
    """Records of a data set, or bare facts, as examples; facts by themselves can be copied only."""
    found = []
    facts: list[Any] = []
    for item in items:
        if not isinstance(item, Record):
            facts.append(item)
            continue
        unrelated = [
            (each.prompt, each.answers[0])
            for items in item.locality.values()
            for each in items
            if each.answers
        ]
        if item.target_true:
            unrelated += [(prompt, item.target_true) for prompt in item.neighborhood]
        unrelated = list(dict.fromkeys(pair for pair in unrelated if all(part.strip() for part in pair)))
        found += [Example(fact, list(rephrased), unrelated) for fact, rephrased in item.edits]
    return found + [Example(fact) for fact in (validate_facts(facts) if facts else [])]


def load_examples(source: str | Path | Iterable[Any]) -> list[Example]:
    """Examples of a file of records in any known format, or of records and facts.

    Raises:
        InvalidFact: there are none.
    """
    items: Iterable[Any] = load_records(source) if isinstance(source, (str, Path)) else source
    examples = examples_of(items)
    if not examples:
        raise InvalidFact("there are no facts to demonstrate with")
    return examples


def kinds(k: int, ratio: Sequence[float], rng: random.Random) -> list[str]:
    """The kinds of k demonstrations in shuffled order, in the ratio copy : update : retain."""
    total = sum(ratio)
    n_copy = round(k * ratio[0] / total)
    n_update = min(k - n_copy, round(k * ratio[1] / total))
    found = ["copy"] * n_copy + ["update"] * n_update + ["retain"] * (k - n_copy - n_update)
    rng.shuffle(found)
    return found


class Demonstrator:
    """Chooses demonstrations for facts: the examples whose facts are nearest.

    Args:
        examples: at least one.
        encoder: embeds facts with their answers.
        template: of a block.
        ratio: copy : update : retain.
        seed: of the order of the kinds and of which prompts are shown.
        keep_subject: whether examples about the subject of the edit itself may be shown.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: SentenceEncoder,
        template: str,
        ratio: Sequence[float],
        seed: int,
        *,
        keep_subject: bool = False,
    ) -> None:
        self.examples, self.encoder, self.template, self.ratio = list(examples), encoder, template, ratio
        self.seed, self.keep_subject = seed, keep_subject
        self._keys: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """(m, d) embeddings of the examples' facts, made at first use."""
        if self._keys is None:
            self._keys = self.encoder.embed([_sentence(example.fact) for example in self.examples])
        return self._keys

    def blocks(self, fact: Fact, k: int) -> list[tuple[str, str]]:
        """At most k demonstrations for a fact, kind and text of each, the nearest first.

        An example that cannot be shown as the kind it was drawn for is shown as the next kind that it can.
        """
        scores = self.keys @ self.encoder.embed([_sentence(fact)])[0]
        rng = random.Random(f"{self.seed} {fact.text} {fact.target}")
        drawn = kinds(k, self.ratio, rng)
        found: list[tuple[str, str]] = []
        for number in torch.sort(scores, descending=True, stable=True).indices.tolist():
            if len(found) == k:
                break
            example = self.examples[number]
            if not self.keep_subject and _same(example.fact.subject, fact.subject):
                continue
            start = KINDS.index(drawn[len(found)])
            kind = next(each for each in (*KINDS[start:], *KINDS[:start]) if example.can(each))
            found.append((kind, example.block(kind, self.template, rng)))
        return found


def _sentence(fact: Fact) -> str:
    return fact.text + fact.target


def _same(a: str, b: str) -> bool:
    return a.casefold().strip() == b.casefold().strip()
