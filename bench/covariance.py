"""Second moment of activations: fastedit's backends against what editing code and BLAS users call instead."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import backend, covariance_, covariance_reference

OPS = ("covariance_",)

FULL = {  # (tokens, d): on a CPU widths of GPT-2 small, of a 1B model, GPT-2 XL; on a GPU up to Llama-3-8B
    "cpu": [(4096, 3072), (2048, 4096), (1024, 6400), (256, 4096), (512, 768)],
    "cuda": [(32768, 6400), (32768, 4096), (32768, 14336), (8192, 11008)],
}
QUICK = {"cpu": [(512, 1024)], "cuda": [(8192, 4096)]}
DTYPES = ("bfloat16", "float16", "float32")
TOLERANCE = 1e-5
SLOW_PRODUCT = (
    1 << 30
)  # multiply-adds up to which torch's float16 product is waited for: a CPU may do 1e9 a second

Run = Callable[[torch.Tensor], Any]


# ---- who can do it --------------------------------------------------------------------------------------


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


def numpy_product(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """NumPy's aᵀ a, for which it calls BLAS's symmetric product and mirrors the result."""
    rows = x[mask].float().numpy()
    out = cov.numpy()
    out += rows.T @ rows


def syrk(cov: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> None:
    """BLAS's symmetric product by SciPy, float32, then the mirror."""
    import numpy as np
    from scipy.linalg.blas import ssyrk

    rows = x[mask].float().numpy()
    out = ssyrk(1.0, rows.T, beta=1.0, c=cov.numpy().T, overwrite_c=1, lower=0)  # Fortran's upper: our lower
    lower = out.T
    cov.copy_(torch.from_numpy(np.tril(lower) + np.tril(lower, -1).T))


def providers(x: torch.Tensor, mask: torch.Tensor, device: str) -> dict[str, Run]:
    out: dict[str, Run] = {
        "torch fp32 upcast (ROME)": lambda cov: rome(cov, x, mask),
        "torch fp32 addmm_": lambda cov: fused(cov, x, mask),
    }
    slow = device == "cpu" and x.dtype == torch.float16
    if x.dtype != torch.float32 and not (slow and x.shape[0] * x.shape[1] ** 2 > SLOW_PRODUCT):
        out["torch mm in x's dtype"] = lambda cov: in_dtype(cov, x, mask)
    if device == "cpu":
        out["NumPy a.T @ a"] = lambda cov: numpy_product(cov, x, mask)
        try:
            import scipy.linalg.blas  # noqa: F401

            out["SciPy ssyrk"] = lambda cov: syrk(cov, x, mask)
        except ImportError:
            pass
    return out


# ---- problems -------------------------------------------------------------------------------------------


def tokens(device: str, n_tokens: int, d: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_tokens, d, generator=generator, device=device).to(common.DTYPES[dtype])
    return x, torch.rand(n_tokens, generator=generator, device=device) > 0.1


def compared(
    runs: dict[str, Run], x: torch.Tensor, mask: torch.Tensor, what: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The runs, each bound to a cov of its own, and their errors against float64; stops if one is wrong."""
    d = x.shape[1]
    reference = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    covariance_reference(reference, x, mask)
    bound: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, run in runs.items():
        cov = torch.zeros(d, d, device=x.device)
        run(cov)
        errors[name] = ((cov - reference).norm() / reference.norm()).item()
        if not errors[name] < (1e-2 if "x's dtype" in name else TOLERANCE):
            raise SystemExit(f"{name} is wrong at {what}: relative error {errors[name]:.2g}")
        bound[name] = functools.partial(run, cov)
    return bound, errors


def cost(x: torch.Tensor, mask: torch.Tensor) -> tuple[int, int]:
    """The fewest bytes and FLOPs: tokens and mask read once, cov read and written once; one triangle."""
    counted, d = int(mask.sum()), x.shape[1]
    return counted * d * x.element_size() + len(x) + 2 * 4 * d * d, counted * d * (d + 1)


def ours(name: str, x: torch.Tensor, mask: torch.Tensor) -> Run:
    def run(cov: torch.Tensor) -> None:
        with backend.use_backend(name):
            covariance_(cov, x, mask)

    return run


def problem(device: str, n_tokens: int, d: int, dtype: str) -> common.Problem:
    x, mask = tokens(device, n_tokens, d, dtype)
    can, cannot = common.ours("covariance_", device, torch.zeros(d, d, device=device), x)
    runs = {common.OURS + name: ours(name, x, mask) for name in can}
    shape = f"{n_tokens}x{d}"
    bound, errors = compared({**runs, **providers(x, mask, device)}, x, mask, f"{shape} {dtype}")
    return common.Problem("covariance_", shape, dtype, bound, errors, *cost(x, mask), cannot)


def half_masked(device: str, n_tokens: int, d: int, dtype: str) -> common.Problem:
    """What skipping masked tokens costs: beside the same tokens, selected before the clock starts."""
    x, _ = tokens(device, n_tokens, d, dtype)
    mask = torch.arange(n_tokens, device=device) % 2 == 0
    selected, every = x[mask], torch.ones(int(mask.sum()), dtype=torch.bool, device=device)
    can, cannot = common.ours("covariance_", device, torch.zeros(d, d, device=device), x)
    runs = {common.OURS + name: ours(name, x, mask) for name in can}
    runs["same tokens, selected before"] = ours(can[-1], selected, every)
    shape = f"{n_tokens}x{d} half masked"
    bound, errors = compared(runs, x, mask, shape)
    return common.Problem("covariance_", shape, dtype, bound, errors, *cost(x, mask), cannot)


def layers(device: str, n_layers: int, n_tokens: int, d: int, dtype: str) -> common.Problem:
    """Narrow layers in one call, and one after the other. The error is that of the first layer."""
    x, mask = tokens(device, n_tokens, d, dtype)
    xs = [x, *(x.clone() for _ in range(n_layers - 1))]
    covs = [torch.zeros(d, d, device=device) for _ in xs]
    can, cannot = common.ours("covariance_", device, covs[0], x)

    def one_call(name: str) -> Run:
        def run(cov: torch.Tensor) -> None:
            with backend.use_backend(name):
                covariance_([cov, *covs[1:]], xs, mask)

        return run

    def one_by_one(run: Callable[..., None]) -> Run:
        def each(cov: torch.Tensor) -> None:
            for c, rows in zip([cov, *covs[1:]], xs, strict=True):
                run(c, rows, mask)

        return each

    runs = {common.OURS + name: one_call(name) for name in can}
    runs["fastest backend, one call a layer"] = one_by_one(covariance_)
    runs["torch fp32 addmm_"] = one_by_one(fused)
    shape = f"{n_layers} x {n_tokens}x{d}"
    bound, errors = compared(runs, x, mask, shape)
    n_bytes, flops = cost(x, mask)
    return common.Problem(
        "covariance_", shape, dtype, bound, errors, n_layers * n_bytes, n_layers * flops, cannot
    )


# ---- AVX2 -----------------------------------------------------------------------------------------------

_CHILD = """
import json, sys, torch
from fastedit.bench import covariance
n_tokens, d, dtype, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
x, mask = covariance.tokens("cpu", n_tokens, d, dtype)
runs, errors = covariance.compared({"torch": lambda cov: covariance.fused(cov, x, mask)}, x, mask, "AVX2")
print(errors["torch"], flush=True)
for _ in sys.stdin:
    runs["torch"]()
    print("done", flush=True)
"""


def avx2(n_tokens: int, d: int, dtype: str) -> common.Problem | None:
    """Our kernel and torch, both without AVX-512; torch in a process of its own, which takes that once."""
    module: Any = backend.extension()
    if isinstance(module, str) or module.info()["cpu_isa"] == "scalar":
        return None
    x, mask = tokens("cpu", n_tokens, d, dtype)
    shape = f"{n_tokens}x{d} AVX2"
    bound, errors = compared(
        {common.OURS + "cpp": lambda cov: module.covariance(cov, x, mask, isa="avx2")}, x, mask, shape
    )
    restricted = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps([n_tokens, d, dtype, torch.get_num_threads()])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env={**os.environ, **restricted},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    to_child, from_child = child.stdin, child.stdout

    def run() -> None:
        to_child.write("run\n")
        from_child.readline()

    name = "torch fp32 addmm_, AVX2"
    errors[name] = float(from_child.readline())
    bound[name] = run
    return common.Problem("covariance_", shape, dtype, bound, errors, *cost(x, mask))


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    for n_tokens, d in (QUICK if quick else FULL)[device]:
        for dtype in DTYPES:
            yield problem(device, n_tokens, d, dtype)
    if quick:
        return
    yield half_masked(device, 4096, 3072, "bfloat16")
    yield layers(device, 24, 512, 256, "bfloat16")
    if device == "cpu":
        for dtype in ("bfloat16", "float32"):
            found = avx2(2048, 3072, dtype)
            if found is not None:
                yield found


if __name__ == "__main__":
    common.main("covariance")
