from __future__ import annotations

import csv
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xunit_rs import cli
from xunit_rs.denoise import Denoiser


class Darker:
    channels = 1

    def denoise(self, image: Any, tile: int, threads: int) -> Any:
        return image * np.float32(0.5)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Denoiser.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Denoiser:
        return Denoiser(Darker(), **options) if name == "fake" else real(name, **options)

    monkeypatch.setattr(Denoiser, "from_pretrained", from_pretrained)


def save(path: Path, mode: str = "L", value: int = 200) -> Path:
    Image.new(mode, (8, 6), value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text.strip()


def test_help_of_train_shows_the_defaults_of_the_function(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from xunit_rs import training

    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(training.train).parameters.items():
        if parameter.default not in (None, False, inspect.Parameter.empty):
            option = f"--{name.replace('_', '-')} "
            assert f"(default: {parameter.default})" in text.split(f" {option}")[-1][:120], name
    assert "(default: 20000 without --time-budget)" in text
    code = "import sys; from xunit_rs import cli; cli._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["nothing"], ["denoise"], ["train"]):
        assert cli.main(args) == 2
        assert "usage" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    for name in ("denoise", "convert", "train", "eval", "info"):
        assert cli.main([name, "--help"]) == 0


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    import xunit_rs

    fake = types.ModuleType(f"xunit_rs.{name}")
    fake.__dict__.update(members)
    monkeypatch.setitem(sys.modules, f"xunit_rs.{name}", fake)
    monkeypatch.setattr(xunit_rs, name, fake, raising=False)


def test_train_passes_only_what_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def train(*args: Any, **options: Any) -> Path:
        calls.append((args, options))
        return Path("o/xdncnn.safetensors")

    module(monkeypatch, "training", train=train)
    options = ["--steps", "5", "--patch-size", "32", "--resume"]
    assert cli.main(["train", "--data", "d", "--out", "o"]) == 0
    assert cli.main(["train", "--data", "d", "--out", "o", *options]) == 0
    assert calls[0] == ((Path("d"), Path("o")), {})
    assert calls[1] == (
        (Path("d"), Path("o")),
        {"steps": 5, "patch_size": 32, "resume": True},
    )
    assert capsys.readouterr().out == "o/xdncnn.safetensors\n".replace("/", os.sep) * 2


@pytest.mark.parametrize(("text", "value"), [("2h", 7200), ("1.5m", 90), ("20s", 20), ("7", 7)])
def test_time_has_units(text: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    module(monkeypatch, "training", train=lambda *_, time_budget: given.append(time_budget))
    assert cli.main(["train", "--data", "d", "--out", "o", "--time-budget", text]) == 0
    assert given == [value]
    assert cli.main(["train", "--data", "d", "--out", "o", "--time-budget", "2d"]) == 2


def test_train_has_an_option_for_every_argument() -> None:
    from xunit_rs import training

    arguments = set(inspect.signature(training.train).parameters) - {"data", "out", "resume"}
    assert {name.replace("-", "_") for name, _, _ in cli._TRAIN_OPTIONS} == arguments


def test_convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []
    module(monkeypatch, "checkpoints", convert=lambda *a, **k: calls.append((*a, k)))
    assert cli.main(["convert", "a.pkl", "b.safetensors"]) == 0
    assert cli.main(["convert", "a.pkl", "b.safetensors", "--overwrite"]) == 0
    paths = (Path("a.pkl"), Path("b.safetensors"))
    assert calls == [(*paths, {"overwrite": False}), (*paths, {"overwrite": True})]
    assert capsys.readouterr().out == "b.safetensors\n" * 2


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torch'", name="torch"),
        ImportError("reading needs more", name="safetensors"),
    ],
)
def test_commands_that_need_torch_say_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise error

    module(monkeypatch, "training", train=train)
    assert cli.main(["train", "--data", "d", "--out", "o"]) == 1
    assert "pip install 'xunit-rs[torch]'" in one_line(capsys.readouterr().err)


def evaluate(*args: Any) -> int:
    return cli.main(["eval", *map(str, args)])


def test_eval_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", value=100)
    options = ["--data", tmp_path, "--model", "fake"]
    assert evaluate(*options, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["model"], result["data"], result["sigma"]) == ("fake", tmp_path.name, 25)
    assert result["images"] == len(result["per_image"]) == 2 and result["ssim"] is None
    assert evaluate(*options, "--json", "--sigma", "0") == 0
    perfect = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert perfect[0]["noisy_psnr"] is None
    assert evaluate(*options) == 0
    assert f"  fake              {result['psnr']:.2f}\n" in capsys.readouterr().out
    assert evaluate(*options, "--sigma", "-1") == 1
    assert "sigma" in one_line(capsys.readouterr().err)
    assert evaluate(*options, "--sigma", "a,b") == 2


def test_eval_of_models_on_folders_at_noise_levels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("L", (12, 11), 90).save(tmp_path / name / "a.png")
    options = ["--data", tmp_path / "one", tmp_path / "two", "--model", "fake", "tv"]
    report = tmp_path / "report.csv"
    assert evaluate(*options, "--sigma", "15,50", "--ssim", "--csv", report, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    seen = [(r["data"], r["sigma"], r["model"]) for r in results]
    assert seen == [(d, s, m) for d in ("one", "two") for s in (15, 50) for m in ("fake", "tv")]
    for result in results:
        better = result["psnr"] > result["noisy_psnr"] + 3
        assert better == (result["model"] == "tv") and 0 < result["ssim"] < 1
    with open(report, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == ["a.png", "mean"] * 8
    assert [float(line["psnr"]) for line in lines[1::2]] == [r["psnr"] for r in results]
    assert [float(line["ssim"]) for line in lines[::2]] == [r["ssim"] for r in results]


def test_eval_fails_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png")
    monkeypatch.setattr("xunit_rs.evaluation.evaluate", lambda *_, **__: pytest.fail("too late"))
    assert evaluate("--data", tmp_path, "--csv", tmp_path / "none" / "a.csv") == 1
    assert "no such folder" in one_line(capsys.readouterr().err)
    assert evaluate("--data", tmp_path, "--model", "tv", tmp_path / "none.safetensors") == 1
    assert "none.safetensors" in one_line(capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "bm3d", None)
    assert evaluate("--data", tmp_path, "--model", "bm3d") == 1
    assert "bm3d needs pip install 'xunit-rs[eval]'" in one_line(capsys.readouterr().err)


def test_eval_by_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    from xunit_rs.models import XDenseNet

    save(tmp_path / "a.png")
    with torch.random.fork_rng():
        XDenseNet(1, 3, (1,), 2).save(tmp_path / "net.safetensors")
    options = ["--data", tmp_path, "--model", tmp_path / "net.safetensors"]
    assert evaluate(*options) == 1
    assert "xdensenet" in one_line(capsys.readouterr().err)
    assert evaluate(*options, "--runtime", "torch", "--protocol", "official2021") == 0
    assert "protocol official2021" in capsys.readouterr().out
