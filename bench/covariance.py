"""Second moment of activations: fastedit's backends against what editing code and BLAS users call instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import covariance_, covariance_reference

OPS = ("covariance_",)

FULL = {  # (tokens, d): on a CPU widths of GPT-2 small, of a 1B model, GPT-2 XL; on a GPU up to Llama-3-8B
    "cpu": [(4096, 3072), (2048, 4096), (1024, 6400)],
    "cuda": [(32768, 6400), (32768, 4096), (32768, 14336), (8192, 11008)],
}
QUICK = {"cpu": [(512, 1024)], "cuda": [(8192, 4096)]}
DTYPES = ("bfloat16", "float16", "float32")
SLACK = {"bfloat16": 1e-5, "float16": 1e-5, "float32": 1e-5}


def rome(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """What ROME and MEMIT do: select the rows, upcast, full product, add."""
    rows = x[mask].float()
    cov += rows.T @ rows


def in_dtype(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """The product in the tokens' own dtype, which rounds its result to that dtype."""
    rows = x[mask]
    cov += rows.T @ rows


def fused(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """The best single call of torch in float32: addmm_ into the accumulator."""
    rows = x[mask].float()
    cov.addmm_(rows.T, rows)


def syrk(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """BLAS's symmetric product by SciPy, float32, then the mirror."""
    import numpy as np
    from scipy.linalg.blas import ssyrk

    rows = x[mask].float().numpy()
    out = ssyrk(1.0, rows.T, beta=1.0, c=cov.numpy().T, overwrite_c=1, lower=0)  # Fortran's upper: our lower
    lower = out.T
    cov.copy_(torch.from_numpy(np.tril(lower) + np.tril(lower, -1).T))


def providers(x: torch.Tensor, mask: torch.Tensor, device: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "torch fp32 upcast (ROME)": lambda cov: rome(cov, x, mask),
        "torch fp32 addmm_": lambda cov: fused(cov, x, mask),
    }
    if x.dtype == torch.bfloat16 or (device == "cuda" and x.dtype == torch.float16):
        out["torch mm in x's dtype"] = lambda cov: in_dtype(cov, x, mask)
    if device == "cpu":
        try:
            import scipy.linalg.blas  # noqa: F401

            out["SciPy ssyrk"] = lambda cov: syrk(cov, x, mask)
        except ImportError:
            pass
    return out


def problem(device: str, n_tokens: int, d: int, dtype: str) -> common.Problem:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_tokens, d, generator=generator, device=device).to(common.DTYPES[dtype])
    mask = torch.rand(n_tokens, generator=generator, device=device) > 0.1
    reference = torch.zeros(d, d, dtype=torch.float64, device=device)
    covariance_reference(reference, x, mask)
    can, cannot = common.ours("covariance_", device, torch.zeros(d, d, device=device), x)
    calls = {
        common.OURS + name: lambda cov, name=name: common.by_backend(
            name, lambda: covariance_(cov, x, mask)
        )()
        for name in can
    }
    runs, errors = {}, {}
    for name, run in {**calls, **providers(x, mask, device)}.items():
        cov = torch.zeros(d, d, device=device)
        run(cov)
        errors[name] = ((cov - reference).norm() / reference.norm()).item()
        tolerance = 1e-2 if "x's dtype" in name else SLACK[dtype]
        if not errors[name] < tolerance:
            raise SystemExit(f"{name} is wrong at {n_tokens}x{d} {dtype}: relative error {errors[name]:.2g}")
        runs[name] = lambda run=run, cov=cov: run(cov)
    # the fewest: one triangle of products; tokens and mask read once, cov read and written once
    counted = int(mask.sum())
    n_bytes = counted * d * x.element_size() + n_tokens + 2 * 4 * d * d
    flops = counted * d * (d + 1)
    shape = f"{n_tokens}x{d}"
    return common.Problem("covariance_", shape, dtype, runs, errors, n_bytes, flops, cannot)


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for n_tokens, d in (QUICK if quick else FULL)[device]:
        for dtype in DTYPES:
            yield problem(device, n_tokens, d, dtype)


if __name__ == "__main__":
    common.main("covariance")
