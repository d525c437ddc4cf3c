"""WISE's memories: the schedule of shards and merges, routing, generation, and edits as things."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer
from tiny import CONTEXTS, FACTS, bits, same_bits

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError
from fastedit.artefacts import apply_to_directory, revert_directory
from fastedit.editors.wise import Wise
from fastedit.memory import prompts, route_info, sides_of
from fastedit.memory import wise as wise_module
from fastedit.memory.base import Decision, Routes
from fastedit.memory.wise import UNSET, ShardPlan, SideMemory, WiseMemory, WiseState, model_activation
from fastedit.models import describe
from fastedit.ops import BitMask, PhiloxMask
from fastedit.ops.routing import activation_function

LAYER = 1
OTHERS = ["The Eiffel Tower is in the city of Paris", "Miles Davis plays the trumpet", "Rome is in"]
LOCAL = [replace(fact, locality=text) for fact, text in zip(FACTS, OTHERS, strict=True)]
PARAMS = {
    "layers": [LAYER],
    "lr": 0.5,
    "steps": 25,
    "alpha": 0.1,
    "beta": 1.5,
    "gamma": 1.0,
    "weight_decay": 1e-3,
    "activation_ratio": 0.7,
}
FAMILIES = ["llama", "gpt2", "gptj", "qwen2"]


def make(model: Any, profile: str = "clean", **params: Any) -> Wise:
    made = fastedit.editor(
        "wise", model, tiny_tokenizer(), params={**PARAMS, **params}, contexts=CONTEXTS, profile=profile
    )
    assert isinstance(made, Wise)
    return made


def batch_of(texts: list[str], side: str = "left") -> dict[str, torch.Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    found = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


# ---- the schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrieve", [False, True])
def test_f_the_schedule_of_2500_edits(retrieve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MEM A5 (f): the published rules in the edit counter c, with stub training, against the state machine."""
    merges: list[tuple[list[float], list[float]]] = []

    def ties(tensors: Any, weights: Any, density: float, base: torch.Tensor, variant: str) -> torch.Tensor:
        merges.append(([float(t[0, 0]) for t in tensors], weights))
        return base + 1000.0 * len(merges)

    monkeypatch.setattr(wise_module, "ties_merge", ties)
    state = WiseState(torch.zeros(3, 4), ShardPlan(0.2, 500, 1000, retrieve), seed=3, layer=2)
    listed: list[float] = []  # of finished memories, the value that stands for each
    thresholds: list[float] = []
    expected: list[tuple[list[float], list[float]]] = []
    epsilon, shard, merged = UNSET, -1, 0.0
    generator = torch.Generator().manual_seed(0)
    for c in range(2500):
        if c % 500 == 0:
            shard += 1
        memory = state.begin()
        assert memory.mask == PhiloxMask(3, shard, 2, 0.2)
        memory.weight += 1
        score = float(torch.rand((), generator=generator)) + 1
        epsilon = min(epsilon, score)
        state.end([FACTS[0]], score)
        value = c % 500 + 1.0
        if (c + 1) % 500 == 0:
            listed.append(value)
            thresholds.append(epsilon)
            if retrieve:
                epsilon = UNSET
            value = 0.0
        if (c + 1) % 1000 == 0:
            if retrieve:
                expected.append((listed[-2:], [0.5, 0.5]))
                listed = [*listed[:-2], 1000.0 * len(expected)]
                thresholds = [*thresholds[:-2], min(thresholds[-2:])]
            else:
                first = not expected
                expected.append((listed, [0.5, 0.5]) if first else ([*listed, merged], [0.2, 0.2, 0.6]))
                merged, listed = 1000.0 * len(expected), []
        finished = [*state.merged, *state.pending] if retrieve else state.pending
        assert [float(m.weight[0, 0]) for m in finished] == listed
        assert float(state.side.weight[0, 0]) == value
        if retrieve:
            assert [m.threshold for m in finished] == thresholds
            assert state.side.threshold == epsilon
        else:
            assert state.threshold == epsilon
            assert [float(m.weight[0, 0]) for m in state.merged] == ([merged] if merged else [])
    assert merges == expected
    assert len(state.merged) == (2 if retrieve else 1)
    assert len(state.pending) == 1
    assert [len(m.facts) for m in state.memories] == ([1000, 1000, 500] if retrieve else [2000, 500])
    before = len(state.memories)
    state.finalise()
    state.finalise()  # nothing is left to do
    assert not state.pending
    assert not state.side.facts
    assert len(state.merged) == (before if retrieve else 1)
    assert state.begin().mask == PhiloxMask(3, 5, 2, 0.2)


def test_finalize_merges_an_unfinished_shard_once() -> None:
    state = WiseState(torch.zeros(4, 4), ShardPlan(0.2, 2, 4, False))
    for number in range(3):
        state.begin().weight[number] += 1.0
        state.end([FACTS[0]], 2.0)
    assert [len(m.facts) for m in (*state.pending, state.side)] == [2, 1]
    state.finalise()
    assert [m.facts for m in state.merged] == [[0, 1, 2]]
    assert state.room == 2
    with pytest.raises(ValueError, match="room for 2 edits, got 3"):
        state.end([FACTS[0]] * 3, 1.0)


def draw_line(model: Any, texts: list[str]) -> list[int | None]:
    """Set all thresholds to the widest gap between the scores of texts; the routes of each text alone then."""
    (side,) = sides_of(model)
    assert isinstance(side.memory, WiseMemory)
    scores = []
    for text in texts:
        model(**batch_of([text]))
        scores.append(route_info(model)[0][0]["score"])
    ordered = sorted(scores)
    low, high = max(itertools.pairwise(ordered), key=lambda pair: pair[1] / pair[0])
    for memory in side.memory.state.memories:
        memory.threshold = (low * high) ** 0.5 / side.memory.params["activation_ratio"]
    routes = []
    for text, score in zip(texts, scores, strict=True):
        model(**batch_of([text]))
        routes.append(route_info(model)[0][0]["route"])
        assert (routes[-1] is None) == (score <= low)
    return routes


# ---- routing -------------------------------------------------------------------------------------------


def random_memory(model: Any, profile: str, retrieve: bool, seed: int, **params: Any) -> WiseMemory:
    """A memory with two merged memories, a shard that waits, and one in training."""
    editor = make(model, profile, retrieve=retrieve, **params)
    memory = editor.new_memory()
    state = memory.state
    generator = torch.Generator().manual_seed(seed)
    least = 2.0 if profile == "paper" else 1.0  # scores without activation are higher

    def one() -> SideMemory:
        noise = torch.randn(state.base.shape, generator=generator)
        size, threshold = torch.rand(2, generator=generator).tolist()
        return SideMemory(state.side.weight + (0.09 + 0.02 * size) * noise, least + 3 * threshold, facts=[0])

    state.merged = [one(), one()] if retrieve else [one()]
    state.pending, state.side = [one()], one()
    return memory


def reference_route(memory: WiseMemory, scores: list[float]) -> tuple[int, float]:
    """As MEM A1 says it, and how clear the decision is; scores in the order of ``candidates``."""
    ratio, (_, chosen, _) = memory.params["activation_ratio"], memory.candidates
    if not memory.plan.retrieve:
        tau = ratio * memory.state.threshold
        best = max(range(len(scores)), key=lambda i: scores[i])
        others = [s for i, s in enumerate(scores) if i != best]
        gap = min(abs(scores[best] - x) / x for x in (tau, *others))
        return (best if scores[best] >= tau else -1), gap
    levels = [ratio * m.threshold for m in chosen]
    route, best_score = (0 if scores[0] >= levels[0] else -1), scores[0]
    for i in range(1, len(scores)):
        if scores[i] > best_score and scores[i] > levels[i]:
            route, best_score = i, scores[i]
    gaps = [abs(s - level) / level for s, level in zip(scores, levels, strict=True)]
    gaps += [abs(a - b) / a for i, a in enumerate(scores) for b in scores[:i]]
    return route, min(gaps)


@torch.no_grad()
@pytest.mark.parametrize("retrieve", [False, True])
@pytest.mark.parametrize("profile", ["clean", "official", "paper"])
def test_g_routes_follow_the_published_rules(profile: str, retrieve: bool) -> None:
    model = tiny_model("gpt2")
    projection = describe(model).projection(LAYER)
    generator = torch.Generator().manual_seed(9)
    seen = set()
    for seed in range(6):
        memory = random_memory(model, profile, retrieve, seed)
        _, chosen, _ = memory.candidates
        assert len(chosen) == (4 if retrieve else 2 if profile == "official" else 3)
        inputs = torch.randn(8, 7, projection.d_in, generator=generator) * 0.6
        tokens = torch.ones(8, 7, dtype=torch.bool)
        tokens[2, :4] = False
        tokens[3, 5:] = False
        tokens[4] = False
        decided = memory.route(inputs, projection.module(inputs), tokens)
        sigma = (lambda y: y) if profile == "paper" else activation_function(model_activation(model))
        bias = 0 if profile == "paper" else projection.module.bias
        for row in range(8):
            if row == 4:
                assert int(decided.index[row]) == -1
                continue
            x = inputs[row][tokens[row]]
            base = sigma(x @ memory.state.base.T + bias)
            scores = [float((sigma(x @ m.weight.T + bias) - base).norm(dim=1).mean()) for m in chosen]
            wanted, gap = reference_route(memory, scores)
            if gap > 1e-3:
                assert int(decided.index[row]) == wanted
                seen.add(wanted)
            assert decided.score is not None
            assert float(decided.score[row]) == pytest.approx(max(scores), rel=1e-4)
    assert -1 in seen
    assert len(seen) >= 3


@torch.no_grad()
def test_g_long_calls_of_the_official_profile_share_one_route() -> None:
    model = tiny_model("llama")
    memory = random_memory(model, "official", True, 1)
    projection = describe(model).projection(LAYER)
    inputs = torch.randn(3, 101, projection.d_in, generator=torch.Generator().manual_seed(2)) * 0.3
    tokens = torch.ones(3, 101, dtype=torch.bool)
    decided = memory.route(inputs, projection.module(inputs), tokens)
    _, chosen, _ = memory.candidates
    base = torch.nn.functional.silu(inputs @ memory.state.base.T)
    scores = [
        float((torch.nn.functional.silu(inputs @ m.weight.T) - base).norm(dim=2).amax(1).mean())
        for m in chosen
    ]
    wanted, gap = reference_route(memory, scores)
    assert gap > 1e-3
    assert decided.index.tolist() == [wanted] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("retrieve", [False, True])
def test_h_a_batch_is_answered_as_each_prompt_alone(family: str, retrieve: bool) -> None:
    """MEM A5 (h, j): padding on either side; what is not routed has the base model's very logits."""
    model = tiny_model(family)
    texts = [fact.text for fact in FACTS] + ["Tokyo", "The city of Rome is in the"]
    plain = {side: model(**batch_of(texts, side)).logits for side in ("left", "right")}
    editor = make(model, retrieve=retrieve, save_freq=2, merge_freq=2)
    editor.edit(LOCAL)
    routes = draw_line(model, texts)
    alone = [model(**batch_of([text])).logits[0] for text in texts]
    for side in ("left", "right"):
        batch = batch_of(texts, side)
        if family in ("gpt2", "gptj"):  # absolute positions, which the model does not find by itself
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            found = model(**batch, position_ids=positions).logits
        else:
            found = model(**batch).logits
        assert [rows[0]["route"] for rows in route_info(model)] == routes
        for row, text in enumerate(texts):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(found[row][real], alone[row], rtol=1e-3, atol=1e-3)
            if routes[row] is None and family not in ("gpt2", "gptj"):
                assert torch.equal(found[row][real], plain[side][row][real]), text


def test_each_memory_serves_the_rows_that_were_routed_to_it() -> None:
    """As if all served all rows, which is how rows that were reordered are served."""
    memory = random_memory(tiny_model("llama"), "clean", True, seed=5)
    x = torch.randn(6, 3, memory.d_in, generator=torch.Generator().manual_seed(0))
    outputs = x.new_zeros(6, 3, memory.d_out)
    for index in ([1, -1, 0, 1, 2, 0], [1] * 6, [-1, 0, -1, 0, 0, 0]):
        routes = Routes.of(Decision(torch.tensor(index)), memory.version)
        found, expected = (
            memory.apply(x, outputs, each, None) for each in (routes, replace(routes, rows=None))
        )
        routed = routes.index >= 0
        torch.testing.assert_close(found[routed], expected[routed], rtol=1e-5, atol=1e-6)


# ---- generation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_i_generation_keeps_the_prompts_route(family: str) -> None:
    """Cached equals uncached generation under the same routes; beams, samples and several sequences run."""
    model = tiny_model(family)
    editor = make(model)
    texts = [fact.text for fact in FACTS] + ["Tokyo"]
    batch, how = batch_of(texts), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**batch, **how)
    editor.edit(LOCAL[:2])
    routes = draw_line(model, texts)
    cached = model.generate(**batch, **how)
    assert [rows[0]["route"] for rows in route_info(model)] == routes
    with prompts(model, batch["attention_mask"].sum(1)):
        uncached = model.generate(**batch, **how, use_cache=False)
    assert torch.equal(cached, uncached)
    for row, route in enumerate(routes):
        assert torch.equal(cached[row], before[row]) == (route is None)
    several = {"max_new_tokens": 4, "num_return_sequences": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    for more, copies in (({"num_beams": 3}, 3), ({"do_sample": True}, 2)):
        found = model.generate(**batch, **several, **more)
        assert len(found) == 2 * len(texts)
        wanted = [route for route in routes for _ in range(copies)]
        assert [rows[0]["route"] for rows in route_info(model)] == wanted


def test_the_official_profile_decides_in_every_call() -> None:
    model = tiny_model("llama")
    editor = make(model, "official")
    editor.edit(LOCAL[:1])
    side = editor.side
    assert side is not None
    assert (side.memory.route_scope, side.memory.route_tokens) == ("per_call", "all")
    batch = batch_of([LOCAL[0].text])
    out = model(**batch, use_cache=True)
    first = side.router.last[side.key]
    model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert side.router.last[side.key] is not first


# ---- edits as things -----------------------------------------------------------------------------------


def same_state(one: WiseState, other: WiseState) -> bool:
    groups = [(s.merged, s.pending, [s.side]) for s in (one, other)]
    for mine, theirs in zip(*groups, strict=True):
        if len(mine) != len(theirs):
            return False
        for a, b in zip(mine, theirs, strict=True):
            alike = (a.threshold, a.facts) == (b.threshold, b.facts) and torch.equal(a.weight, b.weight)
            n = a.weight.numel()
            masks = [m and m.bits(n).tolist() for m in (a.mask, b.mask)]
            if not alike or masks[0] != masks[1] or a.weight.stride() != b.weight.stride():
                return False
    return (one.started, one.facts) == (other.started, other.facts)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("profile", ["clean", "official"])
@pytest.mark.parametrize("retrieve", [False, True])
def test_a_saved_edit_is_the_whole_memory(family: str, profile: str, retrieve: bool, tmp_path: Path) -> None:
    """Merged memories, a waiting shard and the one in training come back bit for bit, and are trained on alike."""
    model = tiny_model(family)
    editor = make(model, profile, retrieve=retrieve, save_freq=1, merge_freq=2, steps=3)
    facts = [*LOCAL, replace(LOCAL[0], prompt="The people of {} speak")]
    editor.edit(facts[:2])
    edit = editor.edit(facts[2:3])
    edit.save(tmp_path / "edit")
    other = tiny_model(family)
    loaded = fastedit.load_edit(tmp_path / "edit")
    assert loaded.id == edit.id
    loaded.apply(other)
    mine, theirs = editor.state, make(other, profile, retrieve=retrieve, save_freq=1, merge_freq=2, steps=3)
    assert mine is not None
    assert theirs.state is not None
    assert same_state(mine, theirs.state)
    texts = [fact.text for fact in facts]
    assert torch.equal(model(**batch_of(texts)).logits, other(**batch_of(texts)).logits)
    editor.edit(facts[3:])
    theirs.edit(facts[3:])
    assert same_state(editor.state, theirs.state)  # type: ignore[arg-type]


def test_reverting() -> None:
    """The newest edit goes by itself, all of them give back the model; what lies deeper is named."""
    model = tiny_model("llama")
    before, plain = bits(model), model(**batch_of([FACTS[0].text])).logits
    editor = make(model, save_freq=1, merge_freq=4, steps=4)
    first = editor.edit(LOCAL[:1])
    kept = editor.state.copy()  # type: ignore[union-attr]
    second = editor.edit(LOCAL[1:2])
    second.revert()
    assert same_state(editor.state, kept)  # type: ignore[arg-type]
    assert editor.side.edits == [first]  # type: ignore[union-attr]
    again = editor.edit(LOCAL[1:2])
    assert again.facts == second.facts
    editor.reset()
    assert not sides_of(model)
    assert editor.side is None
    assert same_bits(model, before)
    assert torch.equal(model(**batch_of([FACTS[0].text])).logits, plain)
    editor.edit(LOCAL[:1]).revert()
    assert not sides_of(model)


def weights(model: Any) -> list[torch.Tensor]:
    (side,) = sides_of(model)
    return [memory.weight for memory in side.memory.state.memories]  # type: ignore[attr-defined]


def test_an_edit_with_shards_of_its_own_can_be_taken_out(tmp_path: Path) -> None:
    """What is left are the very memories of the others, on the model and on disk; then editing goes on."""
    model = tiny_model("llama")
    facts = [*LOCAL, replace(LOCAL[0], prompt="The people of {} speak")]
    editor = make(model, save_freq=1, merge_freq=8, steps=4)
    edits = [editor.edit(part) for part in (facts[:1], facts[1:3], facts[3:])]
    _, *ours = weights(model)
    assert edits[0].released
    ids = [edit.id for edit in edits]
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for edit in edits[1:]:
        apply_to_directory(edit, tmp_path / "model")

    edits[0].revert()
    assert all(map(torch.equal, weights(model), ours))
    assert [edit.id for edit in editor.side.edits] == ids[1:] == [edit.id for edit in edits[1:]]  # type: ignore[union-attr]
    edits[1].revert()
    (left,) = weights(model)
    assert torch.equal(left, ours[-1])
    assert edits[0].applied_to() == edits[1].applied_to() == []

    assert [row["id"] for row in revert_directory(tmp_path / "model", ids[1])] == [ids[1]]
    loaded = fastedit.load_model(tmp_path / "model")
    assert torch.equal(weights(loaded)[-1], left)  # the edit made before them was never in the directory
    assert [edit.id for edit in sides_of(loaded)[0].edits] == ids[2:]
    fastedit.save_model(model, tmp_path / "saved")
    assert torch.equal(*weights(fastedit.load_model(tmp_path / "saved")), left)

    more = [editor.edit(facts[n : n + 1]) for n in (0, 1)]
    assert [memory.facts for memory in editor.state.memories] == [[3], [4], [5]]  # type: ignore[union-attr]
    more[1].revert()
    more[0].revert()
    assert torch.equal(*weights(model), left)
    edits[2].revert()
    assert not sides_of(model)


def test_an_edit_that_others_stand_on_stays() -> None:
    model = tiny_model("llama")
    editor = make(model, save_freq=1, merge_freq=2, steps=4)
    edits = [editor.edit(part) for part in (LOCAL[:1], LOCAL[1:2], LOCAL[2:])]
    before = weights(model)[:1]
    with pytest.raises(FasteditError, match="together with those of other edits"):  # merged
        edits[1].revert()
    change = editor.forget(1)
    edits[2].revert()  # nothing is left of it
    with pytest.raises(FasteditError, match="not kept any more"):
        change.revert()
    assert all(map(torch.equal, weights(model), before))


def test_an_edit_that_others_were_replayed_against_stays() -> None:
    editor = make(tiny_model("llama"), save_freq=2, merge_freq=2, steps=4, replay=True)
    edits = [editor.edit(part) for part in (LOCAL[:2], LOCAL[2:])]
    with pytest.raises(FasteditError, match="trained on top of it"):
        edits[0].revert()


@pytest.mark.parametrize("retrieve", [False, True])
def test_one_memory_can_be_taken_out(retrieve: bool) -> None:
    model = tiny_model("llama")
    editor = make(model, save_freq=1, merge_freq=2, retrieve=retrieve, steps=4)
    with pytest.raises(FasteditError, match="no wise memory on this model"):
        editor.forget(0)
    editor.edit(LOCAL)
    state = editor.state
    assert state is not None
    merged, waiting = state.memories
    with pytest.raises(IndexError, match="there are 2 memories"):
        editor.forget(2)
    change = editor.forget(1)
    state = editor.state
    assert [m.facts for m in state.memories] == [[0, 1]]  # type: ignore[union-attr]
    assert torch.equal(state.merged[0].weight, merged.weight)  # type: ignore[union-attr]
    assert state.threshold == merged.threshold  # type: ignore[union-attr]
    change.revert()
    assert torch.equal(editor.state.pending[0].weight, waiting.weight)  # type: ignore[union-attr]
    editor.finalize()
    state = editor.state
    assert state is not None
    assert not state.pending
    assert [m.facts for m in state.merged] == ([[0, 1], [2]] if retrieve else [[0, 1, 2]])


def test_memories_are_stored_small() -> None:
    """MEM A3.5: on-mask values and the mask's key where nothing else changed; bits and values of a merged one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 96, generator=generator)
    state = WiseState(base, ShardPlan(0.2, 1, 2, True))
    for _ in range(3):
        memory = state.begin()
        assert memory.mask is not None
        memory.weight += memory.mask.dense(base.shape) * torch.randn(base.shape, generator=generator)
        state.end([FACTS[0]], 1.0)
    tensors, about = state.content()
    kinds = [sorted(name[2:] for name in tensors if name.startswith(f"{i}.")) for i in range(3)]
    assert [m["kind"] for m in about["memories"]] == ["merged", "pending", "side"]
    assert kinds == [["changed", "values"], ["values"], ["changed", "values"]]
    n = base.numel()
    assert tensors["1.values"].nbytes == pytest.approx(0.2 * 4 * n, rel=0.1)
    assert tensors["0.values"].nbytes + tensors["0.changed"].nbytes < 0.45 * 4 * n
    assert tensors["2.values"].numel() == 0  # nothing is trained yet
    again = WiseState(base, ShardPlan(0.2, 1, 2, True))
    again.load(tensors, about)
    assert same_state(state, again)
    # decay of everything, and a given mask
    state.given = [BitMask.from_dense(torch.rand(base.shape, generator=generator) < 0.2)] * 9
    state.begin().weight.mul_(0.999)
    tensors, about = state.content()
    assert "2.weight" in tensors
    assert "2.mask" in tensors
    again.load(tensors, about)
    assert same_state(state, again)


def test_a_wrong_model_or_setting_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = make(model, steps=2)
    edit = editor.edit(LOCAL[:1])
    edit.save(tmp_path / "edit")
    loaded = fastedit.load_edit(tmp_path / "edit")
    with pytest.raises(BaseMismatch, match="weights are others"):
        loaded.apply(tiny_model("llama", seed=1))
    with pytest.raises(BaseMismatch, match="has the settings"):
        make(model, steps=2, activation_ratio=0.5).edit(LOCAL[1:2])
    path = next((tmp_path / "edit").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptFile):
        fastedit.load_edit(tmp_path / "edit")
    with pytest.raises(FasteditError, match="does not stand at a projection"):
        _ = WiseMemory(4, 4, vars(editor.params)).state


def test_a_copied_model_has_memories_of_its_own() -> None:
    model = tiny_model("gpt2")
    editor = make(model, steps=3)
    editor.edit(LOCAL[:1])
    twin = copy.deepcopy(model)
    batch = batch_of([LOCAL[0].text])
    wanted = model(**batch).logits
    editor.reset()
    assert torch.equal(twin(**batch).logits, wanted)
    (side,) = sides_of(twin)
    assert isinstance(side.memory, WiseMemory)
    assert side.memory.state.base.data_ptr() == describe(twin).projection(LAYER).weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    """The side memory is float32, the frozen blocks are not."""
    model = tiny_model("llama", dtype)
    editor = make(model)
    editor.edit([LOCAL[0]])
    state = editor.state
    assert state is not None
    assert state.side.weight.dtype == torch.float32
    first, last = editor.losses[0][0], editor.losses[0][-1]
    assert float(last[1]) < float(first[1])
    out = model(**batch_of([LOCAL[0].text]), output_hidden_states=True)
    assert out.hidden_states[-1].dtype == dtype
    assert route_info(model)[0][0]["score"] > 0


def test_the_memory_reports_its_size() -> None:
    model = tiny_model("llama")
    editor = make(model, steps=2, save_freq=1, merge_freq=2)
    edit = editor.edit(LOCAL)
    assert edit.measured["memory_entries"] == 2
    n = editor.projection.d_in * editor.projection.d_out
    assert edit.measured["memory_bytes"] == 3 * 4 * n
    assert edit.measured["steps"] == [2, 2, 2]
    assert edit.facts == LOCAL
    assert isinstance(edit.facts[0], Fact)
