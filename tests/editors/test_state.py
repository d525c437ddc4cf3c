"""Going on with a sequence of edits in another process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_configs import tiny_model
from tiny import FACTS, bits, make, same_bits

from fastedit import BaseMismatch, CorruptFile, Fact

LATER = [Fact("The capital of {} is", "Italy", "Oslo"), Fact("{} was born in", "Marie Curie", "Rome")]
PARAMS = {
    "alphaedit": {"steps": 6, "lr": 0.02, "layers": (0, 1)},
    "memit-cache": {"steps": 6, "lr": 0.02, "layers": (0, 1)},
    "nse": {"steps": 6, "lr": 0.02, "layers": (0, 1)},
    "nse all": {"steps": 6, "lr": 0.02, "layers": (0, 1), "mass": 1.0},
    "ultraedit": {"lr": 1e-3},
}


def continued(name: str, directory: Path) -> tuple[object, object]:
    """A model with one batch on it, without any record of the edit, and its editor's saved state."""
    model = tiny_model("llama")
    editor = make(name.split()[0], model, params=PARAMS[name])
    editor.edit(FACTS)
    editor.save_state(directory / "state")
    return copy.deepcopy(model), editor


@pytest.mark.parametrize("name", PARAMS)
def test_a_saved_state_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    copied, editor = continued(name, tmp_path)
    resumed = make(name.split()[0], copied, params=PARAMS[name])
    resumed.load_state(tmp_path / "state")
    editor.edit(LATER)
    resumed.edit(LATER)
    for (weight, ours), theirs in zip(copied.named_parameters(), editor.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=weight)


def test_without_the_state_the_weights_differ(tmp_path: Path) -> None:
    copied, editor = continued("memit-cache", tmp_path)
    fresh = make("memit-cache", copied, params=PARAMS["memit-cache"])
    editor.edit(LATER)
    fresh.edit(LATER)
    assert not same_bits(copied, bits(editor.model))


def test_targets_made_ahead_are_part_of_the_state(tmp_path: Path) -> None:
    model = tiny_model("llama")
    editor = make("nse", model, params=PARAMS["nse"])
    editor.optimise_targets([*FACTS, *LATER])
    editor.save_state(tmp_path / "state")
    resumed = make("nse", copy.deepcopy(model), params=PARAMS["nse"])
    resumed.load_state(tmp_path / "state")
    assert resumed.made_ahead.keys() == editor.made_ahead.keys()
    editor.edit(FACTS)
    resumed.edit(FACTS)
    assert same_bits(resumed.model, bits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "does not have the bits"),
        ("params", "the saved state has params"),
        ("method", "the saved state has method"),
        ("profile", "the saved state has profile"),
    ],
)
def test_the_state_of_another_run_is_refused(change: str, message: str, tmp_path: Path) -> None:
    copied, _ = continued("memit-cache", tmp_path)
    method = "alphaedit" if change == "method" else "memit-cache"
    params = {**PARAMS["memit-cache"], **({"lr": 0.5} if change == "params" else {})}
    resumed = make(method, copied, params=params, profile="official" if change == "profile" else "clean")
    if change == "weights":
        with torch.no_grad():
            copied.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(BaseMismatch, match=message):
        resumed.load_state(tmp_path / "state")
    assert len(resumed.history) == 0


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    copied, _ = continued("memit-cache", tmp_path)
    resumed = make("memit-cache", copied, params=PARAMS["memit-cache"])
    path = tmp_path / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptFile, match="checksum"):
        resumed.load_state(tmp_path / "state")
    with pytest.raises(CorruptFile, match="no editor's state"):
        resumed.load_state(tmp_path)


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    editor = make("memit-cache", tiny_model("llama"), params=PARAMS["memit-cache"])
    with pytest.raises(FileExistsError, match="something other"):
        editor.save_state(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
