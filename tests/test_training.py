"""Training: patches, the loop, its checkpoints and its errors, on tiny networks and images."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

pytest.importorskip("lightning")

from xunit_rs import checkpoints, cli, replace_relu, training  # noqa: E402
from xunit_rs.evaluation import Evaluation  # noqa: E402
from xunit_rs.models import DnCNN, XDnCNN, from_pretrained  # noqa: E402
from xunit_rs.training import loop  # noqa: E402
from xunit_rs.training.data import Patches, read_folder  # noqa: E402

TINY: dict[str, Any] = {
    "features": 3,
    "depth": 2,
    "patch_size": 12,
    "batch_size": 4,
    "precision": "float32",
    "accelerator": "cpu",
    "threads": 1,
}
# Of a module of the caller's.
SMALL = {key: value for key, value in TINY.items() if key not in ("features", "depth")}


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs; `pictures` brings them back."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(loop._Run, "_draw", lambda _: None)


@pytest.fixture
def pictures() -> None: ...


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


def _log(out: Path, key: str) -> list[float]:
    with open(out / "log.csv", newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]]


def _run(out: Path, data: Path, **config: Any) -> loop._Run:
    job = loop._Job(
        config={"lr": 1.0, "channels": 1, "schedule": "cosine", **config},
        out=out,
        result="xdncnn.safetensors",
        patches=Patches(data, 12, 1, 0),
        validation=loop._Validation((25.0,), 1),
        checkpoint_every=60.0,
        resume=False,
        threads=1,
        spawned=False,
        metadata={},
    )
    return loop._Run(loop._fabric("cpu", 1, "float32"), XDnCNN("2018", 1, 3, 2), job)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _last(out: Path) -> dict[str, Any]:
    return dict(torch.load(out / "last.pt", weights_only=True))


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
    assert "patches/s" in lines[0]


def test_the_result_is_the_average_and_tells_its_recipe(data: Path, out: Path) -> None:
    path = training.train(data, out, steps=20, sigma=30, license="MIT", **TINY)
    state = torch.load(out / "last.pt", weights_only=True)
    saved = XDnCNN.from_pretrained(path).state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())
    assert not torch.equal(saved["tail.weight"], state["model"]["tail.weight"])
    metadata = _metadata(path)
    assert metadata["architecture"] == "xdncnn-2018" and metadata["sigma"] == "30"
    assert metadata["license"] == "MIT" and "psnr" not in " ".join(metadata)
    assert metadata["sha256"] == checkpoints.sha256(saved)
    saved["tail.bias"] += 1
    assert metadata["sha256"] != checkpoints.sha256(saved)
    assert "20 steps" in metadata["recipe"] and "seed 0" in metadata["recipe"]
    assert metadata["data"].startswith("images (3 images, crc32 ")
    assert str(data.parent) not in metadata["data"]


def test_the_result_is_the_best_of_the_validations(
    data: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {25: iter([20.0, 23.0, 20.0, 9.0, 8.0]), 50: iter([20.0, 21.0, 23.0, 9.0, 9.0])}

    def measured(model: Any, folder: Any, sigma: float, **_: Any) -> Evaluation:
        return Evaluation(next(scores[int(sigma)]), 0.0, 3, sigma, "kair", {}, 0.5)

    monkeypatch.setattr(loop, "evaluate", measured)
    options: dict[str, Any] = TINY | {"val": data, "validations": 4, "val_sigma": (25, 50)}
    path = training.train(data, out, steps=8, **options)
    recipe = _metadata(path)["recipe"]
    assert "8 steps" in recipe and "average 0.999 of step 4" in recipe
    assert _metadata(path)["validation_psnr"] == "23.000 dB (sigma 25), 21.000 dB (sigma 50)"
    short = training.train(data, tmp_path / "b", steps=8, **TINY)  # without validation: the last
    assert not _equal(*(XDnCNN.from_pretrained(p).state_dict() for p in (path, short)))
    last = _last(out)
    saved = XDnCNN.from_pretrained(path).state_dict()
    assert _equal(saved, last["best"]["average"]) and not _equal(saved, last["average"])
    # It stays the best of a run that goes on; of other images it is not comparable.
    path.unlink()
    training.train(data, out, steps=10, resume=True, **options | {"validations": 5})
    assert _equal(saved, XDnCNN.from_pretrained(path).state_dict())
    Image.new("L", (20, 20)).save(data.parent / "other.png")
    (data.parent / "other").mkdir()
    (data.parent / "other.png").rename(data.parent / "other" / "a.png")
    options["val"] = data.parent / "other"
    training.train(data, out, steps=10, resume=True, **options)
    assert "validation_psnr" not in _metadata(path)
    assert _equal(XDnCNN.from_pretrained(path).state_dict(), _last(out)["average"])


def test_noise_of_a_range(data: Path, out: Path) -> None:
    patches = Patches(data, 12, 1, 0)
    deviations = patches.batch(0, 400, (10.0, 40.0))[1].std((1, 2, 3)) * 255
    assert 5 < deviations.min() < 15 and 35 < deviations.max() < 50
    assert 22 < deviations.mean() < 28
    path = training.train(data, out, steps=20, sigma=(0, 55), val=data, validations=2, **TINY)
    metadata = _metadata(path)
    assert metadata["sigma"] == "0-55" and metadata["license"] == "not stated"
    assert metadata["protocol"] == "kair" and metadata["validation_data"] == "images"
    for key in ("validation_psnr", "validation_ssim"):
        assert "(sigma 25)" in metadata[key] and "(sigma 50)" in metadata[key]
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
    run = _run(out, data, ema_decay=0.5)
    with torch.no_grad():
        for tensor in run.network.state_dict().values():
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
    a, b = _last(tmp_path / "whole"), _last(out)
    assert _equal(a["model"], b["model"]) and _equal(a["average"], b["average"])
    a, b = (XDnCNN.from_pretrained(path).state_dict() for path in (whole, parts))
    assert _equal(a, b)
    assert _log(out, "step") == [50, 60]
    for key in ("step", "loss", "lr"):
        assert _log(out, key) == _log(tmp_path / "whole", key)


def test_what_was_logged_after_the_checkpoint_is_dropped(data: Path, out: Path) -> None:
    training.train(data, out, steps=10, **TINY)
    before = (out / "log.csv").read_text()
    with open(out / "log.csv", "a") as file:
        file.write("11,1.0,0.5,0.1,,,\n12,1.0,0")
    training.train(data, out, steps=10, resume=True, **TINY)
    assert (out / "log.csv").read_text() == before
    assert _log(out, "step") == [10]


def test_tensorboard_reads_the_log(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loop, "_LOG_EVERY", 5)
    for steps in (10, 20):
        options = {"steps": steps, "resume": steps == 20, "val": data, "validations": 2}
        training.train(data, out, **options, **TINY)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "psnr/sigma 25", "ssim/sigma 25"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [5, 10, 15, 20]
    values = [event.value for event in events.Scalars("loss")]
    assert values == pytest.approx(_log(out, "loss"))


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
    (out / "log.csv").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"log\.csv.*No space left") as caught:
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
    run = _run(out, data, steps=1000, time_budget=100.0)
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
    run.elapsed, run.config["schedule"] = 0.0, "step"
    for run.step, rate in ((20, 0.525), (40, 1), (499, 1), (500, 0.1), (749, 0.1), (750, 0.01)):
        assert run._learning_rate() == pytest.approx(rate)


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
    with pytest.raises(ValueError, match="xdncnn-2018, not xdncnn-2021"):
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
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(math.inf))
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
        ("model", "xsrgan"),
        ("loss", "huber"),
        ("schedule", "linear"),
        ("accelerator", "tpu"),
        ("devices", 0),
    ],
)
def test_bad_values(data: Path, out: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        training.train(data, out, **(TINY | {option: value}))
    assert not out.exists()


def test_more_gpus_than_there_are(data: Path, out: Path) -> None:
    there = torch.cuda.device_count()
    message = f"accelerator 'cuda' with devices {there + 1}: PyTorch sees {there}"
    with pytest.raises(ValueError, match=message):
        training.train(data, out, **(TINY | {"accelerator": "cuda", "devices": there + 1}))


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


def test_pictures_of_a_run(data: Path, out: Path, pictures: None) -> None:
    training.train(data, out, steps=4, **TINY)
    for name in ("curves.png", "samples.png"):
        with Image.open(out / name) as image:
            assert image.width >= 900 and len(image.convert("L").getcolors()) > 20
    with Image.open(out / "samples.png") as image:
        heights = [image.height]
    training.train(data, out / "b", steps=4, channels=3, val=data, validations=2, **TINY)
    (data / "1.png").unlink()
    training.train(data, out / "c", steps=4, **TINY)
    for run in "bc":
        with Image.open(out / run / "samples.png") as image:
            heights.append(image.height)
    assert heights[0] == heights[1] > heights[2]  # a row for each of three images, and of two


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xdncnn-2021", {"features": 3, "depth": 1}),
        ("dncnn", {"features": 3, "depth": 1}),
        ("xdensenet", {"features": 4}),
    ],
)
def test_models_by_name(data: Path, out: Path, name: str, options: dict[str, Any]) -> None:
    path = training.train(data, out, model=name, steps=2, **options, **SMALL)
    assert path == out / f"{name.split('-')[0]}.safetensors"
    loaded = from_pretrained(path)
    assert loaded.architecture == _metadata(path)["architecture"] == name
    assert loaded.config()["features"] == options["features"]


def test_depth_is_of_networks_that_have_it(data: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="depth is not an argument of model 'xdensenet', got 3"):
        training.train(data, out, model="xdensenet", depth=3, **SMALL)
    with pytest.raises(TypeError, match="name or a torch module, got 3"):
        training.train(data, out, model=3, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no parameters.*Identity"):
        training.train(data, out, model=torch.nn.Identity(), **SMALL)
    assert not out.exists()


def test_a_model_of_replaced_relus(data: Path, out: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = replace_relu(DnCNN(1, 3, 1), torch.zeros(1, 1, 9, 9))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = training.train(data, out, model=model, steps=40, lr=1e-2, **SMALL)
    assert path == out / "model.safetensors"
    assert _equal(before, model.state_dict())
    state = load_file(path)
    model.load_state_dict(state)
    assert not torch.equal(before["tail.weight"], model.tail.weight)
    metadata = _metadata(path)
    assert metadata["architecture"].endswith("DnCNN") and "40 steps" in metadata["recipe"]
    assert metadata["sha256"] == checkpoints.sha256(state)
    with pytest.raises(ValueError, match=r"trained with model = 'DnCNN, .* not 'DnCNN, "):
        training.train(data, out, model=DnCNN(1, 4, 1), resume=True, **SMALL)
    with pytest.raises(ValueError, match="init is for models by name"):
        training.train(data, tmp_path / "b", model=model, init=path, **SMALL)
    with pytest.raises(checkpoints.CheckpointError, match="unknown architecture"):
        from_pretrained(path)


def test_a_network_as_it_was_built(data: Path, out: Path) -> None:
    path = training.train(data, out, model=DnCNN(3, 3, 1), steps=2, val=data, **SMALL)
    assert isinstance(from_pretrained(path), DnCNN)  # its BatchNorm is merged
    assert from_pretrained(path).channels == 3


class _Mix(torch.nn.Module):
    """Colours in, colours out, with some of the weights dropped at random."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 1)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.conv(x))


def test_random_layers_go_on_as_uninterrupted(
    data: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = _Mix(), SMALL | {"channels": 3, "steps": 8}
    training.train(data, tmp_path / "whole", model=model, val=data, **options)
    with monkeypatch.context() as patch:
        _stop_after(patch, 5, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            training.train(data, out, model=model, val=data, **options)
    training.train(data, out, model=model, val=data, resume=True, **options)
    assert _equal(_last(out)["model"], _last(tmp_path / "whole")["model"])
    for key in ("step", "loss", "psnr", "ssim"):
        assert _log(out, key) == _log(tmp_path / "whole", key)
    with pytest.raises(ValueError, match=r"shape.*\(4, 2, 12, 12\).*\(4, 3, 12, 12\)"):
        training.train(data, out / "b", model=_Mix(2), **options)


class _Noop(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


@pytest.mark.parametrize(("loss", "expected"), [("mse", 1.0), ("l1", math.sqrt(2 / math.pi))])
def test_losses(data: Path, out: Path, loss: str, expected: float) -> None:
    options = SMALL | {"batch_size": 200}
    training.train(data, out, model=_Noop(), steps=1, sigma=51, loss=loss, lr=1e-30, **options)
    power = 2 if loss == "mse" else 1
    assert _log(out, "loss") == [pytest.approx(expected * 0.2**power, rel=0.02)]


def test_validation_of_images_too_small_for_ssim(data: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    Image.new("L", (30, 10), 99).save(tmp_path / "small" / "a.png")
    path = training.train(data, out, steps=2, val=tmp_path / "small", validations=2, **TINY)
    assert len(_log(out, "psnr")) == 2 and _log(out, "ssim") == []
    assert "validation_psnr" in _metadata(path) and "validation_ssim" not in _metadata(path)


def test_checkpoints_are_no_further_apart_than_asked(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("xunit_rs.training.loop.time.monotonic", lambda: float(next(clock)))
    saved: list[float] = []
    save = loop._Run.save

    def noted(self: Any, log: Any) -> None:
        saved.append(self.elapsed)
        save(self, log)

    monkeypatch.setattr(loop._Run, "save", noted)
    training.train(data, out, steps=100, val=data, validations=3, checkpoint_every=40, **TINY)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *saved])]
    assert len(saved) > 5 and max(gaps) <= 40 + 6  # and the step that was being computed


KILLED = """
    import os, signal, sys, torch
    from xunit_rs import training
    from xunit_rs.training import loop

    loop._Run._draw = lambda _: None
    count = 0

    def kill():
        global count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    if sys.argv[3] == "step":
        update = loop._Run._update_average
        loop._Run._update_average = lambda self: (kill(), update(self))
    else:
        save = torch.save

        def half(state, path):
            save(state, path)
            os.truncate(path, os.path.getsize(path) // 2)
            kill()
            save(state, path)

        torch.save = half
    training.train(sys.argv[1], sys.argv[2], steps=20, checkpoint_every=1e-9, **{tiny})
"""


def _python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("where", ["step", "save"])
def test_killed_and_resumed_is_uninterrupted(
    data: Path, out: Path, tmp_path: Path, where: str
) -> None:
    done = _python(KILLED.replace("{tiny}", repr(TINY)), data, out, where)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _last(out)["step"] == 6  # the seventh is all that was lost
    assert len(list(out.glob(".xunit-rs-*.tmp"))) == (where == "save")
    parts = training.train(data, out, steps=20, resume=True, **TINY)
    whole = training.train(data, tmp_path / "whole", steps=20, **TINY)
    a, b = (XDnCNN.from_pretrained(path).state_dict() for path in (parts, whole))
    assert _equal(a, b)
    assert _equal(_last(out)["model"], _last(tmp_path / "whole")["model"])
    assert _log(out, "loss") == _log(tmp_path / "whole", "loss")
    assert not list(out.glob(".*"))


# Every wheel of PyTorch has gloo; builds without torch.distributed cannot start several processes.
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@needs_gloo
def test_two_processes_train_as_one(data: Path, out: Path, tmp_path: Path) -> None:
    # BatchNorm would see half a batch in each.
    model = DnCNN(1, 3, 2, batch_norm=False)
    options = SMALL | {"model": model, "steps": 12, "val": data, "validations": 2}
    one = training.train(data, tmp_path / "one", **options)
    two = training.train(data, out, devices=2, **options)
    a, b = (from_pretrained(path).state_dict() for path in (one, two))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    for key in ("loss", "psnr", "ssim"):
        assert _log(out, key) == pytest.approx(_log(tmp_path / "one", key), rel=1e-4)
    assert "on 2 x cpu" in _metadata(two)["recipe"]


@needs_gloo
def test_torchrun(data: Path, out: Path, tmp_path: Path) -> None:
    options = "--model dncnn --features 3 --depth 1 --steps 6 --patch-size 12 --batch-size 4"
    options += " --precision float32 --accelerator cpu --threads 1"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "xunit_rs", "train", "--data", data, "--out", out]
    done = subprocess.run(
        [sys.executable, *map(str, command), *options.split()],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == [str(out / "dncnn.safetensors")]
    assert done.stdout.count("dncnn.safetensors") == 1
    assert _log(out, "step") == [6] and _last(out)["step"] == 6
    assert "on 2 x cpu" in _metadata(out / "dncnn.safetensors")["recipe"]


@needs_gloo
def test_a_signal_ends_all_processes(data: Path, out: Path) -> None:
    options = "--features 3 --depth 1 --steps 1000000 --patch-size 12 --batch-size 4 --devices 2"
    options += " --threads 1 --accelerator cpu --checkpoint-every 0.2"
    command = ["-m", "xunit_rs", "train", "--data", data, "--out", out]
    with subprocess.Popen(
        [sys.executable, *map(str, command), *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while not (out / "last.pt").exists() and process.poll() is None:
            time.sleep(0.1)
        before = _last(out)["step"]
        process.terminate()
        said, _ = process.communicate(timeout=600)  # ends when the last of them closes its stdout
    assert process.returncode == 128 + signal.SIGTERM, said
    assert _last(out)["step"] >= before and not list(out.glob(".*"))


def test_a_batch_is_divided_evenly(data: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        training.train(data, out, devices=3, steps=1, **TINY)


def test_what_is_missing_is_named(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    assert cli.main(["train", "--data", str(data), "--out", str(out), "--patch-size", "12"]) == 1
    error = capsys.readouterr().err
    assert "training needs tensorboard: pip install 'xunit-rs[train]'" in error
    assert not out.exists()


def test_lightning_is_imported_by_training_alone() -> None:
    code = """
        import sys
        import xunit_rs.denoise, xunit_rs.cli
        assert not {"torch", "lightning", "matplotlib"} & sys.modules.keys()
        import xunit_rs.models, xunit_rs.evaluation, xunit_rs.training
        assert not {"lightning", "matplotlib", "tensorboard", "skimage"} & sys.modules.keys()
    """
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_throughput_is_measured() -> None:
    bench = Path(__file__).parents[1] / "benches/throughput.py"
    done = subprocess.run(
        [sys.executable, str(bench), "--tiny"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    title, heading, *rows = done.stdout.splitlines()
    assert title.startswith("patches per second, 1 patches of 8×8 a step, 1 thread(s)")
    assert heading.split() == ["ours", "plain", "ratio"]
    assert len(rows) == 5
    for row in rows[:-1]:
        ours, plain, ratio = (float(value.rstrip("×")) for value in row.split()[-3:])
        assert ours / plain == pytest.approx(ratio, rel=0.1) and plain > 0
    assert float(rows[-1].split()[-1]) > 0


def test_the_page_names_tests_that_exist() -> None:
    tests = Path(__file__).parent
    page = (tests.parent / "docs/training.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", page)
    assert len(named) >= 12
    for file, name in named:
        text = (tests / (file or "test_training.py")).read_text(encoding="utf-8")
        assert f"def {name}(" in text, name
