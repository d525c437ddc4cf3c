"""The registry: choosing, refusing, explaining."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import fastedit
from fastedit.ops import backend, check, covariance_, low_rank_update_

CPU = torch.device("cpu")


@pytest.fixture
def forget_reasons(monkeypatch):
    """Forget what was logged and probed before, and again after the test."""
    monkeypatch.setattr(check, "_said", set())
    backend.extension.cache_clear()
    backend.missing.cache_clear()
    yield
    backend.extension.cache_clear()
    backend.missing.cache_clear()


def small():
    return torch.zeros(3, 3), torch.ones(2, 3)


def test_table_covers_every_op_and_backend():
    rows = backend.table()
    names = {row.op for row in rows}
    assert {"covariance_", "low_rank_update_"} <= names
    assert {(row.op, row.backend) for row in rows} == {(op, b) for op in names for b in backend.NAMES}
    assert all(row.available != bool(row.reason) for row in rows)
    assert all(row.available for row in rows if row.backend == "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_table_says_why_there_is_no_gpu():
    reasons = {row.backend: row.reason for row in backend.table() if row.op == "covariance_"}
    assert any(
        said in reasons["cuda"]
        for said in ("no NVIDIA driver", "without CUDA kernels", "was not built", "_C")
    )
    assert any(said in reasons["triton"] for said in ("no NVIDIA driver", "tests only", "not installed"))


def test_use_backend_names_are_checked():
    with pytest.raises(ValueError, match="backend must be torch, cpp, triton or cuda, got 'cupy'"):
        with backend.use_backend("cupy"):
            pass


def test_use_backend_nests_and_ends():
    with fastedit.use_backend("torch"):
        with fastedit.use_backend("cpp"):
            assert backend.requested() == "cpp"
        assert backend.requested() == "torch"
    assert backend.requested() is None


def test_use_backend_is_of_one_thread():
    seen = []
    with backend.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", "torch")
    cov, x = small()
    assert backend.choose("covariance_", cov, x) == "torch"
    covariance_(cov, x)
    assert backend.served("covariance_") == "torch"
    monkeypatch.setenv("FASTEDIT_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTEDIT_BACKEND: backend must be torch, cpp, triton or cuda"):
        covariance_(cov, x)


def test_context_wins_over_environment(monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", "cuda")
    with backend.use_backend("torch"):
        assert backend.choose("covariance_", *small()) == "torch"


def test_explicit_choice_that_cannot_serve_raises_before_writing():
    cov, x = small()
    with backend.use_backend("cuda"):
        with pytest.raises(
            fastedit.BackendUnavailable, match="covariance_: backend 'cuda' was chosen by name"
        ) as said:
            covariance_(cov, x)
    assert "Able to: " in str(said.value)
    assert not cov.any()


def test_explicit_backend_that_does_not_implement_the_op_raises(monkeypatch):
    op = backend._ops["covariance_"]
    monkeypatch.setattr(op, "providers", [p for p in op.providers if p.backend == "torch"])
    with backend.use_backend("cpp"):
        with pytest.raises(fastedit.BackendUnavailable, match="not implemented"):
            covariance_(*small())


def test_automatic_choice_without_the_extension_is_torch_and_warns_once(forget_reasons, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastedit._C", None)  # import raises ModuleNotFoundError
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="fastedit.ops"):
        for _ in range(3):
            low_rank_update_(weight, torch.ones(3, 1), torch.ones(2, 1))
    assert backend.served("low_rank_update_") == "torch"
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(
        "low_rank_update_: torch serves on cpu, about 3 times slower than cpp, which cannot: fastedit._C"
    )
    assert (weight == 3).all()


def test_a_compiled_module_of_another_installation_is_not_used(forget_reasons, monkeypatch, tmp_path):
    other = types.ModuleType("fastedit._C")
    other.info, other.__file__ = dict, str(tmp_path / "_C.so")
    monkeypatch.setitem(sys.modules, "fastedit._C", other)
    assert backend.extension() == (
        f"fastedit._C is of another installation, {tmp_path / '_C.so'}: install fastedit again"
    )
    other.__file__ = str(Path(fastedit.__file__).parent / "_C.so")
    backend.extension.cache_clear()
    assert backend.extension() is other


def test_a_cheap_fallback_does_not_warn(forget_reasons, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fastedit._C", None)
    with caplog.at_level(logging.WARNING, logger="fastedit.ops"):
        covariance_(torch.zeros(3, 3), torch.ones(2, 3))
    assert not caplog.records


def test_importing_loads_neither_triton_nor_the_extension(tmp_path):
    code = (
        "import sys, fastedit, fastedit.ops, torch\n"
        "fastedit.ops.covariance_reference(torch.zeros(2, 2), torch.ones(1, 2))\n"
        "loaded = [m for m in ('triton', 'fastedit._C', 'transformers') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_triton_serves_a_cpu_tensor_only_when_interpreted_and_chosen():
    reason = backend.missing("triton", CPU, False)
    assert reason
    assert backend.choose("covariance_", *small()) != "triton"


def test_ops_are_there_for_other_libraries():
    cov, x = small()
    torch.ops.fastedit.covariance_(cov, x)
    torch.ops.fastedit.covariance_(cov, x, mask=torch.tensor([True, False]))
    assert torch.equal(cov, torch.full((3, 3), 3.0))
    with pytest.raises(ValueError, match="covariance_: x must have shape"):
        torch.ops.fastedit.covariance_(cov, x[:, :2])


def test_autocast_and_tf32_settings_do_not_lower_precision():
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    plain, lowered = torch.zeros(64, 64), torch.zeros(64, 64)
    level = torch.get_float32_matmul_precision()
    with backend.use_backend("torch"):
        covariance_(plain, x)
        try:
            torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                covariance_(lowered, x)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(level)
    assert torch.equal(plain, lowered)


def test_in_place_ops_raise_the_version_counter():
    cov, x = small()
    before = cov._version
    covariance_(cov, x)
    assert cov._version > before


def test_tensors_made_in_inference_mode_can_be_written():
    with torch.inference_mode():
        cov, x = small()
        covariance_(cov, x)
    assert torch.equal(cov, torch.full((3, 3), 2.0))
