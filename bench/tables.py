"""What reports of quality studies share: Markdown tables, CSV, means with their spread, and matplotlib."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns line up."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = (header, ["-" * width for width in widths], *rows)
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def percent(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation in percent; empty if nothing was measured."""
    present = [100 * value for value in values if value is not None]
    if not present:
        return ""
    spread = f" ± {statistics.stdev(present):.1f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.1f}{spread}"


def number(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation; ``not finite`` if a value is missing."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return "not finite"
    spread = f" ± {statistics.stdev(present):.2g}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.3g}{spread}"


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing into files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plotting needs matplotlib: pip install 'fastedit-llm[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
