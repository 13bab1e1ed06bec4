"""The training loop: residual learning of the noise, interruptible and exactly resumable.

Processes, devices, precision and gradient clipping are Lightning Fabric's. The loop is ours, as
Lightning's Trainer would keep none of what it promises by itself: in the middle of an epoch it goes
on with other batches than an uninterrupted run, its checkpoints are not flushed to the disk before
they take the place of older ones, Ctrl-C breaks off a step, and its schedules know steps but not
the time that is left. Each would be a callback or a plugin, longer together than the loop.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import checkpoints
from .._files import replacing
from ..evaluation import evaluate
from ..models import Network, XDnCNN, create_model, from_pretrained, list_models
from ..models._base import ResidualDenoiser
from . import report
from .data import Patches, fingerprint, read_folder

if TYPE_CHECKING:  # in typing itself only from Python 3.11 on
    from typing_extensions import Self

__all__ = ["TrainingError", "train"]

_DEFAULT_STEPS = 20_000
_WARM_UP = 0.04  # share of the run in which the learning rate rises
_FINAL_LR = 1e-3  # of the peak
_MAX_GRADIENT_NORM = 1.0
_LOG_EVERY = 50  # steps
_PICTURES_EVERY = 60  # seconds


class TrainingError(ValueError):
    """Training cannot go on: the loss is not finite, or a checkpoint does not fit."""


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | nn.Module = "xdncnn",
    version: str = "2018",
    steps: int | None = None,
    sigma: float | tuple[float, float] = 25.0,
    patch_size: int = 64,
    batch_size: int = 16,
    lr: float = 1e-3,
    loss: str = "mse",
    schedule: str = "cosine",
    seed: int = 0,
    time_budget: float | None = None,
    resume: bool = False,
    threads: int | None = None,
    init: str | os.PathLike[str] | None = None,
    precision: str = "auto",
    accelerator: str = "auto",
    devices: int = 1,
    channels: int = 1,
    features: int | None = None,
    depth: int | None = None,
    ema_decay: float = 0.999,
    val: str | os.PathLike[str] | None = None,
    val_sigma: Sequence[float] | None = None,
    validations: int = 20,
    checkpoint_every: float = 120.0,
    license: str | None = None,
) -> Path:
    """Train a denoiser on white Gaussian noise; return the path of its weights.

    The loss is the mean of ``(model(x + n) − x)²``, or of its absolute value; Adam, with a learning
    rate that rises to `lr` and falls to nearly 0, over `steps` or over `time_budget`, whichever is
    used up first. The result is the moving average of the weights: at the end, or, with `val`, at
    the validation of the highest PSNR, the mean over `val_sigma`.

    data: folder of clean images.
    val: folder of clean images for PSNR along the way (kair), and SSIM if all are of 11×11 or more,
        `validations` times over the run, at each of `val_sigma`: by default sigma, or what lies in
        the range of 25 and 50.
    out: folder for ``xdncnn.safetensors`` (the result, by the name of the model), ``last.pt`` (to
        resume), ``log.csv``, ``curves.png``, ``samples.png`` and the log of TensorBoard; of several
        nodes, one that they share.
    model: name of a denoiser of ``models.list_models()``, or "xdncnn", of the given `version`; or a
        module that takes and gives (N, channels, H, W), white at 1, such as a DnCNN of xUnits by
        `replace_relu`. A copy of it is trained, and ``model.safetensors`` is the result: a file
        that `models.from_pretrained` takes, if it is a network of this package as it was built,
        else its state_dict.
    steps: optimiser steps; without it 20 000, or as many as fit into the time budget.
    time_budget: seconds of training, counted over all resumed parts.
    sigma: noise standard deviation, 0-255 scale, or the range from which each patch draws its own,
        for a blind denoiser. patch_size: in pixels. batch_size: over all processes.
    loss: "mse" or "l1". schedule: of `lr` after its rise: "cosine", or "step", a tenth of it from
        half of the run on and a hundredth from three quarters on.
    resume: go on from ``last.pt``, under the same arguments, though `steps` and `time_budget` may
        be others, and are those of before if neither is given; with the same `steps` alone, on one
        CPU, the result is bit for bit that of an uninterrupted run.
    init: checkpoint whose weights to start from, not read to resume; those of a grey xDnCNN are
        spread over the channels of a colour one.
    devices: processes to train in, by DistributedDataParallel, each with an equal share of a batch
        and BatchNorm over that share. Under torchrun the processes are those it started. To ask for
        several takes a script with ``if __name__ == "__main__"``, or the command line.
    accelerator: "cpu", "cuda", or "auto": cuda where there is one. threads: of each process, by
        default torch's own setting.
    precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device has units for
        it (AMX tiles on a CPU).
    channels: of the images, where the module has no such attribute; features, depth: of a model by
        name, by default its own. license: of the result, for its metadata.
    ema_decay: of the moving average; it starts lower. checkpoint_every: seconds.

    Ctrl-C and SIGTERM finish the step, save ``last.pt`` and raise KeyboardInterrupt or SystemExit.
    Raises ValueError for arguments out of range or unfit images; FileExistsError if `out` holds a
    run and `resume` is not set; FileNotFoundError for a missing folder or nothing to resume;
    TrainingError (a ValueError) if the loss is no longer finite (the last checkpoint is kept) or
    the checkpoint is of other arguments; ImportError without the extra `train`.
    """
    _at_least(1, batch_size=batch_size, patch_size=patch_size, validations=validations)
    _at_least(1, devices=devices)
    _at_least(0, seed=seed)
    if steps is not None:
        _at_least(1, steps=steps)
    if threads is not None:
        _at_least(0, threads=threads)
    _positive(lr=lr, checkpoint_every=checkpoint_every)
    if time_budget is not None:
        _positive(time_budget=time_budget)
    _one_of(("mse", "l1"), loss=loss)
    _one_of(("cosine", "step"), schedule=schedule)
    _one_of(("auto", "cpu", "cuda"), accelerator=accelerator)
    _one_of(("auto", "float32", "bfloat16"), precision=precision)
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
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(
            f"accelerator 'cuda' with devices {devices}: PyTorch sees {torch.cuda.device_count()}"
        )
    if isinstance(model, str):
        name = f"xdncnn-{version}" if model == "xdncnn" else model
        result = f"{name.split('-')[0]}.safetensors"
    else:
        name, result = _description(model), "model.safetensors"
        channels = getattr(model, "channels", channels)
        if init is not None:
            raise ValueError(f"init is for models by name; load {init} into the module itself")

    out = _output_folder(Path(out), resume, result)
    patches = Patches(data, patch_size, channels, seed)
    validation = _Validation(tuple(val_sigma), validations)
    pictures = patches.images
    if val is not None:
        pictures = read_folder(val, channels)  # its faults should show now, not after an hour
        validation.folder, validation.images = Path(val), fingerprint(pictures)
        validation.ssim = all(min(p.shape[:2]) >= 11 for p in pictures)
    validation.pictures = pictures[:3]
    config: dict[str, Any] = {
        "model": name,
        "steps": steps,
        "sigma": (float(low), float(high)) if isinstance(sigma, tuple) else float(sigma),
        "patch_size": patch_size,
        "batch_size": batch_size,
        "lr": float(lr),
        "loss": loss,
        "schedule": schedule,
        "seed": seed,
        "time_budget": time_budget,
        "precision": _precision(precision, accelerator),
        "channels": channels,
        "features": features,
        "depth": depth,
        "ema_decay": float(ema_decay),
        "data": fingerprint(patches.images),
    }
    _needs("lightning", "matplotlib", "tensorboard", *(["skimage"] if validation.ssim else []))
    job = _Job(
        config=config,
        out=out,
        result=result,
        patches=patches,
        validation=validation,
        checkpoint_every=checkpoint_every,
        resume=resume,
        threads=threads,
        spawned=devices > 1 and not _under_torchrun(),
        connects=not (torch.distributed.is_available() and torch.distributed.is_initialized()),
        metadata={"data": Path(data).resolve().name, "license": license or "not stated"},
    )
    with _seeded(seed, accelerator):
        if isinstance(model, nn.Module):
            network = copy.deepcopy(model)
        else:
            network = _network(name, version, channels, features, depth)
            if init is not None and not resume:
                _start_from(network, init)
        fabric = _fabric(accelerator, devices, config["precision"])
        if batch_size % fabric.world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {fabric.world_size} processes, "
                f"got {batch_size}"
            )
        with _Forwarding() if job.spawned else contextlib.nullcontext():
            result_or_error = fabric.launch(_work, job, network)
    if isinstance(result_or_error, BaseException):
        raise result_or_error
    path: Path = result_or_error
    return path


@dataclass
class _Validation:
    sigmas: Sequence[float]
    times: int  # over the run
    folder: Path | None = None
    ssim: bool = False
    images: str = ""  # their fingerprint
    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Of all that PSNRs must have in common to be compared."""
        return f"{self.images}, sigma {', '.join(map(str, self.sigmas))}"


@dataclass
class _Job:
    """All that a process needs to know."""

    config: dict[str, Any]
    out: Path
    result: str  # name of the file
    patches: Patches
    validation: _Validation
    checkpoint_every: float
    resume: bool
    threads: int | None
    spawned: bool
    metadata: dict[str, str]
    # Whether the group of processes is made, and ended, by this run.
    connects: bool = True


def _fabric(accelerator: str, devices: int, precision: str) -> Any:
    from lightning.fabric import Fabric  # takes seconds to import, and is in the extra `train`

    nodes, strategy = 1, "ddp_spawn" if devices > 1 else "auto"
    if _under_torchrun():
        world, devices = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        nodes, strategy = world // devices, "ddp"
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )


def _under_torchrun() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def _work(fabric: Any, job: _Job, network: nn.Module) -> Path | BaseException:
    """What each process does; what all of them raise together is returned.

    The launcher would wrap it up in an error of its own.
    """
    if job.spawned:
        os.setpgid(0, 0)  # Ctrl-C reaches the first process alone, which passes it on
    try:
        with _threads(job.threads):
            run = _Run(fabric, network, job)
            if job.resume:
                run.load()
            if fabric.is_global_zero:
                job.out.mkdir(parents=True, exist_ok=True)
            fabric.barrier()
            run.loop()
            result: Path | BaseException = run.finish()
    except (TrainingError, KeyboardInterrupt, SystemExit) as error:
        result = error
    if fabric.world_size > 1 and job.connects:
        # Fabric leaves a group of gloo's to the end of the process, where threads of it that still
        # run, because another process is slower, would abort this one.
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return result


class _Run:
    """The state of one training run, its checkpoints and its loop, in one of the processes."""

    def __init__(self, fabric: Any, network: nn.Module, job: _Job) -> None:
        self.fabric, self.network, self.job = fabric, network.train(), job
        self.config, self.out = job.config, job.out
        self.average = fabric.to_device(copy.deepcopy(network).eval().requires_grad_(False))
        if not hasattr(self.average, "channels"):
            self.average.channels = self.config["channels"]  # which evaluation asks for
        adam = torch.optim.Adam(network.parameters(), lr=self.config["lr"])
        self.model, self.optimiser = fabric.setup(network, adam)
        self.step = 0
        self.elapsed = 0.0
        self.loss_sum, self.loss_count = 0.0, 0  # since the last line of the log
        self.loss: float | None = None  # in that line
        self.validated = 0  # how often
        self.scores: dict[float, tuple[float, float | None]] = {}  # PSNR, SSIM by sigma
        self.best: dict[str, Any] | None = None  # of the validations
        self.log_size = 0

    @property
    def progress(self) -> float:
        """Share of the run that is done: 1 as soon as the steps or the time are used up."""
        steps, budget = self.config["steps"], self.config["time_budget"]
        return max(
            0.0 if steps is None else self.step / steps,
            0.0 if budget is None else min(1.0, self.elapsed / budget),
        )

    def loop(self) -> None:
        job, first = self.job, self.fabric.is_global_zero
        self._origin = time.monotonic() - self.elapsed
        last_save = last_picture = time.monotonic()
        batch = self.config["batch_size"]
        with (
            _Signals() as signals,
            report.Progress(self._state(), batch, self.config["loss"], quiet=not first) as bar,
            report.Log(self.out, self.log_size, self.step) if first else _NoLog() as log,
        ):
            while True:
                times = job.validation.times
                if job.validation.folder and int(self.progress * times) > self.validated:
                    self.save(log)  # it may take longer than an interval
                    last_save = time.monotonic()
                    self._validate(job.validation, log)
                    self._tick(signals)
                    self.validated = int(self.progress * times)
                    if first and time.monotonic() - last_picture > _PICTURES_EVERY:
                        self._draw()
                        last_picture = time.monotonic()
                if self.progress >= 1:
                    break
                rate = self._learning_rate()
                self.loss_sum += self._train_step(rate)
                self.loss_count += 1
                caught = self._tick(signals)
                if self.progress >= 1 or self.step % _LOG_EVERY == 0:
                    self.loss = self.loss_sum / self.loss_count
                    log.write(self.step, self.elapsed, loss=self.loss, lr=rate)
                    self.loss_sum, self.loss_count = 0.0, 0
                bar.show(self._state())
                if caught or time.monotonic() - last_save > job.checkpoint_every:
                    self.save(log)
                    last_save = time.monotonic()
                if caught and self.progress < 1:
                    raise KeyboardInterrupt if caught == signal.SIGINT else SystemExit(128 + caught)
            self.save(log)
        if first:
            if self.best is not None:
                self.average.load_state_dict(self.best["average"])
            self._draw()

    def _train_step(self, rate: float) -> float:
        config, fabric = self.config, self.fabric
        share = config["batch_size"] // fabric.world_size
        part = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
        batch = self.job.patches.batch(self.step, config["batch_size"], config["sigma"])
        clean, noise = (fabric.to_device(torch.from_numpy(values[part])) for values in batch)
        # Random layers, too, depend on nothing but the step.
        seeds = np.random.SeedSequence([config["seed"], self.step, fabric.global_rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        denoised = self.model(clean + noise)
        if denoised.shape != clean.shape:
            shapes = f"{tuple(denoised.shape)} for an input of {tuple(clean.shape)}"
            raise TrainingError(f"the model must keep the shape of images; it gives {shapes}")
        loss = getattr(nn.functional, f"{config['loss']}_loss")(denoised, clean)
        self.optimiser.zero_grad()
        fabric.backward(loss)
        norm = fabric.clip_gradients(
            self.model, self.optimiser, max_norm=_MAX_GRADIENT_NORM, error_if_nonfinite=False
        )
        value = float(fabric.all_reduce(loss.detach(), reduce_op="mean"))
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            # Before the optimiser's step: weights and checkpoints stay as they were.
            kept = self.out / "last.pt"
            raise TrainingError(
                f"the loss is {value} and its gradient norm {float(norm)} at step {self.step}, "
                f"learning rate {rate:g}: try a lower lr"
                + (f"; the last good checkpoint is {kept}" if kept.exists() else "")
            )
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return value

    def _tick(self, signals: _Signals) -> int:
        """Note the time; return the signal caught. All processes agree on both."""
        self.elapsed = time.monotonic() - self._origin
        if self.fabric.world_size == 1:
            return signals.caught
        both = torch.tensor([self.elapsed, signals.caught], dtype=torch.float64)
        self.elapsed, caught = self.fabric.all_reduce(both, reduce_op="max").tolist()
        return int(caught)

    def _validate(self, validation: _Validation, log: report.Log | _NoLog) -> None:
        if not self.fabric.is_global_zero or validation.folder is None:
            return
        for sigma in validation.sigmas:
            result = evaluate(self.average, validation.folder, sigma, with_ssim=validation.ssim)
            self.scores[float(sigma)] = result.psnr, result.ssim
            elapsed = time.monotonic() - self._origin
            log.write(self.step, elapsed, sigma=sigma, psnr=result.psnr, ssim=result.ssim)
        psnr = math.fsum(score for score, _ in self.scores.values()) / len(self.scores)
        if self.best is None or psnr >= self.best["psnr"]:
            self.best = {
                "of": validation.fingerprint(),
                "psnr": psnr,
                "step": self.step,
                "scores": dict(self.scores),
                "average": copy.deepcopy(self.average.state_dict()),
            }

    def _learning_rate(self) -> float:
        peak, progress = float(self.config["lr"]), self.progress
        if progress < _WARM_UP:
            return peak * (0.05 + 0.95 * progress / _WARM_UP)
        if self.config["schedule"] == "step":
            return peak * (1 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
        falling = 0.5 + 0.5 * math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))
        return peak * (_FINAL_LR + (1 - _FINAL_LR) * falling)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The share of the newest weights is 1/10 at first, so that the start is soon forgotten.
        newest = 1 - min(self.config["ema_decay"], (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        current = self.network.state_dict()
        for key, average in self.average.state_dict().items():
            if average.is_floating_point():  # BatchNorm's running statistics are averaged as well
                averages.append(average)
                values.append(current[key])
            else:
                average.copy_(current[key])
        torch._foreach_lerp_(averages, values, newest)

    def _state(self) -> report.State:
        return report.State(self.step, self.progress, self.loss, _measured(self.scores, 0, " dB"))

    def _draw(self) -> None:
        validation, log = self.job.validation, self.out / "log.csv"
        try:
            if log.is_file():
                report.draw_curves(log, self.out / "curves.png")
            target = self.out / "samples.png"
            report.draw_samples(self.average, validation.pictures, max(validation.sigmas), target)
        except OSError as error:
            warnings.warn(f"{self.out}: pictures are missing: {error.strerror}", stacklevel=2)

    def save(self, log: report.Log | _NoLog) -> None:
        # fabric.save would not have the file on the disk before it replaces the old one.
        if not self.fabric.is_global_zero:
            return
        state = {
            "config": self.config,
            "model": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,  # batches are drawn from (seed, step): this is the random state
            "elapsed": self.elapsed,
            "loss": (self.loss_sum, self.loss_count),
            "validated": self.validated,
            "scores": self.scores,
            "best": self.best,
            "log_size": log.size,
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
        self.network.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.loss_sum, self.loss_count = state["loss"]
        self.scores, self.log_size = state["scores"], state["log_size"]
        best = state.get("best")
        if best is not None and best["of"] == self.job.validation.fingerprint():
            self.best = best
        self.validated = min(state["validated"], int(self.progress * self.job.validation.times))
        if self.fabric.is_global_zero:
            for left in self.out.glob(".xunit-rs-*.tmp"):  # by a run that was killed
                left.unlink(missing_ok=True)

    def finish(self) -> Path:
        path = self.out / self.job.result
        if not self.fabric.is_global_zero:
            return path
        config, given = self.config, self.job.metadata
        scores = {} if self.best is None else self.best["scores"]
        which = "" if self.best is None else f" of step {self.best['step']}"
        recipe = (
            f"{self.step} steps of {config['batch_size']} patches {config['patch_size']}x"
            f"{config['patch_size']}, {config['loss']}, Adam, lr {config['lr']:g}, warm-up and "
            f"{config['schedule']}, average {config['ema_decay']:g}{which}, {config['precision']}, "
            f"seed {config['seed']}, {self.elapsed:.0f} s on {self.fabric.world_size} x "
            f"{self.fabric.device.type}"
        )
        metadata = {
            "sigma": "-".join(f"{s:g}" for s in _pair(config["sigma"])),
            "recipe": recipe,
            "data": f"{given['data']} ({config['data']})",
            "license": given["license"],
        }
        folder = self.job.validation.folder
        if scores and folder:
            metadata |= {
                "validation_data": folder.resolve().name,
                "validation_psnr": _measured(scores, 0, " dB"),
                "protocol": "kair",
            }
            if self.job.validation.ssim:
                metadata["validation_ssim"] = _measured(scores, 1)
        if isinstance(self.average, Network):
            try:
                self.average.save(path, **metadata)
                return path
            except ValueError:
                if path.name != "model.safetensors":
                    raise
        kind = type(self.average)
        metadata["architecture"] = f"{kind.__module__}.{kind.__qualname__}"
        checkpoints.write(path, self.average.state_dict(), metadata)
        return path


class _NoLog:
    """The log of the processes that keep none."""

    size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, *_: Any, **__: Any) -> None: ...


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


class _Forwarding(_Signals):
    """Passes signals on to the processes started meanwhile, which finish their step and save."""

    def __enter__(self) -> Self:
        self._others = set(multiprocessing.active_children())
        return super().__enter__()

    def _catch(self, number: int, _: Any) -> None:
        for process in set(multiprocessing.active_children()) - self._others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or os.getpid(), number)


def _output_folder(out: Path, resume: bool, result: str) -> Path:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; the results of training go to a folder")
    checkpoint = out / "last.pt"
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no checkpoint to resume from; without resume the run starts anew"
        )
    if not resume:
        for path in (checkpoint, out / result):
            if path.exists():
                raise FileExistsError(
                    f"{path}: exists already; resume that run, or choose another folder"
                )
    return out


def _network(
    name: str, version: str, channels: int, features: int | None, depth: int | None
) -> Network:
    sizes = {"channels": channels, "features": features, "depth": depth}
    given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if name == f"xdncnn-{version}":
        return XDnCNN(version, **given)  # which tells a version that there is not
    with torch.device("meta"):
        kinds = {each: create_model(each) for each in list_models()}
    denoisers = [each for each, kind in kinds.items() if isinstance(kind, ResidualDenoiser)]
    _one_of(("xdncnn", *denoisers), model=name)
    for key in given:
        if key not in kinds[name].config():
            raise ValueError(f"{key} is not an argument of model {name!r}, got {given[key]!r}")
    return create_model(name, **given)


def _description(model: nn.Module) -> str:
    """A module as checkpoints know it again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a torch module, got {model!r}")
    shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    count = sum(parameter.numel() for parameter in model.parameters())
    if count == 0:
        raise ValueError(f"model has no parameters to train: {type(model).__name__}")
    return f"{type(model).__name__}, {count} parameters, {zlib.crc32(repr(shapes).encode()):08x}"


def _start_from(model: Network, init: str | os.PathLike[str]) -> None:
    other = from_pretrained(init)
    if other.architecture != model.architecture:
        raise ValueError(f"{init}: is of {other.architecture}, not {model.architecture}")
    state = other.state_dict()
    if isinstance(model, XDnCNN) and other.channels == 1 < model.channels:
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


def _measured(
    scores: Mapping[float, tuple[float, float | None]], which: int, unit: str = ""
) -> str:
    """PSNR (0) or SSIM (1) of a validation, by sigma."""
    digits = 4 if which else 3
    return ", ".join(
        f"{values[which]:.{digits}f}{unit} (sigma {sigma:g})"
        for sigma, values in scores.items()
        if values[which] is not None
    )


def _precision(name: str, accelerator: str) -> str:
    if name != "auto":
        return name
    if accelerator == "cuda":
        units = torch.cuda.get_device_capability() >= (8, 0)
    else:
        # Measured: with AMX a step takes 0.7 of the time in float32, without it about twice.
        units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "bfloat16" if units else "float32"


def _needs(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}: pip install 'xunit-rs[train]'", name=name)


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
def _seeded(seed: int, accelerator: str) -> Iterator[None]:
    """The first weights follow from `seed`; the caller's random state is left alone."""
    devices = range(torch.cuda.device_count()) if accelerator == "cuda" else ()
    with torch.random.fork_rng(devices=devices):
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


def _one_of(known: Sequence[str], **values: Any) -> None:
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
