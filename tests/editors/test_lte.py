"""LTE: facts in front of the prompts that are about them, and the adapter that is trained for it."""

from __future__ import annotations

import builtins
import copy
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import bag_of_tokens
from memory.toy import generate, last_logits
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, bits, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, InvalidFact
from fastedit.cli.main import main
from fastedit.data import Record
from fastedit.editors.lte import TEMPLATE, load_adapter, trained_settings
from fastedit.editors.lte_training import (
    LteLearner,
    LteTrainingParams,
    base_answers,
    examples_of,
    rate,
    train,
)
from fastedit.editors.training_loop import Loop
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory.sentences import SentenceEncoder
from fastedit.models import encode_prompt

PROMPTS = [FACTS[0].text, "The Eiffel Tower is in the city of", FACTS[1].text, "Rome", FACTS[2].text]
ROUTES = [0, None, 1, None, 2]
SHORT = "Facts: {facts}\n"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bag_of_tokens(tmp_path_factory.mktemp("encoder")))


def asked(texts: list[str] = PROMPTS, side: str = "left", bos: bool = False) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(add_bos=bos)
    tokenizer.padding_side = side
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def routes(model: Any) -> list[int | None]:
    return [row[0]["route"] for row in route_info(model)]


def edited(encoder: str, family: str = "llama", bos: bool = False, **options: Any) -> tuple[Any, Any, Any]:
    model = tiny_model(family)
    params = {"encoder": encoder, "tokenizer": encoder, "template": SHORT, **options.pop("params", {})}
    editor = fastedit.editor("lte", model, tiny_tokenizer(add_bos=bos), params=params, **options)
    return model, editor, editor.edit(FACTS)


@torch.no_grad()
def reference(model: Any, blocks: list[str | None], bos: bool = False) -> torch.Tensor:
    """Last logits of every prompt behind its block, by the definition: one sample, no padding."""
    result = []
    for text, block in zip(PROMPTS, blocks, strict=True):
        ids = encode_prompt(tiny_tokenizer(add_bos=bos), text)
        if block is not None:
            ids = encode_prompt(tiny_tokenizer(add_bos=bos), block) + ids[bos:]  # one BOS
        result.append(model(torch.tensor([ids])).logits[0, -1])
    return torch.stack(result)


def blocks(template: str = SHORT) -> list[str | None]:
    return [
        None if i is None else template.replace("{facts}", FACTS[i].text + FACTS[i].target) for i in ROUTES
    ]


# ------------------------------------------------------------------ serving


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen2"])
def test_a_routed_prompt_is_read_behind_its_block(family: str, bos: bool, side: str, encoder: str) -> None:
    model, _, _ = edited(encoder, family, bos)
    ours = last_logits(model, asked(side=side, bos=bos))
    assert routes(model) == ROUTES
    expected = reference(tiny_model(family), blocks(), bos)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_nothing_routed_keeps_the_bits(encoder: str) -> None:
    model, _, _ = edited(encoder)
    inputs = asked(["Rome", "The Eiffel Tower is in the city of"])
    base = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(base, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_generation_of_mixed_batches(family: str, encoder: str) -> None:
    model, _, _ = edited(encoder, family)
    inputs = asked()
    found = generate(model, inputs)
    assert routes(model) == ROUTES
    base = tiny_model(family)
    for row, (text, block) in enumerate(zip(PROMPTS, blocks(), strict=True)):
        ids = [*encode_prompt(tiny_tokenizer(), block or ""), *encode_prompt(tiny_tokenizer(), text)]
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        assert torch.equal(generate(base, given)[0], found[row])
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, use_cache=False), found)


def test_several_facts_in_one_block(encoder: str) -> None:
    model, editor, _ = edited(encoder, params={"n_facts": 2, "threshold": 0.4})
    near = Fact("The capital of {} is", "Frances", "Rome")
    editor.edit([near])
    ours = last_logits(model, asked())
    memory = editor.side.memory
    assert route_info(model)[0][0]["edit"] == editor.side.edits[0].id
    entry = memory._entries[int(routes(model)[0] or 0)]
    assert [memory.lines[number].fact for number in entry] == [FACTS[0], near]
    block = "Facts: 1. The capital of France is Lyon\n2. The capital of Frances is Rome\n"
    expected = reference(tiny_model("llama"), [block, *[None] * 4])[0]
    torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)


def test_official_has_no_gate(encoder: str) -> None:
    model, editor, _ = edited(encoder, profile="official")
    last_logits(model, asked())
    assert None not in routes(model)
    assert editor.params.threshold is None
    assert [route_info(model)[i][0]["score"] for i in (0, 2, 4)] == pytest.approx([1.0] * 3, abs=1e-5)


# ------------------------------------------------------------------ edits as things


def test_the_newest_of_the_same_prompt_answers(encoder: str) -> None:
    model, editor, _ = edited(encoder)
    before = last_logits(model, asked())
    newer = editor.edit([Fact(FACTS[0].prompt, FACTS[0].subject, "Rome")])
    changed = last_logits(model, asked())
    block = "Facts: The capital of France is Rome\n"
    expected = reference(tiny_model("llama"), [block, *blocks()[1:]])
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    newer.revert()
    torch.testing.assert_close(last_logits(model, asked()), before)


def test_edits_come_off_go_back_on_and_are_saved(encoder: str, tmp_path: Path) -> None:
    model, editor, first = edited(encoder)
    second = editor.edit([Fact("{} is in", "Oslo", "Rome")])
    expected = last_logits(model, asked())
    first.save(tmp_path / "first")
    first.revert()
    last_logits(model, asked())
    assert routes(model) == [None] * 5
    loaded = fastedit.load_edit(tmp_path / "first").apply(model)
    torch.testing.assert_close(last_logits(model, asked()), expected)
    twin = copy.deepcopy(model)
    second.revert()
    loaded.revert()
    assert not sides_of(model)
    torch.testing.assert_close(last_logits(twin, asked()), expected)
    fastedit.save_model(twin, tmp_path / "model", tiny_tokenizer())
    torch.testing.assert_close(last_logits(fastedit.load_model(tmp_path / "model"), asked()), expected)


def test_errors(encoder: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    params = {"encoder": encoder, "template": SHORT}
    with pytest.raises(ValueError, match="exactly one"):
        fastedit.editor("lte", model, tiny_tokenizer(), params={**params, "template": "Facts:"})
    with pytest.raises(ValueError, match="n_facts"):
        fastedit.editor("lte", model, tiny_tokenizer(), params={**params, "n_facts": 0})
    with pytest.raises(FasteditError, match="lte.json"):
        fastedit.editor("lte", model, tiny_tokenizer(), params={**params, "adapter": str(tmp_path)})
    editor = fastedit.editor("lte", model, tiny_tokenizer(), params=params)
    with pytest.raises(InvalidFact, match="context holds 128"):
        editor.edit([Fact("{} " + "and so on " * 10 + "is", "It", "Rome")])
    edit = editor.edit(FACTS)
    edit.revert()
    other = copy.deepcopy(edit)
    other.params |= {"encoder": str(bag_of_tokens(tmp_path / "other", seed=1)), "tokenizer": encoder}
    with pytest.raises(BaseMismatch, match="another encoder"):
        other.apply(model)
    edit.params["tokenizer"] = encoder
    edit.tensors = {"keys": edit.content["keys"][:1]}
    with pytest.raises(CorruptFile, match="a key for each"):
        edit.apply(model)
    assert not sides_of(model)


# ------------------------------------------------------------------ training


def records(n: int = 12) -> list[Record]:
    facts = [Fact("{} is in", f"Town {i}", ["Rome", "Lima"][i % 2]) for i in range(n)]
    return [Record(f, rephrase=[f"Where is {f.subject}? In"], neighborhood=["The sky is"]) for f in facts]


def settings(encoder: str, **more: Any) -> dict[str, Any]:
    quick = {"steps": 8, "lr": 0.02, "batch": 4, "validate_every": 4, "holdout": 0.2, "template": SHORT}
    return {"encoder": encoder, **quick, **more}


def trained_tensors(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


def test_examples_and_their_neighbours(encoder: str) -> None:
    reader = SentenceEncoder.load({"encoder": encoder, "pooling": "mean"})
    given = records(8)
    given[3] = Record(Fact("{} is in", "Town 3", "Rome"), more=[(Fact("{} is old", "town 3", "Lima"), [])])
    found = examples_of(given, reader)
    assert len(found) == 9
    assert found[3].outside == ["The sky is"]  # another record's
    keys = {example.fact: reader.embed([example.fact.text])[0] for example in found}
    for example in found:
        others = [f for f in keys if f.subject.casefold() != example.fact.subject.casefold()]
        near = sorted((float(keys[f] @ keys[example.fact]) for f in others), reverse=True)[:5]
        scores = [float(keys[f] @ keys[example.fact]) for f in example.neighbours]
        assert scores == pytest.approx(near, abs=1e-6)
        assert all(f in others for f in example.neighbours)
    with pytest.raises(ValueError, match="out of scope"):
        examples_of([Record(f) for f in FACTS], reader)
    other = Record(
        Fact("{} is in", "town 0", "Rome"), rephrase=["Town 1 is in"], neighborhood=["Where is Town 2? In"]
    )
    left = examples_of(records(4), reader, [other])
    assert [example.inside for example in left] == [
        ["Town 2 is in"],
        ["Town 3 is in", "Where is Town 3? In"],
    ]
    with pytest.raises(ValueError, match="out of scope"):
        examples_of(records(4), reader, [Record(FACTS[0], neighborhood=["The sky is"])])


def test_rows_by_their_definition(encoder: str) -> None:
    import peft

    reader = SentenceEncoder.load({"encoder": encoder, "pooling": "mean"})
    examples = examples_of(records(), reader)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(add_bos=True)
    answers = base_answers(model, tokenizer, examples, 3)
    ids = encode_prompt(tokenizer, "The sky is")
    expected = generate(model, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))})
    assert answers == {"The sky is": expected[0, :3].tolist()}
    chosen = LteTrainingParams(**settings(encoder))
    learner = LteLearner(peft, model, tokenizer, chosen, answers, "", 0)
    rng = random.Random(0)
    counts: Counter[int] = Counter()
    shown = 0
    for _ in range(400):
        inside, outside = learner.rows(examples[:1], rng)
        text = tokenizer.decode(inside.ids)
        assert inside.ids.count(0) == 1  # one BOS
        lines = text.split("Facts: ")[1].split("\n")
        counts[len(lines) - 1] += 1
        assert any(line.endswith("Town 0 is in Rome") for line in lines[:-1])
        assert lines[-1] in ("Town 0 is in Rome", "Where is Town 0? In Rome")
        assert inside.ids[-inside.n_answer :] == tokenizer(" Rome", add_special_tokens=False)["input_ids"]
        assert outside.ids[-3:] == answers["The sky is"]
        rest = tokenizer.decode(outside.ids[:-3])
        assert rest.endswith("The sky is")
        shown += "Town 0 is in Rome" in rest
    assert 170 < counts[1] < 230
    assert 70 < counts[2] < 130
    assert 70 < counts[3] < 130
    assert 170 < shown < 230
    learner.unload()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 97)) for i in range(97)])
    assert rate(0, 1, 0.03) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_and_the_adapter_in_use(family: str, encoder: str, tmp_path: Path) -> None:
    model, out = tiny_model(family), tmp_path / "lte"
    before, names = bits(model), [name for name, _ in model.named_parameters()]
    report = train(model, tiny_tokenizer(), records(), out, params=settings(encoder, steps=40))
    assert same_bits(model, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert (report["steps"], report["examples"]) == (40, {"trained": 10, "held": 2})
    assert report["history"][-1]["loss"] < 0.9 * report["history"][0]["loss"]
    assert not (tmp_path / "lte.checkpoint").exists()

    params = {"adapter": str(out), "tokenizer": encoder}
    with pytest.raises(BaseMismatch, match="load_adapter"):
        fastedit.editor("lte", model, tiny_tokenizer(), params=params)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    load_adapter(model, out)
    with torch.no_grad():
        assert torch.equal(model(**asked()).logits, merged(**asked()).logits)
    with pytest.raises(BaseMismatch, match="another model"):
        load_adapter(model, out)
    editor = fastedit.editor("lte", model, tiny_tokenizer(), params=params)
    assert (editor.params.template, editor.params.encoder) == (SHORT, encoder)
    editor.edit(FACTS)
    ours = last_logits(model, asked())
    torch.testing.assert_close(ours, reference(merged, blocks()), rtol=1e-4, atol=1e-5)


def test_the_adapter_alone_is_trained_to_what_peft_gives(encoder: str, tmp_path: Path) -> None:
    """The folder is an adapter that peft reads, and its outputs are those of the merged model."""
    from peft import PeftModel

    out = tmp_path / "lte"
    train(tiny_model("llama"), tiny_tokenizer(), records(), out, params=settings(encoder))
    tuned = PeftModel.from_pretrained(tiny_model("llama"), str(out)).eval()
    merged = load_adapter(tiny_model("llama"), out)
    with torch.no_grad():
        torch.testing.assert_close(tuned(**asked()).logits, merged(**asked()).logits, rtol=1e-4, atol=1e-5)
    assert trained_settings(out)["training"]["rank"] == 8
    assert TEMPLATE.count("{facts}") == 1


def test_training_goes_on_where_it_was_interrupted(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = settings(encoder)
    whole = train(tiny_model("llama"), tiny_tokenizer(), records(), tmp_path / "whole", params=params)
    advance = Loop.advance

    def interrupted(loop: Any) -> None:
        if loop.step == 6:
            raise KeyboardInterrupt
        advance(loop)

    model, out = tiny_model("llama"), tmp_path / "parts"
    before = bits(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "advance", interrupted)
        train(model, tiny_tokenizer(), records(), out, params=params)
    assert same_bits(model, before)
    with pytest.raises(ValueError, match="another model, data or settings"):
        train(model, tiny_tokenizer(), records(), out, params={**params, "lr": 0.01})
    assert train(model, tiny_tokenizer(), records(), out, params=params) == whole
    for name, tensor in trained_tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, trained_tensors(out)[name])
    with pytest.raises(FileExistsError):
        train(model, tiny_tokenizer(), records(), out, params=params)


def test_training_errors(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tokenizer = tmp_path / "lte", tiny_tokenizer()
    for wrong in ({"rank": 0}, {"holdout": 1.0}, {"template": "x"}, {"nonsense": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train(tiny_model("llama"), tokenizer, records(), out, params={**settings(encoder), **wrong})
    long = [
        Record(Fact("{} " + "and so on " * 14 + "is", f"T{i}", "Rome"), neighborhood=["A"]) for i in range(4)
    ]
    with pytest.raises(InvalidFact, match="the context holds 128"):
        train(tiny_model("llama"), tokenizer, long, tmp_path / "long", params=settings(encoder))
    model, _, _ = edited(encoder)
    with pytest.raises(FasteditError, match="has a memory"):
        train(model, tokenizer, records(), out, params=settings(encoder))
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FasteditError, match="pip install"):
        train(tiny_model("llama"), tokenizer, records(), out, params=settings(encoder))
    assert not out.exists()


def test_from_the_command_line(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = str(tmp_path / "model"), str(tmp_path / "data.json"), str(tmp_path / "lte")
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": "{} is in",
                "subject": f"Town {i}",
                "target_new": {"str": "Rome"},
                "target_true": {"str": "Lima"},
            },
            "paraphrase_prompts": [f"Where is Town {i}? In"],
            "neighborhood_prompts": ["The sky is"],
        }
        for i in range(6)
    ]
    Path(data).write_text(json.dumps(rows))
    values = [f"{name}={value}" for name, value in settings(encoder).items() if name != "template"]
    command = ["train", "lte", "--model", model, "--data", data, "--out", out, "--device", "cpu", "--json"]
    assert main([*command, "--set", *values, "template=Facts: {facts}\n"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    fact = ["--fact", "The capital of {France} is -> Lyon", "--method", "lte", "--set", f"adapter={out}"]
    places = ["--out", str(tmp_path / "edit"), "--save-model", str(tmp_path / "edited"), "--json"]
    assert main(["edit", f"{out}/merged", "--device", "cpu", *fact, *places]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["template"] == SHORT
    again = fastedit.load_model(tmp_path / "edited")
    last_logits(again, asked())
    assert routes(again) == [0, None, None, None, None]
