"""Routes are decided once per sample, at prefill, over the prompt's real tokens, and stay with their samples."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from memory.toy import FAMILIES, PROMPTS, add_toy, batch, generate, last_logits, with_toy
from model_configs import tiny_model
from transformers import DynamicCache

from fastedit import FasteditError, UnsupportedModel
from fastedit.memory import detach, forget_routes, prompts, route_info, sides_of
from fastedit.memory.base import Decision, Routes
from fastedit.memory.routing import real_tokens, router_of


def filled(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """A cache object after a prefill."""
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def chosen(model: Any) -> list[int | None]:
    return [row[0]["route"] for row in route_info(model)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_routed_as_its_samples_are_alone(family: str, side: str) -> None:
    model, _ = with_toy(family)
    alone, routes = [], []
    for prompt in PROMPTS:
        alone.append(last_logits(model, batch([prompt]))[0])
        routes += chosen(model)
    assert len(set(routes)) > 1  # some are routed, some are not
    together = last_logits(model, batch(side=side))
    assert chosen(model) == routes
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_routed_keeps_the_bits(family: str) -> None:
    model, _ = with_toy(family, everyone=False)
    base = tiny_model(family)
    inputs = batch()
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert torch.equal(generate(model, inputs), generate(base, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_unrouted_samples_of_a_mixed_batch_are_those_of_the_base_model(family: str) -> None:
    model, _ = with_toy(family)
    inputs = batch()
    ours, base = last_logits(model, inputs), last_logits(tiny_model(family), inputs)
    routed = torch.tensor([route is not None for route in chosen(model)])
    torch.testing.assert_close(ours[~routed], base[~routed], rtol=0, atol=1e-5)
    assert torch.equal(ours[~routed].argmax(1), base[~routed].argmax(1))
    assert (ours[routed] - base[routed]).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family: str) -> None:
    model, side = with_toy(family)
    inputs = batch()
    cached = generate(model, inputs)
    assert side.memory.calls == [tuple(inputs["input_ids"].shape)]  # one decision, at prefill
    assert side.memory.applied == [True] + [False] * 4
    with prompts(model, inputs["attention_mask"].sum(1)):
        uncached = generate(model, inputs, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_sample_keeps_its_route_in_every_batch(family: str) -> None:
    model, _ = with_toy(family)
    together = generate(model, batch())
    for prompt, expected in zip(PROMPTS, together, strict=True):
        assert torch.equal(generate(model, batch([prompt]))[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_returned_sequences_follow_their_sample(family: str) -> None:
    model, side = with_toy(family)
    inputs = batch()
    found = generate(model, inputs, num_beams=3, num_return_sequences=2)
    side.memory.calls.clear()
    with prompts(model, inputs["attention_mask"].sum(1)):
        again = generate(model, inputs, num_beams=3, num_return_sequences=2, use_cache=False)
    assert len(side.memory.calls) == 5
    assert torch.equal(found, again)


def test_sampling_is_the_same_with_and_without_a_cache() -> None:
    model, _ = with_toy("llama")
    inputs = batch()
    torch.manual_seed(0)
    cached = generate(model, inputs, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    with prompts(model, inputs["attention_mask"].sum(1)):
        uncached = generate(model, inputs, do_sample=True, num_return_sequences=2, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_static_caches_give_the_same_tokens(family: str) -> None:
    model, side = with_toy(family)
    inputs = batch()
    expected = generate(model, inputs)
    if getattr(model, "_supports_static_cache", True) is False:
        pytest.skip(f"no static caches for {family} in transformers {transformers.__version__}")
    static: dict[str, Any] = {"cache_implementation": "static"}
    if hasattr(transformers.GenerationConfig(), "disable_compile"):
        static["disable_compile"] = True
    for _ in range(2):  # the cache may be used again
        side.memory.calls.clear()
        assert torch.equal(generate(model, inputs, **static), expected)
        assert len(side.memory.calls) == 1


def test_rows_of_a_cache_carry_their_routes() -> None:
    model, _ = with_toy("llama")
    inputs = batch()
    cache = filled(model, inputs)
    routes = torch.tensor([-1 if r is None else r for r in chosen(model)])
    (kept,) = cache._fastedit_routes.values()
    assert torch.equal(kept.index, routes)
    order = torch.tensor([3, 0, 4, 1, 2])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    (moved,) = cache._fastedit_routes.values()
    rows = order.repeat_interleave(2)[[0, 3, 5]]
    assert torch.equal(moved.index, routes[rows])
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(next(iter(copied._fastedit_routes.values())).index, routes[rows].flip(0))
    assert torch.equal(moved.index, routes[rows])
    mask = torch.cat((inputs["attention_mask"][rows], torch.ones(3, 1).long()), 1)
    token = torch.tensor([[7], [8], [9]])
    whole = {"input_ids": torch.cat((inputs["input_ids"][rows], token), 1), "attention_mask": mask}
    with torch.no_grad(), prompts(model, inputs["attention_mask"].sum(1)[rows]):
        stepped = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
        expected = model(**whole).logits[:, -1]
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_each_route_are_known_until_they_are_reordered() -> None:
    routes = Routes.of(Decision(torch.tensor([2, -1, 0, 2])), 0)
    assert routes.used == (0, 2)
    assert [rows.tolist() for rows in routes.rows or ()] == [[2], [0, 3]]
    assert not routes.all_routed
    assert Routes.of(Decision(torch.tensor([1, 1])), 0).all_routed
    assert Routes.of(Decision(torch.tensor([-1, -1])), 0).rows == ()
    assert routes.select(torch.tensor([3, 0])).rows is None
    assert not routes.select(torch.tensor([3, 0])).all_routed


def test_another_number_of_rows_is_refused() -> None:
    model, _ = with_toy("llama")
    cache = filled(model, batch())
    with pytest.raises(ValueError, match="routes of 5 samples, this call has 2"):
        model(input_ids=torch.ones(2, 1).long(), past_key_values=cache)


def test_reset_and_forget_let_the_next_call_decide() -> None:
    model, side = with_toy("llama")
    inputs = batch(PROMPTS[:1])
    cache = filled(model, inputs)
    model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)  # many tokens keep the route
    assert len(side.memory.calls) == 1
    forget_routes(cache)
    model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    assert side.memory.calls[1:] == [(1, 2)]
    if not hasattr(DynamicCache, "reset"):
        return  # only static caches have it in old releases
    cache.reset()
    assert not cache._fastedit_routes


def test_a_cache_filled_without_the_memory_is_routed_by_the_next_call() -> None:
    model = tiny_model("llama")
    cache = filled(model, {"input_ids": torch.tensor([[4, 5, 6]])})
    side = add_toy(model, 1)
    model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert side.memory.calls == [(1, 2)]


def test_a_memory_that_changed_since_the_prefill_is_refused() -> None:
    model, side = with_toy("llama")
    cache = filled(model, batch())
    side.memory.version += 1
    with pytest.raises(FasteditError, match="was changed since this KV cache was filled"):
        model(input_ids=torch.ones(5, 1).long(), past_key_values=cache)


def test_per_call_scope_decides_in_every_step() -> None:
    model, side = with_toy("llama")
    side.memory.route_scope = "per_call"
    generate(model, batch())
    assert [length for _, length in side.memory.calls[1:]] == [1, 1, 1, 1]


def test_all_tokens_may_decide_though_prompts_are_known() -> None:
    model, side = with_toy("llama")
    inputs = batch(PROMPTS[:1])
    seen = []
    score = side.memory.scores
    side.memory.scores = lambda x, tokens: seen.append(int(tokens.sum())) or score(x, tokens)
    with prompts(model, [2]):
        model(**inputs)
        side.memory.route_tokens = "all"
        model(**inputs)
    assert seen == [2, int(inputs["attention_mask"].sum())]


def test_prompts_with_other_rows_are_refused_and_leave_nothing_behind() -> None:
    model, _ = with_toy("llama")
    with pytest.raises(ValueError, match="3 lengths were given, the call has 5"), prompts(model, [1, 2, 3]):
        model(**batch())
    assert router_of(model).lengths is None
    assert router_of(model).call is None  # the failed call is over
    with prompts(tiny_model("llama"), [1]):
        pass


@pytest.mark.parametrize("first", ["low", "high"])
def test_two_memories_in_one_model(first: str) -> None:
    model = tiny_model("llama")
    layers = (0, 2) if first == "low" else (2, 0)
    sides = [add_toy(model, layer) for layer in layers]
    sides[0].memory.calls.clear()
    inputs = batch()
    out = generate(model, inputs)
    assert [len(side.memory.calls) for side in sides] == [1, 1]
    assert [[entry["layer"] for entry in row] for row in route_info(model)] == [list(layers)] * len(PROMPTS)
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(out, generate(model, inputs, use_cache=False))
    detach(model, sides[0])
    assert sides_of(model) == [sides[1]]
    detach(model, sides[1])
    assert router_of(model) is None
    assert torch.equal(generate(model, inputs), generate(tiny_model("llama"), inputs))


def test_two_memories_at_one_projection() -> None:
    model = tiny_model("gpt2")
    add_toy(model, 1)
    once = last_logits(model, batch())
    add_toy(model, 1, method="second", everyone=True)
    assert (last_logits(model, batch()) - once).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_route_alike(backend: str) -> None:
    model, _ = with_toy("llama")
    inputs = batch()
    expected = last_logits(model, inputs)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(last_logits(compiled, inputs), expected, rtol=1e-5, atol=1e-5)
    tokens = generate(model, inputs)
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(generate(model, inputs), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    model, _ = with_toy("llama", dtype=dtype)
    inputs = batch()
    assert model.model(**inputs).last_hidden_state.dtype == dtype
    assert generate(model, inputs).shape == (5, 5)


def test_threads_have_routes_of_their_own() -> None:
    model, _ = with_toy("llama")
    expected = [generate(model, batch([prompt])) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: generate(model, batch([prompt])), PROMPTS * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))


def test_no_samples() -> None:
    model, side = with_toy("llama", everyone=True)
    router = router_of(model)
    router.begin(model.model, (torch.zeros(0, 4).long(),), {})
    out = torch.zeros(0, 4, 32)
    assert side.hook(None, (torch.zeros(0, 4, 64),), out) is None
    router.end(model.model, (), {}, None)
    assert side.memory.calls == [(0, 4)]
    assert route_info(model) == []


def test_samples_of_padding_only_are_not_routed() -> None:
    model, _ = with_toy("llama", everyone=True)
    inputs = batch(PROMPTS[:2])
    inputs["attention_mask"][0] = 0
    model(**inputs)
    assert chosen(model) == [None, 0]


def test_masks_that_generation_prepares() -> None:
    real = torch.tensor([[False, True, True], [True, True, True]])
    keys = torch.cat((torch.zeros(2, 2).bool(), real, torch.zeros(2, 3).bool()), 1)
    causal = torch.tensor([[q + 2 >= k for k in range(8)] for q in range(3)])
    whole = keys[:, None, None] & causal
    added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    cpu = torch.device("cpu")
    for mask in (whole, added, {"sliding_attention": whole[:1], "full_attention": whole}):
        assert torch.equal(real_tokens(mask, (2, 3), 2, cpu), real)
    assert real_tokens(None, (2, 3), 2, cpu).all()
    two = torch.cat((torch.ones(2, 2), real), 1)
    assert torch.equal(real_tokens(two, (2, 3), 2, cpu), real)
    with pytest.raises(UnsupportedModel, match=r"shape \(batch, length\)"):
        real_tokens("mask", (2, 3), 0, cpu)


def test_tuples_instead_of_caches_use_the_last_prefill() -> None:
    model, side = with_toy("gpt2")
    router = router_of(model)
    model(**batch())
    routes = dict(router.last)
    past = ((torch.zeros(5, 4, 6, 8), torch.zeros(5, 4, 6, 8)),)
    router.begin(model.transformer, (torch.ones(5, 1).long(),), {"past_key_values": past})
    assert router.call.routes(side.key, side.memory) is routes[side.key]
    router.end(model.transformer, (), {}, None)


def test_blocks_called_alone_see_no_memory() -> None:
    model, side = with_toy("llama", everyone=True)
    model.model.layers[1].mlp(torch.randn(1, 2, 32))
    assert side.memory.calls == []
