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
from xunit_rs.evaluation import evaluate, psnr


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
