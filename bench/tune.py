"""Search the configuration tables of the Triton kernels on the GPU of this machine.

For every shape the tiles, warps and pipeline stages of a grid are compiled, compared with the table's own choice,
and timed; the result is a table of the best beside what the table holds, and dictionary entries to paste into
``kernels/<stem>.py``. Nothing is changed. With --dry-run the grid is only compiled, for an architecture given, which
needs no GPU: registers, spills and shared memory of every configuration.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastedit.bench import common

EXAMPLES = """\
examples:
  python bench/tune.py                                      both stems, their usual shapes
  python bench/tune.py covariance --shape 32768x4096        one shape: tokens x d
  python bench/tune.py low_rank --shape 4096x14336x100 --dtype bfloat16
  python bench/tune.py --seconds 120 --out bench/results    stop after two minutes, keep a CSV
  python bench/tune.py covariance --dry-run 90              compile only, for sm_90; no GPU needed
"""
TOLERANCE = 1e-5  # relative to the table's own configuration, which the tests compare with float64

GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "covariance": {"tile": (64, 128), "tokens": (16, 32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    "low_rank": {
        "rows": (32, 64, 128), "columns": (64, 128, 256), "step": (16, 32, 64), "warps": (4, 8), "stages": (1, 2, 3),
    },
}  # fmt: skip
SHAPES = {
    "covariance": [(32768, 4096), (32768, 1600), (32768, 14336)],
    "low_rank": [(4096, 14336, 1), (4096, 14336, 16), (4096, 14336, 100), (4096, 14336, 1000)],
}
DTYPES = ("bfloat16", "float32")


@dataclass
class Case:
    """One shape and dtype: the table's configuration, and how to run or compile another."""

    stem: str
    shape: tuple[int, ...]
    dtype: str
    key: str  # of the configuration table
    current: tuple[int, ...]
    run: Callable[[tuple[int, ...] | None], torch.Tensor] | None  # returns what was written
    results: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    failed: int = 0


def candidates(stem: str, dtype: str, current: tuple[int, ...], quick: bool) -> Iterator[tuple[int, ...]]:
    """The table's own configuration first, then the grid without what cannot fit in shared memory."""
    yield current
    grid = GRIDS[stem]
    size = 2 if dtype != "float32" else 4
    for config in itertools.product(*grid.values()):
        if config == current:
            continue
        if stem == "covariance":
            tile, tokens, warps, stages = config
            shared = 2 * tile * tokens * size * stages
            if tile * tile * 4 // (warps * 32) > 512:  # two accumulators would not fit in the registers
                continue
        else:
            rows, columns, step, warps, stages = config
            shared = (rows + columns) * step * 4 * stages
            if rows * columns * 4 // (warps * 32) > 512:
                continue
            if current[2] <= 8:  # outer products: the step is the rank, and there is nothing to pipeline
                if step != 16 or stages != 1:
                    continue
                config = (rows, columns, current[2], warps, stages)
                shared = 0
                if config == current:
                    continue
        if shared > 227 * 1024 or (quick and config[-1] != current[-1]):
            continue
        yield config


def covariance_case(shape: tuple[int, ...], dtype: str, architecture: int, device: str | None) -> Case:
    from fastedit.kernels import covariance as module

    n_tokens, d = shape
    kind = common.DTYPES[dtype]
    current = module.configuration(architecture, kind, d)
    arithmetic = "half" if kind.itemsize == 2 else "tf32x3"
    run = None
    if device is not None:
        x = torch.randn(n_tokens, d, device=device).to(kind)
        cov = torch.zeros(d, d, device=device)

        def run(config: tuple[int, ...] | None) -> torch.Tensor:
            cov.zero_()
            module.covariance_triton(cov, x, config=config)
            return cov

    return Case(
        "covariance", shape, dtype, f'({architecture}, "{arithmetic}", {d >= module._LARGE})', current, run
    )


def low_rank_case(shape: tuple[int, ...], dtype: str, architecture: int, device: str | None) -> Case:
    from fastedit.kernels import low_rank as module

    d_out, d_in, rank = shape
    kind = common.DTYPES[dtype]
    current = module.configuration(architecture, kind, rank)
    run = None
    if device is not None:
        weight = torch.randn(d_out, d_in, device=device).to(kind)
        left, right = torch.randn(d_out, rank, device=device), torch.randn(d_in, rank, device=device)
        start = weight.clone()

        def run(config: tuple[int, ...] | None) -> torch.Tensor:
            weight.copy_(start)
            module.low_rank_update_triton(weight, left, right, 1e-3, False, False, 0, config=config)
            return weight

    return Case("low_rank", shape, dtype, f'({architecture}, "{module.product(kind, rank)}")', current, run)


CASES = {"covariance": covariance_case, "low_rank": low_rank_case}


def search(case: Case, deadline: float, quick: bool) -> None:
    """Time every candidate that gives the same result; the best first."""
    assert case.run is not None
    expected = case.run(None).double()
    size = expected.norm()
    slack = TOLERANCE if case.stem == "covariance" or case.dtype == "float32" else 4e-3
    for config in candidates(case.stem, case.dtype, case.current, quick):
        if time.monotonic() > deadline:
            break
        try:
            error = ((case.run(config).double() - expected).norm() / size).item()
            if not error < slack:
                raise ValueError(f"relative error {error:.2g}")
            case.results.append((sample(lambda config=config: case.run(config), 5), config))
        except Exception as reason:  # a configuration that does not compile or fit is one that is not chosen
            case.failed += 1
            print(
                f"  {config}: {str(reason).splitlines()[0][:100] if str(reason) else reason!r}",
                file=sys.stderr,
            )
    case.results.sort()


def sample(run: Callable[[], Any], repetitions: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def report(cases: list[Case]) -> str:
    """The table, and what to paste."""
    lines = [f"{'stem':11} {'shape':16} {'dtype':9} {'now ms':>9} {'best ms':>9} {'gain':>6}  now -> best"]
    entries: dict[tuple[str, str], tuple[int, ...]] = {}
    for case in cases:
        now = next((t for t, config in case.results if config == case.current), None)
        if not case.results or now is None:
            lines.append(f"{case.stem:11} {'x'.join(map(str, case.shape)):16} {case.dtype:9} nothing timed")
            continue
        best, config = case.results[0]
        lines.append(
            f"{case.stem:11} {'x'.join(map(str, case.shape)):16} {case.dtype:9} {now * 1e3:9.3f} {best * 1e3:9.3f} "
            f"{now / best - 1:6.1%}  {case.current} -> {config}"
        )
        if now / best > 1.02:  # less is noise
            entries[case.stem, case.key] = config
    for (stem, key), config in entries.items():
        lines.append(f"kernels/{stem}.py:    {key}: {config},")
    if not entries:
        lines.append("nothing gains more than 2 %: the tables stay as they are")
    return "\n".join(lines)


def save(path: Path, cases: list[Case]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stem", "shape", "dtype", "key", "configuration", "ms", "current"])
        for case in cases:
            shape = "x".join(map(str, case.shape))
            for seconds, config in case.results:
                row = [case.stem, shape, case.dtype, case.key, " ".join(map(str, config))]
                writer.writerow([*row, f"{seconds * 1e3:.4g}", config == case.current])
    print(f"wrote {path}", file=sys.stderr)


def compile_only(case: Case, architecture: int, limit: int) -> list[dict[str, Any]]:
    """Registers, stack and shared memory of each candidate, without a GPU."""
    import importlib.util

    root = Path(__file__).resolve().parents[1] / "tests" / "compile" / "test_triton.py"
    spec = importlib.util.spec_from_file_location("compile_triton", root)
    assert spec is not None
    assert spec.loader is not None
    proof = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proof)
    variant = {"bfloat16": "bf16", "float16": "fp16_no_mask", "float32": "fp32"}[case.dtype]
    kernel, arguments, divisible, _, _ = proof.MODULES[case.stem].launch(architecture, variant)
    names = ("BLOCK_D", "BLOCK_T") if case.stem == "covariance" else ("BLOCK_ROWS", "BLOCK_COLS", "BLOCK_R")
    rows = []
    for config in itertools.islice(candidates(case.stem, case.dtype, case.current, False), limit):
        *blocks, warps, stages = config
        chosen = {**arguments, **dict(zip(names, blocks, strict=True))}
        try:
            found = proof.measure(
                proof.compile_kernel(kernel, chosen, divisible, architecture, warps, stages)
            )
            row = {k: found[k] for k in ("REG", "STACK", "shared", "matrix unit", "waits for wgmma")}
        except Exception as error:
            row = {"error": repr(error)[:200]}
        rows.append({"stem": case.stem, "dtype": case.dtype, "configuration": config, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stem", nargs="*", help=f"{' or '.join(CASES)}; default: both")
    parser.add_argument("--shape", action="append", help="TOKENSxD or D_OUTxD_INxRANK; may be repeated")
    parser.add_argument("--dtype", action="append", choices=tuple(common.DTYPES), help="may be repeated")
    parser.add_argument(
        "--seconds", type=float, default=300, help="stop the search after so long (default: 300)"
    )
    parser.add_argument("--quick", action="store_true", help="vary tiles and warps only")
    parser.add_argument("--out", type=Path, help="folder for a CSV of everything that was timed")
    parser.add_argument(
        "--dry-run", type=int, metavar="ARCH", help="compile for sm_ARCH instead: 80, 90, 100 or 120"
    )
    parser.add_argument(
        "--limit", type=int, default=1000, help="with --dry-run: so many configurations a shape"
    )
    options = parser.parse_args()
    stems = options.stem or list(CASES)
    for stem in stems:
        if stem not in CASES:
            parser.error(f"no table for {stem!r}: expected {' or '.join(CASES)}")
    if options.shape and len(stems) != 1:
        parser.error("--shape needs one stem")
    if options.dry_run is None and (reason := common.no_gpu()):
        parser.error(f"{reason}; --dry-run 90 compiles without one")

    deadline = time.monotonic() + options.seconds
    cases: list[Case] = []
    total = sum(len(options.shape or SHAPES[stem]) for stem in stems) * len(options.dtype or DTYPES)
    for stem in stems:
        shapes = [tuple(map(int, s.split("x"))) for s in options.shape or []] or SHAPES[stem]
        for shape, dtype in itertools.product(shapes, options.dtype or DTYPES):
            if len(shape) != len(SHAPES[stem][0]):
                parser.error(f"a shape of {stem} has {len(SHAPES[stem][0])} numbers, got {shape}")
            if options.dry_run is not None:
                compile_only(CASES[stem](shape, dtype, options.dry_run, None), options.dry_run, options.limit)
                continue
            from fastedit.kernels import common as kernels

            architecture = kernels.architecture(torch.device("cuda"))
            print(f"{stem} {shape} {dtype}", file=sys.stderr)
            share = (deadline - time.monotonic()) / max(1, total - len(cases))
            cases.append(CASES[stem](shape, dtype, architecture, "cuda"))
            search(cases[-1], time.monotonic() + max(share, 1.0), options.quick)
    if cases:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            save(options.out / "tune.csv", cases)
        print(report(cases))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
