"""Lists the goals that compare.py's results miss, and what of their time the machine takes anyway.

    python benches/compare.py --suite modules --filter BN --threads 1,2 --json results.json
    python benches/targets.py results.json

A goal is a ratio to the best of PyTorch, to PyTorch in NCHW, or of one thread to two. For each that
is missed: the ratio that was measured; the milliseconds that the goal leaves, and ours; and of what
it leaves, what plain sums and products would take at the FMA peak, and what must at least pass
between cache and memory would. Where the sums alone take 100 % or more the goal is beyond the
machine, unless fewer multiplications do. Of ours in NCHW, as the goals are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Of operations: the ratio to the best of PyTorch, and that to PyTorch in NCHW.
RATIOS: dict[str, dict[str, float]] = {
    r"depthwise k=[79] forward": {"best": 1.7},
    r"depthwise k=3 forward": {"best": 1.3},
    r"depthwise k=[79] input gradient": {"best": 1.5},
    r"depthwise k=[79] weight gradient": {"best": 8},
    r"xUnitS? k=[79] BN training step": {"best": 5, "NCHW": 10},
    r"xUnitD k=[79] BN training step": {"best": 4, "NCHW": 8},
    r"xUnit[SD]? k=[79] BN evaluation": {"best": 3},
}
# Of one thread to two, for tensors of so many elements.
SCALING, LARGE = 1.8, 1_000_000
HEADING = (
    "| | shape | threads | ratio to | measured | goal | it leaves, ms | ours, ms | sums | memory |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def goals(rows: list[Row]) -> Iterator[tuple[Row, str, float, float]]:
    """(row, what the ratio is to, the ratio measured, the goal) of all rows that have goals."""
    timed = [row for row in rows if row["suite"] in ("kernels", "modules")]
    ours = [row for row in timed if row["contender"] == "ours" and not row["between"]]
    alone = {(row["operation"], *row["shape"]): row for row in ours if row["threads"] == 1}
    for row in ours:
        wanted = next((w for name, w in RATIOS.items() if re.fullmatch(name, row["operation"])), {})
        measured = {"best": row.get("ratio_to_best"), "NCHW": row.get("ratio_to_nchw")}
        one = alone.get((row["operation"], *row["shape"]))
        if row["threads"] == 2 and one is not None and math.prod(row["shape"]) > LARGE:
            wanted = {**wanted, "1 thread": SCALING}
            measured["1 thread"] = one["ours_ms"] / row["ours_ms"]
        for to, goal in wanted.items():
            ratio = measured[to]
            if ratio is not None:
                yield row, to, ratio, goal


def line(row: Row, to: str, ratio: float, goal: float, limits: dict[str, float]) -> str:
    left = row["ours_ms"] * ratio / goal
    sums = row["flops"] / limits["flops"] * 1e3
    memory = (row["reads"] / limits["read"] + row["writes"] / limits["copy"]) * 1e3
    cells = [
        row["operation"],
        "×".join(map(str, row["shape"])),
        str(row["threads"]),
        to,
        f"{ratio:.2f}",
        f"{goal:g}",
        f"{left:.3g}",
        f"{row['ours_ms']:.3g}",
        f"{sums / left * 100:.0f} %",
        f"{memory / left * 100:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what compare.py --json wrote")
    path: Path = parser.parse_args().results
    try:
        document = json.loads(path.read_text())
        rows, limits = document["rows"], document["limits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{path}: {error!r}")
    found = list(goals(rows))
    missed = [goal for goal in found if goal[2] < goal[3]]
    print(f"{len(found) - len(missed)} of {len(found)} goals reached\n")
    print(*HEADING, sep="\n")
    for row, *goal in missed:
        print(line(row, *goal, limits[str(row["threads"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
