from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from xunit_rs import _compare, denoise, images
from xunit_rs.denoise import DEFAULT_MODEL, Denoiser, find_weights, pretrained_names

RNG = np.random.default_rng(0)
DTYPES = ["uint8", "uint16", "float16", "float32", "float64"]


class FakeNetwork:
    """Adds a constant: shows scaling, order of channels and layout without any weights."""

    def __init__(self, channels: int = 1, shift: float = 0.0) -> None:
        self.channels, self.shift = channels, shift
        self.calls: list[tuple[npt.NDArray[np.float32], int, int]] = []

    def denoise(
        self, image: npt.NDArray[np.float32], tile: int, threads: int
    ) -> npt.NDArray[np.float32]:
        assert image.dtype == np.float32 and image.ndim == 3
        assert image.flags.c_contiguous and image.flags.aligned and image.dtype.isnative
        assert image.shape[0] == self.channels
        self.calls.append((image.copy(), tile, threads))
        shifted: npt.NDArray[np.float32] = image + np.float32(self.shift)
        return shifted


def random_image(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    kind = np.dtype(dtype)
    if kind.kind == "u":
        return RNG.integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
    return RNG.random(shape).astype(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        *(((5, 7), 1), ((5, 7, 1), 1), ((5, 7, 2), 1), ((5, 7, 3), 1), ((5, 7, 4), 1), ((1, 1), 1)),
        *(((5, 7, 3), 3), ((5, 7, 4), 3), ((1, 1, 3), 3)),
    ],
)
def test_identity_network_gives_the_image_back(
    dtype: str, shape: tuple[int, ...], channels: int
) -> None:
    image = random_image(shape, dtype)
    before = image.copy()
    result = Denoiser(FakeNetwork(channels))(image)
    assert result.dtype == image.dtype and result.shape == image.shape
    assert result is not image and not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, before)
    if image.dtype.kind == "u":
        np.testing.assert_array_equal(result, image)
    else:
        np.testing.assert_allclose(result, image, atol=1e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_is_untouched_and_the_rest_is_not(dtype: str) -> None:
    for count in (2, 4):
        image = random_image((5, 7, count), dtype)
        result = Denoiser(FakeNetwork(shift=-0.3))(image)
        np.testing.assert_array_equal(result[..., -1], image[..., -1])
        assert (result[..., 0] != image[..., 0]).any()


def test_integers_are_clipped_and_rounded_floats_are_not() -> None:
    image = np.array([[0, 100, 250]], np.uint8)
    np.testing.assert_array_equal(Denoiser(FakeNetwork(shift=10.4 / 255))(image), [[10, 110, 255]])
    np.testing.assert_array_equal(Denoiser(FakeNetwork(shift=-10.6 / 255))(image), [[0, 89, 239]])
    floats = np.array([[-0.4, 0.5, 1.5]], np.float32)
    np.testing.assert_allclose(Denoiser(FakeNetwork(shift=0.25))(floats), floats + 0.25)


def test_the_grey_network_sees_the_noise_of_colour_at_its_own_level() -> None:
    sigma = 0.1
    image = (0.5 + sigma * RNG.standard_normal((200, 200, 3))).astype(np.float32)
    network = FakeNetwork()
    Denoiser(network)(image)
    seen = np.stack([call[0].ravel() for call in network.calls])
    assert seen.shape == (3, 200 * 200)
    np.testing.assert_allclose(seen.mean(axis=1), 0.5, atol=0.005)
    covariance = np.cov(seen)  # of the same strength in each plane, and independent
    np.testing.assert_allclose(covariance, sigma**2 * np.eye(3), atol=0.02 * sigma**2)


def test_chroma_is_denoised_and_grey_stays_grey() -> None:
    class Mean(FakeNetwork):
        def denoise(self, image: Any, tile: int, threads: int) -> Any:
            super().denoise(image, tile, threads)
            return np.full_like(image, image.mean())

    colour = RNG.random((9, 8, 3))
    expected = np.broadcast_to(colour.mean((0, 1)), colour.shape)
    np.testing.assert_allclose(Denoiser(Mean())(colour), expected, atol=1e-6)
    # A network that keeps 0.5, which is all that chroma holds in a grey image.
    halved = Denoiser(Contrast())(np.repeat(RNG.random((9, 8, 1)), 3, axis=2))
    assert np.ptp(halved, axis=2).max() < 1e-6


class Contrast(FakeNetwork):
    """Halves the contrast: what comes out shows which value a plane is centred on."""

    def denoise(self, image: Any, tile: int, threads: int) -> Any:
        return 0.5 + 0.5 * (super().denoise(image, tile, threads) - 0.5)


def test_the_colour_transform_is_undone() -> None:
    image = RNG.random((5, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(Denoiser(Contrast())(image), 0.25 + image / 2, atol=1e-6)


def layouts(image: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    field = np.zeros(image.shape, np.dtype([("pad", "u1"), ("v", image.dtype)]))
    field["v"] = image
    raw = np.zeros(image.nbytes + 1, np.uint8)[1:].view(image.dtype).reshape(image.shape)
    raw[...] = image
    wide = np.zeros((image.shape[0] * 2, *image.shape[1:]), image.dtype)
    wide[::2] = image
    read_only = image.copy()
    read_only.flags.writeable = False
    return {
        "fortran": np.asfortranarray(image),
        "negative": np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1],
        "strided": wide[::2],
        "swapped": image.astype(image.dtype.newbyteorder()),
        "misaligned": raw,
        "record field": field["v"],
        "read-only": read_only,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 4)])
def test_memory_layout_does_not_matter(dtype: str, shape: tuple[int, ...]) -> None:
    image = random_image(shape, dtype)
    denoiser = Denoiser(FakeNetwork(shift=-0.1))
    expected = denoiser(image)
    for name, view in layouts(image).items():
        result = denoiser(view)
        assert result.dtype == view.dtype, name
        np.testing.assert_array_equal(result, expected, err_msg=name)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int16", "int32", "int64", "uint32", "complex64", "object", "U1"]
)
def test_other_dtypes_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(TypeError, match=str(np.dtype(dtype)).replace("<", "")):
        Denoiser(FakeNetwork())(np.zeros((4, 4), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0), (4, 4, 0), (4, 4, 5), (1, 4, 4, 1)])
def test_shapes_that_are_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Denoiser(FakeNetwork())(np.zeros(shape, np.float32))


def test_values_that_are_no_image() -> None:
    denoiser = Denoiser(FakeNetwork())
    image = np.zeros((4, 4), np.float32)
    image[0, 0], image[1, 1], image[2, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="3 non-finite"):
        denoiser(image)
    with pytest.raises(ValueError, match="divide a 0-255 image by 255"):
        denoiser(np.full((4, 4), 200.0))
    with pytest.raises(ValueError, match="scale"):
        denoiser(np.full((4, 4), -200.0))
    denoiser(RNG.normal(0.5, 1.0, (64, 64)))  # noise of sigma 255 is an image all the same
    for wrong in (None, 3, [[0.0]], np.ma.zeros((4, 4)), memoryview(b"ab")):
        with pytest.raises(TypeError):
            denoiser(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_of_broken_weights_makes_no_picture(tmp_path: Path, value: float) -> None:
    tensors = random_network("xdncnn-2021")
    tensors["tail.weight"][0, 0, 0, 0] = value
    path = tmp_path / "broken.safetensors"
    write_safetensors(path, tensors, {"format": "xunit-rs", "architecture": "xdncnn-2021"})
    for image in (random_image((8, 9), "uint8"), random_image((8, 9, 3), "float32")):
        with pytest.raises(ValueError, match="not finite"):
            Denoiser.from_pretrained(path)(image)


def test_tile_and_threads_reach_the_network() -> None:
    network = FakeNetwork()
    denoiser = Denoiser(network, tile=64, threads=2)
    image = np.zeros((3, 3), np.uint8)
    denoiser(image)
    denoiser(image, tile=0, threads=1)
    Denoiser(network)(image)
    assert [call[1:] for call in network.calls] == [(64, 2), (0, 1), (0, 0)]
    with pytest.raises(ValueError, match="tile must be 0 or more, got -1"):
        denoiser(image, tile=-1)
    with pytest.raises(TypeError, match=r"threads must be an integer, got 1\.5"):
        Denoiser(network, threads=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"])
def test_pil_images_keep_mode_and_info(mode: str) -> None:
    if mode == "I":
        image = Image.fromarray(random_image((6, 5), "uint16").astype(np.int32))
    elif mode.startswith("I;16"):
        data = random_image((6, 5), "uint16").astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (5, 6), data.tobytes())
    elif mode == "F":
        image = Image.fromarray(random_image((6, 5), "float32"))
    else:
        count = len(Image.new(mode, (1, 1)).getbands())
        image = Image.fromarray(random_image((6, 5, count), "uint8").squeeze())
    image.info["dpi"] = (300, 300)
    before = np.asarray(image).copy()
    result = Denoiser(FakeNetwork())(image)
    assert (result.mode, result.size, result.info) == (mode, (5, 6), {"dpi": (300, 300)})
    np.testing.assert_allclose(np.asarray(result), before, atol=1e-6)


def test_pil_modes_beyond_those() -> None:
    denoiser = Denoiser(FakeNetwork())
    assert denoiser(Image.new("P", (3, 3))).mode == "RGB"
    assert denoiser(Image.new("1", (3, 3))).mode == "L"
    with pytest.raises(ValueError, match="CMYK"):
        denoiser(Image.new("CMYK", (3, 3)))
    with pytest.raises(ValueError, match=r"0\.\.65535, got 0\.\.70000"):
        denoiser(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ValueError, match="empty"):
        denoiser(Image.new("L", (0, 4)))


def test_a_path_gives_a_pil_image(tmp_path: Path) -> None:
    image = random_image((6, 5, 4), "uint8")
    Image.fromarray(image).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(Denoiser(FakeNetwork())(path)), image)


def test_names_and_paths_of_models(tmp_path: Path) -> None:
    for name in ("a.pkl", "a.pt", "A.PTH"):
        with pytest.raises(ValueError, match="xunit-rs convert"):
            Denoiser.from_pretrained(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        Denoiser.from_pretrained(tmp_path / "a.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="not a regular file"):
        Denoiser.from_pretrained(tmp_path / "dir.safetensors")
    for name in ("nobody", "nobody/at/home", "", "."):
        with pytest.raises(ValueError, match=f"unknown model '{name}'"):
            Denoiser.from_pretrained(name)


def test_names_come_from_the_folder_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoise, "_weights_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="nor one of: none"):
        find_weights(DEFAULT_MODEL)
    for name in (f"{DEFAULT_MODEL}.safetensors", "b.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    assert pretrained_names() == ["b", DEFAULT_MODEL]
    assert find_weights(DEFAULT_MODEL) == tmp_path / "gray-sigma25.safetensors"
    with pytest.raises(ValueError, match="nor one of: b, gray-sigma25"):
        find_weights("c")


# Real networks: tiny, random, and checked against a definition in plain numpy.

EPS = 1e-5


def random_network(architecture: str, channels: int = 1) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(3)
    tensors: dict[str, npt.NDArray[Any]] = {}
    width, kernel, depth = 6, (9 if architecture == "xdncnn-2018" else 7), 2

    def conv(key: str, out: int, per_group: int, k: int, scale: float = 1.0) -> None:
        bound = scale / np.sqrt(per_group * k * k)
        tensors[f"{key}.weight"] = rng.normal(0, bound, (out, per_group, k, k))
        tensors[f"{key}.bias"] = rng.normal(0, 0.1 * scale, out)

    def norm(key: str, count: int) -> None:
        tensors[f"{key}.weight"] = rng.uniform(0.5, 1.5, count)
        tensors[f"{key}.bias"] = rng.normal(0, 0.2, count)
        tensors[f"{key}.running_mean"] = rng.normal(0, 0.2, count)
        tensors[f"{key}.running_var"] = rng.uniform(0.5, 1.5, count)
        tensors[f"{key}.num_batches_tracked"] = np.array(5, np.int64)

    for i in range(depth):
        inside = width if i else channels
        if i or architecture == "xdncnn-2021":
            norm(f"blocks.{i}.norm", inside)
        conv(f"blocks.{i}.conv", width, inside, 3)
        unit = f"blocks.{i}.xunit.features"
        if architecture == "xdncnn-2018":
            norm(f"{unit}.0", width)
            conv(f"{unit}.2", width, 1, kernel)
            norm(f"{unit}.3", width)
        else:
            conv(f"{unit}.0", width, 1, kernel)
            norm(f"{unit}.1", width)
    conv("tail", channels, width, 3 if architecture == "xdncnn-2018" else 5, 0.2)
    return {k: v if v.dtype == np.int64 else v.astype(np.float32) for k, v in tensors.items()}


def write_safetensors(
    path: Path, tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for key, value in tensors.items():
        start, data = len(data), data + value.tobytes()
        kind = {"float32": "F32", "int64": "I64"}[value.dtype.name]
        header[key] = {"dtype": kind, "shape": value.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def save_network(path: Path, architecture: str, channels: int = 1) -> dict[str, Any]:
    tensors = random_network(architecture, channels)
    metadata = {
        "format": "xunit-rs",
        "architecture": architecture,
        "channels": str(channels),
        "features": "6",
        "depth": "2",
        "kernel_size": "9" if architecture == "xdncnn-2018" else "7",
        "gate": "gaussian" if architecture == "xdncnn-2018" else "sigmoid",
        "sigma": "25",
    }
    write_safetensors(path, tensors, metadata)
    return tensors


def run_network(architecture: str, tensors: dict[str, Any], image: Any) -> Any:
    """The network in float64, one numpy expression per layer."""
    t = {key: value.astype(np.float64) for key, value in tensors.items()}

    def conv(key: str, x: Any) -> Any:
        weight, bias = t[f"{key}.weight"], t[f"{key}.bias"]
        r = weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (r, r), (r, r)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
        if weight.shape[1] == 1 and x.shape[0] == weight.shape[0] > 1:
            out = np.einsum("chwij,cij->chw", windows, weight[:, 0])
        else:
            out = np.einsum("chwij,ocij->ohw", windows, weight)
        return out + bias[:, None, None]

    def norm(key: str, x: Any) -> Any:
        mean, var, weight, bias = (
            t[f"{key}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + EPS) * weight + bias

    x = image.astype(np.float64)
    for i in range(2):
        if f"blocks.{i}.norm.weight" in t:
            x = norm(f"blocks.{i}.norm", x)
        x = conv(f"blocks.{i}.conv", x)
        unit = f"blocks.{i}.xunit.features"
        if architecture == "xdncnn-2018":
            d = norm(f"{unit}.3", conv(f"{unit}.2", np.maximum(norm(f"{unit}.0", x), 0)))
            x = x * np.exp(-d * d)
        else:
            x = x / (1 + np.exp(-norm(f"{unit}.1", conv(f"{unit}.0", x))))
    tail = conv("tail", x)
    return image - tail if architecture == "xdncnn-2018" else image + tail


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("architecture", ["xdncnn-2018", "xdncnn-2021"])
def test_real_network(tmp_path: Path, architecture: str, channels: int) -> None:
    path = tmp_path / "tiny.safetensors"
    tensors = save_network(path, architecture, channels)
    denoiser = Denoiser.from_pretrained(path)
    assert architecture in repr(denoiser)
    shape = (37, 45) if channels == 1 else (37, 45, 3)
    image = RNG.random(shape).astype(np.float32)
    result = denoiser(image)
    planes = np.moveaxis(np.atleast_3d(image), 2, 0)
    expected = np.moveaxis(run_network(architecture, tensors, planes), 0, 2).reshape(shape)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    # Not only close: tiles and threads change no bit that a user could notice.
    np.testing.assert_allclose(denoiser(image, tile=16), result, atol=1e-6)
    np.testing.assert_array_equal(denoiser(image, threads=1), denoiser(image, threads=2))
    assert denoiser(np.zeros((1, 1, *shape[2:]), np.uint8)).shape == (1, 1, *shape[2:])


def test_noise_is_removed_from_grey_and_colour(tmp_path: Path) -> None:
    # A hand-made network whose output is the 5x5 mean: x + tail(2 (x · sigmoid(0))) = mean(x).
    tensors = random_network("xdncnn-2021")
    for key, value in tensors.items():
        value[...] = 1 - EPS if key.endswith("running_var") else "norm.weight" in key
    for i in range(2):
        tensors[f"blocks.{i}.conv.weight"][0, 0, 1, 1] = 2  # undoes the gate's half
    tensors["tail.weight"][0, 0] = 1 / 25
    tensors["tail.weight"][0, 0, 2, 2] -= 1
    path = tmp_path / "mean.safetensors"
    write_safetensors(path, tensors, {"format": "xunit-rs", "architecture": "xdncnn-2021"})
    removes_noise(Denoiser.from_pretrained(path), 8)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2)])
def test_grey_needs_a_network_for_grey(shape: tuple[int, ...]) -> None:
    network = FakeNetwork(channels=3)
    with pytest.raises(ValueError, match=r"grey image.*channels=3.*gray-blind"):
        Denoiser(network)(np.zeros(shape, np.uint8))
    assert not network.calls


def test_networks_of_the_package_remove_noise() -> None:
    names = pretrained_names()
    assert names
    for name in names:
        removes_noise(Denoiser.from_pretrained(name), 7)


def removes_noise(denoiser: Denoiser, gain: float) -> None:
    y, x = np.mgrid[0:96, 0:96] / 96
    clean = np.stack([0.5 + 0.3 * np.sin(5 * x + i) * np.cos(4 * y) for i in range(3)], axis=-1)
    noisy = clean + 25 / 255 * np.random.default_rng(0).standard_normal(clean.shape)

    def psnr(image: Any, reference: Any) -> float:
        inner = (slice(4, -4), slice(4, -4))
        return float(-10 * np.log10(np.mean((image[inner] - reference[inner]) ** 2)))

    assert psnr(denoiser(noisy), clean) > psnr(noisy, clean) + gain
    if denoiser.network.channels == 1:
        grey, clean = noisy[..., 0], clean[..., 0]
        assert psnr(denoiser(grey), clean) > psnr(grey, clean) + gain


def test_denoising_imports_no_torch() -> None:
    code = (
        "import sys, xunit_rs, xunit_rs.cli, xunit_rs.denoise, xunit_rs.images\n"
        "xunit_rs.Denoiser\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_strength_blends() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    network = Denoiser.from_pretrained(DEFAULT_MODEL).network
    whole = Denoiser(network)(image).astype(float)
    half = Denoiser(network, strength=0.5)(image)
    assert np.abs(half - (image + whole) / 2).max() <= 1
    assert np.abs(half.astype(float) - image).max() > 10
    assert np.array_equal(Denoiser(network, strength=0)(image), image)
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"{strength}"):
            Denoiser(network, strength=strength)


def test_progress_goes_from_plane_to_plane() -> None:
    class Telling(FakeNetwork):
        def denoise(self, image: Any, tile: int, threads: int, progress: Any = None) -> Any:
            for share in (0.5, 1.0):
                progress(share)
            return super().denoise(image, tile, threads)

    for shape, expected in (((4, 4), [1 / 2, 1]), ((4, 4, 3), [i / 6 for i in range(1, 7)])):
        told: list[float] = []
        Denoiser(Telling())(RNG.random(shape), progress=told.append)
        np.testing.assert_allclose(told, expected)

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    network = Denoiser.from_pretrained(DEFAULT_MODEL)
    told = []
    network(np.zeros((64, 64), np.uint8), progress=told.append)
    assert told == sorted(told) and told[-1] == 1
    with pytest.raises(KeyboardInterrupt):
        network(np.zeros((64, 64), np.uint8), progress=stop)


def test_equal_planes_are_a_grey_image() -> None:
    grey = RNG.random((6, 5)).astype(np.float32)
    network = FakeNetwork(shift=0.1)
    result = Denoiser(network, strength=0.5)(np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(network.calls[0][0][0], grey)
    assert len(network.calls) == 1
    np.testing.assert_allclose(result, np.stack([grey + 0.05] * 3, axis=-1), atol=1e-6)


def test_compare_shows_before_after_and_difference(tmp_path: Path) -> None:
    noisy = np.clip(128 + 20 * RNG.standard_normal((260, 300)), 0, 255).astype(np.uint8)

    class Flat(FakeNetwork):
        def denoise(self, image: Any, tile: int, threads: int, progress: Any = None) -> Any:
            return np.full_like(image, 128 / 255)

    denoiser = Denoiser(Flat())
    shown = denoiser.compare(noisy)
    assert (shown.mode, shown.size) == ("RGB", (3 * 300 + 16, 260 + 48))
    pixels = np.asarray(shown)[48:]
    np.testing.assert_array_equal(pixels[:, :300, 0], noisy)
    assert (pixels[:, 308:608] == 128).all()
    expected = np.clip(127.5 + 4 * (128.0 - noisy), 0, 255)
    assert np.abs(pixels[:, 616:, 1] - expected).max() <= 1
    assert float(shown.info["sigma before"]) == pytest.approx(20, abs=1)
    assert shown.info["sigma after"] == "0.0"
    assert float(shown.info["rms"]) == pytest.approx(20, abs=1)
    assert (np.asarray(shown)[:48] == 0).any()  # the captions
    Image.fromarray(noisy).save(tmp_path / "a.png")
    wide = noisy.astype(np.uint16) * 257
    for image in (tmp_path / "a.png", Image.fromarray(noisy), wide, noisy / 255):
        assert np.abs(np.asarray(denoiser.compare(image)).astype(int) - np.asarray(shown)).max() < 2


def test_compare_turns_photos_upright() -> None:
    denoiser = Denoiser(FakeNetwork(shift=0.1))
    photo = Image.fromarray(random_image((260, 300, 3), "uint8"))
    upright = np.asarray(denoiser.compare(photo.transpose(Image.Transpose.ROTATE_270)))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.info["exif"] = exif.tobytes()
    np.testing.assert_array_equal(np.asarray(denoiser.compare(photo)), upright)
    deep = images.DeepImage(np.asarray(photo).astype(np.uint16) * 257, dict(photo.info))
    difference = np.asarray(denoiser.compare(deep)).astype(int) - upright
    assert np.abs(difference[48:]).max() < 2


def test_compare_of_a_large_image_takes_little_memory() -> None:
    noisy, clean = RNG.random((2000, 2000), np.float32), RNG.random((2000, 2000), np.float32)
    tracemalloc.start()
    shown = _compare.sheet(noisy, clean, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * noisy.nbytes
    assert float(shown.info["rms"]) == pytest.approx(
        255 * np.sqrt(np.square(clean - noisy).mean()), abs=0.05
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
def test_an_image_beyond_the_modes_of_pil_keeps_its_kind(tmp_path: Path, dtype: str) -> None:
    values = random_image((6, 5, 4), dtype)
    image = images.DeepImage(values, {"dpi": (300, 300)}, "TIFF")
    image.save(tmp_path / "a.tif")
    for source in (image, tmp_path / "a.tif", str(tmp_path / "a.tif")):
        result = Denoiser(FakeNetwork(shift=0.25))(source)
        assert isinstance(result, images.DeepImage)
        assert (result.mode, result.size) == (image.mode, (5, 6))
        assert result.info["dpi"] == (300, 300)
        expected = Denoiser(FakeNetwork(shift=0.25))(values)
        assert result.pixels.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(result.pixels[..., 3], values[..., 3])
        assert (result.pixels[..., :3] != values[..., :3]).any()
    assert repr(image) == f"<DeepImage {image.mode} 5x6>"


@pytest.mark.parametrize("shape", [(1, 1), (2, 900), (5, 7, 4), (900, 850, 3), (6, 5, 2)])
def test_compare_of_any_size(shape: tuple[int, ...]) -> None:
    shown = Denoiser(FakeNetwork(shift=0.1)).compare(random_image(shape, "uint8"))
    columns, rows = min(shape[1], 800), min(shape[0], 800)
    zoom = max(1, -(-240 // columns))
    assert shown.size == (3 * zoom * columns + 16, zoom * rows + 48)
    assert (shown.info["sigma before"] == "unknown") == (min(shape[:2]) < 3)
    with pytest.raises(TypeError, match="list"):
        Denoiser(FakeNetwork()).compare([[0.0]])
