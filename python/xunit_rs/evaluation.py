"""PSNR of denoisers on folders of clean images. Needs PyTorch only for what is of PyTorch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import images

__all__ = ["PROTOCOLS", "Evaluation", "evaluate", "psnr"]

PROTOCOLS = ("kair", "official2018")

Plane = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Mean PSNR in dB of `images` images, of the noisy ones for comparison, and of each by name."""

    psnr: float
    noisy_psnr: float
    images: int
    sigma: float
    protocol: str
    per_image: dict[str, float]


def psnr(image: npt.ArrayLike, reference: npt.ArrayLike, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio ``10 log10(peak² / mean (image − reference)²)``, dB, any shape.

    Infinite for equal arrays. Raises ValueError for shapes that differ or are empty.
    """
    a, b = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"the images must have one shape and pixels, got {a.shape} and {b.shape}")
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def evaluate(
    model: Any,
    folder: str | os.PathLike[str],
    sigma: float = 25.0,
    protocol: str = "kair",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Denoise every image of a folder with white Gaussian noise of `sigma` (0-255 scale) on it.

    model: a Denoiser, a torch module or any function of a noisy image, float32 HxW or HxWxC on the
        scale [0, 1] but not clipped to it. A module runs in evaluation mode, and is given its
        image on the device and in the dtype of its first parameter; its training flags are put
        back.
    protocol: "kair", as in the KAIR toolbox: noise of numpy's legacy generator, seeded with 0 for
        every image; the result clipped and rounded to 8 bits. "official2018", as in the xUnit code
        of 2018: noise of torch, seeded with 0 for every image; result clipped, not rounded.
    progress: called with the number of images done and of all, after each.

    Colour images go to a model of one channel as grey, by PIL's conversion "L".
    Raises ValueError for an unknown protocol, a sigma that is no finite number of at least 0 and a
    folder without images; FileNotFoundError for a missing folder; ImportError for "official2018"
    without PyTorch.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma!r}")
    paths = _images(folder)

    scores, noisy_scores = {}, []
    with _as_function(model) as (denoise, channels):
        for number, path in enumerate(paths, 1):
            clean = _read(path, channels)
            noisy = clean + _noise(clean.shape, sigma, protocol)
            result = np.clip(denoise(noisy), 0, 1)
            if protocol == "kair":
                result = np.rint(result * 255) / 255
            scores[path.name] = psnr(result, clean)
            noisy_scores.append(psnr(noisy, clean))
            if progress is not None:
                progress(number, len(paths))
    return Evaluation(
        psnr=math.fsum(scores.values()) / len(scores),
        noisy_psnr=math.fsum(noisy_scores) / len(scores),
        images=len(scores),
        sigma=float(sigma),
        protocol=protocol,
        per_image=scores,
    )


def _images(folder: str | os.PathLike[str]) -> list[Path]:
    folder = Path(os.fspath(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and images.is_image_name(p))
    if not paths:
        raise ValueError(f"{folder}: no images in this folder")
    return paths


def _read(path: Path, channels: int) -> Plane:
    image = images.read(path)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"{path}: mode {image.mode}, expected an image of 8 bits a channel")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
    return pixels / np.float32(255)


def _noise(shape: tuple[int, ...], sigma: float, protocol: str) -> Plane:
    scale = sigma / 255
    if protocol == "kair":
        return np.random.RandomState(0).normal(0, scale, shape).astype(np.float32)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "the noise of protocol 'official2018' is PyTorch's: pip install 'xunit-rs[torch]'",
            name="torch",
        ) from error
    generator = torch.Generator().manual_seed(0)
    planes = (1, *shape) if len(shape) == 2 else (shape[2], *shape[:2])
    noise: Plane = (torch.randn(planes, generator=generator) * scale).numpy()
    return noise[0] if len(shape) == 2 else noise.transpose(1, 2, 0)


@contextlib.contextmanager
def _as_function(model: Any) -> Iterator[tuple[Callable[[Plane], Any], int]]:
    """A function of one noisy image, and the channels it wants."""
    if hasattr(model, "network"):  # a Denoiser
        yield model, model.network.channels
    elif hasattr(model, "state_dict"):
        import torch

        def run(noisy: Plane) -> Any:
            planes = noisy[None] if noisy.ndim == 2 else noisy.transpose(2, 0, 1)
            x = torch.from_numpy(np.ascontiguousarray(planes))[None]
            p = next((p for p in model.parameters() if p.is_floating_point()), x)
            with torch.no_grad():
                out = model(x.to(p.device, p.dtype))[0].float().cpu().numpy()
            return out[0] if noisy.ndim == 2 else out.transpose(1, 2, 0)

        flags = {module: module.training for module in model.modules()}
        try:
            model.eval()
            yield run, getattr(model, "channels", 1)
        finally:
            for module, training in flags.items():
                module.training = training
    elif callable(model):
        yield model, getattr(model, "channels", 1)
    else:
        raise TypeError(f"model must be a Denoiser, a torch module or a function, not {model!r}")
