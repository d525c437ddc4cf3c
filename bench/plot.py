"""Draw benchmark results: one panel for each device, shape and dtype, one bar for each provider.

Examples:
  python bench/plot.py bench/results/covariance_cpu.csv covariance.png
  python bench/plot.py bench/results/low_rank_cuda.csv low_rank.svg
"""

from __future__ import annotations

import argparse
import csv
from typing import Any

from fastedit.bench.tables import pyplot

OURS, OTHERS = "#1f6f8b", "#c7c7c7"


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Median times with p20 to p80, shorter is better; providers that were not measured are left out."""
    plt = pyplot()
    panels: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["p50_ms"] not in (None, ""):
            panels.setdefault((row["op"], row["device"], row["shape"], row["dtype"]), []).append(row)
    if not panels:
        raise SystemExit("nothing was measured: there is nothing to draw")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, part) in zip(axes.flat, panels.items(), strict=False):
        part = sorted(part, key=lambda row: -float(row["p50_ms"]))
        middle = [float(row["p50_ms"]) for row in part]
        spread = [
            [m - float(row["p20_ms"]) for m, row in zip(middle, part, strict=True)],
            [float(row["p80_ms"]) - m for m, row in zip(middle, part, strict=True)],
        ]
        colours = [OURS if row["provider"].startswith("fastedit") else OTHERS for row in part]
        axis.barh([row["provider"] for row in part], middle, xerr=spread, color=colours)
        axis.set_title(" ".join(title), fontsize=9)
        axis.set_xlabel("ms (median, p20 to p80)", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("csv", help="a table written by a benchmark")
    parser.add_argument("picture", help="the file to write: .png, .svg or .pdf")
    options = parser.parse_args()
    with open(options.csv, newline="") as file:
        draw(list(csv.DictReader(file)), options.picture)


if __name__ == "__main__":
    main()
