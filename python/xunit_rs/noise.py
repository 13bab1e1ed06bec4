"""How noisy an image is, and which network of the package suits that."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import images
from .denoise import check_values, find_weights, integer_scale, pretrained_names

__all__ = ["BLIND", "estimate_sigma", "halves_colours", "is_grey", "model_for", "nearest_model"]

_ROWS = 256  # of a strip that is looked at together: memory does not grow with the image

# gray-sigma25 beats gray-blind by 0.03 to 0.09 dB at sigma = 24 to 26 and loses 0.04 dB at 23.5 and
# 0.07 dB at 26.5 (every sixth image of BSD68).
_REACH = 1.0

BLIND = {1: "gray-blind", 3: "color-blind"}  # by channels: for noise that is not known

# What gray-blind gains over color-blind on every sixth image of CBSD68 with white noise of sigma =
# 5, 10, 15 and 25, saved as JPEG of 4:2:0: 0.2, 1.9, 2.7 and 3.7 dB at quality 95, 0.3, 0.8, 2.9
# and 4.7 dB at 80; 1.5 dB on average if chosen only where this much noise is estimated. Chosen for
# all it would be 2.1 dB, but texture alone is taken for noise of 4 or more.
_COARSE = 10.0


def estimate_sigma(image: Any) -> float:
    """Estimate the standard deviation of white Gaussian noise, on the scale 0-255.

    σ = √(π/2) / 6 · mean |N ∗ image|, where N = [[1, -2, 1], [-2, 4, -2], [1, -2, 1]] is blind to
    planes and edges along the axes. Of colours it is the root mean square; alpha does not count.

    Texture counts as noise: on every fourth image of BSD68, noise of σ = 10, 25 and 50 is found
    1.7, 0.9 and 0.5 too high on average (6.9, 4.0 and 2.3 at most); the images alone give 4.4.
    Clipping hides noise: rounded to 8 bits, the error is 1.5, -0.3 and -4.7. So do JPEG and every
    step of a camera that makes the noise of neighbours alike.

    image: a numpy array, PIL image or `images.DeepImage`, as for `Denoiser`, of at least 3×3
        pixels, or a path.

    Raises ValueError for a smaller image, and what `Denoiser` raises for what is no image.

    Source: J. Immerkær, Fast Noise Variance Estimation, CVIU 64 (2), 1996.
    """
    if isinstance(image, (str, os.PathLike)):
        image = images.read(image, deep=True)
    if isinstance(image, (Image.Image, images.DeepImage)):
        image = images.pixels(image)
    scale = integer_scale(image)
    planes = image[:, :, None] if image.ndim == 2 else image
    colours = 3 if planes.shape[2] > 2 else 1
    height, width = planes.shape[:2]
    if height < 3 or width < 3:
        raise ValueError(f"image must be 3×3 or larger, got shape {image.shape}")
    check_values(planes[:, :, :colours])
    squares = 0.0
    for channel in range(colours):
        total = 0.0
        for top in range(0, height - 2, _ROWS):
            strip = planes[top : top + _ROWS + 2, :, channel].astype(np.float32)
            rows = strip[:-2] - 2 * strip[1:-1] + strip[2:]
            filtered = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
            total += float(np.abs(filtered).sum(dtype=np.float64))
        sigma = math.sqrt(math.pi / 2) / 6 * total / ((height - 2) * (width - 2))
        squares += sigma**2
    return 255 / scale * math.sqrt(squares / colours)


def is_grey(image: Image.Image | images.DeepImage) -> bool:
    """Whether an image is grey: by its mode, or by three planes that are equal."""
    if not image.mode.startswith("RGB"):
        return True
    pixels: npt.NDArray[Any] = np.asarray(image)
    return all(
        np.array_equal(strip[..., 0], strip[..., other])
        for top in range(0, pixels.shape[0], _ROWS)
        for strip in (pixels[top : top + _ROWS],)
        for other in (1, 2)
    )


def nearest_model(sigma: float, channels: int) -> tuple[str, tuple[float, float]]:
    """The network of the package whose noise is nearest; its name and the noise it was trained for.

    sigma: standard deviation on the scale 0-255, 0 or more. channels: 1 (grey) or 3 (colour).
    Of networks for a range that `sigma` lies in, and those of one level within 1.5 of it, the
    narrowest; beyond all ranges, the nearest.

    Raises ValueError for another sigma, and where the package has no network of so many channels.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be 0 or more, got {sigma!r}")

    def rank(item: tuple[str, tuple[float, float]]) -> tuple[float, float, str]:
        name, (low, high) = item
        reach = _REACH if low == high else 0.0
        distance = max(low - reach - sigma, sigma - high - reach, 0.0)
        return distance, high - low, name

    known = [(name, levels) for name, count, levels in _models() if count == channels]
    if not known:
        raise ValueError(f"no network for {channels} channels comes with the package")
    return min(known, key=rank)


def model_for(
    image: Image.Image | images.DeepImage, sigma: float
) -> tuple[str, tuple[float, float]]:
    """The network of the package for an image with such noise, as `nearest_model` gives it.

    The nearest, but "gray-blind" for noise of 10 and more in colours that a JPEG or WebP file holds
    at half the width and height (4:2:0). There the noise of neighbours is alike, which a network
    for colour takes for part of the picture; one for grey does so less, being given luminance and
    two opponent colours.

    image: as `images.read` gives it. sigma: by `estimate_sigma`.
    """
    grey = is_grey(image)
    if not grey and halves_colours(image) and sigma >= _COARSE:
        return next((name, levels) for name, _, levels in _models() if name == BLIND[1])
    return nearest_model(sigma, 1 if grey else 3)


def halves_colours(image: Image.Image | images.DeepImage) -> bool:
    """Whether the file of an image holds its colours at half the width and height."""
    return image.mode.startswith("RGB") and image.info.get("subsampling") == images.HALVED


@functools.cache
def _models() -> list[tuple[str, int, tuple[float, float]]]:
    """Name, channels and range of noise of the networks that say for what noise they are."""
    found = []
    for name in pretrained_names():
        with open(find_weights(name), "rb") as file:  # the header, not the weights
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.get("__metadata__", {})
        if "sigma" in metadata and "channels" in metadata:
            low, _, high = metadata["sigma"].partition("-")
            found.append((name, int(metadata["channels"]), (float(low), float(high or low))))
    return found
