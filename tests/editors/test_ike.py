"""IKE: demonstrations and the fact in front of the prompts that are about it."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import bag_of_tokens
from memory.toy import generate, last_logits
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS

import fastedit
from fastedit import CorruptFile, Fact, InvalidFact
from fastedit.cli.main import main
from fastedit.data import Record
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory.demonstrations import BLOCK, Example, examples_of, kinds
from fastedit.memory.sentences import SentenceEncoder
from fastedit.memory.text_prefix import ids_in_front
from fastedit.models import encode_prompt

PROMPTS = [FACTS[0].text, "The Eiffel Tower is in the city of", FACTS[1].text, "Rome", FACTS[2].text]
ROUTES = [0, None, 1, None, 2]
WIDE = {"max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bag_of_tokens(tmp_path_factory.mktemp("encoder")))


def asked(texts: list[str] = PROMPTS) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def routes(model: Any) -> list[int | None]:
    return [row[0]["route"] for row in route_info(model)]


def records() -> list[Record]:
    places = ["Spain", "Italy", "Japan", "France", "Peru", "Chad"]
    return [
        Record(
            Fact("The capital of {} is", place, "Rome"),
            rephrase=[f"{place} is ruled from"],
            neighborhood=[f"The king of {place} sits in"],
            true_answers=["Lima"],
        )
        for place in places
    ]


def edited(encoder: str, family: str = "llama", **options: Any) -> tuple[Any, Any, Any]:
    model = tiny_model(family, **({} if family in ("gpt2", "gptj") else WIDE))
    params = {"encoder": encoder, "tokenizer": encoder, "k": 0, **options.pop("params", {})}
    editor = fastedit.editor("ike", model, tiny_tokenizer(), params=params, **options)
    return model, editor, editor.edit(FACTS)


def in_front(editor: Any, row: int) -> str:
    memory = editor.side.memory
    return tiny_tokenizer().decode(memory.ids([memory.lines[row]]))


# ------------------------------------------------------------------ texts


def test_the_text_by_its_definition(encoder: str) -> None:
    _, editor, edit = edited(encoder, params={"k": 4, "ratio": [1, 1, 2]}, demonstrations=records())
    reader = SentenceEncoder.load({"encoder": encoder, "pooling": "mean"})
    texts = [fact.text + fact.target for fact in FACTS]
    for row, fact in enumerate(FACTS):
        others = [r for r in records() if r.fact.subject != fact.subject]
        keys = reader.embed([r.fact.text + r.fact.target for r in others])
        near = (keys @ reader.embed([texts[row]])[0]).sort(descending=True, stable=True).indices[:4].tolist()
        shown = kinds(4, [1, 1, 2], random.Random(f"0 {fact.text} {fact.target}"))
        answers = {"copy": "{0} Rome", "update": "{1} Rome", "retain": "{2} Lima"}
        blocks = []
        for number, kind in zip(near, shown, strict=True):
            r = others[number]
            asks = answers[kind].format(r.fact.text, r.rephrase[0], r.neighborhood[0])
            blocks.append(f"New Fact: {r.fact.text} Rome\nPrompt: {asks}")
        own = f"New Fact: {texts[row]}\nPrompt: "
        expected = "\n\n".join([*blocks[::-1], own + texts[row], own])
        assert in_front(editor, row) == expected
    assert edit.measured["demonstrations"] == {"copy": [1] * 3, "update": [1] * 3, "retain": [2] * 3}
    assert "The capital of France is Rome" not in in_front(editor, 0)  # its own subject
    assert sum(edit.measured["tokens_in_front"]) == len(edit.content["ids"])


def test_the_kinds_come_in_the_published_ratio() -> None:
    rng = random.Random(0)
    assert Counter(kinds(32, (4, 12, 16), rng)) == {"copy": 4, "update": 12, "retain": 16}
    assert Counter(kinds(3, (4, 12, 16), rng)) == {"update": 1, "retain": 2}
    assert len({tuple(kinds(8, (1, 1, 2), rng)) for _ in range(9)}) > 1
    assert kinds(0, (1, 1, 1), rng) == []


def test_official_keeps_the_edits_own_subject_and_has_no_gate(encoder: str) -> None:
    model, editor, _ = edited(encoder, params={"k": 6}, demonstrations=records(), profile="official")
    assert "The capital of France is Rome" in in_front(editor, 0)
    last_logits(model, asked())
    assert None not in routes(model)


def test_orders_templates_and_the_block_of_the_fact(encoder: str) -> None:
    params = {"k": 2, "ratio": [1, 0, 0], "template": "Q: {fact}. {prompt}", "separator": " | "}
    params |= {"order": "nearest_first", "copy_block": False}
    _, editor, _ = edited(encoder, params=params, demonstrations=[r.fact for r in records()])
    front = in_front(editor, 0)
    parts = front.split(" | ")
    assert len(parts) == 3
    assert parts[2] == "Q: The capital of France is Lyon. "
    flipped = edited(encoder, params={**params, "order": "nearest_last"}, demonstrations=records())[1]
    assert in_front(flipped, 0).split(" | ") == [parts[1], parts[0], parts[2]]


def test_without_demonstrations_the_fact_alone_is_in_front(encoder: str) -> None:
    _, editor, edit = edited(encoder)
    assert in_front(editor, 0) == "The capital of France is Lyon\n"
    assert edit.measured["demonstrations"] == {"copy": [0] * 3, "update": [0] * 3, "retain": [0] * 3}


def test_as_many_demonstrations_as_fit(encoder: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    params = {"encoder": encoder, "k": 5, "reserve": 60, "copy_block": False, "ratio": [1, 1, 1]}
    tokenizer = tiny_tokenizer()
    editor = fastedit.editor("ike", model, tokenizer, params=params, demonstrations=records())
    edit = editor.edit(FACTS[:1])
    counts = edit.measured["demonstrations"]
    n = sum(each[0] for each in counts.values())
    assert 0 < n < 5
    assert "fewer than 5 demonstrations" in caplog.text
    blocks = [block for _, block in editor.demonstrator.blocks(FACTS[0], 5)]
    own = "New Fact: The capital of France is Lyon\nPrompt: "

    def length(count: int) -> int:
        return len(ids_in_front(tokenizer, "\n\n".join([*blocks[:count][::-1], own])))

    assert edit.measured["tokens_in_front"] == [length(n)]
    assert length(n) <= 256 - 60 < length(n + 1)
    tight = fastedit.editor(
        "ike", model, tokenizer, params={**params, "reserve": 250}, demonstrations=records()
    )
    with pytest.raises(InvalidFact, match="without any demonstration"):
        tight.edit(FACTS[2:])


def test_what_examples_are_made_of() -> None:
    from fastedit.data.records import Item

    record = Record(
        FACTS[0],
        rephrase=["France has the capital"],
        locality={"a": [Item("Who?", ["Me", "You"]), Item("Where?", [])]},
        neighborhood=["Spain is ruled from"],
        true_answers=["Paris"],
        more=[(FACTS[1], [])],
    )
    unrelated = [("Who?", "Me"), ("Spain is ruled from", "Paris")]
    assert examples_of([record, FACTS[2]]) == [
        Example(FACTS[0], ["France has the capital"], unrelated),
        Example(FACTS[1], [], unrelated),
        Example(FACTS[2]),
    ]
    rng = random.Random(0)
    assert Example(FACTS[0]).can("copy")
    assert not Example(FACTS[0]).can("update")
    text = "New Fact: The capital of France is Lyon\nPrompt: The capital of France is Lyon"
    assert Example(FACTS[0]).block("copy", BLOCK, rng) == text


# ------------------------------------------------------------------ serving


@pytest.mark.parametrize(("family", "k"), [("llama", 3), ("qwen2", 3), ("gpt2", 0), ("gptj", 0)])
def test_a_routed_prompt_is_read_behind_its_text(family: str, k: int, encoder: str) -> None:
    model, editor, _ = edited(encoder, family, params={"k": k}, demonstrations=records())
    ours = last_logits(model, asked())
    assert routes(model) == ROUTES
    base = tiny_model(family, **({} if family in ("gpt2", "gptj") else WIDE))
    memory = editor.side.memory
    found = generate(model, asked())
    for row, (text, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        ids = encode_prompt(tiny_tokenizer(), text)
        if route is not None:
            ids = memory.ids([memory.lines[route]]) + ids
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        torch.testing.assert_close(ours[row], last_logits(base, given)[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(generate(base, given)[0], found[row])
    with prompts(model, asked()["attention_mask"].sum(1)):
        assert torch.equal(generate(model, asked(), use_cache=False), found)


def test_the_text_is_read_once(encoder: str) -> None:
    model, editor, _ = edited(encoder, params={"k": 3}, demonstrations=records())
    last_logits(model, asked())
    made: list[int] = []
    memory = editor.side.memory
    memory.prefix = lambda index: made.append(index)
    generate(model, asked(PROMPTS[:1] * 2))
    assert made == []


# ------------------------------------------------------------------ edits as things


def test_edits_come_off_go_back_on_and_are_saved(encoder: str, tmp_path: Path) -> None:
    model, editor, first = edited(encoder, params={"k": 2}, demonstrations=records())
    newer = editor.edit([Fact(FACTS[0].prompt, FACTS[0].subject, "Rome")])
    assert editor.side.memory.n_entries == 3
    newer.revert()
    expected = last_logits(model, asked())
    assert routes(model) == ROUTES
    first.save(tmp_path / "first")
    first.revert()
    assert not sides_of(model)
    fastedit.load_edit(tmp_path / "first").apply(model)  # without demonstrations
    torch.testing.assert_close(last_logits(model, asked()), expected)
    fastedit.save_model(model, tmp_path / "model", tiny_tokenizer())
    torch.testing.assert_close(last_logits(fastedit.load_model(tmp_path / "model"), asked()), expected)


def test_errors(encoder: str) -> None:
    model = tiny_model("llama", **WIDE)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": -1}, "k must not be negative"),
        ({"ratio": [1, 1]}, "ratio must be three numbers"),
        ({"order": "best"}, "order must be"),
        ({"template": "{fact} {prompt}."}, "end in {prompt}"),
        ({}, "needs records"),
    ]
    for params, message in wrong:
        with pytest.raises(ValueError, match=message):
            fastedit.editor("ike", model, tiny_tokenizer(), params={"encoder": encoder, **params})
    with pytest.raises(InvalidFact, match="no facts to demonstrate"):
        fastedit.editor("ike", model, tiny_tokenizer(), params={"encoder": encoder}, demonstrations=[])
    model, _, edit = edited(encoder)
    edit.revert()
    broken = copy.deepcopy(edit)
    broken.tensors = {**edit.content, "lengths": edit.content["lengths"] + 1}
    with pytest.raises(CorruptFile, match="ids of a text"):
        broken.apply(model)
    assert not sides_of(model)


def test_from_the_command_line(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(tmp_path / "model"), tmp_path / "data.json"
    tiny_model("llama", **WIDE).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    facts = [{"prompt": "The capital of {} is", "subject": "Chad", "target_new": "Rome"}]
    data.write_text(json.dumps(facts))
    settings = [f"encoder={encoder}", "k=1", f"demonstrations={data}"]
    edit = [
        "edit",
        model,
        "--fact",
        "The capital of {France} is -> Lyon",
        "--method",
        "ike",
        "--device",
        "cpu",
    ]
    places = ["--out", str(tmp_path / "edit"), "--save-model", str(tmp_path / "edited"), "--json"]
    assert main([*edit, "--set", *settings, *places]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["demonstrations"] == str(data)
    again = fastedit.load_model(tmp_path / "edited")
    last_logits(again, asked())
    assert routes(again) == [0, None, None, None, None]
