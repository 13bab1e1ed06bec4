"""Times of our operations beside those of PyTorch, on the CPU in float32.

    python benches/compare.py [--suite kernels|modules|networks|overhead|memory|all]
        [--threads 1,2] [--shape 16x64x64x64] [--kernel-size 7] [--filter REGEX] [--between]
        [--no-compile] [--seconds S | --repeats N] [--json FILE] [--tiny]

One row per operation, shape, number of threads and layout of ours. Everybody gets the same numbers
and takes turns; a turn is a pause, in which the idle threads of the one before go to sleep, a call
that is not counted, and one that is. What counts is the median. A row in which some time is above
1.5 times its median is measured again, once; if it is no better, it is marked with ~ and not to be
quoted. Before that, all results are compared: no times of wrong answers.

    ours           our modules in NCHW; a row whose name ends in "chl" has them in channels_last,
                   one in "Network" has the runtime without PyTorch
    NCHW, chl      PyTorch in eager mode, contiguous and channels_last
    comp, comp chl the same under torch.compile (--no-compile leaves these out)
    onnx, openvino ONNX Runtime and OpenVINO, for networks, where they are installed
    DnCNN, D. chl  DnCNN-17 with ReLU, eager: another network, which xDnCNN is to beat in quality
    /NCHW, /best   how many times faster ours is than NCHW, and than the best that computes the same
    peak           the arithmetic of the convolutions alone, as a share of the FMA peak
    mem            the least memory traffic (every input read, every output written, once in each
                   pass), as a share of what the bandwidth would allow; above 100 %: from a cache

Both limits are measured in this run, on the same number of threads, by the loops of
src/kernels/peak.rs on the instruction set in use: multiply-adds on registers, and reading and
copying buffers that no cache holds. The peak is the best so far, measured for a second at first and
again at every row, because a single measurement on a busy machine may be too low. If it still rises
by more than 5 %, a line says so, and shares above that line are too high; those in the JSON file
all use the final limits. Above 100 %, convolutions go by minimal filtering, with fewer
multiply-adds than are counted (kernels of 7, 9 and 11 rows, where src/kernels/conv.rs says so), or
the peak was never reached in this run.

--between puts every operation between two 1×1 convolutions of PyTorch and subtracts, turn by turn,
what the convolutions take without it: what the operation adds in a network, where the threads of
another pool may still be spinning and the caches hold something else. It adds or saves page faults,
too, as the allocator keeps or returns memory, so that small differences may even be negative: then
the ratio is "?". "whole" is the ratio of the whole sequences to the best peer, unsubtracted.

The overhead suite times calls on 1×8×4×4, in µs. The memory suite needs Linux; peak_memory.py says
how it counts. roofline.py draws the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import re
import statistics
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peak_memory
import torch
from suites import SUITES, Call, Case, Group, Options, Shape, cases, convolutions
from torch import Tensor

from xunit_rs import __version__, _core

PAUSE = 0.015  # libgomp's workers spin for about 9 ms after an operation
LEAST_ROUNDS = 5
OUTLIER = 1.5
BUFFER_MIB = 128  # each of two, beyond the caches of common machines

Times = dict[str, list[float]]
Row = dict[str, Any]


class Settings(NamedTuple):
    seconds: float
    repeats: int | None
    pause: float


# ---------------------------------------------------------------- the machine


class Limits:
    """The best so far of the machine, on one number of threads: FLOP/s and bytes/s."""

    def __init__(self, threads: int, tiny: bool) -> None:
        self.threads = threads
        self.mib = 1 if tiny else BUFFER_MIB
        self.flops = self.read = self.copy = 0.0
        self.measure(0.01 if tiny else 1.0)
        self.measure_memory(0.01 if tiny else 1.0)
        self.told = self.flops

    def measure(self, seconds: float) -> None:
        self.flops = max(self.flops, _core.fma_peak(self.threads, seconds))

    def measure_memory(self, seconds: float) -> None:
        found = _core.memory_bandwidth(self.threads, seconds, self.mib)
        self.read, self.copy = max(self.read, found["read"]), max(self.copy, found["copy"])

    def memory_seconds(self, reads: float, writes: float) -> float:
        """As much reading as writing goes at the speed of a copy, the rest at that of reading."""
        both = min(reads, writes)
        return 2 * both / self.copy + (max(reads, writes) - both) / self.read

    def news(self) -> str | None:
        """What to say if the peak has risen by more than 5 % since it was last told."""
        if self.flops <= 1.05 * self.told:
            return None
        old, self.told = self.told, self.flops
        return (
            f"peak now {self.flops / 1e9:.0f} GFLOP/s: the shares above are "
            f"{self.flops / old:.2f} times too high"
        )

    def __str__(self) -> str:
        return (
            f"{self.threads} thread(s): FMA peak {self.flops / 1e9:.0f} GFLOP/s, memory "
            f"{self.read / 1e9:.0f} GB/s reading, {self.copy / 1e9:.0f} GB/s copying"
        )

    def as_json(self) -> dict[str, float]:
        return {"flops": self.flops, "read": self.read, "copy": self.copy}


# ---------------------------------------------------------------- measuring


def check(case: Case, group: Group) -> None:
    """Our results are PyTorch's, to 1 %, or to three times what its layouts differ by themselves:
    a missing row or column would show.

    In the norm: where a ReLU's input is within rounding of zero, single elements of a gradient may
    differ by all they are. A gradient whose exact value is zero (of a bias ahead of a BatchNorm) is
    rounding alone, and held against the largest of the others. Not closer, because PyTorch itself
    is 2e-3 away from float64 in the gradients of a whole xDnCNN, as we are (1.8e-3 and 1.5e-3 in
    the first weight), and of a unit in channels_last on one thread. Accuracy is the matter of
    parity.py.
    """
    reference = group.peers["NCHW"]()
    norms = [norm(t) for t in reference]
    floor = 0.1 * max(norms)

    def errors(call: Call) -> list[float]:
        pairs = zip(call(), reference, norms, strict=True)
        return [norm(t - expected) / max(size, floor) for t, expected, size in pairs]

    allowed = max(1e-2, 3 * max(e for call in group.peers.values() for e in errors(call)))
    for name, call in group.ours.items():
        for i, error in enumerate(errors(call)):
            if not error <= allowed:  # NaN fails
                raise SystemExit(
                    f"{case.operation} {case.shape}: {name.strip() or 'ours'} is wrong by "
                    f"{error:.1e} in result {i}"
                )


def norm(t: Tensor) -> float:
    return torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item()


def measure(group: Group, settings: Settings) -> Times:
    """Seconds of every call that counts."""
    contenders = group.peers | group.beside | group.without | group.ours
    times: Times = {name: [] for name in contenders}
    names = list(contenders)
    begin = time.perf_counter()
    rounds = 0
    while True:
        for name in names:
            call = contenders[name]
            time.sleep(settings.pause)
            call()
            start = time.perf_counter()
            for _ in range(group.loops):
                call()
            times[name].append((time.perf_counter() - start) / group.loops)
        names.append(names.pop(0))  # nobody always follows the same one
        rounds += 1
        if settings.repeats is not None:
            if rounds >= settings.repeats:
                return times
        elif rounds >= LEAST_ROUNDS and time.perf_counter() - begin > settings.seconds:
            return times


def spread(times: Times) -> float:
    """How far the worst time is above the median of its contender."""
    return max(max(t) / statistics.median(t) for t in times.values())


def median_of(times: Times, group: Group, name: str) -> float:
    """Seconds; of the operation alone where convolutions around it were timed too."""
    if not group.without:
        return statistics.median(times[name])
    alone = times[convolutions(name)]
    return statistics.median(t - a for t, a in zip(times[name], alone, strict=True))


def rows_of(case: Case, group: Group, settings: Settings, limits: Limits) -> list[Row]:
    check(case, group)
    limits.measure(settings.seconds / 10)
    times = measure(group, settings)
    again = spread(times) > OUTLIER
    if again:
        times = measure(group, settings)
    contenders = [*group.ours, *group.peers, *group.beside]
    seconds = {name: median_of(times, group, name) for name in contenders}
    best = min(group.peers, key=seconds.__getitem__)
    return [
        {
            "suite": case.suite,
            "operation": case.operation,
            "contender": f"ours{name}",
            "between": bool(group.without),
            "shape": list(case.shape),
            "threads": limits.threads,
            "ours_ms": seconds[name] * 1e3,
            "peers_ms": {peer: seconds[peer] * 1e3 for peer in group.peers},
            "beside_ms": {other: seconds[other] * 1e3 for other in group.beside},
            "best_peer": best,
            "ratio_to_nchw": ratio(seconds["NCHW"], seconds[name]),
            "ratio_to_best": ratio(seconds[best], seconds[name]),
            "flops": group.flops,
            "reads": group.reads,
            "writes": group.writes,
            "rounds": len(times[name]),
            "spread": spread(times),
            "measured_again": again,
        }
        | sequence(times, group, name, best)
        for name in group.ours
    ]


def sequence(times: Times, group: Group, name: str, best: str) -> Row:
    """The whole sequence and the convolutions alone, unsubtracted, where there are any."""
    if not group.without:
        return {}
    whole = {contender: statistics.median(t) * 1e3 for contender, t in times.items()}
    return {"sequence_ms": whole, "sequence_ratio_to_best": whole[best] / whole[name]}


def ratio(theirs: float, ours: float) -> float | None:
    """None where a difference of two times is lost in the noise."""
    return theirs / ours if min(theirs, ours) > 0 else None


def add_shares(row: Row, limits: Limits) -> None:
    """What of the limits, as far as they are known by now, a row makes use of."""
    if "flops" not in row:
        return
    seconds = row["ours_ms"] / 1e3
    compute = row["flops"] / limits.flops
    memory = limits.memory_seconds(row["reads"], row["writes"])
    row["gflops"] = row["flops"] / seconds / 1e9 if seconds > 0 else None
    share = ratio(compute, seconds)
    row["peak_share"] = share
    row["memory_share"] = ratio(memory, seconds)
    row["intensity"] = row["flops"] / (row["reads"] + row["writes"])


def memory_rows(case: Case, options: Options) -> list[Row]:
    """Bytes above input and output, in fresh processes; empty where the system cannot tell."""
    arguments = case.make(options)
    found: dict[tuple[str, str], float] = {}
    for backend in ("rust", "torch"):
        for layout in ("NCHW", "chl"):
            peak = peak_memory.measure(arguments, backend, layout)
            if peak is None:
                return []
            found[backend, layout] = peak / 1e6
    return [
        {
            "suite": case.suite,
            "operation": case.operation,
            "contender": "ours" if layout == "NCHW" else f"ours {layout}",
            "shape": list(case.shape),
            "threads": options.threads,
            "ours_mb": found["rust", layout],
            "peers_mb": {name: found["torch", name] for name in ("NCHW", "chl")},
            "ratio_to_nchw": found["rust", layout] / found["torch", "NCHW"],
            "ratio_to_best": found["rust", layout]
            / min(found["torch", n] for n in ("NCHW", "chl")),
        }
        for layout in ("NCHW", "chl")
    ]


# ---------------------------------------------------------------- table


class Table:
    """Header and lines of one suite: which columns it has, and in which unit."""

    def __init__(self, suite: str, compiled: bool, between: bool) -> None:
        self.suite, self.between = suite, between
        self.key, self.scale, unit = {
            "overhead": ("ms", 1e3, "us"),
            "memory": ("mb", 1.0, "MB"),
        }.get(suite, ("ms", 1.0, "ms"))
        self.ours = f"ours {unit}"
        self.peers = ["NCHW", "chl", *(["comp", "comp chl"] if compiled else [])]
        self.beside: dict[str, str] = {}
        if suite == "networks":
            self.peers += [
                name
                for name, module in (("onnx", "onnxruntime"), ("openvino", "openvino"))
                if find_spec(module)
            ]
            self.beside = {"DnCNN NCHW": "DnCNN", "DnCNN chl": "D. chl"}
        elif suite == "overhead":
            self.peers = ["NCHW"]
        elif suite == "memory":
            self.peers = ["NCHW", "chl"]
        self.shares = suite not in ("overhead", "memory")

    def heading(self) -> str:
        columns = (self.ours, *self.peers, *self.beside.values())
        shares = f"{'peak':>7}{'mem':>6}" if self.shares else ""
        # Memory is ours by theirs: less is better.
        ratios = ("of NCHW", "of best") if self.suite == "memory" else ("/NCHW", "/best")
        return (
            f"{self.suite:<42} {'shape':<13}"
            + "".join(f"{name:>10}" for name in columns)
            + "".join(f"{name:>8}" for name in ratios)
            + shares
            + (f"{'whole':>8}" if self.between else "")
        )

    def line(self, row: Row) -> str:
        values = [row[f"ours_{self.key}"]]
        values += [row[f"peers_{self.key}"].get(name) for name in self.peers]
        values += [row["beside_ms"].get(name) for name in self.beside]
        name = row["operation"] + row["contender"].removeprefix("ours")
        text = f"{name:<42} {'x'.join(map(str, row['shape'])):<13}"
        text += "".join(f"{'-':>10}" if v is None else f"{v * self.scale:10.2f}" for v in values)
        for key in ("ratio_to_nchw", "ratio_to_best"):
            text += f"{'?':>8}" if row[key] is None else f"{row[key]:8.2f}"
        if self.shares:
            for key, width in (("peak_share", 7), ("memory_share", 6)):
                share = "?" if row[key] is None else f"{row[key]:.0%}"
                text += f"{share:>{width}}"
        if self.between:
            text += f"{row['sequence_ratio_to_best']:8.2f}"
        return text + (" ~" if row.get("spread", 0) > OUTLIER else "")


class Progress:
    """How far through all rows the run is: one line on a terminal, a line per row in a log."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.begin = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, case: Case, threads: int) -> None:
        size = "x".join(map(str, case.shape))
        count = f"{self.done + 1:>{len(str(self.total))}}/{self.total}"
        what = f"{case.suite}: {case.operation} {size}, {threads} thread(s)"
        if not self.terminal:
            print(f"{count} {what}", file=sys.stderr, flush=True)
            return
        full = round(20 * self.done / self.total)
        left = ""
        if self.done:
            seconds = (time.monotonic() - self.begin) / self.done * (self.total - self.done)
            minutes, seconds = divmod(round(seconds), 60)
            left = f" {minutes}:{seconds:02} left"
        text = f"|{'#' * full:<20}| {count}{left}  {what}"
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One is done; its line goes, so that the table can be printed in its place."""
        self.done += 1
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(path: Path, rows: list[Row], limits: dict[int, Limits]) -> None:
    """After every row, whole or not at all: an interrupted run keeps what it has."""
    document = {
        "xunit_rs": __version__,
        "build": _core.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu": cpu(),
        "cpus": os.cpu_count(),
        "limits": {str(threads): limit.as_json() for threads, limit in limits.items()},
        "rows": rows,
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


# ---------------------------------------------------------------- command line


def parse() -> argparse.Namespace:
    def threads(text: str) -> list[int]:
        values = [int(value) for value in text.split(",")]
        if any(value < 1 for value in values):
            raise ValueError
        return values

    def shape(text: str) -> Shape:
        n, c, h, w = (int(value) for value in text.split("x"))
        if min(n, c, h, w) < 1:
            raise ValueError
        return n, c, h, w

    def positive(text: str) -> float:
        value = float(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    def count(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    def odd(text: str) -> int:
        value = count(text)
        if value % 2 == 0:
            raise ValueError
        return value

    def regex(text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise ValueError from error

    shape.__name__, threads.__name__, regex.__name__ = "shape NxCxHxW", "list of threads", "regex"
    positive.__name__, count.__name__, odd.__name__ = "positive number", "count", "odd number"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all")
    add("--threads", type=threads, help="numbers of threads, with commas (default 1,2)")
    add("--shape", type=shape, action="append", help="may be repeated; replaces the default shapes")
    add("--kernel-size", type=odd, action="append", help="may be repeated; replaces the defaults")
    add("--filter", type=regex, help='rows whose "suite: operation shape" has a match')
    add("--between", action="store_true", help="kernels and modules between two convolutions")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile as a peer, which takes longer to compile than to measure",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive, default=2.0, help="for each row (default 2)")
    length.add_argument("--repeats", type=count, help="calls that count, instead of --seconds")
    add("--json", type=Path, metavar="FILE", help="write all rows there")
    add("--tiny", action="store_true", help="small shapes, two repeats: shows only that it runs")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no such folder")
    if arguments.json is not None and arguments.json.is_dir():
        parser.error(f"--json {arguments.json} is a folder")
    if arguments.between and arguments.suite not in ("kernels", "modules", "all"):
        parser.error("--between is for the suites kernels and modules")
    return arguments


def plan(arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """The rows of every suite that was asked for."""
    names = list(SUITES) if arguments.suite == "all" else [arguments.suite]
    if arguments.between:
        names = [name for name in names if name in ("kernels", "modules")]
    shapes, sizes = (
        None if given is None else tuple(given)
        for given in (arguments.shape, arguments.kernel_size)
    )
    chosen = {}
    for name in names:
        found = cases(name, shapes, sizes, arguments.tiny, arguments.between)
        if arguments.filter is not None:
            texts = {c: f"{name}: {c.operation} {'x'.join(map(str, c.shape))}" for c in found}
            found = [case for case in found if arguments.filter.search(texts[case])]
        if found:
            chosen[name] = found
    if not chosen:
        raise SystemExit("no row is left")
    return chosen


def build(case: Case, options: Options) -> Group:
    """The group; what exporters and compilers say while they work is not for this table."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        group: Group = case.make(options)
        return group


def main() -> int:
    arguments = parse()
    tiny = arguments.tiny
    repeats = 2 if tiny and arguments.repeats is None else arguments.repeats
    settings = Settings(0.05 if tiny else arguments.seconds, repeats, 0.0 if tiny else PAUSE)
    counts = arguments.threads or ([1] if tiny else [1, 2])
    chosen = plan(arguments)
    if max(counts) > (os.cpu_count() or 1):
        print(f"note: {max(counts)} threads on {os.cpu_count()} CPUs", file=sys.stderr)
    logging.disable(logging.WARNING)  # of the exporters

    isa = _core.build_info()["isa"]
    print(f"xunit-rs {__version__} ({isa}), torch {torch.__version__}, float32, medians")
    missing = [m for m in ("onnxruntime", "onnxscript", "openvino") if find_spec(m) is None]
    if missing and "networks" in chosen:
        print(f"not installed, so not compared: {', '.join(missing)}")
    if arguments.between:
        print("between two 1x1 convolutions, whose time alone is subtracted")
    rows: list[Row] = []
    limits: dict[int, Limits] = {}
    bar = Progress(len(counts) * sum(map(len, chosen.values())))
    for threads in counts:
        torch.set_num_threads(threads)
        limit = limits[threads] = Limits(threads, tiny)
        options = Options(threads, arguments.compile, arguments.between)
        first = len(rows)
        print(f"\n{limit}")
        if not tiny and 1 in limits and limit.flops < 0.8 * threads * limits[1].flops:
            print("the peak does not grow with the threads: others are using this machine")
        for suite, found in chosen.items():
            table = Table(suite, arguments.compile, arguments.between)
            print(f"\n{table.heading()}")
            for case in found:
                bar.show(case, threads)
                if suite == "memory":
                    new = memory_rows(case, options)
                else:
                    new = rows_of(case, build(case, options), settings, limit)
                rows += new
                for row in rows[first:]:
                    add_shares(row, limit)
                bar.step()
                news = limit.news()
                if news is not None:
                    print(news)
                for row in new:
                    print(table.line(row), flush=True)
                if arguments.json is not None:
                    save(arguments.json, rows, limits)
                if not new:
                    print("memory can be measured on Linux alone")
        limit.measure_memory(0.01 if tiny else 1.0)
        for row in rows[first:]:
            add_shares(row, limit)
        print(f"\nat the end, {limit}")
    if arguments.json is not None:
        save(arguments.json, rows, limits)
    if any(row.get("spread", 0) > OUTLIER for row in rows):
        print("\n~ a time was above 1.5 medians twice: the machine is busy, run these again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
