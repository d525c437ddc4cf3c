"""MELO: training against the whole model, routing, generation, edits as things, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from memory.toy import FAMILIES, generate
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, ask, bits, logits, losses, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, InvalidFact, NumericalError, demo
from fastedit.editors.melo import Melo
from fastedit.editors.memory_editor import target_rows
from fastedit.memory import clear_memories, find_side, prompts, route_info, sides_of
from fastedit.models import describe
from fastedit.stats.cache import neutral_sentences

QUICK = {
    "layers": (1,),
    "targets": (2,),
    "steps": 25,
    "lr": 0.01,
    "n_blocks": 20,
    "radius": 0.3,
    "halve_every": 10,
}
FOUR = {"num_hidden_layers": 4}
GPT_FOUR = {"n_layer": 4}
MORE = [Fact("The capital of {} is", "Japan", "Rome"), Fact("{} was born in", "Marie Curie", "Tokyo")]
OTHERS = ["The Eiffel Tower is in the city of", "Paris is"]


def melo(model: Any, **params: Any) -> Any:
    options = {key: params.pop(key) for key in ("profile", "seed") if key in params}
    return fastedit.editor("melo", model, tiny_tokenizer(), params={**QUICK, **params}, **options)


def deep(family: str) -> Any:
    """A tiny model of four blocks: one to search at, two to change."""
    return tiny_model(family, **(GPT_FOUR if family in ("gpt2", "gptj") else FOUR))


def memory_of(model: Any, layer: int = 1) -> Any:
    return find_side(model, layer, "melo").memory


def same_memories(one: Any, other: Any) -> None:
    assert one.index.clusters == other.index.clusters
    assert one.index.blocks == other.index.blocks
    for name in ("centres", "radii", "points"):
        assert torch.equal(getattr(one.index, name), getattr(other.index, name))
    assert len(one.blocks) == len(other.blocks)
    for layer in one.targets:
        for held in ("_a", "_b"):
            n = len(one.blocks)
            assert torch.equal(getattr(one.blocks, held)[layer][:n], getattr(other.blocks, held)[layer][:n])


# ---- training -------------------------------------------------------------------------------------------


def plain_block(model: Any, editor: Melo, facts: list[Fact]) -> tuple[dict[int, Any], torch.Tensor]:
    """A block trained on the whole model: every row by itself, everything run in every step."""
    params, description = editor.params, describe(model)
    factors = {
        layer: tuple(t.detach().clone().requires_grad_() for t in pair)
        for layer, pair in editor._initial(0).items()
    }
    for layer, (a, b) in factors.items():

        def add(_module: Any, args: Any, out: Any, a: Any = a, b: Any = b) -> Any:
            return out + params.n_blocks**0.5 * args[0] @ a @ b * params.n_blocks**0.5

        description.projection(layer).module.register_forward_hook(add)
    model.requires_grad_(False)
    optimiser = torch.optim.Adam([t for pair in factors.values() for t in pair], lr=params.lr)
    rows, history = target_rows(tiny_tokenizer(), facts, None), []
    for step in range(params.steps):
        optimiser.param_groups[0]["lr"] = params.lr * 0.5 ** (step // params.halve_every)
        optimiser.zero_grad()
        sums = []
        for row in rows:
            out = model(input_ids=torch.tensor([row.ids])).logits[0, row.key :]
            sums.append(torch.nn.functional.cross_entropy(out, torch.tensor(row.target), reduction="sum"))
        counts = torch.tensor([len(row.target) for row in rows])
        each = torch.stack(sums) / counts
        history.append(each.detach())
        (torch.stack(sums).sum() / counts.sum() if editor.profile == "official" else each.mean()).backward()
        optimiser.step()
    return factors, torch.stack(history, 1)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "granite"])
@pytest.mark.parametrize("profile", ["clean", "official"])
def test_blocks_are_those_of_training_the_whole_model(family: str, profile: str) -> None:
    model = deep(family)
    editor = melo(model, targets=(2, 3), steps=12, halve_every=5, profile=profile)
    edit = editor.edit(FACTS)
    factors, history = plain_block(deep(family), editor, FACTS)
    torch.testing.assert_close(editor.losses, history, rtol=1e-3, atol=1e-3)
    for layer, (a, b) in factors.items():
        torch.testing.assert_close(edit.content[f"A.{layer}"], a.detach(), rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(edit.content[f"B.{layer}"], b.detach(), rtol=2e-3, atol=1e-4)
    memory = memory_of(model)
    shift = memory.blocks.change(2, torch.ones(1, 1, memory.blocks._a[2].shape[1]), torch.tensor([0]))
    a, b = factors[2]
    torch.testing.assert_close(shift[0, 0], (20 * a @ b).sum(0).detach(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_answer_their_prompts_and_nothing_else(family: str) -> None:
    model, base = tiny_model(family), tiny_model(family)
    before, start = bits(model), losses(model, FACTS)
    edit = melo(model).edit(FACTS)
    assert (losses(model, FACTS) < start - 0.8).all()
    assert all(each["routed"] for each in edit.measured["facts"])
    assert torch.equal(logits(model, OTHERS), logits(base, OTHERS))
    assert torch.equal(generate(model, ask(OTHERS)), generate(base, ask(OTHERS)))
    assert same_bits(model, before)
    texts = [*OTHERS, *(fact.text for fact in FACTS)]
    mixed, plain = logits(model, texts), logits(base, texts)
    assert [row[0]["edit"] for row in route_info(model)] == [None] * 2 + [edit.id] * 3
    assert torch.equal(mixed[:2], plain[:2])
    assert ((mixed[2:] - plain[2:]).abs().amax((1, 2)) > 1e-2).all()
    edit.revert()
    assert sides_of(model) == []
    assert torch.equal(logits(model, texts), plain)


def test_losses_of_the_last_step_are_what_the_edited_model_has() -> None:
    model = deep("llama")
    edit = melo(model, targets=(2, 3), steps=40, lr=1e-3, n_blocks=100).edit(FACTS)
    last = torch.tensor([each["loss_after"] for each in edit.measured["facts"]])
    assert ((losses(model, FACTS) - last).abs() < 0.2).all()  # one step further


def test_bfloat16_models_are_edited() -> None:
    model = tiny_model("llama", torch.bfloat16)
    start = losses(model, FACTS)
    edit = melo(model).edit(FACTS)
    assert edit.content["queries"].dtype == torch.bfloat16
    assert (losses(model, FACTS) < start).all()


# ---- serving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_generate_as_their_samples_alone_and_without_a_cache(family: str) -> None:
    model = deep(family)
    editor = melo(model, targets=(2, 3))
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    texts = [*OTHERS, *(fact.text for fact in [*FACTS, *MORE])]
    inputs = ask(texts)
    together = generate(model, inputs)
    found = [row[0]["edit"] for row in route_info(model)]
    assert found == [None] * 2 + [edits[0].id] * 3 + [edits[1].id] * 2
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, use_cache=False), together)
    for text, expected in zip(texts, together, strict=True):
        assert torch.equal(generate(model, ask([text]))[0], expected)
    beams = generate(model, inputs, num_beams=3)
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs, num_beams=3, use_cache=False), beams)


def test_a_new_answer_takes_over_in_clean_only() -> None:
    again = [Fact(FACTS[0].prompt, FACTS[0].subject, "Rome")]
    for profile, action, routed in (("clean", "overwrite", True), ("official", "split", False)):
        model = tiny_model("llama")
        editor = melo(model, profile=profile)
        editor.edit(FACTS[:1])
        edit = editor.edit(again)
        (about,) = edit.measured["facts"]
        assert (about["action"], about["routed"]) == (action, routed)
        logits(model, [again[0].text])
        assert route_info(model)[0][0]["edit"] == (edit.id if routed else None)


def test_a_second_memory_stands_beside_it() -> None:
    model = deep("llama")
    edit = melo(model, targets=(2, 3)).edit(FACTS)
    grace = fastedit.editor(
        "grace", model, tiny_tokenizer(), params={"layers": (1,), "steps": 5, "init": "warm", "radius": 0.3}
    )
    other = grace.edit(MORE)
    logits(model, [FACTS[0].text, MORE[0].text])
    assert [[entry["edit"] for entry in row] for row in route_info(model)] == [
        [edit.id, None],
        [None, other.id],
    ]
    clear_memories(model)
    assert torch.equal(logits(model, OTHERS), logits(deep("llama"), OTHERS))


# ---- the radius -------------------------------------------------------------------------------------------


def last_outputs(model: Any, tokenizer: Any, layer: int, texts: list[str]) -> torch.Tensor:
    """(n, d), what the block's output projection returns at each text's last token."""
    seen: list[torch.Tensor] = []
    module = describe(model).projection(layer).module
    handle = module.register_forward_hook(lambda _module, _args, out: seen.append(out[0, -1].float()))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.stack(seen)


def test_the_radius_is_measured_unless_it_is_given() -> None:
    for factor in (1.0, 100.0):
        model = deep("llama")
        with torch.no_grad():
            describe(model).projection(1).weight.mul_(factor)
        texts = [" ".join(text.split()[:8]) for text in neutral_sentences()[:64]]
        apart = torch.pdist(last_outputs(model, tiny_tokenizer(), 1, texts)).median()
        before = bits(model)
        editor = melo(model, radius=None)
        assert editor.params.radius == pytest.approx(float(apart) / 4, rel=0.006)
        assert same_bits(model, before)
    assert melo(model, radius=None, profile="official").params.radius == 0.5
    assert melo(model, radius=2.0).params.radius == 2.0
    edit = melo(model, radius=3.0, steps=2).edit(FACTS)
    assert melo(model, radius=None).params.radius == 3.0  # of the memory that is there
    edit.revert()
    with torch.no_grad():
        describe(model).projection(1).weight.zero_()
    with pytest.raises(NumericalError, match="expected a positive number, give radius"):
        melo(model, radius=None)


def test_the_radius_suits_the_demo_model() -> None:
    model, tokenizer = demo.load_demo_model()
    editor = fastedit.editor("melo", model, tokenizer, progress=False)
    facts = demo.load_demo_facts(neighbours=1)[::10]
    asked = [fact["prompt"].format(fact["subject"]) for fact in facts]
    again = [fact["paraphrases"][0].format(fact["subject"]) for fact in facts]
    near = [other["prompt"].format(other["subject"]) for fact in facts for other in fact["neighbours"]]
    near = [text for text in near if text not in asked]
    edited, rephrased, others = (
        last_outputs(model, tokenizer, editor.layer, x) for x in (asked, again, near)
    )
    assert ((edited - rephrased).norm(dim=1) < editor.params.radius).float().mean() > 0.7
    assert (torch.cdist(others, edited).amin(1) < editor.params.radius).float().mean() < 0.15


# ---- edits as things ------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["clean", "official"])
@pytest.mark.parametrize("radius", [0.3, 4.0], ids=["apart", "in conflict"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_edit_taken_off_is_as_if_it_had_never_been_made(gone: int, radius: float, profile: str) -> None:
    model = tiny_model("llama")
    editor = melo(model, radius=radius, steps=3, profile=profile)
    edits = [editor.edit(facts) for facts in (FACTS, MORE[:1], MORE[1:])]
    kept = [edit for i, edit in enumerate(edits) if i != gone]
    edits[gone].revert()
    fresh = tiny_model("llama")
    for edit in kept:
        edit.apply(fresh)
    same_memories(memory_of(model), memory_of(fresh))
    texts = [fact.text for fact in [*FACTS, *MORE]]
    assert torch.equal(logits(model, texts), logits(fresh, texts))
    for edit in kept:
        edit.revert(model)
    assert sides_of(model) == []
    assert torch.equal(logits(model, texts), logits(tiny_model("llama"), texts))


def test_saved_edits_and_models_restore_the_behaviour(tmp_path: Path) -> None:
    model = deep("llama")
    editor = melo(model, targets=(2, 3), steps=5)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    fresh = deep("llama")
    for number, edit in enumerate(edits):
        loaded = fastedit.load_edit(edit.save(tmp_path / str(number)))
        assert loaded.as_dict() == edit.as_dict()
        loaded.apply(fresh)
    texts = [*OTHERS, *(fact.text for fact in [*FACTS, *MORE])]
    assert torch.equal(logits(model, texts), logits(fresh, texts))
    fastedit.save_model(model, tmp_path / "model")
    again = fastedit.load_model(tmp_path / "model")
    assert torch.equal(logits(again, texts), logits(model, texts))
    assert torch.equal(generate(again, ask(texts)), generate(model, ask(texts)))


def test_a_copy_of_the_model_is_edited_by_itself() -> None:
    model = deep("llama")
    editor = melo(model, targets=(2, 3), steps=5)
    edit = editor.edit(FACTS)
    expected = logits(model, [FACTS[0].text])
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, [FACTS[0].text]), expected)
    edit.revert(other)
    assert sides_of(other) == []
    assert torch.equal(logits(other, [FACTS[0].text]), logits(deep("llama"), [FACTS[0].text]))
    assert torch.equal(logits(model, [FACTS[0].text]), expected)


def test_a_failed_batch_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = melo(model, steps=3)
    editor.edit(FACTS)
    before = copy.deepcopy(memory_of(model))
    monkeypatch.setattr(editor, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(MORE)
    same_memories(memory_of(model), before)
    assert len(sides_of(model)[0].edits) == 1


# ---- bad input ------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        melo(model, layers=(9,), targets=(10,))
    with pytest.raises(ValueError, match=r"targets \(2, 3\): the model has blocks 0 to 2"):
        melo(model, targets=(2, 3))
    with pytest.raises(ValueError, match="must lie above the layer that is searched, 1"):
        melo(model, targets=(1, 2))
    with pytest.raises(ValueError, match="ascending"):
        melo(model, targets=(2, 2))
    with pytest.raises(ValueError, match="one layer"):
        melo(model, layers=(0, 1))
    with pytest.raises(ValueError, match="expected positive numbers, got rank 0, radius -1"):
        melo(model, rank=0, radius=-1)
    with pytest.raises(InvalidFact, match="at least one"):
        melo(model).edit([])
    with pytest.raises(InvalidFact, match="the model's context holds 128"):
        melo(model).edit([Fact("{} is " + "very " * 200, "Paris", "big")])
    with pytest.raises(NumericalError, match="Miles Davis"):
        melo(model, lr=float("inf")).edit(FACTS)
    assert sides_of(model) == []


def test_edits_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    edit = melo(model, steps=2).edit(FACTS)
    other = melo(tiny_model("llama"), steps=2, rank=3).edit(MORE)
    with pytest.raises(BaseMismatch, match=r"settings .*'rank': 2.* has .*'rank': 3"):
        other.apply(model)
    with pytest.raises(BaseMismatch, match="its weights are others"):
        edit.apply(tiny_model("llama", seed=1))
    edit.revert()
    edit.tensors["B.2"] = edit.tensors["B.2"][:1]
    with pytest.raises(CorruptFile, match=r"lacks B\.2 in the shape"):
        edit.apply(model)
    assert sides_of(model) == []
    with pytest.raises(FasteditError, match="cannot be merged into weights"):
        edit.to_peft("nowhere")


def test_what_is_measured() -> None:
    model = tiny_model("llama")
    measured = melo(model, steps=2).edit(FACTS).measured
    assert measured["memory_entries"] == 3
    assert measured["memory_bytes"] == memory_of(model).n_bytes
    assert measured["prefill_flops"] == 3 * (3 + 1) * 32
    assert measured["token_flops"] == 2 * (64 * 2 + 2 * 32)
