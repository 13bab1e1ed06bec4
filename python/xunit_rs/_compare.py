"""A picture for looking: an image, what was made of it, and the difference, with the numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .noise import estimate_sigma

__all__ = ["sheet"]

_LARGEST = 800  # side of a panel; noise is seen at full size only, so the rest is cut off
_SMALLEST = 240  # which captions need
_GAP, _LINE = 8, 20
_GAIN = 4
_ROWS = 256


def sheet(noisy: npt.NDArray[Any], clean: npt.NDArray[Any], scale: float) -> Image.Image:
    """Panels of `noisy`, `clean` and their difference; see `Denoiser.compare`.

    Arrays HxW or HxWxC; `scale` is the value of white.
    """
    before, after = _sigma(noisy), _sigma(clean)
    height, width = noisy.shape[:2]
    rows, columns = min(height, _LARGEST), min(width, _LARGEST)
    top, left = (height - rows) // 2, (width - columns) // 2
    inner = (slice(top, top + rows), slice(left, left + columns))
    old, new = _colours(noisy[inner], scale), _colours(clean[inner], scale)
    rms = 255 * _root_mean_square(noisy, clean, scale)
    part = "" if (rows, columns) == (height, width) else f", the middle {columns}x{rows}"
    captions = [  # in ASCII: Pillow's own fonts have no ×
        (f"before{part}", f"{width}x{height}, sigma {before}"),
        ("denoised", f"sigma {after}"),
        (f"difference x{_GAIN}", f"RMS {rms:.1f}"),
    ]
    zoom = max(1, -(-_SMALLEST // columns))
    panels = (old, new, 0.5 + _GAIN * (new - old))
    size = (columns * zoom, rows * zoom)
    result = Image.new("RGB", (3 * size[0] + 2 * _GAP, size[1] + 2 * _LINE + _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(result)
    font = ImageFont.load_default(14)
    for number, (panel, lines) in enumerate(zip(panels, captions, strict=True)):
        x = number * (size[0] + _GAP)
        bytes_ = np.rint(np.clip(panel, 0, 1) * 255).astype(np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(bytes_))
        result.paste(picture.resize(size, Image.Resampling.NEAREST), (x, 2 * _LINE + _GAP))
        for line, text in enumerate(lines):
            draw.text((x + 2, 2 + line * _LINE), text, fill=(0, 0, 0), font=font)
    # As text of a PNG file, and for reading them without looking.
    result.info.update({"sigma before": before, "sigma after": after, "rms": f"{rms:.1f}"})
    return result


def _sigma(image: npt.NDArray[Any]) -> str:
    return f"{estimate_sigma(image):.1f}" if min(image.shape[:2]) >= 3 else "unknown"


def _root_mean_square(noisy: npt.NDArray[Any], clean: npt.NDArray[Any], scale: float) -> float:
    """Of the difference of two images, strip by strip: floats of a large one take gigabytes."""
    height, width = noisy.shape[:2]
    squares = 0.0
    for top in range(0, height, _ROWS):
        strip = slice(top, top + _ROWS)
        difference = _colours(clean[strip], scale) - _colours(noisy[strip], scale)
        squares += float(np.square(difference).sum(dtype=np.float64))
    return math.sqrt(squares / (3 * height * width))


def _colours(image: npt.NDArray[Any], scale: float) -> npt.NDArray[np.float32]:
    planes = image[:, :, None] if image.ndim == 2 else image
    planes = planes[:, :, : 3 if planes.shape[2] > 2 else 1].astype(np.float32) / np.float32(scale)
    return np.repeat(planes, 3, axis=2) if planes.shape[2] == 1 else planes
