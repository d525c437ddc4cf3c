"""T-Patcher: losses, serving, generation, edits as things, bad input; ``tests/bench`` has the published way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory.toy import FAMILIES, generate
from model_configs import tiny_model, tiny_tokenizer
from tiny import FACTS, ask, bits, logits, same_bits

import fastedit
from fastedit import (
    BaseMismatch,
    CorruptFile,
    Fact,
    FasteditError,
    InvalidFact,
    NumericalError,
    UnsupportedModel,
)
from fastedit.editors import t_patcher
from fastedit.memory import Base, MemoryEdit, prompts, route_info, sides_of
from fastedit.memory.patches import (
    Patches,
    activation_loss,
    loudest,
    memory_loss,
    mlp_activation,
    top_mean_exp,
)
from fastedit.models import describe

TEXTS = ["The capital of Japan is Tokyo. Rome is not.", "Miles Davis was born in the city of Paris."] * 3
QUICK = {"steps": 60, "lr": 0.05, "memory_weight": 0.1, "check_every": 5, "check_from": 5}
OTHERS = ["The Eiffel Tower is in the city of", "Paris is"]
MORE = [Fact("The capital of {} is", "Japan", "Rome"), Fact("{} was born in", "Marie Curie", "Tokyo")]


def patcher(model: Any, **params: Any) -> Any:
    options = {key: params.pop(key) for key in ("profile", "seed") if key in params}
    return fastedit.editor(
        "t-patcher", model, tiny_tokenizer(), texts=TEXTS, params={**QUICK, **params}, **options
    )


def by_hand(model: Any, keys: Any, bias: Any, values: Any, layer: int | None = None) -> MemoryEdit:
    """An edit with given patches."""
    editor = patcher(model, **({} if layer is None else {"layers": (layer,)}))
    tensors = {"keys": keys, "bias": bias, "values": values, "queries": torch.zeros(0, keys.shape[1])}
    return MemoryEdit(
        method="t-patcher",
        facts=[],
        layer=editor.layer,
        tensors={name: tensor.clone() for name, tensor in tensors.items()},
        about={},
        params=vars(editor.params),
        seed=0,
        profile="clean",
        base=Base.of(model, editor.layer),
    )


def random_patches(n: int, d: int = 32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((n, d), (n,), (n, d)))  # type: ignore[return-value]


# ---- losses and buffers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 5, 16, 1000])
def test_losses_with_copies_are_those_of_repeated_examples(k: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    own, remembered = torch.randn(3, generator=generator), torch.randn(7, 3, generator=generator)

    def plain(values: torch.Tensor) -> torch.Tensor:
        flat = values.double().exp().flatten().sort(descending=True).values
        return flat[:k].mean()

    repeated, own_repeated = remembered[:, None].repeat(1, copies, 1), own.repeat(copies, 1)
    expected = plain(repeated - own_repeated + 3.0) + plain(repeated + 3.0)
    found = memory_loss(remembered, own, (3.0, -3.0), k, copies)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found = activation_loss(own, 0.5, k, copies)
    torch.testing.assert_close(found.double(), plain(0.5 - own_repeated), rtol=1e-5, atol=0)
    assert top_mean_exp(torch.empty(0), k, copies) == 0


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_the_loudest_memories_give_the_losses_and_gradients_of_all(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    memories, own = torch.randn(50, 8, generator=generator), torch.randn(3, generator=generator)
    keys, bias, _ = (t.requires_grad_() for t in random_patches(3, 8))
    losses = [
        memory_loss(remembered, own, (3.0, -3.0), k, 8)
        for remembered in (loudest(memories, keys, bias, -(-k // 8)), memories @ keys.T + bias)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for ours, plain in zip(*(torch.autograd.grad(loss, (keys, bias)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_patches_are_held_in_buffers_that_double() -> None:
    patches, everything = Patches(8), []
    for number in range(40):
        new = random_patches(1 + number % 5, 8, number)
        patches.append(*new, owner=str(number))
        everything.append(new)
        assert len(patches._bias) in (64, 128)
    for place, name in enumerate(("keys", "bias", "values")):
        assert torch.equal(getattr(patches, name), torch.cat([new[place] for new in everything]))
    patches.remove("3")
    patches.remove("17")
    kept = [new for number, new in enumerate(everything) if number not in (3, 17)]
    for place, name in enumerate(("keys", "bias", "values")):
        assert torch.equal(getattr(patches, name), torch.cat([new[place] for new in kept]))


# ---- serving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "falcon"])
@pytest.mark.parametrize("layer", [0, 2])
def test_patches_add_neurons_to_the_mlp(family: str, layer: int) -> None:
    """Against a plain model whose MLP is called by hand."""
    keys, bias, values = random_patches(3)
    model, plain = tiny_model(family), tiny_model(family)
    by_hand(model, keys, bias, values, layer).apply(model)
    activation, mlp = mlp_activation(plain), describe(plain).mlp(layer)
    forward = mlp.forward
    mlp.forward = lambda q: forward(q) + activation(q @ keys.T + bias) @ values
    torch.testing.assert_close(logits(model, OTHERS), logits(plain, OTHERS), rtol=1e-4, atol=1e-4)
    assert (logits(model, OTHERS) - logits(tiny_model(family), OTHERS)).abs().max() > 0.1


def test_tokens_that_no_patch_answers_keep_their_bits() -> None:
    model, plain = (tiny_model("gpt2", activation_function="relu") for _ in range(2))
    base = logits(plain, OTHERS)
    keys, bias, values = random_patches(3)
    by_hand(model, keys, bias - 1e4, values).apply(model)
    assert torch.equal(logits(model, OTHERS), base)
    assert route_info(model)[0][0]["score"] < 0
    with torch.no_grad():
        query = []
        describe(plain).mlp(2).register_forward_pre_hook(lambda _m, args: query.append(args[0]))
        plain(**ask(OTHERS[1:]))
    one = query[0][0, -1:]  # a patch for one token alone
    by_hand(model, one / one.norm() ** 2, torch.tensor([-0.999]), 1e3 * torch.ones(1, 32)).apply(model)
    changed = (logits(model, OTHERS[1:]) != logits(plain, OTHERS[1:])).any(-1)[0].tolist()
    assert changed == [False, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_generate_as_their_samples_alone_and_without_a_cache(family: str) -> None:
    model = tiny_model(family)
    patcher(model).edit(FACTS)
    texts = [*OTHERS, *(fact.text for fact in FACTS)]
    together = generate(model, ask(texts))
    assert torch.equal(generate(model, ask(texts), use_cache=False), together)
    for text, expected in zip(texts, together, strict=True):
        assert torch.equal(generate(model, ask([text]))[0], expected)


# ---- editing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("profile", ["clean", "official"])
def test_wrong_tokens_are_put_right(family: str, profile: str) -> None:
    model = tiny_model(family)
    before = bits(model)
    base = logits(model, OTHERS)
    editor = patcher(model, profile=profile, memory_weight=1e-3, weight_decay=0.0, steps=300, check_every=25)
    edit = editor.edit(FACTS)
    for fact, about in zip(FACTS, edit.measured["facts"], strict=True):
        assert about["right"], (fact, about)
    assert edit.measured["memory_entries"] == sum(each["patches"] for each in edit.measured["facts"]) > 3
    assert edit.content["queries"].shape[1] == 32
    assert same_bits(model, before)
    again = editor.edit(FACTS[-1:])  # nothing is wrong any more
    assert again.measured["facts"] == [{"patches": 0, "steps": 0, "right": True}]
    again.revert()
    edit.revert()
    assert sides_of(model) == []
    assert torch.equal(logits(model, OTHERS), base)


def test_no_more_than_five_tokens_get_patches() -> None:
    edit = patcher(tiny_model("llama"), steps=2).edit([Fact("{} is", "Rome", "the city of the Eiffel Tower")])
    assert [each["patches"] for each in edit.measured["facts"]] == [5]


def test_a_batch_is_the_same_as_its_facts_in_turn() -> None:
    one, other = tiny_model("qwen2"), tiny_model("qwen2")
    batch = patcher(one).edit(FACTS)
    editor = patcher(other)
    singles = [editor.edit([fact]) for fact in FACTS]
    assert torch.equal(batch.content["keys"], torch.cat([edit.content["keys"] for edit in singles]))
    assert torch.equal(logits(one, OTHERS), logits(other, OTHERS))


def test_queries_of_earlier_edits_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = patcher(tiny_model("llama"), steps=1)
    seen = []
    train = editor._train

    def watched(training: Any, *rest: Any) -> Any:
        seen.append(training)
        return train(training, *rest)

    monkeypatch.setattr(editor, "_train", watched)
    first = editor.edit(FACTS[:2])
    editor.edit(FACTS[2:])
    texts = editor.remembered()
    held_out = max(1, len(texts) // 10)
    own = first.content["queries"]
    first_fact = len(editor.rows(FACTS[:1])[0].target)
    expected = [len(texts) - held_out + n for n in (0, first_fact, len(own))]
    assert [len(each.memories) for each in seen] == expected
    assert torch.equal(seen[2].memories[-len(own) :], own)
    assert torch.equal(seen[2].held_out, torch.cat((texts[-held_out:], own)))
    assert seen[2].memories.is_contiguous()


def test_training_ends_once_held_out_memories_improve_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = patcher(tiny_model("llama"), steps=100, check_every=10, check_from=20)
    losses = iter([5.0, 4.0, 3.9999, 3.0])
    monkeypatch.setattr(editor, "_settled", _scripted(editor, losses))
    edit = editor.edit(FACTS[:1])
    assert edit.measured["facts"][0]["steps"] == 50  # 30 and 40 improve, 50 does not


def _scripted(editor: Any, losses: Any) -> Any:
    """The decision, with these losses on held-out memories and every fact right."""
    settled = type(editor)._settled

    def run(training: Any, trained: Any, step: int, schedule: Any, unseen: list[float]) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(editor, "_memory_loss", lambda *_: next(losses))
            patch.setattr(t_patcher, "_wrong", lambda *_: [])
            return settled(editor, training, trained, step, schedule, unseen)

    return run


def test_bfloat16_models_are_patched() -> None:
    model = tiny_model("llama", torch.bfloat16)
    edit = patcher(model, memory_weight=0.02, steps=150, check_every=25).edit(FACTS[:1])
    assert edit.measured["facts"][0]["right"]
    with prompts(model, [1]):
        out = model(**ask(OTHERS), output_hidden_states=True)
        assert out.hidden_states[-1].dtype == torch.bfloat16


# ---- edits as things ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_edit_taken_off_leaves_the_patches_of_the_others(gone: int) -> None:
    model = tiny_model("gpt2")
    editor = patcher(model, steps=10)
    edits = [editor.edit(facts) for facts in (FACTS, MORE[:1], MORE[1:])]
    kept = [edit for i, edit in enumerate(edits) if i != gone]
    edits[gone].revert()
    fresh = tiny_model("gpt2")
    for edit in kept:
        edit.apply(fresh)
    assert torch.equal(logits(model, OTHERS), logits(fresh, OTHERS))
    ours, theirs = (sides_of(m)[0].memory for m in (model, fresh))
    assert ours.patches.owners == theirs.patches.owners
    assert [q.tolist() for q in ours.queries] == [q.tolist() for q in theirs.queries]


def test_saved_edits_and_models_restore_the_behaviour(tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = patcher(model, steps=10)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    fresh = tiny_model("llama")
    for number, edit in enumerate(edits):
        loaded = fastedit.load_edit(edit.save(tmp_path / str(number)))
        assert loaded.as_dict() == edit.as_dict()
        loaded.apply(fresh)
    assert torch.equal(logits(fresh, OTHERS), logits(model, OTHERS))
    fastedit.save_model(model, tmp_path / "model")
    again = fastedit.load_model(tmp_path / "model")
    assert torch.equal(logits(again, OTHERS), logits(model, OTHERS))


def test_a_failed_batch_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    editor = patcher(model, steps=5)
    editor.edit(FACTS)
    expected = logits(model, OTHERS)
    monkeypatch.setattr(editor, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(MORE)
    assert torch.equal(logits(model, OTHERS), expected)
    assert len(sides_of(model)[0].edits) == 1


def test_a_cache_from_before_an_edit_is_refused() -> None:
    model = tiny_model("llama")
    editor = patcher(model, steps=2)
    editor.edit(FACTS[:1])
    out = model(**ask(OTHERS), use_cache=True)
    editor.edit(FACTS[1:2])
    with pytest.raises(FasteditError, match="was changed since this KV cache"):
        model(input_ids=torch.tensor([[1], [2]]), past_key_values=out.past_key_values)


# ---- bad input ------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        patcher(model, layers=(9,))
    with pytest.raises(ValueError, match="one layer"):
        patcher(model, layers=(0, 1))
    with pytest.raises(ValueError, match="expected positive numbers, got steps 0, memory_k -1"):
        patcher(model, steps=0, memory_k=-1)
    with pytest.raises(ValueError, match="memory_margins must be two"):
        patcher(model, memory_margins=(1.0,))
    with pytest.raises(InvalidFact, match="at least one"):
        patcher(model).edit([])
    with pytest.raises(InvalidFact, match="the model's context holds 128"):
        patcher(model).edit([Fact("{} is " + "very " * 200, "Paris", "big")])
    with pytest.raises(NumericalError, match="France"):
        patcher(model, lr=float("inf"), steps=3).edit(FACTS)
    empty = fastedit.editor("t-patcher", model, tiny_tokenizer(), texts=["R"])
    with pytest.raises(ValueError, match="at least two tokens"):
        empty.edit(FACTS)
    assert sides_of(model) == []


def test_a_model_without_a_known_nonlinearity_is_refused() -> None:
    model = tiny_model("llama")
    model.config.hidden_act = "sine"
    with pytest.raises(UnsupportedModel, match="nonlinearity of this llama model"):
        patcher(model)


def test_content_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    edit = by_hand(model, *random_patches(3))
    edit.tensors["values"] = edit.tensors["values"][:2]
    with pytest.raises(CorruptFile, match="values does not fit"):
        edit.apply(model)
    good = by_hand(model, *random_patches(3))
    with pytest.raises(BaseMismatch, match="its weights are others"):
        good.apply(tiny_model("llama", seed=1))
    assert sides_of(model) == []
