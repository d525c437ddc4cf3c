"""SERAC: routes by embedding, counterfactual answers under generate(), edits as things, training."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from memory.toy import generate, last_logits
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, bits, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, InvalidFact
from fastedit.data import records_from
from fastedit.editors.serac import SeracParams, pooled_by_base
from fastedit.editors.serac_training import balanced_bce, examples_of, train
from fastedit.editors.training_loop import split_by_subject
from fastedit.evaluation.scoring import Pair, Scorer
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory.encoder import TextEncoder, pool
from fastedit.memory.scope import ScopeSettings, embeddings
from fastedit.memory.serac import generate as one_model_each
from fastedit.models import encode_prompt, target_ids

PROMPTS = [FACTS[0].text, "The Eiffel Tower is in the city of", FACTS[1].text, "Rome", FACTS[2].text]
UNCOMPILED = {"disable_compile": True} if hasattr(transformers.GenerationConfig(), "disable_compile") else {}
ROUTES = [0, None, 1, None, 2]
STRICT = {"threshold": 0.9999}  # of the base model's states: random models find everything alike


def asked(texts: list[str] = PROMPTS, side: str = "left", bos: bool = False) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(add_bos=bos)
    tokenizer.padding_side = side
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def routes(model: Any) -> list[int | None]:
    return [row[0]["route"] for row in route_info(model)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random text encoder of 48 positions."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=320, max_position_embeddings=48, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of another family with the same vocabulary."""
    folder = tmp_path_factory.mktemp("small")
    tiny_model("gpt2", seed=7).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edited(family: str = "llama", bos: bool = False, **options: Any) -> tuple[Any, Any, Any]:
    """A model, its editor, and an edit of FACTS in it."""
    model = tiny_model(family)
    options.setdefault("params", STRICT)
    editor = fastedit.editor("serac", model, tiny_tokenizer(add_bos=bos), **options)
    return model, editor, editor.edit(FACTS)


def prefix(fact: Fact, bos: bool = False, separator: str = "\n") -> list[int]:
    return encode_prompt(tiny_tokenizer(add_bos=bos), fact.text + fact.target + separator)


@torch.no_grad()
def reference(model: Any, answering: Any, bos: bool = False) -> torch.Tensor:
    """Last logits of every prompt, by the definition: one sample, one model, no padding."""
    result = []
    for text, route in zip(PROMPTS, ROUTES, strict=True):
        ids = encode_prompt(tiny_tokenizer(add_bos=bos), text)
        if route is not None:
            ids = prefix(FACTS[route], bos) + ids[bos:]  # one BOS
        result.append((model if route is None else answering)(torch.tensor([ids])).logits[0, -1])
    return torch.stack(result)


# ------------------------------------------------------------------ routes and logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_hard_route_equals_reference_logits(family: str, bos: bool, side: str) -> None:
    model, _, _ = edited(family, bos)
    ours = last_logits(model, asked(side=side, bos=bos))
    assert routes(model) == ROUTES
    base = tiny_model(family)
    torch.testing.assert_close(ours, reference(base, base, bos), rtol=1e-4, atol=1e-5)
    alone = last_logits(base, asked(side=side, bos=bos))
    unrouted = [i for i, route in enumerate(ROUTES) if route is None]
    assert torch.equal(ours[unrouted], alone[unrouted])  # bit for bit those of the base model


def test_another_counterfactual_model_and_an_encoder(encoder: Path, small: Path) -> None:
    params = {"threshold": 0.9999}
    model, editor, _ = edited(classifier=encoder, counterfactual=small, params=params)
    ours = last_logits(model, asked())
    assert routes(model) == ROUTES
    torch.testing.assert_close(
        ours, reference(tiny_model("llama"), tiny_model("gpt2", seed=7)), rtol=1e-4, atol=1e-5
    )
    assert editor.params.pooling == "mean"


@pytest.mark.parametrize("which", ["base", "encoder"])
def test_cached_embeddings_equal_encoding_again(which: str, encoder: Path) -> None:
    model, editor, edit = edited(classifier="base" if which == "base" else encoder)
    again = torch.cat([editor.embed([fact]) for fact in FACTS])
    torch.testing.assert_close(edit.content["embeddings"], again, rtol=1e-5, atol=1e-6)
    memory = editor.side.memory
    index = memory._index
    assert torch.equal(index.keys(), edit.content["embeddings"])
    last_logits(model, asked())
    scores = torch.tensor([row[0]["score"] for row in route_info(model)])
    hit = torch.tensor([route is not None for route in ROUTES])
    torch.testing.assert_close(scores[hit], torch.ones(3), rtol=0, atol=1e-4)


def test_nothing_routed_keeps_the_bits() -> None:
    model, _, _ = edited()
    inputs = asked(["Rome", "The Eiffel Tower is in the city of"])
    base = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(base, inputs))


def test_soft_mixing() -> None:
    model, _, _ = edited(params={"mix": "soft"})
    base = tiny_model("llama")
    with torch.no_grad():
        ours = model(**asked(PROMPTS[:1])).logits[0, -1]
    score = route_info(model)[0][0]["score"]
    plain = last_logits(base, asked(PROMPTS[:1]))[0].softmax(-1)
    theirs = reference(base, base)[0].softmax(-1)
    expected = ((1 - score) * plain + score * theirs + torch.finfo(torch.float32).eps).log()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    last_logits(model, asked())
    assert None not in routes(model)  # both models in every answer


def test_official_profile(encoder: Path) -> None:
    model = tiny_model("llama")
    editor = fastedit.editor("serac", model, tiny_tokenizer(), classifier=encoder, profile="official")
    assert (editor.params.pooling, editor.params.similarity, editor.params.scale) == ("cls", "distance", 1.0)
    edit = editor.edit(FACTS)
    reader = TextEncoder.load(encoder)
    text = FACTS[0].text + FACTS[0].target  # this tokenizer has no separator
    assert torch.allclose(edit.content["embeddings"][0], reader.pooled([text], "cls")[0], atol=1e-6)
    last_logits(model, asked(PROMPTS[:1]))
    found = reader.pooled([PROMPTS[0]], "cls")
    squares = (edit.content["embeddings"] - found).square().sum(1)
    assert route_info(model)[0][0]["score"] == pytest.approx(float(torch.exp(-squares.min())), rel=1e-4)
    assert edit.about["prefixes"][0] == prefix(FACTS[0], separator=" ")


# ------------------------------------------------------------------ generate


@pytest.mark.parametrize("which", ["base", "small"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_of_mixed_batches(family: str, which: str, small: Path) -> None:
    model, _, _ = edited(family, counterfactual="base" if which == "base" else small)
    if getattr(model, "_supports_cache_class", True) is False:
        pytest.skip("this transformers hands GPT-2 tuples of keys and values, which SERAC refuses")
    inputs = asked()
    found = generate(model, inputs)
    assert routes(model) == ROUTES
    for text, expected in zip(PROMPTS, found, strict=True):
        assert torch.equal(generate(model, asked([text]))[0], expected)
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, use_cache=False), found)
    base = tiny_model(family)
    other = base if which == "base" else tiny_model("gpt2", seed=7)
    for row, (text, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        ids = encode_prompt(tiny_tokenizer(), text)
        ids = ids if route is None else prefix(FACTS[route]) + ids
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        assert torch.equal(generate(base if route is None else other, given)[0], found[row])


@pytest.mark.filterwarnings("ignore:.return_dict_in_generate. is NOT set:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static", **UNCOMPILED},
        {"return_dict_in_generate": False, "output_scores": True},
    ],
    ids=["beams", "sampling", "static", "scores"],
)
def test_ways_to_generate(options: dict[str, Any], small: Path) -> None:
    model, _, _ = edited(counterfactual=small)
    inputs = asked()
    torch.manual_seed(0)
    cached = generate(model, inputs, **options)
    torch.manual_seed(0)
    uncached = {key: value for key, value in options.items() if "cache" not in key and "compile" not in key}
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, **uncached, use_cache=False), cached)


def test_a_cropped_cache_shortens_both(small: Path) -> None:
    model, _, _ = edited(counterfactual=small)
    inputs = asked(PROMPTS[:1])
    plain = generate(model, inputs, eos_token_id=1)
    assert torch.equal(generate(model, inputs, eos_token_id=1, prompt_lookup_num_tokens=3), plain)


def test_one_model_for_each_sample(small: Path) -> None:
    model, editor, _ = edited(counterfactual=small)
    inputs = asked()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ran: list[int] = []
    hook = model.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: ran.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = one_model_each(model, **inputs, **settings)
    hook.remove()
    assert set(ran) == {2}  # the base model answers the two that are not routed, and no other
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], generate(model, inputs))
    twice = one_model_each(model, **inputs, **{**settings, "num_beams": 2, "num_return_sequences": 2})
    assert torch.equal(
        twice[:, inputs["input_ids"].shape[1] :], generate(model, inputs, num_beams=2, num_return_sequences=2)
    )
    with pytest.raises(ValueError, match="ids only"):
        one_model_each(model, **inputs, return_dict_in_generate=True)
    editor.side.router.sides[0].enabled = False
    assert torch.equal(
        one_model_each(model, **inputs, **settings)[:, inputs["input_ids"].shape[1] :],
        generate(tiny_model("llama"), inputs),
    )


def test_scores_by_teacher_forcing_see_the_memory(small: Path) -> None:
    model, _, _ = edited(counterfactual=small)
    fact = FACTS[0]
    (score,) = Scorer(model, tiny_tokenizer()).score([Pair(fact.text, fact.target, joined=False)])
    target = target_ids(tiny_tokenizer(), fact.target)
    ids = prefix(fact) + encode_prompt(tiny_tokenizer(), fact.text) + target
    with torch.no_grad():
        logits = tiny_model("gpt2", seed=7)(torch.tensor([ids])).logits[0, -len(target) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_beside_another_memory() -> None:
    model, _, _ = edited()
    grace = fastedit.editor("grace", model, tiny_tokenizer(), params={"layers": [1], "steps": 2}).edit(
        [Fact("{} is a city in", "Rome", "Italy")]
    )
    inputs = asked([*PROMPTS, "Rome is a city in"])
    found = generate(model, inputs)
    info = route_info(model)
    assert [{entry["method"] for entry in row} for row in info] == [{"serac", "grace"}] * 6
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, use_cache=False), found)
    grace.revert()
    assert [side.memory.method for side in sides_of(model)] == ["serac"]


def test_decode_steps_do_not_look_at_the_routes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would make every token wait for the device."""
    model, *_ = edited()
    inputs, token = asked(), torch.ones(len(PROMPTS), 1, dtype=torch.int64)
    mask = torch.cat((inputs["attention_mask"], token), 1)
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model(**inputs, use_cache=True, past_key_values=cache)
        for name in ("tolist", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, None)
        model(input_ids=token, attention_mask=mask, past_key_values=cache)


# ------------------------------------------------------------------ edits as things


def test_every_edit_can_be_taken_off_by_itself() -> None:
    model = tiny_model("llama")
    before = bits(model)
    inputs = asked()
    plain = generate(model, inputs)
    editor = fastedit.editor("serac", model, tiny_tokenizer(), params=STRICT)
    edits = [editor.edit([fact]) for fact in FACTS]
    expected = generate(model, inputs)
    edits[1].revert()
    last_logits(model, inputs)
    assert [row[0]["edit"] for row in route_info(model)] == [edits[0].id, None, None, None, edits[2].id]
    edits[1].apply(model)
    assert torch.equal(generate(model, inputs), expected)
    for edit in (edits[2], edits[0], edits[1]):
        edit.revert()
    assert sides_of(model) == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert same_bits(model, before)
    assert torch.equal(generate(model, inputs), plain)


def test_of_the_same_prompt_the_newest_answers() -> None:
    model, editor, first = edited()
    second = editor.edit([Fact(FACTS[0].prompt, FACTS[0].subject, "Rome")])
    third = editor.edit([Fact(FACTS[0].prompt, FACTS[0].subject, "Oslo")])
    owners = []
    for gone in (None, second, third):
        if gone is not None:
            gone.revert()
        last_logits(model, asked(PROMPTS[:1]))
        owners.append(route_info(model)[0][0]["edit"])
    assert owners == [third.id, third.id, first.id]


def test_saved_loaded_and_applied_elsewhere(encoder: Path, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model, _, edit = edited(classifier=encoder, counterfactual=small)
    edit.save(tmp_path / "edit")
    loaded = fastedit.load_edit(tmp_path / "edit")
    assert loaded.id == edit.id
    assert "whole model" in repr(loaded)
    other = fastedit.load_model(folder)
    loaded.apply(other)  # finds the tokenizer in the model's folder
    assert torch.equal(generate(other, asked()), generate(model, asked()))
    fastedit.save_model(other, tmp_path / "saved", tiny_tokenizer())
    again = fastedit.load_model(tmp_path / "saved")
    assert torch.equal(generate(again, asked()), generate(model, asked()))
    loaded.revert(other)
    assert sides_of(other) == []


def test_copies_and_pickles_have_memories_of_their_own(small: Path) -> None:
    model, _, edit = edited(counterfactual=small)
    expected = generate(model, asked())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(other, asked()), expected)
        edit.revert(other)
        assert sides_of(other) == []
    assert torch.equal(generate(model, asked()), expected)


# ------------------------------------------------------------------ bad input


def test_an_empty_cache_answers_nothing() -> None:
    model = tiny_model("llama")
    editor = fastedit.editor("serac", model, tiny_tokenizer())
    memory = editor.new_memory()
    inputs = asked()
    found = memory.route(inputs["input_ids"], torch.ones(5, 32), inputs["attention_mask"].bool())
    assert found.index.tolist() == [-1] * 5
    with pytest.raises(InvalidFact, match="no facts"):
        editor.edit([])
    assert sides_of(model) == []


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt2", vocab_size=400).save_pretrained(tmp_path / "larger")
    with pytest.raises(FasteditError, match="has 400 tokens, the base model 320"):
        edited(counterfactual=tmp_path / "larger")
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(FasteditError, match="tokenizer has other tokens"):
        edited(counterfactual=tmp_path / "other")


def test_another_classifier_is_refused(encoder: Path, small: Path, tmp_path: Path) -> None:
    model, _, edit = edited(classifier=encoder)
    with pytest.raises(BaseMismatch, match="has the settings"):
        fastedit.editor("serac", model, tiny_tokenizer(), params=STRICT).edit([Fact("{} is", "Rome", "old")])
    edit.params["classifier"] = "base"
    other = tiny_model("llama")
    with pytest.raises(BaseMismatch, match="made with another classifier"):
        edit.apply(other)
    assert sides_of(other) == []
    edit.params["classifier"] = str(tmp_path / "gone")
    with pytest.raises(FasteditError, match="cannot load the text encoder"):
        edit.apply(other)


def test_damaged_content_is_refused() -> None:
    _, _, edit = edited()
    edit.tensors = {"embeddings": torch.ones(2, 32)}
    with pytest.raises(CorruptFile, match="an embedding and a prefix for each"):
        edit.apply(tiny_model("llama"))


def test_prompts_longer_than_the_encoder(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, editor, _ = edited(classifier=encoder)
    long = Fact("The " * 24 + "{} is", "Rome", "old")
    with pytest.raises(InvalidFact, match="encoder holds 48"):
        editor.edit([long])
    assert editor.side.memory.n_entries == 3
    last_logits(model, asked([long.text]))
    assert "its end decides" in caplog.text
    with pytest.raises(InvalidFact, match="the context holds 128"):
        editor.edit([Fact("The " * 70 + "{} is", "Rome", "old")])


def test_calls_that_cannot_be_served() -> None:
    model, _, _ = edited()
    inputs = asked()
    with pytest.raises(ValueError, match="takes no labels"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(fastedit.UnsupportedModel, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(fastedit.UnsupportedModel, match="return_dict=True"):
        model(**inputs, return_dict=False)
    known = inspect.signature(model.forward).parameters  # the name has changed
    keep = "logits_to_keep" if "logits_to_keep" in known else "num_logits_to_keep"
    with torch.no_grad():
        assert model(**inputs, **{keep: 1}).logits.shape[1] == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mix": "both"}, "mix must be one of"),
        ({"threshold": 2.0}, "threshold of a cosine"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"layers": [0, 1]}, "states of one layer"),
        ({"layers": [9]}, "blocks 0 to 2"),
    ],
)
def test_bad_settings(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastedit.editor("serac", tiny_model("llama"), tiny_tokenizer(), params=params)


def test_params_of_every_kind(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"threshold": 0.9}')
    kinds: tuple[Any, ...] = (
        SeracParams(layers=(1,), threshold=0.9),
        {"threshold": 0.9},
        tmp_path / "p.json",
    )
    for params in kinds:
        editor = fastedit.editor(
            "serac", tiny_model("llama"), tiny_tokenizer(), params=params, classifier=encoder
        )
        assert (editor.params.threshold, editor.params.classifier) == (0.9, str(encoder))


# ------------------------------------------------------------------ embeddings


def test_pooling_and_embeddings() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2)
    tokens = torch.tensor([[False, True, True], [True, True, False]])
    assert pool(states, tokens, "cls").tolist() == [[2, 3], [6, 7]]
    assert pool(states, tokens, "last").tolist() == [[4, 5], [8, 9]]
    assert pool(states, tokens, "mean").tolist() == [[3, 4], [7, 8]]
    settings = ScopeSettings("mean", "distance", 1.0, 0.5, normalise=True)
    weight = torch.tensor([[2.0, 0.0]])
    assert embeddings(torch.tensor([[3.0, 4.0]]), settings, weight).tolist() == [[pytest.approx(1.2)]]


def test_base_states_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    together = pooled_by_base(model, tokenizer, PROMPTS, 1, "last")
    alone = torch.cat([pooled_by_base(model, tokenizer, [text], 1, "last") for text in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
        states = model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(together[0], states[0, -1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ training

CITIES = ["Paris", "Tokyo", "Rome", "Oslo", "Lima", "Bonn", "Cairo", "Delhi"]
ROWS = [
    {
        "prompt": f"The capital of {city}land is",
        "subject": f"{city}land",
        "target_new": city,
        "rephrase": [f"{city}land is governed from"],
        "locality": {"near": [{"prompt": f"{city} plays the", "ground_truth": "drum"}]},
        "portability": {},
    }
    for city in CITIES
]
SHORT = {"steps": 6, "accumulate": 1, "batch": 4, "validate_every": 2, "lr": 1e-3, "head_lr": 1e-2}


def test_balanced_bce_is_its_definition() -> None:
    s_in, s_out = torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.7, 0.1])
    expected = (-s_in.log()).mean() + (-(1 - s_out).log()).mean()
    torch.testing.assert_close(balanced_bce(-s_in.log(), -s_out.log()), expected)
    assert balanced_bce(torch.empty(0), torch.empty(0)) == 0


def test_subjects_are_not_shared() -> None:
    examples = examples_of(records_from(ROWS + ROWS))
    assert examples[0].inside == [ROWS[0]["prompt"], "Parisland is governed from"]
    assert examples[0].outside == ["Paris plays the"]
    trained, held = split_by_subject(examples, 0.25, 0)
    assert (len(trained), len(held)) == (12, 4)
    assert not {e.fact.subject for e in trained} & {e.fact.subject for e in held}
    with pytest.raises(ValueError, match="at least 2 subjects"):
        split_by_subject(examples[:1], 0.1, 0)


@pytest.mark.parametrize("which", ["base", "encoder"])
def test_training_and_what_it_makes(which: str, encoder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = bits(model)
    out = tmp_path / "out"
    report = train(
        model,
        tiny_tokenizer(),
        records_from(ROWS),
        out,
        classifier="base" if which == "base" else encoder,
        params={**SHORT, "steps": 40},
        progress=False,
    )
    assert same_bits(model, before)
    assert report["steps"] == 40
    assert report["history"][-1]["loss"] < report["history"][0]["loss"]
    assert report["validation"]["loss"] == min(row["loss"] for row in report["history"])
    assert not (tmp_path / "out.checkpoint").exists()
    editor = fastedit.editor("serac", model, tiny_tokenizer(), classifier=out)
    assert editor.params.counterfactual == str(out)
    edit = editor.edit(FACTS)
    found = generate(model, asked())
    edit.save(tmp_path / "edit")
    other = tiny_model("llama")
    fastedit.load_edit(tmp_path / "edit").apply(other)  # the tokenizer is in the trained folder
    assert torch.equal(generate(other, asked()), found)
    if which == "base":
        with pytest.raises(BaseMismatch, match="states of another model"):
            fastedit.editor("serac", tiny_model("llama", seed=4), tiny_tokenizer(), classifier=out)
    with pytest.raises(FileExistsError, match="choose a new folder"):
        train(model, tiny_tokenizer(), records_from(ROWS), out)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.editors import training_loop

    def run(out: Path, **changes: Any) -> dict[str, Any]:
        return train(
            tiny_model("gpt2"),
            tiny_tokenizer(),
            records_from(ROWS),
            out,
            params={**SHORT, **changes},
            progress=False,
        )

    whole = run(tmp_path / "whole")
    step = training_loop.Loop.advance

    def stops(loop: Any) -> None:
        if loop.step == 5:
            raise KeyboardInterrupt
        step(loop)

    monkeypatch.setattr(training_loop.Loop, "advance", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(training_loop.Loop, "advance", step)
    with pytest.raises(ValueError, match="another model, data or settings"):
        run(tmp_path / "cut", head_lr=1.0)
    again = run(tmp_path / "cut")
    assert again == whole
    for name in ("head.safetensors", "counterfactual/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_refuses(tmp_path: Path) -> None:
    given: tuple[Any, ...] = (tiny_model("llama"), tiny_tokenizer(), records_from(ROWS), tmp_path / "out")
    with pytest.raises(ValueError, match="nothing but its head to train"):
        train(*given, params={"head": False})
    with pytest.raises(ValueError, match="holdout must be between"):
        train(*given, params={"holdout": 2})
    with pytest.raises(FasteditError, match="cannot load the counterfactual model"):
        train(*given, counterfactual=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_without_a_counterfactual_model_only_the_classifier_is_trained(tmp_path: Path) -> None:
    report = train(
        tiny_model("llama"),
        tiny_tokenizer(),
        records_from([{**row, "locality": {}} for row in ROWS]),  # the other edits' prompts are out of scope
        tmp_path / "out",
        counterfactual="base",
        profile="official",
        params=SHORT,
        progress=False,
    )
    assert report["validation"]["nll"] == 0
    assert not (tmp_path / "out" / "counterfactual").exists()
    editor = fastedit.editor("serac", tiny_model("llama"), tiny_tokenizer(), classifier=tmp_path / "out")
    assert (editor.params.counterfactual, editor.params.scale) == ("base", 1.0)
