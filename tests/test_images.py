from __future__ import annotations

import io
import os
import signal
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xunit_rs import Denoiser, images
from xunit_rs.images import ImageError

RNG = np.random.default_rng(0)
UNFIT = (".gif", ".ico", ".jp2", ".pdf", ".avif", ".pfm")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'


def pixels(mode: str, height: int = 9, width: int = 7) -> Image.Image:
    if mode == "F":
        return Image.fromarray(RNG.random((height, width), np.float32))
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


def save_with_metadata(path: Path) -> Image.Image:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x8298] = "Maker", 6, "me"
    exif.get_ifd(0x8769)[0x829A] = 0.5  # exposure time
    text = PngInfo()
    text.add_text("Author", "somebody")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options: dict[str, Any] = {
        ".tif": {"tiffinfo": {700: XMP, 0x010F: "Maker", 0x0112: 6, 0x8298: "me"}},
        ".png": {"exif": exif, "pnginfo": text},
        ".webp": {"exif": exif, "xmp": XMP},
        ".jpg": {"exif": exif, "xmp": XMP, "comment": b"hills"},
    }
    image = pixels("RGB")
    image.save(path, **options[path.suffix])
    return image


@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".webp", ".tif"])
def test_exif_and_xmp_reach_every_format(tmp_path: Path, source: str, target: str) -> None:
    save_with_metadata(tmp_path / f"in{source}")
    images.write(images.read(tmp_path / f"in{source}"), tmp_path / f"out{target}")
    with Image.open(tmp_path / f"out{target}") as back:
        exif = back.getexif()
        assert (exif[0x010F], exif[0x8298]) == ("Maker", "me")
        # Pillow turns the pixels of TIFF as it reads them.
        assert exif.get(0x0112) == (None if source == ".tif" else 6)
        if source != ".tif":
            assert exif.get_ifd(0x8769)[0x829A] == 0.5
        if target != ".tif":
            assert not {256, 257, 258, 259, 273, 279} & set(exif)
        assert back.info["xmp"] == XMP
        back.load()
        assert back.size == ((9, 7) if ".tif" in (source, target) else (7, 9))
        if source == target == ".jpg":
            assert back.info["comment"] == b"hills"
        if source == target == ".png":
            assert back.info["Author"] == "somebody"


def test_a_denoised_tiff_keeps_its_exif(tmp_path: Path) -> None:
    class Identity:
        channels = 1

        def denoise(self, image: Any, tile: int, threads: int) -> Any:
            return image

    save_with_metadata(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        result = Denoiser(Identity())(image)
        assert "exif" not in image.info
    assert result.getexif()[0x010F] == "Maker" and 273 not in result.getexif()


def test_xmp_too_long_for_jpeg_is_left_out(tmp_path: Path) -> None:
    image = pixels("RGB")
    image.info["xmp"] = b" " * 70_000
    with pytest.warns(UserWarning, match=r"a\.jpg: XMP of 70000 bytes"):
        images.write(image, tmp_path / "a.jpg")


def test_webp_without_loss_stays_without_loss(tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("exif", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"})):
        image = pixels("RGB")
        image.save(tmp_path / f"{name}.webp", lossless=True, **options)
        images.write(images.read(tmp_path / f"{name}.webp"), tmp_path / f"{name}-out.webp")
        np.testing.assert_array_equal(images.read(tmp_path / f"{name}-out.webp"), image)
        image.save(tmp_path / f"{name}.webp", **options)
        assert "lossless" not in images.read(tmp_path / f"{name}.webp").info


def test_how_colours_are_held_is_told(tmp_path: Path) -> None:
    image = pixels("RGB", 32, 32)
    for number in (0, 1, 2):
        image.save(tmp_path / "a.jpg", subsampling=number)
        found = images.read(tmp_path / "a.jpg")
        assert found.info["subsampling"] == images.stripped(found).info["subsampling"] == number
    image.save(tmp_path / "a.webp")
    assert images.read(tmp_path / "a.webp").info["subsampling"] == 2
    for name, options in (("b.webp", {"lossless": True}), ("b.png", {})):
        image.save(tmp_path / name, **options)
        assert "subsampling" not in images.read(tmp_path / name).info


def test_an_encoder_of_one_long_call_is_interrupted() -> None:
    end = threading.Event()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        images._aside(lambda: b"late" if end.wait(60) else b"")
    end.set()
    assert images._aside(lambda: b"done") == b"done"
    with pytest.raises(ZeroDivisionError):
        images._aside(lambda: bytes(1 // 0))


def test_webp_without_loss_keeps_colours_that_alpha_hides(tmp_path: Path) -> None:
    array = np.asarray(pixels("RGBA")).copy()
    array[:4, :, 3] = 0
    Image.fromarray(array).save(tmp_path / "a.webp", lossless=True, exact=True)
    images.write(images.read(tmp_path / "a.webp"), tmp_path / "b.webp")
    np.testing.assert_array_equal(np.asarray(images.read(tmp_path / "b.webp")), array)


def test_a_tiff_of_16_bits_whose_white_is_zero(tmp_path: Path) -> None:
    array = np.arange(12, dtype="<u2").reshape(3, 4)
    entries = [(256, 4), (257, 3), (258, 16), (259, 1), (262, 0), (273, 122), (277, 1), (278, 3)]
    entries.append((279, 24))
    fields = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries]
    head = b"II" + struct.pack("<HIH", 42, 8, len(fields)) + b"".join(fields)
    (tmp_path / "a.tif").write_bytes(head.ljust(122, b"\0") + array.tobytes())
    image = images.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(image), 65535 - array)
    images.write(image, tmp_path / "b.tif")
    np.testing.assert_array_equal(np.asarray(images.read(tmp_path / "b.tif")), 65535 - array)


def test_mode_i_becomes_a_png_of_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 65535, 300]], np.int32)
    image = Image.fromarray(values)
    image.info["dpi"] = (300, 300)
    images.write(image, tmp_path / "a.png")
    back = images.read(tmp_path / "a.png")
    np.testing.assert_array_equal(back, values)
    assert round(back.info["dpi"][0]) == 300
    with pytest.raises(ImageError, match=r"0\.\.70000.*tif"):
        images.write(Image.fromarray(np.array([[0, 70000]], np.int32)), tmp_path / "b.png")
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_compression_that_would_lose_is_not_taken_over(tmp_path: Path) -> None:
    image = pixels("RGB", 32, 32)
    for kind, source in (("jpeg", image), ("group4", image.convert("1"))):
        source.save(tmp_path / "in.tif", compression=kind)
        read = images.read(tmp_path / "in.tif")
        images.write(read, tmp_path / "out.tif", overwrite=True)
        np.testing.assert_array_equal(images.read(tmp_path / "out.tif"), read)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(colour_type: int, values: Any) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_reduced_depth_and_frames_are_announced(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(deep_png(2, np.full((2, 2, 3), 0x1234)))
    with pytest.warns(UserWarning, match=r"deep\.png: 16-bit colour"):
        images.read(tmp_path / "deep.png")
    values = RNG.integers(0, 65536, (3, 4, 2))
    (tmp_path / "alpha.png").write_bytes(deep_png(4, values))
    with pytest.warns(UserWarning, match=r"alpha\.png: 16-bit grey with alpha"):
        image = images.read(tmp_path / "alpha.png")
    assert image.mode == "LA"
    np.testing.assert_array_equal(image, values >> 8)
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
        ("empty.jpg", "the file is empty"),
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
    with pytest.raises(images.TooLargeError, match=r"whole\.png: too large.*MAX_IMAGE_PIXELS"):
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
        *((f"a{suffix}", "L", f"suffix '{suffix}'.*png") for suffix in UNFIT),
        ("a.bmp", "RGBA", "BMP cannot store mode RGBA"),
        ("a.png", "F", r"PNG cannot store mode F; try \.tif"),
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


def test_an_image_is_stripped_and_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    image = pixels("I;16")
    image.info = {"exif": exif.tobytes(), "icc_profile": b"p", "dpi": (9, 9), "lossless": True}
    turned = images.stripped(image)
    assert turned.info == {"lossless": True}
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image)))
    image.info["exif"] = b"Exif\0\0no such thing"
    same = images.stripped(image)
    assert same.info == {"lossless": True} and same.tobytes() == image.tobytes()
    assert "exif" in image.info


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    for suffix, side in ((".jpg", 65_500), (".webp", 16_383)):
        images.write(Image.new("L", (side, 1)), tmp_path / f"a{suffix}")
        with pytest.raises(ImageError, match=rf"{side} pixels a side, got 1×{side + 1}"):
            images.write(Image.new("L", (1, side + 1)), tmp_path / f"b{suffix}")
        name = images.output_format(f"a{suffix}")
        for width, kept in ((side, name), (side + 1, "PNG")):
            content = images.encode(Image.new("L", (width, 1)), name)
            assert Image.open(io.BytesIO(content)).format == kept
    assert not list(tmp_path.glob("b*"))


def deep_tiff(path: Path, values: Any, **options: Any) -> None:
    count = 1 if values.ndim == 2 else values.shape[2]
    if options.get("planarconfig") == "separate":
        values = np.moveaxis(values, 2, 0)
    options.setdefault("photometric", "rgb" if count > 2 else "minisblack")
    if count in (2, 4):
        options.setdefault("extrasamples", ["unassalpha"])
    tifffile.imwrite(path, values, **options)


def deep(count: int, dtype: str, height: int = 37, width: int = 29) -> Any:
    shape = (height, width) if count == 1 else (height, width, count)
    if dtype == "uint16":
        return RNG.integers(0, 65536, shape).astype(np.uint16)
    return RNG.random(shape).astype(dtype)


def read_deep(path: Path) -> images.DeepImage:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.read(path, deep=True)
    assert isinstance(image, images.DeepImage)
    return image


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_png_of_16_bits_is_read_and_written_whole(tmp_path: Path, colour_type: int) -> None:
    values = deep({2: 3, 4: 2, 6: 4}[colour_type], "uint16")
    (tmp_path / "a.png").write_bytes(deep_png(colour_type, values))
    image = read_deep(tmp_path / "a.png")
    assert (image.size, image.format) == ((29, 37), "PNG")
    assert image.mode == {2: "RGB;16", 4: "LA;16", 6: "RGBA;16"}[colour_type]
    np.testing.assert_array_equal(image, values)
    images.write(image, tmp_path / "b.png")
    np.testing.assert_array_equal(read_deep(tmp_path / "b.png"), values)
    # Pillow's own reader, of the high bytes, and checksums agree.
    with Image.open(tmp_path / "b.png") as back:
        back.verify()
    with pytest.warns(UserWarning, match="read as 8-bit"):
        np.testing.assert_array_equal(images.read(tmp_path / "b.png"), values >> 8)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3000, 4), (700, 1, 2), (300, 200, 3)])
def test_filters_of_png_are_undone(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ramps = sum(np.indices(shape)) * 97 % 65536  # rows for which each filter is the best
    ramps[::3] = RNG.integers(0, 65536, shape)[::3]
    values = ramps.astype(np.uint16)
    images.write(images.DeepImage(values), tmp_path / "a.png")
    np.testing.assert_array_equal(read_deep(tmp_path / "a.png"), values)


def test_interlaced_png_of_16_bits(tmp_path: Path) -> None:
    values = deep(3, "uint16", 9, 11)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    passes.append((1, 0, 2, 1))
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes()
        for top, left, down, right in passes
        for row in values[top::down, left::right]
    )
    data = deep_png(2, values)
    plain = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    old, new = (chunk(b"IDAT", zlib.compress(part)) for part in (plain, rows))
    head = data[16:28]
    data = data.replace(chunk(b"IHDR", head + b"\0"), chunk(b"IHDR", head + b"\1"))
    (tmp_path / "a.png").write_bytes(data.replace(old, new))
    np.testing.assert_array_equal(read_deep(tmp_path / "a.png"), values)


def test_a_transparent_colour_of_16_bits(tmp_path: Path) -> None:
    values = deep(3, "uint16", 2, 3)
    key = chunk(b"tRNS", values[1, 2].astype(">u2").tobytes())
    data = deep_png(2, values).replace(chunk(b"IEND", b""), key + chunk(b"IEND", b""))
    place = data.index(b"IDAT") - 4
    data = data[:place] + key + data[place:].replace(key, b"")
    (tmp_path / "a.png").write_bytes(data)
    image = read_deep(tmp_path / "a.png")
    np.testing.assert_array_equal(image.pixels[..., :3], values)
    np.testing.assert_array_equal(image.pixels[..., 3], [[65535] * 3, [65535, 65535, 0]])


TIFF_KINDS: list[dict[str, Any]] = [
    {},
    {"compression": "zlib"},
    {"compression": "zlib", "predictor": True},
    {"tile": (16, 16)},
    {"planarconfig": "separate", "compression": "zlib"},
    {"planarconfig": "separate"},
]


@pytest.mark.parametrize("options", TIFF_KINDS, ids=str)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        *((count, "uint16") for count in (2, 3, 4)),
        *((count, "float32") for count in (2, 3, 4)),
        *((count, dtype) for count in (1, 3) for dtype in ("float16", "float64")),
    ],
)
def test_tiff_keeps_its_depth(
    tmp_path: Path, count: int, dtype: str, order: str, options: dict[str, Any]
) -> None:
    values = deep(count, dtype)
    if dtype != "uint16":
        options = {key: value for key, value in options.items() if key != "predictor"}
    if count == 1:
        options = {key: value for key, value in options.items() if key != "planarconfig"}
    deep_tiff(tmp_path / "a.tif", values, byteorder=order, **options)
    image = read_deep(tmp_path / "a.tif")
    assert image.pixels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(image, values)
    images.write(image, tmp_path / "b.tif")
    np.testing.assert_array_equal(read_deep(tmp_path / "b.tif"), values)
    other = tifffile.imread(tmp_path / "b.tif")
    assert other.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(other, values)
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert file.pages[0].compression == (8 if "compression" in options else 1)


def test_tiff_of_16_bits_by_lzw_needs_no_codec_of_others(tmp_path: Path) -> None:
    # Pillow writes no 16-bit colour: the bytes of such a file, by libtiff, are those of grey of
    # three times the width, whose tags are then changed.
    values = deep(3, "uint16", 8, 10)
    Image.fromarray(values.reshape(8, 30)).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    (place,) = struct.unpack_from("<I", data, 4)
    (number,) = struct.unpack_from("<H", data, place)
    entries = {}
    for i in range(number):
        tag, kind, _, value = struct.unpack_from("<HHII", data, place + 2 + 12 * i)
        entries[tag] = (kind, 1, value)
    bits = len(data)
    data += struct.pack("<HHH", 16, 16, 16)
    entries |= {256: (4, 1, 10), 258: (3, 3, bits), 262: (3, 1, 2), 277: (3, 1, 3)}
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    (tmp_path / "a.tif").write_bytes(data + bytes(4))
    image = read_deep(tmp_path / "a.tif")
    assert image.info["compression"] == "tiff_lzw"
    np.testing.assert_array_equal(image, values)


def test_what_tifffile_cannot_unpack_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep_tiff(tmp_path / "a.tif", deep(3, "float32"), compression="zlib")
    data = (tmp_path / "a.tif").read_bytes()
    old, new = (struct.pack("<HHII", 259, 3, 1, value) for value in (8, 50000))
    assert old in data
    (tmp_path / "a.tif").write_bytes(data.replace(old, new))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read \(.*"):
        images.read(tmp_path / "a.tif", deep=True)


def test_alpha_that_colours_were_multiplied_by(tmp_path: Path) -> None:
    for dtype, white in (("uint16", 65535), ("float32", 1)):
        alpha = np.array([[white, white // 5 if white > 1 else 0.2, 0]], dtype)
        colours = np.full((1, 3, 3), white, dtype)
        stored = colours * (alpha[..., None] / white)
        values = np.concatenate([stored, alpha[..., None]], axis=2).astype(dtype)
        deep_tiff(tmp_path / "a.tif", values, extrasamples=["assocalpha"])
        image = read_deep(tmp_path / "a.tif").pixels
        np.testing.assert_allclose(image[0, :2, :3], white, rtol=1e-6)
        np.testing.assert_array_equal(image[..., 3], alpha)


def test_tiff_whose_white_is_zero_and_that_lies_on_its_side(tmp_path: Path) -> None:
    values = deep(1, "float64")
    side = [(274, 3, 1, 6, True)]
    deep_tiff(tmp_path / "a.tif", values, photometric="miniswhite", extratags=side)
    np.testing.assert_array_equal(read_deep(tmp_path / "a.tif"), 1 - np.rot90(values, -1))
    for dtype in ("uint16", "float32"):  # read by Pillow, and by tifffile
        values = deep(3, dtype)
        deep_tiff(tmp_path / "a.tif", values, extratags=side)
        image = read_deep(tmp_path / "a.tif")
        np.testing.assert_array_equal(image, np.rot90(values, -1))
        assert 274 not in image.getexif()


def test_channels_and_pages_left_out_are_announced(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "float32"):
        values = (deep(5, "float64") * 200).astype(dtype)
        deep_tiff(tmp_path / "a.tif", values, extrasamples=["unspecified"] * 2)
        with pytest.warns(UserWarning, match=r"a\.tif: 2 channels beyond colour"):
            image = images.read(tmp_path / "a.tif", deep=True)
        np.testing.assert_array_equal(image, values[..., :3])
    tifffile.imwrite(tmp_path / "b.tif", deep(3, "float32")[None].repeat(2, 0), photometric="rgb")
    with pytest.warns(UserWarning, match=r"b\.tif: only the first of its 2 frames"):
        images.read(tmp_path / "b.tif", deep=True)


def test_depths_that_are_no_image_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.array([[1, -1]])
    high = np.array([[7, 2**32 - 1]], np.uint32)
    for values, reason in (
        (grey.astype(np.int8), "signed values of 8 bits"),
        (grey.astype(np.float32)[..., None].repeat(3, 2).astype(np.int32), "type int32"),
        (high, r"7\.\.4294967295"),
    ):
        deep_tiff(tmp_path / "a.tif", values)
        with pytest.raises(ImageError, match=rf"a\.tif: .*{reason}"):
            images.read(tmp_path / "a.tif", deep=True)
    deep_tiff(tmp_path / "a.tif", np.array([[7, 70000]], np.uint32))
    with pytest.raises(ValueError, match=r"0\.\.65535, got 7\.\.70000"):
        images.pixels(images.read(tmp_path / "a.tif"))
    deep_tiff(tmp_path / "a.tif", deep(3, "float32"))
    with pytest.raises(ImageError, match=r"a\.tif: mode RGB;F32 is not supported"):
        images.read(tmp_path / "a.tif")
    deep_tiff(tmp_path / "b.tif", deep(3, "uint16"), planarconfig="separate")
    with pytest.raises(ImageError, match=r"b\.tif: planes of 16 bits"):
        images.read(tmp_path / "b.tif")
    data = (tmp_path / "a.tif").read_bytes()
    for size in range(4, len(data), 97):
        (tmp_path / "cut.tif").write_bytes(data[:size])
        with warnings.catch_warnings(), pytest.raises(ImageError, match=r"cut\.tif: "):
            warnings.simplefilter("ignore")  # Pillow warns of broken tags
            images.read(tmp_path / "cut.tif", deep=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(images.TooLargeError, match=r"a\.tif: too large"):
        images.read(tmp_path / "a.tif", deep=True)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_metadata_of_deep_images_survives(tmp_path: Path, suffix: str, dtype: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x8298] = "Maker", "me"
    exif.get_ifd(0x8769)[0x829A] = 0.5  # exposure time
    exif.get_ifd(0x8825)[1] = "N"  # hemisphere
    info = {
        "exif": exif.tobytes(),
        "icc_profile": b"profile" * 9,
        "dpi": (300, 300),
        "xmp": XMP,
    }
    image = images.DeepImage(deep(4, dtype), info)
    if suffix == ".png" and dtype == "float32":
        with pytest.raises(ImageError, match=r"PNG cannot store mode RGBA;F32; try \.tif"):
            images.write(image, tmp_path / "a.png")
        return
    image.save(tmp_path / f"a{suffix}")
    # And once more, of what was read.
    read_deep(tmp_path / f"a{suffix}").save(tmp_path / f"b{suffix}")
    back = read_deep(tmp_path / f"b{suffix}")
    np.testing.assert_array_equal(back, image)
    found = back.getexif()
    assert (found[0x010F], found[0x8298]) == ("Maker", "me")
    assert found.get_ifd(0x8769)[0x829A] == 0.5 and found.get_ifd(0x8825)[1] == "N"
    assert not {256, 257, 258, 259, 273, 279} & set(found)
    assert back.info["icc_profile"] == b"profile" * 9
    assert tuple(round(value) for value in back.info["dpi"]) == (300, 300)
    assert (back.info.get("xmp") or back.info["XML:com.adobe.xmp"].encode()) == XMP


def test_formats_of_8_bits_get_8_of_16(tmp_path: Path) -> None:
    values = deep(3, "uint16")
    for suffix in (".webp", ".bmp", ".jpg"):
        image = images.DeepImage(values, {"lossless": True})
        with pytest.warns(UserWarning, match=rf"a\{suffix}: \w+ holds 8 of"):
            images.write(image, tmp_path / f"a{suffix}")
        back = np.asarray(images.read(tmp_path / f"a{suffix}"))
        error = np.abs(back.astype(float) - values / 257)
        assert error.mean() < 40 if suffix == ".jpg" else error.max() <= 0.5
    with pytest.raises(ImageError, match=r"JPEG cannot store mode RGBA;16; try \.png or \.tif"):
        images.write(images.DeepImage(deep(4, "uint16")), tmp_path / "b.jpg")


def test_what_formats_deep_images_are_encoded_in() -> None:
    for count, dtype, asked, given in [
        (3, "uint16", "PNG", "PNG"),
        (3, "uint16", "TIFF", "TIFF"),
        (4, "uint16", None, "PNG"),
        (3, "float32", "PNG", "TIFF"),
        (1, "float16", None, "TIFF"),
    ]:
        image = images.DeepImage(deep(count, dtype))
        assert images.encoding(image, asked) == given
        assert images.encode(image, asked)[:4] in ((b"\x89PNG", b"II*\0"))


def test_a_deep_image_is_stripped_and_turned() -> None:
    values = deep(3, "uint16")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        info = {"exif": exif.tobytes(), "compression": "raw"}
        turned = images.stripped(images.DeepImage(values, info))
        expected = Image.fromarray((values >> 8).astype(np.uint8))
        expected.info["exif"] = exif.tobytes()
        np.testing.assert_array_equal(np.asarray(turned) >> 8, images.stripped(expected))
        assert turned.info == {"compression": "raw"}


def test_16_bit_colour_of_ppm_is_announced(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n\1\2\3\4\5\6")
    with pytest.warns(UserWarning, match=r"a\.ppm: 16-bit colour is read as 8-bit"):
        images.read(tmp_path / "a.ppm", deep=True)
