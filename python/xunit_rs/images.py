"""Reading and writing image files without losing alpha, 16-bit grey, EXIF, ICC profile or DPI."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

__all__ = ["MODES", "ImageError", "check_target", "is_image_name", "load", "read", "write"]

# Modes whose pixels are samples of light (and alpha): those a denoiser can work on.
MODES = frozenset({"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"})

# Suffixes a folder is searched for, and whose format stores what was denoised. GIF is absent from
# the second set: its palette would quantise the result.
TRUE_COLOUR_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".pnm"}
)
SUFFIXES = TRUE_COLOUR_SUFFIXES | {".gif"}

_CARRIED = ("exif", "icc_profile", "dpi")
_FORMAT_MODES = {
    "JPEG": frozenset({"L", "RGB"}),
    "WEBP": frozenset({"L", "LA", "RGB", "RGBA"}),
    "BMP": frozenset({"L", "RGB", "RGBA"}),
    "PNG": frozenset({"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I"}),
    "PPM": frozenset({"L", "RGB", "I;16", "I", "F"}),
}
# Nearly transparent compression: the noise is gone, so the file is small all the same.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}


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


def read(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file into memory, in one of `MODES`, with its EXIF, ICC profile and DPI.

    Pixels stay as stored: an EXIF orientation is kept as metadata, not applied. Warns when Pillow
    cannot deliver everything: 16-bit colour comes as 8-bit, and only the first frame is read.

    Raises ImageError (not an image, truncated, a directory, too large, unreadable) and
    FileNotFoundError.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ImageError(f"{name}: is a directory, not an image file")
    try:
        opened = Image.open(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a format that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large ({error}); see PIL.Image.MAX_IMAGE_PIXELS") from None
    except MemoryError:
        raise
    except Exception as error:  # a header broken in the middle raises as decoders do
        raise ImageError(f"{name}: cannot be read ({_reason(error)})") from error
    with opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1:
            warnings.warn(f"{name}: only the first of its {frames} frames is read", stacklevel=2)
        deep = any(";16" in str(tile[3]) for tile in opened.tile)
        if deep and not opened.mode.startswith("I"):
            warnings.warn(f"{name}: 16-bit colour is read as 8-bit", stacklevel=2)
        image = load(opened, name)
        # A copy has no file behind it, so it outlives `with`.
        return image.copy() if image is opened else image


def check_target(
    path: str | os.PathLike[str], mode: str | None = None, *, overwrite: bool = False
) -> str:
    """Check, before any long work, that an image can be written here; return the Pillow format.

    Raises ImageError: unknown suffix, a format that cannot store `mode`, no such folder, a folder
    or file that is not writable, an existing file while `overwrite` is false.
    """
    name = os.fspath(path)
    suffix = Path(name).suffix.lower()
    file_format = Image.registered_extensions().get(suffix)
    if file_format is None or file_format not in Image.SAVE:
        raise ImageError(f"{name}: cannot write images with suffix {suffix!r}; try .png")
    allowed = _FORMAT_MODES.get(file_format)
    if mode is not None and allowed is not None and mode not in allowed:
        raise ImageError(f"{name}: {file_format} cannot store mode {mode}; try .png or .tif")
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
    """Write an image, with the EXIF, ICC profile and DPI in `image.info`, in one atomic step.

    The file appears under its name only when complete: it is written under a temporary name in
    the same folder, then renamed. The suffix chooses the format; JPEG is written at quality 95
    without chroma subsampling.

    Raises ImageError; see `check_target`.
    """
    name = os.fspath(path)
    file_format = check_target(name, image.mode, overwrite=overwrite)
    target = os.path.realpath(name)  # a symbolic link stays one: its target is replaced
    options = dict(_SAVE_OPTIONS.get(file_format, {}))
    options.update({key: image.info[key] for key in _CARRIED if image.info.get(key)})
    temporary = os.path.join(os.path.dirname(target), f".xunit-rs-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            image.save(file, format=file_format, **options)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            if not overwrite:  # it appeared meanwhile
                raise ImageError(f"{name}: already exists; it is replaced only with overwrite")
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # encoders raise OSError, ValueError, KeyError, struct.error, ...
        raise ImageError(f"{name}: cannot be written ({_reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # gone already, unless something failed
            os.unlink(temporary)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
