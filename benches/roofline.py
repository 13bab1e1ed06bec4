"""Draws the results of compare.py: how much of the machine each kernel uses, and what holds it.

    python benches/compare.py --json results.json
    python benches/roofline.py results.json roofline.png [--contender "ours chl"]

A panel for each operation and number of threads; in it, over the arithmetic intensity (operations
per byte that must pass between cache and memory), the share of the FMA peak that ours reaches
(a dot) and that the best of PyTorch reaches (a ring), joined by a line. The slanted roof is what
the memory's bandwidth allows, that of a copy; data that stays in a cache may lie above it. Symbols
of one kernel size have the same intensity and stand side by side to be told apart. Of the units,
those with BN are drawn. Needs matplotlib: pip install '.[dev]'.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

PANELS = {
    "forward": ("depthwise", " forward"),
    "input gradient": ("depthwise", " input gradient"),
    "weight gradient": ("depthwise", " weight gradient"),
    "xUnits, evaluation": ("xUnit", " BN evaluation"),
    "xUnits, training step": ("xUnit", " BN training step"),
}
UNIT_MARKERS = {"depthwise": "o", "xUnit": "o", "xUnitS": "s", "xUnitD": "^"}
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOWEST, HIGHEST = 0.002, 2.0
OCTAVES = 0.24  # of the x axis that a character of a label takes

Row = dict[str, Any]


def panel_of(row: Row) -> str | None:
    for name, (start, end) in PANELS.items():
        if row["operation"].startswith(start) and row["operation"].endswith(end):
            return name
    return None


def kernel_label(operation: str) -> str:
    found = re.search(r"k=(\d+)( stride 2)?", operation)
    assert found is not None
    return f"{found[1]}×{found[1]}" + ("\n/2" if found[2] else "")


def share(row: Row, milliseconds: float, limits: dict[str, float]) -> float:
    return row["flops"] / limits["flops"] / (milliseconds / 1e3)


def draw(
    axes: Any, rows: list[Row], limits: dict[str, float], shapes: list[str], ends: tuple[float, ...]
) -> None:
    low, high = ends
    ridge = limits["flops"] / limits["copy"]
    roof = [(x, min(1.0, x / ridge)) for x in (low, ridge, high)]
    axes.plot(*zip(*roof, strict=True), color="#333333", linewidth=1.4, zorder=2)
    axes.fill_between(*zip(*roof, strict=True), HIGHEST, color="#f2f2f2", zorder=0)
    clusters: dict[float, list[Row]] = {}
    for row in rows:
        clusters.setdefault(round(row["intensity"], 6), []).append(row)
    # Where the last label of each line ends: one that would touch it goes to the next line.
    written: list[float] = []
    for intensity, members in sorted(clusters.items()):
        members.sort(key=lambda row: (row["operation"], shapes.index(name_of(row))))
        labels = sorted({kernel_label(row["operation"]) for row in members})
        text = ", ".join(labels)
        half = OCTAVES * max(map(len, text.split("\n"))) / 2
        start = math.log2(intensity) - half
        line = next((i for i, end in enumerate(written) if end <= start), len(written))
        written[line : line + 1] = [start + 2 * half]
        # Below all dots: those near the roof leave no room there.
        height = LOWEST * 1.2 * 2**line
        axes.text(intensity, height, text, ha="center", va="bottom", fontsize=8)
        for i, row in enumerate(members):
            width = min(0.36, 0.06 * len(members))
            step = (i / (len(members) - 1) - 0.5) if len(members) > 1 else 0.0
            x = intensity * 2 ** (2 * width * step)
            colour = COLOURS[shapes.index(name_of(row)) % len(COLOURS)]
            marker = UNIT_MARKERS[row["operation"].split()[0]]
            ours = share(row, row["ours_ms"], limits)
            peer = share(row, row["peers_ms"][row["best_peer"]], limits)
            axes.plot([x, x], [peer, ours], color=colour, linewidth=1, alpha=0.55, zorder=3)
            # The ring is larger than the dot, so that it shows where the two are the same.
            axes.plot(x, ours, marker, color=colour, ms=4.5, mew=0, zorder=4)
            axes.plot(x, peer, marker, color=colour, mfc="none", ms=6.5, mew=1.1, zorder=5)


def name_of(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def figure(document: dict[str, Any], contender: str) -> Any:
    rows = [
        row
        for row in document["rows"]
        if row["suite"] in ("kernels", "modules")
        and row["contender"] == contender
        and not row.get("between")
        and panel_of(row) is not None
        and row["ours_ms"] > 0
    ]
    if not rows:
        raise SystemExit(f"no row of {contender!r} in the suites kernels and modules")
    panels = [name for name in PANELS if any(panel_of(row) == name for row in rows)]
    threads = sorted({row["threads"] for row in rows})
    shapes = list(dict.fromkeys(name_of(row) for row in rows))
    every = [row["intensity"] for row in rows]
    ends = (min(0.7, min(every) / 2), max(40.0, max(every) * 2))

    figure, grid = plt.subplots(
        len(threads),
        len(panels),
        figsize=(max(6.0, 3.1 * len(panels) + 0.8), 3.3 * len(threads) + 1.3),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, count in zip(grid, threads, strict=True):
        limits = document["limits"][str(count)]
        for axes, panel in zip(line, panels, strict=True):
            here = [row for row in rows if row["threads"] == count and panel_of(row) == panel]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlim(*ends)
            axes.set_ylim(LOWEST, HIGHEST)
            axes.grid(True, color="#dddddd", linewidth=0.6, zorder=1)
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.tick_params(labelsize=8)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            draw(axes, here, limits, shapes, ends)
            if axes in grid[0]:
                axes.set_title(panel, fontsize=11, fontweight="bold")
        roofs = f"{limits['flops'] / 1e9:.0f} GFLOP/s, {limits['copy'] / 1e9:.0f} GB/s"
        plural = "thread" if count == 1 else "threads"
        line[0].set_ylabel(f"{count} {plural}: {roofs}\nshare of FMA peak", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("operations per byte", fontsize=9)

    figure.suptitle(
        f"Share of the machine's peak, float32: {document.get('cpu', '')}, "
        f"{document['build']['isa']}, torch {document['torch']}",
        fontsize=11,
    )
    figure.legend(
        handles=legend(shapes, [row["operation"] for row in rows], contender),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    return figure


def legend(shapes: list[str], operations: list[str], contender: str) -> list[Line2D]:
    grey = "#666666"
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4, label=shape)
        for i, shape in enumerate(shapes)
    ]
    handles += [
        Line2D([], [], color=grey, marker="o", ls="", ms=4.5, label=contender),
        Line2D([], [], color=grey, marker="o", ls="", mfc="none", ms=6.5, label="best of PyTorch"),
        Line2D([], [], color="#333333", linewidth=1.4, label="roof: memory, FMA"),
    ]
    units = [u for u in ("xUnit", "xUnitS", "xUnitD") if any(o.split()[0] == u for o in operations)]
    handles += [Line2D([], [], color=grey, marker=UNIT_MARKERS[u], ls="", label=u) for u in units]
    return handles


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a JSON file of compare.py")
    parser.add_argument("image", type=Path, help="to write: .png, .svg, .pdf")
    parser.add_argument("--contender", default="ours", help='"ours" (default) or "ours chl"')
    arguments = parser.parse_args()
    document = json.loads(arguments.results.read_text())
    figure(document, arguments.contender).savefig(arguments.image, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
