"""A store of facts with a key each: grows, changes, forgets, is searched exactly, and survives being killed.

Facts and the keys of recent ones are rows of an SQLite database; compaction moves keys into a safetensors file, which
is never changed, only replaced. Every change is one transaction: once a method has returned it is on disk, and one
that was cut off is not there at all.

>>> store = FactStore(2)
>>> store.add([Fact("The capital of {} is", "Chad", "Lima")], torch.tensor([[1.0, 0.0]]))
[1]
>>> ids, scores = store.search(torch.tensor([[0.9, 0.1]]))
>>> store.entry(int(ids[0, 0])).fact.target_new
'Lima'
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..artefacts.safetensors_file import explained, write_tensors
from ..errors import CorruptFile, FasteditError, InvalidFact
from ..facts import Fact
from ..io import atomic_directory, atomic_file, sha256_file
from ..ops import check
from ..ops.key_index import FaissIndex, KeyIndex
from .fact_store_files import (
    BLOCK,
    DATABASE,
    POLICIES,
    all_ids,
    check_whole,
    connect,
    connect_to_read,
    create,
    existing,
    explaining,
    locked,
    read_about,
    remove_left_over,
    set_about,
    set_policy,
    stored_keys,
    to_log,
)

_COMPACT_AT = 4096
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Entry:
    """One fact of a store.

    Attributes:
        id: given by the store, rising, never used again.
        fact: the fact.
        group: id of the edit that it belongs to, "" if none.
    """

    id: int
    fact: Fact
    group: str


class _Rows:
    """The searchable part: an index of keys, with each row's fact and whether that fact answers. Ids rise."""

    def __init__(self, index: KeyIndex, device: torch.device) -> None:
        self.index, self.device = index, device
        self.n = 0
        self._ids = torch.empty(0, dtype=torch.int64)
        self._answering = torch.empty(0, dtype=torch.bool)

    @property
    def n_bytes(self) -> int:
        return self.index.n_bytes + self._ids.nbytes + self._answering.nbytes

    def append(self, ids: Tensor, keys: Tensor) -> None:
        start, end = self.n, self.n + len(ids)
        self.index.add(keys.to(self.device))
        room = max(end, 2 * start) - len(self._ids)
        if end > len(self._ids):
            self._ids = torch.cat((self._ids, self._ids.new_zeros(room)))
            self._answering = torch.cat((self._answering, self._answering.new_zeros(room)))
        self._ids[start:end] = ids
        self._answering[start:end] = True
        self.n = end

    def of(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The rows of these facts, which are there."""
        return torch.searchsorted(self._ids[: self.n], torch.as_tensor(ids, dtype=torch.int64))

    def ids(self, rows: Tensor) -> Tensor:
        """The facts of these rows; −1 stays."""
        found = rows >= 0
        ids = torch.full_like(rows, -1)
        ids[found] = self._ids[rows[found]]
        return ids

    def answering(self, rows: Tensor) -> Tensor:
        return self._answering[rows]

    def set_answering(self, rows: Tensor, answering: bool) -> None:
        rows = rows[self._answering[rows] != answering]
        if len(rows):
            (self.index.restore if answering else self.index.remove)(rows)
            self._answering[rows] = answering


class FactStore:
    """Facts with a key each, searched by inner product; in main memory, or in a folder that survives crashes.

    Adding a fact costs the same however many there are: keys are written again only when the store has doubled, or
    half of it was deleted. Methods may be called from several threads; one at a time runs.

    Args:
        dim: d, width of the keys.
        path: folder of a new store, which one process at a time has open. None: in main memory only.
        stamp: fingerprint of what makes the keys, such as an encoder's; kept, and compared by :meth:`open`.
        index: ``"flat"``, or ``"faiss"`` for the largest stores: candidates come from FAISS and are compared
            exactly; ``"faiss:HNSW32"`` names another index of FAISS than ``"Flat"``. It is not stored.
        on_duplicate: which of several facts with the same prompt and subject answers. ``"latest"``: the newest;
            ``"first"``: the oldest. The others wait: once the one that answers is deleted, the next does.
            ``"error"``: a second one is refused.
        device: where keys are searched; with FAISS the CPU.

    Raises:
        ValueError: a width below 1, an unknown index or policy.
        FileExistsError: the folder holds a store already.
        FasteditError: the disk is full.
        ImportError: FAISS is not installed.
    """

    def __init__(
        self,
        dim: int,
        *,
        path: str | os.PathLike[str] | None = None,
        stamp: str = "",
        index: str = "flat",
        on_duplicate: str = "latest",
        device: torch.device | str = "cpu",
    ) -> None:
        check.choice("FactStore", POLICIES, on_duplicate=on_duplicate)
        _index(dim, index, device)  # refuses what is wrong before anything is made
        about = {"dim": str(dim), "stamp": stamp, "on_duplicate": on_duplicate}
        with contextlib.ExitStack() as held:
            if path is None:
                connection = held.enter_context(contextlib.closing(connect(":memory:")))
                create(connection, about)
            else:
                path = Path(path)
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path))
                if (path / DATABASE).exists():
                    raise FileExistsError(f"{path} holds a fact store already: use FactStore.open")
                with explaining(path), atomic_file(path / DATABASE) as temporary:
                    with contextlib.closing(connect(temporary)) as new:
                        create(new, about)
                connection = held.enter_context(contextlib.closing(connect(path / DATABASE)))
            self._begin(connection, path, index, device, held)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        stamp: str | None = None,
        index: str = "flat",
        on_duplicate: str | None = None,
        device: torch.device | str = "cpu",
    ) -> FactStore:
        """Open a folder that holds a store or a snapshot; all that was acknowledged is there.

        Args:
            path: the folder.
            stamp: what the store's stamp must be; None takes any.
            index: as of :class:`FactStore`.
            on_duplicate: the policy from now on; None keeps the store's.
            device: as of :class:`FactStore`.

        Raises:
            FileNotFoundError: there is no store.
            FasteditError: another process, or another object in this one, has it open.
            CorruptFile: a file is truncated, missing, damaged, or of another program.
            BaseMismatch: another stamp.
            ValueError, ImportError: as of :class:`FactStore`.
        """
        path = existing(path)
        with contextlib.ExitStack() as held, explaining(path):
            held.enter_context(locked(path))
            connection = held.enter_context(contextlib.closing(connect(path / DATABASE)))
            check_whole(connection, path, stamp)
            set_policy(connection, on_duplicate)
            store = cls.__new__(cls)
            store._begin(connection, path, index, device, held)
            return store

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        stamp: str | None = None,
        index: str = "flat",
        on_duplicate: str | None = None,
        device: torch.device | str = "cpu",
    ) -> FactStore:
        """A copy in main memory of a folder that holds a store or a snapshot; its content stays as it is.

        Any number of processes may do so at once, also where they may not write, unless the last one to write was
        killed. Arguments and errors are those of :meth:`open`.
        """
        path = existing(path)
        with contextlib.ExitStack() as held, explaining(path):
            connection = held.enter_context(contextlib.closing(connect(":memory:")))
            with locked(path, shared=True), contextlib.closing(connect_to_read(path)) as source:
                check_whole(source, path, stamp)
                source.backup(connection)
                ids, keys, _ = stored_keys(connection, path)
            connection.execute("UPDATE facts SET key = NULL WHERE key IS NOT NULL")
            connection.execute("DELETE FROM about WHERE name IN ('keys_file', 'keys_sha256')")
            connection.execute("VACUUM")
            set_policy(connection, on_duplicate)
            store = cls.__new__(cls)
            store._begin(connection, None, index, device, held, (ids, keys))
            return store

    def _begin(
        self,
        connection: sqlite3.Connection,
        path: Path | None,
        index: str,
        device: torch.device | str,
        held: contextlib.ExitStack,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        about = read_about(connection)
        self.path, self.dim, self.stamp = path, int(about["dim"]), about["stamp"]
        self.on_duplicate = about["on_duplicate"]
        self._connection, self._guard = connection, threading.RLock()
        self._index_name, self._device = index, torch.device(device)
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'facts'").fetchone()
        self._next = 1 + (last[0] if last else 0)
        if path is None:
            self._make_rows(*(keys or (torch.empty(0, dtype=torch.int64), torch.empty(0, self.dim))))
        else:
            to_log(connection)
            self._make_rows(*stored_keys(connection, path))
            remove_left_over(path, about.get("keys_file"))
        self._finalize = weakref.finalize(self, held.pop_all().close)

    # ---- changing ----

    def add(self, facts: Sequence[Fact], keys: Tensor, *, group: str = "") -> list[int]:
        """Append facts. When this returns they are on disk.

        Args:
            facts: n facts.
            keys: (n, d), float32, bfloat16 or float16, on any device; kept in float32.
            group: id of the edit that they belong to.

        Returns:
            Their ids.

        Raises:
            ValueError: keys that do not fit, or hold NaN or infinity.
            TypeError: something that is not a fact; a dtype not listed.
            InvalidFact: a fact whose prompt and subject are there already, with ``on_duplicate="error"``.
            FasteditError: the disk is full, or the store is closed. Nothing has changed.
        """
        facts = list(facts)
        with self._guard:
            self._prepare()
            rows = self._checked_keys("add", keys, len(facts))
            texts = [_text(fact) for fact in facts]
            contents = [json.dumps(fact.as_dict()) for fact in facts]
            if self.on_duplicate == "error":
                self._refuse_duplicates(facts, texts)
            if not facts:
                return []
            self._compact_if_due()
            ids = list(range(self._next, self._next + len(facts)))
            self._next += len(facts)
            with self._change() as connection:
                connection.executemany(
                    "INSERT INTO facts VALUES (?, ?, ?, ?, ?)",
                    zip(ids, texts, contents, [group] * len(ids), self._blobs(rows), strict=True),
                )
                self._rows.append(torch.tensor(ids), rows)
                self._n += len(ids)
                self._pending += len(ids)
                self._settle(texts)
            return ids

    def update(self, id: int, fact: Fact, key: Tensor) -> None:
        """Replace a fact and its key; id and group stay.

        Args:
            id: of the fact.
            fact: the new one; it may have another prompt.
            key: (d,).

        Raises:
            ValueError: there is no such fact; a key that does not fit.
            TypeError, InvalidFact, FasteditError: as of :meth:`add`.
        """
        with self._guard:
            self._prepare()
            check.is_tensor("update", key=key)
            keys = self._checked_keys("update", key[None], 1)
            before, text = self._text_of(id), _text(fact)
            content = json.dumps(fact.as_dict())
            if self.on_duplicate == "error" and text != before:
                self._refuse_duplicates([fact], [text])
            self._compact_if_due()
            with self._change() as connection:
                connection.execute(
                    "UPDATE facts SET text = ?, content = ?, key = ? WHERE id = ?",
                    (text, content, *self._blobs(keys), int(id)),
                )
                row = self._rows.of([int(id)])
                self._rows.set_answering(row, True)  # only such a key can be replaced
                self._rows.index.update(row, keys.to(self._device))
                self._pending += 1
                self._settle([before, text])

    def delete(self, ids: Iterable[int] | Tensor) -> None:
        """Take facts out; from now on no search finds them, and others of the same prompt answer.

        Raises:
            ValueError: there is no such fact; none is deleted then.
            FasteditError: the disk is full, or the store is closed. Nothing has changed.
        """
        with self._guard:
            self._prepare()
            gone = sorted(set(_as_list(ids)))
            texts = [self._text_of(id) for id in gone]
            if not gone:
                return
            self._compact_if_due()
            with self._change() as connection:
                connection.executemany("DELETE FROM facts WHERE id = ?", [(id,) for id in gone])
                self._rows.set_answering(self._rows.of(gone), False)
                self._n -= len(gone)
                self._settle(texts)

    def delete_group(self, group: str) -> list[int]:
        """Take out all facts of an edit, as :meth:`delete`.

        Returns:
            Their ids; none if there is no such group.

        Raises:
            ValueError: an empty name.
            FasteditError: as of :meth:`delete`.
        """
        if not group:
            raise ValueError('delete_group: the name of a group is expected, got ""')
        with self._guard:
            self._prepare()
            found = self._connection.execute('SELECT id FROM facts WHERE "group" = ? ORDER BY id', (group,))
            ids = [row[0] for row in found]
            self.delete(ids)
            return ids

    # ---- looking up ----

    def search(
        self, queries: Tensor, k: int = 1, threshold: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k facts whose keys have the greatest inner product with each query; of equal ones the newest first.

        Args:
            queries: (B, d), float32, bfloat16 or float16, on any device.
            k: 1 to 64.
            threshold: (B,) float32, or one number for all, which a score must exceed.

        Returns:
            ids (B, k), int64, −1 for none; scores (B, k), float32, −infinity there. On the queries' device.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
            FasteditError: the store is closed.
        """
        with self._guard:
            self._prepare()
            check.is_tensor("search", queries=queries)
            if isinstance(threshold, (int, float)):
                threshold = torch.full(queries.shape[:1], float(threshold))
            rows, scores = self._rows.index.max_inner_product(
                queries.detach().to(self._device),
                None if threshold is None else threshold.to(self._device),
                k,
                ties="highest",
            )
            return self._rows.ids(rows.cpu()).to(queries.device), scores.to(queries.device)

    def entry(self, id: int) -> Entry:
        """The fact of an id.

        Raises:
            ValueError: there is no such fact.
        """
        with self._guard:
            self._prepare()
            query = 'SELECT id, content, "group" FROM facts WHERE id = ?'
            row = self._connection.execute(query, (int(id),)).fetchone()
            if row is None:
                raise _missing(id)
            return self._entry(row)

    def entries(self) -> Iterator[Entry]:
        """All facts, oldest first, with those that wait for another to be deleted."""
        last = 0
        while True:
            with self._guard:
                self._prepare()
                query = 'SELECT id, content, "group" FROM facts WHERE id > ? ORDER BY id LIMIT 1000'
                rows = self._connection.execute(query, (last,)).fetchall()
            if not rows:
                return
            yield from map(self._entry, rows)
            last = rows[-1][0]

    def answers(self, id: int) -> bool:
        """Whether searches find this fact; if not, another of the same prompt answers.

        Raises:
            ValueError: there is no such fact.
        """
        with self._guard:
            self._prepare()
            self._text_of(id)
            return bool(self._rows.answering(self._rows.of([int(id)])))

    def keys(self, ids: Iterable[int] | Tensor | None = None) -> Tensor:
        """The keys of these ids, (n, d) in float32 on the CPU; None: of all facts, oldest first.

        Raises:
            ValueError: there is no such fact.
        """
        with self._guard:
            self._prepare()
            if ids is None:
                return self._rows.index.keys(self._rows.of(all_ids(self._connection))).cpu()
            wanted = _as_list(ids)
            for id in wanted:
                self._text_of(id)
            return self._rows.index.keys(self._rows.of(wanted)).cpu()

    def __len__(self) -> int:
        with self._guard:
            self._prepare()
            return self._n

    @property
    def n_bytes(self) -> int:
        """Bytes held in main memory, room to grow included."""
        with self._guard:
            self._prepare()
            if self.path is not None:
                return self._rows.n_bytes
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            return self._rows.n_bytes + pages * self._connection.execute("PRAGMA page_size").fetchone()[0]

    # ---- files ----

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write the store as it is now to a new folder, for :meth:`open` and :meth:`load`; whole or not at all.

        Raises:
            FileExistsError: the folder exists and is not empty.
            FasteditError: the disk is full, or the store is closed.
        """
        path = Path(path)
        with self._guard:
            self._prepare()
            with explained(path), explaining(path), atomic_directory(path) as folder:
                self._connection.execute("VACUUM INTO ?", (str(folder / DATABASE),))
                with contextlib.closing(connect(folder / DATABASE)) as copy:
                    copy.execute("UPDATE facts SET key = NULL WHERE key IS NOT NULL")
                    set_about(copy, **self._write_keys(folder))
                    copy.execute("VACUUM")

    def compact(self) -> None:
        """Give back the room of deleted facts, and move keys from the database to the safetensors file.

        Done by itself when the changes since have become half as many as the facts, and at least 4,096. For a moment
        it takes the room of the keys once more, in main memory and on disk.

        Raises:
            FasteditError: the disk is full, or the store is closed. Nothing has changed.
        """
        with self._guard:
            self._prepare()
            if self.path is not None:
                with explained(self.path):
                    about = self._write_keys(self.path)
                with self._change() as connection:
                    connection.execute("UPDATE facts SET key = NULL WHERE key IS NOT NULL")
                    set_about(connection, **about)
                    self._pending = 0
                remove_left_over(self.path, about["keys_file"])
            if self._rows.n > self._n:
                self._make_rows(*self._held_keys(), self._pending)

    def close(self) -> None:
        """Release the folder. Nothing is lost without it; the store cannot be used afterwards."""
        with self._guard:
            self._finalize()

    def __enter__(self) -> FactStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside ----

    def _make_rows(self, ids: Tensor, keys: Tensor, pending: int = 0) -> None:
        """Make the searchable part anew of these facts, whose ids rise.

        Args:
            ids: (n,) all facts of the database.
            keys: (n, d).
            pending: how many changes the keys' file does not have.
        """
        rows = _Rows(_index(self.dim, self._index_name, self._device), self._device)
        for start in range(0, len(ids), BLOCK):
            rows.append(ids[start : start + BLOCK], keys[start : start + BLOCK])
        chosen = "min" if self.on_duplicate == "first" else "max"
        query = f"SELECT id FROM facts WHERE id NOT IN (SELECT {chosen}(id) FROM facts GROUP BY text)"
        rows.set_answering(rows.of([row[0] for row in self._connection.execute(query)]), False)
        self._rows, self._n, self._pending, self._stale = rows, len(ids), pending, False

    def _held_keys(self) -> tuple[Tensor, Tensor]:
        """Ids and keys of all facts, from the searchable part."""
        ids = all_ids(self._connection)
        return ids, self._rows.index.keys(self._rows.of(ids)).cpu()

    def _prepare(self) -> None:
        """Refuse a closed store; if the last change was cut off, search what the database holds."""
        if not self._finalize.alive:
            raise FasteditError("the fact store is closed: open it again")
        if self._stale and self.path is None:
            self._make_rows(*self._held_keys())
        elif self._stale:
            assert self.path is not None
            self._make_rows(*stored_keys(self._connection, self.path))

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """All of a change or nothing, on disk at the end."""
        with explaining(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            self._stale = True
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._stale = False

    def _settle(self, texts: Iterable[bytes]) -> None:
        """Of all facts with one of these texts, let the one answer that should."""
        answering: list[int] = []
        waiting: list[int] = []
        for text in set(texts):
            rows = self._connection.execute("SELECT id FROM facts WHERE text = ? ORDER BY id", (text,))
            ids = [row[0] for row in rows]
            if ids:
                answering.append(ids.pop(0 if self.on_duplicate == "first" else -1))
                waiting += ids
        self._rows.set_answering(self._rows.of(waiting), False)
        self._rows.set_answering(self._rows.of(answering), True)

    def _refuse_duplicates(self, facts: Sequence[Fact], texts: Sequence[bytes]) -> None:
        seen: dict[bytes, Fact] = {}
        for fact, text in zip(facts, texts, strict=True):
            query = 'SELECT id, content, "group" FROM facts WHERE text = ?'
            row = self._connection.execute(query, (text,)).fetchone()
            there = seen.get(text) if row is None else self._entry(row).fact
            if there is not None:
                where = "was given before it" if row is None else f"is in the store as fact {row[0]}"
                raise InvalidFact(
                    f"{fact.text!r} -> {fact.target_new.strip()!r}: the same prompt with "
                    f"{there.target_new.strip()!r} {where}, and on_duplicate is 'error'; keep one of them, or update"
                )
            seen[text] = fact

    def _checked_keys(self, op: str, keys: Tensor, n: int) -> Tensor:
        check.is_tensor(op, keys=keys)
        check.dtype(op, _KEY_DTYPES, keys=keys)
        check.shape(op, (n, self.dim), "a key for each fact", keys=keys)
        keys = keys.detach().to("cpu", torch.float32).contiguous()
        if not bool(keys.isfinite().all()):
            raise ValueError(f"{op}: keys must be finite, some are NaN or infinite")
        return keys

    def _blobs(self, keys: Tensor) -> list[bytes | None]:
        """The keys as the database holds them until the next compaction; in main memory the index has them."""
        return [None] * len(keys) if self.path is None else [key.numpy().tobytes() for key in keys]

    def _text_of(self, id: int) -> bytes:
        row = self._connection.execute("SELECT text FROM facts WHERE id = ?", (int(id),)).fetchone()
        if row is None:
            raise _missing(id)
        return row[0]

    def _entry(self, row: tuple[int, str, str]) -> Entry:
        try:
            return Entry(row[0], Fact(**json.loads(row[1])), row[2])
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"fact {row[0]} of {self.path or 'the store'} is damaged: {error}") from error

    def _compact_if_due(self) -> None:
        changes = self._rows.n - self._n + (self._pending if self.path is not None else 0)
        if changes >= max(_COMPACT_AT, self._n / 2):
            self.compact()

    def _write_keys(self, folder: Path) -> dict[str, str]:
        """Write a file of all keys; return what the database must say about it."""
        ids, keys = self._held_keys()
        name = f"keys-{uuid.uuid4().hex}.safetensors"
        with atomic_file(folder / name) as temporary:
            write_tensors(temporary, {"ids": ids, "keys": keys})
        return {"keys_file": name, "keys_sha256": sha256_file(folder / name)}


def _index(dim: int, name: str, device: torch.device | str) -> KeyIndex:
    kind, _, factory = name.partition(":")
    check.choice("FactStore", ("flat", "faiss"), index=kind)
    if kind == "flat":
        return KeyIndex(dim, device=device)
    if torch.device(device).type != "cpu":
        raise ValueError(f"FactStore: FAISS searches on the CPU, got device {device}")
    return FaissIndex(dim, factory or "Flat")


def _text(fact: Fact) -> bytes:
    """What facts of the same prompt and subject share."""
    if not isinstance(fact, Fact):
        raise TypeError(f"FactStore: facts must be Fact, got {type(fact).__name__}")
    return " ".join(fact.text.split()).encode("utf-8", "surrogatepass")


def _as_list(ids: Iterable[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(id) for id in ids]


def _missing(id: int) -> ValueError:
    return ValueError(f"there is no fact {id}: it was deleted, or never given out")
