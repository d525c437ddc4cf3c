"""Editing whole batches: every family of models, what bad input does, sequences of edits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import FAMILIES, skip_old_layout, tiny_model, tiny_tokenizer
from oracle import memit, optimise_one
from tiny import CONTEXTS, FACTS, QUICK, bits, make, moments, same_bits, target_loss

import fastedit
from fastedit import Fact, InvalidFact, NumericalError, UnsupportedModel
from fastedit.editors import methods
from fastedit.editors.base import editor_class
from fastedit.editors.locate_then_edit import LocateThenEdit
from fastedit.editors.prompts import fact_rows
from fastedit.models.runner import frozen

LOCATING = [method for method in methods() if issubclass(editor_class(method), LocateThenEdit)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", LOCATING)
def test_edit_makes_targets_likelier_and_reverts_to_the_bits(method: str, family: str) -> None:
    model = tiny_model(family)
    before = bits(model)
    try:
        edit = make(method, model, params={"steps": 8, "lr": 0.02, "clamp": 2.0}).edit(FACTS[:2])
    except UnsupportedModel as error:
        skip_old_layout(error)
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed
    assert len(changed) == len(edit.factors)
    for outcome in edit.measured["facts"]:
        assert outcome["nll_optimised"] < outcome["nll_before"]
    edit.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ultraedit_makes_targets_likelier_and_reverts_to_the_bits(family: str) -> None:
    model = tiny_model(family)
    before, loss = bits(model), target_loss(model, FACTS)
    try:
        edit = make("ultraedit", model, params={"lr": 3e-3}).edit(FACTS)
    except UnsupportedModel as error:
        skip_old_layout(error)
    assert target_loss(model, FACTS) < loss
    edit.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision_models_edit_and_revert(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    before = bits(model)
    editor = make("memit", model)
    edits = [editor.edit([fact]) for fact in FACTS]
    assert not same_bits(model, before)
    for edit in reversed(edits):
        edit.revert()
    assert same_bits(model, before)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "falcon"])
def test_memit_equals_the_plain_pipeline(family: str) -> None:
    """Targets, keys, dense solves and residuals one by one with whole forward passes, in float32."""
    model, plain = tiny_model(family), tiny_model(family)
    editor = make("memit", model, params={**QUICK, "lr": 0.02, "layers": (0, 1), "covariance_weight": 20.0})
    before = bits(model)
    editor.edit(FACTS)
    rows = fact_rows(tiny_tokenizer(), FACTS, CONTEXTS, None)
    with frozen(plain):
        runs = [optimise_one(plain, row, editor.objective()) for row in rows]
        targets = torch.stack([initial + shift for initial, shift, _ in runs])
        memit(plain, rows, targets, (0, 1), moments(plain), 20.0)
    names = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        change, expected = parameter - before[name], names[name] - before[name]
        assert (change - expected).norm() <= 2e-3 * expected.norm().clamp(min=1e-12), name


def test_a_model_with_accelerate_hooks_is_edited_like_any_other() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain, hooked = tiny_model("llama"), tiny_model("llama")
    accelerate.dispatch_model(hooked, device_map={"": "cpu"}, force_hooks=True)
    before = bits(hooked)
    make("memit", plain).edit(FACTS)
    edit = make("memit", hooked).edit(FACTS)
    assert same_bits(hooked, bits(plain))
    edit.revert()
    assert same_bits(hooked, before)


def test_sequential_edits_unstack_in_any_order() -> None:
    model = tiny_model("llama")
    before = bits(model)
    editor = make("memit", model)
    first = editor.edit(FACTS[:1])
    middle = bits(model)
    second = editor.edit(FACTS[1:])
    second.revert()
    assert same_bits(model, middle)
    second.apply(model)
    first.revert()
    second.revert()
    assert same_bits(model, before)


def test_saved_edit_applies_to_a_fresh_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    make("memit", model).edit(FACTS).save(tmp_path / "edit")
    fresh = tiny_model("llama")
    fastedit.load_edit(tmp_path / "edit").apply(fresh)
    assert same_bits(fresh, bits(model))


def test_rome_edits_one_fact_after_the_other() -> None:
    """A batch of ROME equals its facts given one by one."""
    together, apart = tiny_model("llama"), tiny_model("llama")
    make("rome", together).edit(FACTS)
    editor = make("rome", apart)
    for fact in FACTS:
        editor.edit([fact])
    for (name, one), (_, other) in zip(together.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_same_seed_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        model = tiny_model("gpt2")
        make("memit", model, contexts=None, seed=3).edit(FACTS)
        results.append(bits(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_contexts_are_sampled_with_a_seed_and_kept_in_the_edit() -> None:
    model = tiny_model("llama")
    editor = make("memit", model, contexts=None)
    edit = editor.edit(FACTS[:1])
    assert len(editor.contexts) == 6
    assert editor.contexts[0] == "{}"
    assert all(context.endswith(". {}") for context in editor.contexts[1:])
    assert edit.params["contexts"] == editor.contexts
    assert len(make("rome", tiny_model("llama"), contexts=None).contexts) == 21


BAD_BATCHES = {
    "no braces": (lambda: Fact("The capital of France is", "France", "Lyon"), "exactly one"),
    "empty target": (lambda: Fact("The capital of {} is", "France", " "), "target is empty"),
    "empty subject": (lambda: Fact("The capital of {} is", " ", "Lyon"), "subject is empty"),
    "target equals old": (
        lambda: Fact("The capital of {} is", "France", "Paris", target_old=" Paris"),
        "equals",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_fact_that_cannot_be_edited_is_refused_when_it_is_made(name: str) -> None:
    make_fact, message = BAD_BATCHES[name]
    with pytest.raises(InvalidFact, match=message):
        make_fact()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "no facts"),
        ([FACTS[0], FACTS[0]], "given twice"),
        ([FACTS[0], Fact("The capital of {} is", "France", "Nice")], "contradict"),
        (
            [{"prompt": "The capital of Spain is", "subject": "France", "target_new": "Lyon"}],
            "does not occur",
        ),
        ([{"prompt": "The capital of {} is", "subject": "France"}], "target_new"),
        ([Fact("The capital of {} is " + "very " * 200, "France", "Lyon")], "context holds"),
    ],
    ids=["empty", "twice", "contradiction", "subject absent", "field missing", "too long"],
)
def test_a_bad_batch_is_refused_before_any_weight_changes(batch: list, message: str) -> None:
    model = tiny_model("llama")
    before = bits(model)
    with pytest.raises(InvalidFact, match=message):
        make("memit", model).edit(batch)
    assert same_bits(model, before)


def test_a_prompt_without_braces_but_with_its_subject_is_taken() -> None:
    model = tiny_model("llama")
    edit = make("memit", model).edit(
        [{"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon"}]
    )
    assert edit.facts == [Fact("The capital of {} is", "France", "Lyon")]


def knowing_model() -> tuple[Any, Fact]:
    """A model that continues one prompt with one certain word, and the fact that says so."""
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=prompt).last_hidden_state[0, -1]
    for index in range(300):
        word = tokenizer.decode([index])
        if word.startswith(" ") and word[1:].isalpha() and tokenizer(word)["input_ids"] == [index]:
            model.lm_head.weight.data[index] = 10 * hidden
            return model, Fact("The capital of {} is", "France", word)
    pytest.fail("the tiny tokenizer has no word of one token")


def test_a_known_answer_is_said_skipped_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, fact = knowing_model()
    other = Fact("{} plays the", "Miles Davis", "xylophone")
    before = bits(model)
    with pytest.raises(InvalidFact, match="already answers"):
        make("memit", model, on_known="error").edit([fact, other])
    with pytest.raises(InvalidFact, match="nothing to edit"):
        make("memit", model, on_known="skip").edit([fact])
    assert same_bits(model, before)
    with caplog.at_level(logging.WARNING):
        edit = make("memit", model, on_known="skip").edit([fact, other])
    assert "already answers 'The capital of France is'" in caplog.text
    assert edit.facts == [other]
    assert edit.measured["already_known"] == [0]


@pytest.mark.parametrize("stage", ["keys", "solve"])
def test_a_failure_in_the_middle_leaves_the_bits(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = bits(model)
    editor = make("memit", model, params={**QUICK, "layers": (0, 1, 2)})
    calls = {"n": 0}

    def fail_second(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    if stage == "solve":
        original = editor.solve
        monkeypatch.setattr(editor, "solve", fail_second)
    else:
        from fastedit.editors.sweep import PromptSweep

        original = PromptSweep.keys
        monkeypatch.setattr(PromptSweep, "keys", lambda self: fail_second(self))
    with pytest.raises(KeyboardInterrupt):
        editor.edit(FACTS)
    assert calls["n"] == 2
    assert same_bits(model, before)


def test_statistics_with_nan_are_refused_before_any_weight_changes() -> None:
    model = tiny_model("llama")
    before = bits(model)
    statistics = moments(model)
    statistics[0][3, 3] = float("nan")
    with pytest.raises(NumericalError, match="layer 0"):
        make("memit", model, statistics=statistics).edit(FACTS)
    assert same_bits(model, before)


def test_statistics_of_another_width_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"layer 0 must have shape"):
        make("memit", model, statistics={layer: torch.eye(7) for layer in range(3)}).edit(FACTS)


def test_missing_layers_in_statistics_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"lack layers \[0\]"):
        make("memit", model, statistics={1: moments(model)[1]}).edit(FACTS)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": (7,)}, "blocks 0 to 2"),
        ({"layers": (1, 0)}, "ascending"),
        ({"learning_rate": 1.0}, "has no learning_rate"),
    ],
)
def test_wrong_hyper_parameters_are_named(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("memit", tiny_model("llama"), params=params)


def test_unknown_method_and_profile_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="there is no method 'memo'"):
        make("memo", model)
    with pytest.raises(ValueError, match="profile must be one of"):
        make("memit", model, profile="legacy")


def test_tokenizer_without_offsets_is_refused_clearly() -> None:
    class Slow:
        is_fast = False
        unk_token_id = bos_token_id = eos_token_id = pad_token_id = 0

        def __call__(self, text: str, **_options: Any) -> dict:
            return {"input_ids": [1, 2]}

        def decode(self, ids: list[int]) -> str:
            return ""

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["a"] * len(ids)

    model = tiny_model("llama")
    editor = fastedit.editor("memit", model, Slow(), contexts=CONTEXTS, statistics=moments(model))
    with pytest.raises(UnsupportedModel, match="offsets"):
        editor.edit(FACTS)


def test_without_statistics_they_are_collected_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path))
    model = tiny_model("llama")
    editor = fastedit.editor("memit", model, tiny_tokenizer(), params=QUICK, contexts=CONTEXTS)
    with caplog.at_level(logging.INFO):
        editor.edit(FACTS[:1])
    assert "statistics" in caplog.text
    assert list(tmp_path.rglob("layer_*.safetensors"))
