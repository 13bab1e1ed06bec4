"""PSNR and SSIM of denoisers on folders of clean images, beside published figures.

Needs PyTorch only for what is of PyTorch, and the extra `eval` only for SSIM and the baselines.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import images
from ._files import replacing

__all__ = [
    "BASELINES",
    "PROTOCOLS",
    "PUBLISHED",
    "Baseline",
    "Evaluation",
    "Published",
    "Row",
    "evaluate",
    "psnr",
    "ssim",
    "table",
    "write_csv",
]

PROTOCOLS = ("kair", "official2018", "official2021")
BASELINES = ("bm3d", "nlm", "tv", "wavelet")

Plane = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Mean PSNR in dB of `images` images, of the noisy ones for comparison, and of each by name.

    ssim: the mean, and per_image_ssim: that of each, where it was asked for.
    """

    psnr: float
    noisy_psnr: float
    images: int
    sigma: float
    protocol: str
    per_image: dict[str, float]
    ssim: float | None = None
    per_image_ssim: dict[str, float] = field(default_factory=dict)


class Row(NamedTuple):
    """A line of the table: which model, on which folder."""

    model: str
    data: str
    result: Evaluation


class Published(NamedTuple):
    """PSNR in dB of a method on a test set of so many images, by σ on the 0-255 scale."""

    data: str
    images: int
    method: str
    psnr: dict[float, float]
    source: str


_DNCNN = "Zhang et al., arXiv 1608.03981"
_DPIR = "Zhang et al., arXiv 2008.13751"
_XUNIT = "Kligvasser et al., CVPR 2018"
_SWINIR = "Liang et al., arXiv 2108.10257"

# Each by the protocol of its paper; DnCNN-S has a network for each σ, DnCNN-B one for all. Papers
# differ in the last digits: the one of DnCNN has 31.07 and 25.62 for BM3D on BSD68.
PUBLISHED = (
    Published("BSD68", 68, "BM3D", {15: 31.08, 25: 28.57, 50: 25.60}, _DPIR),
    Published("BSD68", 68, "WNNM", {15: 31.37, 25: 28.83, 50: 25.87}, _DNCNN),
    Published("BSD68", 68, "DnCNN-S", {15: 31.73, 25: 29.23, 50: 26.23}, _DNCNN),
    Published("BSD68", 68, "DnCNN-B", {15: 31.61, 25: 29.16, 50: 26.23}, _DNCNN),
    Published("BSD68", 68, "xDnCNN", {25: 29.21, 50: 26.26}, _XUNIT),
    Published("BSD68", 68, "FFDNet", {15: 31.63, 25: 29.19, 50: 26.29}, _DPIR),
    Published("BSD68", 68, "DRUNet", {15: 31.91, 25: 29.48, 50: 26.59}, _DPIR),
    Published("BSD68", 68, "SwinIR", {15: 31.97, 25: 29.50, 50: 26.58}, _SWINIR),
    Published("Set12", 12, "BM3D", {15: 32.37, 25: 29.97, 50: 26.72}, _DPIR),
    Published("Set12", 12, "DnCNN-S", {15: 32.86, 25: 30.44, 50: 27.18}, _DPIR),
    Published("Set12", 12, "DnCNN-B", {15: 32.68, 25: 30.36, 50: 27.21}, _DNCNN),
    Published("Set12", 12, "FFDNet", {15: 32.75, 25: 30.43, 50: 27.32}, _DPIR),
    Published("Set12", 12, "DRUNet", {15: 33.25, 25: 30.94, 50: 27.90}, _DPIR),
    Published("Set12", 12, "SwinIR", {15: 33.36, 25: 31.01, 50: 27.91}, _SWINIR),
    Published("CBSD68", 68, "CBM3D", {15: 33.52, 25: 30.71, 50: 27.38}, _DPIR),
    Published("CBSD68", 68, "CDnCNN-S", {15: 33.90, 25: 31.24, 50: 27.95}, _DPIR),
    Published("CBSD68", 68, "FFDNet", {15: 33.87, 25: 31.21, 50: 27.96}, _DPIR),
    Published("CBSD68", 68, "DRUNet", {15: 34.30, 25: 31.69, 50: 28.51}, _DPIR),
    Published("CBSD68", 68, "SwinIR", {15: 34.42, 25: 31.78, 50: 28.56}, _SWINIR),
)


def psnr(image: npt.ArrayLike, reference: npt.ArrayLike, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio ``10 log10(peak² / mean (image − reference)²)``, dB, any shape.

    Infinite for equal arrays. Raises ValueError for shapes that differ or are empty.
    """
    a, b = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"the images must have one shape and pixels, got {a.shape} and {b.shape}")
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(image: npt.ArrayLike, reference: npt.ArrayLike, peak: float = 1.0) -> float:
    """Structural similarity of two images, HxW or HxWxC, at most 1, by scikit-image.

    As published: Gaussian windows of 11×11, σ 1.5, those that lie within the image, the mean over
    the channels (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004).
    Raises ValueError for shapes that differ or are below 11×11, ImportError without the extra
    `eval`.
    """
    a, b = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape or a.ndim not in (2, 3) or min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs two images of 11×11 or more, got {a.shape} and {b.shape}")
    similarity = _library("skimage.metrics", "SSIM").structural_similarity
    return float(
        similarity(
            a,
            b,
            data_range=peak,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2 if a.ndim == 3 else None,
        )
    )


@dataclass(frozen=True)
class Baseline:
    """A classical denoiser that is told the noise: float32 HxW or HxWxC on the scale [0, 1].

    name: "bm3d", of the package bm3d (Dabov et al., IEEE TIP 2007); of scikit-image, "nlm",
        non-local means with the parameters of its gallery (patches of 5×5, h = 0.6 σ), "tv", total
        variation (Chambolle) of weight σ, and "wavelet", BayesShrink.
    sigma: standard deviation of the noise, on the 0-255 scale.
    channels: what images are converted to, 1 or 3; None leaves them as they are.

    Raises ValueError for an unknown name, ImportError without the extra `eval`.
    """

    name: str
    sigma: float
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ValueError(f"name must be one of {', '.join(BASELINES)}, not {self.name!r}")
        self._module()  # or fail before the first image

    def _module(self) -> Any:
        if self.name == "wavelet":
            _library("pywt", "wavelet")  # which scikit-image asks for at the first call only
        return _library("bm3d" if self.name == "bm3d" else "skimage.restoration", self.name)

    def __call__(self, noisy: Plane) -> Any:
        library, sigma = self._module(), self.sigma / 255
        if sigma == 0:
            return noisy
        if self.name == "bm3d":
            return (library.bm3d if noisy.ndim == 2 else library.bm3d_rgb)(noisy, sigma)
        axis = 2 if noisy.ndim == 3 else None
        if self.name == "tv":
            return library.denoise_tv_chambolle(noisy, weight=sigma, channel_axis=axis)
        if self.name == "wavelet":
            return library.denoise_wavelet(noisy, sigma=sigma, channel_axis=axis)
        return library.denoise_nl_means(
            noisy, patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma, channel_axis=axis
        )


def evaluate(
    model: Any,
    folder: str | os.PathLike[str],
    sigma: float = 25.0,
    protocol: str = "kair",
    *,
    with_ssim: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Denoise every image of a folder with white Gaussian noise of `sigma` (0-255 scale) on it.

    model: a Denoiser, a torch module, a Baseline or any function of a noisy image, float32 HxW or
        HxWxC on the scale [0, 1] but not clipped to it. A module runs in evaluation mode, and is
        given its image on the device and in the dtype of its first parameter; its training flags
        are put back.
    protocol: "kair", as in the KAIR toolbox: noise of numpy's legacy generator, seeded with 0 for
        every image; the result clipped and rounded to 8 bits. "official2018" and "official2021",
        as in the xUnit code of these years: noise of torch, seeded with 0 for every image (there,
        with another number in each run, or with none); the result clipped and, in 2021, rounded to
        8 bits. The code of 2021 measures this on a GPU; on a CPU it scales the result twice.
    with_ssim: measure SSIM, too. progress: called with the number of images done and of all, after
        each.

    Colour images go to a model of one channel as grey, by PIL's conversion "L".
    Raises ValueError for an unknown protocol, a sigma that is no finite number of at least 0, a
    folder without images and a model for super-resolution; FileNotFoundError for a missing folder;
    ImportError for the official protocols without PyTorch, and for SSIM without the extra `eval`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma!r}")
    if with_ssim:
        _library("skimage.metrics", "SSIM")
    paths = _images(folder)

    scores, noisy_scores, similarities = {}, [], {}
    with _as_function(model) as (denoise, channels):
        for number, path in enumerate(paths, 1):
            clean = _read(path, channels)
            noisy = clean + _noise(clean.shape, sigma, protocol)
            result = np.clip(denoise(noisy), 0, 1)
            if protocol == "kair":
                result = np.rint(result * 255) / 255
            elif protocol == "official2021":
                result = np.floor(result * 255 + 0.5) / 255
            scores[path.name] = psnr(result, clean)
            noisy_scores.append(psnr(noisy, clean))
            if with_ssim:
                try:
                    similarities[path.name] = ssim(result, clean)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            if progress is not None:
                progress(number, len(paths))
    return Evaluation(
        psnr=math.fsum(scores.values()) / len(scores),
        noisy_psnr=math.fsum(noisy_scores) / len(scores),
        images=len(scores),
        sigma=float(sigma),
        protocol=protocol,
        per_image=scores,
        ssim=math.fsum(similarities.values()) / len(scores) if with_ssim else None,
        per_image_ssim=similarities,
    )


def table(rows: Sequence[Row]) -> str:
    """The results as text, a block for each folder, σ and protocol, with published figures.

    Those are of the test set that has the folder's name, in any case, and its number of images.
    """
    blocks: dict[tuple[str, int, float, str], list[Row]] = {}
    for row in rows:
        r = row.result
        blocks.setdefault((row.data, r.images, r.sigma, r.protocol), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (data, count, sigma, protocol), block in blocks.items():
        lines.append((f"{data}, {count} images, sigma {sigma:g}, protocol {protocol}",))
        lines.append(("", "PSNR", "SSIM", "published in"))
        for model, _, r in block:
            lines.append((model, f"{r.psnr:.2f}", "" if r.ssim is None else f"{r.ssim:.4f}", ""))
        lines.append(("the noisy images", f"{block[0].result.noisy_psnr:.2f}", "", ""))
        lines += [
            (p.method, f"{p.psnr[sigma]:.2f}", "", p.source)
            for p in PUBLISHED
            if (p.data.lower(), p.images) == (data.lower(), count) and sigma in p.psnr
        ]
    cells = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        line[0] if len(line) == 1 else "  " + "  ".join(map(str.ljust, line, widths)).rstrip()
        for line in lines
    )


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a line for each image and, as image "mean", for each row; whole or not at all."""
    with (
        replacing(Path(os.fspath(path))) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("model", "data", "sigma", "protocol", "image", "psnr", "ssim"))
        for model, data, r in rows:
            for name, score in [*r.per_image.items(), ("mean", r.psnr)]:
                similarity = r.ssim if name == "mean" else r.per_image_ssim.get(name)
                start = (model, data, f"{r.sigma:g}", r.protocol, name)
                writer.writerow((*start, score, "" if similarity is None else similarity))


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{what} needs pip install 'xunit-rs[eval]'", name=error.name) from error


def _images(folder: str | os.PathLike[str]) -> list[Path]:
    folder = Path(os.fspath(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and images.is_image_name(p))
    if not paths:
        raise ValueError(f"{folder}: no images in this folder")
    return paths


def _read(path: Path, channels: int | None) -> Plane:
    image = images.read(path)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"{path}: mode {image.mode}, expected an image of 8 bits a channel")
    grey = channels == 1 or (channels is None and image.mode in ("L", "LA"))
    pixels = np.asarray(image.convert("L" if grey else "RGB"), np.float32)
    return pixels / np.float32(255)


def _noise(shape: tuple[int, ...], sigma: float, protocol: str) -> Plane:
    scale = sigma / 255
    if protocol == "kair":
        return np.random.RandomState(0).normal(0, scale, shape).astype(np.float32)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the noise of protocol {protocol!r} is PyTorch's: pip install 'xunit-rs[torch]'",
            name="torch",
        ) from error
    generator = torch.Generator().manual_seed(0)
    planes = (1, *shape) if len(shape) == 2 else (shape[2], *shape[:2])
    noise: Plane = (torch.randn(planes, generator=generator) * scale).numpy()
    return noise[0] if len(shape) == 2 else noise.transpose(1, 2, 0)


@contextlib.contextmanager
def _as_function(model: Any) -> Iterator[tuple[Callable[[Plane], Any], int | None]]:
    """A function of one noisy image, and the channels it wants, None for any."""
    if getattr(model, "scale", 1) != 1:
        raise ValueError(f"evaluation is of denoisers; {type(model).__name__} enlarges images")
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
