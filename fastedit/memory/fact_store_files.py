"""The files of a fact store: an SQLite database of facts and recent keys, a safetensors file of the other keys."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from ..artefacts.safetensors_file import file_size, read_header, read_tensor
from ..errors import BaseMismatch, CorruptFile, FasteditError
from ..io import sha256_file
from ..ops import check

DATABASE = "facts.sqlite"
_LOCK = "lock"
_LEFT_OVER = re.compile(r"keys-[0-9a-f]{32}\.safetensors|\.(keys-|facts\.sqlite\.).*\.tmp(-journal)?")
_APPLICATION = 0x66653031  # marks the database as ours
_VERSION = 1
POLICIES = ("latest", "first", "error")
BLOCK = 1 << 16
_LOG_BYTES = 1 << 26  # SQLite's log is cut back to this
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE facts (id INTEGER PRIMARY KEY AUTOINCREMENT, text BLOB NOT NULL, content TEXT NOT NULL,
    "group" TEXT NOT NULL, key BLOB)""",
    "CREATE INDEX facts_text ON facts (text)",
    'CREATE INDEX facts_group ON facts ("group")',
)


# ---- the database ----


def connect(path: str | Path) -> sqlite3.Connection:
    """To a database for this process alone; a statement that is not in a transaction is one by itself."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # the log's index is then in main memory
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """To a closed store. What a killed process left in the log is taken in, for which one must be able to write."""
    mode = "rw" if file_size(_log_of(path)) else "ro&immutable=1"
    return sqlite3.connect(f"file:{quote(str((path / DATABASE).absolute()))}?mode={mode}", uri=True)


def _log_of(path: Path) -> Path:
    """Where changes are that a killed process did not bring into the database itself."""
    return path / f"{DATABASE}-wal"


def to_log(connection: sqlite3.Connection) -> None:
    """Write changes to a log first: one wait for the disk each."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")


def create(connection: sqlite3.Connection, about: dict[str, str]) -> None:
    """Make an empty database a store without facts."""
    connection.execute("BEGIN")
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    set_about(connection, **about)
    connection.execute("COMMIT")


def check_whole(connection: sqlite3.Connection, path: Path, stamp: str | None) -> None:
    """Check that a database is a store of ours without damage, and of this stamp.

    Raises:
        CorruptFile, BaseMismatch: it is not.
    """
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise CorruptFile(
            f"{path / DATABASE} is empty, or a database of another program: it is no fact store"
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise CorruptFile(
            f"{path} has version {version}, this fastedit reads version {_VERSION}: use a newer one"
        )
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    pages, page_size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
    )
    if not file_size(_log_of(path)) and file_size(path / DATABASE) != pages * page_size:
        found = "truncated"
    if found != "ok":
        raise CorruptFile(f"{path / DATABASE} is damaged ({found}): use a snapshot or a copy of it")
    made_by = read_about(connection)["stamp"]
    if stamp is not None and made_by != stamp:
        raise BaseMismatch(
            f"the keys of {path} were made by {made_by!r}, not by {stamp!r}: open it with what made them, or make a "
            "new store"
        )


def read_about(connection: sqlite3.Connection) -> dict[str, str]:
    """What a store says about itself: dim, stamp, on_duplicate; keys_file and keys_sha256 if it has such a file."""
    return dict(connection.execute("SELECT name, value FROM about"))


def set_about(connection: sqlite3.Connection, **values: str) -> None:
    """Change what :func:`read_about` returns."""
    connection.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values.items())


def set_policy(connection: sqlite3.Connection, on_duplicate: str | None) -> None:
    """Set the policy, or leave it if there is None."""
    if on_duplicate is not None:
        check.choice("FactStore", POLICIES, on_duplicate=on_duplicate)
        set_about(connection, on_duplicate=on_duplicate)


def all_ids(connection: sqlite3.Connection) -> Tensor:
    """Ids of all facts, (n,) int64, rising."""
    ids = [row[0] for row in connection.execute("SELECT id FROM facts ORDER BY id")]
    return torch.tensor(ids, dtype=torch.int64)


def stored_keys(connection: sqlite3.Connection, path: Path) -> tuple[Tensor, Tensor, int]:
    """Ids and keys of all facts as they are on disk, and how many changes the keys' file does not have."""
    about, ids = read_about(connection), all_ids(connection)
    dim = int(about["dim"])
    keys, missing, pending = torch.empty(len(ids), dim), torch.ones(len(ids), dtype=torch.bool), 0
    if "keys_file" in about:
        file_ids, file_keys = _read_keys(path / about["keys_file"], about["keys_sha256"])
        there = torch.isin(ids, file_ids)
        keys[there] = file_keys[torch.searchsorted(file_ids, ids[there])]
        missing &= ~there
        pending = len(file_ids) - int(there.sum())
    recent = connection.execute("SELECT id, key FROM facts WHERE key IS NOT NULL ORDER BY id")
    while rows := recent.fetchmany(BLOCK):
        if any(len(row[1]) != 4 * dim for row in rows):
            raise CorruptFile(f"{path} has a key that is not {dim} numbers: it is damaged")
        places = torch.searchsorted(ids, torch.tensor([row[0] for row in rows]))
        data = bytearray().join(row[1] for row in rows)
        keys[places] = torch.frombuffer(data, dtype=torch.float32).reshape(-1, dim)
        missing[places] = False
        pending += len(rows)
    if bool(missing.any()):
        raise CorruptFile(f"{path} has no key of fact {int(ids[missing][0])}: it is damaged")
    return ids, keys, pending


# ---- the folder ----


def existing(path: str | os.PathLike[str]) -> Path:
    """The folder of a store.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if not (path / DATABASE).is_file():
        raise FileNotFoundError(f"there is no fact store in {path}: it has no {DATABASE}")
    return path


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; shared by those who read only.

    Raises:
        FasteditError: someone else holds it.
    """
    if shared and not (path / _LOCK).exists():  # a snapshot which nobody has opened
        yield
        return
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    handle = os.open(path / _LOCK, flags | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FasteditError(
                f"the fact store {path} is open already, here or in another process: close it there or use a snapshot"
            ) from None
        yield
    finally:
        os.close(handle)


def _read_keys(path: Path, sha256: str) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing: use a snapshot or a copy of the store")
    header = read_header(path)
    if sha256_file(path) != sha256:
        raise CorruptFile(
            f"{path} has a wrong checksum, it is damaged: use a snapshot or a copy of the store"
        )
    return read_tensor(header, "ids"), read_tensor(header, "keys")


def remove_left_over(path: Path, keys_file: str | None) -> None:
    """Remove what changes that were cut off, and earlier compactions, have left."""
    for file in path.iterdir():
        if _LEFT_OVER.fullmatch(file.name) and file.name != keys_file:
            file.unlink()


@contextlib.contextmanager
def explaining(path: Path | None) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    where = "the fact store in main memory" if path is None else path
    try:
        yield
    except sqlite3.OperationalError as error:
        raise FasteditError(f"{where} could not be read or written ({error}): nothing was changed") from error
    except sqlite3.DatabaseError as error:
        raise CorruptFile(
            f"{where} is not a fact store, or is damaged ({error}): use a snapshot or a copy of it"
        ) from error
