"""The page of `xunit-rs demo`: what it does, its server, and the page in a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from xunit_rs import Denoiser, _demo, cli, images, noise

SAMPLE = Path(__file__).parents[1] / "samples" / "noisy.png"
RNG = np.random.default_rng(0)


@pytest.fixture
def page(tmp_path: Path) -> _demo.Page:
    folder = tmp_path / "page"
    folder.mkdir()
    return _demo.Page(folder)


def scene(*shape: int) -> Any:
    """A smooth picture with noise, in [0, 1]."""
    rows = np.linspace(0.3, 0.7, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return np.clip(rows + RNG.normal(0, 0.1, shape), 0, 1)


def save(path: Path, kind: str, **options: Any) -> Path:
    bits = kind.split(";")[-1]
    if kind in ("RGB;16", "RGBA;16", "RGB;F32"):
        pixels = scene(24, 20, 4 if kind.startswith("RGBA") else 3)
        pixels = pixels.astype(np.float32) if bits == "F32" else (pixels * 65535).astype(np.uint16)
        images.write(images.DeepImage(pixels), path)
        return path
    if kind == "I;16":
        image = Image.fromarray((scene(24, 20) * 65535).astype(np.uint16))
    elif kind == "F":
        image = Image.fromarray(scene(24, 20).astype(np.float32))
    else:
        bands = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "P": (3,)}[kind]
        image = Image.fromarray((scene(24, 20, *bands) * 255).astype(np.uint8))
    image = image.quantize(16) if kind == "P" else image
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "model", "result", "described"),
    [
        ("a.png", "L", "gray-sigma25", "a-denoised.png", "PNG, 8 bits"),
        ("a.b.PNG", "I;16", "auto", "a.b-denoised.PNG", "PNG, 16 bits"),
        ("a.tif", "I;16", "gray-blind", "a-denoised.tif", "TIFF, 16 bits"),
        ("a.tiff", "F", "auto", "a-denoised.tiff", "TIFF, floats"),
        ("a.png", "RGBA;16", "auto", "a-denoised.png", "PNG, 16 bits"),
        ("a.tif", "RGB;16", "color-blind", "a-denoised.tif", "TIFF, 16 bits"),
        ("a.tif", "RGB;F32", "auto", "a-denoised.tif", "TIFF, floats"),
        ("a.jpg", "RGB", "color-blind", "a-denoised.jpg", "JPEG, 8 bits"),
        ("a.webp", "RGBA", "auto", "a-denoised.webp", "WEBP, 8 bits"),
        ("a.png", "LA", "auto", "a-denoised.png", "PNG, 8 bits"),
        ("a.gif", "P", "auto", "a-denoised.png", "PNG, 8 bits"),
    ],
)
def test_the_file_is_that_of_the_denoiser(
    page: _demo.Page, tmp_path: Path, name: str, kind: str, model: str, result: str, described: str
) -> None:
    source = save(tmp_path / name, kind)
    done = page.denoise(source, model, 0.7)
    assert (done.file.name, done.kind) == (result, described)
    if model == "auto":
        model, _ = noise.model_for(images.read(source, deep=True), noise.estimate_sigma(source))
    assert done.model == model
    image = images.read(source, deep=True)
    clean = Denoiser.from_pretrained(model, strength=0.7)(image)
    assert done.file.read_bytes() == images.encode(clean, image.format)
    assert images.read(done.file, deep=True).mode == image.mode


def test_metadata_and_orientation(page: _demo.Page, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "hills", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = save(tmp_path / "a.jpg", "RGB", exif=exif, icc_profile=profile)
    done = page.denoise(source)
    with Image.open(done.file) as image:
        assert dict(image.getexif()) == dict(exif)
        assert image.info["icc_profile"] == profile
    # A browser turns the previews by what they say, and needs no description.
    for preview in (done.before, done.after):
        with Image.open(preview) as image:
            assert (image.format, image.size) == ("JPEG", (20, 24))
            assert dict(image.getexif()) == {0x0112: 6}
            assert image.info["icc_profile"] == profile


def test_previews_show_what_there_is(page: _demo.Page, tmp_path: Path) -> None:
    levels = np.repeat(np.array([[0, 30_000, 65_535]], np.uint16), 8, axis=0).repeat(8, axis=1)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    done = page.denoise(tmp_path / "deep.png", strength=0.0)
    with Image.open(done.before) as image:
        assert [image.getpixel((x, 4)) for x in (2, 12, 22)] == pytest.approx([0, 117, 255], abs=3)
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    done = page.denoise(tmp_path / "clear.png", strength=0.0)
    with Image.open(done.before) as image:
        assert image.mode == "RGB" and image.getextrema() == ((255, 255),) * 3


def test_previews_of_large_images_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "_SHOWN", 100)
    monkeypatch.setattr(_demo, "_LONGEST", 50)
    sizes = [(10, 10, 10, 10), (40, 40, 10, 10), (120, 1, 40, 1)]
    for width, height, *shown in sizes:
        preview = _demo._preview(Image.new("L", (width, height)))
        (tuple_,) = re.findall(rb"\xff\xc0..\x08(....)", preview, re.DOTALL)
        assert [int.from_bytes(tuple_[2:], "big"), int.from_bytes(tuple_[:2], "big")] == shown


def test_figures(page: _demo.Page) -> None:
    done = page.denoise(SAMPLE)
    assert done.sigma == pytest.approx(25, abs=1) and done.model == "gray-sigma25"
    captions, values, remarks = zip(*done.figures, strict=True)
    assert captions == ("Noise, estimated", "Model", "Size", "Time")
    assert values == (f"σ {done.sigma:.1f}", "gray-sigma25", "0.077 MP", f"{done.seconds:.2g} s")
    assert remarks[1:3] == ("auto: made for σ 25", "320 × 240, grey, 8 bits")
    assert remarks[3].endswith("MP/s")


def test_another_strength_asks_no_network(page: _demo.Page) -> None:
    whole, half = (page.denoise(SAMPLE, strength=strength) for strength in (1.0, 0.5))
    assert half.figures[3][2] == "another strength only"
    assert half.figures[1][2] == "auto: made for σ 25; strength 0.5"
    expected = Denoiser.from_pretrained("gray-sigma25", strength=0.5)(SAMPLE)
    assert images.read(half.file).tobytes() == expected.tobytes()
    assert half.file.read_bytes() != whole.file.read_bytes()
    assert page.denoise(SAMPLE, "gray-blind").figures[3][2].endswith("MP/s")


def test_what_is_remembered_has_a_bound(
    page: _demo.Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (save(tmp_path / f"{i}.png", "L") for i in range(2))
    monkeypatch.setattr(_demo, "_REMEMBERED", 24 * 20 * 4)
    turns = [first, second, second, first]
    rates = [page.denoise(path, "gray-blind").figures[3][2] for path in turns]
    assert [rate.endswith("MP/s") for rate in rates] == [True, True, False, True]


def test_an_image_too_small_for_an_estimate(page: _demo.Page, tmp_path: Path) -> None:
    Image.new("L", (2, 9), 100).save(tmp_path / "a.png")
    done = page.denoise(tmp_path / "a.png")
    assert done.sigma is None and done.figures[0][1] == "unknown"


def test_warnings_become_notes(page: _demo.Page, tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = page.denoise(tmp_path / "a.gif")
    assert done.notes == ["a.gif: only the first of its 2 frames is read"]
    assert "first of its 2 frames" in _demo._text(done)


def test_a_page_that_was_closed_ends_its_work(page: _demo.Page) -> None:
    page.stopping.set()
    with pytest.raises(RuntimeError, match="closed"):
        page.denoise(SAMPLE)


def test_names_of_files_are_no_html() -> None:
    text = _demo._error("<b>.png", "<b>.png: <i>bad</i>")
    assert "&lt;b&gt;.png</b>: &lt;i&gt;bad&lt;/i&gt;" in text


# The command.


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert cli.main(["demo", "--no-browser", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in error and "--port" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--port", "65536"], "65536"), (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:")],
)
def test_where_no_server_can_listen(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--no-browser", *arguments]) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_without_gradio_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from xunit_rs import cli; sys.exit(cli.main(['demo', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'xunit-rs[demo]'" in done.stderr and done.stderr.count("\n") == 1


# The server.


@contextlib.contextmanager
def serving(folder: Path, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """Run the command; give its address. At the end it must leave in peace, and no file."""
    pytest.importorskip("gradio")
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "xunit_rs", "demo", "--no-browser", "--port", "0"],
            env=os.environ | {"TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, f"{line}{Path(log.name).read_text()}"
            yield found.group()
            assert process.poll() is None
            assert any(folder.iterdir())
            process.send_signal(end)
            assert process.wait(120) == 0
            assert list(folder.iterdir()) == []
            assert Path(log.name).read_text() == ""
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("files")) as address:
        yield address


@pytest.fixture
def client(url: str, tmp_path: Path) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(
        url, verbose=False, download_files=str(tmp_path / "fetched"), analytics_enabled=False
    )


def test_the_server_denoises(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    source = save(tmp_path / "deep.tif", "I;16")
    (before, after), text, button = client.predict(
        handle_file(source), "gray-blind", 0.5, api_name="/denoise"
    )
    image = images.read(source)
    clean = Denoiser.from_pretrained("gray-blind", strength=0.5)(image)
    file = Path(button["value"] if isinstance(button, dict) else button)
    assert file.name == "deep-denoised.tif"
    assert file.read_bytes() == images.encode(clean, "TIFF")
    assert Path(before).read_bytes() != Path(after).read_bytes()
    assert "gray-blind" in text


def test_results_do_not_pile_up(tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    folder = tmp_path / "files"
    folder.mkdir()
    source = save(tmp_path / "a.png", "L")
    with serving(folder) as address:
        client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
        for strength in (1, 0.9, 0.8, 0.7, 0.6):
            client.predict(gradio_client.handle_file(source), "auto", strength, api_name="/denoise")
        assert len(list(folder.rglob("a-denoised.png"))) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.png", "not an image"),
        ("broken.jpg", "truncated"),
        ("huge.png", "too large: more than 179 megapixels; `xunit-rs denoise --max-megapixels N`"),
    ],
)
def test_bad_files_are_answered(client: Any, tmp_path: Path, name: str, text: str) -> None:
    from gradio_client import handle_file

    path = tmp_path / name
    if name == "notes.png":
        path.write_text("not a picture")
    elif name == "broken.jpg":
        save(path, "RGB")
        path.write_bytes(path.read_bytes()[:-200])
    else:
        Image.new("1", (20_000, 20_000)).save(path)
    pair, message, _ = client.predict(handle_file(path), "auto", 1.0, api_name="/denoise")
    assert pair is None
    assert text in message and name in message and "xu-error" in message


def test_a_terminated_server_removes_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with serving(folder, signal.SIGTERM):
        pass


def test_an_end_in_the_midst_of_work_is_as_clean(tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    folder, source = tmp_path / "files", tmp_path / "large.png"
    folder.mkdir()
    Image.fromarray((scene(2000, 3000) * 255).astype(np.uint8)).save(source)
    with serving(folder) as address:
        client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
        job = client.submit(gradio_client.handle_file(source), "auto", 1.0, api_name="/denoise")
        end = time.monotonic() + 60
        while not (job.status().progress_data or job.done()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not job.done()
    with contextlib.suppress(Exception):  # its server is gone
        job.result(5)


# The browser.


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for name in names if (path := shutil.which(name))), "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = chromium() or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: neither on PATH nor by `playwright install chromium`")
        # Root, as in a container, has no sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=path, args=options)
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    """A page, loaded; it must ask nothing of other servers and have no errors in its scripts."""
    tab = browser.new_page(viewport={"width": 1280, "height": 860})
    tab.set_default_timeout(60_000)
    outside: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: outside.append(request.url))
    # What the policy of the page forbids is not sent; older Gradios try.
    tab.on(
        "requestfailed", lambda request: request.failure == "csp" and outside.remove(request.url)
    )
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector(FILE, state="attached")
    yield tab
    tab.close()
    assert [u for u in outside if not u.startswith((url, "data:", f"blob:{url}"))] == []
    assert errors == []


FILE, DONE = "#file input[type=file]", "#text .xu-figures"


def download(tab: Any, folder: Path) -> Path:
    with tab.expect_download() as event:
        tab.click("#download")
    target = folder / event.value.suggested_filename
    event.value.save_as(target)
    return target


def test_upload_see_and_download(tab: Any, tmp_path: Path) -> None:
    tab.set_input_files(FILE, SAMPLE)
    tab.wait_for_selector(DONE)
    text = tab.inner_text("#text")
    assert "gray-sigma25" in text and "0.077 MP" in text and "σ 25.0" in text
    # Both pictures are there, and have been decoded.
    tab.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#slider img')];"
        "return all.length == 2 && all.every(i => i.complete && i.naturalWidth == 320); }"
    )
    seen = tab.locator("#slider").screenshot(path=tmp_path / "slider.png")
    assert seen
    with Image.open(tmp_path / "slider.png") as shown:
        middle = shown.convert("L").crop((60, 60, shown.width - 60, shown.height - 60))
    left = middle.crop((0, 0, middle.width // 2 - 40, middle.height))
    right = middle.crop((middle.width // 2 + 40, 0, middle.width, middle.height))
    assert noise.estimate_sigma(left) > 3 * noise.estimate_sigma(right)

    file = download(tab, tmp_path)
    assert file.name == "noisy-denoised.png"
    expected = Denoiser.from_pretrained("gray-sigma25")(SAMPLE)
    result = images.read(file)
    assert (result.mode, result.size) == (expected.mode, expected.size)
    assert result.tobytes() == expected.tobytes()


def test_model_and_strength_act_at_once(tab: Any, tmp_path: Path) -> None:
    tab.set_input_files(FILE, SAMPLE)
    tab.wait_for_selector(DONE)
    tab.click("#model input")
    tab.click("text=gray-blind")
    tab.wait_for_selector("#text :text('gray-blind')")
    tab.focus("#strength input[type=range]")
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector("#text :text('strength 0.95')")
    tab.wait_for_timeout(500)  # the new file's address follows the text
    expected = Denoiser.from_pretrained("gray-blind", strength=0.95)(SAMPLE)
    assert images.read(download(tab, tmp_path)).tobytes() == expected.tobytes()


def test_what_is_no_image_is_said_in_the_page(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    tab.set_input_files(FILE, tmp_path / "notes.txt")
    tab.wait_for_selector("#text .xu-error")
    assert "notes.txt: not an image" in tab.inner_text("#text")
    assert tab.locator("#download").is_disabled()
    # The next file is as welcome as the first.
    tab.click("#file button[aria-label*=emove], #file button[aria-label*=lear]")
    tab.wait_for_selector("#text .xu-hint")
    tab.set_input_files(FILE, SAMPLE)
    tab.wait_for_selector(DONE)


def test_the_page_may_ask_no_other_server(tab: Any) -> None:
    directive = tab.evaluate(
        "() => new Promise(done => {"
        "document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        "fetch('http://192.0.2.1/').catch(() => setTimeout(() => done('none'), 1000)); })"
    )
    assert directive == "connect-src"
