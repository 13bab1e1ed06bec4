"""Reading and writing image files without losing alpha, 16-bit grey, EXIF, XMP, ICC profile, …"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, overload

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from . import _deep
from ._deep import DeepImage
from ._files import replacing

__all__ = [
    "HALVED",
    "MODES",
    "DeepImage",
    "ImageError",
    "TooLargeError",
    "check_target",
    "encode",
    "encoding",
    "is_image_name",
    "load",
    "output_format",
    "pixels",
    "read",
    "size_limit",
    "stripped",
    "tiff_exif",
    "write",
]

# Modes whose pixels are samples of light (and alpha): those a denoiser can work on.
MODES = frozenset({"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"})

# Suffixes a folder is searched for, and those that are written: of formats that store what was
# denoised. GIF's palette would quantise it, and Pillow's JPEG 2000, AVIF, ICO and PDF lose pixels
# or metadata.
_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pnm": "PPM",
}
SUFFIXES = frozenset({*_FORMATS, ".gif"})

_COMPRESSION = frozenset({"compression", "lossless", "subsampling"})
_CARRIED = ("exif", "icc_profile", "dpi")
_FORMAT_MODES = {
    "JPEG": frozenset({"L", "RGB"}),
    "WEBP": frozenset({"L", "LA", "RGB", "RGBA"}),
    "BMP": frozenset({"L", "RGB"}),  # Pillow writes an alpha channel that readers take for none
    "PNG": frozenset({"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I"}),
    "PPM": frozenset({"L", "RGB", "I;16", "I", "F"}),
}
HALVED = 2  # Pillow's number for 4:2:0, which WebP always has
_LARGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels of a side: libjpeg's and libwebp's limits
_ANIMATED = frozenset({"GIF", "WEBP", "PNG"})  # more frames of others are pages and previews
# Nearly transparent compression: the noise is gone, so the file is small all the same.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}

# Compressions of a file that was read which lose, or take bilevel images only.
_TIFF_UNFIT = ("jpeg", "tiff_jpeg", "webp", "tiff_ccitt", "group3", "group4", "tiff_raw_16")

_PHOTOMETRIC_TAG, _SAMPLES_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 262, 277, 258, 339
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_XMP_TAG, _XMP_TEXT = 700, "XML:com.adobe.xmp"
_JPEG_SEGMENT = 65_000  # bytes: what one holds, less its header
# Tags that say how a TIFF file stores its pixels; the new file has its own. XMP and the ICC profile
# go other ways, and the orientation (274) of TIFF, unlike others, Pillow applies to the pixels.
_TIFF_STRUCTURE = frozenset(
    {
        *range(254, 270),
        273,
        274,
        *range(277, 282),
        284,
        *range(288, 294),
        297,
        317,
        *range(320, 326),
    }
    | {*range(330, 343), 347, *range(512, 522), *range(529, 533), _XMP_TAG, 34675}
)


class ImageError(ValueError):
    """An image file that cannot be read or written; the message names the file and the reason."""


class TooLargeError(ImageError):
    """An image file of more than twice `PIL.Image.MAX_IMAGE_PIXELS`."""


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether a folder's file is taken for an image: by its suffix, hidden files excluded."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def load(image: Image.Image, name: str = "image") -> Image.Image:
    """Decode a PIL image and bring it to one of `MODES`.

    Palette images become RGB, or RGBA if they have transparency; bilevel ones L; a transparent
    colour (PNG tRNS) becomes an alpha channel. Other modes (CMYK, LAB, ...) raise ImageError,
    since their conversion needs a choice that is the caller's.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _damaged(name, error) from error
    transparent = "transparency" in image.info
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if transparent or image.mode == "PA" else "RGB")
    if transparent and image.mode in ("1", "L", "RGB"):
        return image.convert("RGBA" if image.mode == "RGB" else "LA")
    if transparent and image.mode not in ("LA", "RGBA"):
        raise ImageError(f"{name}: a transparent colour in mode {image.mode} is not supported")
    if image.mode == "1":
        return image.convert("L")
    if image.mode not in MODES:
        raise ImageError(f"{name}: mode {image.mode} is not supported; convert to RGB or L first")
    return image


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: damaged or truncated image ({_reason(error)})")


def pixels(image: Image.Image | DeepImage, name: str = "image") -> npt.NDArray[Any]:
    """The samples of an image, HxW or HxWxC, as `Denoiser` takes them: mode I becomes uint16.

    Raises ImageError as `load` does, and ValueError for mode I beyond 0..65535.
    """
    if isinstance(image, DeepImage):
        return image.pixels
    values: npt.NDArray[Any] = np.asarray(load(image, name))
    if values.dtype == np.int32:
        if values.size and (values.min() < 0 or values.max() > 65535):
            span = f"{values.min()}..{values.max()}"
            raise ValueError(f"an image of mode I must lie in 0..65535, got {span}")
        values = values.astype(np.uint16)
    return values


@overload
def read(
    path: str | os.PathLike[str] | IO[bytes],
    name: str | None = None,
    *,
    animations: bool = True,
    deep: Literal[False] = False,
) -> Image.Image: ...


@overload
def read(
    path: str | os.PathLike[str] | IO[bytes],
    name: str | None = None,
    *,
    animations: bool = True,
    deep: bool,
) -> Image.Image | DeepImage: ...


def read(
    path: str | os.PathLike[str] | IO[bytes],
    name: str | None = None,
    *,
    animations: bool = True,
    deep: bool = False,
) -> Image.Image | DeepImage:
    """Read an image file into memory, in one of `MODES`, with its metadata in `info`.

    path: of a file, or a binary file that is open and can be rewound; errors call it `name`.
    animations: whether the first frame of an animated GIF, WebP or PNG is taken for an image.
    deep: whether PNG and TIFF files of a depth that Pillow has no mode for (16-bit colour, float
        colour, float16 and float64, 16-bit grey with alpha) give a `DeepImage`.

    `info["subsampling"]` tells how JPEG and WebP files hold colours, by Pillow's numbers.

    Pixels stay as stored: an EXIF orientation is kept as metadata, not applied (but that of TIFF is
    applied, and not kept). Warns of what is not delivered: 16 bits that come as 8, channels of
    TIFF beyond colour and alpha, and frames after the first.

    Raises ImageError (not an image, truncated, a directory, unreadable, animated, or of a depth
    that needs `deep`), TooLargeError and FileNotFoundError.
    """
    source = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if name is None:
        name = source if isinstance(source, str) else "file"
    if isinstance(source, str) and os.path.isdir(source):
        raise ImageError(f"{name}: is a directory, not an image file")
    try:
        opened = Image.open(source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        with _opened(source) as file:
            head = file.read(4)
        if head in _TIFF_HEADS:
            return _read_tiff(source, name, deep)
        reason = "not an image of a known format (PNG, JPEG, TIFF, WebP, ...)"
        raise ImageError(f"{name}: {reason if head else 'the file is empty'}") from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except MemoryError:
        raise
    except Exception as error:  # a header broken in the middle raises as decoders do
        if getattr(error, "errno", None) is None:
            raise _damaged(name, error) from error
        raise ImageError(f"{name}: cannot be read ({_reason(error)})") from error
    with opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and not animations and opened.format in _ANIMATED:
            raise ImageError(f"{name}: an animation of {frames} frames, not an image")
        if frames > 1:
            warnings.warn(f"{name}: only the first of its {frames} frames is read", stacklevel=2)
        _check_tiff(opened, name)
        layouts = [str(tile[3]) for tile in opened.tile]
        halved = any(";16" in layout for layout in layouts)
        # Of planes in a row without compression, Pillow would take each byte for a pixel.
        mistaken = (
            not halved and opened.mode[:3] == "RGB" and _tag(opened, _BITS_TAG, (8,))[0] == 16
        )
        if mistaken and not deep:
            raise ImageError(f"{name}: planes of 16 bits are not supported")
        narrowed = mistaken or (halved and not opened.mode.startswith("I"))
        grey = any("LA;16" in layout for layout in layouts)  # which Pillow turns into RGBA
        if narrowed and deep and (found := _read_deep(opened, source, name)) is not None:
            return found
        if opened.format == "PPM" and opened.mode == "RGB":
            narrowed = any(isinstance(tile[3], tuple) and tile[3][1] > 255 for tile in opened.tile)
        if narrowed:
            kind = "grey with alpha" if grey else "colour"
            warnings.warn(f"{name}: 16-bit {kind} is read as 8-bit", stacklevel=2)
        more: dict[str, Any] = tiff_exif(opened, name)
        if opened.format == "WEBP":
            lossless = _is_lossless_webp(source)
            more |= {"lossless": True} if lossless else {"subsampling": HALVED}
        elif opened.format in ("JPEG", "MPO"):
            more["subsampling"] = JpegImagePlugin.get_sampling(opened)
        image = load(opened, name)
        info = image.info | more
        if grey:
            image = Image.merge("LA", (image.getchannel(0), image.getchannel(3)))
        if image.mode.startswith("I;16") and _white_is_zero(opened):
            image = _inverted(image)
        if image.mode == "I" and _tag(opened, _SAMPLE_FORMAT_TAG, (1,))[0] == 1:
            _check_unsigned(image, name)
        # A copy has no file behind it, so it outlives `with`.
        image = image.copy() if image is opened else image
        image.info = info
        image.format = opened.format
        return image


def _too_large(name: str) -> TooLargeError:
    return TooLargeError(
        f"{name}: too large: more than {size_limit():.4g} megapixels, twice "
        "PIL.Image.MAX_IMAGE_PIXELS, which is set against decompression bombs"
    )


def size_limit() -> float:
    """The megapixels beyond which Pillow refuses an image."""
    return 2 * (Image.MAX_IMAGE_PIXELS or np.inf) / 1e6


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    return getattr(image, "tag_v2", {}).get(tag, default)


def _check_tiff(image: Image.Image, name: str) -> None:
    if _tag(image, _SAMPLE_FORMAT_TAG, (1,))[0] == 2 and _tag(image, _BITS_TAG, (1,))[0] == 8:
        # Pillow would take -1 for 255.
        raise ImageError(f"{name}: signed values of 8 bits are not supported")
    if image.format == "TIFF":
        _warn_of_channels(_tag(image, _SAMPLES_TAG, 1) - len(image.getbands()), name)


def _warn_of_channels(count: int, name: str) -> None:
    if count > 0:
        which = "a channel" if count == 1 else f"{count} channels"
        warnings.warn(f"{name}: {which} beyond colour and alpha left out", stacklevel=4)


def _check_unsigned(image: Image.Image, name: str) -> None:
    values = np.asarray(image)
    if values.size and values.min() < 0:
        values = values.view(np.uint32)
        span = f"{values.min()}..{values.max()}"
        raise ImageError(f"{name}: values of 32 bits, {span}, are not supported beyond 65535")


def _read_deep(opened: ImageFile.ImageFile, source: str | IO[bytes], name: str) -> DeepImage | None:
    """The file as a DeepImage; None where Pillow's 8 bits are all that can be had."""
    info = opened.info | tiff_exif(opened, name)
    try:
        with Image.open(source) as again:
            values = _deep.decode(opened, again)
    except MemoryError:
        raise
    except Exception as error:  # as in `load`
        raise _damaged(name, error) from error
    if values is None:
        found = _read_tiff(source, name, True)
        return found if isinstance(found, DeepImage) else None
    return DeepImage(values, {k: v for k, v in info.items() if k != "transparency"}, opened.format)


def _read_tiff(source: str | IO[bytes], name: str, deep: bool) -> DeepImage:
    """A TIFF file that Pillow does not take."""
    try:
        with _opened(source) as file:
            image, frames, left_out = _deep.read_tiff(file)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except Exception as error:  # tifffile and its codecs raise whatever
        raise ImageError(f"{name}: cannot be read ({_reason(error)})") from error
    if not deep:
        raise ImageError(f"{name}: mode {image.mode} is not supported")
    if frames > 1:
        warnings.warn(f"{name}: only the first of its {frames} frames is read", stacklevel=3)
    _warn_of_channels(left_out, name)
    exif = image.getexif()
    for tag in _TIFF_STRUCTURE & set(exif):
        del exif[tag]
    image.info["exif"] = exif.tobytes()
    if not len(exif):
        del image.info["exif"]
    return image


def tiff_exif(image: Image.Image, name: str = "image") -> dict[str, Any]:
    """The EXIF data of a TIFF file as an entry of `info`, where Pillow has those of other formats.

    To be called before the pixels are loaded, which may close the file.
    """
    if image.format != "TIFF" or "exif" in image.info:
        return {}
    try:
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())
        for tag in _TIFF_STRUCTURE & set(exif):
            del exif[tag]
        return {"exif": exif.tobytes()} if len(exif) else {}
    except Exception as error:  # as in `load`
        reason = _reason(error)
        warnings.warn(f"{name}: its EXIF data are left out ({reason})", stacklevel=3)
        return {}


@overload
def stripped(image: Image.Image) -> Image.Image: ...


@overload
def stripped(image: Image.Image | DeepImage) -> Image.Image | DeepImage: ...


def stripped(image: Image.Image | DeepImage) -> Image.Image | DeepImage:
    """An image without its metadata, turned as its EXIF orientation says.

    What stays in `info` is how its file was compressed.
    """
    if isinstance(image, DeepImage):
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # as below
            orientation = 1
        info = {key: image.info[key] for key in _COMPRESSION & set(image.info)}
        return DeepImage(_deep.oriented(image.pixels, orientation), info, image.format)
    from PIL import ImageOps

    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that are damaged raise as decoders do
        turned = image.copy()
    turned.info = {key: image.info[key] for key in _COMPRESSION & set(image.info)}
    turned.format = image.format
    return turned


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file stores a negative; Pillow turns those of 8 bits only."""
    return image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0


def _inverted(image: Image.Image) -> Image.Image:
    # 65535 - v is ~v, in any byte order.
    content = ~np.frombuffer(image.tobytes(), np.uint8)
    return Image.frombytes(image.mode, image.size, content.tobytes())


def _is_lossless_webp(source: str | IO[bytes]) -> bool:
    with _opened(source) as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, size = head[:4], int.from_bytes(head[4:], "little")
            if kind in (b"VP8 ", b"VP8L"):
                return kind == b"VP8L"
            file.seek(16 if kind == b"ANMF" else size + size % 2, os.SEEK_CUR)
    return False


def _opened(source: str | IO[bytes]) -> IO[bytes]:
    return open(source, "rb") if isinstance(source, str) else io.BytesIO(_content(source))


def _content(file: IO[bytes]) -> bytes:
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def output_format(path: str | os.PathLike[str]) -> str | None:
    """The Pillow format in which the suffix says to write, or None where there is none."""
    return _FORMATS.get(os.path.splitext(path)[1].lower())


def encode(image: Image.Image | DeepImage, file_format: str | None) -> bytes:
    """An image as the content of a file, as `write` writes it, in the format of `encoding`."""
    file = io.BytesIO()
    _save(image, file, encoding(image, file_format), "image")
    return file.getvalue()


def encoding(image: Image.Image | DeepImage, file_format: str | None) -> str:
    """The format that `encode` writes.

    `file_format` if that stores what was denoised, this mode and size; otherwise PNG or TIFF.
    """
    kind = "JPEG" if file_format == "MPO" else file_format
    formats = set(_FORMATS.values())
    if kind not in formats or not _stores(kind, image.mode) or not _holds(kind, image.size):
        kind = "PNG" if _stores("PNG", image.mode) else "TIFF"
    return kind


def _stores(file_format: str, mode: str) -> bool:
    """Whether a format stores a mode; of 16-bit colour 8 bits will do."""
    allowed = _FORMAT_MODES.get(file_format)
    return allowed is None or mode in allowed or mode.removesuffix(";16") in allowed


def _holds(file_format: str, size: tuple[int, int]) -> bool:
    return max(size) <= _LARGEST.get(file_format, max(size))


def check_target(
    path: str | os.PathLike[str],
    mode: str | None = None,
    size: tuple[int, int] | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """Check, before any long work, that an image can be written here; return the Pillow format.

    Raises ImageError: unknown suffix, a format that cannot store `mode` or `size`, no such folder,
    a folder or file that is not writable, an existing file while `overwrite` is false.
    """
    name = os.fspath(path)
    suffix = Path(name).suffix.lower()
    file_format = output_format(name)
    if file_format is not None and file_format not in Image.SAVE:
        Image.init()  # as Pillow does for all but the commonest formats, and slowly
    if file_format is None or file_format not in Image.SAVE:
        raise ImageError(f"{name}: cannot write images with suffix {suffix!r}; try .png")
    if mode is not None and not _stores(file_format, mode):
        other = ".png or .tif" if _stores("PNG", mode) else ".tif"
        raise ImageError(f"{name}: {file_format} cannot store mode {mode}; try {other}")
    if size is not None and not _holds(file_format, size):
        limit = f"more than {_LARGEST[file_format]} pixels a side, got {size[0]}×{size[1]}"
        raise ImageError(f"{name}: {file_format} cannot store {limit}; try .png or .tif")
    target = os.path.realpath(name)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ImageError(f"{name}: no such folder: {os.path.dirname(name) or folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ImageError(f"{name}: its folder is not writable")
    if os.path.exists(target):
        if os.path.isdir(target):
            raise ImageError(f"{name}: is a directory")
        if not overwrite:
            raise ImageError(f"{name}: already exists; it is replaced only with overwrite")
        # Renaming a new file over a device or a pipe would destroy it.
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise ImageError(f"{name}: is not a regular file")
        if not os.access(target, os.W_OK):
            raise ImageError(f"{name}: is not writable")
    return file_format


def write(
    image: Image.Image | DeepImage, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write an image, with the metadata in `image.info`, in one atomic step.

    EXIF, XMP, ICC profile and DPI, the text of PNG and the comment of JPEG are written where the
    format has a place for them.

    The file appears under its name only when complete: it is written under a temporary name in
    the same folder, then renamed. The suffix chooses the format; JPEG is written at quality 95
    without chroma subsampling; WebP without loss if it was read from such a file. An image of mode
    I becomes a PNG file of 16 bits. A `DeepImage` keeps its depth in PNG and TIFF; formats of 8
    bits get 8 of its 16, with a warning. TIFF files of a `DeepImage` are uncompressed if it was
    read from such a file, or deflated.

    Raises ImageError; see `check_target`.
    """
    name = os.fspath(path)
    file_format = check_target(name, image.mode, image.size, overwrite=overwrite)
    target = os.path.realpath(name)  # a symbolic link stays one: its target is replaced
    try:
        with replacing(Path(target)) as temporary:
            with open(temporary, "wb") as file:
                _save(image, file, file_format, name)
            if not overwrite and os.path.exists(target):  # it appeared meanwhile
                raise ImageError(f"{name}: already exists; it is replaced only with overwrite")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # encoders raise OSError, ValueError, KeyError, struct.error, ...
        raise ImageError(f"{name}: cannot be written ({_reason(error)})") from error


def _save(image: Image.Image | DeepImage, file: IO[bytes], file_format: str, name: str) -> None:
    options = _options(image.info, file_format, name)
    if isinstance(image, DeepImage):
        if file_format == "TIFF":
            file.write(_deep.tiff(image, options))
            return
        if file_format == "PNG":
            file.write(_deep.png(image, options))
            return
        warnings.warn(f"{name}: {file_format} holds 8 of the image's 16 bits", stacklevel=3)
        narrow = np.rint(image.pixels / np.float32(257)).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(narrow))
    if image.mode == "I" and file_format == "PNG":
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            span = f"{pixels.min()}..{pixels.max()}"
            raise ImageError(f"{name}: PNG cannot store values {span}; try .tif")
        image = Image.fromarray(pixels.astype(np.uint16))
    if file_format == "WEBP":
        file.write(_aside(lambda: _webp(image, options)))
        return
    image.save(file, format=file_format, **options)


def _webp(image: Image.Image, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, format="WEBP", **options)
    return file.getvalue()


def _aside(work: Callable[[], bytes]) -> bytes:
    """What `work` returns, from a thread: Ctrl-C does not wait for a call into C that takes long.

    libwebp takes 2 to 4 seconds for 12 megapixels. Other encoders write part by part.
    """
    results: list[bytes] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _options(info: dict[Any, Any], file_format: str, name: str) -> dict[str, Any]:
    """Arguments of Pillow's `save`: quality, and the metadata."""
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    if file_format == "WEBP" and info.get("lossless"):
        options = {"lossless": True, "exact": True}  # or colours that alpha hides are lost
    if file_format == "TIFF" and info.get("compression") in _TIFF_UNFIT:
        options["compression"] = "tiff_lzw"
    options |= {key: info[key] for key in _CARRIED if info.get(key)}
    if "exif" in options:  # WebP's lacks the prefix, and JPEG needs it
        options["exif"] = b"Exif\0\0" + options["exif"].removeprefix(b"Exif\0\0")
    xmp = info.get("xmp") or info.get(_XMP_TEXT)
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    if file_format == "PNG":
        options["pnginfo"] = text = PngInfo()
        for key, value in info.items():
            if isinstance(value, str) and key != "compression":  # which is TIFF's
                text.add_text(key, value)
        if xmp and _XMP_TEXT not in info:
            text.add_itxt(_XMP_TEXT, xmp.decode("utf-8", "replace"))
    elif xmp and file_format == "TIFF":
        exif = Image.Exif()
        exif.load(options.get("exif", b""))
        exif[_XMP_TAG] = xmp
        options["exif"] = exif
    elif xmp and file_format == "JPEG" and len(xmp) > _JPEG_SEGMENT:
        warnings.warn(f"{name}: XMP of {len(xmp)} bytes is too long for JPEG", stacklevel=3)
    elif xmp and file_format in ("JPEG", "WEBP"):
        options["xmp"] = xmp
    return options


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
