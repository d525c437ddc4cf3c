"""Whatever is pushed and removed, a model equals its originals with the remaining edits applied in order."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastedit import Fact
from fastedit.artefacts import Edit, LowRank, Transaction, stack_of
from fastedit.ops import low_rank_update_

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Conv1D(nn.Module):
    """A layer that stores its weight (d_in, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))


class _Config:
    model_type = "toy"


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = _Config()
        self.a = nn.Linear(6, 5, bias=False)
        self.b = Conv1D(7, 4)
        self.c = nn.Linear(3, 3, bias=False)
        self.d = nn.Linear(3, 3, bias=False)
        self.d.weight = self.c.weight
        self.to(dtype)


SHAPES = {"a.weight": (5, 6), "b.weight": (4, 7), "c.weight": (3, 3)}

push = st.tuples(
    st.just("push"), st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.integers(0, 4), st.booleans()
)
remove = st.tuples(st.just("remove"), st.integers(0, 30))
last = st.tuples(st.just("last"), st.integers(0, 3))
other = st.sampled_from([("clear",), ("fail",), ("again",)])


def make(names: set[str], rank: int, dense: bool, seed: int) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    factors, deltas = {}, {}
    for name in sorted(names):
        d_out, d_in = SHAPES[name]
        left = torch.randn(d_out, rank, generator=generator)
        factors[name] = LowRank(left, torch.randn(d_in, rank, generator=generator))
        if dense:
            deltas[name] = torch.randn(d_out, d_in, generator=generator) * (left.sum() > 0)
    facts = [Fact("{} is", "it", str(seed))]
    return Edit(method="toy", facts=facts, factors=factors, dense=deltas, seed=seed)


def from_scratch(original: torch.Tensor, name: str, edits: list[Edit], masters: bool) -> torch.Tensor:
    work = original.float() if masters else original.clone()
    for edit in edits:
        if name in edit.factors:
            factors = edit.factors[name]
            low_rank_update_(work, factors.left, factors.right, transposed=name == "b.weight")
        if name in edit.dense:
            work += edit.dense[name].T if name == "b.weight" else edit.dense[name]
    return work.to(original.dtype)


@SETTINGS
@given(
    actions=st.lists(st.one_of(push, push, remove, last, other), max_size=14),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    masters=st.booleans(),
)
def test_any_sequence_of_pushes_and_removals(actions, dtype, masters) -> None:
    model = Toy(dtype)
    originals = {name: model.get_parameter(name).detach().clone() for name in SHAPES}
    stack = stack_of(model, masters=masters)
    remaining: list[Edit] = []
    gone: list[Edit] = []
    for seed, action in enumerate(actions):
        if action[0] == "push":
            edit = make(action[1], action[2], action[3], seed)
            with Transaction(model, edit.weight_names) as transaction:
                remaining.append(transaction.commit(edit))
        elif action[0] == "remove" and remaining:
            edit = remaining.pop(action[1] % len(remaining))
            edit.revert()
            gone.append(edit)
        elif action[0] == "last":
            k = min(action[1], len(remaining))
            stack.remove_last(k)
            gone += remaining[len(remaining) - k :]
            remaining = remaining[: len(remaining) - k]
        elif action[0] == "clear":
            stack.clear()
            gone, remaining = gone + remaining, []
        elif action[0] == "again" and gone:
            edit = gone.pop()
            edit.apply(model, force=True)
            remaining.append(edit)
        elif action[0] == "fail":
            try:
                with Transaction(model, SHAPES):
                    model.a.weight.data.fill_(7)
                    raise OSError
            except OSError:
                pass
        for name, original in originals.items():
            half = masters and dtype in (torch.bfloat16, torch.float16)
            expected = from_scratch(original, name, remaining, half)
            assert torch.equal(model.get_parameter(name), expected), (name, action)
        assert [edit.id for edit in stack.edits] == [edit.id for edit in remaining]
    stack.check()
    stack.clear()
    for name, original in originals.items():
        assert torch.equal(model.get_parameter(name), original)
    assert stack.memory_bytes == 0
