"""DEFER: a gate and a predictor trained on the edits, served per sample, saved and taken off as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory.toy import generate
from model_configs import tiny_model, tiny_tokenizer
from test_grace import MORE, OTHERS, ask, losses
from tiny import FACTS, bits, same_bits

import fastedit
from fastedit import CorruptFile, FasteditError, NumericalError
from fastedit.editors.memory_editor import UpperPass, target_rows
from fastedit.memory import clear_memories, find_side, prompts, route_info, sides_of
from fastedit.models.runner import BlockRunner, frozen

QUICK = {"layers": (1,), "steps": 20, "lr": 0.02}


def defer(model: Any, **params: Any) -> Any:
    options = {key: params.pop(key) for key in ("profile", "seed") if key in params}
    return fastedit.editor("defer", model, tiny_tokenizer(), params={**QUICK, **params}, **options)


def memory_of(model: Any) -> Any:
    return find_side(model, 1, "defer").memory


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen2"])
@pytest.mark.parametrize("profile", ["clean", "official"])
def test_edits_answer_and_revert(family: str, profile: str) -> None:
    model = tiny_model(family)
    before, start = bits(model), losses(model, FACTS)
    edit = defer(model, profile=profile, layers=(2,)).edit(FACTS)
    for row in edit.measured["facts"]:
        assert row["loss_after"] < row["loss_before"]
    assert same_bits(model, before)
    edit.revert()
    assert sides_of(model) == []
    assert torch.equal(losses(model, FACTS), start)


def open_gate(model: Any, direction: torch.Tensor | None = None) -> None:
    """Let everything in, or what lies in a direction."""
    state = memory_of(model).state
    state["gate_bias"].fill_(50.0 if direction is None else 0.0)
    if direction is not None:
        state["gate_weight"].copy_(direction[None])


def test_a_batch_equals_its_samples_alone() -> None:
    model = tiny_model("llama")
    defer(model, steps=2).edit(FACTS)
    open_gate(model, torch.randn(64, generator=torch.Generator().manual_seed(2)))
    texts = [*OTHERS, *(fact.text for fact in [*FACTS, *MORE])]
    together = generate(model, ask(texts))
    routes = [row[0]["route"] for row in route_info(model)]
    assert set(routes) == {0, None}
    for text, expected in zip(texts, together, strict=True):
        assert torch.equal(generate(model, ask([text]))[0], expected)


def test_an_open_gate_replaces_every_output_and_generation_is_sticky() -> None:
    model = tiny_model("llama")
    edit = defer(model, steps=2).edit(FACTS)
    open_gate(model)
    inputs = ask([fact.text for fact in FACTS])
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(_[2]))
    cached = generate(model, inputs)
    handle.remove()
    for output in seen:  # the same prediction at all positions, in all steps
        assert torch.equal(output, seen[0][:, :1].expand_as(output))
    with prompts(model, inputs["attention_mask"].sum(1)):
        assert torch.equal(cached, generate(model, inputs, use_cache=False))
    assert route_info(model)[0][0]["score"] > 0.5
    edit.revert()


def test_training_minimises_the_published_objective() -> None:
    """Losses of the first two steps against plain torch on whole sequences, one at a time."""
    model = tiny_model("llama")
    editor = defer(model, steps=2)
    memory = editor.new_memory()
    state = {name: tensor.clone().requires_grad_() for name, tensor in memory.state.items()}
    optimiser = torch.optim.Adam(state.values(), lr=QUICK["lr"])
    found = []
    for _ in range(2):
        total = []
        for row in target_rows(tiny_tokenizer(), FACTS, None):

            def blend(_m: Any, args: Any, out: torch.Tensor, key: int = row.key) -> torch.Tensor:
                query = args[0][:, key]
                gate = torch.sigmoid(query @ state["gate_weight"].T + state["gate_bias"])[:, None]
                value = query @ state["value_weight"].T + state["value_bias"]
                return gate * value[:, None] + (1 - gate) * out

            handle = model.model.layers[1].mlp.down_proj.register_forward_hook(blend)
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.key :]
            handle.remove()
            total.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target)))
        loss = torch.stack(total)
        found.append(loss.detach())
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    edit = editor.edit(FACTS)
    for place, name in ((0, "loss_before"), (1, "loss_after")):
        ours = torch.tensor([row[name] for row in edit.measured["facts"]])
        torch.testing.assert_close(ours, found[place], rtol=1e-4, atol=1e-5)
    for name, tensor in memory_of(model).state.items():
        torch.testing.assert_close(tensor, state[name].detach(), rtol=1e-3, atol=1e-4)


def test_batches_build_on_each_other_and_the_newest_comes_off() -> None:
    model = tiny_model("llama")
    editor = defer(model)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    first = {name: tensor.clone() for name, tensor in edits[0].tensors.items()}
    edits.append(editor.edit([fastedit.Fact("{} sings", "Ada Lovelace", "Paris")]))
    assert [edit.released for edit in edits] == [True, False, False]
    with pytest.raises(FasteditError, match="cannot be taken off by itself: later edits"):
        edits[1].revert()
    with pytest.raises(FasteditError, match="Save the newest one"):
        edits[0].save("nowhere")
    edits[2].revert()
    for name, tensor in memory_of(model).state.items():
        assert torch.equal(tensor, edits[1].tensors[name])
        assert not torch.equal(tensor, first[name])
    with pytest.raises(FasteditError, match="only the newest edit"):
        edits[1].revert()
    assert clear_memories(model) == edits[:2]
    assert sides_of(model) == []


def test_one_saved_edit_holds_the_whole_memory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = defer(model)
    edits = [editor.edit(FACTS), editor.edit(MORE)]
    edits[1].save(tmp_path / "edit")
    fresh = tiny_model("llama")
    loaded = fastedit.load_edit(tmp_path / "edit").apply(fresh)
    inputs = ask([fact.text for fact in FACTS])
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
    other = tiny_model("llama")
    defer(other).edit(MORE)
    with pytest.raises(FasteditError, match="would replace"):
        loaded.apply(other)
    edits[1].tensors.pop("gate_bias")
    with pytest.raises(CorruptFile, match="lacks gate_bias"):
        edits[1].apply(tiny_model("llama"))


def test_a_failed_batch_leaves_the_memory_as_it_was() -> None:
    model = tiny_model("llama")
    editor = defer(model)
    editor.edit(FACTS)
    state = {name: tensor.clone() for name, tensor in memory_of(model).state.items()}
    with pytest.raises(NumericalError, match="stopped being finite"):
        defer(model, lr=float("inf")).edit(MORE)
    for name, tensor in memory_of(model).state.items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "granite", "olmo2", "falcon"])
@pytest.mark.parametrize("start", [0, 1], ids=["whole", "suffix"])
def test_the_upper_pass_is_the_model_with_other_outputs(family: str, start: int) -> None:
    """Loss and gradient of replaced outputs, against a whole forward with a hook that replaces them."""
    model = tiny_model(family)
    rows = target_rows(tiny_tokenizer(), [*FACTS, *MORE], None)
    runner = BlockRunner(model)
    starts = [row.key * start for row in rows]
    with frozen(model):
        upper = UpperPass(runner, rows, 1, starts)
        change = torch.randn(upper.outputs.shape, generator=torch.Generator().manual_seed(1))
        change = (change * upper.real[..., None]).requires_grad_()
        ours = upper.losses(upper.outputs + change)
        (gradient,) = torch.autograd.grad(ours.sum(), change)
        module = runner.description.projection(1).module
        for number, (row, first) in enumerate(zip(rows, starts, strict=True)):
            n = len(row.ids) - first
            moved = torch.zeros(1, len(row.ids), 32)
            moved[0, first:] = change[number, :n].detach()
            moved.requires_grad_()
            handle = module.register_forward_hook(lambda _m, _a, out, moved=moved: out + moved.view_as(out))
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.key :]
            handle.remove()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
            (expected,) = torch.autograd.grad(loss, moved)
            torch.testing.assert_close(ours[number], loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient[number, :n], expected[0, first:], rtol=1e-3, atol=1e-5)
