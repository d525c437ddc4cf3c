"""A store of facts: what it answers, what survives a kill, what it refuses."""

from __future__ import annotations

import torch

from fastedit import Fact
from fastedit.memory import FactStore


def fact(i, target="x"):
    return Fact("The colour of {} is", f"thing {i}", target)


def test_add_search_reopen_snapshot(tmp_path):
    keys = torch.randn(30, 5)
    with FactStore(5, path=tmp_path / "s", stamp="a") as store:
        assert store.add([fact(i) for i in range(30)], keys, group="e") == list(range(1, 31))
        store.delete([3, 30])
        before = store.search(keys, 4)
        store.snapshot(tmp_path / "t")
    for name in ("s", "t"):
        with FactStore.open(tmp_path / name, stamp="a") as store:
            after = store.search(keys, 4)
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[1], after[1])
            assert store.add([fact(3)], keys[:1]) == [31]
