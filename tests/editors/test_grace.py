"""GRACE: golden runs of the published code, batches as sequences, reverts, artefacts, bad input."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from memory.toy import generate
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, ask, bits, losses, make, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError, InvalidFact, NumericalError
from fastedit.artefacts import export, stack_of
from fastedit.editors.grace import GraceMemory
from fastedit.editors.memory_editor import target_rows
from fastedit.memory import clear_memories, find_side, prompts, route_info, sides_of

CASES = [name for name in find_cases() if re.match("grace", name)]
QUICK = {"layers": (1,), "steps": 25, "lr": 0.3, "init": "warm", "radius": 0.5}
MORE = [Fact("The capital of {} is", "Japan", "Rome"), Fact("{} was born in", "Marie Curie", "Tokyo")]
OTHERS = ["The Eiffel Tower is in the city of", "The Colosseum"]


def grace(model: Any, **params: Any) -> Any:
    options = {key: params.pop(key) for key in ("profile", "seed") if key in params}
    return fastedit.editor("grace", model, tiny_tokenizer(), params={**QUICK, **params}, **options)


def book_of(model: Any) -> Any:
    return find_side(model, 1, "grace").memory.codebook


def same_books(one: Any, other: Any, rtol: float = 0.0) -> None:
    assert one.labels == other.labels
    assert one.owners == other.owners or rtol
    for name in ("keys", "values", "radii"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=rtol)


# ---- the published code ---------------------------------------------------------------------------------


@pytest.fixture(params=CASES or ["none"], scope="module")
def case(request: pytest.FixtureRequest) -> GoldenCase:
    if not CASES:
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no golden case of GRACE")
    return load_case(request.param)


def test_every_edit_of_a_golden_run_is_reproduced(case: GoldenCase) -> None:
    """Losses of each step, radii after each edit, keys and values: edits one at a time, profile official."""
    given = case.hparams
    (layer,) = (int(re.search(r"\[(\d+)\]", name)[1]) for name in given["inner_params"])
    params = {
        "layers": [layer],
        "lr": given["edit_lr"],
        "steps": given["n_iter"],
        "radius": given["eps"],
        "init": given["val_init"],
        "expand": given["eps_expand"],
        "replacement": given["replacement"],
    }
    model, tokenizer = case.load_model()
    editor = fastedit.editor("grace", model, tokenizer, params=params, profile="official")
    requests = {request["index"]: request for request in case.data["requests"]}
    for each in case.data["edits"]:
        number, request = each["edit"], requests[each["record"]]
        fact = Fact.from_filled(each["prompt"], request["subject"], each["target"])
        editor.edit([fact])
        (row,) = target_rows(tokenizer, [fact], None)
        assert row.key == each["key_id"]
        expected = case.tensor(f"loss_e{number}").float()
        torch.testing.assert_close(editor.losses[0], expected, rtol=1e-4, atol=2e-5)
        book = editor.side.memory.codebook
        torch.testing.assert_close(book.radii, case.tensor(f"eps_e{number}"), rtol=1e-6, atol=1e-9)
        if f"keys_e{number}" in case:
            torch.testing.assert_close(book.keys, case.tensor(f"keys_e{number}"), rtol=1e-4, atol=1e-5)
            values = case.tensor(f"values_e{number}")
            assert ((book.values - values).norm(dim=1) / values.norm(dim=1)).max() < 1e-4
        if number == 9:
            score = case.data["post10"]["at_last"]["prompt_new"]["token_acc"]
            assert accuracy(model, tokenizer, list(requests.values())) == pytest.approx(score)


def accuracy(model: Any, tokenizer: Any, requests: list[dict[str, Any]]) -> float:
    facts = [Fact(r["prompt"], r["subject"], r["target_new"]) for r in requests]
    right = []
    for row in target_rows(tokenizer, facts, None):
        with torch.no_grad(), prompts(model, [row.n_prompt]):
            said = model(input_ids=torch.tensor([row.ids])).logits[0, row.key :].argmax(1)
        right.append((said == torch.tensor(row.target)).float().mean())
    return float(torch.stack(right).mean())


# ---- editing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen2", "gemma2", "granite"])
@pytest.mark.parametrize("layer", [0, 2], ids=["first", "last"])
def test_edits_answer_their_prompts_and_nothing_else(family: str, layer: int) -> None:
    model = tiny_model(family)
    before, start = bits(model), losses(model, FACTS)
    other = generate(model, ask(OTHERS))
    logits = model(**ask(OTHERS)).logits
    edit = grace(model, layers=(layer,), lr=0.1, radius=0.02).edit(FACTS)
    assert (losses(model, FACTS) < start).all()
    assert torch.equal(generate(model, ask(OTHERS)), other)
    assert torch.equal(model(**ask(OTHERS)).logits, logits)
    assert same_bits(model, before)
    mixed = ask([*OTHERS, *(fact.text for fact in FACTS)])
    generate(model, mixed)
    assert [row[0]["edit"] for row in route_info(model)] == [None] * 2 + [edit.id] * 3
    edit.revert()
    assert sides_of(model) == []
    assert torch.equal(model(**ask(OTHERS)).logits, logits)
    assert torch.equal(losses(model, FACTS), start)


@pytest.mark.parametrize("replacement", ["replace_last", "replace_prompt", "replace_all"])
def test_what_is_trained_is_what_serves(replacement: str) -> None:
    """The loss that training sees after k steps is that of the model edited with k steps, cached and uncached."""
    params = {"replacement": replacement, "lr": 0.05}
    model, longer = tiny_model("llama"), tiny_model("llama")
    grace(model, steps=6, **params).edit(FACTS)
    editor = grace(longer, steps=7, **params)
    editor.edit(FACTS)
    torch.testing.assert_close(losses(model, FACTS), editor.losses[:, 6], rtol=1e-4, atol=1e-5)
    inputs = ask([fact.text for fact in FACTS])
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("init", ["warm", "cold"])
@pytest.mark.parametrize("radius", [0.5, 100.0], ids=["apart", "conflicting"])
def test_a_batch_equals_its_facts_one_after_the_other(init: str, radius: float) -> None:
    together, apart = tiny_model("llama"), tiny_model("llama")
    facts = [*FACTS, *MORE, Fact("The capital of {} is", "Rome", "Lyon")]
    batch = grace(together, init=init, radius=radius, steps=10)
    batch.edit(facts)
    single = grace(apart, init=init, radius=radius, steps=10)
    actions = [single.edit([fact]).measured["facts"][0]["action"] for fact in facts]
    measured = sides_of(together)[0].edits[0].measured["facts"]
    assert [row["action"] for row in measured] == actions
    same_books(book_of(together), book_of(apart), rtol=2e-4)


def test_facts_that_share_an_entry_are_trained_in_order() -> None:
    together, apart = tiny_model("gpt2"), tiny_model("gpt2")
    facts = [Fact("The capital of {} is", name, "Lyon") for name in ("France", "Japan", "Rome")]
    grace(together, radius=1e3, steps=10).edit(facts)
    single = grace(apart, radius=1e3, steps=10)
    for fact in facts:
        single.edit([fact])
    assert len(book_of(together)) == 1
    same_books(book_of(together), book_of(apart), rtol=2e-4)


def test_a_new_answer_for_a_prompt_takes_the_place_of_the_old() -> None:
    model = tiny_model("llama")
    editor = grace(model)
    first = editor.edit(FACTS[:1])
    old = losses(model, FACTS[:1])
    changed = [Fact(FACTS[0].prompt, FACTS[0].subject, "Oslo")]
    second = editor.edit(changed)
    assert second.measured["facts"][0]["action"] == "overwrite"
    assert second.measured["facts"][0]["loss_after"] < second.measured["facts"][0]["loss_before"]
    second.revert()
    assert torch.equal(losses(model, FACTS[:1]), old)
    second.apply(model)
    first.revert()
    assert losses(model, changed) == pytest.approx(second.measured["facts"][0]["loss_after"], rel=0.3)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"]
)
def test_other_precisions(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    start = losses(model, FACTS)
    edit = grace(model).edit(FACTS)
    assert (losses(model, FACTS) < start).all()
    inputs = ask([fact.text for fact in FACTS])
    generate(model, inputs)
    assert [row[0]["edit"] for row in route_info(model)] == [edit.id] * 3
    edit.revert()
    assert torch.equal(losses(model, FACTS), start)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replacement", ["replace_last", "replace_all"])
def test_decode_steps_wait_for_nothing(replacement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    grace(model, replacement=replacement, steps=2).edit(FACTS)
    (side,) = sides_of(model)
    hook, output = side.hook, torch.randn(2, 1, 32)
    with torch.no_grad():
        cache = model(**ask([FACTS[0].text, OTHERS[0]]), use_cache=True).past_key_values
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    side.router.begin(model.model, (), {"input_ids": torch.ones(2, 1).long(), "past_key_values": cache})
    with NoWaiting():
        new = hook(None, (torch.randn(2, 1, 64),), output)
    side.router.end(model.model, (), {}, None)
    if replacement == "replace_last":
        assert new is None
    else:
        assert torch.equal(new[1], output[1])
        assert torch.equal(new[0, 0], book_of(model).values[0])


# ---- reverting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("radius", [0.5, 100.0], ids=["apart", "conflicting"])
def test_any_edit_can_be_taken_out(gone: int, radius: float) -> None:
    model = tiny_model("llama")
    editor = grace(model, radius=radius, steps=5)
    edits = [editor.edit(facts) for facts in (FACTS, MORE[:1], MORE[1:])]
    kept = [edit for i, edit in enumerate(edits) if i != gone]
    edits[gone].revert()
    fresh = tiny_model("llama")
    for edit in kept:
        edit.apply(fresh)
    same_books(book_of(model), book_of(fresh))
    assert [edit.id for edit in sides_of(model)[0].edits] == [edit.id for edit in kept]
    for edit in kept:
        edit.revert(model)
    assert sides_of(model) == []


def test_reverting_is_refused_where_there_is_nothing_to_revert() -> None:
    model = tiny_model("llama")
    edit = grace(model).edit(FACTS[:1])
    with pytest.raises(FasteditError, match="is not on this model"):
        edit.revert(tiny_model("llama"))
    edit.revert()
    with pytest.raises(FasteditError, match="applied to no model"):
        edit.revert()


def test_a_copy_of_the_model_is_edited_by_itself() -> None:
    model = tiny_model("llama")
    edit = grace(model).edit(FACTS)
    other = copy.deepcopy(model)
    edit.revert(other)
    assert sides_of(other) == []
    assert [each.id for each in sides_of(model)[0].edits] == [edit.id]
    assert edit.applied_to() == [model]
    assert clear_memories(model) == [edit]
    assert edit.applied_to() == []


def test_a_failed_batch_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = grace(model)
    editor.edit(FACTS)
    before = copy.deepcopy(book_of(model))
    monkeypatch.setattr(editor, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(MORE)
    same_books(book_of(model), before)
    monkeypatch.undo()
    monkeypatch.setattr(GraceMemory, "add", lambda *_: (_ for _ in ()).throw(RuntimeError))
    fresh = tiny_model("llama")
    with pytest.raises(RuntimeError):
        grace(fresh).edit(MORE)
    assert sides_of(fresh) == []
    assert len(sides_of(model)[0].edits) == 1


# ---- artefacts ------------------------------------------------------------------------------------------


def test_saved_edits_restore_the_behaviour_exactly(tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = grace(model)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    for number, edit in enumerate(edits):
        edit.save(tmp_path / str(number))
    fresh = tiny_model("llama")
    for number, edit in enumerate(edits):
        loaded = fastedit.load_edit(tmp_path / str(number))
        assert isinstance(loaded, fastedit.MemoryEdit)
        assert loaded.as_dict() == edit.as_dict()
        loaded.apply(fresh)
    inputs = ask([*OTHERS, *(fact.text for fact in [*FACTS, *MORE])])
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(fresh, inputs))
    assert grace(fresh).edit([Fact("{} sings", "Ada Lovelace", "Paris")]).beneath == tuple(
        e.id for e in edits
    )


def test_edits_of_another_model_or_memory_are_refused(tmp_path: Path) -> None:
    edit = grace(tiny_model("llama")).edit(FACTS)
    other = tiny_model("llama", seed=1)
    with pytest.raises(BaseMismatch, match="its weights are others"):
        edit.apply(other)
    with pytest.raises(BaseMismatch, match="load it with dtype=float32"):
        edit.apply(tiny_model("llama", torch.bfloat16))
    with pytest.raises(BaseMismatch, match=r"\(32, 64\) \(d_out, d_in\)"):
        edit.apply(tiny_model("llama_tied_square"))
    with pytest.raises(BaseMismatch, match="is for block 1, the model has blocks 0 to 0"):
        edit.apply(tiny_model("llama", num_hidden_layers=1))
    assert sides_of(other) == []
    edit.apply(other, force=True)
    with pytest.raises(FasteditError, match="in this memory already"):
        edit.apply(other, force=True)
    model = tiny_model("llama")
    grace(model, radius=2.0).edit(MORE)
    with pytest.raises(BaseMismatch, match=r"settings .*2\.0.* has .*0\.5"):
        edit.apply(model)


@pytest.mark.parametrize("file", ["memory.safetensors", "edit.json"])
def test_damaged_edits_are_refused(file: str, tmp_path: Path) -> None:
    place = grace(tiny_model("llama")).edit(FACTS).save(tmp_path / "edit")
    data = bytearray((place / file).read_bytes())
    data[len(data) // 2] ^= 1
    (place / file).write_bytes(data)
    with pytest.raises(CorruptFile):
        fastedit.load_edit(place)
    (place / file).write_bytes(data[:-9])
    with pytest.raises(CorruptFile):
        fastedit.load_edit(place)


def test_tensors_that_do_not_fit_their_facts_are_refused() -> None:
    edit = grace(tiny_model("llama")).edit(FACTS)
    edit.tensors["keys"] = edit.tensors["keys"][:2]
    model = tiny_model("llama")
    with pytest.raises(CorruptFile, match="must hold 3 keys of 64"):
        edit.apply(model)
    assert sides_of(model) == []


def test_memories_cannot_be_merged(tmp_path: Path) -> None:
    model = tiny_model("llama")
    edit = grace(model).edit(FACTS)
    for attempt in (
        lambda: edit.to_peft(tmp_path / "lora"),
        lambda: export([edit], tiny_model("llama"), tmp_path / "full"),
        lambda: export([], model, tmp_path / "full"),
        lambda: export([edit], model, tmp_path / "lora", format="lora"),
    ):
        with pytest.raises(FasteditError, match="cannot be merged into weights"):
            attempt()
    assert list(tmp_path.iterdir()) == []


# ---- beside other editors, and bad input -----------------------------------------------------------------


def test_weights_are_edited_beside_a_memory() -> None:
    model = tiny_model("llama")
    edit = grace(model).edit(FACTS)
    expected = losses(model, FACTS)
    weights = make("memit", model).edit(MORE)
    assert stack_of(model).edits == (weights,)
    weights.revert()
    assert torch.equal(losses(model, FACTS), expected)
    edit.revert()


def test_two_layers_with_a_codebook_each() -> None:
    model = tiny_model("llama")
    low, high = grace(model, layers=(0,)), grace(model, layers=(2,))
    edits = [low.edit(FACTS), high.edit(MORE)]
    generate(model, ask([FACTS[0].text, MORE[0].text]))
    assert [[entry["edit"] for entry in row] for row in route_info(model)] == [
        [edits[0].id, None],
        [None, edits[1].id],
    ]


def test_bad_input_is_refused_before_anything_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        grace(model, layers=(9,))
    with pytest.raises(ValueError, match="one layer"):
        grace(model, layers=(0, 1))
    with pytest.raises(ValueError, match="replacement must be one of"):
        grace(model, replacement="everywhere")
    editor = grace(model)
    with pytest.raises(InvalidFact, match="at least one"):
        editor.edit([])
    with pytest.raises(InvalidFact, match="the model's context holds 128"):
        editor.edit([Fact("{} is " + "very " * 200, "Paris", "big")])
    with pytest.raises(NumericalError, match="Miles Davis"):
        grace(model, lr=float("inf")).edit(FACTS)
    assert sides_of(model) == []


def test_what_is_measured() -> None:
    model = tiny_model("llama")
    measured = grace(model).edit(FACTS).measured
    assert measured["memory_entries"] == 3
    assert measured["memory_bytes"] == book_of(model).n_bytes
    assert measured["prefill_flops"] == 3 * 3 * 64
    assert measured["token_overhead"] == 0
    assert set(measured["seconds"]) == {"train", "apply"}
