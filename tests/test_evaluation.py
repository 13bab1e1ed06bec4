"""PSNR, its protocols, and evaluation of functions, Denoisers and torch modules."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xunit_rs import Denoiser
from xunit_rs.evaluation import (
    BASELINES,
    PUBLISHED,
    Baseline,
    Evaluation,
    Row,
    evaluate,
    psnr,
    ssim,
    table,
    write_csv,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(24, 31), (20, 20)]):
        smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) * 4 + rng.integers(0, 9)
        Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


class _Identity:
    """A network that removes nothing."""

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels
        self.seen: list[tuple[int, ...]] = []

    def denoise(self, image: Any, tile: int, threads: int) -> Any:
        assert image.dtype == np.float32 and image.flags.c_contiguous
        self.seen.append(image.shape)
        return image


def test_psnr_by_hand() -> None:
    a = np.zeros((4, 4), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 1, peak=255) == pytest.approx(20 * math.log10(255))
    # Differences of uint8 do not wrap around.
    assert psnr(a, a + 255, peak=255) == pytest.approx(0)
    assert psnr(np.zeros(8), np.full(8, 0.1)) == pytest.approx(20)
    for wrong in (np.zeros((2, 8)), np.zeros(3)):
        with pytest.raises(ValueError, match="shape"):
            psnr(a, wrong)
    with pytest.raises(ValueError, match="shape"):
        psnr([], [])


def test_kair_protocol_is_its_definition(folder: Path) -> None:
    expected = []
    for path in sorted(folder.glob("*.png")):
        clean = np.asarray(Image.open(path))
        np.random.seed(0)  # noqa: NPY002 - the protocol's own words
        noisy = (clean / 255.0).astype(np.float32)
        noisy += np.random.normal(0, 50 / 255.0, noisy.shape)  # noqa: NPY002
        out = np.uint8((np.clip(noisy, 0, 1) * 255.0).round())
        error = np.mean((out.astype(np.float64) - clean.astype(np.float64)) ** 2)
        expected.append(20 * math.log10(255 / math.sqrt(error)))
    result = evaluate(lambda noisy: noisy, folder, sigma=50)
    assert list(result.per_image) == ["0.png", "1.png"]
    assert list(result.per_image.values()) == pytest.approx(expected, abs=1e-4)
    assert result.psnr == pytest.approx(np.mean(expected), abs=1e-4)
    assert (result.sigma, result.protocol, result.images) == (50.0, "kair", 2)
    assert result.noisy_psnr == pytest.approx(-20 * math.log10(50 / 255), abs=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.psnr = 1.0  # type: ignore[misc]


def test_noise_is_not_clipped_and_results_are(folder: Path) -> None:
    seen = []

    def model(noisy: Any) -> Any:
        seen.append((float(noisy.min()), float(noisy.max()), noisy.dtype))
        return noisy * 100

    evaluate(model, folder, sigma=75)
    assert all(low < 0 and high > 1 and dtype == np.float32 for low, high, dtype in seen)
    # Everything below 0 or above 1 counts as 0 or 1.
    assert (
        evaluate(lambda x: x - 5, folder, 0.0).psnr == evaluate(lambda x: x - 9, folder, 0.0).psnr
    )


def test_without_noise_the_identity_is_perfect(folder: Path) -> None:
    result = evaluate(lambda noisy: noisy, folder, sigma=0)
    assert result.psnr == math.inf and result.noisy_psnr == math.inf


def test_strong_noise_reaches_a_denoiser(folder: Path) -> None:
    network = _Identity()
    strong = evaluate(Denoiser(network), folder, sigma=200)
    assert network.seen == [(1, 24, 31), (1, 20, 20)]
    assert strong.psnr == evaluate(lambda noisy: noisy, folder, sigma=200).psnr


def test_colour_networks_get_colour(folder: Path) -> None:
    network = _Identity(channels=3)
    result = evaluate(Denoiser(network), folder)
    assert network.seen == [(3, 24, 31), (3, 20, 20)]
    assert result.noisy_psnr == pytest.approx(-20 * math.log10(25 / 255), abs=0.5)


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate(lambda noisy: noisy, folder, progress=lambda done, all: told.append((done, all)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_bad_sigma(folder: Path, sigma: float) -> None:
    with pytest.raises(ValueError, match=f"sigma.*{sigma}"):
        evaluate(lambda noisy: noisy, folder, sigma)


def test_bad_input(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="'other'"):
        evaluate(lambda noisy: noisy, folder, protocol="other")
    with pytest.raises(FileNotFoundError, match="missing"):
        evaluate(lambda noisy: noisy, folder / "missing")
    with pytest.raises(OSError, match=r"notes\.txt"):
        evaluate(lambda noisy: noisy, folder / "notes.txt")
    with pytest.raises(ValueError, match="no images"):
        evaluate(lambda noisy: noisy, tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        evaluate(lambda noisy: noisy[:3, :3], folder)
    with pytest.raises(TypeError, match="not 3"):
        evaluate(3, folder)
    (folder / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="broken"):
        evaluate(lambda noisy: noisy, folder)


def test_kair_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from xunit_rs.evaluation import evaluate\n"
        f"print(evaluate(lambda x: x, {str(folder)!r}).images)\n"
        f"try: evaluate(lambda x: x, {str(folder)!r}, protocol='official2018')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2\n") and "pip install" in done.stdout


def test_torch_modules(folder: Path) -> None:
    torch = pytest.importorskip("torch")

    class Half(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            assert x.shape[:2] == (1, 1) and not torch.is_grad_enabled()
            return x / 2

    for protocol in ("kair", "official2018"):
        result = evaluate(Half(), folder, 25, protocol)
        assert result == evaluate(lambda noisy: noisy / 2, folder, 25, protocol)
        assert result.protocol == protocol


def test_torch_modules_are_evaluated_in_evaluation_mode(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.BatchNorm2d(1))
    model.double()[1].eval()
    expected = evaluate(model.eval(), folder)
    model.train()[1].eval()
    flags = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    assert evaluate(model, folder) == expected
    assert [module.training for module in model.modules()] == flags == [True, True, False]
    assert all(map(torch.equal, model.buffers(), buffers))
    model.train()
    assert evaluate(model, folder) == expected
    assert model[1].training and all(map(torch.equal, model.buffers(), buffers))
    (folder / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="broken"):
        evaluate(model, folder)
    assert model[1].training


def test_official2018_protocol_is_its_definition(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    clean = torch.from_numpy(np.array(Image.open(folder / "1.png")))[None, None].float() / 255
    torch.manual_seed(0)
    noisy = clean + torch.randn(clean.shape) * (25 / 255)
    error = (noisy.clamp(0, 1) - clean).square().mean().item()
    before = torch.get_rng_state()
    result = evaluate(lambda noisy: noisy, folder, 25, "official2018")
    assert result.per_image["1.png"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert torch.equal(before, torch.get_rng_state())


def test_official2021_protocol_is_its_definition(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    for name, channels in (("1.png", 1), ("c.png", 3)):
        if channels == 3:
            colour = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
            Image.fromarray(colour).save(folder / "c.png")
        image = np.array(Image.open(folder / name)).astype(np.float64)
        clean = torch.from_numpy(image.reshape(*image.shape[:2], channels)).permute(2, 0, 1)
        torch.manual_seed(0)
        noisy = clean.float() / 255 + torch.randn(clean.shape) * (25 / 255)
        # 8 bits as by torchvision.utils.save_image.
        rounded = noisy.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).double()
        expected = 20 * math.log10(255 / (rounded - clean).square().mean().sqrt().item())

        model = torch.nn.Identity()
        model.channels = channels
        result = evaluate(model, folder, 25, "official2021")
        assert result.per_image[name] == pytest.approx(expected, abs=1e-4)


def test_ssim_by_hand() -> None:
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    a = rng.random((15, 13))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    # Wang et al., equation 13, with Gaussian weights of 11×11 and σ 1.5.
    w = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(w, w) / w.sum() ** 2
    values = []
    for y in range(5, 10):
        for x in range(5, 8):
            p, q = (im[y - 5 : y + 6, x - 5 : x + 6] for im in (a, b))
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
            cov = (w * (p - mp) * (q - mq)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    assert ssim(b, a) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(b * 255, a * 255, peak=255) == pytest.approx(ssim(b, a), abs=1e-9)
    colour = ssim(np.stack([b, a, b], 2), np.stack([a, a, a], 2))
    assert colour == pytest.approx((2 * ssim(b, a) + 1) / 3)
    for wrong in (a[:10], a[:, :12], a.ravel()):
        with pytest.raises(ValueError, match="11×11"):
            ssim(wrong, wrong if wrong.ndim == 2 and len(wrong) == 10 else a)


def test_psnr_is_that_of_scikit_image(folder: Path) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 9, 8, 3))
    assert psnr(b, a) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0))
    result = evaluate(lambda noisy: noisy, folder, 25, with_ssim=True)
    assert list(result.per_image_ssim) == ["0.png", "1.png"]
    assert result.ssim == pytest.approx(np.mean(list(result.per_image_ssim.values())))
    Image.new("L", (10, 12)).save(folder / "small.png")
    with pytest.raises(ValueError, match=r"small\.png.*11×11"):
        evaluate(lambda noisy: noisy, folder, 25, with_ssim=True)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_noise_away(name: str, tmp_path: Path) -> None:
    for module in ("skimage", "pywt", "bm3d"):
        pytest.importorskip(module)
    ramp = np.add.outer(np.arange(32), np.arange(40)) * 3
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp], 2).astype(np.uint8)).save(tmp_path / "c.png")
    result = evaluate(Baseline(name, 25), tmp_path, 25)
    assert min(result.per_image.values()) > result.noisy_psnr + 2
    assert evaluate(Baseline(name, 0), tmp_path, 0).psnr == math.inf
    with pytest.raises(ValueError, match="'bm4d'"):
        Baseline("bm4d", 25)


def test_baselines_get_the_image_as_it_is(folder: Path) -> None:
    Image.new("RGB", (8, 9)).save(folder / "c.png")
    shapes = []

    def model(noisy: Any) -> Any:
        shapes.append(noisy.shape)
        return noisy

    model.channels = None  # type: ignore[attr-defined]
    evaluate(model, folder)
    assert shapes == [(24, 31), (20, 20), (9, 8, 3)]


def test_models_that_enlarge_are_refused(folder: Path) -> None:
    models = pytest.importorskip("torch") and pytest.importorskip("xunit_rs.models")
    with pytest.raises(ValueError, match="XSRGAN enlarges"):
        evaluate(models.XSRGAN(1, 2, 1), folder)


def _row(model: str, data: str, sigma: float, images: int = 68, ssim: float | None = None) -> Row:
    return Row(model, data, Evaluation(29.036, 20.2, images, sigma, "kair", {}, ssim))


def test_table_puts_published_figures_beside_the_result() -> None:
    text = table([_row("gray-sigma25", "bsd68", 25), _row("bm3d", "bsd68", 25, ssim=0.8)])
    first, *lines = text.splitlines()
    assert first == "bsd68, 68 images, sigma 25, protocol kair"
    assert [line.split() for line in lines[1:4]] == [
        ["gray-sigma25", "29.04"],
        ["bm3d", "29.04", "0.8000"],
        ["the", "noisy", "images", "20.20"],
    ]
    published = [p for p in PUBLISHED if p.data == "BSD68"]
    assert len(lines[4:]) == len(published) == 8
    for line, p in zip(lines[4:], published, strict=True):
        assert line.split() == [p.method, f"{p.psnr[25]:.2f}", *p.source.split()]
    # Another number of images, another test set, or noise nobody published: nothing beside it.
    for row in (_row("a", "BSD68", 25, 2), _row("a", "photos", 25), _row("a", "Set12", 33, 12)):
        assert len(table([row]).splitlines()) == 4


def test_published_figures_fall_with_the_noise() -> None:
    assert {p.data: p.images for p in PUBLISHED} == {"BSD68": 68, "Set12": 12, "CBSD68": 68}
    for published in PUBLISHED:
        assert sorted(published.psnr.values(), reverse=True) == list(published.psnr.values())
    assert len({(p.data, p.method) for p in PUBLISHED}) == len(PUBLISHED)


def test_csv_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    result = Evaluation(30.5, 20.2, 2, 25.0, "kair", {"a, b.png": 30.0, "c.png": 31.0})
    write_csv([Row("m", "d", result)], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == (
        b"model,data,sigma,protocol,image,psnr,ssim\r\n"
        b'm,d,25,kair,"a, b.png",30.0,\r\n'
        b"m,d,25,kair,c.png,31.0,\r\n"
        b"m,d,25,kair,mean,30.5,\r\n"
    )
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(AttributeError):
        write_csv([Row("m", "d", None)], tmp_path / "a.csv")  # type: ignore[arg-type]
    assert (tmp_path / "a.csv").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
