"""The command `xunit-rs demo`: a page in the browser, served by Gradio, to try the denoiser in."""

from __future__ import annotations

import argparse
import errno
import hashlib
import html
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from . import images, noise
from .denoise import Denoiser, integer_scale, pretrained_names

__all__ = ["AUTO", "Page", "Result", "add_arguments", "run"]

AUTO = "auto"

_PORT = 7860
_SHOWN = 16e6  # pixels of a preview, which browsers draw without delay
_LONGEST = 16_000  # pixels; beyond it, browsers and JPEG give up
_REMEMBERED = 400e6  # bytes of results kept: three planes of 33 megapixels

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp"}
_KINDS = {"L": "grey", "LA": "grey, alpha", "RGB": "colour", "RGBA": "colour, alpha"}


_Picture = Image.Image | images.DeepImage
Figure = tuple[str, str, str]  # caption, value, remark


@dataclass(frozen=True)
class Result:
    """What the page shows of one image: three files and what there is to say."""

    before: Path  # JPEG, for looking only
    after: Path
    file: Path  # the result, as `xunit-rs denoise` would write it
    kind: str  # its format and depth
    model: str
    sigma: float | None  # estimated, on the scale 0-255; None where the image is too small
    seconds: float
    figures: list[Figure]
    notes: list[str]


class Page:
    """What the page does, without Gradio.

    folder: where the files of results go, each result's in a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stopping = threading.Event()
        self._results: dict[tuple[str, bytes], npt.NDArray[np.float32]] = {}

    def denoise(
        self,
        path: str | os.PathLike[str],
        model: str = AUTO,
        strength: float = 1.0,
        progress: Callable[[float], object] | None = None,
    ) -> Result:
        """Denoise an image file, in its own format and bit depth, metadata kept.

        model: "auto", which is by `noise.model_for`, or the name of a network of the package.
        strength: 0 to 1, as for `Denoiser`.

        Raises what `images.read`, `Denoiser` and `images.encode` raise.
        """
        name = Path(path).name

        def tell(share: float) -> None:
            if self.stopping.is_set():
                raise RuntimeError("the page was closed")
            if progress is not None:
                progress(share)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            image = images.read(path, name, deep=True)
            sigma = _sigma(image)
            remark = "as you chose"
            if model == AUTO:
                model, levels = noise.model_for(image, sigma or 0.0)
                low, high = (f"{level:g}" for level in levels)
                remark = f"auto: made for σ {low}" + (f" to {high}" if high != low else "")
            network = _Remembering(model, self._results)
            start = time.perf_counter()
            clean = Denoiser(network, strength=strength)(image, progress=tell)
            seconds = time.perf_counter() - start
            content = images.encode(clean, image.format)
            file_format = images.encoding(clean, image.format)
        notes = [str(w.message) for w in caught if w.category is UserWarning]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        file = folder / _result_name(name, file_format)
        file.write_bytes(content)
        previews = folder / "before.jpg", folder / "after.jpg"
        for picture, preview in zip((image, clean), previews, strict=True):
            preview.write_bytes(_preview(picture))
        figures = [
            _noise_figure(sigma, _sigma(clean)),
            ("Model", model, remark if strength == 1 else f"{remark}; strength {strength:g}"),
            _size_figure(image),
            _time_figure(image, seconds, network.worked),
        ]
        kind = f"{file_format}, {_depth(clean)}"
        return Result(*previews, file, kind, model, sigma, seconds, figures, notes)


class _Remembering:
    """A network that keeps its last results, so that another strength takes no time."""

    def __init__(self, name: str, results: dict[tuple[str, bytes], Any]) -> None:
        self._name, self._network = name, Denoiser.from_pretrained(name).network
        self._results = results
        self.worked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def denoise(
        self,
        image: npt.NDArray[np.float32],
        tile: int,
        threads: int,
        progress: Callable[[float], object] | None = None,
    ) -> npt.NDArray[np.float32]:
        digest = hashlib.blake2b(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        key = self._name, digest.digest()
        result: npt.NDArray[np.float32] | None = self._results.pop(key, None)
        if result is None:
            self.worked = True
            result = self._network.denoise(image, tile, threads, progress)
            result.flags.writeable = False
        self._results[key] = result
        while sum(kept.nbytes for kept in self._results.values()) > _REMEMBERED:
            del self._results[next(iter(self._results))]
        return result


def _sigma(image: _Picture) -> float | None:
    return noise.estimate_sigma(image) if min(image.size) >= 3 else None


def _result_name(name: str, file_format: str) -> str:
    suffix = Path(name).suffix
    if images.output_format(name) != file_format:
        suffix = _SUFFIXES.get(file_format, ".ppm")
    return f"{Path(name).stem}-denoised{suffix}"


def _noise_figure(before: float | None, after: float | None) -> Figure:
    if before is None or after is None:
        return "Noise", "unknown", "too small an image to tell"
    return "Noise, estimated", f"σ {before:.1f}", f"of 255; afterwards {after:.1f}"


def _size_figure(image: _Picture) -> Figure:
    kind = _KINDS.get(image.mode.split(";")[0], "grey")
    return (
        "Size",
        f"{_megapixels(image):.2g} MP",
        f"{image.width} × {image.height}, {kind}, {_depth(image)}",
    )


def _time_figure(image: _Picture, seconds: float, worked: bool) -> Figure:
    rate = f"{_megapixels(image) / max(seconds, 1e-9):.2g} MP/s"
    return "Time", f"{seconds:.2g} s", rate if worked else "another strength only"


def _megapixels(image: _Picture) -> float:
    return image.width * image.height / 1e6


def _depth(image: _Picture) -> str:
    if "F" in image.mode:
        return "floats"
    return "16 bits" if image.mode == "I" or ";16" in image.mode else "8 bits"


def _preview(image: _Picture) -> bytes:
    """A JPEG file to show in a browser, turned and in the colours that the metadata ask for."""
    pixels = images.pixels(image)
    height, width = pixels.shape[:2]
    step = max(1, round((height * width / _SHOWN) ** 0.5), -(-max(height, width) // _LONGEST))
    pixels = pixels[::step, ::step]  # means would hide the noise, which is what is looked at
    share = np.clip(pixels / np.float32(integer_scale(pixels)), 0, 1)
    shown = Image.fromarray(np.ascontiguousarray(np.rint(share * 255).astype(np.uint8)))
    if shown.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(white, shown.convert("RGBA")).convert(shown.mode[:-1])
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF data raise whatever; the picture can be seen all the same
        orientation = None
    if orientation:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        shown.info["exif"] = exif.tobytes()
    if "icc_profile" in image.info:
        shown.info["icc_profile"] = image.info["icc_profile"]
    return images.encode(shown, "JPEG")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=_PORT, help="0 = any that is free (default: %(default)s)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


def run(args: argparse.Namespace) -> int:
    host = args.host.strip("[]")
    port = _free_port(host, args.port)
    # A process that is terminated removes its files, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="xunit-rs-demo-", ignore_cleanup_errors=True) as folder:
        # Gradio reads these when it is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_RUN_HISTORY"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio as gr
            from starlette.middleware import Middleware  # which comes with it
        except ImportError as error:
            raise RuntimeError(
                f"`demo` needs Gradio: pip install 'xunit-rs[demo]' ({error})"
            ) from None
        page = Page(Path(folder))
        blocks = _blocks(gr, page)
        try:
            _, url, _ = blocks.launch(
                server_name=f"[{host}]" if ":" in host else host,  # as in an address
                server_port=port,
                inbrowser=not args.no_browser,
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                theme=_theme(gr),
                css=_CSS,
                app_kwargs={"middleware": [Middleware(_OwnOnly)]},
            )
            print(f"The page is at {url} - Ctrl-C ends it.", flush=True)
            while True:  # a signal that another thread took does not wake this one
                time.sleep(0.2)
        except KeyboardInterrupt:
            print()
        finally:
            page.stopping.set()
            blocks.close(verbose=False)
    return 0


class _OwnOnly:
    """ASGI middleware: the page asks nothing of other servers, whatever Gradio's scripts want."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY)
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await self.app(scope, receive, answer)


def _free_port(host: str, port: int) -> int:
    """The port, or any that is free for 0; raises OSError if it cannot be listened on."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = "the port is in use; choose another with --port"
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from None


def _blocks(gr: Any, page: Page) -> Any:
    bar = gr.Progress()

    def denoise(
        path: str | None, model: str, strength: float, folders: list[str], progress: Any = bar
    ) -> tuple[Any, ...]:
        _remove(folders[:-2])  # the browser may still be fetching those
        folders = folders[-2:]
        none = gr.DownloadButton(_DOWNLOAD, value=None, interactive=False)
        if path is None:
            return None, _WELCOME, none, folders
        try:
            result = page.denoise(
                path, model, strength, lambda share: progress(share, desc="Denoising")
            )
        except Exception as error:  # whatever decoders and encoders raise: the page says it
            if os.environ.get("XUNIT_DEBUG", "0") != "0":
                traceback.print_exc()
            text = "out of memory" if isinstance(error, MemoryError) else str(error)
            if isinstance(error, images.TooLargeError):
                limit = f"{images.size_limit():.4g} megapixels"
                more = "`xunit-rs denoise --max-megapixels N` takes larger ones"
                text = f"too large: more than {limit}; {more}"
            return None, _error(Path(path).name, text or type(error).__name__), none, folders
        label = f"{_DOWNLOAD} ({result.kind})"
        button = gr.DownloadButton(label, value=str(result.file), interactive=True)
        pair = str(result.before), str(result.after)
        return pair, _text(result), button, [*folders, str(result.file.parent)]

    with gr.Blocks(title="xunit-rs", analytics_enabled=False) as blocks:
        gr.HTML(_TITLE)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                # Of any type, as the reader knows better what is an image, and says why not.
                file = gr.File(label="Image", height=150, elem_id="file")
                model = gr.Dropdown(
                    [AUTO, *pretrained_names()],
                    value=AUTO,
                    label="Model",
                    info="auto: by the noise that is found",
                    elem_id="model",
                )
                strength = gr.Slider(
                    0,
                    1,
                    value=1,
                    step=0.05,
                    label="Strength",
                    info="1: all of the noise goes",
                    elem_id="strength",
                )
                button = gr.DownloadButton(
                    _DOWNLOAD, variant="primary", interactive=False, elem_id="download"
                )
            with gr.Column(scale=3, min_width=400):
                slider = gr.ImageSlider(
                    label="Before and after",
                    max_height=620,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="slider",
                )
                text = gr.HTML(_WELCOME, elem_id="text")
        folders = gr.State([], delete_callback=_remove)
        gr.on(
            # Not strength.release, which keys do not cause.
            [file.change, model.input, strength.change],
            denoise,
            [file, model, strength, folders],
            [slider, text, button, folders],
            api_name="denoise",
            trigger_mode="always_last",
            concurrency_limit=1,
            show_progress_on=[slider],
        )
    return blocks


def _remove(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _text(result: Result) -> str:
    cards = "".join(
        f"<div><span>{html.escape(caption)}</span><b>{html.escape(value)}</b>"
        f"<small>{html.escape(remark)}</small></div>"
        for caption, value, remark in result.figures
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in result.notes)
    return f'<div class="xu-figures">{cards}</div><div class="xu-notes">{notes}</div>'


def _error(name: str, text: str) -> str:
    text = text.removeprefix(f"{name}: ")
    return (
        f'<div class="xu-error" role="alert"><b>{html.escape(name)}</b>: {html.escape(text)}</div>'
    )


def _theme(gr: Any) -> Any:
    # Fonts of the system: Gradio's own come from its server, others' from the internet.
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # Gradio's own are too pale to read
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
    )


_DOWNLOAD = "Download"
_WELCOME = (
    '<div class="xu-hint">Drop a photo on the left: PNG, JPEG, TIFF or WebP, grey or colour. What '
    "you get back has the same format, depth and metadata.</div>"
)
_TITLE = (
    '<div class="xu-title"><h1>xunit-rs</h1>'
    "<p>Takes the noise out of photos, on this machine: no image leaves it.</p></div>"
)
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_CSS = """
.html-container { padding: 0 !important; }
.xu-title { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1em; }
.xu-title h1 { margin: 0; font-size: 1.6rem; }
.xu-title p, .xu-hint, .xu-notes { margin: 0; color: var(--body-text-color-subdued); }
.xu-figures {
    display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
}
.xu-figures div {
    display: flex; flex-direction: column; padding: 10px 14px; border-radius: 8px;
    background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
}
.xu-figures b { font-size: 1.2rem; overflow-wrap: anywhere; }
.xu-figures span, .xu-figures small { color: var(--body-text-color-subdued); }
#slider .empty { min-height: 420px; }
.xu-notes p { margin: 8px 0 0; }
.xu-error {
    padding: 10px 14px; border-radius: 8px; overflow-wrap: anywhere;
    color: var(--error-text-color); background: var(--error-background-fill);
    border: 1px solid var(--error-border-color);
}
"""
