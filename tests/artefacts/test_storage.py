from __future__ import annotations

import copy
import errno
import gc
import json
import logging
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastedit
from fastedit import BaseMismatch, CorruptFile, Fact, FasteditError
from fastedit.artefacts import Edit, LowRank, load_edit, stack_of
from fastedit.artefacts.plain import plain


@pytest.fixture
def saved(make_model, make_edit, tmp_path):
    model = make_model("gpt2", torch.bfloat16)
    edit = make_edit(model)
    edit.measured = {"efficacy": 1.0, "loss": float("nan"), "steps": [1, 2]}
    edit.extras = {"keys": torch.arange(6).reshape(2, 3)}
    edit.dense = {edit.weight_names[0]: torch.randn(16, 40)}
    stack_of(model).push(edit)
    return model, edit, edit.save(tmp_path / "edit")


def test_round_trip(saved, make_model, bits, assert_bits) -> None:
    model, edit, directory = saved
    assert sorted(file.name for file in directory.iterdir()) == [
        "edit.json",
        "factors.safetensors",
        "originals.safetensors",
    ]
    loaded = fastedit.load_edit(directory)
    assert loaded.as_dict() == edit.as_dict()
    assert loaded.id == edit.id
    assert loaded.facts == edit.facts
    assert loaded.matrices == edit.matrices
    assert loaded.measured == {"efficacy": 1.0, "loss": None, "steps": [1, 2]}
    for name, factors in edit.factors.items():
        assert torch.equal(loaded.factors[name].left, factors.left)
        assert torch.equal(loaded.factors[name].right, factors.right)
    assert torch.equal(loaded.dense[edit.weight_names[0]], edit.dense[edit.weight_names[0]])
    assert torch.equal(loaded.extras["keys"], edit.extras["keys"])
    other = make_model("gpt2", torch.bfloat16)
    before = bits(other)
    assert loaded.apply(other) is loaded
    assert_bits(other, bits(model))
    loaded._id = ""
    assert loaded.id == edit.id
    loaded.revert()
    assert_bits(other, before)


def test_revert_of_a_model_saved_with_the_edit(saved, make_model, bits, assert_bits, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, _, directory = saved
    model.save_pretrained(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    loaded = load_edit(directory)
    loaded.revert(other)
    assert_bits(other, bits(make_model("gpt2", torch.bfloat16)))
    with pytest.raises(FasteditError, match="is not on this model"):
        loaded.revert(other)


def test_saving_after_the_model_is_gone_keeps_known_originals(saved, tmp_path, caplog) -> None:
    model, edit, directory = saved
    loaded = load_edit(directory)
    again = load_edit(loaded.save(tmp_path / "again"))
    assert torch.equal(again.originals()[edit.weight_names[0]], edit.originals()[edit.weight_names[0]])
    loaded.save(tmp_path / "small", keep_originals=False)
    small = load_edit(tmp_path / "small")
    assert small._originals is None
    with caplog.at_level(logging.WARNING):
        small.save(tmp_path / "smaller")
    assert "saved without originals" in caplog.text
    with pytest.raises(BaseMismatch, match="not known"):
        small.originals()
    del model
    gc.collect()


def test_edit_that_moved_in_its_stack_is_saved_without_originals(
    make_model, make_edit, tmp_path, caplog
) -> None:
    model = make_model("llama")
    first, second = make_edit(model, seed=0), make_edit(model, seed=1)
    stack_of(model).push(first)
    stack_of(model).push(second)
    first.revert()
    with caplog.at_level(logging.WARNING):
        second.save(tmp_path / "edit")
    assert "stands elsewhere" in caplog.text
    assert not (tmp_path / "edit" / "originals.safetensors").exists()


def test_uncommitted_edit_and_taken_place_are_refused(saved, make_edit, tmp_path) -> None:
    model, edit, directory = saved
    with pytest.raises(FasteditError, match="never applied to a model"):
        make_edit(model).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError):
        edit.save(directory)
    edit.save(directory, overwrite=True)
    load_edit(directory)


@pytest.mark.parametrize("file", ["edit.json", "factors.safetensors", "originals.safetensors"])
def test_damaged_files_are_named(saved, file, tmp_path) -> None:
    _, _, directory = saved
    path = directory / file
    whole = path.read_bytes()
    load = lambda: load_edit(directory).originals()  # noqa: E731
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=file.replace(".", r"\.")):
            load()
    for position in (len(whole) // 2, len(whole) - 4):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorruptFile, match=file.replace(".", r"\.")):
            load()
    path.unlink()
    with pytest.raises(CorruptFile, match=file.replace(".", r"\.")):
        load()
    path.write_bytes(whole)
    load()


def test_other_versions_and_other_things_are_refused(saved, tmp_path) -> None:
    _, _, directory = saved
    path = directory / "edit.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CorruptFile, match="version 99, this fastedit reads version 1"):
        load_edit(directory)
    path.write_text("[]")
    with pytest.raises(CorruptFile, match="does not describe an edit"):
        load_edit(directory)
    with pytest.raises(CorruptFile, match="there is no edit in"):
        load_edit(tmp_path / "nowhere")
    shutil.rmtree(directory)


def test_full_disk_leaves_nothing_behind(saved, tmp_path, monkeypatch) -> None:
    from fastedit.artefacts import safetensors_file

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file, "_write", full)
    _, edit, directory = saved
    with pytest.raises(FasteditError, match=r"no space left .*factors\.safetensors"):
        edit.save(tmp_path / "other")
    with pytest.raises(FasteditError, match="no space left"):
        edit.save(directory, overwrite=True)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit"]
    load_edit(directory)


text = st.text(min_size=1, max_size=12).filter(lambda s: s.strip() and "{}" not in s)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    subject=text, target=text, params=st.dictionaries(text, st.floats() | st.booleans() | text, max_size=3)
)
def test_any_text_and_parameters_survive(make_model, tmp_path, subject, target, params) -> None:
    model = make_model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    change = {name: LowRank(torch.zeros(16, 1), torch.zeros(40, 1))}
    try:
        fact = Fact("about {} it is", subject, target)
        fact.text.encode()
        target.encode()
        json.dumps(params, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    edit = Edit(method="x", facts=[fact], factors=change, params=params)
    stack_of(model).push(edit)
    loaded = load_edit(edit.save(tmp_path / "edit", overwrite=True))
    assert loaded.as_dict() == edit.as_dict()
    assert loaded.facts == [fact]


def test_copies_and_pickles_are_applied_to_nothing(saved) -> None:
    _, edit, _ = saved
    for other in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert other.id == edit.id
        assert other.applied_to() == []
    assert len(edit.applied_to()) == 1


def test_plain_values() -> None:
    from pathlib import Path

    import numpy as np

    value = {
        1: (1, 2.5, float("inf")),
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        "tensor": torch.tensor([1, 2]),
        "array": np.float32(0.5),
        "set": {2, 1},
        "fact": Fact("{} is", "it", "so"),
        "other": object,
    }
    result = plain(value)
    json.dumps(result, allow_nan=False)
    assert result["1"] == [1, 2.5, None]
    assert (result["path"], result["dtype"], result["tensor"]) == ("a/b", "bfloat16", [1, 2])
    assert (result["array"], result["set"]) == (0.5, [1, 2])
    assert result["fact"]["subject"] == "it"
