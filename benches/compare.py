"""Times of our operations beside those of PyTorch, on the CPU in float32.

    python benches/compare.py [--suite kernels|modules|networks|all] [--threads 1,2] [--compile]
        [--shape 16x64x64x64] [--seconds S | --repeats N] [--json FILE] [--tiny]

One row per operation, shape and number of threads. Everybody gets the same numbers and takes turns;
a turn is a pause, in which the idle threads of the one before go to sleep, a call that is not
counted, and one that is. What counts is the median. A row in which some time is above 1.5 times its
median is measured again, once; if it is no better, it is marked with ~ and not to be quoted.
Before that, all results are compared: no times of wrong answers.

    ours           our modules in NCHW; for networks also the runtime without PyTorch ("Network")
    NCHW, chl      PyTorch in eager mode, contiguous and channels_last
    comp, comp chl the same under torch.compile (with --compile)
    /NCHW, /best   how many times faster ours is than NCHW, and than the best of PyTorch
    peak           the arithmetic of the convolutions alone, as a share of the peak

The peak is that of PyTorch's own matrix product (sgemm, 1024³): the best so far in this run on the
same number of threads, measured for a second at first and again at every row, because a single
measurement on a busy machine may be three times too low. If it still rises by more than 5 %, a line
says so, and shares above that line are too high; those in the JSON file all use the final peak. A
share above 100 % means that the peak was never reached in this run: "?", and null in the file. The
hardware's peak may be somewhat higher.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xunit_rs import DepthwiseConv2d, __version__, models, xUnit, xUnitD, xUnitS

SUITES = ("kernels", "modules", "networks")
SHAPES = ((16, 64, 64, 64), (1, 64, 256, 256))
TINY = ((2, 8, 12, 12),)
KERNEL_SIZE = 7
PAUSE = 0.015  # libgomp's workers spin for about 9 ms after an operation
LEAST_ROUNDS = 5
OUTLIER = 1.5

Shape = tuple[int, int, int, int]
Call = Callable[[], Tensor]


class Group(NamedTuple):
    """Contenders that compute the same, from the same numbers."""

    operation: str
    shape: Shape
    flops: float
    ours: dict[str, Call]
    peers: dict[str, Call]


class Settings(NamedTuple):
    compile: bool
    seconds: float
    repeats: int | None
    pause: float


# ---------------------------------------------------------------- contenders


def peers_of(plain: nn.Module, call: Callable[[Any, Any], Call], compiled: bool) -> dict[str, Call]:
    """`call(module, memory format)` for PyTorch in each layout, eager and compiled."""
    formats = {"NCHW": torch.contiguous_format, "chl": torch.channels_last}
    peers = {}
    for name, layout in formats.items():
        module = copy.deepcopy(plain).to(memory_format=layout)
        peers[name] = call(module, layout)
    if compiled:
        for name, layout in formats.items():
            module = copy.deepcopy(plain).to(memory_format=layout)
            peers["comp" if name == "NCHW" else "comp chl"] = call(torch.compile(module), layout)
    return peers


def inference(x: Tensor) -> Callable[[Any, Any], Call]:
    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout)

        def call() -> Tensor:
            with torch.no_grad():
                out: Tensor = module(value)
            return out

        return call

    return make


def training_step(x: Tensor, grad: Tensor) -> Callable[[Any, Any], Call]:
    """Forward and backward, with the gradients of the input and of every parameter."""

    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout).requires_grad_()
        upstream = grad.contiguous(memory_format=layout)
        wanted = [value, *module.parameters()]

        def call() -> Tensor:
            return torch.autograd.grad(module(value), wanted, upstream)[0]

        return call

    return make


def backward(x: Tensor, grad: Tensor) -> Callable[[Any, Any], Call]:
    """The backward pass alone, over and over through one graph."""

    def make(module: Any, layout: Any) -> Call:
        value = x.contiguous(memory_format=layout).requires_grad_()
        upstream = grad.contiguous(memory_format=layout)
        wanted = [value, *module.parameters()]
        out = module(value)

        def call() -> Tensor:
            return torch.autograd.grad(out, wanted, upstream, retain_graph=True)[0]

        return call

    return make


def kernels(shape: Shape, threads: int, compiled: bool) -> Iterator[Group]:
    channels, k = shape[1], KERNEL_SIZE
    plain = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)
    fast = DepthwiseConv2d(channels, k, padding=k // 2, backend="rust")
    fast.load_state_dict(plain.state_dict())
    x, grad = torch.randn(shape), torch.randn(shape)
    flops = 2.0 * x.numel() * k * k
    for name, call, times in (
        ("forward", inference(x), 1),
        ("backward", backward(x, grad), 2),
    ):
        yield Group(
            f"depthwise k={k} {name}",
            shape,
            flops * times,
            {"": call(fast, torch.contiguous_format)},
            # A graph that is kept cannot be built under torch.compile.
            peers_of(plain, call, compiled and name == "forward"),
        )


def modules(shape: Shape, threads: int, compiled: bool) -> Iterator[Group]:
    channels, k = shape[1], KERNEL_SIZE
    x, grad = torch.randn(shape), torch.randn(shape)
    for unit in (xUnit, xUnitS, xUnitD):
        products = k * k + (channels if unit is xUnitD else 0)
        for norm in (False, True):
            for training in (False, True):
                fast = unit(channels, k, norm, backend="rust").train(training)
                plain = copy.deepcopy(fast)
                plain.backend = "torch"
                call = training_step(x, grad) if training else inference(x)
                bn = " BN" if norm else ""
                yield Group(
                    f"{unit.__name__}{bn} {'training step' if training else 'evaluation'}",
                    shape,
                    2.0 * x.numel() * products * (3 if training else 1),
                    {"": call(fast, torch.contiguous_format)},
                    peers_of(plain, call, compiled),
                )


def networks(shape: Shape, threads: int, compiled: bool) -> Iterator[Group]:
    features = shape[1]
    image: Shape = (shape[0], 1, *shape[2:])
    x = torch.rand(image)
    fast = models.XDnCNN("2018", 1, features, backend="auto").eval()
    plain = models.XDnCNN("2018", 1, features, backend="torch").eval()
    plain.load_state_dict(fast.state_dict())
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    products = sum(m.weight.numel() for m in convs)  # each weight meets each pixel once
    call = inference(x)
    ours = {"": call(fast, torch.contiguous_format)}
    runtime = rust_network(fast, x, threads)
    if runtime is not None:
        ours[" Network"] = runtime
    yield Group(
        "xDnCNN-2018 inference",
        image,
        2.0 * shape[0] * shape[2] * shape[3] * products,
        ours,
        peers_of(plain, call, compiled),
    )


def rust_network(model: models.XDnCNN, x: Tensor, threads: int) -> Call | None:
    """The runtime that needs no PyTorch, image by image; None where it is not to be had."""
    try:
        from xunit_rs._core import Network
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        model.save(path)
        network = Network.load(str(path))
    images = list(x.numpy())

    def call() -> Tensor:
        return torch.stack([torch.from_numpy(network.denoise(i, 0, threads)) for i in images])

    return call


# ---------------------------------------------------------------- measuring


class Peak:
    """FLOP/s of the best matrix product so far on one number of threads."""

    def __init__(self, size: int, seconds: float) -> None:
        self.a, self.b, self.out = (torch.rand(size, size) for _ in range(3))
        self.best = 0.0
        self.measure(seconds)
        self.told = self.best

    def measure(self, seconds: float) -> None:
        begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            torch.mm(self.a, self.b, out=self.out)
            end = time.perf_counter()
            self.best = max(self.best, 2.0 * len(self.a) ** 3 / (end - start))
            if end - begin > seconds:
                return

    def news(self) -> str | None:
        """What to say if it has risen by more than 5 % since it was last told."""
        if self.best <= 1.05 * self.told:
            return None
        old, self.told = self.told, self.best
        return (
            f"peak now {self.best / 1e9:.0f} GFLOP/s: the shares above are {self.best / old:.2f} "
            "times too high"
        )


def check(group: Group) -> None:
    """All contenders' results are equal, as far as float32 goes."""
    results = {name: call() for name, call in (group.peers | group.ours).items()}
    reference = results["NCHW"]
    scale = reference.abs().max().item()
    for name, result in results.items():
        error = (result - reference).abs().max().item() / scale
        if not error < 1e-3:  # NaN fails
            name = name.strip() or "ours"
            raise SystemExit(f"{group.operation} {group.shape}: {name} is wrong by {error:.1e}")


def measure(group: Group, settings: Settings) -> dict[str, list[float]]:
    """Seconds of every call that counts."""
    contenders = group.peers | group.ours
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    begin = time.perf_counter()
    rounds = 0
    while True:
        for name in names:
            call = contenders[name]
            time.sleep(settings.pause)
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        names.append(names.pop(0))  # nobody always follows the same one
        rounds += 1
        if settings.repeats is not None:
            if rounds >= settings.repeats:
                return times
        elif rounds >= LEAST_ROUNDS and time.perf_counter() - begin > settings.seconds:
            return times


def share_of(gflops: float, peak: Peak) -> dict[str, float | None]:
    share = gflops * 1e9 / peak.best
    return {"peak_gflops": peak.best / 1e9, "peak_share": share if share <= 1 else None}


def spread(times: dict[str, list[float]]) -> float:
    """How far the worst time is above the median of its contender."""
    return max(max(t) / statistics.median(t) for t in times.values())


def rows_of(group: Group, settings: Settings, threads: int, peak: Peak) -> list[dict[str, Any]]:
    check(group)
    peak.measure(settings.seconds / 10)
    times = measure(group, settings)
    again = spread(times) > OUTLIER
    if again:
        times = measure(group, settings)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(group.peers, key=lambda name: medians[name])
    return [
        {
            "operation": group.operation + name,
            "shape": list(group.shape),
            "threads": threads,
            "ours_ms": medians[name] * 1e3,
            "peers_ms": {peer: medians[peer] * 1e3 for peer in group.peers},
            "best_peer": best,
            "ratio_to_nchw": medians["NCHW"] / medians[name],
            "ratio_to_best": medians[best] / medians[name],
            "gflops": group.flops / medians[name] / 1e9,
            **share_of(group.flops / medians[name] / 1e9, peak),
            "rounds": len(times[name]),
            "spread": spread(times),
            "measured_again": again,
        }
        for name in group.ours
    ]


# ---------------------------------------------------------------- table


def heading(peers: list[str]) -> str:
    columns = "".join(f"{peer:>10}" for peer in peers)
    return (
        f"{'operation':<32} {'shape':<13} {'thr':>3}{'ours ms':>10}{columns}"
        f"{'/NCHW':>8}{'/best':>8}{'peak':>7}"
    )


def line(row: dict[str, Any], peers: list[str]) -> str:
    shape = "x".join(map(str, row["shape"]))
    times = (row["peers_ms"].get(peer) for peer in peers)
    columns = "".join(f"{'-':>10}" if t is None else f"{t:10.2f}" for t in times)
    share = "?" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
    noisy = " ~" if row["spread"] > OUTLIER else ""
    return (
        f"{row['operation']:<32} {shape:<13} {row['threads']:>3}{row['ours_ms']:10.2f}{columns}"
        f"{row['ratio_to_nchw']:8.2f}{row['ratio_to_best']:8.2f}{share:>7}{noisy}"
    )


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """After every row, whole or not at all: an interrupted run keeps what it has."""
    from xunit_rs import _core

    document = {
        "xunit_rs": __version__,
        "build": _core.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "rows": rows,
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


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

    shape.__name__, threads.__name__ = "shape NxCxHxW", "list of threads"
    positive.__name__, count.__name__ = "positive number", "count"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all")
    add("--threads", type=threads, help="numbers of threads, with commas (default 1,2)")
    add("--shape", type=shape, action="append", help="may be repeated; replaces the default shapes")
    add("--compile", action="store_true", help="torch.compile too")
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
    return arguments


def main() -> int:
    arguments = parse()
    tiny = arguments.tiny
    repeats = 2 if tiny and arguments.repeats is None else arguments.repeats
    settings = Settings(arguments.compile, arguments.seconds, repeats, 0.0 if tiny else PAUSE)
    shapes = arguments.shape or (TINY if tiny else SHAPES)
    counts = arguments.threads or ([1] if tiny else [1, 2])
    suites = SUITES if arguments.suite == "all" else (arguments.suite,)
    makers = {"kernels": kernels, "modules": modules, "networks": networks}
    peers = ["NCHW", "chl", *(["comp", "comp chl"] if arguments.compile else [])]
    if max(counts) > (os.cpu_count() or 1):
        print(f"note: {max(counts)} threads on {os.cpu_count()} CPUs", file=sys.stderr)

    from xunit_rs import _core

    isa = _core.build_info()["isa"]
    print(f"xunit-rs {__version__} ({isa}), torch {torch.__version__}, float32, medians")
    rows: list[dict[str, Any]] = []
    for threads in counts:
        torch.set_num_threads(threads)
        peak = Peak(128, 0.01) if tiny else Peak(1024, 1.0)
        print(f"\npeak on {threads} thread(s), by sgemm: {peak.best / 1e9:.0f} GFLOP/s")
        first = len(rows)
        print(heading(peers))
        for suite in suites:
            for shape in shapes:
                torch.manual_seed(0)
                for group in makers[suite](shape, threads, arguments.compile):
                    size = "x".join(map(str, group.shape))
                    progress(f"{suite}: {group.operation} {size}, {threads} thread(s)")
                    new = rows_of(group, settings, threads, peak)
                    progress("")
                    news = peak.news()
                    if news is not None:
                        print(news)
                    for row in new:
                        print(line(row, peers), flush=True)
                    rows += [{"suite": suite, **row} for row in new]
                    for row in rows[first:]:
                        row |= share_of(row["gflops"], peak)
                    if arguments.json is not None:
                        save(arguments.json, rows)
    if any(row["spread"] > OUTLIER for row in rows):
        print("\n~ a time was above 1.5 medians twice: the machine is busy, run these again")
    return 0


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
