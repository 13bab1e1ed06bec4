"""Patches per second of `training.train`, with our units and with plain ones in PyTorch.

    python benches/throughput.py [--filter TEXT] [--threads N] [--batch-size N] [--patch-size N]
                                 [--rounds N] [--tiny]

A step is all that training does in one: drawing patches and noise, forward, backward, clipping,
Adam and the moving average, in float32 on the CPU. Ours and plain take turns, each with the same
weights; the times are medians, and the first step of a turn is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from xunit_rs import replace_relu, xUnit
from xunit_rs.models import DnCNN, XDenseNet, XDnCNN
from xunit_rs.training import train

BACKENDS = {"ours": "auto", "plain": "torch"}
STEPS = 5  # of a turn


def of_replaced_relus(backend: str) -> nn.Module:
    unit = partial(xUnit, kernel_size=7, batch_norm=True, backend=backend)
    return replace_relu(DnCNN(depth=7), torch.zeros(1, 1, 16, 16), unit=unit)


def without_units(backend: str) -> nn.Module:
    return DnCNN()


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "xdncnn-2018": lambda backend: XDnCNN("2018", backend=backend),
    "xdncnn-2021": lambda backend: XDnCNN("2021", backend=backend),
    "xdensenet": lambda backend: XDenseNet(backend=backend),
    "DnCNN of 8 xUnits, by replace_relu": of_replaced_relus,
    "dncnn (17 convolutions, ReLU)": without_units,
}


def seconds(model: nn.Module, folder: Path, args: argparse.Namespace) -> list[float]:
    """Times of the steps of a turn."""
    starts: list[float] = []

    def note(module: nn.Module, _: Any) -> None:
        if module.training:  # the moving average draws samples
            starts.append(time.perf_counter())

    hook = model.register_forward_pre_hook(note)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        train(
            folder,
            out,
            model=model,
            steps=STEPS,
            batch_size=args.batch_size,
            patch_size=args.patch_size,
            accelerator="cpu",
            precision="float32",
            threads=args.threads,
        )
    hook.remove()
    return [after - before for before, after in itertools.pairwise(starts[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only models with this in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--patch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.batch_size, args.patch_size, args.rounds = 1, 8, 1
    size = f"{args.batch_size} patches of {args.patch_size}×{args.patch_size} a step"
    print(f"patches per second, {size}, {args.threads} thread(s), PyTorch {torch.__version__}")
    print(f"{'':36}{'ours':>9}{'plain':>9}{'ratio':>9}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pixels = np.random.default_rng(0).integers(0, 256, (180, 180), np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
        for name, make in MODELS.items():
            if args.filter not in name:
                continue
            models = {label: make(backend) for label, backend in BACKENDS.items()}
            models["plain"].load_state_dict(models["ours"].state_dict())
            if make is without_units:
                del models["ours"]
            times: dict[str, list[float]] = {label: [] for label in models}
            for _ in range(args.rounds):
                for label, model in models.items():
                    times[label] += seconds(model, folder, args)
            rates = {k: args.batch_size / statistics.median(v) for k, v in times.items()}
            ours, plain = rates.get("ours"), rates["plain"]
            both = f"{ours:9.1f}{plain:9.1f}{ours / plain:8.2f}×" if ours else f"{plain:18.1f}"
            print(f"{name:36}{both}", flush=True)


if __name__ == "__main__":
    main()
