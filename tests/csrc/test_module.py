"""What fastedit._C says about itself, and what it does where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import fastedit

_C = pytest.importorskip("fastedit._C", reason="fastedit._C was not built", exc_type=ImportError)


def test_info():
    info = _C.info()
    assert info["version"] == fastedit.__version__
    assert info["cpu_isa"] in ("scalar", "avx2", "avx512", "avx512_bf16")
    assert info["openmp_max_threads"] >= 1
    assert isinstance(info["cuda_archs"], list)
    assert info["cuda_available"] == (info["cuda_reason"] == "")
    if not info["cuda_built"]:
        assert info["cuda_reason"].startswith("built without CUDA kernels (")
        assert info["cuda_archs"] == []
    elif not torch.cuda.is_available() and not info["cuda_available"]:
        assert "insufficient" not in info["cuda_reason"]


def test_threads_are_torch_s():
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert _C.info()["openmp_max_threads"] == n
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (300, 129), (9001, 257), (700, 2048)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_covariance_cuda(dtype, shape):
    if not _C.info()["cuda_available"]:
        pytest.skip(_C.info()["cuda_reason"])
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    mask = torch.rand(shape[0], device="cuda") > 0.3
    for cov_dtype in (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.float64):
        cov = torch.zeros(shape[1], shape[1], device="cuda", dtype=cov_dtype)
        _C.covariance(cov, x, mask)
        kept = x[mask].double()
        assert (cov.double() - kept.T @ kept).norm() <= 1e-5 * (kept.T @ kept).norm()
        assert torch.equal(cov, cov.T)
        again = torch.zeros_like(cov)
        _C.covariance(again, x, mask)
        assert torch.equal(cov, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (65, 129, 17), (300, 1000, 33)], ids=lambda s: "x".join(map(str, s))
)
def test_low_rank_cuda(dtype, stochastic, shape):
    if not _C.info()["cuda_available"]:
        pytest.skip(_C.info()["cuda_reason"])
    torch.manual_seed(0)
    d_out, d_in, rank = shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(d_out, d_in).to(dtype)
    # sums that float32 holds exactly, so that the bits agree with the CPU's
    left = torch.randint(-4, 5, (d_out, rank)).to(work)
    right = torch.randint(-4, 5, (d_in, rank)).to(work) * 2.0**-12
    for transposed in (False, True):
        stored = weight.T.contiguous() if transposed else weight.clone()
        on_gpu, norm, norm_gpu = stored.cuda(), torch.zeros(1), torch.zeros(1, device="cuda")
        _C.low_rank_update(stored, left, right, 0.5, transposed, stochastic, 7, norm)
        _C.low_rank_update(on_gpu, left.cuda(), right.cuda(), 0.5, transposed, stochastic, 7, norm_gpu)
        assert (on_gpu.cpu().double() - stored.double()).norm() <= 1e-6 * stored.double().norm()
        assert norm_gpu.item() == pytest.approx(norm.item(), rel=1e-5)
