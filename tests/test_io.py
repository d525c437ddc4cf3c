"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fastedit import CorruptFile
from fastedit.io import (
    atomic_directory,
    atomic_file,
    atomic_write_json,
    atomic_write_text,
    read_json,
    sha256_file,
)


class Killed(BaseException):
    """Stands for anything that ends a process."""


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(Killed), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise Killed
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_directory_leaves_the_old_one_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(Killed), atomic_directory(path, overwrite=True) as temporary:
        (temporary / "x").write_text("new")
        raise Killed
    assert (path / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for text in ("one", "two"):
        with atomic_directory(path, overwrite=True) as temporary:
            (temporary / text).write_text(text)
    assert [entry.name for entry in path.iterdir()] == ["two"]
    with pytest.raises(FileExistsError, match="not empty"), atomic_directory(path):
        pass


def test_permissions_follow_the_umask_and_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "x")
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    path.chmod(0o640)
    atomic_write_text(path, "y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_truncated_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"a": [1, 2, 3]})
    assert read_json(path) == {"a": [1, 2, 3]}
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(CorruptFile, match="a.json"):
        read_json(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf")
