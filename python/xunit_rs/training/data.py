"""Noisy training patches from images held in memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import images

__all__ = ["Patches", "fingerprint", "read_folder"]


def read_folder(folder: str | os.PathLike[str], channels: int) -> list[npt.NDArray[np.uint8]]:
    """Pixels of a folder's images in the order of their names: (H, W), or (H, W, 3) of 3 channels.

    Colour is turned into luma (ITU-R 601-2) for one channel; alpha is dropped.
    Raises ValueError for a folder without images, images that are damaged or not of 8 bits, and
    channels other than 1 and 3; OSError for a missing folder.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels!r}")
    folder = Path(os.fspath(folder))
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, not a folder of images")
    result = []
    for path in sorted(p for p in folder.iterdir() if images.is_image_name(p) and p.is_file()):
        image = images.read(path)
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            # Pillow would clip 16 bits to 255.
            raise ValueError(f"{path}: mode {image.mode}, expected 8 bits a channel")
        result.append(np.asarray(image.convert("L" if channels == 1 else "RGB")))
    if not result:
        raise ValueError(f"{folder}: no images in this folder")
    return result


def fingerprint(found: Sequence[npt.NDArray[np.uint8]]) -> str:
    """Number of images and a checksum of their pixels: the same data, wherever it lies."""
    checksum = 0
    for pixels in found:
        checksum = zlib.crc32(pixels.tobytes(), checksum)
    return f"{len(found)} images, crc32 {checksum:08x}"


class Patches:
    """Random square patches, flipped and turned, with white Gaussian noise.

    Every pixel position of the folder is about equally likely; images smaller than a patch are
    left out. A batch depends on nothing but (seed, index), so that a resumed run draws the very
    batches an uninterrupted one would.
    Raises ValueError if no image is as large as a patch.
    """

    def __init__(
        self, folder: str | os.PathLike[str], patch_size: int, channels: int, seed: int
    ) -> None:
        found = read_folder(folder, channels)
        self.images = [p for p in found if min(p.shape[:2]) >= patch_size]
        if not self.images:
            largest = max(min(p.shape[:2]) for p in found)
            raise ValueError(
                f"patch_size {patch_size} is larger than every image of {folder}: {largest} at most"
            )
        self.patch_size = patch_size
        self.seed = seed
        area = np.array([p.shape[0] * p.shape[1] for p in self.images], dtype=np.float64)
        self._cumulative = np.cumsum(area / area.sum())

    def batch(
        self, index: int, count: int, sigma: float | tuple[float, float]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Clean patches in [0, 1] and their noise, both (count, C, patch_size, patch_size).

        sigma: standard deviation of the noise on the 0-255 scale, or the range from which each
        patch draws its own.
        """
        rng = np.random.default_rng([self.seed, index])
        size = self.patch_size
        which = np.searchsorted(self._cumulative, rng.random(count), side="right")
        corners = rng.random((count, 2))
        turns = rng.integers(0, 8, count)
        clean: list[npt.NDArray[np.uint8]] = []
        for i, corner, turn in zip(which, corners, turns, strict=True):
            pixels = self.images[min(int(i), len(self.images) - 1)]
            top = int(corner[0] * (pixels.shape[0] - size + 1))
            left = int(corner[1] * (pixels.shape[1] - size + 1))
            patch = np.rot90(pixels[top : top + size, left : left + size], turn % 4)
            patch = patch[:, ::-1] if turn >= 4 else patch
            clean.append(patch[None] if patch.ndim == 2 else np.moveaxis(patch, 2, 0))
        x = np.stack(clean).astype(np.float32) / np.float32(255)
        noise = rng.standard_normal(x.shape, dtype=np.float32)
        if isinstance(sigma, tuple):
            noise *= (rng.uniform(*sigma, (count, 1, 1, 1)) / 255).astype(np.float32)
        else:
            noise *= np.float32(sigma / 255)
        return x, noise
