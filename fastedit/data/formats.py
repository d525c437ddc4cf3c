"""One reader per published record format, chosen by the fields that a record has.

A reader turns a record of the file into a :class:`~fastedit.data.records.Record`. A format is one row of
``FORMATS``: its name, the fields it is recognised by, and its reader. The first row that fits wins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from ..errors import InvalidFact
from ..facts import Fact
from ..io import sha256_file
from .files import read_values
from .records import Item, Record, Records, Skipped, flatten_answers
from .ripple import read_ripple_edit
from .subjects import fact_of

Raw = Mapping[str, Any]
Reader = Callable[[Raw, "Options"], Record]

PORTABILITY_KINDS = (
    "Logical_Generalization",
    "Compositionality_I",
    "Compositionality_II",
    "Subject_Aliasing",
)
LOCALITY_KINDS = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
_SPELLING = {"Relation_Specifity": "Relation_Specificity"}


@dataclass(frozen=True)
class Options:
    """Choices that change what is read: ``zsre_answer`` is ``"alt"`` or ``"true"``."""

    zsre_answer: str = "alt"


@dataclass(frozen=True)
class Format:
    """A row of the table: a record has this format if it has all fields in ``needs``."""

    name: str
    needs: frozenset[str]
    read: Reader


def load_records(
    path: str | os.PathLike[str], *, limit: int | None = None, zsre_answer: str = "alt"
) -> Records:
    """Read a data set's own file, plain or gzipped, and normalise its records.

    Args:
        path: a ``.json`` or ``.jsonl`` file, gzipped or not.
        limit: read at most this many records of the file.
        zsre_answer: what zsRE teaches: ``"alt"``, the counterfactual answer, or ``"true"``, the right one
            (as MEMIT does; needed for the protocol ``zsre.memit``).

    Returns:
        The usable records, and for every other its position and the reason.

    Raises:
        CorruptFile: the file is cut off or not JSON; the message names it.
        ValueError: no record has a known format; the message names the fields that were found.
        FileNotFoundError: there is no such file.
    """
    if zsre_answer not in ("alt", "true"):
        raise ValueError(f"zsre_answer must be 'alt' or 'true', got {zsre_answer!r}")
    values = read_values(path)
    return records_from(
        values, path=os.fspath(path), limit=limit, zsre_answer=zsre_answer, sha256=sha256_file(path)
    )


def records_from(
    values: Any, *, path: str = "", limit: int | None = None, zsre_answer: str = "alt", sha256: str = ""
) -> Records:
    """Normalise records that are already read: a list of mappings, or a file's top-level mapping.

    Raises:
        ValueError: no record has a known format.
    """
    where = path or "the data"
    rows = _rows(values, where)
    if limit is not None:
        rows = rows[:limit]
    options = Options(zsre_answer)
    records: list[Record] = []
    skipped: list[Skipped] = []
    known = 0
    for position, (group, row) in enumerate(rows):
        found = detect_format(row)
        known += found is not None
        try:
            if found is None:
                raise InvalidFact(f"no known format has the fields {_fields(row)}")
            record = _read(found, row, options)
            records.append(replace(record, position=position, group=group, source=found.name, raw=row))
        except InvalidFact as error:
            skipped.append(Skipped(position, str(error)))
    if not known:
        first = _fields(rows[0][1]) if rows else "none"
        raise ValueError(
            f"{where} has no known record format: the first record has the fields {first}. Known are: "
            + ", ".join(dict.fromkeys(form.name for form in FORMATS))
            + " (plain texts are read by load_texts, attribute snippets by load_snippets)"
        )
    return Records(records, skipped, path, sha256)


def detect_format(record: Any) -> Format | None:
    """The format of one record, by its fields; None if no format fits."""
    if not isinstance(record, Mapping):
        return None
    return next((form for form in FORMATS if form.needs <= record.keys()), None)


def _read(form: Format, row: Raw, options: Options) -> Record:
    try:
        return form.read(row, options)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidFact(f"the record is not as the format {form.name} has it: {what}") from None


def _fields(row: Any) -> str:
    return ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else f"none ({type(row).__name__})"


def _rows(values: Any, where: str) -> list[tuple[str, Any]]:
    """Rows of a file with the name of the part they come from."""
    if isinstance(values, Mapping):
        if {"prompt_templates", "samples"} <= values.keys():
            return [("", {"lre": values, **sample}) for sample in values["samples"]]
        parts = [key for key in ("K_F", "K_R", "success", "locality") if isinstance(values.get(key), list)]
        if parts and len(parts) == len(values):
            return [(part, row) for part in parts for row in values[part]]
        for key in ("facts", "records", "data"):
            if isinstance(values.get(key), list):
                return [("", row) for row in values[key]]
        values = [values]
    if not isinstance(values, list):
        raise ValueError(f"{where} holds {type(values).__name__}, a list of records was expected")
    if not values:
        raise ValueError(f"{where} holds an empty list: there are no records")
    return [("", row) for row in values]


# --- parts that several formats share -----------------------------------------------------------------


def _first(row: Raw, *names: str) -> Any:
    """The first of the fields that is there and not None."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InvalidFact(f"none of the fields {', '.join(names)} is there")


def _answer(value: Any) -> str:
    answers = flatten_answers(value)
    if not answers:
        raise InvalidFact("the new answer is empty")
    return answers[0]


def _items(prompts: Any, answers: Any) -> list[Item]:
    """Pair one prompt with its answers, or a list of prompts with a list of answers."""
    if isinstance(prompts, str):
        return [Item(prompts, flatten_answers(answers))] if prompts.strip() else []
    if not prompts:
        return []
    answers = answers if isinstance(answers, list) else [answers] * len(prompts)
    pairs = zip_longest(prompts, answers[: len(prompts)])
    return [item for prompt, answer in pairs for item in _items(str(prompt), answer)]


def _kind(name: str, items: list[Item]) -> dict[str, list[Item]]:
    return {name: items} if items else {}


def _kinds(value: Any, names: Iterable[str] | None = None) -> dict[str, list[Item]]:
    """Read {kind: [{prompt, ground_truth | targets}]}; kinds without items are left out."""
    if not isinstance(value, Mapping):
        return {}
    kinds: dict[str, list[Item]] = {}
    for name in value if names is None else names:
        entries = value.get(name)
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            prompt = entry.get("prompt", entry.get("question"))
            answers = next((entry[k] for k in ("ground_truth", "targets", "answer") if k in entry), None)
            kinds.setdefault(_SPELLING.get(name, name), []).extend(_items(prompt, answers))
    return {name: items for name, items in kinds.items() if items}


def _one_hop(row: Raw) -> dict[str, list[Item]]:
    """Portability as {"New Question", "New Answer"}."""
    hop = row.get("portability")
    if not isinstance(hop, Mapping) or "New Question" not in hop:
        return {}
    return _kind("one_hop", _items(hop["New Question"], hop.get("New Answer")))


def _texts(value: Any) -> list[str]:
    return [text for text in flatten_answers(value) if text.strip()]


def _question(text: str) -> str:
    return text if text.rstrip().endswith("?") else text.rstrip() + "?"


# --- readers ------------------------------------------------------------------------------------------


def _rewrite(rewrite: Raw, case_id: Any, notes: list[str]) -> tuple[Fact, list[str]]:
    """A CounterFact rewrite: the fact and its right answers."""
    true = flatten_answers(rewrite.get("target_true"))[:1]
    new = _answer(rewrite["target_new"]["str"])
    true_text = rewrite["target_true"]["str"] if true else None
    fact = fact_of(rewrite["prompt"], rewrite["subject"], new, true_text, case_id, notes)
    return fact, [true_text] if true_text else []


def _counterfact(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    fact, true = _rewrite(row["requested_rewrite"], row.get("case_id"), notes)
    neighborhood = _texts(row.get("neighborhood_prompts"))
    locality = _kind("neighborhood", [Item(p, true) for p in neighborhood])
    distracting = [Item(p, true) for p in _texts(row.get("distracting_neighborhood_prompts"))]
    locality |= _kind("distracting_neighborhood", distracting)
    unrelated = row.get("unrelated_relation") or {}
    locality |= _kind("unrelated_relation", _items(unrelated.get("question", ""), unrelated.get("object")))
    portability = _one_hop(row)
    if row.get("alternative_subject"):
        aliased = fact.prompt.replace("{}", row["alternative_subject"])
        portability |= _kind("Subject_Aliasing", [Item(aliased, [fact.target_new])])
    return Record(
        fact,
        rephrase=_texts(row.get("paraphrase_prompts")),
        locality=locality,
        portability=portability,
        true_answers=true,
        neighborhood=neighborhood,
        generation_prompts=_texts(row.get("generation_prompts")),
        notes=notes,
    )


def _peak(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    fact, true = _rewrite(row["requested_rewrite"], row.get("case_id"), notes)
    items = [item for prompt, *answers in row["neighborhood_prompts"] for item in _items(prompt, answers)]
    return Record(
        fact,
        rephrase=_texts(row.get("para_add_prompts")),
        locality=_kind("neighborhood", items),
        true_answers=list(dict.fromkeys([*true, *_texts(row.get("postive_list"))])),
        notes=notes,
    )


def _mquake(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    edits = []
    for rewrite in row["requested_rewrite"]:
        fact, true = _rewrite(rewrite, row.get("case_id"), notes)
        edits.append((fact, _texts(rewrite.get("question")), true))
    if not edits:
        raise InvalidFact("requested_rewrite is empty")
    answers = flatten_answers([row.get("new_answer"), row.get("new_answer_alias")])
    hops = [
        Item(hop["question"], flatten_answers([hop["answer"], hop.get("answer_alias")]))
        for hop in row.get("new_single_hops", [])
    ]
    portability = _kind("multi_hop", [Item(q, answers) for q in _texts(row["questions"])])
    first = edits[0]
    return Record(
        first[0],
        rephrase=first[1],
        portability=portability | _kind("single_hop", hops),
        true_answers=first[2],
        aliases=_hop_aliases(first[0], hops),
        more=[(fact, rephrase) for fact, rephrase, _ in edits[1:]],
        notes=notes,
    )


def _hop_aliases(fact: Fact, hops: list[Item]) -> list[str]:
    """Other spellings of the new answer, from the hop that asks for it."""
    return next((item.answers[1:] for item in hops if item.answers[:1] == [fact.target_new]), [])


def _zsre(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    true = flatten_answers(row.get("answers")) or flatten_answers(row.get("pred"))
    if options.zsre_answer == "true":
        if not flatten_answers(row.get("answers")):
            raise InvalidFact("the record has no right answer in `answers` to teach")
        new, old = true[0], None
    else:
        new, old = _answer(row["alt"]), true[0] if true else None
    fact = fact_of(row["src"], row.get("subject"), new, old, row.get("case_id"), notes)
    portability = _one_hop(row)
    if row.get("alter_subject_question"):
        portability |= _kind("Subject_Aliasing", [Item(row["alter_subject_question"], [new])])
    if row.get("inverse question"):
        portability |= _kind("inverse", [Item(row["inverse question"], [row["subject"]])])
    return Record(
        fact,
        rephrase=_texts(row.get("rephrase")),
        locality=_loc(row),
        portability=portability,
        true_answers=true,
        aliases=flatten_answers(row.get("answers"))[1:] if options.zsre_answer == "true" else [],
        taught="true" if options.zsre_answer == "true" else "new",
        notes=notes,
    )


def _loc(row: Raw) -> dict[str, list[Item]]:
    """`loc` with its prefix kept and a question mark added; `loc_ans`."""
    loc = row.get("loc")
    prompts = [_question(text) for text in _texts(loc)]
    return _kind("neighborhood", _items(prompts[0] if isinstance(loc, str) else prompts, row.get("loc_ans")))


def _ultra(row: Raw, options: Options) -> Record:
    """UltraEdit's zsRE, UltraEditBench and WikiBigEdit: the answer is `ans`."""
    notes: list[str] = []
    answers = flatten_answers(row["ans"])
    prompt = _first(row, "src", "prompt", "update")
    fact = fact_of(prompt, row.get("subject"), _answer(answers), None, row.get("case_id"), notes)
    personas = [Item(text, answers) for text in _texts(row.get("personas"))]
    portability = _kind("personas", personas)
    if row.get("mhop"):
        portability |= _kind("multi_hop", _items(row["mhop"], row.get("mhop_ans")))
    return Record(
        fact,
        rephrase=_texts(row.get("rephrase", row.get("rephrase_prompt"))),
        locality=_loc(row) if row.get("loc") else {},
        portability=portability,
        aliases=answers[1:],
        notes=notes,
    )


def _zsre_structured(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    true = flatten_answers([entry.get("answer") for entry in row["output"] if isinstance(entry, Mapping)])
    if options.zsre_answer == "true":
        new, old = _answer(true), None
    else:
        new, old = _answer(row.get("alternatives")), true[0] if true else None
    subject, _, _ = row["input"].partition(" [SEP] ")
    given = subject if subject != row["input"] else None
    fact = fact_of(row["input"], given, new, old, row.get("id"), notes)
    return Record(
        fact,
        rephrase=_texts(row.get("filtered_rephrases")),
        true_answers=true,
        taught="true" if options.zsre_answer == "true" else "new",
        notes=notes,
    )


def _wikibio(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    fact = fact_of(row["text"], row["concept"], _answer(row["labels"]), None, None, notes)
    return Record(fact, locality=_kinds(row.get("locality")), notes=notes)


def _convsent(row: Raw, options: Options) -> Record:
    """A sentiment edit: taught is the first positive remark; all others are kept as spellings."""
    positive, negative = _texts(row["pos"]), _texts(row["neg"])
    notes = ["the file has no prompt: 'What do you think of {}?' was put"]
    old = negative[0] if negative else None
    fact = fact_of("What do you think of {}?", row["ent"], _answer(positive).strip(), old, None, notes)
    return Record(fact, true_answers=negative, aliases=positive[1:], notes=notes)


def _sanitation(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    true = flatten_answers(row["ground_truth"])
    new = _answer(row.get("target_new", true))
    old = true[0] if true else None
    fact = fact_of(row["question"], row.get("subject"), new, old, None, notes)
    return Record(fact, true_answers=true, notes=notes)


def _fever(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    fact = fact_of(row["prompt"], row.get("subject"), _answer(row["alt"]), None, row.get("case_id"), notes)
    unrelated = _items(row.get("unrel_prompt", ""), row.get("unrel_ans"))
    return Record(
        fact,
        rephrase=_texts(row["equiv_prompt"]),
        locality=_kind("unrelated", unrelated),
        notes=notes,
    )


def _ripe(row: Raw, options: Options) -> Record:
    record = _flat(row, options)
    return replace(
        record,
        locality=record.locality | _kinds(row, LOCALITY_KINDS),
        portability=record.portability | _kinds(row, PORTABILITY_KINDS),
    )


def _ripple(row: Raw, options: Options) -> Record:
    edit = read_ripple_edit(row)
    notes: list[str] = []
    fact = fact_of(edit.prompt, edit.subject, edit.target, edit.old, None, notes)
    kinds: dict[str, list[Item]] = {}
    for name in (*PORTABILITY_KINDS, *LOCALITY_KINDS):
        for test in row.get(name) or []:
            items = [Item(q["prompt"], flatten_answers(q["answers"])) for q in test["test_queries"]]
            kinds.setdefault(_SPELLING.get(name, name), []).extend(i for i in items if i.answers)
    kinds = {name: items for name, items in kinds.items() if items}
    aliases = [
        a for i in kinds.get("Subject_Aliasing", []) if fact.target_new in i.answers for a in i.answers
    ]
    return Record(
        fact,
        locality={k: v for k, v in kinds.items() if k not in PORTABILITY_KINDS},
        portability={k: v for k, v in kinds.items() if k in PORTABILITY_KINDS},
        true_answers=[edit.old] if edit.old else [],
        aliases=[a for a in dict.fromkeys(aliases) if a != fact.target_new],
        taught="true" if row.get("example_type") == "recent" else "new",
        notes=notes,
    )


def _labelled(edit: Raw, new: str, old: str, notes: list[str]) -> tuple[Fact, list[str]]:
    """A Pitfalls edit from its relation, subject and the labels of two objects."""
    subject = edit["subject"]["label"]
    fact = fact_of(edit["relation"]["prompt"], subject, edit[new]["label"], edit[old]["label"], None, notes)
    query = edit["relation"].get("query")
    return fact, [query.replace("{}", subject)] if query else []


def _conflict(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    edits = [_labelled(edit, "new_object", "object", notes) for edit in row["edits"]]
    true = [row["edits"][0]["object"]["label"]]
    return Record(edits[0][0], rephrase=edits[0][1], true_answers=true, more=edits[1:], notes=notes)


def _round(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    away = _labelled(row["edit"], "new_object", "object", notes)
    back = _labelled(row["edit"], "object", "new_object", notes)
    true = [row["edit"]["object"]["label"], *(entry["label"] for entry in row["true_objects"])]
    return Record(away[0], rephrase=away[1], true_answers=list(dict.fromkeys(true)), more=[back], notes=notes)


def _unke(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    fact = fact_of(row["question"], row.get("subject"), _answer(row["answer"]), None, row.get("id"), notes)
    return Record(
        fact,
        rephrase=_texts(row["para_question"]),
        portability=_kind("sub_questions", _items(row.get("sub_question"), row.get("sub_answer"))),
        notes=notes,
    )


def _qna(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    answer = _answer(row["answer"])
    fact = fact_of(row["question"], row["subject"], answer, None, row.get("case_index"), notes)
    return Record(fact, rephrase=_texts(row["qna_question"]), notes=notes)


def _known(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    prompt = row.get("prompt") or row["template"]
    try:
        fact = fact_of(prompt, row["subject"], _answer(row["attribute"]), None, row["known_id"], notes)
    except InvalidFact:
        notes.append("the subject is not in `prompt`: `template` is used")
        template = row["template"]
        fact = fact_of(template, row["subject"], _answer(row["attribute"]), None, row["known_id"], notes)
    return Record(fact, true_answers=[fact.target_new], taught="true", notes=notes)


def _lre(row: Raw, options: Options) -> Record:
    notes: list[str] = []
    relation = row["lre"]
    templates = [*relation["prompt_templates"], *relation.get("prompt_templates_zs", [])]
    answer = _answer(row["object"])
    fact = fact_of(templates[0], row["subject"], answer, None, None, notes)
    rephrase = [template.replace("{}", row["subject"]) for template in templates[1:]]
    return Record(fact, rephrase=rephrase, true_answers=[answer], taught="true", notes=notes)


def _flat(row: Raw, options: Options) -> Record:
    """EasyEdit's flat records, KnowEdit, WISE, WikiBigEdit, QAEdit, CKnowEdit, and plain facts."""
    notes: list[str] = []
    true = flatten_answers(row.get("ground_truth", row.get("target_old")))
    answers = flatten_answers(_first(row, "target_new", "target", "answer"))
    case_id = next((row[name] for name in ("case_id", "id") if row.get(name) is not None), None)
    fact = fact_of(
        row["prompt"], row.get("subject"), _answer(answers), true[0] if true else None, case_id, notes
    )
    locality = _flat_locality(row)
    neighbours = locality.get("neighborhood", [])
    return Record(
        fact,
        rephrase=_texts([row.get("rephrase_prompt"), row.get("rephrase")]),
        locality=locality,
        portability=_flat_portability(row),
        true_answers=true,
        aliases=answers[1:],
        neighborhood=[item.prompt for item in neighbours if true and item.answers[:1] == true[:1]],
        notes=notes,
    )


def _flat_locality(row: Raw) -> dict[str, list[Item]]:
    listed = row.get("locality")
    if isinstance(listed, list):
        items = [item for entry in listed for item in _items(entry["loc"], entry["loc_ans"])]
        return _kind("neighborhood", items)
    answers = row.get("locality_ground_truth", row.get("locality_answer"))
    return _kind("neighborhood", _items(row.get("locality_prompt") or "", answers)) | _kinds(listed)


def _flat_portability(row: Raw) -> dict[str, list[Item]]:
    items = _items(row.get("portability_prompt") or "", row.get("portability_answer"))
    return _kind("portability", items) | _one_hop(row) | _kinds(_without_hop(row.get("portability")))


def _without_hop(value: Any) -> Any:
    return None if isinstance(value, Mapping) and "New Question" in value else value


def _row(name: str, needs: str, read: Reader) -> Format:
    return Format(name, frozenset(needs.split(",")), read)


FORMATS: tuple[Format, ...] = (
    _row("counterfact", "requested_rewrite,paraphrase_prompts", _counterfact),
    _row("peak", "requested_rewrite,para_add_prompts", _peak),
    _row("mquake", "requested_rewrite,questions", _mquake),
    _row("zsre.mend", "src,alt", _zsre),
    _row("zsre.ultraedit", "src,ans", _ultra),
    _row("zsre.structured", "input,output", _zsre_structured),
    _row("knowedit.wikibio", "text,labels,concept", _wikibio),
    _row("knowedit.convsent", "ent,pos,neg", _convsent),
    _row("fever", "prompt,equiv_prompt,alt", _fever),
    _row("ripple", "edit,example_type", _ripple),
    _row("pitfalls.round", "edit,true_objects", _round),
    _row("pitfalls.conflict", "edits,triples", _conflict),
    _row("ripe", "prompt,target_new,example_type", _ripe),
    _row("unke", "question,para_question,answer", _unke),
    _row("counterfact.qna", "question,qna_question,answer,subject", _qna),
    _row("known", "known_id,subject,attribute", _known),
    _row("lre", "lre,subject,object", _lre),
    _row("wikibigedit", "update,ans", _ultra),
    _row("ultraeditbench", "prompt,ans", _ultra),
    _row("qaedit", "prompt,target,rephrase,locality", _flat),
    _row("cknowedit", "prompt,target_new,portability_prompt", _flat),
    _row("knowedit", "prompt,target_new,portability,locality", _flat),
    _row("wise.temporal", "prompt,target_new,ood_rephrase", _flat),
    _row("counterfact.flat", "case_id,prompt,target_new,locality_prompt,ground_truth", _flat),
    _row("flat", "prompt,target_new,locality_prompt", _flat),
    _row("facts", "prompt,target_new", _flat),
    _row("facts", "prompt,target", _flat),
    _row("facts", "prompt,answer", _flat),
    _row("knowedit.sanitation", "question,ground_truth", _sanitation),
)
