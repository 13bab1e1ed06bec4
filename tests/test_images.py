from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xunit_rs import images
from xunit_rs.images import ImageError

RNG = np.random.default_rng(0)


def pixels(mode: str, height: int = 9, width: int = 7) -> Image.Image:
    bands = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 65536, (height, width)).astype(np.uint16))
    return Image.fromarray(RNG.integers(0, 256, (height, width, *bands[mode])).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif"])
def test_lossless_round_trip(tmp_path: Path, mode: str, suffix: str) -> None:
    image = pixels(mode)
    images.write(image, tmp_path / f"a{suffix}")
    back = images.read(tmp_path / f"a{suffix}")
    assert back.mode == mode
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_palette_bilevel_and_transparent_colours_are_converted(tmp_path: Path) -> None:
    rgb = pixels("RGB")
    rgb.quantize(8).save(tmp_path / "p.png")
    rgb.quantize(8).save(tmp_path / "pt.png", transparency=0)
    rgb.convert("1").save(tmp_path / "b.png")
    Image.new("L", (3, 2), 7).save(tmp_path / "key.png", transparency=7)
    modes = {name: images.read(tmp_path / name).mode for name in os.listdir(tmp_path)}
    assert modes == {"p.png": "RGB", "pt.png": "RGBA", "b.png": "L", "key.png": "LA"}
    assert np.asarray(images.read(tmp_path / "key.png"))[..., 1].max() == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_survives(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "hills"
    exif[0x0112] = 6
    image = pixels("RGB")
    options: dict[str, Any] = {
        "exif": exif.tobytes(),
        "icc_profile": b"profile" * 9,
        "dpi": (300, 300),
    }
    image.save(tmp_path / f"in{suffix}", **options)
    images.write(images.read(tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as back:
        assert back.size == image.size  # the orientation is kept, not applied
        assert back.getexif()[0x010E] == "hills"
        assert back.getexif()[0x0112] == 6
        assert back.info["icc_profile"] == b"profile" * 9
        if suffix != ".webp":
            assert tuple(round(v) for v in back.info["dpi"]) == (300, 300)


def test_reduced_depth_and_frames_are_announced(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = (b"\0" + b"\x12\x34" * 6) * 2
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    with pytest.warns(UserWarning, match=r"deep\.png: 16-bit colour"):
        images.read(tmp_path / "deep.png")
    pixels("L").save(tmp_path / "two.gif", save_all=True, append_images=[pixels("L")])
    with pytest.warns(UserWarning, match="first of its 2 frames"):
        images.read(tmp_path / "two.gif")
    pixels("I;16").save(tmp_path / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.read(tmp_path / "grey.png")


def test_read_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    pixels("RGB", 64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    pixels("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, reason in [
        ("text.png", "not an image"),
        ("empty.jpg", "not an image"),
        ("cut.png", "truncated"),
        ("cmyk.jpg", "mode CMYK"),
        ("", "directory"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            images.read(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        images.read(tmp_path / "none.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"whole\.png: too large"):
        images.read(tmp_path / "whole.png")


def test_every_truncation_is_an_image_error(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        pixels("RGB", 16, 16).save(tmp_path / f"a{suffix}")
        data = (tmp_path / f"a{suffix}").read_bytes()
        for size in range(0, len(data), 37):
            cut = tmp_path / f"cut{suffix}"
            cut.write_bytes(data[:size])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of broken TIFF and EXIF data
                try:
                    images.read(cut)  # an end without pixels may be missed without harm
                except ImageError as error:
                    assert str(cut) in str(error)


def test_write_never_overwrites_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(ImageError, match="already exists"):
        images.write(pixels("L"), path)
    assert path.read_bytes() == b"precious"
    images.write(pixels("L"), path, overwrite=True)
    assert images.read(path).mode == "L"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    image = pixels("L")

    def fail(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image, "save", fail)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written \(No space left"):
        images.write(image, path, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["a.png"]


def test_unwritable_targets(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    for name, mode, reason in [
        ("a.txt", "L", "suffix '.txt'"),
        ("a", "L", "suffix ''"),
        ("a.jpg", "RGBA", "JPEG cannot store mode RGBA"),
        ("a.jpg", "I;16", "JPEG cannot store mode I;16"),
        ("none/a.png", "L", "no such folder"),
        ("dir.png", "L", "is a directory"),
    ]:
        with pytest.raises(ImageError, match=reason):
            images.write(pixels(mode), tmp_path / name, overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX links and permission bits")
def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    pixels("L").save(tmp_path / "real.png")
    (tmp_path / "real.png").chmod(0o640)
    (tmp_path / "link.png").symlink_to("real.png")
    images.write(pixels("RGB"), tmp_path / "link.png", overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    assert images.read(tmp_path / "real.png").mode == "RGB"
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        images.check_target(tmp_path / "pipe.png", overwrite=True)
