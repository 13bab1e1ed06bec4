from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xunit_rs import _files, _terminal, cli, images
from xunit_rs.denoise import Denoiser


class Darker:
    channels = 1

    def denoise(self, image: Any, tile: int, threads: int, progress: Any = None) -> Any:
        for share in () if progress is None else (0.5, 1.0):
            progress(share)
        return image * np.float32(0.5)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were asked for, all of them but files the same fake."""
    names = []
    real = Denoiser.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Denoiser:
        if name.endswith((".safetensors", ".pkl")):
            return real(name, **options)
        names.append(name)
        return Denoiser(Darker(), **options)

    monkeypatch.setattr(Denoiser, "from_pretrained", from_pretrained)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, mode: str = "L", value: int = 200) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def denoise(*args: Any) -> int:
    return cli.main(["denoise", *map(str, args)])


def refused(*args: Any) -> None:
    """The command ends with 2 and has changed nothing."""
    before = content()
    assert denoise(*args) == 2, args
    assert content() == before


def content(folder: str = ".") -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def files(folder: str) -> list[str]:
    paths = Path(folder).rglob("*")
    return sorted(p.relative_to(folder).as_posix() for p in paths if p.is_file())


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text.strip()


def command(*args: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command as users run it, with the true networks."""
    return subprocess.run(
        [sys.executable, "-m", "xunit_rs", "denoise", *map(str, args)],
        capture_output="stdout" not in options,
        timeout=300,
        check=False,
        **options,
    )


def test_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.b.png")
    assert denoise("a.b.png") == 0
    assert capsys.readouterr() == ("a.b-denoised.png\n", "")
    with Image.open("a.b-denoised.png") as image:
        assert image.mode == "L" and image.getextrema() == (100, 100)
    assert denoise("a.b.png", "-o", "b.jpg", "-q", "--tile", 4, "--threads", 1) == 0
    assert capsys.readouterr() == ("", "")
    os.mkdir("out")
    for folder in ("out", "new/"):  # one that is there, one to be made
        assert denoise("a.b.png", "-o", folder) == 0
        assert files(folder) == ["a.b.png"]


def test_what_a_photo_carries_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (16, 12), (200, 100, 0))
    photo.save("a.jpg", exif=exif, icc_profile=b"profile" * 9, quality=50)
    Image.fromarray(np.full((3, 4), 40001, np.uint16)).save("b.png", dpi=(300, 300))
    Image.new("RGBA", (4, 3), (200, 100, 0, 77)).save("c.png")
    photo.quantize(4).save("d.png", transparency=0)
    for name in ("a.jpg", "b.png", "c.png", "d.png"):
        assert denoise(name, "-o", f"new-{name}") == 0
    with Image.open("new-a.jpg") as image, Image.open("a.jpg") as old:
        assert image.size == (16, 12)
        assert image.getexif()[0x0112] == 6
        assert image.info["icc_profile"] == b"profile" * 9
        tables = image.quantization[0], old.quantization[0]  # type: ignore[attr-defined]
        assert sum(tables[0]) < sum(tables[1]) / 5
    with Image.open("new-b.png") as image:
        assert image.mode == "I;16"
        assert set(np.asarray(image).ravel()) == {20000}
        assert round(image.info["dpi"][0]) == 300
    with Image.open("new-c.png") as image:
        assert image.getchannel("A").getextrema() == (77, 77)
    with Image.open("new-d.png") as image:
        assert image.mode == "RGBA"


def save_deep(name: str, dtype: str = "uint16", bands: int = 4) -> Any:
    values = np.full((6, 8, bands), 0.5 if dtype == "float32" else 40001, dtype)
    values[0, 0] = 0.25 if dtype == "float32" else 12345
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    info = {"exif": exif.tobytes(), "icc_profile": b"profile" * 9, "dpi": (300, 300)}
    images.write(images.DeepImage(values, info), name)
    return values


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "uint16"), ("a.tif", "uint16"), ("a.tif", "float32")]
)
@pytest.mark.parametrize("bands", [3, 4])
def test_colour_of_16_bits_and_floats_keeps_its_depth(
    capsys: pytest.CaptureFixture[str], name: str, dtype: str, bands: int
) -> None:
    values = save_deep(name, dtype, bands)
    assert denoise(name, "-o", f"new-{name}", "--compare", "look.png", "--sigma", "auto") == 0
    assert "Warning" not in capsys.readouterr().err
    image = images.read(f"new-{name}", deep=True)
    assert isinstance(image, images.DeepImage)
    assert image.pixels.dtype == np.dtype(dtype)
    halves = np.rint(values / 2) if dtype == "uint16" else values / 2
    np.testing.assert_allclose(image.pixels[..., :3], halves[..., :3], atol=1e-6, rtol=0)
    np.testing.assert_array_equal(image.pixels[..., 3:], values[..., 3:])
    assert image.getexif()[0x010F] == "Maker"
    assert image.info["icc_profile"] == b"profile" * 9
    assert round(image.info["dpi"][0]) == 300
    # As bytes in a pipe, and without metadata.
    piped = command("-", "--strip", input=Path(name).read_bytes())
    assert (piped.returncode, piped.stderr) == (0, b"")
    stripped = images.read(io.BytesIO(piped.stdout), deep=True)
    assert isinstance(stripped, images.DeepImage)
    assert (stripped.mode, stripped.format) == (image.mode, image.format)
    assert not {"exif", "icc_profile"} & set(stripped.info)
    assert stripped.info.get("dpi", (1, 1)) == (1, 1)  # which Pillow writes for none
    np.testing.assert_array_equal(stripped.pixels[..., 3:], values[..., 3:])


def test_what_a_format_cannot_keep_of_16_bits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    save_deep("a.png", bands=3)
    save_deep("b.tif", "float32", bands=3)
    assert denoise("a.png", "-o", "a.jpg") == 0
    assert "a.jpg: JPEG holds 8 of the image's 16 bits" in capsys.readouterr().err
    with Image.open("a.jpg") as image:
        assert image.getexif()[0x010F] == "Maker"
    assert denoise("b.tif", "-o", "b.png") == 1
    assert "b.tif: b.png: PNG cannot store mode RGB;F32; try .tif" in capsys.readouterr().err
    assert not Path("b.png").exists()


def test_strip() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    photo = Image.new("L", (16, 12), 200)
    photo.paste(0, (0, 0, 16, 4))
    photo.save("a.jpg", exif=exif, icc_profile=b"profile" * 9, dpi=(300, 300), comment=b"hills")
    assert denoise("a.jpg", "--strip") == 0
    with Image.open("a-denoised.jpg") as image:
        assert image.size == (12, 16)  # turned by a quarter: what was on top is on the right
        assert image.getpixel((11, 8)) < 20 < 80 < image.getpixel((0, 8))
        assert not set(image.info) & {"exif", "icc_profile", "comment"}
        assert not len(image.getexif()) and image.info.get("dpi") != (300, 300)
    assert denoise("a.jpg", "-o", "b.jpg") == 0
    with Image.open("b.jpg") as image:
        assert {"exif", "icc_profile", "comment", "dpi"} <= set(image.info)


def test_nothing_is_overwritten_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    source, other = save("a.png"), save("b.png")
    save("a-denoised.png")
    before = content()
    for args in (("a.png",), ("a.png", "-o", "b.png"), ("a.png", "b.png", "-o", ".")):
        refused(*args)
        assert "--overwrite replaces it" in one_line(capsys.readouterr().err)
    refused("a.png", "-o", "a.png")
    assert "a.png: is the input itself" in one_line(capsys.readouterr().err)
    refused("a.png", "-o", "a.png", "--skip-existing")  # which would never do anything
    assert denoise("a.png", "--overwrite") == 0
    assert source.read_bytes() == before["a.png"]
    assert denoise("a.png", "-o", "b.png", "--overwrite") == 0
    assert other.read_bytes() != before["b.png"]
    assert denoise("a.png", "-o", "a.png", "--overwrite") == 0
    assert source.read_bytes() != before["a.png"]


def test_no_result_takes_the_place_of_another_or_of_an_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("x/a.png", "y/a.png", "a.png", "a-denoised.png"):
        save(name)
    os.symlink("a.png", "link.png")
    for args, text in [
        (("x/a.png", "y/a.png", "-o", "out"), "out/a.png: would hold what is made of x/a.png and"),
        (("x", "y/../x", "-o", "out"), "would hold"),
        (("a.png", "a-denoised.png"), "a-denoised.png: is an input"),
        (("x/a.png", "a.png", "-o", "y/../.", "--overwrite"), "a.png: is an input"),
        (("y", "-o", "y/a.png"), "is a file"),
        (("x/a.png", "y/a.png", "-o", "y", "--overwrite"), "y/a.png: is an input"),
        (("a.png", "-o", "link.png"), "link.png: is the input itself"),
        (("a.png", "--compare", "a.png", "--overwrite"), "a.png: is an input"),
        (("a.png", "-o", "b.png", "--compare", "./b.png"), "b.png: would hold"),
    ]:
        refused(*args)
        assert text in one_line(capsys.readouterr().err).replace(os.sep, "/"), args


def test_folders_keep_their_trees(capsys: pytest.CaptureFixture[str]) -> None:
    save("in/a.png")
    save("in/deep/er/b.jpg", "RGB")
    save("in/c.gif")
    save("in/.hidden/d.png")
    save("in/.e.png")
    save("two/a.png")
    Path("in/notes.txt").write_text("no image")
    os.symlink("..", "in/loop")
    tree = ["a.png", "c.gif.png", "deep/er/b.jpg"]
    assert denoise("in/", "-o", "out") == 0
    assert files("out") == tree
    shown = capsys.readouterr().out.replace(os.sep, "/")
    assert shown.split() == ["out/a.png", "out/c.gif.png", "out/deep/er/b.jpg"]
    assert denoise("in") == 0
    assert files("in-denoised") == tree
    assert denoise("in", "two", "two/a.png", "-o", "all", "-q") == 0
    assert files("all") == ["a.png", *(f"in/{name}" for name in tree), "two/a.png"]
    assert denoise("in", "two", "--overwrite") == 0
    assert files("two-denoised") == ["a.png"]
    assert denoise("in", "-o", "in", "--overwrite") == 0  # in place, each of its own
    assert "c.gif.png" in files("in")


def test_results_inside_the_input_are_no_inputs() -> None:
    save("in/a.png")
    for _ in range(2):
        assert denoise("in", "-o", "in/out", "--compare", "in/look", "--overwrite") == 0
        assert files("in") == ["a.png", "look/a.png", "out/a.png"]
    assert denoise(".", "in", "--overwrite", "-q") == 0
    shutil.rmtree("../" + Path.cwd().name + "-denoised")
    assert files("in-denoised") == ["a.png", "look/a.png", "out/a.png"]


def test_a_folder_named_by_a_dot(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("photos/a.png")
    os.mkdir("photos/inner")
    for place, name in ((here / "photos", "."), (here / "photos/inner", "..")):
        monkeypatch.chdir(place)
        assert denoise(name) == 0
        assert files(str(here / "photos-denoised")) == ["a.png"]
        shutil.rmtree(here / "photos-denoised")


def test_what_fails_is_named_and_the_rest_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    save("in/a.png")
    save("in/z.png")
    Path("in/b.png").write_text("broken")
    os.symlink("nowhere.png", "in/c.png")
    os.mkdir("empty")
    assert denoise("in", "none.png", "empty", "-o", "out") == 1
    out, err = capsys.readouterr()
    assert files("out") == ["in/a.png", "in/z.png"] and len(out.splitlines()) == 2
    assert err.replace(os.sep, "/").splitlines() == [
        "xunit-rs: error: none.png: no such file or folder",
        "xunit-rs: error: empty: no images in this folder",
        "xunit-rs: error: in/b.png: not an image of a known format (PNG, JPEG, TIFF, WebP, ...)",
        "xunit-rs: error: in/c.png: no such file",
        "xunit-rs: 4 failed, 2 done",
    ]


def test_a_result_named_without_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.png")
    assert denoise("a.png", "b.png", "-q") == 1
    assert "no such file or folder; results are named by -o" in one_line(capsys.readouterr().err)


def test_a_folder_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("in/a.png")
    save("in/locked/b.png")
    scan = os.scandir

    def scandir(path: Any) -> Any:  # permissions do not stop root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert denoise("in") == 1
    assert "locked: Permission denied" in capsys.readouterr().err
    assert files("in-denoised") == ["a.png"]


def test_what_exists_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        save(f"in/{name}.png")
    assert denoise("in") == 0
    os.unlink("in-denoised/b.png")
    before = content("in-denoised")
    capsys.readouterr()
    refused("in")
    assert "(and 1 more): already exists" in one_line(capsys.readouterr().err)
    assert denoise("in", "--skip-existing", "--compare", "look") == 0
    out, err = capsys.readouterr()
    assert out.strip() == os.path.join("in-denoised", "b.png")
    assert "2 of 3 results exist already" in one_line(err)
    assert files("look") == ["b.png"]
    assert content("in-denoised").items() > before.items()


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Denoiser, "__call__", lambda *_, **__: pytest.fail("too late"))
    save("in/a.png")
    save("a.png")
    save("b.png")
    Path("x.safetensors").write_text("no network")
    for args, text in [
        (("a.png", "-"), "no other input"),
        (("in", "-o", "-"), "one image file"),
        (("a.png", "b.png", "-o", "-"), "one image file"),
        (("-", "-o", "in"), "in: is a folder"),
        (("a.png", "-o", "-", "--json"), "--json"),
        (("-", "--json"), "--json"),
        (("in", "-o", "a.png"), "is a file"),
        (("a.png", "b.png", "-o", "out.png"), "out.png: names a file"),
        (("in", "--compare", "out.png"), "out.png: names a file"),
        (("in", "-o", "a.png/out"), "a.png is a file"),
        (("a.png", "-o", "none/c.png"), "no such folder"),
        (("a.png", "-o", "c"), f"or c{os.sep} for a new folder"),
        *((("a.png", "-o", f"c{s}"), f"suffix '{s}'") for s in (".gif", ".ico", ".jp2", ".txt")),
        (("a.png", "--compare", "c.gif"), "suffix '.gif'"),
        (("a.png", "--model", "x.pkl"), "xunit-rs convert"),
        (("a.png", "--model", "x.safetensors"), "not a safetensors file"),
        (("a.png", "--model", "none.safetensors"), "no such file"),
    ]:
        refused(*args)
        message = one_line(capsys.readouterr().err)
        assert message.startswith("xunit-rs: error: ") and text in message, args


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        ("--tile", "-1"),
        ("--threads", "x"),
        ("--max-megapixels", "-1"),
        ("--strength", "1.5"),
        ("--strength", "nan"),
        ("--sigma", "much"),
        ("--sigma", "-1"),
        ("--sigma", "inf"),
        ("--sigma", "5", "--model", "gray-blind"),
        ("--overwrite", "--skip-existing"),
        ("-q", "-v"),
    ):
        refused("a.png", *args)
        error = capsys.readouterr().err
        assert error.startswith("usage: xunit-rs denoise") and args[0] in error


def test_the_model_suits_the_image(
    fake_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    for i, mode in enumerate(["L", "RGB", "RGBA", "LA", "I;16"]):
        image = Image.new(mode, (8, 6))
        if mode in ("RGB", "RGBA"):
            image = Image.fromarray(colours[..., : len(mode)])
        Path("in").mkdir(exist_ok=True)
        image.save(f"in/{i}.png")
    save("in/5.png", "RGB")  # three equal planes: grey
    assert denoise("in") == 0
    assert fake_model == ["gray-blind", "color-blind"]  # each is loaded once
    assert len(files("in-denoised")) == 6
    assert capsys.readouterr().err == ""


def test_the_model_suits_the_noise(
    fake_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    noisy = np.rint(128 + 25 * rng.standard_normal((64, 64))).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save("in.png")
    save("flat.png", "L")
    Image.new("L", (2, 2)).save("tiny.png")
    for sigma, models in (("auto", {"gray-sigma25", "gray-blind"}), ("24", {"gray-sigma25"})):
        assert denoise("in.png", "flat.png", "tiny.png", "--sigma", sigma, "--overwrite") == 0
        assert set(fake_model) == models
        fake_model.clear()
        err = capsys.readouterr().err.splitlines()
        how = {"auto": "estimated", "24": "given"}[sigma]
        assert len(err) == (2 if sigma == "auto" else 3)  # of 2×2 pixels nothing is known
        assert all(how in line for line in err) and err[0].endswith("model gray-sigma25")
    assert denoise("in.png", "--sigma", "90", "--overwrite") == 0
    assert "sigma 90.0 given, model gray-blind, trained for 0-55 only" in capsys.readouterr().err
    assert denoise("in.png", "--sigma", "auto", "--overwrite", "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_the_model_suits_colours_at_half_size(
    fake_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    noise = 25 * np.random.default_rng(0).standard_normal((64, 64, 3))
    image = Image.fromarray(np.rint(128 + noise).clip(0, 255).astype(np.uint8))
    image.save("halved.jpg", subsampling=2)
    image.save("whole.jpg", subsampling=0)
    image.convert("L").convert("RGB").save("grey.jpg", subsampling=2)
    for more in ((), ("--strip",), ("--sigma", "auto"), ("--sigma", "20")):
        for name, model in (("halved", "gray-blind"), ("whole", "color-blind")):
            assert denoise(f"{name}.jpg", "--overwrite", *more) == 0
            assert fake_model.pop() == model, (name, more)
    assert denoise("grey.jpg") == 0
    assert fake_model == ["gray-blind"]
    assert "sigma 20.0 given, model gray-blind\n" in capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    save("in/a.png")
    Path("in/b.png").write_text("broken")
    assert denoise("none.png", "in", "--json", "--sigma", "3") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    keys = ["input", "output", "model", "sigma", "megapixels", "seconds", "error"]
    assert [list(line) for line in lines] == [keys] * 3
    missing, done, broken = lines
    assert missing == dict.fromkeys(keys) | {
        "input": "none.png",
        "error": "no such file or folder",
    }
    assert done.pop("seconds") > 0
    source, target = os.path.join("in", "a.png"), os.path.join("in-denoised", "a.png")
    assert done == {
        "input": source,
        "output": target,
        "model": "gray-blind",
        "sigma": 3,
        "megapixels": 48e-6,
        "error": None,
    }
    assert broken["output"] is None and broken["error"].startswith("not an image")


def test_a_dry_run_writes_nothing(
    fake_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save("in/a.png")
    save("in/b.png")
    save("out/b.png")
    before = content()
    args = ("in", "-o", "out", "--compare", "look", "--skip-existing", "--dry-run")
    assert denoise(*args) == 0
    out, err = capsys.readouterr()
    assert out.replace(os.sep, "/") == "in/a.png -> out/a.png, look/a.png\n"
    assert "1 of 2 results exist" in err
    assert denoise(*args, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["output"] == os.path.join("out", "a.png")
    assert denoise("none.png", "--dry-run") == 1
    assert content() == before and fake_model == []


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.png")
    save("b.png")
    assert denoise("a.png", "b.png", "-v") == 0
    first, second, both = capsys.readouterr().err.splitlines()
    assert first.startswith("xunit-rs: a.png: gray-blind, 0.00 MP in ") and "b.png" in second
    assert both.startswith("xunit-rs: 0.0 MP in ")


def test_strength_reaches_the_denoiser() -> None:
    save("a.png")
    assert denoise("a.png", "--strength", "0.5") == 0
    with Image.open("a-denoised.png") as image:
        assert image.getextrema() == (150, 150)


def test_compare() -> None:
    save("a.jpg")
    assert denoise("a.jpg", "--compare", "look.png") == 0
    with Image.open("look.png") as image:
        assert image.width > 3 * 240 and image.info["rms"] == "100.0"
    assert Path("a-denoised.jpg").exists()
    save("b.png")
    assert denoise("a.jpg", "b.png", "-o", "out", "--compare", "look/") == 0
    assert files("look") == ["a.jpg.png", "b.png"]


def test_the_largest_image_that_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    Image.new("1", (1200, 1000)).save("a.png")
    for more in ((), ("--max-megapixels", "1")):
        assert denoise("a.png", *more) == 1
        error = one_line(capsys.readouterr().err)
        assert "a.png: too large: more than 1 megapixels" in error and "--max-megapixels N" in error
    assert files(".") == ["a.png"]
    for limit in ("2", "0"):
        assert denoise("a.png", "--max-megapixels", limit, "--overwrite") == 0
        assert Image.MAX_IMAGE_PIXELS == 500_000


def test_broken_weights_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Darker, "denoise", lambda self, image, *_: image * np.float32(np.nan))
    save("a.png")
    assert denoise("a.png") == 1
    assert "a.png" in one_line(capsys.readouterr().err)
    assert files(".") == ["a.png"]


def test_memory_that_runs_out_fails_one_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry(self: Any, image: Any, *_: Any) -> Any:
        if image.shape[-1] > 8:
            raise MemoryError
        return image

    monkeypatch.setattr(Darker, "denoise", hungry)
    Image.new("L", (9, 9)).save("a.png")
    save("b.png")
    assert denoise("a.png", "b.png", "-o", "out", "-q") == 1
    assert "a.png: out of memory; try --tile 256" in one_line(capsys.readouterr().err)
    assert files("out") == ["b.png"]


def test_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XUNIT_DEBUG", "1")
    Path("a.png").write_text("no image")
    assert denoise("a.png") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "in read" in error
    assert error.splitlines()[-1].startswith("xunit-rs: error: ")
    assert denoise("none.png") == 1
    one_line(capsys.readouterr().err)  # there is no exception to show


def test_names_that_a_terminal_would_obey_or_cannot_show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a\x1b[31m\nσ.png").write_text("no image")
    assert denoise("a\x1b[31m\nσ.png") == 1
    assert "a?[31m σ.png: not an image" in one_line(capsys.readouterr().err)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    save("σ.png")
    assert denoise("σ.png") == 0
    assert raw.getvalue().rstrip() == b"\\u03c3-denoised.png"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = Darker.denoise

    def denoise_(self: Any, image: Any, tile: int, threads: int, progress: Any = None) -> Any:
        asked.append(progress is not None)
        return run(self, image, tile, threads, progress)

    monkeypatch.setattr(Darker, "denoise", denoise_)
    times = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(times)))
    Path("in").mkdir()
    for name in ("a", "b"):
        Image.new("L", (1000, 500)).save(f"in/{name}.png")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert denoise("in") == 0
    text = terminal.getvalue()
    assert "[#####...............] 0/2 images, 0.2 MP, 0.0" in text
    assert "[###############.....] 1/2 images, 0.8 MP" in text and " s left in" in text
    assert text.endswith("\r\x1b[K")
    assert denoise("in", "-q", "--overwrite") == 0
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert denoise("in", "--overwrite") == 0
    assert asked == [True, True, False, False, False, False]


def test_the_bar_of_other_commands() -> None:
    terminal = Terminal()
    with _terminal.Bar(stream=terminal) as bar:
        bar.show(0, 2, "a.png")
        bar.show(1, 2, "b.png" * 100)
    text = terminal.getvalue()
    assert "0/2 a.png" in text and "[##########..........] 1/2 b.png" in text
    assert text.endswith("\r\x1b[K") and len(text) < 200  # a line that wraps stays
    for quiet, stream in ((True, Terminal()), (False, io.StringIO())):
        with _terminal.Bar(quiet=quiet, stream=stream) as bar:
            bar.show(1, 2)
        assert stream.getvalue() == ""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif"])
def test_pipes(suffix: str) -> None:
    save(f"a{suffix}", "RGB")
    data = Path(f"a{suffix}").read_bytes()
    done = command("-", input=data)
    assert done.returncode == 0 and done.stderr == b""
    with Image.open(io.BytesIO(done.stdout)) as image, Image.open(f"a{suffix}") as old:
        assert image.format == (old.format if suffix != ".gif" else "PNG")
        assert image.size == old.size
    done = command("-", "-o", "b.png", "--json", input=data)
    line = json.loads(done.stdout)
    assert (line["input"], line["output"], line["error"]) == ("-", "b.png", None)
    with Image.open("b.png") as image:
        assert image.format == "PNG"


def test_pipes_that_break() -> None:
    save("a.png")
    done = command("-", input=b"")
    assert done.returncode == 1 and done.stdout == b""
    assert "standard input: the file is empty" in one_line(done.stderr.decode())
    if os.path.exists("/dev/full"):
        for args in (("a.png", "-o", "-"), ("a.png",)):
            with open("/dev/full", "wb") as full:
                done = command(*args, stdout=full, stderr=subprocess.PIPE)
            assert done.returncode == 1
            assert "No space left on device" in one_line(done.stderr.decode())
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as gone:
        done = command("a.png", "-o", "-", stdout=gone, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == b""


def test_a_terminal_gets_no_image() -> None:
    pty = pytest.importorskip("pty")
    save("a.png")
    main, terminal = pty.openpty()
    try:
        done = command("a.png", "-o", "-", stdout=terminal, stderr=subprocess.PIPE)
        assert done.returncode == 2 and b"standard output is a terminal" in done.stderr
        done = command("-", stdin=terminal)
        assert done.returncode == 2 and b"standard input is a terminal" in done.stderr
    finally:
        os.close(main)
        os.close(terminal)


def photos(count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    os.mkdir("in")
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(f"in/{i}.png")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP"])
def test_a_batch_that_is_cut_off_goes_on(name: str) -> None:
    photos(8, 200)
    command_ = [sys.executable, "-m", "xunit_rs", "denoise", "in", "-o", "out"]
    with subprocess.Popen(command_, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(getattr(signal, name))
        err = process.communicate(timeout=300)[1].decode()
    whole = [path for path in files("out") if path.endswith(".png")]
    assert 2 <= len(whole) < 8
    rest = set(files("out")) - set(whole)
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
        assert all(path.endswith(".tmp") for path in rest)
        Path("out/.xunit-rs-0123456789abcdef.tmp").write_text("half an image")
    else:
        how = "interrupted" if name == "SIGINT" else "terminated"
        assert process.returncode == 128 + getattr(signal, name) and not rest
        assert f"{how}, {len(whole)} of 8 images done; --skip" in one_line(err)
    before = {path: os.stat(f"out/{path}").st_mtime_ns for path in whole}
    done = command("in", "-o", "out", "--skip-existing")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 8 - len(whole)
    assert {path: os.stat(f"out/{path}").st_mtime_ns for path in whole} == before
    assert files("out") == [f"{i}.png" for i in range(8)]
    assert (b"of a run that was killed" in done.stderr) == (name == "SIGKILL")
    assert command("in", "-o", "again").returncode == 0
    for i in range(8):
        assert Path(f"out/{i}.png").read_bytes() == Path(f"again/{i}.png").read_bytes()


def test_what_others_are_writing_stays() -> None:
    save("in/a.png")
    kept = (".xunit-rs-1.tmp", ".xunit-rs-0123456789abcdef.png", "xunit-rs-0123456789abcdef.tmp")
    os.mkdir("out")
    for name in kept:
        Path("out", name).touch()
    os.symlink("../in/a.png", "out/.xunit-rs-0123456789abcdef.tmp")
    with _files.replacing(Path("out/b.png")) as temporary:
        assert denoise("in", "-o", "out", "--dry-run") == 0 and temporary.exists()
        assert denoise("in", "-o", "out") == 0
        temporary.write_text("whole")
    assert Path("out/b.png").read_text() == "whole"
    assert {*kept, ".xunit-rs-0123456789abcdef.tmp"} < set(os.listdir("out"))
    Path("out/.xunit-rs-fedcba9876543210.tmp").touch()
    assert denoise("in", "-o", "out", "--overwrite", "--dry-run") == 0
    assert Path("out/.xunit-rs-fedcba9876543210.tmp").exists()
    assert denoise("in", "-o", "out", "--overwrite") == 0
    assert not Path("out/.xunit-rs-fedcba9876543210.tmp").exists()


def test_an_image_is_interrupted_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    photos(1, 1500)
    line = [sys.executable, "-m", "xunit_rs", "denoise", "in/0.png", "--threads", "1"]
    pty = pytest.importorskip("pty")
    main, terminal = pty.openpty()
    with subprocess.Popen(line, stderr=terminal) as process:
        os.close(terminal)
        text = b""
        while b"s left" not in text:  # of the one image, so that the network is at work
            text = text[-99:] + os.read(main, 99)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # of a terminal that nobody has open any more
            while more := os.read(main, 999):
                text += more
    os.close(main)
    assert process.returncode == 130
    assert b"interrupted, 0 of 1 images done" in text
    assert files("in") == ["0.png"]


def test_no_torch_and_no_slow_imports() -> None:
    save("a.png")
    code = (
        "import sys; from xunit_rs import cli; status = cli.main(['denoise', 'a.png', '-q'])\n"
        "slow = {'torch', 'xunit_rs.evaluation', 'PIL.ImageDraw', 'importlib.metadata'}\n"
        "print(status, slow & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "0 set()\n", done
