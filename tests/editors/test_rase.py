"""RASE: patches of single facts, the gate, near-duplicates, edits as things."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import bag_of_tokens
from memory.toy import generate, last_logits
from model_configs import tiny_model, tiny_tokenizer
from tiny import CONTEXTS, FACTS, bits, make, moments, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, UnsupportedModel
from fastedit.cli.main import main
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory.lora_blocks import LoraBlocks
from fastedit.memory.rase import GateSettings

PROMPTS = [FACTS[0].text, "The Eiffel Tower is in the city of", FACTS[1].text, "Rome", FACTS[2].text]
ROUTES = [0, None, 1, None, 2]
EDITORS: dict[str, dict[str, Any]] = {
    "rome": {"steps": 6, "lr": 0.5},
    "memit": {"steps": 6, "lr": 0.5, "layers": [0, 1]},
    "nse": {"steps": 6, "lr": 0.5, "layers": [0, 1]},
    "alphaedit": {"steps": 6, "lr": 0.5, "layers": [1]},
    "ultraedit": {},
    "ft": {"steps": 3, "lr": 0.01, "layers": [1]},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bag_of_tokens(tmp_path_factory.mktemp("encoder")))


def asked(texts: list[str] = PROMPTS, side: str = "left") -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def routes(model: Any) -> list[int | None]:
    return [row[0]["route"] for row in route_info(model)]


def editor_of(model: Any, encoder: str, inner: str = "rome", **options: Any) -> Any:
    params = {"editor": inner, "editor_params": EDITORS[inner], "encoder": encoder, "tokenizer": encoder}
    params |= options.pop("params", {})
    if inner not in ("ft", "ultraedit"):
        options |= {"statistics": moments(model), "contexts": CONTEXTS}
    return fastedit.editor("rase", model, tiny_tokenizer(), params=params, **options)


def edited(encoder: str, family: str = "llama", inner: str = "rome", **options: Any) -> tuple[Any, Any, Any]:
    model = tiny_model(family)
    editor = editor_of(model, encoder, inner, **options)
    return model, editor, editor.edit(FACTS)


def by_itself(family: str, inner: str, fact: Fact) -> Any:
    """A model with one fact in its weights."""
    model = tiny_model(family)
    make(inner, model, params=EDITORS[inner]).edit([fact])
    return model


# ------------------------------------------------------------------ patches


@pytest.mark.parametrize(
    ("family", "inner"),
    [*((family, "rome") for family in ("llama", "gpt2", "gptj", "qwen2")), *(("llama", i) for i in EDITORS)],
)
def test_a_routed_sample_gets_the_model_edited_with_its_fact_alone(
    family: str, inner: str, encoder: str
) -> None:
    model, _, _ = edited(encoder, family, inner)
    assert same_bits(model, bits(tiny_model(family)))
    ours = last_logits(model, asked())
    assert routes(model) == ROUTES
    alone = last_logits(tiny_model(family), asked())
    for row, route in enumerate(ROUTES):
        if route is None:
            assert torch.equal(ours[row], alone[row])
        else:
            theirs = last_logits(by_itself(family, inner, FACTS[route]), asked())[row]
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-5)
            assert not torch.equal(ours[row], alone[row])


def test_nothing_routed_keeps_the_bits(encoder: str) -> None:
    model, _, _ = edited(encoder)
    inputs = asked(["Rome", "The Eiffel Tower is in the city of"])
    base = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(base, inputs))


@pytest.mark.parametrize(("family", "inner"), [("llama", "memit"), ("gpt2", "rome")])
def test_generation_of_mixed_batches(family: str, inner: str, encoder: str) -> None:
    model, _, _ = edited(encoder, family, inner)
    inputs = asked()
    found = generate(model, inputs)
    assert routes(model) == ROUTES
    for text, expected in zip(PROMPTS, found, strict=True):
        assert torch.equal(generate(model, asked([text]))[0], expected)
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, use_cache=False), found)
    for row, route in enumerate(ROUTES):
        other = tiny_model(family) if route is None else by_itself(family, inner, FACTS[route])
        assert torch.equal(generate(other, asked(PROMPTS[row : row + 1]))[0], found[row])
    beams = generate(model, inputs, num_beams=3, num_return_sequences=2)
    assert torch.equal(generate(model, asked(PROMPTS[:1]), num_beams=3, num_return_sequences=2), beams[:2])


def test_the_encoder_reads_each_prompt_once_a_request(encoder: str) -> None:
    model, editor, _ = edited(encoder)
    read: list[list[str]] = []
    pooled = editor.encoder.encoder.pooled
    editor.encoder.encoder.pooled = lambda texts, pooling: read.append(list(texts)) or pooled(texts, pooling)
    editor.encoder._kept.clear()
    generate(model, asked([PROMPTS[0], PROMPTS[0], "Rome"]), num_beams=2)
    assert read == [[PROMPTS[0], "Rome"]]


def test_blocks_of_different_rank_are_filled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(4, r, generator=generator), torch.randn(r, 3, generator=generator)) for r in (2, 0, 5, 1)
    ]
    blocks = LoraBlocks(1.0)
    for pair in factors * 3:
        blocks.append({0: pair})
    x = torch.randn(12, 2, 4, generator=generator)
    expected = torch.stack([rows @ a @ b for rows, (a, b) in zip(x, factors * 3, strict=True)])
    torch.testing.assert_close(blocks.change(0, x, torch.arange(12)), expected)


# ------------------------------------------------------------------ the gate


def test_the_gate_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = GateSettings(0.9, 0.15, 0.05, 0.3)
    for k in (1, 2, 5):
        scores = torch.rand(200, k, generator=generator).sort(dim=1, descending=True).values
        for row, found in zip(scores.tolist(), gate.opens(scores).tolist(), strict=True):
            apart = k > 1 and row[0] - row[1] > 0.15 and statistics.pstdev(row) > 0.05
            assert found == ((row[0] > 0.9 or apart) and row[0] >= 0.3)


@pytest.mark.parametrize("profile", ["clean", "official"])
def test_matching_equals_brute_force(profile: str, encoder: str) -> None:
    params = {"gate_best": 0.8, "gate_margin": 0.02, "gate_spread": 0.01, "k": 5}
    _, editor, edit = edited(encoder, inner="ultraedit", params=params, profile=profile)
    keys, sentences = edit.content["keys"], edit.content["sentences"]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(60, keys.shape[1], generator=generator)
    queries = torch.nn.functional.normalize(keys.repeat(20, 1) + 0.1 * noise, dim=1)
    found, scores = editor.side.memory.match(queries)
    gate = editor.side.memory.gate
    assert gate.least == (-1.0 if profile == "official" else 0.5)
    for query, index, score in zip(queries, found.tolist(), scores.tolist(), strict=True):
        first = sorted((keys @ query).tolist(), reverse=True)
        both = ((keys @ query + sentences @ query) / 2).tolist()
        ranked = sorted(both, reverse=True)
        if profile == "official":
            opened = bool(gate.opens(torch.tensor([first])) & gate.opens(torch.tensor([ranked])))
        else:
            opened = bool(gate.opens(torch.tensor([[*ranked, 0.0, 0.0]])))
        assert score == pytest.approx(ranked[0], abs=1e-5)
        assert index == (both.index(ranked[0]) if opened else -1)
    assert {-1, 0, 1, 2} & set(found.tolist()) >= {0, 1, 2}


def test_one_fact_alone_is_found(encoder: str) -> None:
    model = tiny_model("llama")
    editor_of(model, encoder).edit(FACTS[:1])
    last_logits(model, asked())
    assert routes(model) == [0, None, None, None, None]


# ------------------------------------------------------------------ content


def test_near_duplicates_replace_each_other_until_the_newer_goes(encoder: str) -> None:
    model, editor, _ = edited(encoder)
    before = last_logits(model, asked())
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "Rome")
    newer = editor.edit([other])
    assert editor.side.memory.n_entries == 3
    changed = last_logits(model, asked())
    assert routes(model) == [3, None, 1, None, 2]
    assert route_info(model)[0][0]["edit"] == newer.id
    theirs = last_logits(by_itself("llama", "rome", other), asked())
    torch.testing.assert_close(changed[0], theirs[0], rtol=1e-4, atol=1e-5)
    newer.revert()
    assert torch.equal(last_logits(model, asked()), before)


@pytest.mark.parametrize("profile", ["clean", "official"])
def test_what_counts_as_a_near_duplicate(profile: str, encoder: str) -> None:
    model = tiny_model("llama")
    editor = editor_of(model, encoder, "ultraedit", profile=profile, params={"merge_above": 0.5})
    editor.edit([Fact("The capital of {} is", "France", "Lyon")])
    editor.edit([Fact("The capital of {} is", "Franc", "Lyon")])  # another subject, nearly the same words
    assert editor.side.memory.n_entries == (1 if profile == "official" else 2)
    editor.edit([Fact("{} has the capital of", "FRANCE", "Rome")])
    assert editor.side.memory.n_entries == (1 if profile == "official" else 3)  # too few words shared


def test_edits_come_off_in_any_order_and_go_back_on(encoder: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = editor_of(model, encoder)
    first, second = editor.edit(FACTS[:1]), editor.edit(FACTS[1:])
    both = last_logits(model, asked())
    second.save(tmp_path / "second")
    first.revert()
    last_logits(model, asked())
    assert [r is not None for r in routes(model)] == [False, False, True, False, True]
    second.revert()
    assert not sides_of(model)
    base = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(model(**asked()).logits, base(**asked()).logits)
    first.apply(model)
    loaded = fastedit.load_edit(tmp_path / "second")
    loaded.apply(model)
    torch.testing.assert_close(last_logits(model, asked()), both)
    twin = copy.deepcopy(model)
    loaded.revert(model)
    torch.testing.assert_close(last_logits(twin, asked()), both)


def test_model_directories(encoder: str, tmp_path: Path) -> None:
    model, _, _ = edited(encoder, inner="memit")
    expected = last_logits(model, asked())
    fastedit.save_model(model, tmp_path / "model", tiny_tokenizer())
    again = fastedit.load_model(tmp_path / "model")
    torch.testing.assert_close(last_logits(again, asked()), expected)
    assert routes(again) == ROUTES


def test_rase_rome_is_rase_with_rome(encoder: str) -> None:
    model = tiny_model("llama")
    options = {"statistics": moments(model), "contexts": CONTEXTS}
    params = {"encoder": encoder, "tokenizer": encoder, "editor_params": EDITORS["rome"]}
    edit = fastedit.editor("rase_rome", model, tiny_tokenizer(), params=params, **options).edit(FACTS)
    assert (edit.method, edit.params["editor"], edit.measured["ranks"]) == ("rase", "rome", [1, 1, 1])
    _, _, other = edited(encoder)
    assert all(torch.equal(edit.content[name], other.content[name]) for name in other.content)
    with pytest.raises(ValueError, match="take rase"):
        fastedit.editor("rase_rome", model, tiny_tokenizer(), params={**params, "editor": "memit"})


def test_edits_stand_on_weight_edits_that_stay(encoder: str) -> None:
    model = tiny_model("llama")
    make("memit", model).edit([Fact("{} is made of", "Cheese", "Rome")])
    before = bits(model)
    editor_of(model, encoder).edit(FACTS)
    assert same_bits(model, before)


# ------------------------------------------------------------------ errors


def test_what_cannot_be_put_inside(encoder: str) -> None:
    model = tiny_model("llama")
    for name, message in (("grace", "memory editor"), ("rase", "cannot be put inside"), ("xyz", "no method")):
        with pytest.raises(ValueError, match=message):
            fastedit.editor("rase", model, tiny_tokenizer(), params={"editor": name, "encoder": encoder})
    params = {"editor": "ultraedit", "editor_params": {"modules": {"mlp.up_proj": [1]}}, "encoder": encoder}
    with pytest.raises(UnsupportedModel, match=r"ultraedit changes .*up_proj"):
        fastedit.editor("rase", model, tiny_tokenizer(), params=params)
    with pytest.raises(ValueError, match="k must be"):
        editor_of(model, encoder, "ft", params={"k": 0})
    with pytest.raises(ValueError, match="has no nonsense"):
        editor_of(model, encoder, "ft", params={"nonsense": 0})
    with pytest.raises(FasteditError, match="cannot load the text encoder"):
        editor_of(model, "/nowhere", "ft")


def test_a_failing_fact_leaves_everything_as_it_was(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, editor, _ = edited(encoder)
    expected = last_logits(model, asked())
    patch = editor.patch
    more = [Fact("{} is in", "Oslo", "Rome"), Fact("{} is in", "Lima", "Rome")]

    def fails(fact: Fact) -> Any:
        if fact is more[1]:
            raise KeyboardInterrupt
        return patch(fact)

    monkeypatch.setattr(editor, "patch", fails)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(more)
    assert torch.equal(last_logits(model, asked()), expected)
    assert same_bits(model, bits(tiny_model("llama")))


def test_another_encoder_or_damaged_content_is_refused(encoder: str, tmp_path: Path) -> None:
    model, _, edit = edited(encoder, inner="ultraedit")
    edit.revert()
    other = copy.deepcopy(edit)
    other.params["encoder"] = str(bag_of_tokens(tmp_path / "other", seed=1))
    with pytest.raises(BaseMismatch, match="another encoder"):
        other.apply(model)
    broken = copy.deepcopy(edit)
    broken.tensors = {**edit.content, "keys": edit.content["keys"][:1]}
    with pytest.raises(CorruptFile, match="must hold keys"):
        broken.apply(model)
    unknown = copy.deepcopy(edit)
    unknown.params["tokenizer"] = ""
    with pytest.raises(FasteditError, match="tokenizer is needed"):
        unknown.apply(model)
    assert not sides_of(model)


def test_from_the_command_line(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "model")
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    out = str(tmp_path / "edit")
    settings = ["--set", "editor=ft", 'editor_params={"steps": 3, "layers": [1]}', f"encoder={encoder}"]
    edit = [
        "edit",
        model,
        "--fact",
        "The capital of {France} is -> Lyon",
        "--method",
        "rase",
        "--device",
        "cpu",
    ]
    save = ["--out", out, "--save-model", str(tmp_path / "edited"), "--json"]
    assert main([*edit, *settings, *save]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["editor"] == "ft"
    again = fastedit.load_model(tmp_path / "edited")
    last_logits(again, asked())
    assert routes(again) == [0, None, None, None, None]
    assert math.isfinite(route_info(again)[0][0]["score"])


def test_targets_are_optimised_together(encoder: str) -> None:
    _, editor, together = edited(encoder, inner="memit")
    calls: list[int] = []
    model = tiny_model("llama")
    other = editor_of(model, encoder, "memit")
    targets = other.inner.targets
    other.inner.targets = lambda facts, rows: calls.append(len(facts)) or targets(facts, rows)
    other.edit(FACTS)
    assert calls == [len(FACTS)]
    alone = [editor.patch(fact) for fact in FACTS]
    for layer in (0, 1):
        for row, patch in enumerate(alone):
            content = together.content
            change = content[f"A.{layer}"][row] @ content[f"B.{layer}"][row]
            torch.testing.assert_close(change, patch[layer].dense().T, rtol=1e-3, atol=1e-6)
