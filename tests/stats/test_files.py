from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from helpers import relative_error
from model_configs import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from fastedit import BaseMismatch, CorruptFile
from fastedit.models import describe, fingerprint
from fastedit.stats import Statistics, load_directory, npz_path, save_directory

MODULE = "model.layers.1.mlp.down_proj"


def statistics(layer=1, width=64, model=None, dtype=torch.float32):
    keys = torch.randn(500, width, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    meta = {"max_length": 1024, "bos": "none", "texts_hash": "αβγ"}
    if model is not None:
        meta["model_fingerprint"] = fingerprint(model)
    moment = (keys.T @ keys / 500).to(dtype)
    return Statistics(layer, f"model.layers.{layer}.mlp.down_proj", (moment + moment.T) / 2, 500, meta)


# ---- our files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(dtype, tmp_path):
    first = statistics(dtype=dtype)
    loaded = Statistics.load(first.save(tmp_path / "deep" / "layer.safetensors"))
    assert torch.equal(loaded.second_moment, first.second_moment)
    assert loaded.second_moment.dtype == dtype
    assert (loaded.layer, loaded.module, loaded.count) == (1, MODULE, 500)
    assert loaded.meta == first.meta
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["layer.safetensors"]


@pytest.mark.parametrize("keep", [0, 1, 7, 200, 5000, -1])
def test_truncated_file_is_refused(keep, tmp_path):
    path = statistics().save(tmp_path / "layer_001.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile, match="layer_001"):
        Statistics.load(path)


def test_changed_matrix_is_refused(tmp_path):
    path = statistics().save(tmp_path / "layer_001.safetensors")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="checksum"):
        Statistics.load(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_matrix_is_refused(bad, tmp_path):
    broken = statistics()
    broken.second_moment[3, 3] = bad
    with pytest.raises(CorruptFile, match="NaN"):
        Statistics.load(broken.save(tmp_path / "a.safetensors"))
    with pytest.raises(CorruptFile, match="NaN"):
        Statistics.from_npz(broken.to_npz(tmp_path / "a.npz"))


def test_other_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CorruptFile, match="format"):
        Statistics.load(tmp_path / "a.safetensors")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        Statistics.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        Statistics.from_npz(tmp_path / "none.npz")


def test_header_is_readable_by_others(tmp_path):
    path = statistics().save(tmp_path / "layer_001.safetensors")
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("second_moment").shape == (64, 64)
        assert '"sha256"' in file.metadata()["fastedit"]


# ---- does it belong to the model --------------------------------------------------------------------------


def test_check_accepts_its_model_and_refuses_others():
    model = tiny_model("llama")
    statistics(model=model).check(model)
    statistics().check(model)  # nothing recorded: the width decides
    with pytest.raises(BaseMismatch, match="width"):
        statistics(width=60).check(model)
    with pytest.raises(BaseMismatch, match="layers 0 to 2"):
        statistics(layer=7).check(model)
    other = tiny_model("llama", seed=5)
    with pytest.raises(BaseMismatch, match="other weights"):
        statistics(model=model).check(other)
    statistics(model=model).check(other, base_fingerprint=fingerprint(model))


def test_directory_round_trip(tmp_path):
    model = tiny_model("llama")
    paths = save_directory({2: statistics(2), 0: statistics(0)}, tmp_path)
    assert [path.name for path in paths] == ["layer_000.safetensors", "layer_002.safetensors"]
    assert list(load_directory(tmp_path, model)) == [0, 2]
    assert list(load_directory(tmp_path, layers=[2])) == [2]
    with pytest.raises(FileNotFoundError, match="layer 1"):
        load_directory(tmp_path, model, [1, 2])
    with pytest.raises(FileNotFoundError, match="no statistics"):
        load_directory(tmp_path / "empty")
    save_directory({1: statistics(1, width=60)}, tmp_path)
    with pytest.raises(BaseMismatch):
        load_directory(tmp_path, model)


def test_directory_of_another_library(tmp_path):
    model = tiny_model("llama")
    first = statistics()
    first.to_npz(npz_path(tmp_path, "org/name", MODULE))
    loaded = load_directory(tmp_path, model, [1])
    assert relative_error(loaded[1].second_moment, first.second_moment) < 1e-6
    first.to_npz(npz_path(tmp_path, "org/name", MODULE, dataset="wikitext"))
    with pytest.raises(ValueError, match="several files"):
        load_directory(tmp_path, model, [1])


# ---- the files of ROME, MEMIT, EasyEdit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, f"name/wikipedia_stats/{MODULE}_float32_mom2_100000.npz"),
        ({"style": "memit"}, f"org_name/wikipedia_stats/{MODULE}_float32_mom2_100000.npz"),
        (
            {"dataset": "wikitext", "precision": "float64", "sample_size": None},
            f"name/wikitext_stats/{MODULE}_float64_mom2.npz",
        ),
    ],
)
def test_npz_path(settings, expected, tmp_path):
    assert npz_path(tmp_path, "org/name", MODULE, **settings) == tmp_path / expected


def test_npz_style_is_checked(tmp_path):
    with pytest.raises(ValueError, match="style"):
        npz_path(tmp_path, "a", "b", style="rome")


def published_state(path, sample_size):
    """What their ``load_cached_state`` and ``SecondMoment.load_state_dict`` do with a file."""

    def is_none(value):
        return (
            isinstance(value, np.ndarray)
            and value.ndim == 0
            and value.dtype == np.float64
            and struct.unpack(">Q", struct.pack(">d", value))[0] == 0xFFF8000000000002
        )

    with np.load(path) as archive:
        state = {name: None if is_none(archive[name]) else archive[name] for name in archive.files}
    if "sample_size" not in state or state["sample_size"] != sample_size:
        return None
    mine = {name.removeprefix("mom2."): value for name, value in state.items() if name.startswith("mom2.")}
    return torch.from_numpy(mine["mom2"]) / int(mine["count"]), int(mine["count"]), str(mine["constructor"])


@pytest.mark.parametrize("sample_size", [100_000, None])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_npz_is_what_their_reader_expects(precision, sample_size, tmp_path):
    first = statistics()
    path = npz_path(tmp_path, "org/name", MODULE, precision=precision, sample_size=sample_size)
    first.to_npz(path, sample_size=sample_size)
    assert published_state(path, 5) is None
    moment, count, constructor = published_state(path, sample_size)
    assert count == 500
    assert moment.dtype == getattr(torch, precision)
    assert constructor.endswith("SecondMoment()")
    assert relative_error(moment, first.second_moment) < 2e-7


def test_npz_round_trip(tmp_path):
    first = statistics()
    loaded = Statistics.from_npz(first.to_npz(tmp_path / "any.npz"))
    assert (loaded.layer, loaded.module, loaded.count, loaded.meta) == (1, MODULE, 500, first.meta)
    assert relative_error(loaded.second_moment, first.second_moment) < 1e-7


def their_file(path, **changes):
    keys = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    entries = {
        "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
        "mom2.count": 300,
        "mom2.mom2": keys.T @ keys,
        "sample_size": 100_000,
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})
    return keys


def test_npz_of_another_library(tmp_path, caplog):
    path = npz_path(tmp_path, "gpt2-xl", "transformer.h.17.mlp.c_proj")
    keys = their_file(path)
    loaded = Statistics.from_npz(path)
    assert (loaded.layer, loaded.module, loaded.count) == (17, "transformer.h.17.mlp.c_proj", 300)
    assert relative_error(loaded.second_moment, torch.from_numpy(keys.T @ keys) / 300) < 1e-6
    assert "does not say" in caplog.text
    with pytest.raises(BaseMismatch):
        loaded.check(tiny_model("gpt2"))


def test_npz_without_layer_in_its_name(tmp_path):
    their_file(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match="layer="):
        Statistics.from_npz(tmp_path / "stats.npz")
    assert Statistics.from_npz(tmp_path / "stats.npz", layer=4).layer == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"mom2.count": None},
        {"mom2.mom2": None},
        {"mom2.count": 0},
        {"mom2.mom2": np.zeros((3, 4), np.float32)},
        {"mom2.mom2": np.full((3, 3), np.nan)},
        {"mom2.mom2": np.array([{"pickled": 1}], dtype=object)},
        {"fastedit.sha256": "0" * 64},
    ],
    ids=["no count", "no matrix", "zero count", "not square", "nan", "pickle", "checksum"],
)
def test_npz_with_wrong_content_is_refused(changes, tmp_path):
    their_file(tmp_path / "a.0.b_float32_mom2.npz", **changes)
    with pytest.raises(CorruptFile, match=r"a\.0\.b"):
        Statistics.from_npz(tmp_path / "a.0.b_float32_mom2.npz")


@pytest.mark.parametrize("keep", [0, 3, 100, 9000, -30])
def test_npz_truncated_is_refused(keep, tmp_path):
    path = statistics().to_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile):
        Statistics.from_npz(path)


def test_npz_that_is_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    with pytest.raises(CorruptFile):
        Statistics.from_npz(tmp_path / "a.npy")


def test_npz_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        statistics().to_npz(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_collected_module_names_are_theirs():
    assert describe(tiny_model("llama")).projection(1).name == MODULE
    assert describe(tiny_model("gpt2")).projection(1).name == "transformer.h.1.mlp.c_proj"
