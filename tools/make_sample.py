"""Make samples/noisy.png: a synthetic grey landscape with Gaussian noise of sigma 25 (0-255 scale).

The scene is computed, nothing in it is photographed. The image is dedicated to the public domain:
CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/

    python tools/make_sample.py [OUT] [--clean CLEAN]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

HEIGHT, WIDTH, SIGMA = 240, 320, 25.0
Array = npt.NDArray[np.float64]


def fractal(rng: np.random.Generator, slope: float, stretch: float = 1.0) -> Array:
    """Noise with amplitude ~ 1/f^slope, in [0, 1]; stretch > 1 draws it out horizontally."""
    fy = np.fft.fftfreq(HEIGHT)[:, None]
    fx = np.fft.fftfreq(WIDTH)[None, :] * stretch
    radius = np.hypot(fy, fx)
    radius[0, 0] = np.inf
    phase = rng.uniform(0, 2 * np.pi, (HEIGHT, WIDTH))
    field = np.fft.ifft2(np.exp(1j * phase) / radius**slope).real
    return np.asarray((field - field.min()) / np.ptp(field))


def ridge(rng: np.random.Generator, base: float, height: float, roughness: float) -> Array:
    """A skyline: its row at each column."""
    x = np.arange(WIDTH)
    line = np.zeros(WIDTH)
    for octave in range(1, 8):
        wave = 2.0**octave / 2
        line += wave**-roughness * np.sin(2 * np.pi * wave * x / WIDTH + rng.uniform(0, 2 * np.pi))
    return base - height * line


def landscape(seed: int = 7) -> Array:
    """The clean scene, (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)

    def mix(a: Array, b: tuple[float, float, float], weight: Array) -> Array:
        return a + (np.array(b) - a) * weight[..., None]

    image = mix(np.full((HEIGHT, WIDTH, 3), (0.24, 0.45, 0.74)), (0.97, 0.80, 0.62), (y / 150) ** 2)
    image = np.clip(image, 0, 1)
    distance = np.hypot(x - 228, y - 62)
    image = mix(image, (1.0, 0.93, 0.72), 0.75 * np.exp(-distance / 38))
    image = mix(image, (1.0, 0.98, 0.88), np.clip(17.5 - distance, 0, 1))
    clouds = np.clip((fractal(rng, 1.7, 2.5) - 0.52) * 3.2, 0, 1) * np.clip(1 - y / 130, 0, 1)
    image = mix(image, (0.99, 0.95, 0.92), 0.85 * clouds)

    layers = [
        (118.0, 16.0, 1.0, (0.53, 0.57, 0.70), 0.05),
        (142.0, 15.0, 1.1, (0.36, 0.45, 0.52), 0.10),
        (168.0, 13.0, 1.3, (0.24, 0.38, 0.27), 0.22),
        (198.0, 12.0, 1.6, (0.40, 0.46, 0.17), 0.34),
    ]
    for base, height, roughness, colour, contrast in layers:
        line = ridge(rng, base, height, roughness)
        inside = np.clip(y - line + 0.5, 0, 1)  # an anti-aliased edge
        texture = fractal(rng, 0.9, 0.6)
        shade = 1 + contrast * 4 * (texture - 0.5)
        light = 1.12 - 0.0035 * np.clip(y - line, 0, 80)
        layer = np.array(colour) * (shade * light)[..., None]
        image += (layer - image) * inside[..., None]

    near = ridge(rng, 214, 5, 1.5)
    for column in rng.choice(np.arange(6, WIDTH - 6), 16, replace=False):  # a few firs
        size = rng.uniform(16, 34)
        foot = near[column] + rng.uniform(-12, 14)
        down = (y - (foot - size)) / size
        saw = 0.75 + 0.25 * np.cos(down * 26)
        half = 0.24 * size * down * saw
        tree = np.clip(half - np.abs(x - column) + 0.5, 0, 1) * ((down > 0) & (down < 1))
        green = np.array((0.10, 0.20, 0.12)) * (1.25 - 0.5 * (x > column))[..., None]
        image += (green - image) * tree[..., None]
    return np.clip(image, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default=Path(__file__).parents[1] / "samples/noisy.png")
    parser.add_argument("--clean", help="also write the scene without noise here")
    args = parser.parse_args()
    scene = landscape() @ np.array([0.299, 0.587, 0.114])
    noisy = scene * 255 + np.random.default_rng(25).normal(0, SIGMA, scene.shape)
    Image.fromarray(np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)).save(args.out, optimize=True)
    if args.clean:
        Image.fromarray(np.rint(scene * 255).astype(np.uint8)).save(args.clean)


if __name__ == "__main__":
    main()
