"""A store of facts: what it answers, what survives a kill, what it refuses."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit.io
from fastedit import Fact
from fastedit.errors import BaseMismatch, CorruptFile, FasteditError, InvalidFact
from fastedit.memory import Entry, FactStore, fact_store
from fastedit.memory import fact_store_files as files

DIM = 3


def fact(i, target="x"):
    return Fact("The colour of {} is", f"thing {i}", target)


def facts(n, target="x"):
    return [fact(i, target) for i in range(n)]


def ids_of(found):
    return [[i for i in row if i >= 0] for row in found[0].tolist()]


@pytest.fixture
def store(tmp_path):
    with FactStore(DIM, path=tmp_path / "store", stamp="encoder 1") as made:
        yield made


# ---- against a model ----


class Model:
    """A dict and a matrix: the same by brute force."""

    def __init__(self, policy):
        self.policy = policy
        self.rows = {}  # id -> (fact, key, group)
        self.next = 1

    def add(self, facts, keys, group):
        ids = list(range(self.next, self.next + len(facts)))
        self.next += len(facts)
        self.rows.update({i: (f, k, group) for i, f, k in zip(ids, facts, keys, strict=True)})
        return ids

    def answering(self):
        chosen = {}
        for i, (f, _, _) in self.rows.items():  # ids rise
            if self.policy == "first":
                chosen.setdefault(f.text, i)
            else:
                chosen[f.text] = i
        return sorted(chosen.values())

    def search(self, queries, k, threshold):
        found = []
        for query, bound in zip(queries.double(), threshold.tolist(), strict=True):
            scores = [(float(query @ self.rows[i][1].double()), i) for i in self.answering()]
            found.append(sorted((pair for pair in scores if pair[0] > bound), reverse=True)[:k])
        return [[i for _, i in row] for row in found], [[s for s, _ in row] for row in found]


def agree(store, model, queries):
    assert len(store) == len(model.rows)
    assert list(store.entries()) == [Entry(i, f, g) for i, (f, _, g) in model.rows.items()]
    assert [i for i in model.rows if store.answers(i)] == model.answering()
    keys = [row[1] for row in model.rows.values()]
    assert torch.equal(store.keys(), torch.stack(keys) if keys else torch.empty(0, DIM))
    threshold = torch.tensor([-math.inf, 0.0, 2.5])
    ids, scores = store.search(queries, 4, threshold)
    expected = model.search(queries, 4, threshold)
    assert ids_of((ids,)) == expected[0]
    assert [[s for s in row if s > -math.inf] for row in scores.tolist()] == expected[1]


numbers = st.integers(-3, 3)  # their products are exact, and often equal
keys_of = st.lists(numbers, min_size=DIM, max_size=DIM).map(lambda row: torch.tensor(row).float())
facts_of = st.builds(fact, st.integers(0, 4), st.sampled_from(["red", "blue"]))
changes = st.one_of(
    st.tuples(
        st.just("add"), st.lists(st.tuples(facts_of, keys_of), min_size=1, max_size=4), st.sampled_from("ab")
    ),
    st.tuples(st.just("update"), st.integers(0, 99), facts_of, keys_of),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 99), max_size=3)),
    st.tuples(st.just("delete_group"), st.sampled_from("ab")),
    st.tuples(st.sampled_from(["reopen", "snapshot", "load", "compact", "cut off"])),
)


@pytest.fixture(scope="module")
def small_and_quick():
    """Compact often; wait for no disk."""
    connect = files.connect

    def unsynchronised(path):
        connection = connect(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fact_store, "_COMPACT_AT", 5)
        patch.setattr(fastedit.io, "_sync", lambda path: None)
        patch.setattr(fact_store, "connect", unsynchronised)
        yield


@pytest.mark.parametrize(("index", "policy"), [("flat", "latest"), ("flat", "first"), ("faiss", "latest")])
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "in memory"])
def test_any_sequence_of_changes_agrees_with_a_dict(
    small_and_quick, tmp_path_factory, index, policy, durable
):
    if index == "faiss":
        pytest.importorskip("faiss", reason='faiss is not installed (pip install "fastedit-llm[faiss]")')
    queries = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 3.0]])

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(changes, max_size=12))
    def run(sequence):
        folder = tmp_path_factory.mktemp("stores")
        store = FactStore(DIM, path=folder / "0" if durable else None, index=index, on_duplicate=policy)
        model = Model(policy)
        for number, (kind, *rest) in enumerate(sequence, 1):
            there = list(model.rows)
            if kind == "add":
                new, keys = [f for f, _ in rest[0]], [k for _, k in rest[0]]
                ids = store.add(new, torch.stack(keys), group=rest[1])
                assert ids == model.add(new, keys, rest[1])
            elif kind == "update" and there:
                i = there[rest[0] % len(there)]
                store.update(i, *rest[1:])
                model.rows[i] = (rest[1], rest[2], model.rows[i][2])
            elif kind == "delete" and there:
                gone = {there[i % len(there)] for i in rest[0]}
                store.delete(gone)
                model.rows = {i: row for i, row in model.rows.items() if i not in gone}
            elif kind == "delete_group":
                gone = [i for i, row in model.rows.items() if row[2] == rest[0]]
                assert store.delete_group(rest[0]) == gone
                model.rows = {i: row for i, row in model.rows.items() if i not in gone}
            elif kind == "compact":
                store.compact()
            elif kind == "cut off":
                cut_off(store)
            elif kind == "reopen" and store.path is not None:
                store.close()
                store = FactStore.open(store.path, index=index)
            elif kind in ("snapshot", "load"):
                store.snapshot(folder / str(number))
                store.close()
                again = FactStore.open if kind == "snapshot" and durable else FactStore.load
                store = again(folder / str(number), index=index)
            agree(store, model, queries)
        store.close()
        shutil.rmtree(folder)

    run()


def cut_off(store):
    """An addition that is interrupted at its end, when everything but the commit has been done."""
    settle, store._settle = store._settle, lambda texts: (settle(texts), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.add(facts(2, "never"), torch.full((2, DIM), 9.0))
    del store._settle
    store._next -= 2  # the model's numbers go on without a gap


# ---- kills ----


def killed(tmp_path, **job):
    program = Path(__file__).with_name("fact_store_kills.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps({"workspace": str(tmp_path), **job}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(tmp_path):
    kept = killed(tmp_path, mode="random", seed=0, kills=30)
    assert kept == sorted(kept)
    assert kept[-1] > 10


@pytest.mark.slow
def test_a_kill_at_any_statement_or_file_leaves_a_whole_store(tmp_path):
    kept = killed(tmp_path, mode="everywhere")
    assert len(kept) > 100
    assert kept == sorted(kept)
    assert len(set(kept)) > 8


# ---- duplicates ----


def test_the_latest_of_duplicates_answers_and_the_older_returns_when_it_is_deleted(store):
    (first,) = store.add([fact(1, "red")], torch.tensor([[1.0, 0, 0]]), group="a")
    second, third = store.add([fact(1, "blue"), fact(2)], torch.tensor([[0, 1.0, 0], [0, 0, 1]]), group="b")
    assert not store.answers(first)
    query = torch.tensor([[2.0, 1, 0]])
    assert ids_of(store.search(query, 3, 0.0)) == [[second]]
    assert store.delete_group("b") == [second, third]
    assert ids_of(store.search(query, 3, 0.0)) == [[first]]
    assert store.delete_group("b") == []


def test_spaces_do_not_make_another_prompt(store):
    store.add([Fact("The  colour of {} is", "it", "red")], torch.ones(1, DIM))
    (second,) = store.add([Fact("The colour of {} is ", "it", "blue")], torch.ones(1, DIM))
    assert ids_of(store.search(torch.ones(1, DIM), 3)) == [[second]]


def test_an_update_may_change_the_prompt(store):
    first, second = store.add([fact(1), fact(1)], torch.eye(DIM)[:2])
    store.update(second, fact(2), torch.eye(DIM)[2])
    assert ids_of(store.search(torch.ones(1, DIM), 3)) == [[second, first]]
    store.update(first, fact(2, "old"), torch.eye(DIM)[1])
    assert ids_of(store.search(torch.ones(1, DIM), 3)) == [[second]]
    assert store.keys([first]).tolist() == [[0, 1, 0]]


def test_duplicates_are_refused_if_so_asked(tmp_path):
    store = FactStore(DIM, path=tmp_path, on_duplicate="error")
    store.add([fact(1, "red"), fact(2)], torch.eye(DIM)[:2])
    for new in ([fact(3), fact(1, "blue")], [fact(4), fact(4)]):
        with pytest.raises(InvalidFact, match="on_duplicate is 'error'"):
            store.add(new, torch.eye(DIM)[:2])
    with pytest.raises(InvalidFact, match="'red' is in the store as fact 1"):
        store.update(2, fact(1, "blue"), torch.eye(DIM)[0])
    store.update(1, fact(1, "blue"), torch.eye(DIM)[0])
    assert [entry.fact.target_new for entry in store.entries()] == ["blue", "x"]
    store.close()
    with FactStore.open(tmp_path) as store:
        assert store.on_duplicate == "error"
    with FactStore.open(tmp_path, on_duplicate="first") as store:
        store.add([fact(1, "green")], torch.eye(DIM)[:1])
        assert store.answers(1)
    assert FactStore.load(tmp_path).on_duplicate == "first"


# ---- searching ----


def test_search_takes_thresholds_and_dtypes_and_an_empty_store(store):
    ids, scores = store.search(torch.ones(2, DIM), 2)
    assert (ids.dtype, ids.tolist()) == (torch.int64, [[-1, -1]] * 2)
    assert scores.tolist() == [[-math.inf] * 2] * 2
    store.add(facts(2), torch.tensor([[1.0, 0, 0], [2, 0, 0]], dtype=torch.bfloat16))
    query = torch.tensor([[1.0, 0, 0], [1, 0, 0]], dtype=torch.float16)
    assert ids_of(store.search(query, 2, 1.0)) == [[2], [2]]
    assert ids_of(store.search(query, 2, torch.tensor([0.5, 2.0]))) == [[2, 1], []]
    assert store.search(query[:0])[0].shape == (0, 1)


def test_absent_faiss_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "fastedit-llm\[faiss\]"'):
        FactStore(DIM, path=tmp_path / "s", index="faiss")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_million_keys_with_faiss(tmp_path):
    pytest.importorskip("faiss", reason='faiss is not installed (pip install "fastedit-llm[faiss]")')
    n, d = 1_000_000, 64
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(n, d, generator=generator)
    queries = torch.randn(16, d, generator=generator)
    with FactStore(d, index="faiss") as store:
        for start in range(0, n, 100_000):
            store.add([fact(i) for i in range(start, start + 100_000)], keys[start : start + 100_000])
        store.delete(best := (queries[:4] @ keys.T).argmax(1).unique() + 1)
        scores = queries.double() @ keys.double().T
        scores[:, best - 1] = -math.inf
        expected = scores.topk(5)
        ids, found = store.search(queries, 5, expected.values[:, 4].float() - 1e-3)
        assert torch.equal(ids, expected.indices + 1)
        torch.testing.assert_close(found, expected.values.float(), rtol=2e-7, atol=0)
        assert ids_of(store.search(queries, 5, math.inf)) == [[]] * len(queries)


def test_other_indices_of_faiss_give_exact_scores(store):
    pytest.importorskip("faiss", reason='faiss is not installed (pip install "fastedit-llm[faiss]")')
    keys = torch.randn(300, DIM)
    store.add(facts(300), keys)
    path = store.path
    store.close()
    with FactStore.open(path, index="faiss:HNSW32") as store:
        ids, scores = store.search(keys[:20], 3)
        exact = (keys[:20].double()[:, None] * store.keys(ids.reshape(-1)).double().reshape(20, 3, DIM)).sum(
            -1
        )
        torch.testing.assert_close(scores, exact.float(), rtol=2e-7, atol=0)


# ---- growth ----


def test_keys_are_written_again_only_when_their_number_has_doubled(monkeypatch, store):
    monkeypatch.setattr(fact_store, "_COMPACT_AT", 8)
    written = []
    write = fact_store.write_tensors
    monkeypatch.setattr(
        fact_store,
        "write_tensors",
        lambda path, tensors: (written.append(len(tensors["ids"])), write(path, tensors)),
    )
    for i in range(150):
        store.add([fact(i)], torch.randn(1, DIM))
    assert written == [8, 16, 32, 64, 128]
    store.delete(range(1, 140))
    store.delete([140])
    assert written[5:] == [11]
    assert store._rows.n == 11  # tombstones are gone
    assert len([file for file in store.path.iterdir() if file.suffix == ".safetensors"]) == 1


def test_room_of_deleted_facts_is_given_back_in_main_memory(monkeypatch):
    monkeypatch.setattr(fact_store, "_COMPACT_AT", 8)
    store = FactStore(DIM)
    for i in range(400):
        store.add([fact(i)], torch.randn(1, DIM))
        if i >= 20:
            store.delete([i - 19])
    assert store._rows.n < 50
    assert len(store) == 20
    assert store.n_bytes < 200_000


# ---- opening ----


def test_reopened_and_loaded_it_is_the_same_store(tmp_path):
    keys = torch.randn(30, DIM)
    with FactStore(DIM, path=tmp_path / "s", stamp="a") as store:
        assert store.add(facts(30), keys, group="e") == list(range(1, 31))
        store.delete(torch.tensor([3, 30]))
        before = store.search(keys, 4)
        store.snapshot(tmp_path / "t")
        with pytest.raises(FileExistsError):
            store.snapshot(tmp_path / "t")
    for name in ("s", "t"):
        contents = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        stores = [FactStore.load(tmp_path / name, stamp="a") for _ in range(2)]
        assert contents == {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        stores.append(FactStore.open(tmp_path / name, stamp="a"))
        for store in stores:
            after = store.search(keys, 4)
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[1], after[1])
            assert store.add([fact(3)], keys[:1]) == [31]  # ids are never used again
            assert (store.dim, store.stamp) == (DIM, "a")
            store.close()
        assert len(FactStore.load(tmp_path / name)) == 29


def test_a_folder_is_open_once(store):
    for again in (FactStore.open, FactStore.load):
        with pytest.raises(FasteditError, match="is open already"):
            again(store.path)
    with pytest.raises(FasteditError, match="is open already"):
        FactStore(DIM, path=store.path)
    code = f"from fastedit.memory import FactStore; FactStore.open({str(store.path)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "FasteditError: the fact store" in other.stderr
    path = store.path
    store.close()
    FactStore.open(path).close()


def test_a_store_that_is_forgotten_releases_its_folder(tmp_path):
    store = FactStore(DIM, path=tmp_path)
    store.add([fact(1)], torch.ones(1, DIM))
    del store
    gc.collect()
    assert len(FactStore.open(tmp_path)) == 1


def test_a_closed_store_says_so(store):
    store.close()
    store.close()
    for call in (len, lambda s: s.search(torch.ones(1, DIM)), lambda s: s.add([], torch.ones(0, DIM))):
        with pytest.raises(FasteditError, match="closed"):
            call(store)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "keys-of-mine.safetensors").write_text("mine")
    (tmp_path / "notes.tmp").write_text("mine")
    FactStore(DIM, path=tmp_path).close()
    FactStore.open(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["facts.sqlite", "keys-of-mine.safetensors", "lock", "notes.tmp"]


def test_threads_take_turns(store):
    def work(number):
        for i in range(20):
            (id,) = store.add([fact(100 * number + i)], torch.full((1, DIM), float(number)))
            assert store.search(torch.ones(1, DIM))[0].item() > 0
            assert store.entry(id).fact == fact(100 * number + i)

    errors = []
    threads = [
        threading.Thread(target=lambda n=n: (errors.append(n), work(n), errors.remove(n))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store) == 80


# ---- bad input ----


def test_bad_input_changes_nothing(store):
    store.add(facts(2), torch.eye(DIM)[:2])
    before = list(store.entries())
    for error, match, call in [
        (ValueError, "a key for each fact", lambda: store.add(facts(2), torch.ones(1, DIM))),
        (ValueError, "a key for each fact", lambda: store.add(facts(1), torch.ones(1, DIM + 1))),
        (ValueError, "finite", lambda: store.add(facts(1), torch.full((1, DIM), math.nan))),
        (ValueError, "finite", lambda: store.update(1, fact(9), torch.full((DIM,), math.inf))),
        (TypeError, "float32", lambda: store.add(facts(1), torch.ones(1, DIM).double())),
        (TypeError, "facts must be Fact, got dict", lambda: store.add([{}], torch.ones(1, DIM))),
        (ValueError, "no fact 7", lambda: store.delete([1, 7])),
        (ValueError, "no fact 7", lambda: store.update(7, fact(1), torch.ones(DIM))),
        (ValueError, "no fact 0", lambda: store.entry(0)),
        (ValueError, "no fact -1", lambda: store.keys([-1])),
        (ValueError, "name of a group", lambda: store.delete_group("")),
        (ValueError, "k must be from 1", lambda: store.search(torch.ones(1, DIM), 0)),
        (ValueError, "queries", lambda: store.search(torch.ones(1, DIM + 1))),
        (ValueError, "threshold", lambda: store.search(torch.ones(1, DIM), 1, torch.ones(2))),
        (ValueError, "on_duplicate", lambda: FactStore(DIM, on_duplicate="last")),
        (ValueError, "index", lambda: FactStore(DIM, index="tree")),
        (ValueError, "dim", lambda: FactStore(0)),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert list(store.entries()) == before
    assert store.add([], torch.empty(0, DIM)) == []
    store.delete([])


def test_text_of_any_kind_is_kept(store):
    strange = Fact("Say {} \x00 \ud800 é", "ü", "∅", case_id=7, locality="What?")
    (id,) = store.add([strange], torch.ones(1, DIM), group="é")
    path = store.path
    store.close()
    with FactStore.open(path) as store:
        assert store.entry(id) == Entry(id, strange, "é")


def test_a_full_disk_changes_nothing(store):
    store.add(facts(3), torch.eye(DIM))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FasteditError, match="full"):
        store.add([fact(i) for i in range(10, 2000)], torch.ones(1990, DIM))
    assert len(store) == 3
    assert ids_of(store.search(torch.ones(1, DIM), 9)) == [[3, 2, 1]]
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert store.add([fact(4)], torch.ones(1, DIM)) == [1994]


def test_no_or_another_store_is_refused(tmp_path, store):
    with pytest.raises(FileNotFoundError, match="no fact store"):
        FactStore.open(tmp_path)
    path = store.path
    store.close()
    with pytest.raises(FileExistsError, match=r"FactStore\.open"):
        FactStore(DIM, path=path)
    for again in (FactStore.open, FactStore.load):
        with pytest.raises(BaseMismatch, match="'encoder 1', not by 'encoder 2'"):
            again(path, stamp="encoder 2")
    with sqlite3.connect(path / files.DATABASE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CorruptFile, match="version 99"):
        FactStore.open(path)


def test_a_truncated_or_foreign_file_is_one_clear_error(tmp_path):
    whole = tmp_path / "whole"
    with FactStore(DIM, path=whole) as store:
        store.add(facts(200), torch.randn(200, DIM))
        store.compact()
        store.add(facts(100), torch.randn(100, DIM))
    (keys,) = whole.glob("keys-*")
    for name in (files.DATABASE, keys.name):
        size = (whole / name).stat().st_size
        for length in (0, 1, 50, 99, 100, 512, 4096, size // 2, size - 4096, size - 1):
            if not 0 <= length < size:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            os.truncate(copy / name, length)
            for again in (FactStore.open, FactStore.load):
                with pytest.raises(CorruptFile):
                    again(copy)
            shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        (copy / name).write_bytes(b"something else" * 1000)
        with pytest.raises(CorruptFile):
            FactStore.open(copy)
        shutil.rmtree(copy)
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    with pytest.raises(CorruptFile, match="checksum"):
        FactStore.open(whole)
    keys.unlink()
    with pytest.raises(CorruptFile, match="is missing"):
        FactStore.open(whole)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / files.DATABASE) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = (foreign / files.DATABASE).read_bytes()
    for again in (FactStore.open, FactStore.load):
        with pytest.raises(CorruptFile, match="another program"):
            again(foreign)
    assert (foreign / files.DATABASE).read_bytes() == before


def test_examples_in_the_documentation_run():
    import doctest

    page = Path(__file__).parents[2] / "docs" / "fact_store.md"
    assert doctest.testmod(fact_store).failed == 0
    assert doctest.testfile(str(page), module_relative=False).failed == 0
