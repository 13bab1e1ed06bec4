"""Training: patches, the loop, its checkpoints and its errors, on tiny networks and images."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from xunit_rs import training  # noqa: E402
from xunit_rs.models import XDnCNN  # noqa: E402
from xunit_rs.training import loop  # noqa: E402
from xunit_rs.training.data import Patches, read_folder  # noqa: E402

TINY: dict[str, Any] = {
    "features": 3,
    "depth": 2,
    "patch_size": 12,
    "batch_size": 4,
    "precision": "float32",
    "threads": 1,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    y, x = np.mgrid[:20, :26]
    for i in range(3):
        pixels = 128 + 100 * np.sin((i + 1) * x / 9) * np.cos(y / 7)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def _log(out: Path, key: str) -> list[Any]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def _stop_after(monkeypatch: pytest.MonkeyPatch, count: int, number: int) -> None:
    """Send a signal to this process while step `count` is being computed."""
    step = loop._Run._train_step

    def stopping(self: Any, rate: float) -> float:
        if self.step + 1 == count:
            os.kill(os.getpid(), number)
        return step(self, rate)

    monkeypatch.setattr(loop._Run, "_train_step", stopping)


def test_batches_depend_on_seed_and_number_alone(data: Path) -> None:
    patches = Patches(data, 12, 1, seed=3)
    first = patches.batch(7, 5, 25.0)
    patches.batch(8, 5, 25.0)
    again = Patches(data, 12, 1, seed=3).batch(7, 5, 25.0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (patches.batch(8, 5, 25.0), Patches(data, 12, 1, seed=4).batch(7, 5, 25.0)):
        assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


def test_batches_are_noise_and_turned_parts_of_the_images(data: Path) -> None:
    clean, noise = Patches(data, 12, 1, seed=0).batch(0, 400, 25.0)
    assert clean.shape == noise.shape == (400, 1, 12, 12)
    assert clean.dtype == noise.dtype == np.float32
    assert noise.std() == pytest.approx(25 / 255, rel=0.02)
    assert abs(noise.mean()) < 2e-3
    views = set()
    for pixels in read_folder(data, 1):
        for top in range(pixels.shape[0] - 11):
            for left in range(pixels.shape[1] - 11):
                part = pixels[top : top + 12, left : left + 12]
                for turn in range(4):
                    views.add(np.rot90(part, turn).tobytes())
                    views.add(np.rot90(part, turn)[:, ::-1].tobytes())
    found = {np.rint(patch * 255).astype(np.uint8).tobytes() for patch in clean[:, 0]}
    assert found <= views and len(found) > 300


def test_patches_as_large_as_an_image(data: Path) -> None:
    Image.new("L", (5, 5)).save(data / "small.png")  # left out
    patches = Patches(data, 20, 3, seed=0)
    assert len(patches.images) == 3
    assert patches.batch(0, 2, 0.0)[0].shape == (2, 3, 20, 20)
    assert not patches.batch(0, 2, 0.0)[1].any()


def test_training_learns(data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training.train(data, out, steps=150, lr=1e-2, val=data, **TINY)
    assert path == out / "xdncnn.safetensors"
    losses = _log(out, "loss")
    assert len(losses) == 3 and losses[-1] < 0.75 * losses[0]
    validations = _log(out, "psnr")
    assert len(validations) == 20 and validations[-1] > validations[0]
    assert validations[-1] > -20 * math.log10(25 / 255) + 1
    model = XDnCNN.from_pretrained(path)
    assert model.features == 3 and len(model.blocks) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "100.0 %" in lines[0] and "150" in lines[0] and "val" in lines[0]


def test_the_result_is_the_average_and_tells_its_recipe(data: Path, out: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = training.train(data, out, steps=20, sigma=30, **TINY)
    state = torch.load(out / "last.pt", weights_only=True)
    saved = XDnCNN.from_pretrained(path).state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())
    assert not torch.equal(saved["tail.weight"], state["model"]["tail.weight"])
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sigma"] == "30"
    assert "20 steps" in metadata["recipe"] and "seed 0" in metadata["recipe"]
    assert metadata["data"].startswith("images (3 images, crc32 ")
    assert str(data.parent) not in metadata["data"]


def test_noise_of_a_range(data: Path, out: Path) -> None:
    patches = Patches(data, 12, 1, 0)
    deviations = patches.batch(0, 400, (10.0, 40.0))[1].std((1, 2, 3)) * 255
    assert 5 < deviations.min() < 15 and 35 < deviations.max() < 50
    assert 22 < deviations.mean() < 28
    path = training.train(data, out, steps=20, sigma=(0, 55), val=data, validations=2, **TINY)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sigma"] == "0-55"
    assert (
        "(sigma 25)" in metadata["validation_psnr"] and "(sigma 50)" in metadata["validation_psnr"]
    )
    assert len(_log(out, "psnr")) == 4
    with pytest.raises(ValueError, match=r"\(40, 10\)"):
        training.train(data, out / "b", steps=1, sigma=(40, 10), **TINY)


def test_colour_starts_from_grey(data: Path, out: Path) -> None:
    grey = XDnCNN("2018", 1, 3, 2).eval()
    colour = XDnCNN("2018", 3, 3, 2).eval()
    grey.save(out.with_suffix(".safetensors"))
    loop._start_from(colour, out.with_suffix(".safetensors"))
    x = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(colour(x.repeat(1, 3, 1, 1)), grey(x).repeat(1, 3, 1, 1))


def test_the_average_of_steady_weights_is_those_weights(data: Path, out: Path) -> None:
    out.mkdir()
    model = XDnCNN("2018", 1, 3, 2)
    run = loop._Run(model, {"lr": 1.0, "ema_decay": 0.5}, Patches(data, 12, 1, 0), out)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    for run.step in range(1, 60):
        run._update_average()
    for value in run.average.state_dict().values():
        torch.testing.assert_close(value, torch.full_like(value, 3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(
    data: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = training.train(data, tmp_path / "whole", steps=60, **TINY)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    random = torch.get_rng_state()
    with monkeypatch.context() as patch:
        _stop_after(patch, 51, number)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
            training.train(data, out, steps=60, **TINY)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    assert stop.type is expected
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert torch.equal(random, torch.get_rng_state())
    assert not (out / "xdncnn.safetensors").exists()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 51

    parts = training.train(data, out, steps=60, resume=True, **TINY)
    a = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    b = torch.load(out / "last.pt", weights_only=True)
    for key in ("model", "average"):
        assert all(torch.equal(b[key][name], value) for name, value in a[key].items())
    for name, value in XDnCNN.from_pretrained(whole).state_dict().items():
        assert torch.equal(XDnCNN.from_pretrained(parts).state_dict()[name], value)
    assert _log(out, "step") == _log(tmp_path / "whole", "step") == [50, 60]


def test_what_was_logged_after_the_checkpoint_is_dropped(data: Path, out: Path) -> None:
    training.train(data, out, steps=10, **TINY)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1}\n{"step": 12, "lo')
    training.train(data, out, steps=10, resume=True, **TINY)
    assert _log(out, "step") == [10]


def test_a_finished_run_can_be_prolonged(data: Path, out: Path) -> None:
    training.train(data, out, steps=10, **TINY)
    training.train(data, out, steps=20, resume=True, **TINY)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize("length", [{"steps": 10}, {"time_budget": 1e-6}])
def test_resumed_without_a_length_it_has_that_of_before(
    data: Path, out: Path, length: dict[str, Any]
) -> None:
    training.train(data, out, **length, **TINY)
    before = torch.load(out / "last.pt", weights_only=True)
    training.train(data, out, resume=True, **TINY)
    after = torch.load(out / "last.pt", weights_only=True)
    assert after["step"] == before["step"] <= 10
    assert after["config"] == before["config"]


def test_a_full_disk_at_the_log_does_not_stop_a_run(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"log\.jsonl.*No space left") as caught:
        path = training.train(data, out, steps=5, **TINY)
    assert path.exists() and len(caught) == 1


def test_files_are_whole_on_disk_and_have_ordinary_permissions(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or fsync(fd))
    # Even to set it for a moment would be seen by other threads.
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    path = training.train(data, out, steps=1, **TINY)
    assert sorted(synced) == sorted(p.stat().st_size for p in (path, out / "last.pt"))
    (out / "plain").touch()
    for written in (path, out / "last.pt"):
        assert written.stat().st_mode == (out / "plain").stat().st_mode
    assert not list(out.glob(".*"))


def test_time_ends_a_run_with_the_rate_near_zero(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("xunit_rs.training.loop.time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    training.train(data, out, time_budget=150.0, lr=1e-3, **TINY)
    rates = _log(out, "lr")
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[0] < 1e-4 and rates[-1] < 2e-5
    # Elapsed time goes on from the checkpoint: there is nothing left to do.
    elapsed = torch.load(out / "last.pt", weights_only=True)["elapsed"]
    assert elapsed >= 150
    training.train(data, out, time_budget=150.0, lr=1e-3, resume=True, **TINY)
    assert torch.load(out / "last.pt", weights_only=True)["elapsed"] == elapsed


def test_the_rate_rises_and_falls(data: Path, out: Path) -> None:
    run = loop._Run(
        XDnCNN("2018", 1, 3, 2),
        {"lr": 1.0, "steps": 1000, "time_budget": 100.0},
        Patches(data, 12, 1, 0),
        out,
    )
    rates = []
    for run.step in range(1001):
        rates.append(run._learning_rate())
    peak = rates.index(max(rates))
    assert peak == 40 and max(rates) == pytest.approx(1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)
    run.step, run.elapsed = 500, 100.0  # the time is up before the steps are
    assert run.progress == 1 and run._learning_rate() == pytest.approx(1e-3)


@pytest.mark.parametrize("version", ["2018", "2021"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_versions_and_precisions(data: Path, out: Path, version: str, precision: str) -> None:
    options = TINY | {"precision": precision, "channels": 3}
    path = training.train(data, out, steps=2, version=version, **options)
    assert XDnCNN.from_pretrained(path).version == version


def test_init_starts_from_weights(data: Path, out: Path, tmp_path: Path) -> None:
    first = training.train(data, out, steps=5, **TINY)
    # A rate this small changes nothing that float32 shows.
    second = training.train(
        data, tmp_path / "second", steps=1, init=first, lr=1e-30, ema_decay=0.0, **TINY
    )
    a, b = (XDnCNN.from_pretrained(path).state_dict() for path in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a if name.endswith("weight"))
    with pytest.raises(ValueError, match="does not fit"):
        training.train(data, tmp_path / "third", init=first, **(TINY | {"features": 4}))
    with pytest.raises(ValueError, match="version 2018"):
        training.train(data, tmp_path / "third", init=first, version="2021", **TINY)
    assert not (tmp_path / "third").exists()
    first.unlink()  # nor is it needed any longer
    options = TINY | {"lr": 1e-30, "ema_decay": 0.0}
    for init in (first, None):
        training.train(data, tmp_path / "second", steps=2, init=init, resume=True, **options)


def test_a_loss_that_is_not_finite_stops(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.train(data, out, steps=5, **TINY)
    before = (out / "last.pt").read_bytes()
    monkeypatch.setattr(torch.nn.functional, "mse_loss", lambda a, b: (a - b).sum() * math.nan)
    with pytest.raises(ValueError, match=r"loss is nan.*step 5.*lower lr.*last\.pt"):
        training.train(data, out, steps=9, resume=True, **TINY)
    assert (out / "last.pt").read_bytes() == before


def test_gradients_that_are_not_finite_stop(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(ValueError, match="gradient norm inf at step 0"):
        training.train(data, out, steps=9, **TINY)


def test_outside_the_main_thread(data: Path, out: Path) -> None:
    thread = threading.Thread(target=training.train, args=(data, out), kwargs={"steps": 2, **TINY})
    thread.start()
    thread.join()
    assert (out / "xdncnn.safetensors").exists()


def test_threads_are_put_back(data: Path, out: Path) -> None:
    before = torch.get_num_threads()
    training.train(data, out, steps=1, **TINY)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("sigma", -1.0),
        ("sigma", math.nan),
        ("patch_size", 0),
        ("patch_size", 21),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.inf),
        ("seed", -1),
        ("time_budget", 0.0),
        ("threads", -1),
        ("precision", "float16"),
        ("ema_decay", 1.0),
        ("checkpoint_every", 0.0),
        ("channels", 2),
        ("features", 0),
        ("version", "2020"),
    ],
)
def test_bad_values(data: Path, out: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        training.train(data, out, **(TINY | {option: value}))
    assert not out.exists()


def test_whole_numbers_only(data: Path, out: Path) -> None:
    with pytest.raises(TypeError, match=r"steps.*1\.5"):
        training.train(data, out, steps=1.5, **TINY)  # type: ignore[arg-type]


def test_bad_folders(data: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        training.train(tmp_path / "missing", out, steps=1, **TINY)
    with pytest.raises(NotADirectoryError, match=r"0\.png"):
        training.train(data / "0.png", out, steps=1, **TINY)
    with pytest.raises(NotADirectoryError, match=r"0\.png"):
        training.train(data, data / "0.png", steps=1, **TINY)
    with pytest.raises(FileNotFoundError, match="missing"):
        training.train(data, out, steps=1, val=tmp_path / "missing", **TINY)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty.*no images"):
        training.train(empty, out, steps=1, **TINY)
    Image.fromarray(np.zeros((30, 30), np.uint16)).save(empty / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        training.train(empty, out, steps=1, **TINY)
    assert not out.exists()


def test_resume_and_restart_are_told_apart(data: Path, out: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.pt.*resume"):
        training.train(data, out, steps=3, resume=True, **TINY)
    training.train(data, out, steps=3, **TINY)
    with pytest.raises(FileExistsError, match=r"last\.pt.*resume"):
        training.train(data, out, steps=3, **TINY)
    with pytest.raises(ValueError, match=r"sigma = 25\.0, not 50\.0"):
        training.train(data, out, steps=3, sigma=50, resume=True, **TINY)
    Image.new("L", (20, 20)).save(data / "new.png")
    with pytest.raises(ValueError, match=r"data = '3 images.*not '4 images"):
        training.train(data, out, steps=3, resume=True, **TINY)


def test_a_damaged_checkpoint_is_named(data: Path, out: Path) -> None:
    out.mkdir()
    (out / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"last\.pt.*not a checkpoint"):
        training.train(data, out, steps=3, resume=True, **TINY)
