"""Denoising of arrays, PIL images and files with a trained network. Needs no PyTorch."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import images

__all__ = [
    "DEFAULT_MODEL",
    "Denoiser",
    "check_values",
    "find_weights",
    "integer_scale",
    "pretrained_names",
]

DEFAULT_MODEL = "gray-sigma25"

# Further than this outside [0, 1] a float image is on the 0-255 scale: noise of deviation 255/255
# reaches 5.5 in ten megapixels.
_MARGIN = 7.0

_INTEGER_SCALE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
_FLOATS = frozenset(np.dtype(t) for t in (np.float16, np.float32, np.float64))

# Luminance and two opponent colours, as in C-BM3D (Dabov et al., ICIP 2007), scaled to unit rows:
# an orthogonal matrix, so that white noise keeps its strength and stays independent in each plane.
# With the official 2018 network it gives 1.4 dB more than denoising R, G and B, and 0.36 dB more
# than the planes of YCbCr (CBSD68, sigma 25; ahead on each of six images).
_OPPONENT: npt.NDArray[np.float32] = np.array(
    [
        np.array([1, 1, 1]) / np.sqrt(3),
        np.array([1, 0, -1]) / np.sqrt(2),
        np.array([1, -2, 1]) / np.sqrt(6),
    ],
    np.float32,
)

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[float], object]


class Network(Protocol):
    """What a Denoiser needs of a network; `xunit_rs._core.Network` is one."""

    @property
    def channels(self) -> int: ...

    def denoise(
        self,
        image: FloatArray,
        tile: int,
        threads: int,
        progress: Progress | None = None,
    ) -> FloatArray: ...


def _weights_folder() -> Path:
    return Path(__file__).parent / "weights"


def pretrained_names() -> list[str]:
    """Names of the networks that come with the package, for `Denoiser.from_pretrained`."""
    return sorted(path.stem for path in _weights_folder().glob("*.safetensors"))


class Denoiser:
    """Removes white Gaussian noise of the strength its network was trained for.

    denoiser(image) takes, and gives back in the same kind,

    - a numpy array HxW or HxWxC, C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of
      dtype uint8, uint16 or float16/32/64 in [0, 1], in any memory layout: same shape and dtype;
    - a PIL image: same size and mode (palette and bilevel images come back as RGB, RGBA, LA or L);
    - a path: a PIL image, or an `images.DeepImage` where Pillow has no mode for the file's depth:
      PNG and TIFF of 16-bit colour, TIFF of float colour. Both have `info` and `save`, and become
      arrays by `numpy.asarray`.

    The network computes in float32. Integer results are clipped and rounded; float ones are not
    clipped, and neither are their inputs: noise may exceed [0, 1]. Alpha is passed on untouched.

    Colour with a network of one channel: about grey, RGB is turned into luminance and two
    opponent colours by an orthogonal matrix A, which leaves the deviation of white noise as it
    is; each plane is denoised, and rgb = 0.5 + Aᵀ (net(0.5 + A (rgb - 0.5)) - 0.5). RGB of three
    equal planes is denoised as the grey image it is. Grey with a
    network of three channels is refused: such a network takes noise that is alike in all three
    for part of the picture (1 dB gained where a grey network gains 7).

    network: an `xunit_rs._core.Network`, or any object with `channels` and
        `denoise(image, tile, threads)`, and a fourth argument where progress is asked for.
    tile: height in pixels of the bands that an image is cut into; 0 = as high as fit 256 MB. A band
        streams through the network. The result is the same, bit for bit.
        Up to 128 MB of them are kept for the next image.
    threads: number of threads; 0 = default.
    strength: share of the noise to take away, 0 to 1: image + strength · (network(image) - image).
    """

    def __init__(
        self,
        network: Network,
        *,
        tile: int = 0,
        threads: int = 0,
        strength: float = 1.0,
    ) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength!r}")
        self.network = network
        self.strength = strength
        self.tile = _count("tile", tile)
        self.threads = _count("threads", threads)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        tile: int = 0,
        threads: int = 0,
        strength: float = 1.0,
    ) -> Denoiser:
        """Load a network by the name of one that comes with the package, or from a file.

        Raises ValueError for an unknown name, a file that is not safetensors or not such a
        network; FileNotFoundError for a missing file.
        """
        path = find_weights(name_or_path)
        from ._core import Network as CoreNetwork

        network = cast(Network, CoreNetwork.load(str(path)))
        return cls(network, tile=tile, threads=threads, strength=strength)

    def __call__(
        self,
        image: Any,
        *,
        tile: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Denoise an array, a PIL image or an image file; see the class. Arguments override it.

        progress: now and then called with the share of the work that is done, 0 to 1; what it
            raises ends the work.

        Raises TypeError for a dtype or an object that is no image; ValueError for a shape that is
        none, for NaN or infinity, in the image or in what a broken network makes of it, and for a
        float image on the 0-255 scale; ImageError (a ValueError) for a file that cannot be read.
        """
        tile = self.tile if tile is None else _count("tile", tile)
        threads = self.threads if threads is None else _count("threads", threads)
        if isinstance(image, np.ndarray):
            return self._denoise_array(image, tile, threads, progress)
        if isinstance(image, (str, os.PathLike)):
            image = images.read(image, deep=True)
        if isinstance(image, Image.Image):
            return self._denoise_pil(image, tile, threads, progress)
        if isinstance(image, images.DeepImage):
            clean = self._denoise_array(image.pixels, tile, threads, progress)
            return images.DeepImage(clean, dict(image.info))
        raise TypeError(
            "image must be a numpy array, a PIL image or a path, not "
            f"{type(image).__module__}.{type(image).__qualname__}"
        )

    def compare(self, image: Any, *, progress: Progress | None = None) -> Image.Image:
        """Show an image, the image denoised and their difference (×4, about grey) side by side.

        Above them stand the size, the noise before and after by `noise.estimate_sigma` and the
        root mean square of the difference, on the scale 0-255; they are in `info`, too. Panels
        are at full size, of the middle 800×800 pixels at most, turned as the EXIF orientation says.

        image, progress: as for calling the denoiser, which see for what it raises, too.

        Returns a PIL image of mode RGB.
        """
        from ._compare import sheet

        if isinstance(image, (str, os.PathLike)):
            image = images.read(image, deep=True)
        clean = self(image, progress=progress)
        if isinstance(image, (Image.Image, images.DeepImage)):
            return _sheet_of_images(image, clean)
        return sheet(image, clean, integer_scale(image))

    def __repr__(self) -> str:
        architecture = getattr(self.network, "architecture", type(self.network).__name__)
        return f"Denoiser({architecture}, channels={self.network.channels})"

    def _denoise_pil(
        self, image: Image.Image, tile: int, threads: int, progress: Progress | None
    ) -> Image.Image:
        exif = images.tiff_exif(image)
        loaded = images.load(image)
        mode = loaded.mode
        clean = self._denoise_array(images.pixels(loaded), tile, threads, progress)
        clean = clean.astype(np.int32) if mode == "I" else clean
        if mode.startswith("I;16"):
            data = clean.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
            result = Image.frombytes(mode, loaded.size, data)
        else:
            result = Image.fromarray(clean)
        result.info = {k: v for k, v in loaded.info.items() if k != "transparency"}
        result.info.update(exif)
        return result

    def _denoise_array(
        self, image: npt.NDArray[Any], tile: int, threads: int, progress: Progress | None
    ) -> npt.NDArray[Any]:
        dtype = _check_array(image)
        planes = image[:, :, None] if image.ndim == 2 else image
        count, channels = planes.shape[2], self.network.channels
        if count == channels:
            colours = count
        elif count in (1, 2, 3, 4):
            colours = 1 if count <= 2 else 3
        else:
            raise ValueError(
                f"image must have 1 to 4 channels (HxW or HxWxC), got shape {image.shape}"
            )
        check_values(planes[:, :, :colours])

        # The copy settles layout, alignment and byte order.
        source = np.moveaxis(planes[:, :, :colours], 2, 0).astype(np.float32, order="C")
        scale = _INTEGER_SCALE.get(dtype)
        if scale is not None:
            source /= np.float32(scale)
        with np.errstate(invalid="ignore", over="ignore"):
            clean = self._run(source, tile, threads, progress)
        if self.strength != 1:
            clean = source + np.float32(self.strength) * (clean - source)
        if not np.isfinite(clean).all():
            raise ValueError(f"{self!r} gives values that are not finite: are its weights sound?")
        if scale is not None:
            # In place: of 100 megapixels each copy takes 400 MB.
            clean = np.clip(clean, 0.0, 1.0, out=source)
            clean *= np.float32(scale)
            np.rint(clean, out=clean)

        result = np.empty(planes.shape, image.dtype)
        result[:, :, :colours] = np.moveaxis(clean, 0, 2)
        result[:, :, colours:] = planes[:, :, colours:]
        return result.reshape(image.shape)

    def _run(
        self, source: FloatArray, tile: int, threads: int, progress: Progress | None
    ) -> FloatArray:
        """Match the planes of one image, (C,H,W) in [0, 1], to the channels of the network."""
        channels, colours = self.network.channels, source.shape[0]

        def run(planes: FloatArray, turn: int = 0, turns: int = 1) -> FloatArray:
            if progress is None:  # of which a network need not know
                return self.network.denoise(planes, tile, threads)
            tell = progress
            return self.network.denoise(
                planes, tile, threads, lambda share: tell((turn + share) / turns)
            )

        if colours == channels:
            return run(source)
        if colours == 3 and channels == 1:
            if all(np.array_equal(source[0], source[i]) for i in (1, 2)):
                return np.broadcast_to(run(source[:1]), source.shape)
            seen = _rotate(_OPPONENT, source)
            planes = [run(seen[i : i + 1], i, 3) for i in range(3)]
            return _rotate(_OPPONENT.T, np.concatenate(planes))
        if colours == 1:
            raise ValueError(
                f"a grey image, and {self!r} is for colour: 'gray-blind' is for such images"
            )
        raise ValueError(f"a network of {channels} channels cannot denoise {colours} channels")


def _rotate(matrix: FloatArray, planes: FloatArray) -> FloatArray:
    """Rotate the colours of planes (3,H,W) about mid-grey."""
    half = np.float32(0.5)
    rotated: FloatArray = np.tensordot(matrix, planes - half, axes=1) + half
    return rotated


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """The .safetensors file of a name that comes with the package, or of a path; see Denoiser."""
    text = os.fspath(name_or_path)
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"{text}: a PyTorch checkpoint; first run "
            f"`xunit-rs convert {text} {path.stem}.safetensors`"
        )
    if suffix == ".safetensors":
        if not path.is_file():
            reason = "is not a regular file" if path.exists() else "no such file"
            raise FileNotFoundError(f"{text}: {reason}")
        return path
    if path.name == text and text in pretrained_names():
        return _weights_folder() / f"{text}.safetensors"
    names = ", ".join(pretrained_names()) or "none"
    raise ValueError(f"unknown model {text!r}: not a .safetensors file nor one of: {names}")


def _sheet_of_images(before: Any, after: Any) -> Image.Image:
    """`Denoiser.compare` of a PIL image or DeepImage that was denoised already."""
    from ._compare import sheet

    old, new = (images.pixels(images.stripped(image)) for image in (before, after))
    return sheet(old, new, integer_scale(old))


def integer_scale(image: npt.NDArray[Any]) -> float:
    """The value of white in an array that is an image; raises as `Denoiser` does if it is none."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy array, got {type(image).__qualname__}")
    dtype = _check_array(image)
    if image.ndim == 3 and image.shape[2] > 4:
        raise ValueError(f"image must have 1 to 4 channels (HxW or HxWxC), got shape {image.shape}")
    return _INTEGER_SCALE.get(dtype, 1.0)


def _check_array(image: npt.NDArray[Any]) -> np.dtype[Any]:
    """Return the native dtype of a supported image; raise for its rank, size or dtype."""
    masked = sys.modules.get("numpy.ma")  # whose import takes time, and which makes such arrays
    if masked is not None and isinstance(image, masked.MaskedArray):
        raise TypeError("masked arrays are not supported: fill the mask first")
    dtype: np.dtype[Any] = image.dtype.newbyteorder("=")
    if dtype not in _INTEGER_SCALE and dtype not in _FLOATS:
        raise TypeError(f"image dtype must be uint8, uint16 or float16/32/64, got {image.dtype}")
    if image.ndim not in (2, 3):
        raise ValueError(f"image must be HxW or HxWxC, got shape {image.shape}")
    if image.size == 0:
        raise ValueError(f"image is empty: shape {image.shape}")
    return dtype


def check_values(colours: npt.NDArray[Any]) -> None:
    """Refuse floats that are not finite, or not on the scale [0, 1]."""
    if colours.dtype.kind != "f":
        return
    bad = int(colours.size - np.count_nonzero(np.isfinite(colours)))
    if bad:
        raise ValueError(f"image has {bad} non-finite values (NaN or infinity)")
    low, high = float(colours.min()), float(colours.max())
    if high > 1 + _MARGIN or low < -_MARGIN:
        raise ValueError(
            f"a float image must be on the scale [0, 1], got values {low:g}..{high:g}: "
            "divide a 0-255 image by 255"
        )


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must be 0 or more, got {number}")
    return number
