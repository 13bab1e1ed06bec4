"""Reading and writing image files without losing alpha, 16-bit grey, EXIF, XMP, ICC profile, …"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ._files import replacing

__all__ = [
    "MODES",
    "ImageError",
    "check_target",
    "encode",
    "is_image_name",
    "load",
    "output_format",
    "read",
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

_COMPRESSION = frozenset({"compression", "lossless"})
_CARRIED = ("exif", "icc_profile", "dpi")
_FORMAT_MODES = {
    "JPEG": frozenset({"L", "RGB"}),
    "WEBP": frozenset({"L", "LA", "RGB", "RGBA"}),
    "BMP": frozenset({"L", "RGB"}),  # Pillow writes an alpha channel that readers take for none
    "PNG": frozenset({"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I"}),
    "PPM": frozenset({"L", "RGB", "I;16", "I", "F"}),
}
_LARGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels of a side: libjpeg's and libwebp's limits
_ANIMATED = frozenset({"GIF", "WEBP", "PNG"})  # more frames of others are pages and previews
# Nearly transparent compression: the noise is gone, so the file is small all the same.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}

# Compressions of a file that was read which lose, or take bilevel images only.
_TIFF_UNFIT = ("jpeg", "tiff_jpeg", "webp", "tiff_ccitt", "group3", "group4", "tiff_raw_16")

_PHOTOMETRIC_TAG = 262
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
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error
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


def read(
    path: str | os.PathLike[str] | IO[bytes], name: str | None = None, *, animations: bool = True
) -> Image.Image:
    """Read an image file into memory, in one of `MODES`, with its metadata in `info`.

    path: of a file, or a binary file that is open and can be rewound; errors call it `name`.
    animations: whether the first frame of an animated GIF, WebP or PNG is taken for an image.

    Pixels stay as stored: an EXIF orientation is kept as metadata, not applied (but that of TIFF is
    applied, and not kept). Warns when Pillow
    cannot deliver everything: 16-bit colour, and 16-bit grey with alpha, come as 8-bit, and only
    the first frame is read.

    Raises ImageError (not an image, truncated, a directory, too large, unreadable, animated) and
    FileNotFoundError.
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
        reason = "not an image in a format that Pillow knows"
        if (os.path.getsize(source) if isinstance(source, str) else len(_content(source))) == 0:
            reason = "the file is empty"
        raise ImageError(f"{name}: {reason}") from None
    except Image.DecompressionBombError:
        limit = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
        raise ImageError(
            f"{name}: too large: {limit}, which PIL.Image.MAX_IMAGE_PIXELS sets against "
            "decompression bombs"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a header broken in the middle raises as decoders do
        raise ImageError(f"{name}: cannot be read ({_reason(error)})") from error
    with opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and not animations and opened.format in _ANIMATED:
            raise ImageError(f"{name}: an animation of {frames} frames, not an image")
        if frames > 1:
            warnings.warn(f"{name}: only the first of its {frames} frames is read", stacklevel=2)
        layouts = [str(tile[3]) for tile in opened.tile]
        grey = any("LA;16" in layout for layout in layouts)  # which Pillow turns into RGBA
        if any(";16" in layout for layout in layouts) and not opened.mode.startswith("I"):
            kind = "grey with alpha" if grey else "colour"
            warnings.warn(f"{name}: 16-bit {kind} is read as 8-bit", stacklevel=2)
        more: dict[str, Any] = tiff_exif(opened, name)
        if opened.format == "WEBP" and _is_lossless_webp(source):
            more["lossless"] = True
        image = load(opened, name)
        info = image.info | more
        if grey:
            image = Image.merge("LA", (image.getchannel(0), image.getchannel(3)))
        if image.mode.startswith("I;16") and _white_is_zero(opened):
            image = _inverted(image)
        # A copy has no file behind it, so it outlives `with`.
        image = image.copy() if image is opened else image
        image.info = info
        image.format = opened.format
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


def stripped(image: Image.Image) -> Image.Image:
    """An image without its metadata, turned as its EXIF orientation says.

    What stays in `info` is how its file was compressed.
    """
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
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(_content(source)) as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, size = head[:4], int.from_bytes(head[4:], "little")
            if kind in (b"VP8 ", b"VP8L"):
                return kind == b"VP8L"
            file.seek(16 if kind == b"ANMF" else size + size % 2, os.SEEK_CUR)
    return False


def _content(file: IO[bytes]) -> bytes:
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def output_format(path: str | os.PathLike[str]) -> str | None:
    """The Pillow format in which the suffix says to write, or None where there is none."""
    return _FORMATS.get(os.path.splitext(path)[1].lower())


def encode(image: Image.Image, file_format: str | None) -> bytes:
    """An image as the content of a file, as `write` writes it.

    In `file_format` if that stores what was denoised, this mode and size; otherwise in PNG or TIFF.
    """
    kind = "JPEG" if file_format == "MPO" else file_format
    formats = set(_FORMATS.values())
    if kind not in formats or not _stores(kind, image.mode) or not _holds(kind, image.size):
        kind = "PNG" if _stores("PNG", image.mode) else "TIFF"
    file = io.BytesIO()
    _save(image, file, kind, "image")
    return file.getvalue()


def _stores(file_format: str, mode: str) -> bool:
    allowed = _FORMAT_MODES.get(file_format)
    return allowed is None or mode in allowed


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
        other = ".png or .tif" if mode in _FORMAT_MODES["PNG"] else ".tif"
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


def write(image: Image.Image, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an image, with the metadata in `image.info`, in one atomic step.

    EXIF, XMP, ICC profile and DPI, the text of PNG and the comment of JPEG are written where the
    format has a place for them.

    The file appears under its name only when complete: it is written under a temporary name in
    the same folder, then renamed. The suffix chooses the format; JPEG is written at quality 95
    without chroma subsampling; WebP without loss if it was read from such a file. An image of mode
    I becomes a PNG file of 16 bits.

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


def _save(image: Image.Image, file: IO[bytes], file_format: str, name: str) -> None:
    options = _options(image.info, file_format, name)
    if image.mode == "I" and file_format == "PNG":
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            span = f"{pixels.min()}..{pixels.max()}"
            raise ImageError(f"{name}: PNG cannot store values {span}; try .tif")
        image = Image.fromarray(pixels.astype(np.uint16))
    image.save(file, format=file_format, **options)


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
