"""Images of 16 bits or floats for which Pillow has no mode, and their files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

__all__ = ["DeepImage", "decode", "oriented", "png", "read_tiff", "tiff"]

_BANDS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_STRIP = 1 << 18  # bytes of rows that are compressed together: readers of TIFF hold one at a time
_PNG_HEAD = 8  # bytes of the signature
_EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 34665, 34853, 40965

Pixels = npt.NDArray[Any]


class DeepImage:
    """Pixels of a depth that Pillow has no mode for, with the metadata of their file.

    pixels: HxW or HxWxC, C = 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of dtype uint16 or
        float16/32/64; `numpy.asarray(image)` is the same.
    info: as of a PIL image: `exif`, `icc_profile`, `dpi`, `xmp`, … as far as the file has them.
    format: of the file it was read from, as Pillow calls it.

    `mode`, `size`, `width`, `height`, `getexif` and `save` are as of a PIL image.
    """

    def __init__(
        self, pixels: Pixels, info: dict[Any, Any] | None = None, format: str | None = None
    ) -> None:
        self.pixels = pixels
        self.info: dict[Any, Any] = {} if info is None else info
        self.format = format

    @property
    def mode(self) -> str:
        """Bands and depth: "RGB;16", "RGBA;F32", …"""
        kind = "F" if self.pixels.dtype.kind == "f" else ""
        return f"{self.bands};{kind}{8 * self.pixels.dtype.itemsize}"

    @property
    def bands(self) -> str:
        return _BANDS[1 if self.pixels.ndim == 2 else self.pixels.shape[2]]

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def getexif(self) -> Image.Exif:
        exif = Image.Exif()
        exif.load(self.info.get("exif", b""))
        return exif

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, replacing one of that name; see `images.write`."""
        from .images import write

        write(self, path, overwrite=True)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Pixels:
        if copy:
            return np.array(self.pixels, dtype)
        return np.asarray(self.pixels, dtype)

    def __repr__(self) -> str:
        return f"<DeepImage {self.mode} {self.width}x{self.height}>"


def oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels turned and mirrored as an EXIF orientation of 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def decode(image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> Pixels | None:
    """The pixels of a PNG or TIFF file of 16-bit colour, or grey with alpha, that Pillow opened.

    image, again: the file opened twice, not loaded.

    Pillow undoes filters and compression, and would then drop every second byte; asked for the
    other byte order, it drops the others.

    Returns None where Pillow does not go that way: planes that are stored one after the other.
    """
    if getattr(image, "tag_v2", {}).get(284) == 2:
        return None
    layout = _layout(image.tile[0])
    name, order = layout[:-1].replace("a", "A"), layout[-1]
    if name == "LA;16":  # four bytes a pixel, as RGBA of 8 bits has
        _decode_as(image, "RGBA")
        pixels = np.asarray(image).view(">u2")
    else:
        halves = []
        for half, last in ((image, "B"), (again, "L")):
            _decode_as(half, name + last)
            halves.append(np.asarray(half))
        pixels = np.stack(halves, axis=-1).view({"B": ">u2", "L": "<u2"}.get(order, "=u2"))[..., 0]
    pixels = pixels.astype(np.uint16)
    key = image.info.pop("transparency", None)
    if isinstance(key, tuple):
        shown = (pixels != np.array(key, np.uint16)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, shown * np.uint16(65535)], axis=2)
    return _straight(pixels) if "a" in layout else pixels


def _layout(tile: Any) -> str:
    return str(tile[3] if isinstance(tile[3], str) else tile[3][0])


def _decode_as(image: ImageFile.ImageFile, layout: str) -> None:
    image.tile = [
        tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
        for tile in image.tile
    ]
    image.load()


def _straight(pixels: Pixels) -> Pixels:
    """Colours that were multiplied by alpha, as TIFF allows, without it."""
    white = 65535.0 if pixels.dtype.kind == "u" else 1.0
    alpha = pixels[..., -1:].astype(np.float64)
    colours = pixels[..., :-1] * (white / np.where(alpha > 0, alpha, white))
    if pixels.dtype.kind == "u":
        colours = np.rint(np.minimum(colours, white))
    return np.concatenate([colours.astype(pixels.dtype), pixels[..., -1:]], axis=-1)


def read_tiff(file: IO[bytes]) -> tuple[DeepImage, int, int]:
    """The first image of a TIFF file that Pillow does not take, turned as its orientation says.

    Returns the image, the number of images in the file, and of channels that are left out.

    Raises ValueError that says what is not supported, and what tifffile raises.
    """
    import tifffile  # a tenth of a second

    with tifffile.TiffFile(file) as content:
        page: Any = content.pages[0]
        colours = {0: 1, 1: 1, 2: 3}.get(int(page.photometric))
        if colours is None:
            raise ValueError(f"colours of kind {page.photometric.name} are not supported")
        dtype = np.dtype(page.dtype)
        if dtype.kind != "f" and dtype != np.uint16:
            raise ValueError(f"values of type {dtype} are not supported")
        if page.imagewidth * page.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
            raise Image.DecompressionBombError
        if page.imagedepth > 1 or page.samplesperpixel < colours:
            raise ValueError(f"shape {page.shape} is not that of an image")
        pixels = page.asarray().reshape(page.shape)
        if page.axes.startswith("S"):
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
        alpha = int(page.extrasamples[0]) if page.extrasamples else 0  # 0 has no stated meaning
        kept = colours + (alpha > 0)
        left_out = pixels.shape[2] - kept
        pixels = pixels[..., :kept]
        if page.photometric == 0:
            white = 65535 if dtype == np.uint16 else 1
            pixels = np.concatenate([white - pixels[..., :1], pixels[..., 1:]], axis=2)
        pixels = _straight(pixels) if alpha == 1 else pixels
        info: dict[Any, Any] = {"compression": "raw" if page.compression == 1 else "deflate"}
        file.seek(0)
        exif = Image.Exif()
        exif.load_from_fp(file)
        if exif.get(34675):
            info["icc_profile"] = exif[34675]
        if exif.get(700):
            info["xmp"] = exif[700]
        unit = {2: 1.0, 3: 2.54}.get(exif.get(296, 2))
        if unit and exif.get(282) and exif.get(283):
            info["dpi"] = tuple(unit * float(exif[tag]) for tag in (282, 283))
        for tag in {_EXIF_IFD, _GPS_IFD} & set(exif):
            exif.get_ifd(tag)  # before the file is closed
        pixels = oriented(pixels, exif.get(274, 1))
        info["exif"] = exif.tobytes()
        pixels = np.ascontiguousarray(
            pixels[..., 0] if kept == 1 else pixels, dtype.newbyteorder("=")
        )
        return DeepImage(pixels, info, "TIFF"), len(content.pages), left_out


def png(image: DeepImage, options: dict[str, Any]) -> bytes:
    """A PNG file of uint16 pixels, with the metadata that Pillow makes of `options`."""
    template = io.BytesIO()
    Image.new(image.bands, (1, 1)).save(template, "PNG", **options)
    content = template.getvalue()
    result = [content[:_PNG_HEAD]]
    place = _PNG_HEAD
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if kind == b"IHDR":
            colour_type = content[place + 17]
            head = struct.pack(">IIBBBBB", *image.size, 16, colour_type, 0, 0, 0)
            result += _chunk(kind, head)
        elif kind == b"IDAT":
            result += _chunk(kind, _filtered(image.pixels))
        else:
            result.append(content[place:end])
        place = end
    return b"".join(result)


def _chunk(kind: bytes, data: bytes) -> list[bytes]:
    check = zlib.crc32(data, zlib.crc32(kind))
    return [len(data).to_bytes(4, "big"), kind, data, check.to_bytes(4, "big")]


def _filtered(pixels: Pixels) -> bytes:
    """Rows as PNG compresses them: of the filters Sub, Up and Paeth that of the smallest sum."""
    height, width = pixels.shape[:2]
    step = pixels[:1, :1].nbytes
    packer = zlib.compressobj()
    result = []
    rows = max(1, _STRIP // (width * step))
    above = np.zeros((1, width * step), np.uint8)
    for top in range(0, height, rows):
        block = pixels[top : top + rows].astype(">u2").reshape(-1, width * step // 2).view(np.uint8)
        up = np.concatenate([above, block[:-1]])
        left, corner = (np.pad(part, ((0, 0), (step, 0)))[:, :-step] for part in (block, up))
        a, b, c = (part.astype(np.int16) for part in (left, up, corner))
        far = abs(b - c), abs(a - c), abs(a + b - 2 * c)
        paeth = np.where(
            (far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner)
        )
        choices = [block - guess for guess in (left, up, paeth)]
        sums = [abs(choice.view(np.int8).astype(np.int16)).sum(axis=1) for choice in choices]
        best = np.argmin(sums, axis=0)
        lines = np.choose(best[:, None], choices)
        kinds = np.array([1, 2, 4], np.uint8)[best]
        result.append(packer.compress(np.column_stack([kinds, lines]).tobytes()))
        above = block[-1:]
    return b"".join([*result, packer.flush()])


def tiff(image: DeepImage, options: dict[str, Any]) -> bytes:
    """A TIFF file, with the metadata that Pillow makes of `options`."""
    from PIL import TiffImagePlugin, TiffTags

    template = io.BytesIO()
    Image.new(image.bands, (1, 1)).save(template, "TIFF", **options | {"compression": "raw"})
    template.seek(0)
    head = template.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    template.seek(tags.next)
    tags.load(template)
    for tag in (_EXIF_IFD, _GPS_IFD):
        if tag in tags:
            inner = TiffImagePlugin.ImageFileDirectory_v2(head, group=tag)
            template.seek(tags[tag])
            inner.load(template)
            tags[tag] = {key: inner[key] for key in inner if key != _INTEROP_IFD}
    for tag in list(tags):
        _ = tags[tag]  # which reads the value; only those are written

    pixels = image.pixels if image.pixels.ndim == 3 else image.pixels[:, :, None]
    height, width, count = pixels.shape
    rows = max(1, _STRIP // (width * count * pixels.itemsize))
    packed = image.info.get("compression", "raw") != "raw"
    differences = packed and pixels.dtype == np.uint16
    order = head[:2] == b"II"
    strips = []
    for top in range(0, height, rows):
        strip = pixels[top : top + rows]
        if differences:
            strip = np.diff(strip, axis=1, prepend=np.zeros_like(strip[:, :1]))
        content = strip.astype(strip.dtype.newbyteorder("<" if order else ">")).tobytes()
        strips.append(zlib.compress(content) if packed else content)
    sizes = [len(strip) for strip in strips]
    for tag, value in {
        256: width,
        257: height,
        258: (8 * pixels.itemsize,) * count,
        259: 8 if packed else 1,
        273: tuple(np.cumsum([0, *sizes[:-1]]).tolist()),
        278: rows,
        279: tuple(sizes),
        317: 2 if differences else 1,
        339: (3 if pixels.dtype.kind == "f" else 1,) * count,
    }.items():
        tags.tagtype[tag] = TiffTags.SHORT if tag in (258, 259, 317, 339) else TiffTags.LONG
        tags[tag] = value
    file = io.BytesIO()
    tags.save(file)
    file.writelines(strips)
    return file.getvalue()
