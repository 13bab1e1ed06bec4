from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xunit_rs import images
from xunit_rs.denoise import Denoiser, pretrained_names
from xunit_rs.noise import estimate_sigma, halves_colours, is_grey, model_for, nearest_model


def picture(shape: tuple[int, ...], sigma: float) -> Any:
    """A ramp with noise, on the scale 0-255, larger than a strip."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    ramp = 60 + 0.1 * x + 0.05 * y
    noise = sigma * np.random.default_rng(0).standard_normal(shape)
    return (ramp if len(shape) == 2 else ramp[..., None]) + noise


@pytest.mark.parametrize("sigma", [2, 10, 25])
@pytest.mark.parametrize("shape", [(515, 200), (515, 200, 3)])
def test_the_noise_of_a_ramp_is_found(shape: tuple[int, ...], sigma: float) -> None:
    image = picture(shape, sigma)
    for dtype, scale in (("float64", 1 / 255), ("float32", 1 / 255), ("uint16", 257), ("uint8", 1)):
        values = image * scale if scale < 1 else np.rint(np.clip(image * scale, 0, 255 * scale))
        assert estimate_sigma(values.astype(dtype)) == pytest.approx(sigma, rel=0.04), dtype


def test_no_noise_and_constant_images() -> None:
    assert estimate_sigma(picture((300, 20), 0) / 255) < 1e-3
    assert estimate_sigma(np.full((3, 3), 7, np.uint8)) == 0


def test_alpha_does_not_count_and_planes_do(tmp_path: Any) -> None:
    grey = np.rint(picture((64, 64), 10)).astype(np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
    alpha = np.stack([grey, noise], axis=-1)
    assert estimate_sigma(alpha) == estimate_sigma(grey)
    flat = np.zeros_like(grey)
    one = np.stack([grey, flat, flat, noise], axis=-1)
    assert estimate_sigma(one) == pytest.approx(estimate_sigma(grey) / np.sqrt(3))
    Image.fromarray(grey).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", Image.fromarray(grey)):
        assert estimate_sigma(image) == estimate_sigma(grey)


def test_images_whose_noise_is_unknown() -> None:
    for image in (np.zeros((2, 9)), np.zeros((9, 2, 3)), np.full((5, 5), np.nan)):
        with pytest.raises(ValueError, match=r"3×3|finite"):
            estimate_sigma(image)
    with pytest.raises(ValueError, match=r"scale \[0, 1\], got values 0\.\.200"):
        estimate_sigma(np.diag(np.full(5, 200.0)))
    with pytest.raises(ValueError, match=r"0\.\.65535, got -1\.\.0"):
        estimate_sigma(Image.fromarray(np.diag(np.full(5, -1, np.int32))))
    with pytest.raises(ValueError, match=r"\(5, 5, 5\)"):
        estimate_sigma(np.zeros((5, 5, 5)))
    for wrong in (np.zeros((5, 5), np.int32), [[0.0]]):
        with pytest.raises(TypeError):
            estimate_sigma(wrong)


def test_grey_is_told_by_the_planes() -> None:
    grey = Image.fromarray(np.arange(300 * 2, dtype=np.uint16).astype(np.uint8).reshape(300, 2))
    assert is_grey(grey) and is_grey(grey.convert("RGB")) and is_grey(grey.convert("RGBA"))
    for channel in (0, 1, 2):
        pixels = np.asarray(grey.convert("RGB")).copy()
        pixels[299, 1, channel] ^= 1
        assert not is_grey(Image.fromarray(pixels))


def test_the_nearest_model() -> None:
    assert {"gray-sigma25", "gray-blind", "color-blind"} <= set(pretrained_names())
    levels = {"gray-sigma25": (25, 25), "gray-blind": (0, 55), "color-blind": (0, 55)}
    for sigma, channels, name in (
        (25, 1, "gray-sigma25"),
        (24.1, 1, "gray-sigma25"),
        (23.9, 1, "gray-blind"),
        (27, 1, "gray-blind"),
        (0, 1, "gray-blind"),
        (90, 1, "gray-blind"),
        (25, 3, "color-blind"),
        (90, 3, "color-blind"),
    ):
        assert nearest_model(sigma, channels) == (name, levels[name]), sigma
    for sigma in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{sigma}"):
            nearest_model(sigma, 1)
    with pytest.raises(ValueError, match="2 channels"):
        nearest_model(5, 2)


def noisy_jpeg(sigma: float, subsampling: int, grey: bool = False) -> Any:
    """A picture of few colours, the same with noise from a JPEG file, and that file's image."""
    y, x = np.mgrid[:96, :128]
    clean = np.stack([128 + 60 * np.sin(x / 9 + k) * np.cos(y / 13) for k in (0, 1, 2)], -1)
    noise = np.random.default_rng(0).normal(0, sigma, clean.shape)
    if grey:
        clean[...], noise[...] = clean[..., :1], noise[..., :1]
    file = io.BytesIO()
    picture = Image.fromarray(np.rint(clean + noise).clip(0, 255).astype(np.uint8))
    picture.save(file, "JPEG", quality=95, subsampling=subsampling)
    return clean, images.read(file)


def test_colours_at_half_size_have_another_model() -> None:
    for subsampling, sigma, grey, name in (
        (2, 25, False, "gray-blind"),
        (2, 4, False, "color-blind"),
        (1, 25, False, "color-blind"),
        (0, 25, False, "color-blind"),
        (2, 25, True, "gray-sigma25"),
    ):
        _, image = noisy_jpeg(sigma, subsampling, grey)
        assert halves_colours(image) == (subsampling == 2)
        for same in (image, images.stripped(image)):
            found, levels = model_for(same, estimate_sigma(same))
            assert found == name and levels == ((25, 25) if grey else (0, 55))


def test_colours_at_half_size_look_better_by_that_model() -> None:
    clean, image = noisy_jpeg(25, 2)
    errors = [
        np.square(np.asarray(Denoiser.from_pretrained(name)(image)) - clean).mean()
        for name in (model_for(image, estimate_sigma(image))[0], "color-blind")
    ]
    assert 2 * errors[0] < errors[1]


def test_a_file_that_is_open_is_read(tmp_path: Any) -> None:
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / "a.webp", lossless=True)
    with open(tmp_path / "a.webp", "rb") as file:
        image = images.read(file, "stdin")
    assert image.format == "WEBP" and image.info["lossless"]
    back = Image.open(io.BytesIO(images.encode(image, image.format)))
    assert back.format == "WEBP" and back.convert("RGB").getpixel((0, 0)) == (9, 8, 7)
