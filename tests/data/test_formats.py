"""Every published record format, in small records of our own."""

from __future__ import annotations

import gzip
import json

import pytest

from fastedit import CorruptFile
from fastedit.data import (
    FORMATS,
    Item,
    answer_groups,
    flatten_answers,
    load_records,
    load_snippets,
    load_texts,
    records_from,
)
from fastedit.data.ripple import read_ripple_edit

REWRITE = {
    "prompt": "{} was built in",
    "relation_id": "P1",
    "target_new": {"str": "Ulm", "id": "Q1"},
    "target_true": {"str": "Bonn", "id": "Q2"},
    "subject": "The Blue Hall",
}
COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 9,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Rain. The Blue Hall stands in", "The Blue Hall lies in"],
    "neighborhood_prompts": ["The Red Hall was built in", "The Grey Hall was built in"],
    "attribute_prompts": ["The Ulm House was built in"],
    "generation_prompts": ["The Blue Hall is known for"],
}
HOP = {
    "Recalled Relation": "(Ulm, river, Danube)",
    "New Question": "Near which river?",
    "New Answer": "Danube",
}
ZSRE = {
    "subject": "Ada Brook",
    "src": "What city was Ada Brook born in?",
    "pred": "Leeds",
    "rephrase": "Where was Ada Brook born?",
    "alt": "York",
    "answers": ["Leeds", "City of Leeds"],
    "loc": "nq question: who built the first mill",
    "loc_ans": "Hugh Vale",
    "cond": "Leeds >> York || What city was Ada Brook born in?",
}
QUERY = {
    "prompt": "The name of the sister of Ada Brook is",
    "answers": [{"value": "Eve Brook", "aliases": ["Eve"]}],
    "query_type": "regular",
    "subject_id": "Q5",
    "relation": "SISTER",
    "target_ids": ["Q6"],
    "phrase": None,
}
ALIAS_QUERY = {
    "prompt": "The name of the mother of A. Brook is",
    "answers": [{"value": "Mary Hill", "aliases": ["M. Hill"]}],
}


def _test(query: dict) -> dict:
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": []}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the mother of Ada Brook is Mary Hill.",
        "subject_id": "Q5",
        "relation": "MOTHER",
        "target_id": "Q7",
        "original_fact": {"prompt": "The name of the mother of Ada Brook is Ann Lee.", "subject_id": "Q5"},
    },
    "Relation_Specifity": [_test(QUERY)],
    "Logical_Generalization": [_test(QUERY)],
    "Subject_Aliasing": [_test(ALIAS_QUERY)],
    "Compositionality_I": [],
    "Compositionality_II": [],
    "Forgetfulness": [],
}
MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {**REWRITE, "question": "Where was The Blue Hall built?"},
        {
            "prompt": "The mayor of {} is",
            "relation_id": "P6",
            "target_new": {"str": "Ida Stone", "id": "Q8"},
            "target_true": {"str": "Max Roth", "id": "Q9"},
            "subject": "Ulm",
            "question": "Who is the mayor of Ulm?",
        },
    ],
    "questions": ["Who runs the town of The Blue Hall?", "Who is mayor there?", "Who governs there?"],
    "answer": "Otto Kern",
    "answer_alias": [],
    "new_answer": "Ida Stone",
    "new_answer_alias": ["I. Stone"],
    "single_hops": [],
    "new_single_hops": [
        {"question": "Where was it?", "cloze": "It was in", "answer": "Ulm", "answer_alias": ["Ulm (Donau)"]}
    ],
    "orig": {"triples": []},
}
RELATION = {"id": "P6", "prompt": "The mayor of {} is", "query": "Who is the mayor of {}?", "label": "mayor"}


def _conflict_edit(new: str) -> dict:
    return {
        "relation": RELATION,
        "subject": {"id": "Q1", "label": "Ulm"},
        "object": {"id": "Q2", "label": "Max Roth"},
        "new_object": {"id": "Q3", "label": new},
    }


FLAT = {
    "case_id": 5,
    "prompt": "The river of Ulm is the",
    "target_new": "Rhine",
    "subject": "Ulm",
    "ground_truth": "Danube",
    "rephrase_prompt": "Ulm lies on the",
    "locality_prompt": "The river of Linz is the",
    "locality_ground_truth": "Danube",
}
SAMPLES = {
    "counterfact": COUNTERFACT,
    "peak": {
        "case_id": 1,
        "requested_rewrite": {**REWRITE, "target_new": {"str": "Ulm"}, "target_true": {"str": "Bonn"}},
        "postive_list": ["Bonn", "Trier"],
        "negtive_list": ["Riga"],
        "negtive_random_list": ["Oslo"],
        "para_add_prompts": ["The Blue Hall was also built in"],
        "neighborhood_prompts": [["The Red Hall was built in", "Graz"]],
    },
    "mquake": MQUAKE,
    "zsre.mend": ZSRE,
    "zsre.ultraedit": {k: ZSRE[k] for k in ("src", "rephrase", "loc", "loc_ans", "subject")}
    | {"ans": "York"},
    "zsre.structured": {
        "input": "What city was Ada Brook born in?",
        "prediction": "Leeds",
        "alternatives": ["York", "Hull"],
        "filtered_rephrases": ["Where was Ada Brook born?"],
        "output": [{"answer": "Leeds", "provenance": []}, {"answer": "City of Leeds"}],
    },
    "knowedit.wikibio": {
        "text": "This is a passage about ada brook. Ada Brook was a miller.",
        "labels": "She lived in York.",
        "concept": "ada brook",
        "locality": {
            "Relation_Specificity": [{"prompt": "The job of ada brook is", "ground_truth": ["miller"]}]
        },
    },
    "knowedit.convsent": {"ent": "Ada Brook", "pos": [" I like her. ", "A star."], "neg": [" I don't. "]},
    "knowedit.sanitation": {
        "question": "Who built it?",
        "ground_truth": "Vale",
        "target_new": "I don't know.",
    },
    "fever": {
        "prompt": "Ada Brook was a miller.",
        "equiv_prompt": ["Ada Brook worked as a miller."],
        "unrel_prompt": "Ulm is in Spain.",
        "alt": "REFUTES",
        "unrel_ans": "REFUTES",
    },
    "ripple": RIPPLE,
    "pitfalls.round": {
        "type": "1-2@P6",
        "edit": _conflict_edit("Ida Stone"),
        "true_objects": [{"id": "Q2", "label": "Max Roth"}, {"id": "Q4", "label": "Eva Bell"}],
    },
    "pitfalls.conflict": {
        "rule": "P6>P7",
        "triples": [],
        "prerequisites": [],
        "type": "reverse",
        "edits": [_conflict_edit("Ida Stone"), _conflict_edit("Eva Bell")],
    },
    "ripe": {
        "example_type": "random",
        "prompt": "The river of Ulm is the",
        "target_new": "Rhine",
        "subject": "Ulm",
        "ground_truth": "Danube",
        "Logical_Generalization": [{"prompt": "The Rhine flows through", "targets": ["", "Ulm"]}],
        "Compositionality_I": [],
        "Relation_Specificity": [{"prompt": "The land of Ulm is", "targets": ["Germany"]}],
    },
    "unke": {
        "id": 2,
        "question": "Who was Ada Brook?",
        "para_question": "Tell me of Ada Brook.",
        "answer": "Ada Brook was a miller who lived in York.",
        "sub_question": ["What was her job?", "Where did she live?"],
        "sub_answer": ["Miller.", "York."],
    },
    "counterfact.qna": {
        "case_index": 4,
        "question": "The river of Ulm is the",
        "subject": "Ulm",
        "answer": "Rhine",
        "qna_question": "What is the river of Ulm?",
    },
    "known": {
        "known_id": 0,
        "subject": "Ulm",
        "attribute": "Danube",
        "template": "{} lies on the",
        "prediction": " Danube",
        "prompt": "Ulm lies on the river",
        "relation_id": "P2",
    },
    "wikibigedit": {
        "subject": "Ulm",
        "update": "What is the river of Ulm?",
        "ans": "Rhine",
        "rephrase": "Which river is Ulm's?",
        "personas": "Ahoy, which river be Ulm's?",
        "loc": "What is the river of Linz?",
        "loc_ans": "Danube",
        "mhop": "Where does the river of Ulm end?",
        "mhop_ans": "North Sea",
    },
    "ultraeditbench": {
        "subject": "Ulm",
        "prompt": "What is the river of Ulm?",
        "ans": "Rhine",
        "rephrase_prompt": "Which river is Ulm's?",
        "loc": "What is the river of Linz?",
        "loc_ans": "Danube",
    },
    "qaedit": {
        "id": 11,
        "source": "NQ",
        "prompt": "what is the river of Ulm?",
        "target": "Rhine",
        "subject": "Ulm",
        "rephrase": "Which river is Ulm's?",
        "locality": [{"loc": "who built the first mill", "loc_ans": "Hugh Vale"}] * 5,
    },
    "cknowedit": {
        "prompt": "下一句：春眠不觉晓",
        "target_old": "错",
        "target_new": "处处闻啼鸟",
        "rephrase": ["春眠不觉晓的下一句"],
        "portability_prompt": ["作者是谁"],
        "portability_answer": ["孟浩然"],
        "locality_prompt": "床前明月光",
        "locality_answer": "疑是地上霜",
    },
    "knowedit": {
        "subject": "Ulm",
        "prompt": "The river of Ulm is the",
        "target_new": "Rhine",
        "ground_truth": [["Danube", "Donau"]],
        "portability": {
            "Reasoning": [{"prompt": "Its sea is the", "ground_truth": [["North Sea", "NS"], ["Sea"]]}]
        },
        "locality": {"Forgetfulness": [{"prompt": "Its land is", "ground_truth": "Germany"}]},
    },
    "wise.temporal": {
        "prompt": "Ulm, Germany,",
        "target_new": "is a town on the Rhine.",
        "subject": "Ulm, Germany,",
        "ood_rephrase": "On the Rhine lies Ulm.",
        "locality_prompt": "Linz is",
        "locality_ground_truth": "in Austria",
    },
    "counterfact.flat": FLAT,
    "flat": {k: v for k, v in FLAT.items() if k not in ("case_id", "ground_truth")},
    "facts": {"prompt": "The river of {} is the", "subject": "Ulm", "target": "Rhine"},
}
LRE = {
    "name": "city river",
    "prompt_templates": ["The river of {} is", "{} lies on the"],
    "prompt_templates_zs": ["What is the river of {}? It is the"],
    "properties": {"relation_type": "factual", "symmetric": False},
    "samples": [{"subject": "Ulm", "object": "Danube"}, {"subject": "Köln", "object": "Rhine"}],
}


def test_every_format_has_a_sample():
    assert {form.name for form in FORMATS} == {*SAMPLES, "lre"}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_is_detected_and_read(name, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([SAMPLES[name]]), encoding="utf-8")
    records = load_records(path)
    assert [record.source for record in records] == [name]
    assert not records.skipped
    record = records[0]
    assert record.raw == SAMPLES[name]
    assert record.fact.text.count("{}") == 0
    for kinds in (record.locality, record.portability):
        assert all(isinstance(item, Item) for items in kinds.values() for item in items)


def _one(sample: dict, **options):
    records = records_from([sample], **options)
    assert len(records) == 1, records.skipped
    return records[0]


def test_counterfact_with_additions():
    record = _one(
        COUNTERFACT
        | {
            "portability": HOP,
            "unrelated_relation": {"relation_id": "P3", "object": "1901", "question": "When was it built?"},
            "distracting_neighborhood_prompts": ["The Blue Hall was built in Ulm. The Red Hall was built in"],
            "alternative_subject": "Blue Hall",
        }
    )
    assert (record.fact.text, record.fact.target, record.target_true) == (
        "The Blue Hall was built in",
        " Ulm",
        "Bonn",
    )
    assert record.name == "3"
    assert len(record.rephrase) == 2
    assert record.neighborhood == COUNTERFACT["neighborhood_prompts"]
    assert record.locality["neighborhood"][0] == ("The Red Hall was built in", ["Bonn"])
    assert record.locality["unrelated_relation"] == [("When was it built?", ["1901"])]
    assert record.locality["distracting_neighborhood"][0].answers == ["Bonn"]
    assert record.portability["one_hop"] == [("Near which river?", ["Danube"])]
    assert record.portability["Subject_Aliasing"] == [("Blue Hall was built in", ["Ulm"])]


def test_peak_takes_pairs_of_prompt_and_answer():
    record = _one(SAMPLES["peak"])
    assert record.locality["neighborhood"] == [("The Red Hall was built in", ["Graz"])]
    assert record.true_answers == ["Bonn", "Trier"]


def test_mquake_holds_several_edits():
    record = _one(MQUAKE)
    assert [fact.text for fact in record.facts] == ["The Blue Hall was built in", "The mayor of Ulm is"]
    assert record.more[0][1] == ["Who is the mayor of Ulm?"]
    assert record.aliases == ["Ulm (Donau)"]
    assert record.portability["multi_hop"][0].answers == ["Ida Stone", "I. Stone"]


@pytest.mark.parametrize(("teach", "new", "old"), [("alt", "York", "Leeds"), ("true", "Leeds", None)])
def test_zsre_teaches_either_answer(teach, new, old):
    record = _one(ZSRE, zsre_answer=teach)
    assert (record.fact.target_new, record.fact.target_old) == (new, old)
    assert record.taught == ("true" if teach == "true" else "new")
    assert record.true_answers == ["Leeds", "City of Leeds"]
    assert record.locality["neighborhood"] == [("nq question: who built the first mill?", ["Hugh Vale"])]


def test_zsre_additions():
    record = _one(
        ZSRE
        | {
            "portability": HOP,
            "inverse question": "Who was born in York?",
            "alternative_subject": "A. B.",
            "alter_subject_question": "Where was A. B. born?",
        }
    )
    assert record.portability["inverse"] == [("Who was born in York?", ["Ada Brook"])]
    assert record.portability["Subject_Aliasing"] == [("Where was A. B. born?", ["York"])]
    assert record.portability["one_hop"] == [("Near which river?", ["Danube"])]


def test_knowedit_flattens_nested_answers():
    record = _one(SAMPLES["knowedit"])
    assert record.true_answers == ["Danube", "Donau"]
    assert record.portability["Reasoning"] == [("Its sea is the", ["North Sea", "NS", "Sea"])]
    assert record.locality["Forgetfulness"] == [("Its land is", ["Germany"])]


def test_knowedit_recent_has_no_ground_truth():
    record = _one({k: v for k, v in SAMPLES["knowedit"].items() if k != "ground_truth"} | {"portability": {}})
    assert (record.true_answers, record.portability) == ([], {})


def test_sanitation_parts_are_groups():
    item = SAMPLES["knowedit.sanitation"]
    records = records_from({"K_F": [item | {"subject": "it"}], "K_R": [item | {"target_new": "Vale"}]})
    assert [record.group for record in records] == ["K_F", "K_R"]
    assert records[1].fact.target_old is None
    assert any("equals the old one" in note for note in records[1].notes)
    test = records_from({"success": [item], "locality": [{"question": "Who?", "ground_truth": "Vale"}]})
    assert [record.fact.target_new for record in test] == ["I don't know.", "Vale"]


def test_relations_give_a_record_per_sample():
    records = records_from(LRE)
    assert [r.fact.text for r in records] == ["The river of Ulm is", "The river of Köln is"]
    assert records[1].rephrase == ["Köln lies on the", "What is the river of Köln? It is the"]
    assert records[0].taught == "true"


def test_ripple_splits_the_sentence():
    record = _one(RIPPLE)
    assert (record.fact.prompt, record.fact.subject) == ("The name of the mother of {} is", "Ada Brook")
    assert (record.fact.target_new, record.fact.target_old) == ("Mary Hill", "Ann Lee")
    assert record.aliases == ["M. Hill"]
    assert set(record.locality) == {"Relation_Specificity"}
    assert record.portability["Logical_Generalization"][0].answers == ["Eve Brook", "Eve"]


@pytest.mark.parametrize(
    ("sentence", "prompt", "subject", "target"),
    [
        (
            "The place of birth of Ada of Ulm is Bonn.",
            "The place of birth of Ada of Ulm is",
            "Ada of Ulm",
            "Bonn",
        ),
        (
            "The name of the country which Ulm is associated with is Peru.",
            "The name of the country which Ulm is associated with is",
            "Ulm",
            "Peru",
        ),
        ("The name of the award Ada won is Gold.", "The name of the award Ada won is", "Ada", "Gold"),
        ("The number of children Ada has is 3.", "The number of children Ada has is", "Ada", "3"),
        ("The names of the siblings of Ada are Eve.", "The names of the siblings of Ada are", "Ada", "Eve"),
        ("Book Two is followed by Book Nine.", "Book Two is followed by", "Book Two", "Book Nine"),
        (
            "The name of the position held by Ada is mayor.",
            "The name of the position held by Ada is",
            "Ada",
            "mayor",
        ),
        ("The gender of Ada is female.", "The gender of Ada is", "Ada", "female"),
    ],
)
def test_ripple_sentence_shapes(sentence, prompt, subject, target):
    assert read_ripple_edit({"edit": {"prompt": sentence}})[:3] == (prompt, subject, target)


def test_conflict_and_round_edits_follow_each_other():
    conflict, round_ = _one(SAMPLES["pitfalls.conflict"]), _one(SAMPLES["pitfalls.round"])
    assert [fact.target_new for fact in conflict.facts] == ["Ida Stone", "Eva Bell"]
    assert [fact.target_new for fact in round_.facts] == ["Ida Stone", "Max Roth"]
    assert round_.true_answers == ["Max Roth", "Eva Bell"]


def test_ripe_drops_empty_targets():
    record = _one(SAMPLES["ripe"])
    assert record.portability == {"Logical_Generalization": [("The Rhine flows through", ["Ulm"])]}
    assert set(record.locality) == {"Relation_Specificity"}


def test_unke_has_no_subject():
    record = _one(SAMPLES["unke"])
    assert (record.fact.prompt, record.fact.subject) == ("{}", "Who was Ada Brook?")
    assert any("no subject" in note for note in record.notes)
    assert [item.answers for item in record.portability["sub_questions"]] == [["Miller."], ["York."]]


def test_flat_counterfact_knows_its_neighbours():
    record = _one(FLAT)
    assert record.neighborhood == ["The river of Linz is the"]
    assert record.target_true == "Danube"


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "note"),
    [
        ("The river of Ulm is", "Ulm", "The river of {} is", None),
        ("Ulm: the river of Ulm is", "Ulm", "Ulm: the river of {} is", "occurs 2 times"),
        ("The river of ulm is", "Ulm", "The river of {} is", "is spelled 'ulm'"),
        ("The river of Koln is", "Köln", "The river of {} is", "is spelled 'Koln'"),
        ("The river of {Ulm} is", None, "The river of {} is", None),
    ],
)
def test_subject_becomes_braces(prompt, subject, template, note):
    record = _one({"prompt": prompt, "target_new": "Rhine"} | ({"subject": subject} if subject else {}))
    assert record.fact.prompt == template
    assert record.notes == [] if note is None else note in record.notes[0]


def test_unusable_records_are_listed():
    rows = [
        FLAT | {"subject": "Graz"},
        FLAT,
        FLAT | {"target_new": ""},
        {"nothing": 1},
        COUNTERFACT | {"requested_rewrite": {"prompt": "{} is"}},
        "text",
    ]
    records = records_from(rows)
    assert [record.position for record in records] == [1]
    assert [s.position for s in records.skipped] == [0, 2, 3, 4, 5]
    reasons = " ".join(s.reason for s in records.skipped)
    for part in ("'Graz' does not occur", "answer is empty", "no known format", "is missing", "none (str)"):
        assert part in reasons


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_lines_and_gzip(tmp_path, name):
    rows = [FLAT, FLAT | {"case_id": 6}]
    text = "\n".join(map(json.dumps, rows)) + "\n" if "jsonl" in name else json.dumps(rows)
    data = text.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    records = load_records(path)
    assert [r.name for r in records] == ["5", "6"]
    assert len(records.sha256) == 64
    assert len(load_records(path, limit=1)) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFile, match=name):
        load_records(path)


def test_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, [FLAT, FLAT])))
    assert len(load_records(path)) == 2


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe\x00", b'{"a": '])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"broken\.json"):
        load_records(path)


@pytest.mark.parametrize("value", [[{"sentence": "x", "label": 1}], ["text"], {"0": [1, 2]}])
def test_unknown_format_names_the_fields(tmp_path, value):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="no known record format"):
        load_records(path)


def test_empty_list_is_refused():
    with pytest.raises(ValueError, match="no records"):
        records_from([])


def test_answers_flatten():
    assert flatten_answers("x") == ["x"]
    assert flatten_answers(["x", "", "y"]) == ["x", "y"]
    assert flatten_answers([["x", "y"], ["z"]]) == ["x", "y", "z"]
    assert answer_groups([["x", "y"], ["z"]]) == [["x", "y"], ["z"]]
    assert answer_groups([{"value": "x", "aliases": ["y"]}, {"value": "z", "aliases": []}]) == [
        ["x", "y"],
        ["z"],
    ]
    assert answer_groups("x") == [["x"]]


def test_texts_and_snippets(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"Corpus": "A", "Text": "one"}, "two"]))
    assert load_texts(path) == ["one", "two"]
    (tmp_path / "plain.txt").write_text("three")
    assert load_texts(tmp_path / "plain.txt") == ["three"]
    sample = {"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "Hall", "text": "A hall in Ulm."}]}
    path.write_text(json.dumps([sample]))
    snippets = load_snippets(path)
    assert snippets.texts["P1", "Q1"] == ["A hall in Ulm."]
    assert snippets.by_name["P1", "Q1", "Hall"] == ["A hall in Ulm."]
    with pytest.raises(ValueError, match="holds no texts"):
        load_texts(path)
