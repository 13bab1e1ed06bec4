from __future__ import annotations

import csv
import inspect
import io
import json
import os
import shutil
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


def denoise(*args: Any) -> int:
    return cli.main(["denoise", *map(str, args), "--model", "fake"])


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text.strip()


def test_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.b.png")
    assert denoise(source) == 0
    target = tmp_path / "a.b-denoised.png"
    assert capsys.readouterr() == (f"{target}\n", "")
    with Image.open(target) as image:
        assert image.mode == "L" and image.getextrema() == (100, 100)
    assert denoise(source, tmp_path / "b.jpg", "-q", "--tile", 4, "--threads", 1) == 0
    assert capsys.readouterr() == ("", "")
    (tmp_path / "out").mkdir()
    assert denoise(source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "a.b.png").exists()


def test_what_a_photo_carries_is_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (16, 12), (200, 100, 0))
    photo.save(tmp_path / "a.jpg", exif=exif, icc_profile=b"profile" * 9, quality=50)
    Image.fromarray(np.full((3, 4), 40001, np.uint16)).save(tmp_path / "b.png", dpi=(300, 300))
    Image.new("RGBA", (4, 3), (200, 100, 0, 77)).save(tmp_path / "c.png")
    photo.quantize(4).save(tmp_path / "d.png", transparency=0)
    for name in ("a.jpg", "b.png", "c.png", "d.png"):
        assert denoise(tmp_path / name, tmp_path / f"new-{name}") == 0
    with Image.open(tmp_path / "new-a.jpg") as image, Image.open(tmp_path / "a.jpg") as old:
        assert image.size == (16, 12)
        assert image.getexif()[0x0112] == 6
        assert image.info["icc_profile"] == b"profile" * 9
        tables = image.quantization[0], old.quantization[0]  # type: ignore[attr-defined]
        assert sum(tables[0]) < sum(tables[1]) / 5
    with Image.open(tmp_path / "new-b.png") as image:
        assert image.mode == "I;16"
        assert set(np.asarray(image).ravel()) == {20000}
        assert round(image.info["dpi"][0]) == 300
    with Image.open(tmp_path / "new-c.png") as image:
        assert image.getchannel("A").getextrema() == (77, 77)
    with Image.open(tmp_path / "new-d.png") as image:
        assert image.mode == "RGBA"


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.png")
    before = source.read_bytes()
    for target in (source, save(tmp_path / "a-denoised.png")):
        old = target.read_bytes()
        assert denoise(source, target) == 1
        assert "already exists" in one_line(capsys.readouterr().err)
        assert target.read_bytes() == old
    assert denoise(source, "--overwrite") == 0
    assert source.read_bytes() == before
    assert denoise(source, source, "--overwrite") == 0
    assert source.read_bytes() != before


def test_a_second_photo_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = save(tmp_path / "a.png"), save(tmp_path / "b.png")
    before = second.read_bytes()
    assert denoise("--overwrite", first, second) == 1  # as by a shell's *.png
    assert "name it with --output" in one_line(capsys.readouterr().err)
    assert second.read_bytes() == before
    assert denoise(first, "-o", second) == 1
    assert "already exists" in one_line(capsys.readouterr().err)
    assert denoise(first, tmp_path / "c.png", "-o", second) == 1
    assert "two outputs" in one_line(capsys.readouterr().err)
    assert denoise("--overwrite", first, "--output", second) == 0
    assert second.read_bytes() != before


def test_broken_weights_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Darker, "denoise", lambda self, image, *_: image * np.float32(np.nan))
    assert denoise(save(tmp_path / "a.png")) == 1
    assert "a.png" in one_line(capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_target_that_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Denoiser, "from_pretrained", lambda *_, **__: pytest.fail("too late"))
    source = save(tmp_path / "a.png")
    for suffix in (".gif", ".ico", ".jp2", ".pdf"):
        assert denoise(source, tmp_path / f"b{suffix}") == 1
        assert f"suffix '{suffix}'" in one_line(capsys.readouterr().err)


def test_a_traceback_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XUNIT_DEBUG", "1")
    assert denoise(tmp_path / "none.png") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "in _jobs" in error
    assert error.splitlines()[-1].startswith("xunit-rs: error: ")


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


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    save(folder / "a.png")
    save(folder / "b.jpg", "RGB")
    save(folder / "c.gif")
    (folder / "notes.txt").write_text("no image")
    (folder / "d.png").write_text("broken")
    assert denoise(folder) == 1
    assert "d.png" in one_line(capsys.readouterr().err)
    results = tmp_path / "photos-denoised"
    assert sorted(p.name for p in results.iterdir()) == ["a.png", "b.jpg", "c.gif.png"]
    (folder / "d.png").unlink()
    (results / "b.jpg").unlink()
    assert denoise(f"{folder}/") == 0  # goes on where it stopped
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(results / "b.jpg")]
    assert "2 results exist already" in one_line(err)
    assert denoise(folder, folder) == 1
    assert "is the input" in one_line(capsys.readouterr().err)


def test_a_folder_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    save(folder / "a.png")
    for place, name in ((folder, "."), (folder / "inner", "..")):
        monkeypatch.chdir(place)
        assert denoise(name) == 0
        assert (tmp_path / "photos-denoised" / "a.png").exists()
        shutil.rmtree(tmp_path / "photos-denoised")


def test_failures_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for args, reason in [
        ((tmp_path / "none.png",), "no such file"),
        ((tmp_path / "text.png",), "not an image"),
        ((tmp_path / "empty",), "no images"),
        ((source, tmp_path / "none" / "b.png"), "no such folder"),
        ((source, tmp_path / "b.txt"), "suffix"),
        ((save(tmp_path / "alpha.png", "RGBA"), tmp_path / "b.jpg"), "JPEG cannot store"),
        ((tmp_path / "empty", source), "is a file"),
    ]:
        assert denoise(*args) == 1, reason
        message = one_line(capsys.readouterr().err)
        assert message.startswith("xunit-rs: error: ") and reason in message
    assert cli.main(["denoise", str(source), "--model", "a.pkl"]) == 1
    assert "xunit-rs convert" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "empty-denoised").exists()


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["nothing"], ["denoise"], ["denoise", "a", "--tile", "-1"], ["train"]):
        assert cli.main(args) == 2
        assert "usage" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    for name in ("denoise", "convert", "train", "eval", "info"):
        assert cli.main([name, "--help"]) == 0


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Darker, "denoise", interrupt)
    assert denoise(save(tmp_path / "a.png")) == 130
    assert "interrupted" in one_line(capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_progress_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with cli._Bar(stream=terminal) as bar:
        bar.show(0, 2, "a.png")
        bar.clear()
        bar.show(1, 2, "b.png")
    text = terminal.getvalue()
    assert "0/2 a.png" in text and "[##########..........] 1/2 b.png" in text
    assert text.endswith("\r\x1b[K")
    for quiet, stream in ((True, Terminal()), (False, io.StringIO())):
        with cli._Bar(quiet=quiet, stream=stream) as bar:
            bar.show(1, 2)
        assert stream.getvalue() == ""


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


def test_a_name_that_stdout_cannot_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert denoise(save(tmp_path / "\u03c3.png")) == 0
    assert raw.getvalue().rstrip().endswith(b"\\u03c3-denoised.png")


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xunit_rs", "denoise", str(tmp_path / "none.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "none.png" in one_line(done.stderr)


def test_the_model_suits_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def load(name: str, **options: object) -> Denoiser:
        names.append(name)
        return Denoiser(Darker())

    monkeypatch.setattr(cli.Denoiser, "from_pretrained", load)
    (tmp_path / "in").mkdir()
    for i, mode in enumerate(["L", "RGB", "RGBA", "LA", "P", "L"]):
        Image.new(mode, (4, 4)).save(tmp_path / "in" / f"{i}.png")
    assert cli.main(["denoise", str(tmp_path / "in")]) == 0
    assert names == ["gray-blind", "color-blind"]
    assert len(list((tmp_path / "in-denoised").iterdir())) == 6
