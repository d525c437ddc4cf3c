from __future__ import annotations

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastedit import CorruptFile
from fastedit.artefacts import safetensors_file


def test_written_files_are_read_by_safetensors(tmp_path) -> None:
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0, 3),
        "count": torch.arange(5),
        "flag": torch.tensor(True),
    }
    path = tmp_path / "x.safetensors"
    safetensors_file.write_tensors(path, tensors)
    for back in (load_file(path), safetensors_file.read_tensors(path)):
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_every_truncation_is_noticed(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(3, 4), "b": torch.randn(5)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"x\.safetensors"):
            safetensors_file.read_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CorruptFile, match="must have"):
        safetensors_file.read_header(path)


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"a": {}}', b'{"a": 3}', b"\xff\xff"])
def test_headers_that_are_not_safetensors(tmp_path, body) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body)
    with pytest.raises(CorruptFile, match="not safetensors"):
        safetensors_file.read_header(path)


def test_rewrite_replaces_tensors_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(safetensors_file, "_BLOCK", 7)
    tensors = {name: torch.randn(4, 3) for name in "abcde"}
    save_file(tensors, tmp_path / "old", metadata={"format": "pt", "k": "v"})
    header = safetensors_file.read_header(tmp_path / "old")
    replaced = {"b": torch.randn(4, 3), "e": torch.randn(4, 3)}
    safetensors_file.rewrite(header, tmp_path / "new", replaced, header.raw)
    back = load_file(tmp_path / "new")
    assert all(torch.equal(back[name], replaced.get(name, tensors[name])) for name in tensors)
    safetensors_file.rewrite(header, tmp_path / "copy", {}, header.raw)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "old").read_bytes()
