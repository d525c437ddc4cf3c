from __future__ import annotations

import copy
import gc
import itertools
import logging
import signal
import weakref

import pytest
import torch
from torch import nn

import fastedit
from fastedit import BaseMismatch, FasteditError, NumericalError, UnsupportedModel
from fastedit.artefacts import Edit, EditStack, LowRank, Transaction, stack_of
from fastedit.models import describe, fingerprint, weight_digest
from fastedit.ops import low_rank_update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["gpt2", "llama"]


def commit(model: nn.Module, edit: Edit) -> Edit:
    with Transaction(model, edit.weight_names) as transaction:
        return transaction.commit(edit)


def expected(model: nn.Module, before: dict, edits: list[Edit], masters: bool = True) -> dict:
    """The state with edits applied to it from scratch, by the op alone."""
    state = {name: tensor.clone() for name, tensor in before.items()}
    names = {describe(model).projection(layer).weight_name: layer for layer in range(3)}
    for name, layer in names.items():
        transposed = describe(model).projection(layer).transposed
        touching = [edit for edit in edits if name in edit.factors]
        work = state[name].clone()
        if masters and work.dtype != torch.float32:
            work = work.float()
        for edit in touching:
            low_rank_update_(work, edit.factors[name].left, edit.factors[name].right, transposed=transposed)
        if touching:
            state[name] = work.to(state[name].dtype)
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_edits_come_off_in_any_order(kind, dtype, order, make_model, make_edit, bits, assert_bits) -> None:
    model = make_model(kind, dtype)
    before = bits(model)
    edits = [
        commit(model, make_edit(model, layers, seed=i)) for i, layers in enumerate([(0, 1), (1,), (1, 2)])
    ]
    assert_bits(model, expected(model, before, edits))
    left = list(edits)
    for index in order:
        edits[index].revert()
        left.remove(edits[index])
        assert_bits(model, expected(model, before, left))
    assert_bits(model, before)
    assert len(stack_of(model)) == 0
    assert stack_of(model).memory_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_update_adds_left_times_right_transposed(kind, make_model, make_edit, bits) -> None:
    model = make_model(kind)
    before = bits(model)
    edit = commit(model, make_edit(model))
    for name, factors in edit.factors.items():
        delta = model.state_dict()[name] - before[name]
        assert torch.allclose(delta.T if kind == "gpt2" else delta, factors.dense(), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_removal_uses_the_backend_of_the_application(
    backend, make_model, make_edit, bits, assert_bits
) -> None:
    model = make_model("llama")
    try:
        with fastedit.use_backend(backend):
            first = commit(model, make_edit(model, seed=1))
            state = bits(model)
            second = commit(model, make_edit(model, seed=2))
    except fastedit.BackendUnavailable as error:
        pytest.skip(str(error))
    assert {record.backend for record in first.matrices.values()} == {backend}
    second.revert()
    assert_bits(model, state)


def test_small_edits_in_half_precision_are_not_lost(make_model, make_edit, bits) -> None:
    model = make_model("llama", torch.bfloat16)
    name = describe(model).projection(0).weight_name
    before = bits(model)[name].float()
    for seed in range(40):
        edit = make_edit(model, (0,), rank=1, seed=0, scale=0.008)
        edit.seed = seed
        commit(model, edit)
    total = 40 * edit.factors[name].dense()
    rounding = before.abs().max() * 2**-8
    assert torch.allclose(model.state_dict()[name].float(), before + total, atol=float(rounding))


def test_without_masters_each_edit_is_rounded(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("gpt2", torch.bfloat16)
    before = bits(model)
    stack = stack_of(model, masters=False)
    edits = [commit(model, make_edit(model, seed=seed)) for seed in range(3)]
    assert_bits(model, expected(model, before, edits, masters=False))
    stack.remove(edits[0])
    assert_bits(model, expected(model, before, edits[1:], masters=False))
    with pytest.raises(ValueError, match="cannot become True"):
        stack_of(model, masters=True)
    stack.clear()
    assert_bits(model, before)


def test_tied_and_unusual_storage(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = bits(model)
    change = LowRank(torch.randn(50, 2), torch.randn(16, 2))
    edit = Edit(method="x", facts=make_edit(model).facts, factors={"lm_head.weight": change})
    commit(model, edit)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert set(edit.matrices["lm_head.weight"].aliases) == {"lm_head.weight", "model.embed_tokens.weight"}
    both = {"lm_head.weight": change, "model.embed_tokens.weight": change}
    with pytest.raises(ValueError, match="one tied weight"):
        stack_of(model).push(Edit(method="x", facts=edit.facts, factors=both))
    edit.revert()
    assert_bits(model, before)
    # a weight that is a view of something larger, in column order
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(torch.randn(40, 32)[:, 3:19].T)
    before = bits(model)
    edit = commit(model, make_edit(model, (0,)))
    assert not down.weight.is_contiguous()
    assert_bits(model, expected(model, before, [edit]))
    edit.revert()
    assert_bits(model, before)


def test_dense_changes(make_model, make_edit, bits, assert_bits) -> None:
    for kind in KINDS:
        model = make_model(kind)
        before = bits(model)
        name = describe(model).projection(1).weight_name
        delta = torch.randn(16, 40)
        edit = commit(model, Edit(method="x", facts=make_edit(model).facts, factors={}, dense={name: delta}))
        assert edit.rank == 0
        assert edit.norms()[name] == pytest.approx(delta.norm().item(), rel=1e-6)
        change = model.state_dict()[name] - before[name]
        assert torch.allclose(change.T if kind == "gpt2" else change, delta, atol=1e-6)
        edit.revert()
        assert_bits(model, before)


def test_gradients_and_addresses_stay(make_model, make_edit) -> None:
    model = make_model("llama")
    weight = describe(model).projection(0).weight
    address = weight.data_ptr()
    edit = commit(model, make_edit(model))
    assert describe(model).projection(0).weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert weight.grad_fn is None
    edit.revert()
    assert weight.data_ptr() == address


# ------------------------------------------------------------------ what is refused


def test_change_by_somebody_else_is_noticed_before_anything_is_touched(
    make_model, make_edit, bits, assert_bits
) -> None:
    model = make_model("llama")
    edit = commit(model, make_edit(model, (0, 1)))
    with torch.no_grad():
        describe(model).projection(1).weight.data[3, 3] += 1
    state = bits(model)
    stack = stack_of(model)
    for attempt in (
        edit.revert,
        lambda: commit(model, make_edit(model, (0, 1), seed=1)),
        lambda: stack.push(make_edit(model, (1,), seed=2), force=True),
        stack.check,
    ):
        with pytest.raises(
            BaseMismatch, match=r"layers\.1\.mlp\.down_proj\.weight was changed by something else"
        ):
            attempt()
        assert_bits(model, state)
    stack.forget()
    assert_bits(model, state)
    assert edit.applied_to() == []
    commit(model, make_edit(model, (1,), seed=3)).revert()
    assert_bits(model, state)


def test_wrong_base_is_refused_and_force_overrides(make_model, make_edit, bits, assert_bits) -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    edit = commit(model, make_edit(model))
    state = bits(other)
    with pytest.raises(BaseMismatch, match=r"layers\.0.* load the model that the edit was made on"):
        edit.apply(other)
    assert_bits(other, state)
    edit.apply(other, force=True)
    assert_bits(other, expected(other, state, [edit]))
    with pytest.raises(FasteditError, match="applied to 2 models"):
        edit.revert()
    edit.revert(other)
    assert_bits(other, state)
    edit.revert()


def test_same_matrices_in_another_model_are_refused(make_model, make_edit) -> None:
    model, other = make_model("llama"), make_model("llama")
    edit = commit(model, make_edit(model))
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(BaseMismatch, match="others are not"):
        edit.apply(other)
    assert edit.base_fingerprint == fingerprint(make_model("llama"))


def test_other_precision_and_other_shape_are_explained(make_model, make_edit) -> None:
    model = make_model("llama", torch.bfloat16)
    edit = commit(model, make_edit(model))
    with pytest.raises(
        BaseMismatch, match="float32 here and was bfloat16: load the model with dtype=bfloat16"
    ):
        edit.apply(make_model("llama"))
    with pytest.raises(BaseMismatch, match="which this GPT2LMHeadModel does not have"):
        edit.apply(make_model("gpt2"))
    with pytest.raises(BaseMismatch, match=r"shape \(16, 40\), the model's weight is \(16, 24\)"):
        edit.apply(_narrow(model))


def _narrow(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for block in other.model.layers:
        block.mlp.down_proj = nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)
    return other


def test_position_among_other_edits_is_checked(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("llama")
    first, second = (commit(model, make_edit(model, seed=seed)) for seed in range(2))
    after = bits(model)
    other = make_model("llama")
    with pytest.raises(BaseMismatch, match=f"no edits, and were {first.id}: put the same edits on it first"):
        second.apply(other)
    first.apply(other)
    with pytest.raises(FasteditError, match="on this model already"):
        first.apply(other)
    second.apply(other)
    assert_bits(other, after)
    stack_of(other).clear()
    first.apply(other)
    third = commit(other, make_edit(other, seed=5))
    with pytest.raises(
        BaseMismatch, match=f"the edits on it are {first.id}, {third.id}, and were {first.id}"
    ):
        second.apply(other)


def test_edit_applies_where_its_predecessor_came_with_the_files(
    make_model, make_edit, assert_bits, bits
) -> None:
    model = make_model("llama")
    commit(model, make_edit(model, seed=0))
    middle = copy.deepcopy(model)
    second = commit(model, make_edit(model, seed=1))
    assert len(stack_of(middle)) == 0
    second.apply(middle)
    assert_bits(middle, bits(model))


def test_not_finite_is_refused_and_leaves_the_bits(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("llama", torch.float16)
    kept = commit(model, make_edit(model, seed=9))
    state = bits(model)
    edit = make_edit(model, (0, 1))
    edit.factors["model.layers.1.mlp.down_proj.weight"].left[2, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite"):
        commit(model, edit)
    assert_bits(model, state)
    edit = make_edit(model, (0, 1), seed=2)
    edit.factors["model.layers.1.mlp.down_proj.weight"].left[2] = 3e6
    with pytest.raises(NumericalError, match=r"layers\.1.*not finite in float16"):
        commit(model, edit)
    assert_bits(model, state)
    assert stack_of(model).edits == (kept,)
    kept.revert()
    assert_bits(model, bits(make_model("llama", torch.float16)))


def test_unusable_weights_are_explained(make_model, make_edit) -> None:
    model = make_model("llama")
    edit = make_edit(model, (0,))
    model.model.layers[0].mlp.down_proj.to("meta")
    with pytest.raises(UnsupportedModel, match="has no data here"):
        stack_of(model).push(edit)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(16, 40).to(torch.int8), False)
    with pytest.raises(UnsupportedModel, match=r"got torch\.int8: load the model without quantisation"):
        stack_of(model).push(edit)


def test_removing_what_is_not_there(make_model, make_edit) -> None:
    model = make_model("llama")
    edit = commit(model, make_edit(model))
    with pytest.raises(FasteditError, match="is not on this model; on it: none"):
        stack_of(make_model("llama")).remove(edit)
    stack = stack_of(model)
    with pytest.raises(ValueError, match="k must be 0 to 1, got 2"):
        stack.remove_last(2)
    stack.remove_last(0)
    assert edit in stack
    stack.remove_last()
    with pytest.raises(FasteditError, match="applied to no model"):
        edit.revert()


# ------------------------------------------------------------------ transactions


class _Boom(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _Boom])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_failure_inside_a_transaction_restores_the_bits(
    error, dtype, make_model, make_edit, bits, assert_bits
) -> None:
    model = make_model("gpt2", dtype)
    commit(model, make_edit(model, seed=4))
    before = bits(model)
    names = make_edit(model).weight_names
    with pytest.raises(error):
        with Transaction(model, names):
            with torch.no_grad():
                for name in names:
                    model.get_parameter(name).mul_(3)
            raise error
    assert_bits(model, before)
    stack_of(model).check()


def test_commit_depends_on_the_factors_only(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("gpt2")
    before = bits(model)
    edit = make_edit(model)
    with Transaction(model, edit.weight_names) as transaction:
        with torch.no_grad():
            model.get_parameter(edit.weight_names[0]).zero_()
        transaction.commit(edit)
        with pytest.raises(FasteditError, match="has ended"):
            transaction.commit(edit)
    assert_bits(model, expected(model, before, [edit]))


def test_commit_of_other_weights_is_refused(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("gpt2")
    before = bits(model)
    with pytest.raises(ValueError, match=r"the edit changes \['transformer\.h\.1"):
        with Transaction(model, ["transformer.h.0.mlp.c_proj.weight"]) as transaction:
            transaction.commit(make_edit(model, (0, 1)))
    assert_bits(model, before)


def test_failure_while_applying_restores_the_bits(
    make_model, make_edit, bits, assert_bits, monkeypatch
) -> None:
    from fastedit.artefacts import stack

    model = make_model("llama", torch.bfloat16)
    for seed in range(2):
        commit(model, make_edit(model, seed=seed))
    before = bits(model)
    write, calls = stack.write, []

    def failing(parameter, values):
        calls.append(parameter)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        write(parameter, values)

    for attempt in (lambda: stack_of(model).push(make_edit(model, seed=7)), stack_of(model).clear):
        calls.clear()
        monkeypatch.setattr(stack, "write", failing)
        with pytest.raises(torch.OutOfMemoryError):
            attempt()
        monkeypatch.setattr(stack, "write", write)
        assert_bits(model, before)
        assert len(stack_of(model)) == 2
    commit(model, make_edit(model, seed=8))
    stack_of(model).clear()
    assert_bits(model, bits(make_model("llama", torch.bfloat16)))


def test_ctrl_c_while_applying_waits_until_weights_are_whole(
    make_model, make_edit, bits, assert_bits, monkeypatch
) -> None:
    from fastedit.artefacts import stack

    model = make_model("llama")
    before = bits(model)
    write = stack.write

    def interrupted(parameter, values):
        signal.raise_signal(signal.SIGINT)
        write(parameter, values)

    monkeypatch.setattr(stack, "write", interrupted)
    edit = make_edit(model)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            stack_of(model).push(edit)
    finally:
        signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(stack, "write", write)
    assert stack_of(model).edits == (edit,)
    assert_bits(model, expected(model, before, [edit]))
    edit.revert()
    assert_bits(model, before)


# ------------------------------------------------------------------ the stack itself


def test_stack_is_one_per_model_and_dies_with_it(make_model, make_edit) -> None:
    model = make_model("llama")
    stack = stack_of(model)
    assert stack_of(model) is stack
    assert stack_of(nn.DataParallel(model)) is stack
    commit(model, make_edit(model))
    assert stack_of(model.to("cpu")) is stack
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
    with pytest.raises(FasteditError, match="does not exist any more"):
        _ = stack.model


def test_stack_options(make_model, make_edit, bits, assert_bits) -> None:
    model = make_model("llama")
    before = bits(model)
    stack = stack_of(model, originals_on="model")
    edit = commit(model, make_edit(model))
    assert stack.memory_bytes == 2 * 16 * 40 * 4 + edit.size_bytes
    edit.revert()
    assert_bits(model, before)
    with pytest.raises(ValueError, match="must be 'cpu' or 'model'"):
        stack_of(model, originals_on="disk")


def test_digests_are_of_the_bits(make_model, make_edit, bits) -> None:
    model = make_model("gpt2", torch.bfloat16)
    states = [bits(model)]
    edits = []
    for seed in range(2):
        edits.append(commit(model, make_edit(model, seed=seed)))
        states.append(bits(model))
    for name in edits[0].weight_names:
        base, first, second = (weight_digest(state[name]) for state in states)
        assert edits[0].before_digests[name] == edits[0].base_digests[name] == base
        assert edits[0].after_digests[name] == first
        record = edits[1].matrices[name]
        assert (record.base_digest, record.before_digest, record.after_digest) == (base, first, second)
        assert record.beneath == (edits[0].id,)
        assert (record.transposed, record.dtype, record.shape) == (True, "bfloat16", (16, 40))
        assert torch.equal(edits[1].originals()[name], states[1][name])


def test_bits_that_cannot_be_computed_again_are_reported(make_model, make_edit, monkeypatch, caplog) -> None:
    from fastedit.artefacts import render

    model = make_model("llama")
    edits = [commit(model, make_edit(model, seed=seed)) for seed in range(2)]
    real = render.low_rank_update_
    monkeypatch.setattr(render, "low_rank_update_", lambda w, a, b, **k: real(w, a * 1.0001, b, **k))
    with caplog.at_level(logging.WARNING):
        edits[1].revert()
    assert "gave other bits than the first time" in caplog.text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_stack_looks_through_adapters(make_model, make_edit, bits, assert_bits) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    before = bits(model)
    edit = commit(model, make_edit(model))
    edited = bits(model)
    edit.revert()
    config = peft.LoraConfig(target_modules=["down_proj"], r=2)
    wrapped = peft.get_peft_model(model, config)
    stack_of(wrapped).push(edit, force=True)
    weight = wrapped.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    assert torch.equal(weight, edited["model.layers.0.mlp.down_proj.weight"])
    edit.revert(wrapped)
    assert torch.equal(weight, before["model.layers.0.mlp.down_proj.weight"])


def test_an_empty_edit_is_refused() -> None:
    with pytest.raises(ValueError, match="must change at least one weight"):
        Edit(method="x", facts=[], factors={})
    with pytest.raises(ValueError, match="like its factors"):
        change = LowRank(torch.zeros(4, 1), torch.zeros(5, 1))
        Edit(method="x", facts=[], factors={"a": change}, dense={"a": torch.zeros(5, 4)})


def test_stack_type_is_public(make_model) -> None:
    assert isinstance(stack_of(make_model("llama")), EditStack)
