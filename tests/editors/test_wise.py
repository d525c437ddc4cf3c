"""WISE's training against the whole model, and against the published runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import GoldenCase, find_cases, load_case
from helpers import relative_error
from model_configs import tiny_model, tiny_tokenizer
from tiny import CONTEXTS, FACTS, bits, same_bits
from wise_oracle import Oracle, Settings, mean_of_positive

import fastedit
from fastedit import Fact, InvalidFact, NumericalError
from fastedit.bench.baselines.wise import PublishedWise
from fastedit.editors import wise as wise_module
from fastedit.editors.wise import Wise, sample_prefixes
from fastedit.editors.wise_training import (
    FrozenRows,
    RowOptions,
    positive_mean,
    routing_loss,
    training_rows,
)
from fastedit.models.runner import frozen
from fastedit.ops import BitMask, PhiloxMask
from fastedit.stats.cache import neutral_sentences

LAYER = 1
OTHERS = [
    "The Eiffel Tower is in the city of Paris",
    "Miles Davis plays the trumpet",
    "The Colosseum is in Rome.",
]
LOCAL = [replace(fact, locality=text) for fact, text in zip(FACTS, OTHERS, strict=True)]
SETTINGS = Settings(lr=0.3, steps=6, alpha=0.1, beta=0.8, gamma=0.4)
FAMILIES = ["llama", "gpt2", "gptj", "qwen2", "gemma2"]


def make(model: Any, settings: Settings = SETTINGS, **options: Any) -> Wise:
    params = {**vars(settings), "layers": (LAYER,), **options.pop("params", {})}
    made = fastedit.editor("wise", model, tiny_tokenizer(), params=params, contexts=CONTEXTS, **options)
    assert isinstance(made, Wise)
    return made


def mask_of(editor: Wise, shard: int = 0) -> torch.Tensor:
    shape = editor.projection.d_out, editor.projection.d_in
    return PhiloxMask(0, shard, LAYER, editor.params.mask_ratio).dense(shape).float()


# ---- against the whole model ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_and_gradient_equal_those_of_the_whole_model(family: str) -> None:
    """MEM A5 (a): the cached prefix and the outputs' gradient against autograd on a whole side memory."""
    model, fact = tiny_model(family), LOCAL[0]
    editor, oracle = make(model), Oracle(model, tiny_tokenizer(), LAYER, CONTEXTS)
    noise = torch.randn(oracle.base.shape, generator=torch.Generator().manual_seed(1))
    side = oracle.base + 0.1 * noise
    with frozen(model):
        rows = editor._training_rows([fact], 0)
        fixed = FrozenRows(editor.runner, LAYER, rows, oracle.base)
        found = fixed.evaluate(side, editor.margins)
    wanted = side.clone().requires_grad_()
    answer, routing, score = oracle.objective(fact, wanted, SETTINGS)
    (answer + routing).backward()
    torch.testing.assert_close(
        found.losses, torch.stack((answer + routing, answer, routing)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.scores.mean(), score, rtol=1e-5, atol=1e-6)
    assert relative_error(found.gradient.T @ fixed.inputs, wanted.grad) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_training_takes_the_steps_of_the_whole_model(family: str) -> None:
    """Two facts into one shard: losses, weights and thresholds, with decay and clamp."""
    model = tiny_model(family)
    settings = replace(SETTINGS, clamp=0.05, weight_decay=1e-2)
    editor, oracle = make(model, settings), Oracle(model, tiny_tokenizer(), LAYER, CONTEXTS)
    before, scores = bits(model), []
    editor.edit(LOCAL[:2])
    for fact, trace in zip(LOCAL[:2], editor.losses, strict=True):
        losses, score = oracle.train([fact], mask_of(editor), settings)
        torch.testing.assert_close(trace, losses, rtol=1e-4, atol=1e-5)
        scores.append(score)
    state = editor.state
    assert state is not None
    assert relative_error(state.side.weight - oracle.base, oracle.side - oracle.base) < 1e-4
    assert state.threshold == pytest.approx(min(scores), rel=1e-5)
    assert same_bits(model, before)


@pytest.mark.parametrize("change", [{"whole_text": True}, {"batch_size": 2}, {"metric": "linear"}])
def test_options_of_the_objective(change: dict[str, Any]) -> None:
    model = tiny_model("gpt2")
    settings = replace(SETTINGS, whole_text=change.get("whole_text", False))
    editor = make(model, settings, params=change)
    oracle = Oracle(model, tiny_tokenizer(), LAYER, CONTEXTS, linear="metric" in change)
    editor.edit(LOCAL[:2])
    groups = [LOCAL[:2]] if "batch_size" in change else [[fact] for fact in LOCAL[:2]]
    assert len(editor.losses) == len(groups)
    for group, trace in zip(groups, editor.losses, strict=True):
        losses, _score = oracle.train(group, mask_of(editor), settings)
        torch.testing.assert_close(trace, losses, rtol=1e-4, atol=1e-5)
    state = editor.state
    assert state is not None
    assert relative_error(state.side.weight - oracle.base, oracle.side - oracle.base) < 1e-4


def test_an_irrelevant_text_within_the_prompt_is_told_apart_from_the_rest() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    fact = replace(FACTS[0], locality="France")
    editor, oracle = make(model), Oracle(model, tokenizer, LAYER, CONTEXTS)
    editor.edit([fact])
    wanted = tokenizer(" France")["input_ids"]
    spans = []
    for ids, _ in oracle.rows(fact):
        start = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        spans.append((start, start + len(wanted)))
    losses, _ = oracle.train([fact], mask_of(editor), SETTINGS, spans=spans)
    torch.testing.assert_close(editor.losses[0], losses, rtol=1e-4, atol=1e-5)


def test_replay_pushes_scores_of_earlier_facts() -> None:
    """Two merged memories, then a shard whose second fact also replays its first."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    params = {"replay": True, "save_freq": 2, "merge_freq": 2}
    editor = make(model, params=params)
    facts = [*LOCAL, replace(LOCAL[0], prompt="The people of {} speak")]
    editor.edit(facts)

    def score(oracle: Oracle, side: torch.Tensor, fact: Fact) -> list[torch.Tensor]:
        return [oracle.run(ids, side)[1].mean() for ids, _ in oracle.rows(fact)]

    def replay(oracle: Oracle, side: torch.Tensor, step: int) -> torch.Tensor:
        low = [s - SETTINGS.alpha for s in score(oracle, side, facts[step % 2])]
        high = [SETTINGS.beta - s for f in present for s in score(oracle, side, f)]
        return mean_of_positive(low) + mean_of_positive(high)

    oracle = Oracle(model, tokenizer, LAYER, CONTEXTS)
    for number, fact in enumerate(facts):
        if number == 2:
            oracle.side = oracle.base.clone()
        present = facts[2:number]
        losses, _ = oracle.train(
            [fact], mask_of(editor, number // 2), SETTINGS, replay=None if number < 2 else replay
        )
        torch.testing.assert_close(editor.losses[number], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_the_official_profile_follows_the_published_loop(family: str) -> None:
    """Left padding, labels by the padded prompt, denominators, pads in the scores, decay everywhere."""
    model, tokenizer = tiny_model(family, attn_implementation="eager"), tiny_tokenizer()
    editor = make(
        model,
        replace(SETTINGS, clamp=1.0),
        profile="official",
        params={"save_freq": 1, "merge_freq": 2, "retrieve": False, "merge_density": 1.0},  # no ties to break
    )
    masks = [mask_of(editor, shard) for shard in range(3)]
    name = editor.projection.weight_name
    hparams = {
        "inner_params": [name],
        "edit_lr": SETTINGS.lr,
        "n_iter": SETTINGS.steps,
        "alpha": SETTINGS.alpha,
        "beta": SETTINGS.beta,
        "gamma": SETTINGS.gamma,
        "save_freq": 1,
        "merge_freq": 2,
        "norm_constraint": 1.0,
        "weights": 1.0,
        "densities": 1.0,
    }
    published = PublishedWise(model, tokenizer, hparams, CONTEXTS, masks)
    facts = [
        LOCAL[0],
        replace(LOCAL[1], locality=" ".join(OTHERS)),
        LOCAL[2],
    ]  # one is longer than any edit row
    editor.edit(facts)
    for number, fact in enumerate(facts):
        assert fact.locality is not None
        published.edit(fact.text, fact.target, fact.locality)
        torch.testing.assert_close(editor.losses[number], published.losses[number], rtol=1e-4, atol=1e-5)
    state = editor.state
    assert state is not None
    assert relative_error(state.merged[0].weight - state.base, published.merges[0]) < 1e-3
    assert relative_error(state.pending[0].weight - state.base, published.sides[2]) < 1e-3
    assert state.threshold == pytest.approx(published.threshold, rel=1e-4)


# ---- parts ---------------------------------------------------------------------------------------------


def test_d_the_mean_of_what_is_positive() -> None:
    """MEM A5 (d): empty sets, gradients by the number of active elements, and a norm of zero."""
    values = torch.tensor([1.0, -2.0, 3.0, 0.0], requires_grad=True)
    positive_mean(values).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]
    none = torch.tensor([-1.0, 0.0], requires_grad=True)
    value = positive_mean(none)
    value.backward()
    assert (float(value.detach()), none.grad.tolist()) == (0, [0, 0])  # type: ignore[union-attr]
    assert float(positive_mean(torch.zeros(0))) == 0

    margins = make(tiny_model("llama")).margins
    inside, outside = torch.tensor([0.0, 5.0]), torch.tensor([3.0])
    assert float(routing_loss(inside, outside, margins)) == pytest.approx(3.4 + 2.9 + 0.8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_d_an_untouched_side_memory_scores_zero_and_is_not_pushed_by_it(family: str) -> None:
    model = tiny_model(family)
    editor = make(model)
    with frozen(model):
        state = editor.new_memory().state
        fixed = FrozenRows(editor.runner, LAYER, editor._training_rows([LOCAL[0]], 0), state.base.float())
        found = fixed.evaluate(state.side.weight, editor.margins)
        alone = fixed.push(state.side.weight, editor.margins.activation, lambda s: positive_mean(20 - s))
    assert found.scores.tolist() == [0.0] * len(CONTEXTS)
    assert float(found.losses[2]) == pytest.approx(SETTINGS.gamma + SETTINGS.beta)
    assert float(alone[0]) == 20
    assert not alone[1].any()


def test_e_thresholds_of_both_endings(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an early stop of the final weights, after all steps of those before the last."""
    model = tiny_model("llama")

    def score(editor: Wise, weight: torch.Tensor) -> float:
        with frozen(model):
            fixed = FrozenRows(editor.runner, LAYER, editor._training_rows([LOCAL[0]], 0), state.base.float())
            return float(fixed.evaluate(weight, editor.margins).scores.mean())

    editor = make(model, replace(SETTINGS, steps=2))
    editor.edit(LOCAL[:1])
    state = editor.state
    assert state is not None
    two, threshold = state.side.weight.clone(), state.threshold
    assert score(editor, two) != pytest.approx(threshold, rel=1e-2)
    editor.reset()
    monkeypatch.setattr(wise_module, "STOP_CHANGE", 1e9)
    monkeypatch.setattr(wise_module, "STOP_LOSS", 1e9)
    editor = make(model, replace(SETTINGS, steps=50))
    editor.edit(LOCAL[:1])
    state = editor.state
    assert state is not None
    assert len(editor.losses[0]) == 2  # the earliest stop
    assert torch.equal(state.side.weight, two)
    assert state.threshold == pytest.approx(score(editor, two), rel=1e-6)


def test_labels_are_the_answers_tokens() -> None:
    tokenizer = tiny_tokenizer()
    options = RowOptions(CONTEXTS)
    rows = training_rows(tokenizer, LOCAL[:2], OTHERS[:2], options, None)
    assert rows.n_edit_rows == 2 * len(CONTEXTS)
    length = rows.ids.shape[1]
    for place, label in zip(rows.scored.tolist(), rows.labels.tolist(), strict=True):
        assert rows.ids[place // length, place % length + 1] == label
    for row in range(rows.n_edit_rows):
        own = [i for i, place in enumerate(rows.scored.tolist()) if place // length == row]
        fact = LOCAL[row // len(CONTEXTS)]
        assert tokenizer.decode(rows.labels[own]) == fact.target
        assert float(rows.weights[own].sum()) == pytest.approx(1 / rows.n_edit_rows)
    assert torch.equal(rows.mask.flatten().nonzero()[:, 0], rows.tokens)
    torch.testing.assert_close(rows.mean.sum(1), torch.ones(len(rows.mean)))


def test_a_chat_template_wraps_the_prompt_only() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for official in (False, True):
        rows = training_rows(
            tokenizer, LOCAL[:1], OTHERS[:1], RowOptions(["{}", "So. {}"], official, chat=True), None
        )
        texts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(rows.ids, rows.mask, strict=True)]
        assert texts == [
            "<|user|>The capital of France is<|assistant|> Lyon",
            "<|user|>So. The capital of France is<|assistant|> Lyon",
            OTHERS[0],
        ]


def test_prefixes_are_sampled_once_and_hold_no_braces() -> None:
    editor = fastedit.editor(
        "wise", tiny_model("llama"), tiny_tokenizer(), params={"layers": [1], "steps": 1}
    )
    contexts = editor.contexts
    assert contexts == editor.contexts == sample_prefixes(editor.runner, editor.tokenizer, seed=0)
    assert contexts[0] == "{}"
    assert len(contexts) == 11
    assert all(context.count("{}") == 1 and context.endswith("{}") for context in contexts)
    assert contexts != sample_prefixes(editor.runner, editor.tokenizer, seed=1)


def test_facts_without_a_locality_take_other_texts() -> None:
    model = tiny_model("llama")
    given = make(model, irrelevant=OTHERS)
    given.edit(FACTS)
    mine = [trace.clone() for trace in given.losses]
    given.reset()
    local = make(model)
    local.edit(LOCAL)
    for one, other in zip(mine, local.losses, strict=True):
        assert torch.equal(one, other)
    local.reset()
    assert len(neutral_sentences()) > 10
    make(model).edit(FACTS)  # the packaged text


# ---- input that cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"save_freq": None}, "save_freq must be a whole number"),
        ({"save_freq": 3, "merge_freq": 10}, "merge_freq must be a multiple of save_freq, got 10 and 3"),
        ({"save_freq": 0}, "save_freq must be a whole number above 0, got 0"),
        ({"merge_density": 0}, "merge_density must be above 0"),
        ({"mask_ratio": 0}, "mask_ratio must be above 0 and below 1, got 0"),
        ({"mask_ratio": 1}, "mask_ratio must be above 0 and below 1, got 1"),
        ({"layers": [7]}, "blocks 0 to 2"),
        ({"layers": [0, 1]}, "one layer"),
        ({"merge": "slerp"}, "merge must be one of ties"),
        ({"decay_scope": "some"}, "decay_scope must be one of"),
        ({"replay": True, "retrieve": False}, "replay goes with retrieve=True"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0}, "lr must be above 0"),
    ],
)
def test_unusable_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_model("llama"), params=params)


def test_unusable_input_is_named_and_changes_nothing() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidFact, match="locality must be text that is not empty"):
        replace(FACTS[0], locality=" ")
    with pytest.raises(ValueError, match="irrelevant must hold at least one text"):
        make(model, irrelevant=[""])
    with pytest.raises(ValueError, match="one fact at a time"):
        make(model, profile="official", params={"batch_size": 2})
    with pytest.raises(ValueError, match="this is a mask of 8 entries"):
        make(model, masks=[BitMask(torch.zeros(1, dtype=torch.uint8), 8)])
    with pytest.raises(ValueError, match="templates with one"):
        fastedit.editor("wise", model, tiny_tokenizer(), contexts=["no place"])
    editor = make(model)
    with pytest.raises(InvalidFact, match="context holds 128"):
        editor.edit([replace(LOCAL[0], locality="word " * 200)])
    assert editor.side is None
    editor.edit(LOCAL[:1])
    weight = editor.state.side.weight.clone()  # type: ignore[union-attr]
    with pytest.raises(InvalidFact, match="context holds 128"):
        editor.edit([LOCAL[1], replace(LOCAL[2], locality="word " * 200)])
    assert torch.equal(editor.state.side.weight, weight)  # type: ignore[union-attr]
    wild = make(model, replace(SETTINGS, lr=1e30))
    with pytest.raises(NumericalError, match="lower lr"):
        wild.edit([LOCAL[1]])
    assert torch.equal(editor.state.side.weight, weight)  # type: ignore[union-attr]


# ---- against the published run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    if "wise" not in find_cases():
        pytest.skip("FASTEDIT_TEST_DATA is unset or has no golden/index.json with the case wise")
    return load_case("wise")


def published_editor(case: GoldenCase) -> tuple[Wise, list[Fact]]:
    model, tokenizer = case.load_model(eager=True)
    given = case.hparams
    n = int(np.prod(case.data["weight_shape"]))
    masks = []
    for shard in range(len(case.data["edits"]) // given["save_freq"]):
        flat = np.unpackbits(case.arrays[f"mask_{shard}_packed"])[:n]
        masks.append(BitMask.from_dense(torch.from_numpy(flat.astype(bool))))
    editor = fastedit.editor(
        "wise",
        model,
        tokenizer,
        params={
            "layers": [4],
            "lr": given["edit_lr"],
            "steps": given["n_iter"],
            "merge_density": given["densities"],
            **{name: given[name] for name in ("mask_ratio", "alpha", "beta", "gamma", "retrieve")},
            **{name: given[name] for name in ("save_freq", "merge_freq")},
        },
        profile="official",
        contexts=case.data["context_templates"],
        masks=masks,
    )
    facts = [
        Fact(
            request["prompt"],
            request["subject"],
            request["target_new"],
            locality=f"{request['locality_prompt']} {request['locality_ground_truth']}",
        )
        for request in case.data["requests"]
    ]
    assert isinstance(editor, Wise)
    return editor, facts


def test_golden_training_follows_the_published_path(case: GoldenCase) -> None:
    """The first edit of every shard begins at the original weight, so its path can be compared step by step.

    Steps of lr 1 amplify rounding, so that a whole run cannot be repeated: the published loop itself, in another
    version of torch, parts from its stored run by the same amounts as ours (tests/bench/test_wise.py).
    """
    editor, facts = published_editor(case)
    masks = editor.masks
    for shard, mask in enumerate(masks):
        number = shard * case.hparams["save_freq"]
        editor.reset()
        editor.masks = [mask]
        editor.edit([facts[number]])
        stored, ours = case.tensor(f"loss_e{number}"), editor.losses[0]
        for steps, tolerance in ((4, 1e-5), (12, 5e-3)):
            torch.testing.assert_close(ours[:steps], stored[:steps], rtol=tolerance, atol=tolerance)


def test_golden_merges(case: GoldenCase) -> None:
    """Stored side memories go in, the stored merged ones come out; and what no mask selects only decays.

    Of entries equal to the least magnitude that is kept, the published code keeps what a sort happens to put first.
    """
    editor, facts = published_editor(case)
    state = editor.new_memory().state
    state.given = editor.masks
    save_freq = case.hparams["save_freq"]
    tied = torch.zeros(state.base.shape, dtype=torch.bool)
    for shard in range(4):
        state.begin()
        stored = case.tensor(f"side_delta_{shard}")
        state.side.weight = state.base + stored
        state.end(facts[shard * save_freq : (shard + 1) * save_freq], 1.0)
        tied = tied | _at_threshold(stored, case.hparams["densities"])
        if shard % 2:
            merged, wanted = state.merged[0].weight - state.base, case.tensor(f"merged_delta_{shard // 2}")
            tied = tied | _at_threshold(wanted, case.hparams["densities"])
            assert float(tied.float().mean()) < 0.01
            assert relative_error(merged[~tied], wanted[~tied]) < 1e-6
            assert not state.pending
        steps = sum(len(case.arrays[f"loss_e{e}"]) for e in range(shard * save_freq, (shard + 1) * save_freq))
        outside = ~editor.masks[shard].dense(stored.shape)
        decayed = state.base[outside].double() * ((1 - 1e-5) ** steps - 1)
        assert relative_error(stored[outside], decayed) < 5e-3


def _at_threshold(delta: torch.Tensor, density: float) -> torch.Tensor:
    magnitude = delta.abs()
    kept = magnitude.flatten().sort(descending=True).values[: int(density * delta.numel())]
    return magnitude == kept[-1]


@pytest.mark.slow
def test_golden_run_reaches_what_the_published_one_reached(case: GoldenCase) -> None:
    """All 20 edits: as many memories, merged weights of the same size and direction, facts as well kept."""
    editor, facts = published_editor(case)
    for start in range(0, 20, 5):
        editor.edit(facts[start : start + 5])
        for number, trace in enumerate(editor.losses, start):
            stored = case.tensor(f"loss_e{number}")
            assert float(trace[-1, 1]) < 0.05
            assert float(stored[-1, 1]) < 0.05
    state = editor.state
    assert state is not None
    assert (len(state.merged), len(state.pending), len(state.side.facts)) == (1, 0, 0)
    merged, stored = state.merged[0].weight - state.base, case.tensor("merged_delta_1")
    assert relative_error(merged, stored) < 0.3
    assert float(merged.norm()) == pytest.approx(float(stored.norm()), rel=0.05)
    assert state.threshold == pytest.approx(case.data["edits"][-1]["min_act"], rel=0.05)
    right = sum(_is_answered(editor, fact) for fact in facts) / len(facts)
    assert right >= case.data["post"]["prompt_new"]["exact"] - 0.1


@torch.no_grad()
def _is_answered(editor: Wise, fact: Fact) -> bool:
    target = editor.tokenizer(fact.target, add_special_tokens=False)["input_ids"]
    ids = editor.tokenizer(fact.text)["input_ids"] + target
    logits = editor.model(input_ids=torch.tensor([ids])).logits[0]
    return bool(torch.equal(logits[-len(target) - 1 : -1].argmax(-1), torch.tensor(target)))
