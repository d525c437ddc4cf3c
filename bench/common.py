"""What the benchmarks share: timing, the limits of this machine, the table, CSV and JSON.

A benchmark of a hot path is a module with ``OPS``, the names of its ops, ``DTYPES``, those whose rate of products
is a limit, and ``problems(device, quick)``, which yields one :class:`Problem` after the other.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastedit
from fastedit.ops import backend

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "fastedit-"
COLUMNS = (
    "op", "device", "shape", "dtype", "provider", "p50_ms", "p20_ms", "p80_ms", "gb_per_s", "tflop_per_s",
    "fraction_of_limit", "speedup_vs_best_other", "error", "note",
)  # fmt: skip
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


# ---- a benchmark ----------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One shape and dtype, and everybody who can solve it; the results were compared before this was made."""

    op: str
    shape: str
    dtype: str  # a key of DTYPES: which rate of products is the limit
    runs: dict[str, Callable[[], Any]]  # by provider; ours are named OURS + backend
    errors: dict[str, float]  # by provider, against float64; 0 where the result must be and is exact
    n_bytes: float  # the fewest that the problem allows to be read and written
    flops: float  # the fewest
    unavailable: dict[str, str] = field(default_factory=dict)  # provider: why it is not measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark takes."""
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="where to measure")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repetitions; saved only with --out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the result")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the CSV (default: bench/results)")
    parser.add_argument(
        "--repetitions", type=int, help="timed rounds for each provider (default: 15, quick: 5)"
    )


def main(stem: str) -> None:
    """Run one benchmark as a script: ``python bench/<stem>.py``."""
    module = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n"
        f"  python bench/{stem}.py                        every device here, table and CSV in bench/results/\n"
        f"  python bench/{stem}.py --device cpu --quick   small sizes, seconds, nothing saved\n"
        f"  python bench/{stem}.py --json > {stem}.json   for machines\n"
        f"  python bench/{stem}.py --plot {stem}.png      a picture too (needs fastedit-llm[plots])\n",
    )
    add_arguments(parser)
    options = parser.parse_args()
    if options.out is None and not options.quick:
        options.out = RESULTS
    results = [run(stem, module, device, options) for device in devices(options.device)]
    finish(options, results)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Device and output of a benchmark of whole models, which measures on one device."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def devices(name: str) -> list[str]:
    """The device types that ``--device`` stands for."""
    return ["cpu", "cuda"] if name == "all" else [name]


@dataclass
class Result:
    """What one benchmark found on one device."""

    stem: str
    device: str
    machine: dict[str, Any]
    limits: dict[str, float]
    rows: list[dict[str, Any]]


def run(stem: str, module: Any, device: str, options: argparse.Namespace) -> Result:
    """Measure every problem of a benchmark on one device; a device that is not there gives rows that say so."""
    repetitions = options.repetitions or (5 if options.quick else 15)
    reason = no_gpu() if device == "cuda" else ""
    if reason:
        head = {"device": device, "shape": "", "dtype": ""}
        names = [OURS + name for name in backends(device)]
        rows = [not_measured({"op": op, **head}, name, reason) for op in module.OPS for name in names]
        return Result(stem, device, machine(device), {}, rows)
    limit = limits(device, module.DTYPES, options.quick)
    rows = []
    for problem in module.problems(device, options.quick):
        print(f"{problem.op} {problem.shape} {problem.dtype}", file=sys.stderr)
        rows += measured(problem, device, repetitions, limit)
        if options.out is not None:  # already now: a run that is stopped keeps what it has measured
            options.out.mkdir(parents=True, exist_ok=True)
            save(options.out / f"{stem}_{device}.csv", rows, machine(device), limit)
    return Result(stem, device, machine(device), limit, rows)


# ---- the machine ----------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What a number means nothing without: device, threads, versions, date, commit."""
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastedit": fastedit.__version__,
    }
    for name in ("triton", "numpy", "scipy"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "absent"
    module = backend.extension()
    versions["cpu_isa"] = "absent" if isinstance(module, str) else str(module.info().get("cpu_isa"))
    if device == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = processor()
    return {
        "device_name": name,
        "threads": torch.get_num_threads(),
        **versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree, with a + if it has changes; FASTEDIT_COMMIT where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTEDIT_COMMIT", "unknown")


def limits(device: str, dtypes: Iterable[str], quick: bool) -> dict[str, float]:
    """Measured here: bytes/s of a large copy (read and write counted), FLOP/s of a square product by dtype.

    A processor's cache reads what a copy will overwrite, which is not counted; so the faster of a copy and of an
    update in place is taken.
    """
    megabytes = (64 if quick else 256) if device == "cpu" else 2048
    pair = torch.rand((2, megabytes << 17), device=device)
    copy = fastest(lambda: pair[0].copy_(pair[1]), device)
    in_place = fastest(lambda: pair.add_(1.0), device) / 2  # reads and writes all of it, twice a copy's bytes
    out = {"copy": pair.nbytes / min(copy, in_place)}
    n = (1024 if quick else 2048) if device == "cpu" else 8192
    for name in dtypes:
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        b = torch.randn(n, n, device=device).to(DTYPES[name])
        if name == "float16" and device == "cpu":  # torch has no fast one on most processors
            a, b = a.float(), b.float()
        out[name] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b, device)
    if device == "cpu" and "float32" in out:  # narrower types may be computed in float32, and no slower
        narrow = ("bfloat16", "float16")
        out = {name: max(rate, out["float32"]) if name in narrow else rate for name, rate in out.items()}
    return out


def fastest(run: Callable[[], Any], device: str, rounds: int = 7) -> float:
    """Seconds of the fastest of a few runs: a limit is what the machine can do, not what it usually does."""
    return min(sample(run, device, None) for _ in range(rounds + 1))


# ---- timing ---------------------------------------------------------------------------------------------


def sample(run: Callable[[], Any], device: str, flush: torch.Tensor | None) -> float:
    """Seconds of one run: the device's own clock, and a cold L2 where ``flush`` is given."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    if flush is not None:
        flush.zero_()  # also the backlog that hides the launches of what follows
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(runs: dict[str, Callable[[], Any]], device: str, repetitions: int) -> dict[str, list[float]]:
    """Samples of every provider in seconds, one of each in turn, so that drift meets all alike."""
    flush = None if device == "cpu" else torch.empty(1 << 28, dtype=torch.float32, device=device)
    for run in runs.values():  # warm up: compilation, handles, pages
        run()
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repetitions):
        names = list(runs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(sample(runs[name], device, flush))
    return samples


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(samples) < 2:
        return (samples[0],) * 3
    cut = statistics.quantiles(samples, n=10, method="inclusive")
    return cut[1], statistics.median(samples), cut[7]


# ---- rows -----------------------------------------------------------------------------------------------


def measured(
    problem: Problem, device: str, repetitions: int, limit: dict[str, float]
) -> list[dict[str, Any]]:
    """One row for each provider.

    fraction_of_limit: the time that the measured limits allow (the larger of bytes over copy bandwidth and
    FLOPs over the rate of a product in that dtype) over the time taken. Above 1 where other arithmetic is
    faster than a product in that dtype (three TF32 products for one of float32) or a small problem stays in
    the cache.
    """
    head = {"op": problem.op, "device": device, "shape": problem.shape, "dtype": problem.dtype}
    samples = interleaved(problem.runs, device, repetitions)
    others = [statistics.median(s) for name, s in samples.items() if not name.startswith(OURS)]
    floor = max(problem.n_bytes / limit["copy"], problem.flops / limit.get(problem.dtype, math.inf))
    rows = []
    for name, taken in samples.items():
        p20, p50, p80 = quantiles(taken)
        rows.append(
            {
                **head,
                "provider": name,
                "p50_ms": p50 * 1e3,
                "p20_ms": p20 * 1e3,
                "p80_ms": p80 * 1e3,
                "gb_per_s": problem.n_bytes / p50 / 1e9,
                "tflop_per_s": problem.flops / p50 / 1e12,
                "fraction_of_limit": floor / p50,
                "speedup_vs_best_other": min(others) / p50 if others and name.startswith(OURS) else None,
                "error": problem.errors.get(name),
                "note": "",
            }
        )
    rows += [not_measured(head, name, reason) for name, reason in problem.unavailable.items()]
    return rows


def not_measured(head: dict[str, Any], provider: str, reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), **head, "provider": provider, "note": f"not measured: {reason}"}


def backends(device: str) -> tuple[str, ...]:
    """Our backends that are made for a device type."""
    return ("torch", "cpp") if device == "cpu" else ("torch", "triton", "cuda")


def ours(op: str, device: str, *tensors: torch.Tensor) -> tuple[list[str], dict[str, str]]:
    """The backends that can serve these tensors, and by provider name why the others of this device cannot."""
    can, cannot = [], {}
    for name in backends(device):
        try:
            with backend.use_backend(name):
                backend.choose(op, *tensors)
            can.append(name)
        except fastedit.BackendUnavailable as error:
            cannot[OURS + name] = str(error).split("cannot serve: ")[-1].split(". Able to")[0]
    return can, cannot


def by_backend(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` with every op served by backend ``name``."""

    def run() -> Any:
        with backend.use_backend(name):
            return call()

    return run


def no_gpu() -> str:
    """Why nothing can be measured on a GPU here; empty if it can."""
    return "" if torch.cuda.is_available() else "no GPU on this machine"


# ---- output ---------------------------------------------------------------------------------------------


def finish(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """Save, draw, print: the table comes last."""
    rows = [row for result in results for row in result.rows]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for result in results:
            if any(row["p50_ms"] is not None for row in result.rows):
                path = options.out / f"{result.stem}_{result.device}.csv"
                save(path, result.rows, result.machine, result.limits)
                print(f"wrote {path}", file=sys.stderr)
    if options.plot:
        from fastedit.bench.plot import draw

        draw(rows, options.plot)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
        return
    for result in results:
        if result.limits:
            values = result.limits
            rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in values.items() if k != "copy")
            print(f"{result.device}: {result.machine['device_name']}, {result.machine['threads']} threads; "
                  f"measured limits: copy {values['copy'] / 1e9:.4g} GB/s, {rates}")  # fmt: skip
    print(table(rows))


def save(path: Path, rows: list[dict[str, Any]], about: dict[str, Any], limit: dict[str, float]) -> None:
    extra = {**about, **{f"limit_{name}": f"{value:.4g}" for name, value in limit.items()}}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *extra], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: text(value) for key, value in {**row, **extra}.items()})


def text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned columns; unmeasured ones say why."""
    names = [c for c in COLUMNS if c != "note"]
    lines = [names]
    for row in rows:
        cells = [text(row[c]) for c in names]
        if row["note"]:
            cells[names.index("p50_ms")] = row["note"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines if not line[5].startswith("not")) for i in range(len(names))]
    out = []
    for line in lines:
        if line[5].startswith("not"):
            head = "  ".join(cell.ljust(w) for cell, w in zip(line[:5], widths[:5], strict=True))
            out.append(f"{head}  {line[5]}")
        else:
            cells = [
                c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def report(
    stem: str,
    rows: list[dict[str, Any]],
    columns: Sequence[str],
    shown: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Save and print rows of other columns than :data:`COLUMNS`; ``shown`` are those of the printed table."""
    about = machine(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"{stem}_{options.device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *about], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: text(value) for key, value in {**row, **about}.items()})
    if options.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=1))
        return
    lines = [tuple(shown), *(tuple(text(row[c]) for c in shown) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines))
