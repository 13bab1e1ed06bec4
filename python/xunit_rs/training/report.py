"""What a run shows of itself: a progress bar, a log, curves, and pictures."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._files import replacing
from .._terminal import gauge
from ..evaluation import psnr

if TYPE_CHECKING:  # in typing itself only from Python 3.11 on
    from typing_extensions import Self

__all__ = ["Log", "Progress", "State", "draw_curves", "draw_samples"]

_PICTURE = 256  # largest side of a sample, pixels
_FIELDS = ("step", "elapsed", "loss", "lr", "sigma", "psnr", "ssim")


class State(NamedTuple):
    """Where a run stands; progress is the share that is done, loss a mean since the last line."""

    step: int
    progress: float
    loss: float | None
    validated: str


class Progress:
    """Lines on stderr: a live one on a terminal, else one every half minute."""

    def __init__(
        self, start: State, patches: int, loss: str, *, quiet: bool, stream: TextIO | None = None
    ) -> None:
        """patches: in a step."""
        self.patches, self.quiet, self.squares = patches, quiet, loss == "mse"
        self.stream = sys.stderr if stream is None else stream
        self.live = not quiet and self.stream.isatty()
        self.first = start
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def show(self, state: State) -> None:
        now = time.monotonic()
        finished = state.progress >= 1
        if self.quiet or (not finished and now - self.last < (0.5 if self.live else 30.0)):
            return
        self.last = now
        spent = max(now - self.start, 1e-9)
        left = (1 - state.progress) * spent / max(state.progress - self.first.progress, 1e-9)
        parts = [
            f"{gauge(state.progress)} {100 * state.progress:.1f} %",
            f"step {state.step}",
            f"{(state.step - self.first.step) * self.patches / spent:.1f} patches/s",
            f"{_clock(left)} left",
        ]
        if state.loss:
            decibel = f"train {-10 * math.log10(state.loss):.2f} dB"
            parts.append(decibel if self.squares else f"loss {state.loss:.4f}")
        if state.validated:
            parts.append(f"val {state.validated}")
        line = ", ".join(parts)
        end = "" if self.live and not finished else "\n"
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=self.stream, flush=True)


class Log:
    """``log.csv``, and the same for TensorBoard, as far as the disk takes them: training goes on.

    Lightning's CSVLogger starts a new file when a run is resumed. This one goes on with the old,
    less what was written after the checkpoint, which will be written again: a resumed run has the
    log of an uninterrupted one.
    """

    def __init__(self, folder: Path, size: int, step: int) -> None:
        """size: bytes of the log at the checkpoint, step: its step; both 0 for a new run."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.csv"
        self._warned = False
        try:
            if self.path.exists() and self.path.stat().st_size > size:
                os.truncate(self.path, size)
        except OSError as error:
            self._warn(error)
        purge = step + 1 if step else 0
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._board.close()
        except OSError as error:
            self._warn(error)

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, step: int, elapsed: float, **values: float | None) -> None:
        """Log values of `_FIELDS`; of `sigma`, those measured at that noise level."""
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, _FIELDS)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow({"step": step, "elapsed": round(elapsed, 3), **values})
            sigma = values.pop("sigma", None)
            suffix = "" if sigma is None else f"/sigma {sigma:g}"
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name + suffix, value, step)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(f"{self.path}: lines are missing: {error.strerror}", stacklevel=3)
        self._warned = True


def draw_curves(log: Path, target: Path) -> None:
    """Loss over steps, and PSNR of the validations for each noise level, from a log.csv."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a display

    with open(log, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in rows if row["loss"]]
    left.semilogy(_column(losses, "step"), _column(losses, "loss"))
    left.set(title="training loss", xlabel="step")
    for sigma in sorted({row["sigma"] for row in rows if row["sigma"]}, key=float):
        measured = [row for row in rows if row["sigma"] == sigma]
        label = f"σ = {float(sigma):g}"
        right.plot(_column(measured, "step"), _column(measured, "psnr"), ".-", label=label)
    right.set(title="validation", xlabel="step", ylabel="PSNR, dB")
    if right.lines:
        right.legend()
    else:
        right.text(0.5, 0.5, "no validation images", ha="center", transform=right.transAxes)
    _save(figure, target)


def draw_samples(
    model: nn.Module, images: Sequence[npt.NDArray[np.uint8]], sigma: float, target: Path
) -> None:
    """A row for each image, (H, W) or (H, W, 3): the middle of it noisy, denoised and clean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(images)), layout="constrained")
    for row, pixels in zip(figure.subplots(len(images), 3, squeeze=False), images, strict=True):
        top, left = (max(0, side - _PICTURE) // 2 for side in pixels.shape[:2])
        middle = pixels[top : top + _PICTURE, left : left + _PICTURE]
        clean = middle.astype(np.float32) / np.float32(255)
        noise = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
        noisy = (clean + noise).astype(np.float32)
        denoised = _denoised(model, noisy)
        titles = (
            f"noisy, σ = {sigma:g}, {psnr(noisy, clean):.2f} dB",
            f"denoised, {psnr(denoised, clean):.2f} dB",
            "clean",
        )
        for axes, title, image in zip(row, titles, (noisy, denoised, clean), strict=True):
            axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    _save(figure, target)


def _denoised(model: nn.Module, noisy: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    planes = noisy[None] if noisy.ndim == 2 else noisy.transpose(2, 0, 1)
    parameter = next(model.parameters())
    x = torch.from_numpy(np.ascontiguousarray(planes))[None].to(parameter.device, parameter.dtype)
    with torch.no_grad():
        out: npt.NDArray[np.float32] = model(x)[0].float().cpu().numpy()
    return np.clip(out[0] if noisy.ndim == 2 else out.transpose(1, 2, 0), 0, 1)


def _save(figure: Any, target: Path) -> None:
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=100, format=target.suffix[1:])


def _column(rows: Iterable[Mapping[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(min(seconds, 359999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
