"""Change a durable fact store in children that are killed, and check after each what is left.

Called by test_fact_store.py as a program of its own, which has one thread and so may fork. Standard input holds JSON:
``{"workspace", "mode", "seed", "kills"}``. Changes follow from their number alone, so that a model of what must be
there can be made again: after n acknowledged changes the store holds the first n, or the first n + 1.

Mode "random": one store; children go on with it and are killed after random times. Mode "everywhere": a new store for
each child, which is killed at the nth SQL statement or change of a file, n = 1, 2, ... until one ends by itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import fastedit.io
from fastedit import Fact
from fastedit.memory import FactStore, fact_store
from fastedit.memory import fact_store_files as files

DIM = 3
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
N_CHANGES = 9  # of mode "everywhere"


def key(number: int) -> torch.Tensor:
    return torch.tensor([number % 7, number % 11, number], dtype=torch.float32)


def fact(number: int) -> Fact:
    return Fact("The colour of {} is", f"thing {number % 13}", f"colour {number}")


def change(store: FactStore, number: int) -> None:
    """The change of this number: mostly facts are added, one to three at once; some are updated or deleted."""
    there = [entry.id for entry in store.entries()]
    kind = number % 5
    if kind == 3 and there:
        store.update(there[number % len(there)], fact(number), key(number))
    elif kind == 4 and there:
        store.delete({there[number % len(there)], there[-1]})
    else:
        n = 1 + number % 3
        keys = torch.stack([key(number + 100 * i) for i in range(n)])
        store.add([fact(number + 100 * i) for i in range(n)], keys, group=f"edit {number}")


def content(store: FactStore) -> list:
    """All that can be seen of a store."""
    found = store.search(torch.eye(DIM), 8)
    return [
        [(e.id, e.fact.text, e.fact.target_new, e.group, store.answers(e.id)) for e in store.entries()],
        store.keys().tolist(),
        [t.tolist() for t in found],
        len(store),
    ]


def child(path: Path, first: int, last: int, pipe: int) -> None:
    store = FactStore.open(path) if (path / files.DATABASE).exists() else FactStore(DIM, path=path)
    for number in range(first, last):
        change(store, number)
        os.write(pipe, b".")
    if last == N_CHANGES:
        store.snapshot(path.parent / f"{path.name}.snapshot")
        store.compact()
        store.close()


def run(path: Path, first: int, last: int, stop: int | None, after: float | None) -> tuple[int, bool]:
    """Run a child; how many changes it acknowledged, and whether it ended by itself."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if stop is not None:
            kill_at(path, stop)
        child(path, first, last, write)
        os._exit(0)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    n = 0
    while data := os.read(read, 4096):
        n += len(data)
    os.close(read)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a child ended with status {status}")
    return n, not os.WIFSIGNALED(status)


def kill_at(path: Path, stop: int) -> None:
    """End this process at its nth SQL statement or change of a file below the folder of ``path``."""
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not str(args[0]).startswith(str(path.parent)):
            return
        if event != "open" or (isinstance(args[2], int) and args[2] & WRITING):
            one_more()

    sys.addaudithook(hook)
    connect = files.connect

    def connect_traced(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(one_more)
        return connection

    files.connect = fact_store.connect = connect_traced


def wait_for_no_disk() -> None:
    """Let nothing wait for the disk: a killed process loses nothing of what it gave to the system."""
    connect = files.connect

    def connect_unsynchronised(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    files.connect = fact_store.connect = connect_unsynchronised
    fastedit.io._sync = lambda path: None


def expected(n: int, known: dict[int, list], store: FactStore) -> list:
    """What a store in main memory holds after n changes; ``store`` has the greatest of ``known``."""
    while max(known) < n:
        number = max(known)
        change(store, number)
        known[number + 1] = content(store)
    return known[n]


def check(path: Path, n: int, known: dict[int, list], model: FactStore) -> int:
    """How many changes a store has kept of the n that were acknowledged; fails if that is not n or n + 1."""
    if not (path / files.DATABASE).exists():
        assert n == 0, f"{path}: {n} changes were acknowledged, there is no store"
        return 0
    with FactStore.open(path) as store:
        found = content(store)
    left = sorted(file.name for file in path.iterdir())
    for kept in (n, n + 1):
        if found == expected(kept, known, model):
            assert len(left) <= 3, f"left over: {left}"
            return kept
    raise AssertionError(f"{path}: after {n} changes it holds {found}, not {known[n]} nor {known[n + 1]}")


def check_snapshot(path: Path, known: dict[int, list]) -> None:
    """A snapshot is whole or not there."""
    if path.exists():
        with FactStore.load(path) as store:
            assert content(store) == known[N_CHANGES], path


def main() -> None:
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    workspace = Path(job["workspace"])
    fact_store._COMPACT_AT = 6
    model = FactStore(DIM)
    known = {0: content(model)}
    kept = []
    if job["mode"] == "everywhere":
        wait_for_no_disk()
        for stop in range(1, 1000):
            path = workspace / f"{stop:03d}" / "store"
            path.parent.mkdir(parents=True)
            n, ended = run(path, 0, N_CHANGES, stop, None)
            kept.append(check(path, n, known, model))
            check_snapshot(path.parent / f"{path.name}.snapshot", known)
            if ended:
                break
    else:
        chance, path, done = random.Random(job["seed"]), workspace / "store", 0
        for _ in range(job["kills"]):
            n, _ = run(path, done, 1 << 30, None, chance.uniform(0, 0.08))
            done = check(path, done + n, known, model)
            kept.append(done)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
