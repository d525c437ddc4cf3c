"""Parts of a decoder run directly give what the whole model gives, on every family."""

from __future__ import annotations

import pytest
import torch
from model_configs import FAMILIES, skip_old_layout, tiny_model

from fastedit.errors import UnsupportedModel
from fastedit.models.runner import BlockRunner, Prefix, frozen
from fastedit.models.tokens import pad_batch

ROWS = [[5, 9, 17, 3, 44, 8], [7, 2, 91, 6], [12, 30, 31, 32, 33]]


@pytest.fixture(params=sorted(FAMILIES))
def runner(request: pytest.FixtureRequest) -> BlockRunner:
    return BlockRunner(tiny_model(request.param))


@torch.no_grad()
def whole(runner: BlockRunner, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    return runner.model(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def test_blocks_run_one_by_one_equal_the_model(runner: BlockRunner) -> None:
    ids, mask, positions = pad_batch(ROWS, 0)
    calls = runner.capture(ids, mask, positions)
    n = runner.description.n_layers
    middle = runner.run(calls, calls.embedded, 0, 1)
    hidden = runner.run(calls, middle, 1, n)
    for index, row in enumerate(ROWS):
        logits = runner.logits(hidden[index, : len(row)])
        torch.testing.assert_close(logits, whole(runner, row), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_upper_blocks_after_a_frozen_prefix_equal_the_model(runner: BlockRunner) -> None:
    """The suffix from each row's own start, over prefix keys and values of upper blocks only."""
    layer, starts = 0, torch.tensor([3, 1, 4])
    ids, mask, positions = pad_batch(ROWS, 0)
    seen: list[torch.Tensor] = []

    def keep(_module: object, _args: object, out: object) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    try:
        _, pairs = runner.record(ids, mask, positions, [(runner.description.blocks[layer], keep)])
    except UnsupportedModel as error:
        skip_old_layout(error)
    prefix = Prefix.before(starts, pairs, layer + 1)
    lengths = torch.tensor([len(row) for row in ROWS])
    width = int((lengths - starts).max())
    offsets = torch.arange(width)
    columns = (starts[:, None] + offsets).clamp(max=ids.shape[1] - 1)
    real = offsets < (lengths - starts)[:, None]
    calls = runner.capture(
        torch.gather(ids, 1, columns),
        torch.cat((prefix.mask, real.long()), 1),
        starts[:, None] + offsets * real,
        prefix,
    )
    states = seen[0][torch.arange(len(ROWS))[:, None], columns]
    hidden = runner.run(calls, states, layer + 1, runner.description.n_layers)
    for index, row in enumerate(ROWS):
        logits = runner.logits(hidden[index, : len(row) - int(starts[index])])
        expected = whole(runner, row)[int(starts[index]) :]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    again = runner.run(calls, states, layer + 1, runner.description.n_layers)
    assert torch.equal(again, hidden), "the prefix must not grow from one run to the next"


@pytest.mark.parametrize("padding", [True, False], ids=["everywhere", "at real tokens"])
def test_states_at_some_positions_are_those_of_the_whole_run(runner: BlockRunner, padding: bool) -> None:
    """In values and gradients, though the last MLP sees these positions only and the others need not see padding."""
    runner.model.double()  # gradients through norms amplify rounding
    ids, mask, positions = pad_batch(ROWS, 0)
    calls = runner.capture(ids, mask, positions)
    real = mask.flatten().nonzero()[:, 0]
    n, wanted = runner.description.n_layers, real[torch.tensor([5, 2, -1])]
    for start in (0, n - 1, n):
        entry = calls.embedded.detach().clone().requires_grad_()
        with frozen(runner.model):
            found = runner.states_at(calls, entry, start, wanted, None if padding else real)
            (gradient,) = torch.autograd.grad(found.square().sum(), entry)
            whole_run = runner.run(calls, entry, start, n).reshape(-1, entry.shape[-1])[wanted]
            (expected,) = torch.autograd.grad(whole_run.square().sum(), entry)
        torch.testing.assert_close(found, whole_run, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_projection_input_is_what_the_projection_sees(runner: BlockRunner) -> None:
    ids, mask, positions = pad_batch(ROWS[:1], 0)
    seen: list[torch.Tensor] = []
    module = runner.description.projection(1).module
    handle = module.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    runner.model(input_ids=ids, use_cache=False)
    handle.remove()
    calls = runner.capture(ids, mask, positions)
    hidden = runner.run(calls, calls.embedded, 0, 1)
    keys = runner.projection_input(calls, hidden, 1)
    torch.testing.assert_close(keys, seen[0].reshape(keys.shape), rtol=1e-4, atol=1e-5)


def test_blocks_are_as_before_after_capture(runner: BlockRunner) -> None:
    before = [block.__dict__.get("forward") for block in runner.description.blocks]
    ids, mask, positions = pad_batch(ROWS, 0)
    runner.capture(ids, mask, positions)
    assert [block.__dict__.get("forward") for block in runner.description.blocks] == before


def test_frozen_puts_modes_and_gradients_back() -> None:
    model = tiny_model("gpt2")
    model.train()
    some = next(model.parameters())
    some.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_frozen_runs_a_gelu_as_one_operation_with_the_same_result() -> None:
    model = tiny_model("gpt2").double().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    with frozen(model):
        one = model(ids).logits
        operations = str(model.transformer.h[0].mlp.act.forward)
    assert "gelu" in operations
    torch.testing.assert_close(one, before, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(ids).logits, before)


def test_prefix_select_keeps_rows() -> None:
    prefix = Prefix([None, (torch.arange(6.0).view(3, 1, 2, 1), torch.zeros(3, 1, 2, 1))], torch.ones(3, 2))
    chosen = prefix.select(torch.tensor([2, 0]))
    assert chosen.states[0] is None
    assert chosen.states[1] is not None
    assert chosen.states[1][0].flatten().tolist() == [4.0, 5.0, 0.0, 1.0]
