"""Training texts of the demo model, drawn afresh from ``facts.json``, a small grammar and ``neutral.txt``.

Everything is deterministic in the seed. A document is a list of pieces, each with the weight its tokens
have in the training loss: what cannot be predicted (a name that was just invented, the object of a
counterfactual statement) weighs nothing, what has to be known or looked up weighs most.

Kinds of documents:

- ``fact``: one to four true facts in any phrasing, often behind neutral sentences;
- ``description``: a short true paragraph about one subject;
- ``context``: facts, true or invented, are stated and then asked for, in one of the layouts
  ``CONTEXT_LAYOUTS``;
- ``easy``: the shortest form of ``context``, to begin with;
- ``copy``: a random word sequence, repeated;
- ``prose``: plain sentences;
- ``swap``: two facts of one relation in one phrasing whose answers are exchanged; the training loop
  exchanges the hidden states of the two subjects as well (see ``train.py``).
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

ANSWER_WEIGHT = 4.0
TEXT_WEIGHT = 0.3
NAME_WEIGHT = 0.05

CONTEXT_LAYOUTS = ("plain", "question", "ike", "update", "note", "passage")

_WORDS: dict[str, list[str]] = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))

NEUTRAL_SENTENCES = tuple(_WORDS["sentences"])


@dataclass(frozen=True)
class Piece:
    """A stretch of text, the loss weight of its tokens, and its role ("text", "subject" or "answer")."""

    text: str
    weight: float
    role: str = "text"


@dataclass(frozen=True)
class Document:
    """One training text.

    Pieces concatenate to the text; each piece tokenises independently of its neighbours, since it starts
    with a blank, a line break or punctuation and never ends with a blank.
    """

    pieces: tuple[Piece, ...]
    kind: str

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Relation:
    """One relation: prompts with ``{}`` for the subject, canonical first, and (subject, object) pairs."""

    name: str
    subject_type: str
    object_type: str
    templates: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    objects: tuple[str, ...]
    answers: dict[str, str] = field(repr=False)


@cache
def relations() -> tuple[Relation, ...]:
    """The relations of ``facts.json``, in file order."""
    data: dict[str, Any] = json.loads((FOLDER / "facts.json").read_text(encoding="utf-8"))
    out = []
    for entry in data["relations"]:
        facts = tuple((subject, obj) for subject, obj in entry["facts"])
        out.append(
            Relation(
                name=entry["name"],
                subject_type=entry["subject_type"],
                object_type=entry["object_type"],
                templates=tuple(template["text"] for template in entry["templates"]),
                facts=facts,
                objects=tuple(dict.fromkeys(obj for _, obj in facts)),
                answers=dict(facts),
            )
        )
    return tuple(out)


@cache
def neutral_text() -> str:
    """The packaged neutral prose, a few thousand tokens of plain English without facts of the model."""
    return (FOLDER / "neutral.txt").read_text(encoding="utf-8")


@cache
def _neutral_paragraphs() -> tuple[str, ...]:
    return tuple(paragraph for paragraph in neutral_text().split("\n") if paragraph)


# -- invented names -------------------------------------------------------------------------------


def _invented_word(rng: random.Random) -> str:
    syllables = [
        rng.choice(_WORDS["onsets"]) + rng.choice(_WORDS["vowels"]) + rng.choice(_WORDS["codas"])
        for _ in range(rng.choice((1, 1, 2)))
    ]
    return ("".join(syllables) + rng.choice(_WORDS["endings"])).capitalize()


def held_out(*names: str) -> bool:
    """Whether a combination of names is kept out of training (one in twelve, by checksum)."""
    return zlib.crc32("|".join(names).encode()) % 12 == 0


def invented_name(rng: random.Random, *, unseen: bool = False) -> str:
    """An invented name of one to three words; with ``unseen``, one that training never shows."""
    while True:
        name = " ".join(_invented_word(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
        if held_out(name) == unseen:
            return name


# -- prose ----------------------------------------------------------------------------------------


def _someone(rng: random.Random) -> str:
    return rng.choice(_WORDS["names"]) if rng.random() < 0.5 else rng.choice(_WORDS["people"])


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    """Lower the first letter of a prompt that goes on after a clause ("Imagine that the capital ...")."""
    word = text.split(" ", 1)[0]
    return text if word == "{}" or "{" in word else text[:1].lower() + text[1:]


def plain_sentence(rng: random.Random) -> str:
    """One sentence of everyday prose from a small grammar."""

    def draw(slot: re.Match[str]) -> str:
        return _someone(rng) if slot[1] == "someone" else rng.choice(_WORDS[slot[1]])

    text = re.sub(r"<(\w+)>", draw, rng.choice(_WORDS["forms"]))
    return _upper_first(text) + "."


def plain_paragraph(rng: random.Random, sentences: int) -> str:
    """A paragraph of everyday prose."""
    return " ".join(plain_sentence(rng) for _ in range(sentences))


def context_prefix(rng: random.Random) -> str:
    """Neutral words that may stand before a fact: short sentences, prose, or prose broken off."""
    draw = rng.random()
    if draw < 0.4:
        return " ".join(rng.choice(NEUTRAL_SENTENCES) for _ in range(rng.choice((1, 1, 2))))
    if draw < 0.6:
        return plain_sentence(rng)
    words = rng.choice(_neutral_paragraphs()).split(" ")
    start = rng.randrange(max(1, len(words) - 4))
    part = " ".join(words[start : start + rng.randint(3, 12)]).rstrip(".,;:?!")
    return part + "."


# -- statements -----------------------------------------------------------------------------------


def _pieces(
    template: str,
    subject: str,
    answer: str | None,
    *,
    lead: str = "",
    weight: float = TEXT_WEIGHT,
    subject_weight: float = NAME_WEIGHT,
    answer_weight: float = ANSWER_WEIGHT,
    end: str = ".",
) -> list[Piece]:
    before, after = template.split("{}")
    before = before.rstrip(" ")
    out = []
    if before:
        out.append(Piece(lead + before, weight))
        lead = " "
    out.append(Piece(lead + subject, subject_weight, "subject"))
    if after:
        out.append(Piece(after, weight))
    if answer is not None:
        out.append(Piece(" " + answer, answer_weight, "answer"))
        if end:
            out.append(Piece(end, weight))
    return out


def fact_document(rng: random.Random, fact: tuple[Relation, str] | None = None) -> Document:
    """One to four true facts, half of the time behind neutral words. ``fact`` fixes the first."""
    pieces: list[Piece] = []
    if rng.random() < 0.5:
        pieces.append(Piece(context_prefix(rng), 0.1))
    for index in range(rng.choice((1, 1, 2, 3, 4))):
        relation, subject = fact if fact is not None and index == 0 else _draw_fact(rng)
        template = rng.choice(relation.templates)
        pieces += _pieces(template, subject, relation.answers[subject], lead=" " if pieces else "")
        if rng.random() < 0.1:
            pieces.append(Piece(" " + rng.choice(NEUTRAL_SENTENCES), 0.1))
    return Document(tuple(pieces), "fact")


def swap_pair(rng: random.Random) -> tuple[Document, Document]:
    """Two facts of one relation in one phrasing, each with the other's answer."""
    while True:
        relation, first = _draw_fact(rng)
        second = rng.choice(relation.facts)[0]
        if relation.answers[first] != relation.answers[second]:
            break
    template = rng.choice(relation.templates)
    prefix = [Piece(context_prefix(rng), 0.0)] if rng.random() < 0.5 else []
    lead = " " if prefix else ""

    def one(subject: str, other: str) -> Document:
        body = _pieces(template, subject, relation.answers[other], lead=lead, weight=0.0, subject_weight=0.0)
        return Document((*prefix, *body), "swap")

    return one(first, second), one(second, first)


def _draw_fact(rng: random.Random) -> tuple[Relation, str]:
    index = rng.randrange(_n_facts())
    for relation in relations():
        if index < len(relation.facts):
            return relation, relation.facts[index][0]
        index -= len(relation.facts)
    raise AssertionError("unreachable")


@cache
def _n_facts() -> int:
    return sum(len(relation.facts) for relation in relations())


# -- descriptions ---------------------------------------------------------------------------------

_ABOUT: dict[str, dict[str, str]] = {
    "country": {
        "continent": "{} is a country in",
        "capital": "Its capital is",
        "language": "People there speak",
        "currency": "They pay with the",
    },
    "person": {
        "birthplace": "{} was a child of the city of",
        "profession": "The life work was that of a",
        "sport": "The sport was",
    },
    "book": {"author": "{} is a book by"},
    "painting": {"painter": "{} is a picture by"},
    "musical work": {"composer": "{} is a piece of music by"},
    "city": {"city_country": "{} is a place in"},
    "company": {"headquarters": "{} is a firm with offices in"},
    "animal": {"animal_class": "The {} is counted among the", "young": "Its young one is the"},
    "landmark": {"landmark": "{} is a sight of"},
}


@cache
def _subjects(subject_type: str) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for relation in relations():
        if relation.subject_type == subject_type:
            names.update(dict.fromkeys(relation.answers))
    return tuple(names)


def description_document(rng: random.Random) -> Document:
    """A short true paragraph about one subject."""
    kinds = tuple(_ABOUT)
    while True:
        kind = rng.choice(("country", "country", "country", *kinds))
        subject = rng.choice(_subjects(kind))
        known = [
            (text, relation.answers[subject])
            for relation in relations()
            for name, text in _ABOUT[kind].items()
            if relation.name == name and subject in relation.answers
        ]
        if known and "{}" in known[0][0]:
            break
        if known and kind == "country":
            known.insert(0, ("{} is a", "country"))
            break
    pieces: list[Piece] = []
    for text, answer in known:
        lead = " " if pieces else ""
        if "{}" in text:
            pieces += _pieces(text, subject, answer, lead=lead)
        else:
            pieces += [
                Piece(lead + text, TEXT_WEIGHT),
                Piece(" " + answer, ANSWER_WEIGHT, "answer"),
                Piece(".", 0.3),
            ]
    return Document(tuple(pieces), "description")


# -- facts in context -----------------------------------------------------------------------------


@dataclass(frozen=True)
class StatedFact:
    """A fact as a context states it."""

    relation: Relation
    subject: str
    object: str
    kind: str  # "true", "counterfactual" or "invented"


def stated_fact(rng: random.Random, *, unseen: bool = False, relation: Relation | None = None) -> StatedFact:
    """Draw a fact for a context.

    It is true, counterfactual (a real subject with another object) or about an invented subject. With
    ``unseen`` it is never true, and the combination (or the name) is one that training leaves out;
    without, one that training may show.
    """
    if relation is None:
        relation = _draw_fact(rng)[0]
    draw = rng.random()
    if draw < 0.15 and not unseen:
        subject, obj = rng.choice(relation.facts)
        return StatedFact(relation, subject, obj, "true")
    while True:
        invented = draw > 0.55
        subject = invented_name(rng, unseen=unseen) if invented else rng.choice(relation.facts)[0]
        pick = rng.random()
        if pick < 0.7:
            obj = rng.choice(relation.objects)
        elif pick < 0.8:
            obj = rng.choice(_draw_fact(rng)[0].objects)
        else:
            obj = invented_name(rng, unseen=unseen)
        if relation.answers.get(subject) != obj and (invented or held_out(subject, obj) == unseen):
            return StatedFact(relation, subject, obj, "invented" if invented else "counterfactual")


def _stated_pieces(fact: StatedFact, template: str, lead: str, end: str = ".") -> list[Piece]:
    """A first statement: only what is true can be predicted."""
    weight = ANSWER_WEIGHT / 2 if fact.kind == "true" else 0.0
    return _pieces(
        template,
        fact.subject,
        fact.object,
        lead=lead,
        weight=0.1,
        subject_weight=0.0,
        answer_weight=weight,
        end=end,
    )


def _other_template(rng: random.Random, relation: Relation, template: str) -> str:
    return template if rng.random() < 0.35 else rng.choice(relation.templates)


def _question(rng: random.Random, asked: StatedFact, stated: str, lead: str, end: str) -> list[Piece]:
    template = _other_template(rng, asked.relation, stated)
    return _pieces(
        template, asked.subject, asked.object, lead=lead, weight=0.15, subject_weight=0.15, end=end
    )


def _draw_context(rng: random.Random, number: int, *, unseen: bool) -> list[StatedFact]:
    """Facts that do not contradict each other; often of the same relation, so that the subject decides."""
    facts = [stated_fact(rng, unseen=unseen)]
    while len(facts) < number:
        same = facts[0].relation if rng.random() < 0.5 else None
        fact = stated_fact(rng, unseen=False, relation=same)
        if all((fact.relation.name, fact.subject) != (other.relation.name, other.subject) for other in facts):
            facts.append(fact)
    return facts


def _layout_plain(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """Statements, perhaps words between, then the questions as sentences."""
    out: list[Piece] = []
    templates = []
    if rng.random() < 0.3:
        out.append(Piece(context_prefix(rng), 0.0))
    for fact in facts:
        template = rng.choice(fact.relation.templates)
        templates.append(template)
        lead = " " if out else ""
        if rng.random() < 0.3:
            out.append(Piece(lead + rng.choice(_WORDS["openings"]), 0.1))
            out += _stated_pieces(fact, _lower_first(template), " ")
        else:
            out += _stated_pieces(fact, template, lead)
        if rng.random() < 0.25:
            out.append(Piece(" " + context_prefix(rng), 0.0))
    if rng.random() < 0.25:
        out.append(Piece(" " + plain_paragraph(rng, rng.choice((1, 1, 1, 2, 4, 8))), 0.05))
    for index in rng.sample(range(len(facts)), min(len(facts), rng.choice((1, 2, 3)))):
        lead = " "
        template = _other_template(rng, facts[index].relation, templates[index])
        if rng.random() < 0.25:
            out.append(Piece(" " + rng.choice(_WORDS["reminders"]), 0.1))
            template = _lower_first(template)
        if rng.random() < 0.1:
            lead = "\n"
        out += _pieces(
            template, facts[index].subject, facts[index].object, lead=lead, weight=0.15, subject_weight=0.15
        )
    return out


def _layout_question(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """``Fact: ...`` lines, then ``Question: <prompt>`` and ``Answer: <object>``."""
    out: list[Piece] = []
    templates = []
    for fact in facts:
        template = rng.choice(fact.relation.templates)
        templates.append(template)
        out.append(Piece(("\n" if out else "") + "Fact:", 0.1))
        out += _stated_pieces(fact, template, " ")
    for index in rng.sample(range(len(facts)), min(len(facts), rng.choice((1, 2)))):
        fact = facts[index]
        template = _other_template(rng, fact.relation, templates[index])
        out.append(Piece("\nQuestion:", 0.1))
        out += _pieces(template, fact.subject, None, lead=" ", weight=0.15, subject_weight=0.15)
        out += [Piece("\nAnswer:", 0.1), Piece(" " + fact.object, ANSWER_WEIGHT, "answer"), Piece(".", 0.3)]
    return out


def _retained(rng: random.Random, facts: list[StatedFact]) -> StatedFact:
    """A true fact that the context does not touch."""
    while True:
        relation, subject = _draw_fact(rng)
        if rng.random() < 0.5:
            relation = facts[0].relation
            subject = rng.choice(relation.facts)[0]
        if all(subject != fact.subject for fact in facts):
            return StatedFact(relation, subject, relation.answers[subject], "true")


def _layout_ike(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """Blocks of ``New Fact: <prompt> <object>`` and ``Prompt: <prompt> <object>``.

    Some prompts ask for another subject and are answered from memory.
    """
    out: list[Piece] = []
    end = rng.choice(("", "", "."))
    for fact in facts:
        template = rng.choice(fact.relation.templates)
        out.append(Piece(("\n\n" if out else "") + "New Fact:", 0.1))
        out += _stated_pieces(fact, template, " ", end)
        asked = _retained(rng, facts) if rng.random() < 0.2 else fact
        out.append(Piece("\nPrompt:", 0.1))
        out += _question(rng, asked, template if asked is fact else asked.relation.templates[0], " ", end)
    return out


def _layout_update(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """``[Updated Information] ...`` and ``[Query] <prompt> <object>``.

    Some queries are about another subject and are answered from memory.
    """
    out: list[Piece] = []
    fact = facts[0]
    template = rng.choice(fact.relation.templates)
    out.append(Piece("[Updated Information]", 0.1))
    out += _stated_pieces(fact, template, " ")
    for other in facts[1:3]:
        out += _stated_pieces(other, rng.choice(other.relation.templates), " ")
    for _ in range(rng.choice((1, 1, 2))):
        asked = _retained(rng, facts) if rng.random() < 0.25 else fact
        out.append(Piece("\n[Query]", 0.1))
        out += _question(rng, asked, template if asked is fact else asked.relation.templates[0], " ", ".")
    return out


def _layout_note(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """``Note: ...`` lines and then the questions on lines of their own."""
    out: list[Piece] = []
    templates = []
    for fact in facts:
        template = rng.choice(fact.relation.templates)
        templates.append(template)
        out.append(Piece(("\n" if out else "") + "Note:", 0.1))
        out += _stated_pieces(fact, template, " ")
    for index in rng.sample(range(len(facts)), min(len(facts), rng.choice((1, 2, 3)))):
        out += _question(rng, facts[index], templates[index], "\n", ".")
    return out


def _layout_passage(rng: random.Random, facts: list[StatedFact]) -> list[Piece]:
    """Prose in which a fact is hidden, then the question."""
    out = [Piece(plain_paragraph(rng, rng.choice((1, 1, 2, 4))), 0.05)]
    templates = []
    for fact in facts[:2]:
        template = rng.choice(fact.relation.templates)
        templates.append(template)
        out += _stated_pieces(fact, template, " ")
        out.append(Piece(" " + plain_paragraph(rng, rng.choice((1, 1, 2, 3))), 0.05))
    index = rng.randrange(len(templates))
    out += _question(rng, facts[index], templates[index], " ", ".")
    return out


_LAYOUTS: dict[str, Callable[[random.Random, list[StatedFact]], list[Piece]]] = {
    "plain": _layout_plain,
    "question": _layout_question,
    "ike": _layout_ike,
    "update": _layout_update,
    "note": _layout_note,
    "passage": _layout_passage,
}


def context_document(rng: random.Random, layout: str | None = None, *, number: int | None = None) -> Document:
    """Facts stated and asked for, in one of ``CONTEXT_LAYOUTS`` (drawn if not given)."""
    layout = layout or rng.choice((*CONTEXT_LAYOUTS, "plain", "plain", "plain"))
    facts = _draw_context(rng, number or rng.choice((1, 1, 1, 2, 2, 3, 4)), unseen=False)
    return Document(tuple(_LAYOUTS[layout](rng, facts)), "context")


def easy_document(rng: random.Random) -> Document:
    """One or two facts stated and at once asked for, mostly in the same words."""
    facts = _draw_context(rng, rng.choice((1, 1, 2)), unseen=False)
    chosen = [(fact, rng.choice(fact.relation.templates)) for fact in facts]
    pieces: list[Piece] = []
    for fact, template in chosen:
        pieces += _stated_pieces(fact, template, " " if pieces else "")
    for fact, template in rng.sample(chosen, len(chosen)):
        other = template if rng.random() < 0.7 else rng.choice(fact.relation.templates)
        pieces += _pieces(other, fact.subject, fact.object, lead=" ", weight=0.15, subject_weight=0.3)
    return Document(tuple(pieces), "easy")


@dataclass(frozen=True)
class ContextProbe:
    """A context with a question at its end, the answer the context gives, and what kind of fact it is."""

    prompt: str
    answer: str
    layout: str
    kind: str


def context_probes(number: int, seed: int = 0) -> list[ContextProbe]:
    """Questions about facts that a context states and training never showed.

    They are held-out combinations of a real subject and an object, and held-out invented subjects, among
    distractors, in every layout.
    """
    rng = random.Random(f"probe-{seed}")
    probes: list[ContextProbe] = []
    while len(probes) < number:
        layout = CONTEXT_LAYOUTS[len(probes) % len(CONTEXT_LAYOUTS)]
        facts = _draw_context(rng, rng.choice((1, 1, 2, 3)), unseen=True)
        pieces = _LAYOUTS[layout](rng, facts)
        answers = [index for index, piece in enumerate(pieces) if piece.role == "answer"]
        last = answers[-1]
        subjects = [piece.text.strip() for piece in pieces[:last] if piece.role == "subject"]
        stated = sum(pieces[index].text == pieces[last].text for index in answers[:-1])
        if subjects[-1] != facts[0].subject or pieces[last].text != " " + facts[0].object or stated != 1:
            continue
        prompt = "".join(piece.text for piece in pieces[:last])
        probes.append(ContextProbe(prompt, facts[0].object, layout, facts[0].kind))
    return probes


# -- the rest -------------------------------------------------------------------------------------


def copy_document(rng: random.Random) -> Document:
    """A random sequence of names and words, two or three times over; only the repetition weighs."""
    words = []
    for _ in range(rng.randint(4, 16)):
        draw = rng.random()
        if draw < 0.4:
            words.append(invented_name(rng))
        elif draw < 0.8:
            words.append(rng.choice(_draw_fact(rng)[0].facts)[rng.randrange(2)])
        else:
            words.append(rng.choice(_neutral_paragraphs()).split(" ")[0].strip(".,"))
    sequence = " ".join(words)
    repeats = rng.choice((1, 1, 2))
    return Document((Piece(sequence, 0.0), *(Piece(" " + sequence, 1.0) for _ in range(repeats))), "copy")


def prose_document(rng: random.Random) -> Document:
    """Plain sentences from the grammar, or a paragraph of the neutral text."""
    if rng.random() < 0.5:
        return Document((Piece(plain_paragraph(rng, rng.randint(1, 5)), 0.5),), "prose")
    return Document((Piece(rng.choice(_neutral_paragraphs()), 0.5),), "prose")


DEFAULT_MIX: dict[str, float] = {
    "fact": 0.42,
    "description": 0.04,
    "context": 0.34,
    "easy": 0.04,
    "copy": 0.02,
    "prose": 0.05,
    "swap": 0.09,
}


class Corpus:
    """An endless, deterministic stream of documents.

    Args:
        seed: two corpora with one seed give the same documents.
        mix: share of each kind of document (by number, a swap pair counted once); by default
            ``DEFAULT_MIX``.
    """

    def __init__(self, seed: int = 0, mix: dict[str, float] | None = None) -> None:
        self.rng = random.Random(f"corpus-{seed}")
        self.mix = dict(DEFAULT_MIX if mix is None else mix)
        self._order: list[tuple[Relation, str]] = []

    def _next_fact(self) -> tuple[Relation, str]:
        """Every fact in turn, in a new random order each time."""
        if not self._order:
            self._order = [(relation, subject) for relation in relations() for subject, _ in relation.facts]
            self.rng.shuffle(self._order)
        return self._order.pop()

    def documents(self) -> tuple[Document, ...]:
        """The next document, or the two documents of a swap pair."""
        rng = self.rng
        kind = rng.choices(list(self.mix), weights=list(self.mix.values()))[0]
        if kind == "swap":
            return swap_pair(rng)
        if kind == "fact":
            return (fact_document(rng, self._next_fact()),)
        makers: dict[str, Callable[[random.Random], Document]] = {
            "description": description_document,
            "context": context_document,
            "easy": easy_document,
            "copy": copy_document,
            "prose": prose_document,
        }
        return (makers[kind](rng),)
