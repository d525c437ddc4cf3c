"""Thin solves: the update of one layer for a batch of edits, against the solves of published editing code.

The work is that of a batch on a layer whose statistics are known: from keys K, and earlier keys, to the factors or
the matrix of the update; in float64 except where the published code solves in float32. Adding it to the weight is
left out: see bench/low_rank.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastedit.bench import common
from fastedit.ops import CovarianceFactor, Projector, RidgeSolver, ridge_factors

OPS = ("alphaedit", "memit", "nse", "ultraedit")
DTYPES = ("float64", "float32")

FULL = {"d": 4096, "n": 100, "earlier": 2000, "removed": 40, "d_out": 4096}
SEQUENCE = {"d": 3072, "n": 10, "earlier": 1000, "removed": 40}  # a layer of GPT-2 small, far into a sequence
QUICK = {"d": 512, "n": 16, "earlier": 128, "removed": 8, "d_out": 256}
LAMBDA_2, LAMBDA = 10.0, 15000.0
TOLERANCE = 1e-9


def spectrum(d: int, removed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis, and eigenvalues of a second moment of condition 1e7; the first ``removed`` are large."""
    generator = torch.Generator(device).manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device, dtype=torch.float64))
    values = torch.logspace(-2, -7, d, device=device, dtype=torch.float64)
    values[:removed] = 1.0
    return basis, values


def random_keys(d: int, n: int, seed: int, device: str) -> torch.Tensor:
    """Keys of a mean square norm of 12, as in the layers of Llama 3 that are edited."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(d, n, generator=generator, device=device) * (12 / d) ** 0.5


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def error_of(update: torch.Tensor, reference: torch.Tensor, keys: torch.Tensor, root: torch.Tensor) -> float:
    """Of X, with Δ = R Xᵀ: the larger of those of what the update does to the keys, and of its norm in the metric."""
    measures = [(keys.double().T @ x, root @ x) for x in (update.double(), reference)]
    return max(relative(ours, theirs) for ours, theirs in zip(*measures, strict=True))


def checked(errors: dict[str, float], tolerances: dict[str, float]) -> dict[str, float]:
    for name, error in errors.items():
        if not error < tolerances.get(name, TOLERANCE):
            raise SystemExit(f"{name} is wrong: relative error {error:.2g}")
    return errors


def alphaedit(size: dict[str, int], device: str) -> common.Problem:
    d, n, earlier = size["d"], size["n"], size["earlier"]
    basis, _ = spectrum(d, size["removed"], device)
    projector = Projector(basis[:, : size["removed"]].contiguous(), removed=True)
    dense = (
        torch.eye(d, device=device) - (basis[:, : size["removed"]] @ basis[:, : size["removed"]].T).float()
    )
    G, K = random_keys(d, earlier, 1, device), random_keys(d, n, 2, device)
    C_p = G @ G.T
    solvers = {
        common.OURS + "fp64": RidgeSolver(d, LAMBDA_2, projector=projector, primal_from=d),
        common.OURS + "fp32 keys": RidgeSolver(
            d, LAMBDA_2, projector=projector, primal_from=d, dtype=torch.float32
        ),
    }
    for solver in solvers.values():
        solver.append(G)

    def official() -> torch.Tensor:
        system = dense @ (K @ K.T + C_p) + LAMBDA_2 * torch.eye(d, device=device)
        return torch.linalg.solve(system, dense @ K)

    F = projector(K)
    PG = projector(G)
    metric = LAMBDA_2 * torch.eye(d, device=device, dtype=torch.float64) + PG @ PG.T
    factor = torch.linalg.cholesky(metric)

    def resident() -> torch.Tensor:
        """With a factor of the system without K, which is out of date after this batch."""
        B = torch.cholesky_solve(F, factor)
        return torch.linalg.solve(torch.eye(n, device=device, dtype=torch.float64) + F.T @ B, B, left=False)

    whole = solvers[common.OURS + "fp64"]

    def batch() -> torch.Tensor:
        """The keys of the batch before are appended, those of this one solved for."""
        whole.truncate(earlier - n)
        whole.append(G[:, earlier - n :])
        return fresh(whole.solve, K)

    runs: dict[str, Callable[[], Any]] = {name: partial(fresh, s.solve, K) for name, s in solvers.items()}
    runs[common.OURS + "fp64, append and solve"] = batch
    runs |= {"official, fp32 LU of d x d": official, "resident Cholesky factor, fp64": resident}
    reference = torch.linalg.solve(metric + F @ F.T, F)
    errors = {name: error_of(run(), reference, F, factor.T) for name, run in runs.items()}
    checked(errors, {"official, fp32 LU of d x d": 1e-3, common.OURS + "fp32 keys": 1e-5})
    flops = 4 * d * earlier * n + 2 * d * n * n + earlier * earlier * n
    n_bytes = 8 * (earlier * d + earlier**2 / 2 + 2 * d * n)
    return common.Problem("alphaedit", f"d{d} n{n} earlier{earlier}", "float64", runs, errors, n_bytes, flops)


def fresh(solve: Callable[[torch.Tensor], torch.Tensor], keys: torch.Tensor) -> torch.Tensor:
    """A solve that remembers nothing of the latest keys."""
    return solve(keys.view_as(keys))


def memit(size: dict[str, int], device: str) -> common.Problem:
    d, n = size["d"], size["n"]
    basis, values = spectrum(d, 1, device)
    C = (basis * values) @ basis.T
    C = (C + C.T) / 2
    generator = torch.Generator(device).manual_seed(3)
    noise = torch.randn(d, n, generator=generator, device=device, dtype=torch.float64)
    K = (basis * values.sqrt()) @ noise * 30
    factor, inverse = CovarianceFactor(C, LAMBDA), CovarianceFactor(C, LAMBDA, inverse=True)
    lower = torch.linalg.cholesky(LAMBDA * C)

    def official() -> torch.Tensor:
        return torch.linalg.solve(LAMBDA * C + K @ K.T, K)

    def resident() -> torch.Tensor:
        B = torch.cholesky_solve(K, lower)
        return torch.linalg.solve(torch.eye(n, device=device, dtype=torch.float64) + K.T @ B, B, left=False)

    runs: dict[str, Callable[[], Any]] = {
        common.OURS + "factor": lambda: fresh(factor.regularised, K),
        common.OURS + "inverse": lambda: fresh(inverse.regularised, K),
        "official, fp64 LU of d x d": official,
        "resident Cholesky factor, fp64": resident,
    }
    reference = factor.regularised(K)
    errors = {name: error_of(run(), reference, K, lower.T) for name, run in runs.items()}
    checked(errors, {"official, fp64 LU of d x d": 1e-6})
    flops = 2 * d * d * n + 2 * d * n * n
    return common.Problem("memit", f"d{d} n{n}", "float64", runs, errors, 8 * (d * d / 2 + 2 * d * n), flops)


def nse(size: dict[str, int], device: str) -> common.Problem:
    """With all neurons: MEMIT's system with the keys of earlier batches; each batch's are appended after it."""
    d, n, earlier = size["d"], size["n"], size["earlier"]
    basis, values = spectrum(d, 1, device)
    C = (basis * values) @ basis.T
    C = (C + C.T) / 2
    G, K = random_keys(d, earlier, 6, device), random_keys(d, n, 7, device)
    factor = CovarianceFactor(C, LAMBDA)
    factor.append(G)
    wide, C_p = K.double(), G.double() @ G.double().T

    def batch() -> torch.Tensor:
        """The keys of the batch before are appended, those of this one solved for."""
        factor.truncate(earlier - n)
        factor.append(G[:, earlier - n :])
        return fresh(factor.regularised, K)

    def official() -> torch.Tensor:
        return torch.linalg.solve(LAMBDA * C + C_p + wide @ wide.T, wide)

    runs: dict[str, Callable[[], Any]] = {
        common.OURS + "append and solve": batch,
        common.OURS + "solve": lambda: fresh(factor.regularised, K),
        "official, fp64 LU of d x d": official,
    }
    system = LAMBDA * C + C_p
    reference = torch.linalg.solve(system + wide @ wide.T, wide)
    root = torch.linalg.cholesky(system).T
    errors = {name: error_of(run(), reference, K, root) for name, run in runs.items()}
    checked(errors, dict.fromkeys(runs, 1e-6))
    flops = 2 * (2 * d * d * n + 4 * d * earlier * n + earlier * earlier * n)
    n_bytes = 2 * 8 * (d * d / 2 + earlier * d + earlier**2 / 2)
    return common.Problem("nse", f"d{d} n{n} earlier{earlier}", "float64", runs, errors, n_bytes, flops)


def ultraedit(size: dict[str, int], tokens: int, device: str) -> common.Problem:
    d, d_out = size["d"], size["d_out"]
    H = random_keys(d, tokens, 4, device).T.contiguous()
    V = random_keys(d_out, tokens, 5, device).T.contiguous()

    def official() -> torch.Tensor:
        return torch.linalg.solve(H.T @ H + torch.eye(d, device=device), H.T @ V)

    def thin() -> tuple[torch.Tensor, torch.Tensor]:
        return ridge_factors(H, V)

    wide = H.double()
    system = wide.T @ wide + torch.eye(d, device=device, dtype=torch.float64)
    reference = torch.linalg.solve(system, wide.T @ V.double()).T
    left, right = thin()
    errors = {
        common.OURS + "fp64 factors": relative(left @ right.T, reference),
        "official, fp32 LU of d x d": relative(official().T, reference),
    }
    checked(errors, {"official, fp32 LU of d x d": 1e-3})
    runs: dict[str, Callable[[], Any]] = {
        common.OURS + "fp64 factors": thin,
        "official, fp32 LU of d x d": official,
    }
    flops = tokens * tokens * (d + 2 * d_out)
    n_bytes = 4 * tokens * (d + d_out) + 8 * tokens * d_out
    return common.Problem(
        "ultraedit", f"d{d} T{tokens} d_out{d_out}", "float64", runs, errors, n_bytes, flops
    )


def problems(device: str, quick: bool) -> Iterator[common.Problem]:
    size = QUICK if quick else FULL
    for each in (size,) if quick else (size, SEQUENCE):
        yield alphaedit(each, device)
        yield memit(each, device)
        yield nse(each, device)
    for tokens in (size["n"], 3 * size["n"]):  # one token of an answer for each edit, or three
        yield ultraedit(size, tokens, device)


if __name__ == "__main__":
    common.main("solve")
