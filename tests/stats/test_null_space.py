"""The null-space projectors that AlphaEdit reads."""

from __future__ import annotations

import json

import pytest
import torch
from model_configs import tiny_model, tiny_tokenizer

from fastedit import NumericalError
from fastedit.cli.main import main
from fastedit.models import describe
from fastedit.stats import Statistics
from fastedit.stats.null_space import projector, write_null_spaces

THRESHOLD = 2e-2


def moment(d: int, small: int, seed: int) -> torch.Tensor:
    """(d, d) with ``small`` eigenvalues below the threshold."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = torch.cat((torch.linspace(1e-4, 1e-2, small), torch.linspace(0.1, 3, d - small))).double()
    return (vectors * values @ vectors.T).float()


def official(second_moment: torch.Tensor) -> torch.Tensor:
    """The published code's way: left singular vectors of small singular values."""
    left, values, _ = torch.linalg.svd(second_moment.double(), full_matrices=False)
    kept = left[:, values < THRESHOLD]
    return kept @ kept.T


@pytest.mark.parametrize("small", [0, 5, 29, 32])
def test_projector_is_that_of_the_svd(small: int) -> None:
    second_moment = moment(32, small, seed=1)
    found, about = projector(second_moment, THRESHOLD, 3)
    assert (about.layer, about.width, about.kept, about.ambiguous) == (3, 32, small, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), official(second_moment), atol=1e-5, rtol=0)


def test_an_eigenvalue_at_the_threshold_is_reported() -> None:
    second_moment = torch.diag(torch.tensor([1e-3, THRESHOLD * (1 + 3e-7), 1.0]))
    assert projector(second_moment, THRESHOLD, 0)[1].ambiguous == 1


def test_file_has_one_slice_a_layer(tmp_path) -> None:
    moments = {1: moment(16, 4, 1), 2: moment(16, 9, 2)}
    found = write_null_spaces(tmp_path / "P.pt", [1, 2], moments.__getitem__, THRESHOLD)
    stack = torch.load(tmp_path / "P.pt", weights_only=True)
    assert stack.shape == (2, 16, 16)
    assert stack.dtype == torch.float32
    torch.testing.assert_close(stack[1].double(), official(moments[2]), atol=1e-5, rtol=0)
    assert [each.kept for each in found] == [4, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["P.pt"]


def test_what_fails_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "P.pt"
    path.write_text("old")
    with pytest.raises(NumericalError, match="layer 2"):
        moments = {1: moment(8, 2, 1), 2: torch.full((8, 8), float("nan"))}
        write_null_spaces(path, [1, 2], moments.__getitem__, THRESHOLD)
    with pytest.raises(ValueError, match="width 8 and 16"):
        widths = {1: moment(8, 2, 1), 2: moment(16, 2, 1)}
        write_null_spaces(path, [1, 2], widths.__getitem__, THRESHOLD)
    with pytest.raises(ValueError, match="positive"):
        write_null_spaces(path, [1], moments.__getitem__, 0.0)
    assert [each.name for each in tmp_path.iterdir()] == ["P.pt"]
    assert path.read_text() == "old"


def test_command(tmp_path, capsys) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    projection = describe(model).projection(1)
    statistics = Statistics(1, projection.name, moment(projection.d_in, 7, 1), 1000)
    statistics.save(tmp_path / "stats" / "layer_001.safetensors")
    command = ["nullspace", str(tmp_path / "model"), "--stats", str(tmp_path / "stats"), "--layers", "1"]
    out = ["--out", str(tmp_path / "P.pt"), "--device", "cpu"]
    assert main([*command, *out, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert (layer["layer"], layer["kept"], layer["width"]) == (1, 7, projection.d_in)
    assert torch.load(tmp_path / "P.pt", weights_only=True).shape == (1, projection.d_in, projection.d_in)
    assert main([*command, *out]) == 0
    assert "removed" in capsys.readouterr().out
