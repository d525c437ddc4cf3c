"""Second moment of activations: fastedit's backends against what editing code and BLAS users call instead."""

from __future__ import annotations

from typing import Any

import common
import torch

from fastedit.ops import backend, covariance_, covariance_reference

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
    def by(name: str) -> Any:
        def run(cov: torch.Tensor) -> None:
            with backend.use_backend(name):
                covariance_(cov, x, mask)

        return run

    cov = torch.zeros(x.shape[1], x.shape[1], device=device)
    out = {common.OURS + name: by(name) for name in common.ours("covariance_", device, cov, x)[0]}
    out["torch fp32 upcast (ROME)"] = lambda cov: rome(cov, x, mask)
    out["torch fp32 addmm_"] = lambda cov: fused(cov, x, mask)
    if x.dtype == torch.bfloat16 or (device == "cuda" and x.dtype == torch.float16):
        out["torch mm in x's dtype"] = lambda cov: in_dtype(cov, x, mask)
    if device == "cpu":
        try:
            import scipy.linalg.blas  # noqa: F401

            out["SciPy ssyrk"] = lambda cov: syrk(cov, x, mask)
        except ImportError:
            pass
    return out


def bench(device: str, n_tokens: int, d: int, dtype: str, options: Any, limit: dict[str, float]) -> list:
    head = {"op": "covariance_", "device": device, "shape": f"{n_tokens}x{d}", "dtype": dtype}
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_tokens, d, generator=generator, device=device).to(common.DTYPES[dtype])
    mask = torch.rand(n_tokens, generator=generator, device=device) > 0.1
    reference = torch.zeros(d, d, dtype=torch.float64, device=device)
    covariance_reference(reference, x, mask)
    runs, errors = {}, {}
    for name, run in providers(x, mask, device).items():
        cov = torch.zeros(d, d, device=device)
        run(cov)
        errors[name] = ((cov - reference).norm() / reference.norm()).item()
        tolerance = 1e-2 if "x's dtype" in name else SLACK[dtype]
        if not errors[name] < tolerance:
            raise SystemExit(f"{name} is wrong on {head}: relative error {errors[name]:.2g}")
        runs[name] = lambda run=run, cov=cov: run(cov)
    # the fewest: one triangle of products; tokens and mask read once, cov read and written once
    counted = int(mask.sum())
    flops = counted * d * (d + 1)
    n_bytes = counted * d * x.element_size() + n_tokens + 2 * 4 * d * d
    rows = common.measured(head, runs, errors, options.repetitions, n_bytes, flops, limit)
    _, cannot = common.ours("covariance_", device, torch.zeros(1, 1, device=device), x)
    return rows + [common.not_measured(head, common.OURS + name, reason) for name, reason in cannot.items()]


def main() -> None:
    options = common.arguments("covariance", __doc__)
    rows, limit = [], {}
    for device in options.devices:
        shapes = (QUICK if options.quick else FULL)[device]
        reason = common.no_gpu() if device == "cuda" else ""
        limit[device] = {} if reason else common.limits(device, DTYPES, options.quick)
        for n_tokens, d in shapes:
            for dtype in DTYPES:
                if reason:
                    head = {"op": "covariance_", "device": device, "shape": f"{n_tokens}x{d}", "dtype": dtype}
                    rows += [common.not_measured(head, common.OURS + b, reason) for b in ("triton", "cuda")]
                else:
                    rows += bench(device, n_tokens, d, dtype, options, limit[device])
    common.finish(options, rows, limit)


if __name__ == "__main__":
    main()
