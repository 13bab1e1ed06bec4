"""Patches of clean images, and the noise that is put on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import images

__all__ = ["Patches", "read_folder"]

_MODES = {1: "L", 3: "RGB"}


def read_folder(
    folder: str | os.PathLike[str], channels: int
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Names and pixels, uint8 (channels, H, W), of a folder's images in the order of their names.

    Images of more than 8 bits are refused, as PIL would clip them. Raises ValueError for them, for
    a folder without images and for channels other than 1 and 3; FileNotFoundError for a missing
    folder.
    """
    if channels not in _MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels!r}")
    folder = Path(os.fspath(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and images.is_image_name(p))
    if not paths:
        raise ValueError(f"{folder}: no images in this folder")
    result = []
    for path in paths:
        image = images.read(path)
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            raise ValueError(f"{path}: mode {image.mode}, expected an image of 8 bits a channel")
        pixels = np.asarray(image.convert(_MODES[channels]), np.uint8)
        planes = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
        result.append((path.name, np.ascontiguousarray(planes)))
    return result


class Patches:
    """Random patches of clean images, turned and mirrored, and white Gaussian noise for them.

    pixels: uint8 (C, H, W) each; size: side of a patch, pixels; sigma: 0-255 scale. Images smaller
    than a patch are left out; ValueError if none is left. A batch is a function of the seed and
    its number alone, so a resumed run sees what an uninterrupted one does.
    """

    def __init__(
        self, pixels: Sequence[npt.NDArray[np.uint8]], size: int, sigma: float, seed: int
    ) -> None:
        self.pixels = [p for p in pixels if min(p.shape[1:]) >= size]
        if not self.pixels:
            raise ValueError(f"patch_size {size} is larger than each of {len(pixels)} images")
        places = np.array([(p.shape[1] - size + 1) * (p.shape[2] - size + 1) for p in self.pixels])
        self._odds = places / places.sum()
        self._size, self._sigma, self._seed = size, sigma, seed

    def batch(self, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Clean patches and noise, float32 (count, C, size, size) on the scale [0, 1]."""
        rng = np.random.default_rng([self._seed, number])
        chosen = rng.choice(len(self.pixels), count, p=self._odds)
        clean = np.stack([self._patch(self.pixels[i], rng) for i in chosen]).astype(np.float32)
        noise = rng.standard_normal(clean.shape, np.float32) * np.float32(self._sigma / 255)
        return torch.from_numpy(clean).div_(255), torch.from_numpy(noise)

    def _patch(
        self, pixels: npt.NDArray[np.uint8], rng: np.random.Generator
    ) -> npt.NDArray[Any]:
        size = self._size
        top, left = (int(rng.integers(length - size + 1)) for length in pixels.shape[1:])
        patch = pixels[:, top : top + size, left : left + size]
        turns, mirrored = divmod(int(rng.integers(8)), 2)
        patch = np.rot90(patch, turns, axes=(1, 2))
        return patch[:, :, ::-1] if mirrored else patch
