"""A store of facts with a key each: grows, changes, forgets, is searched exactly, and survives being killed.

Facts and the keys of recent ones are rows of an SQLite database; compaction moves keys into a safetensors file, which
is never changed, only replaced. One transaction makes every change, so what a method has returned from is on disk, and
a change that was cut off is not there at all.

>>> store = FactStore(2)
>>> store.add([Fact("The capital of {} is", "Chad", "Lima")], torch.tensor([[1.0, 0.0]]))
[1]
>>> ids, scores = store.search(torch.tensor([[0.9, 0.1]]))
>>> store.entry(int(ids[0, 0])).fact.target_new
'Lima'
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts.safetensors_file import read_header, read_tensor, write_tensors
from ..errors import BaseMismatch, CorruptFile, FasteditError, InvalidFact
from ..facts import Fact
from ..io import atomic_directory, atomic_file, sha256_file
from ..ops import check
from ..ops.key_index import FaissIndex, KeyIndex

DATABASE = "facts.sqlite"
_LOCK = "lock"
_APPLICATION = 0x66653031
_VERSION = 1
_POLICIES = ("latest", "first", "error")
_COMPACT_AT = 4096
_BLOCK = 1 << 16
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE facts (id INTEGER PRIMARY KEY AUTOINCREMENT, text BLOB NOT NULL, content TEXT NOT NULL,
    "group" TEXT NOT NULL, key BLOB)""",
    "CREATE INDEX facts_text ON facts (text)",
    'CREATE INDEX facts_group ON facts ("group")',
)


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


class FactStore:
    """Facts with a key each, searched by inner product; in main memory, or in a folder that survives crashes.

    Adding a fact costs the same however many there are: keys are rewritten only when their number has doubled.
    Methods may be called from several threads, one at a time runs.

    Args:
        dim: d, width of the keys.
        path: folder of a new store; one process at a time has it open. None: in main memory only.
        stamp: fingerprint of what made the keys, such as an encoder's; kept with them and compared by :meth:`open`.
        index: ``"flat"``, or ``"faiss"`` for the largest stores: candidates come from FAISS and are compared
            exactly; ``"faiss:HNSW32"`` names another index of FAISS than ``"Flat"``. No choice is stored.
        on_duplicate: which of several facts with the same prompt and subject answers, whatever their targets.
            ``"latest"``: the newest, ``"first"``: the oldest. The others wait: once the one that answers is deleted,
            the next one answers. ``"error"``: a second one is refused.
        device: where keys are searched; FAISS is for CPUs.

    Raises:
        ValueError: a width below 1, an unknown index or policy.
        FileExistsError: the folder holds a store already.
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
        check.choice("FactStore", _POLICIES, on_duplicate=on_duplicate)
        self._new_index(dim, index, device)  # refuses what is wrong before anything is made
        about = {"dim": str(dim), "stamp": stamp, "on_duplicate": on_duplicate}
        if path is None:
            connection = _connect(":memory:")
            _create(connection, about)
            lock = None
        else:
            path = Path(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            try:
                if (path / DATABASE).exists():
                    raise FileExistsError(f"{path} holds a fact store already: use FactStore.open")
                with atomic_file(path / DATABASE) as temporary:
                    with contextlib.closing(_connect(temporary)) as connection:
                        _create(connection, about)
                connection = _connect(path / DATABASE)
            except BaseException:
                os.close(lock)
                raise
        self._begin(connection, lock, path, index, device)

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
        """Open a folder that holds a store or a snapshot; what was acknowledged before the last end is all there.

        Args:
            path: the folder.
            stamp: what the store's stamp must be; None takes any.
            index: as of :class:`FactStore`.
            on_duplicate: another policy from now on; None keeps the store's.
            device: as of :class:`FactStore`.

        Raises:
            FileNotFoundError: there is no store.
            FasteditError: another process, or another object in this one, has it open.
            CorruptFile: a file is truncated, missing, damaged, or of another program.
            BaseMismatch: another stamp.
        """
        path = Path(path)
        if on_duplicate is not None:
            check.choice("FactStore", _POLICIES, on_duplicate=on_duplicate)
        if not (path / DATABASE).is_file():
            raise FileNotFoundError(f"there is no fact store in {path}: {DATABASE} is missing")
        lock = _lock(path)
        try:
            connection = _connect(path / DATABASE)
            try:
                about = _about(connection, path)
                if stamp is not None and about["stamp"] != stamp:
                    raise BaseMismatch(
                        f"the keys of {path} were made by {about['stamp']!r}, not by {stamp!r}: open it with what "
                        "made it, or make its keys again"
                    )
                if on_duplicate is not None:
                    _set_about(connection, on_duplicate=on_duplicate)
                store = cls.__new__(cls)
                store._begin(connection, lock, path, index, device)
                return store
            except BaseException:
                connection.close()
                raise
        except sqlite3.DatabaseError as error:
            os.close(lock)
            raise _explained(error, path) from error
        except BaseException:
            os.close(lock)
            raise

    def _begin(
        self,
        connection: sqlite3.Connection,
        lock: int | None,
        path: Path | None,
        index: str,
        device: torch.device | str,
    ) -> None:
        self.path = path
        self._connection = connection
        self._guard = threading.RLock()
        self._index_name, self._device = index, torch.device(device)
        about = dict(connection.execute("SELECT name, value FROM about"))
        self.dim, self.stamp, self.on_duplicate = int(about["dim"]), about["stamp"], about["on_duplicate"]
        self._keys_file: str | None = about.get("keys_file")
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'facts'").fetchone()
        self._next = 1 + (last[0] if last else 0)
        self._make_index(*self._stored_keys(about.get("keys_sha256", "")))
        if path is not None:
            _remove_leftovers(path, self._keys_file)
        self._finalize = weakref.finalize(self, _release, connection, lock)

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
            InvalidFact: a fact whose prompt and subject are there already, with ``on_duplicate="error"``.
            FasteditError: the disk is full, or the store is closed. Nothing has changed.
        """
        facts = list(facts)
        with self._guard:
            self._require_open()
            rows = self._checked_keys("add", keys, len(facts))
            texts = [_identity(fact) for fact in facts]
            contents = [json.dumps(fact.as_dict()) for fact in facts]
            if self.on_duplicate == "error":
                self._refuse_duplicates(facts, texts)
            if not facts:
                return []
            self._compact_if_due()
            ids = list(range(self._next, self._next + len(facts)))
            self._next += len(facts)
            start = self._append(torch.tensor(ids), rows)
            blobs = [None] * len(facts) if self.path is None else _blobs(rows)
            try:
                with self._transaction() as connection:
                    connection.executemany(
                        "INSERT INTO facts VALUES (?, ?, ?, ?, ?)",
                        zip(ids, texts, contents, [group] * len(facts), blobs, strict=True),
                    )
            except BaseException:
                self._set_answering(torch.arange(start, start + len(ids)), False)
                raise
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
            InvalidFact: as of :meth:`add`.
            FasteditError: as of :meth:`add`.
        """
        with self._guard:
            self._require_open()
            rows = self._checked_keys("update", key[None], 1)
            text = _identity(fact)
            before = self._text_of(id)
            if self.on_duplicate == "error" and text != before:
                self._refuse_duplicates([fact], [text])
            self._compact_if_due()
            blob = None if self.path is None else _blobs(rows)[0]
            with self._transaction() as connection:
                connection.execute(
                    "UPDATE facts SET text = ?, content = ?, key = ? WHERE id = ?",
                    (text, json.dumps(fact.as_dict()), blob, id),
                )
            row = self._rows_of([id])
            answers = bool(self._answers[row])
            if not answers:
                self._set_answering(row, True)
            self._index.update(row, rows.to(self._device))
            self._pending += 1
            self._settle([before, text])

    def delete(self, ids: Iterable[int]) -> None:
        """Take facts out; from now on no search finds them, and older facts of the same prompt answer again.

        Raises:
            ValueError: there is no such fact; none is deleted then.
            FasteditError: the disk is full, or the store is closed. Nothing has changed.
        """
        with self._guard:
            self._require_open()
            ids = sorted(set(ids))
            texts = [self._text_of(id) for id in ids]
            if not ids:
                return
            with self._transaction() as connection:
                connection.executemany("DELETE FROM facts WHERE id = ?", [(id,) for id in ids])
            self._set_answering(self._rows_of(ids), False)
            self._n -= len(ids)
            self._settle(texts)
            self._compact_if_due()

    def delete_group(self, group: str) -> list[int]:
        """Take out all facts of an edit, as :meth:`delete`.

        Returns:
            Their ids; none if there is no such group.

        Raises:
            ValueError: an empty name.
        """
        if not group:
            raise ValueError('delete_group: the name of a group is expected, got ""')
        with self._guard:
            self._require_open()
            rows = self._connection.execute('SELECT id FROM facts WHERE "group" = ? ORDER BY id', (group,))
            ids = [row[0] for row in rows]
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
        """
        with self._guard:
            self._require_open()
            check.is_tensor("search", queries=queries)
            device = queries.device
            if isinstance(threshold, (int, float)):
                threshold = torch.full((len(queries),), float(threshold))
            if threshold is not None:
                threshold = threshold.to(self._device)
            rows, scores = self._index.max_inner_product(
                queries.detach().to(self._device), threshold, k, ties="highest"
            )
            rows, found = rows.cpu(), rows.cpu() >= 0
            ids = torch.full_like(rows, -1)
            ids[found] = self._ids[rows[found]]
            return ids.to(device), scores.to(device)

    def entry(self, id: int) -> Entry:
        """The fact of an id.

        Raises:
            ValueError: there is no such fact.
        """
        with self._guard:
            self._require_open()
            row = self._connection.execute(
                'SELECT id, content, "group" FROM facts WHERE id = ?', (id,)
            ).fetchone()
            if row is None:
                raise self._missing(id)
            return self._entry(row)

    def entries(self) -> Iterator[Entry]:
        """All facts, oldest first, those that wait for another to be deleted included."""
        last = 0
        while True:
            with self._guard:
                self._require_open()
                rows = self._connection.execute(
                    'SELECT id, content, "group" FROM facts WHERE id > ? ORDER BY id LIMIT 1000', (last,)
                ).fetchall()
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
            self._text_of(id)
            return bool(self._answers[self._rows_of([id])])

    def keys(self, ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """The keys of these ids, (n, d) in float32; None: of all facts, oldest first.

        Raises:
            ValueError: there is no such fact.
        """
        with self._guard:
            self._require_open()
            if ids is None:
                ids = [row[0] for row in self._connection.execute("SELECT id FROM facts ORDER BY id")]
            else:
                ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
                for id in ids:
                    self._text_of(id)
            return self._index.keys(self._rows_of(ids))

    def __len__(self) -> int:
        return self._n

    @property
    def n_bytes(self) -> int:
        """Bytes held in main memory, room to grow included."""
        with self._guard:
            self._require_open()
            held = self._index.n_bytes + self._ids.nbytes + self._answers.nbytes
            if self.path is None:
                for name in ("page_count", "page_size"):
                    assert name
                pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
                held += pages * self._connection.execute("PRAGMA page_size").fetchone()[0]
            return held

    # ---- files ----

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write the store as it is now to a new folder, which :meth:`open` reads; whole or not at all.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        with self._guard:
            self._require_open()
            with atomic_directory(path) as folder:
                self._connection.execute("VACUUM INTO ?", (str(folder / DATABASE),))
                with contextlib.closing(_connect(folder / DATABASE)) as copy:
                    copy.execute(f"PRAGMA application_id = {_APPLICATION}")
                    copy.execute(f"PRAGMA user_version = {_VERSION}")
                    copy.execute("UPDATE facts SET key = NULL")
                    _set_about(copy, **self._write_keys(folder))
                    copy.execute("VACUUM")

    def compact(self) -> None:
        """Give back the room of deleted facts, and move keys from the database to the safetensors file.

        Done by itself whenever changes since the last time are as many as the facts, and at least 4,096.
        """
        with self._guard:
            self._require_open()
            if self.path is not None:
                about = self._write_keys(self.path)
                with self._transaction() as connection:
                    connection.execute("UPDATE facts SET key = NULL WHERE key IS NOT NULL")
                    _set_about(connection, **about)
                old, self._keys_file = self._keys_file, about["keys_file"]
                if old is not None:
                    (self.path / old).unlink(missing_ok=True)
            ids = torch.tensor(
                [row[0] for row in self._connection.execute("SELECT id FROM facts ORDER BY id")]
            )
            self._make_index(ids.long(), self._index.keys(self._rows_of(ids)))

    def close(self) -> None:
        """Release the folder. Nothing is lost without it; the store cannot be used afterwards."""
        with self._guard:
            self._finalize()

    def __enter__(self) -> FactStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside ----

    def _new_index(self, dim: int, name: str, device: torch.device | str) -> KeyIndex:
        kind, _, factory = name.partition(":")
        check.choice("FactStore", ("flat", "faiss"), index=kind)
        if kind == "flat":
            return KeyIndex(dim, device=device)
        if torch.device(device).type != "cpu":
            raise ValueError(f"FactStore: FAISS searches on the CPU, got device {device}")
        return FaissIndex(dim, factory or "Flat")

    def _make_index(self, ids: Tensor, keys: Tensor) -> None:
        """Start a new index with these facts, whose ids rise."""
        self._index = self._new_index(self.dim, self._index_name, self._device)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._answers = torch.empty(0, dtype=torch.bool)
        self._n_rows = 0
        for start in range(0, len(ids), _BLOCK):
            self._append(ids[start : start + _BLOCK], keys[start : start + _BLOCK])
        self._n, self._pending = len(ids), 0
        chosen = "min" if self.on_duplicate == "first" else "max"
        waiting = self._connection.execute(
            f"SELECT id FROM facts WHERE id NOT IN (SELECT {chosen}(id) FROM facts GROUP BY text)"
        )
        self._set_answering(self._rows_of([row[0] for row in waiting]), False)

    def _append(self, ids: Tensor, keys: Tensor) -> int:
        """Put facts into the index and return the row of the first."""
        start, end = self._n_rows, self._n_rows + len(ids)
        self._index.add(keys.to(self._device))
        if end > len(self._ids):
            room = max(end, 2 * len(self._ids))
            self._ids = torch.cat((self._ids, self._ids.new_zeros(room - len(self._ids))))
            self._answers = torch.cat((self._answers, self._answers.new_zeros(room - len(self._answers))))
        self._ids[start:end] = ids
        self._answers[start:end] = True
        self._n_rows = end
        return start

    def _rows_of(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Rows in the index of ids that are there."""
        wanted = torch.as_tensor(ids, dtype=torch.int64)
        return torch.searchsorted(self._ids[: self._n_rows], wanted)

    def _set_answering(self, rows: Tensor, answering: bool) -> None:
        rows = rows[self._answers[rows] != answering]
        if len(rows):
            (self._index.restore if answering else self._index.remove)(rows)
            self._answers[rows] = answering

    def _settle(self, texts: Iterable[bytes]) -> None:
        """Let the one fact answer that should, of all with each of these texts."""
        asked: list[int] = []
        waiting: list[int] = []
        for text in set(texts):
            rows = self._connection.execute("SELECT id FROM facts WHERE text = ? ORDER BY id", (text,))
            ids = [row[0] for row in rows]
            if ids:
                asked.append(ids.pop(0 if self.on_duplicate == "first" else -1))
                waiting += ids
        self._set_answering(self._rows_of(waiting), False)
        self._set_answering(self._rows_of(asked), True)

    def _refuse_duplicates(self, facts: Sequence[Fact], texts: Sequence[bytes]) -> None:
        seen: set[bytes] = set()
        for fact, text in zip(facts, texts, strict=True):
            if text in seen:
                raise InvalidFact(f"two facts have the prompt {fact.text!r}, and on_duplicate is 'error'")
            seen.add(text)
            row = self._connection.execute(
                'SELECT id, content, "group" FROM facts WHERE text = ?', (text,)
            ).fetchone()
            if row is not None:
                there = self._entry(row)
                raise InvalidFact(
                    f"{fact.text!r} -> {fact.target_new.strip()!r} is in the store already, as fact {there.id} with "
                    f"{there.fact.target_new.strip()!r}, and on_duplicate is 'error': update or delete it"
                )

    def _checked_keys(self, op: str, keys: Tensor, n: int) -> Tensor:
        check.is_tensor(op, keys=keys)
        check.dtype(op, _KEY_DTYPES, keys=keys)
        check.shape(op, (n, self.dim), "a key for each fact", keys=keys)
        keys = keys.detach().to("cpu", torch.float32).contiguous()
        if not bool(keys.isfinite().all()):
            raise ValueError(f"{op}: keys must be finite, some are NaN or infinite")
        return keys

    def _text_of(self, id: int) -> bytes:
        self._require_open()
        row = self._connection.execute("SELECT text FROM facts WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise self._missing(id)
        return row[0]

    def _missing(self, id: int) -> ValueError:
        return ValueError(f"there is no fact {id}: it was deleted, or never given out")

    def _entry(self, row: tuple[int, str, str]) -> Entry:
        try:
            return Entry(row[0], Fact(**json.loads(row[1])), row[2])
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"fact {row[0]} of {self.path or 'the store'} is damaged: {error}") from error

    def _require_open(self) -> None:
        if not self._finalize.alive:
            raise FasteditError("the fact store is closed: open it again")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on disk at the end."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    def _compact_if_due(self) -> None:
        if self._n_rows - self._n + self._pending >= max(_COMPACT_AT, self._n):
            self.compact()

    def _write_keys(self, folder: Path) -> dict[str, str]:
        """Write a file of all keys; return what the database must say about it."""
        ids = torch.tensor([row[0] for row in self._connection.execute("SELECT id FROM facts ORDER BY id")])
        keys = self._index.keys(self._rows_of(ids)).cpu()
        name = f"keys-{uuid.uuid4().hex}.safetensors"
        with atomic_file(folder / name) as temporary:
            write_tensors(temporary, {"ids": ids.long(), "keys": keys})
        return {"keys_file": name, "keys_sha256": sha256_file(folder / name)}

    def _stored_keys(self, sha256: str) -> tuple[Tensor, Tensor]:
        """Ids and keys of all facts, from the database and the file."""
        ids = torch.tensor(
            [row[0] for row in self._connection.execute("SELECT id FROM facts ORDER BY id")]
        ).long()
        keys = torch.empty(len(ids), self.dim)
        missing = torch.ones(len(ids), dtype=torch.bool)
        if self._keys_file is not None:
            assert self.path is not None
            file_ids, file_keys = _read_keys(self.path / self._keys_file, sha256, self.dim)
            there = torch.isin(ids, file_ids)
            keys[there] = file_keys[torch.searchsorted(file_ids, ids[there])]
            missing &= ~there
        recent = self._connection.execute("SELECT id, key FROM facts WHERE key IS NOT NULL ORDER BY id")
        while rows := recent.fetchmany(_BLOCK):
            if any(len(row[1]) != 4 * self.dim for row in rows):
                raise CorruptFile(
                    f"{self.path}: a key does not have {self.dim} numbers; the store is damaged"
                )
            places = torch.searchsorted(ids, torch.tensor([row[0] for row in rows]))
            data = bytearray().join(row[1] for row in rows)
            keys[places] = torch.frombuffer(data, dtype=torch.float32).reshape(-1, self.dim)
            missing[places] = False
        if bool(missing.any()):
            raise CorruptFile(f"{self.path} has no key of fact {int(ids[missing][0])}: a file is damaged")
        return ids, keys


def _connect(path: str | Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _create(connection: sqlite3.Connection, about: dict[str, str]) -> None:
    connection.execute("BEGIN")
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    _set_about(connection, **about)
    connection.execute("COMMIT")


def _about(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """Check that this is a whole store, and return what it says about itself."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != _APPLICATION:
        raise CorruptFile(f"{path / DATABASE} is not a fact store, but a database of something else")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise CorruptFile(
            f"{path} has version {version}, this fastedit reads version {_VERSION}: use a newer one"
        )
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise CorruptFile(f"{path / DATABASE} is damaged ({found}): take a snapshot or a copy of it")
    return dict(connection.execute("SELECT name, value FROM about"))


def _set_about(connection: sqlite3.Connection, **values: str) -> None:
    connection.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values.items())


def _read_keys(path: Path, sha256: str, dim: int) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing: the store cannot be read without it")
    header = read_header(path)
    if sha256_file(path) != sha256:
        raise CorruptFile(
            f"{path} has a wrong checksum: it is damaged; take a snapshot or a copy of the store"
        )
    return read_tensor(header, "ids"), read_tensor(header, "keys")


def _identity(fact: Fact) -> bytes:
    """What facts of the same prompt and subject share."""
    return " ".join(fact.text.split()).encode("utf-8", "surrogatepass")


def _blobs(keys: Tensor) -> list[bytes]:
    return [key.numpy().tobytes() for key in keys]


def _lock(path: Path) -> int:
    """Take the folder's lock, which ends with the process."""
    handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FasteditError(
            f"the fact store {path} is open already, in this or another process: close it there first, or open a "
            "snapshot"
        ) from None
    return handle


def _release(connection: sqlite3.Connection, lock: int | None) -> None:
    connection.close()
    if lock is not None:
        os.close(lock)


def _remove_leftovers(path: Path, keys_file: str | None) -> None:
    """Files of changes that were cut off."""
    for file in path.iterdir():
        if (file.name.startswith("keys-") and file.name != keys_file) or file.name.endswith(".tmp"):
            file.unlink()


def _explained(error: sqlite3.DatabaseError, path: Path | None) -> FasteditError:
    where = "the fact store in memory" if path is None else path
    if isinstance(error, sqlite3.OperationalError):
        return FasteditError(f"{where} could not be read or written ({error}): nothing was changed")
    return CorruptFile(
        f"{where} is not a fact store, or is damaged ({error}): take a snapshot or a copy of it"
    )
