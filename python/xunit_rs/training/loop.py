"""The training loop: resumable, interruptible, limited by steps or by time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from .. import checkpoints
from ..models import XDnCNN
from .data import Patches, read_folder

__all__ = ["TrainingError", "train"]

WEIGHTS = "xdncnn.safetensors"
_LAST = "last.pt"
_LOG = "log.jsonl"

_DEFAULT_STEPS = 20_000
_WARM_UP = 0.03  # share of the run
_SAVE_EVERY = 60.0  # seconds
_LOG_EVERY = 50  # steps
_BATCH_NORM_BATCHES = 200

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainingError(ValueError, RuntimeError):
    """Training cannot start, resume or go on; the message says why."""


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    version: str = "2018",
    channels: int = 1,
    features: int = 64,
    depth: int | None = None,
    steps: int | None = None,
    sigma: float = 25.0,
    patch_size: int = 64,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    time_budget: float | None = None,
    resume: bool = False,
    threads: int | None = None,
    init: str | os.PathLike[str] | None = None,
    precision: str = "float32",
) -> Path:
    """Train a models.XDnCNN to predict white Gaussian noise, and return the path of its weights.

    Minimises ``mean (predict_noise(clean + noise) − noise)²`` by Adam; the learning rate rises to
    `lr` over the first 3 % of the run and falls to 0 along a cosine. At the end the running
    statistics of every BatchNorm are computed anew for the final weights.

    data: folder of clean images. out: folder, made if it is not there, for ``xdncnn.safetensors``
    (the result), ``last.pt`` (the state, every minute and when interrupted) and ``log.jsonl``.
    version, channels, features, depth: of the network. steps: 20 000 if neither it nor
    `time_budget`, in seconds, is given; whichever ends first ends the run. sigma: on the 0-255
    scale. patch_size: pixels. resume: go on from ``last.pt`` as if there had been no interruption,
    with the same data and arguments (steps and time_budget may grow). threads: PyTorch's are left
    as they are if None. init: a checkpoint to start the weights from. precision: "bfloat16" trains
    under autocast, which is faster where the CPU multiplies bfloat16 natively.

    Ctrl-C and SIGTERM save the state, then raise KeyboardInterrupt.
    Raises ValueError or a subclass for arguments that make no sense, data without usable images, a
    state that does not fit, and a loss that is not finite; FileExistsError if `out` holds a run
    and resume is not set; FileNotFoundError if resume is set and it holds none.
    Source: residual learning as Zhang et al., DnCNN, TIP 2017; network as models.XDnCNN.
    """
    if steps is None and time_budget is None:
        steps = _DEFAULT_STEPS
    _check(
        steps=steps, time_budget=time_budget, patch_size=patch_size, batch_size=batch_size,
        lr=lr, threads=threads,
    )  # fmt: skip
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed!r}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, not {precision!r}")
    files = read_folder(data, channels)
    patches = Patches([pixels for _, pixels in files], patch_size, sigma, seed)

    torch.manual_seed(seed)
    model = XDnCNN(version, channels, features, depth)
    if init is not None:
        _initialise(model, init)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    config = {
        "version": version, "channels": channels, "features": features, "depth": len(model.blocks),
        "sigma": float(sigma), "patch_size": patch_size, "batch_size": batch_size, "lr": lr,
        "seed": seed, "precision": precision, "images": len(patches.pixels),
    }  # fmt: skip

    folder = Path(os.fspath(out))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; training writes to a folder")
    last = folder / _LAST
    step, elapsed = 0, 0.0
    if resume:
        step, elapsed = _restore(last, config, model, optimiser)
    elif last.exists() or (folder / WEIGHTS).exists():
        raise FileExistsError(f"{folder}: holds a training run; resume it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state = {"config": config, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        with checkpoints.replacing(last) as temporary:
            torch.save({**state, "step": step, "elapsed": elapsed}, temporary)

    progress = _Progress(steps, time_budget)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    model.train()
    losses: list[float] = []
    saved = time.monotonic()
    with _threads(threads), _interrupts() as interrupted:
        while True:
            done = _done(step, elapsed, steps, time_budget)
            if done >= 1:
                break
            started = time.monotonic()
            share = _done(step + 1, elapsed, steps, time_budget)
            optimiser.param_groups[0]["lr"] = lr * _rate(share)
            clean, noise = patches.batch(step, batch_size)
            with autocast:
                predicted = model.predict_noise(clean + noise)
            loss = F.mse_loss(predicted.float(), noise)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step}; {last} holds the last good state"
                )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(loss.item())
            step += 1
            elapsed += time.monotonic() - started

            if step % _LOG_EVERY == 0:
                mean = math.fsum(losses) / len(losses)
                losses.clear()
                _log(folder, step, elapsed, mean, lr * _rate(share))
                progress.show(step, elapsed, mean)
            if interrupted() or time.monotonic() - saved > _SAVE_EVERY:
                save()
                saved = time.monotonic()
            if interrupted():
                progress.close()
                raise KeyboardInterrupt
        save()
        progress.close()
        _refresh_batch_norm(model, patches, step, batch_size)

    recipe = (
        f"Adam, lr {lr:g} cosine, {step} steps of {batch_size} patches of "
        f"{patch_size}x{patch_size}, {precision}, seed {seed}"
    )
    source = f"{Path(os.fspath(data)).name}, {len(files)} images"
    model.save(folder / WEIGHTS, sigma=f"{sigma:g}", recipe=recipe, data=source)
    return folder / WEIGHTS


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be greater than 0, not {value!r}")


def _done(step: int, elapsed: float, steps: int | None, time_budget: float | None) -> float:
    """The share of the run that is over."""
    return max(
        0.0 if steps is None else step / steps,
        0.0 if time_budget is None else elapsed / time_budget,
    )


def _rate(share: float) -> float:
    """The learning rate, relative to its peak, when `share` of the run is over."""
    share = min(share, 1.0)
    return min(1.0, share / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


def _initialise(model: XDnCNN, path: str | os.PathLike[str]) -> None:
    state = checkpoints.load(path).state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"{path}: does not fit the network to train: {reason}") from error


def _restore(
    last: Path, config: dict[str, Any], model: XDnCNN, optimiser: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load the state of an interrupted run; its step and its seconds so far."""
    if not last.is_file():
        raise FileNotFoundError(f"{last}: no such file: nothing to resume")
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
        before = state["config"]
    except OSError:
        raise
    except Exception as error:  # as in checkpoints.load
        raise TrainingError(f"{last}: not the state of a training run: {error}") from error
    for name, value in config.items():
        if before.get(name) != value:
            raise TrainingError(
                f"{last}: was trained with {name} = {before.get(name)!r}, not {value!r}"
            )
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), float(state["elapsed"])


def _refresh_batch_norm(model: nn.Module, patches: Patches, step: int, batch_size: int) -> None:
    """Average the statistics of the final weights over many batches, instead of trailing them."""

    def inputs() -> Iterator[torch.Tensor]:
        for number in range(_BATCH_NORM_BATCHES):
            clean, noise = patches.batch(step + number, batch_size)
            yield clean + noise

    update_bn(inputs(), model)
    model.eval()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in two."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set  # only the main thread may handle signals
        return

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():  # the second time it is urgent
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(folder: Path, step: int, elapsed: float, loss: float, lr: float) -> None:
    line = {"step": step, "seconds": round(elapsed, 1), "loss": loss, "lr": lr}
    with open(folder / _LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class _Progress:
    """A line on stderr: rewritten on a terminal, else a new one every half minute."""

    def __init__(self, steps: int | None, time_budget: float | None) -> None:
        self.steps, self.time_budget = steps, time_budget
        self.live = sys.stderr.isatty()
        self.shown = -math.inf

    def show(self, step: int, elapsed: float, loss: float) -> None:
        now = time.monotonic()
        if not self.live and now - self.shown < 30:
            return
        self.shown = now
        share = _done(step, elapsed, self.steps, self.time_budget)
        left = elapsed * (1 - share) / share
        # The PSNR of the training batches, in dB, is what the loss means to a reader.
        text = (
            f"step {step}, {100 * share:.0f} %, {left / 60:.0f} min left, "
            f"PSNR {-10 * math.log10(max(loss, 1e-12)):.2f} dB"
        )
        start, end = ("\r\x1b[K", "") if self.live else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live and self.shown > -math.inf:
            print(file=sys.stderr)
