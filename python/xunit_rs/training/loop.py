"""The training loop: residual learning of the noise, interruptible and exactly resumable."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from .._files import replacing
from ..evaluation import evaluate
from ..models import XDnCNN
from .data import Patches, read_folder

if TYPE_CHECKING:  # in typing itself only from Python 3.11 on
    from typing_extensions import Self

__all__ = ["TrainingError", "train"]

_DEFAULT_STEPS = 20_000
_WARM_UP = 0.04  # share of the run in which the learning rate rises
_FINAL_LR = 1e-3  # of the peak
_MAX_GRADIENT_NORM = 1.0
_LOG_EVERY = 50  # steps


class TrainingError(ValueError):
    """Training cannot go on: the loss is not finite, or a checkpoint does not fit."""


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    version: str = "2018",
    steps: int | None = None,
    sigma: float | tuple[float, float] = 25.0,
    patch_size: int = 64,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    time_budget: float | None = None,
    resume: bool = False,
    threads: int | None = None,
    init: str | os.PathLike[str] | None = None,
    precision: str = "auto",
    channels: int = 1,
    features: int = 64,
    depth: int | None = None,
    ema_decay: float = 0.999,
    val: str | os.PathLike[str] | None = None,
    val_sigma: Sequence[float] | None = None,
    validations: int = 20,
    checkpoint_every: float = 120.0,
) -> Path:
    """Train an XDnCNN to predict white Gaussian noise; return the path of its weights.

    The loss is ``mean((predict_noise(x + n) − n)²)``; Adam, with a learning rate that rises to
    `lr` and falls along a cosine to nearly 0, over `steps` or over `time_budget`, whichever is
    used up first. The result is the moving average of the weights.

    data: folder of clean images.
    val: folder of clean images for PSNR along the way (kair), `validations` times over the run, at
        each of `val_sigma`: by default sigma, or what lies in the range of 25 and 50.
    out: folder for ``xdncnn.safetensors`` (the result), ``last.pt`` (to resume) and ``log.jsonl``.
    steps: optimiser steps; without it 20 000, or as many as fit into the time budget.
    time_budget: seconds of training, counted over all resumed parts.
    sigma: noise standard deviation, 0-255 scale, or the range from which each patch draws its own,
        for a blind denoiser. patch_size: in pixels.
    resume: go on from ``last.pt``, under the same arguments, though `steps` and `time_budget` may
        be others, and are those of before if neither is given; with the same `steps` alone the
        result is bit for bit that of an uninterrupted run.
    init: checkpoint whose weights to start from, not read to resume; those of a grey network are
        spread over the channels of a colour one. threads: default, torch's own setting.
    precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 on a CPU with AMX tiles.
    ema_decay: of the moving average; it starts lower. checkpoint_every: seconds.

    Ctrl-C and SIGTERM finish the step, save ``last.pt`` and raise KeyboardInterrupt or SystemExit.
    Raises ValueError for arguments out of range or unfit images; FileExistsError if `out` holds a
    run and `resume` is not set; FileNotFoundError for a missing folder or nothing to resume;
    TrainingError (a ValueError) if the loss is no longer finite (the last checkpoint is kept) or
    the checkpoint is of other arguments.
    """
    _at_least(1, batch_size=batch_size, patch_size=patch_size, validations=validations)
    _at_least(0, seed=seed)
    if steps is not None:
        _at_least(1, steps=steps)
    if threads is not None:
        _at_least(0, threads=threads)
    _positive(lr=lr, checkpoint_every=checkpoint_every)
    if time_budget is not None:
        _positive(time_budget=time_budget)
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    if not (math.isfinite(high) and 0 <= low <= high):
        raise ValueError(f"sigma must be finite, 0 or more, a range rising, got {sigma!r}")
    if val_sigma is None:
        val_sigma = [s for s in (25.0, 50.0) if low < s < high] or [high]
    for level in val_sigma:
        if not (math.isfinite(level) and level >= 0):
            raise ValueError(f"val_sigma must be finite numbers, 0 or more, got {level!r}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay!r}")
    if steps is None and time_budget is None and not resume:
        steps = _DEFAULT_STEPS

    out = _output_folder(Path(out), resume)
    patches = Patches(data, patch_size, channels, seed)
    if val is not None:
        read_folder(val, channels)  # its faults should show now, not after an hour
    config = {
        "version": version,
        "steps": steps,
        "sigma": (float(low), float(high)) if isinstance(sigma, tuple) else float(sigma),
        "patch_size": patch_size,
        "batch_size": batch_size,
        "lr": float(lr),
        "seed": seed,
        "time_budget": time_budget,
        "precision": _precision(precision),
        "channels": channels,
        "features": features,
        "depth": depth,
        "ema_decay": float(ema_decay),
        "data": patches.fingerprint(),
    }
    with _threads(threads), _seeded(seed):
        model = XDnCNN(version, channels, features, depth)
        if init is not None and not resume:
            _start_from(model, init)
        run = _Run(model, config, patches, out)
        if resume:
            run.load()
        out.mkdir(parents=True, exist_ok=True)
        validation = _Validation(None if val is None else Path(val), val_sigma, validations)
        run.loop(validation, checkpoint_every)
        return run.finish(Path(data).resolve().name)


class _Validation(NamedTuple):
    folder: Path | None
    sigmas: Sequence[float]
    times: int  # over the run


class _Run:
    """The state of one training run, its checkpoints and its loop."""

    def __init__(self, model: XDnCNN, config: dict[str, Any], patches: Patches, out: Path) -> None:
        self.model = model.train()
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.config, self.patches, self.out = config, patches, out
        self.optimiser = torch.optim.Adam(model.parameters(), lr=config["lr"])
        self.step = 0
        self.elapsed = 0.0
        self.psnr: dict[float, float] = {}  # of the last validation, by sigma

    @property
    def progress(self) -> float:
        """Share of the run that is done: 1 as soon as the steps or the time are used up."""
        steps, budget = self.config["steps"], self.config["time_budget"]
        return max(
            0.0 if steps is None else self.step / steps,
            0.0 if budget is None else min(1.0, self.elapsed / budget),
        )

    def loop(self, validation: _Validation, checkpoint_every: float) -> None:
        log = _Log(self.out / "log.jsonl")
        before = self.elapsed
        start = last_save = time.monotonic()
        loss_sum, loss_count = 0.0, 0
        with _Signals() as signals, _Progress(self) as bar:
            while self.progress < 1:
                done = int(self.progress * validation.times)
                rate = self._learning_rate()
                loss_sum += self._train_step(rate)
                loss_count += 1
                self.elapsed = before + time.monotonic() - start
                if validation.folder and int(self.progress * validation.times) > done:
                    for sigma in validation.sigmas:
                        psnr = evaluate(self.average, validation.folder, sigma).psnr
                        self.elapsed = before + time.monotonic() - start
                        log.write(step=self.step, elapsed=self.elapsed, sigma=sigma, psnr=psnr)
                        self.psnr[sigma] = psnr
                finished = self.progress >= 1
                if finished or self.step % _LOG_EVERY == 0:
                    loss = loss_sum / loss_count
                    log.write(step=self.step, elapsed=self.elapsed, loss=loss, lr=rate)
                    bar.loss = loss
                    loss_sum, loss_count = 0.0, 0
                bar.show()
                if finished or signals.caught or time.monotonic() - last_save > checkpoint_every:
                    self.save()
                    last_save = time.monotonic()
                if not finished:
                    signals.stop_if_caught()

    def _train_step(self, rate: float) -> float:
        config = self.config
        clean, noise = map(
            torch.from_numpy,
            self.patches.batch(self.step, config["batch_size"], config["sigma"]),
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=config["precision"] == "bfloat16"):
            predicted = self.model.predict_noise(clean + noise)
        loss = nn.functional.mse_loss(predicted.float(), noise)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRADIENT_NORM)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            # Before the optimiser's step: weights and checkpoints stay as they were.
            kept = self.out / "last.pt"
            raise TrainingError(
                f"the loss is {value} and its gradient norm {norm.item()} at step {self.step}, "
                f"learning rate {rate:g}: try a lower lr"
                + (f"; the last good checkpoint is {kept}" if kept.exists() else "")
            )
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return value

    def _learning_rate(self) -> float:
        peak, progress = float(self.config["lr"]), self.progress
        if progress < _WARM_UP:
            return peak * (0.05 + 0.95 * progress / _WARM_UP)
        falling = 0.5 + 0.5 * math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))
        return peak * (_FINAL_LR + (1 - _FINAL_LR) * falling)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The share of the newest weights is 1/10 at first, so that the start is soon forgotten.
        newest = 1 - min(self.config["ema_decay"], (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        current = self.model.state_dict()
        for key, average in self.average.state_dict().items():
            if average.is_floating_point():  # BatchNorm's running statistics are averaged as well
                averages.append(average)
                values.append(current[key])
            else:
                average.copy_(current[key])
        torch._foreach_lerp_(averages, values, newest)

    def save(self) -> None:
        state = {
            "config": self.config,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,  # batches are drawn from (seed, step): this is the random state
            "elapsed": self.elapsed,
            "psnr": self.psnr,
        }
        with replacing(self.out / "last.pt") as temporary:
            torch.save(state, temporary)

    def load(self) -> None:
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            config = state["config"]
            length = {name: config[name] for name in ("steps", "time_budget")}
        except Exception as error:  # a damaged file: zip, pickle, key errors and more
            raise TrainingError(f"{path}: not a checkpoint of a training run: {error}") from error
        for name, value in self.config.items():
            if name not in ("steps", "time_budget") and config.get(name) != value:
                raise TrainingError(
                    f"{path}: was trained with {name} = {config.get(name)!r}, not {value!r}"
                )
        if self.config["steps"] is None and self.config["time_budget"] is None:
            self.config |= length
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.psnr = state["psnr"]
        _truncate_log(self.out / "log.jsonl", self.step)

    def validated(self) -> str:
        return ", ".join(f"{psnr:.3f} dB (sigma {sigma:g})" for sigma, psnr in self.psnr.items())

    def finish(self, data_name: str) -> Path:
        config = self.config
        recipe = (
            f"{self.step} steps of {config['batch_size']} patches {config['patch_size']}x"
            f"{config['patch_size']}, Adam, lr {config['lr']:g}, warm-up and cosine, "
            f"average {config['ema_decay']:g}, {config['precision']}, seed {config['seed']}, "
            f"{self.elapsed:.0f} s"
        )
        metadata = {
            "sigma": "-".join(f"{s:g}" for s in _pair(config["sigma"])),
            "recipe": recipe,
            "data": f"{data_name} ({config['data']})",
        }
        if self.psnr:
            metadata |= {"validation_psnr": self.validated(), "protocol": "kair"}
        path = self.out / "xdncnn.safetensors"
        self.average.save(path, **metadata)
        return path


class _Progress:
    """Lines on stderr: a live one on a terminal, else one every half minute."""

    def __init__(self, run: _Run, stream: TextIO | None = None) -> None:
        self.run = run
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.loss: float | None = None
        self.start_step, self.start_progress = run.step, run.progress
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self) -> None:
        now, run = time.monotonic(), self.run
        finished = run.progress >= 1
        if not finished and now - self.last < (0.5 if self.live else 30.0):
            return
        self.last = now
        spent = max(now - self.start, 1e-9)
        filled = int(20 * run.progress)
        left = (1 - run.progress) * spent / max(run.progress - self.start_progress, 1e-9)
        pixels = run.config["batch_size"] * run.config["patch_size"] ** 2
        parts = [
            f"[{'#' * filled}{'.' * (20 - filled)}] {100 * run.progress:.1f} %",
            f"step {run.step}",
            f"{(run.step - self.start_step) * pixels / spent / 1e6:.3f} Mpixel/s",
            f"{_clock(left)} left",
        ]
        if self.loss:
            parts.append(f"train {-10 * math.log10(self.loss):.2f} dB")
        if run.psnr:
            parts.append(f"val {run.validated()}")
        line = ", ".join(parts)
        end = "" if self.live and not finished else "\n"
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=self.stream, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


class _Log:
    """Lines of JSON in a file, as far as the disk takes them: training goes on without."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warned = False

    def write(self, **values: Any) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            if not self.warned:
                warnings.warn(f"{self.path}: lines are missing: {error.strerror}", stacklevel=2)
            self.warned = True


class _Signals:
    """Keeps Ctrl-C and SIGTERM until a step is complete; a second one acts at once."""

    def __init__(self) -> None:
        self.caught = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Elsewhere Python allows no handlers, and delivers no signals either.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _catch(self, number: int, _: Any) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def stop_if_caught(self) -> None:
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught:
            raise SystemExit(128 + self.caught)


def _output_folder(out: Path, resume: bool) -> Path:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; the results of training go to a folder")
    checkpoint = out / "last.pt"
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint to resume from")
    if not resume:
        for path in (checkpoint, out / "xdncnn.safetensors"):
            if path.exists():
                raise FileExistsError(
                    f"{path}: exists already; resume that run, or choose another folder"
                )
    return out


def _start_from(model: XDnCNN, init: str | os.PathLike[str]) -> None:
    other = XDnCNN.from_pretrained(init)
    if other.version != model.version:
        raise ValueError(f"{init}: is of version {other.version}, not {model.version}")
    state = other.state_dict()
    if other.channels == 1 < model.channels:
        # The colour network sees the mean of the channels at first, and takes its noise from each.
        head, count = state["blocks.0.conv.weight"], model.channels
        state["blocks.0.conv.weight"] = head.repeat(1, count, 1, 1) / count
        for key in ("tail.weight", "tail.bias"):
            state[key] = state[key].repeat_interleave(count, 0)
        for key in [key for key in state if key.startswith("blocks.0.norm.")]:
            if state[key].dim():
                state[key] = state[key].repeat(count)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{init}: does not fit the network to train: {error}") from error


def _pair(sigma: float | tuple[float, float]) -> tuple[float, ...]:
    return sigma if isinstance(sigma, tuple) else (sigma,)


def _precision(name: str) -> str:
    if name == "auto":
        # Measured: with AMX a step takes 0.7 of the time in float32, without it about twice.
        tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return "bfloat16" if tiles() else "float32"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be auto, float32 or bfloat16, got {name!r}")
    return name


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The first weights follow from `seed`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _at_least(least: int, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _positive(**values: Any) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _truncate_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: it will be logged again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line cut off by a crash
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(min(seconds, 359999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
