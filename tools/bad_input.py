"""Bad input to every layer, and what comes of it: one table, input → exception: message.

    python tools/bad_input.py [PATTERN]

Every case must raise the exception it names, with that text in the message, or, where the input is
odd but right, give what its check compares it with. tests/test_bad_input.py runs the same cases.
Needs PyTorch. Exits with 1 if a case comes out otherwise.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from xunit_rs import Denoiser, _core, cli, functional, images, models, modules, reference
from xunit_rs import checkpoints as checkpoint_files


class Exit1(Exception):
    """A command that failed: it ended with 1 and one line on stderr."""


class Exit2(Exception):
    """A command that was refused, with one line on stderr."""


class Case(NamedTuple):
    """What is put in; a function of an empty folder that does it; what is to come of it."""

    section: str
    name: str
    run: Callable[[Path], Any]
    error: type[Exception] | None
    text: str = ""


CASES: list[Case] = []
Runner = Callable[[Path], Any]


def case(
    section: str, name: str, error: type[Exception] | None, text: str = ""
) -> Callable[[Runner], Runner]:
    """Register a function as a case. Without an error it returns a word on its result."""

    def register(run: Runner) -> Runner:
        CASES.append(Case(section, name, run, error, text))
        return run

    return register


_error: type[Exception]  # of the loops below


def add(section: str, name: str, error: type[Exception], text: str, run: Runner) -> None:
    """Register a case that raises."""
    CASES.append(Case(section, name, run, error, text))


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Runner:
    """The case of calling a function, which needs no folder."""
    return lambda _: function(*args, **options)


# Files of networks


def tiny_network(channels: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of an xDnCNN of 2021: one block, two features."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "blocks.0.conv.weight": (2, channels, 3, 3),
        "blocks.0.conv.bias": (2,),
        "blocks.0.xunit.features.0.weight": (2, 1, 3, 3),
        "blocks.0.xunit.features.0.bias": (2,),
        "tail.weight": (channels, 2, 5, 5),
        "tail.bias": (channels,),
    }
    for norm, size in (("blocks.0.norm", channels), ("blocks.0.xunit.features.1", 2)):
        shapes |= {f"{norm}.{k}": (size,) for k in ("weight", "bias", "running_mean")}
        shapes[f"{norm}.running_var"] = (size,)
    tensors = {k: rng.uniform(0.1, 0.2, shape).astype(np.float32) for k, shape in shapes.items()}
    return tensors, {"format": "xunit-rs", "architecture": "xdncnn-2021"}


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def network_bytes(
    change: Callable[[dict[str, Any], dict[str, str]], object] = lambda *_: None,
    change_header: Callable[[dict[str, Any]], object] = lambda _: None,
) -> bytes:
    """The tiny network as a file, after changes to its content or its layout."""
    tensors, metadata = tiny_network()
    change(tensors, metadata)
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    kinds = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64"}
    for key, value in tensors.items():
        start, data = len(data), data + value.tobytes()
        header[key] = {
            "dtype": kinds[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [start, len(data)],
        }
    change_header(header)
    return safetensors(header, data)


def save_network(folder: Path, data: bytes | None = None) -> Path:
    path = folder / "net.safetensors"
    path.write_bytes(network_bytes() if data is None else data)
    return path


def identity() -> Any:
    class Identity:
        channels = 1

        def denoise(self, image: Any, tile: int, threads: int) -> Any:
            return image

    return Identity()


def _load(name: str, data: bytes) -> Runner:
    def run(folder: Path) -> Any:
        (folder / name).write_bytes(data)
        return Denoiser.from_pretrained(folder / name)

    return run


WEIGHT, TAIL = "blocks.0.conv.weight", "tail.bias"
LAST = "blocks.0.xunit.features.1.running_var"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"this is no network, only text", "not a safetensors file"),
    "header of 2^63 bytes": (b"\xff" * 7 + b"\x7f{}", "not a safetensors file"),
    "header longer than the file": (b"\x40" + b"\0" * 7 + b"{}", "not a safetensors file"),
    "header that is no JSON": (safetensors(b"{]"), "not a safetensors file"),
    "header that is no UTF-8": (safetensors(b'{"\xff": 1}'), "not a safetensors file"),
    "header nested 100000 deep": (safetensors(b"[" * 100_000), "not a safetensors file"),
    "truncated in its data": (network_bytes()[:-3], "not a safetensors file"),
    "bytes after its data": (network_bytes() + b"more", "not a safetensors file"),
    "offsets beyond the file": (
        network_bytes(change_header=lambda h: h[LAST].update(data_offsets=[0, 1 << 40])),
        "not a safetensors file",
    ),
    "offsets that overflow": (
        network_bytes(change_header=lambda h: h[LAST].update(data_offsets=[0, 2**64 - 1])),
        "not a safetensors file",
    ),
    "offsets backwards": (
        network_bytes(change_header=lambda h: h[LAST].update(data_offsets=[8, 0])),
        "not a safetensors file",
    ),
    "two tensors on the same bytes": (
        network_bytes(change_header=lambda h: h[LAST].update(h[TAIL])),
        "not a safetensors file",
    ),
    "a shape that overflows": (
        network_bytes(change_header=lambda h: h[WEIGHT].update(shape=[2**32, 2**32, 3, 3])),
        "not a safetensors file",
    ),
    "a negative extent": (
        network_bytes(change_header=lambda h: h[WEIGHT].update(shape=[-2, 1, 3, 3])),
        "not a safetensors file",
    ),
    "no tensors": (safetensors({"__metadata__": {"format": "xunit-rs"}}), "architecture"),
    "a format of others": (
        network_bytes(lambda t, m: m.update(format="else")),
        "format must be",
    ),
    "an unknown architecture": (
        network_bytes(lambda t, m: m.update(architecture="unet")),
        "unknown architecture",
    ),
    "metadata against the shapes": (
        network_bytes(lambda t, m: m.update(features="64")),
        "features",
    ),
    "a depth of a billion": (network_bytes(lambda t, m: m.update(depth="1000000000")), "depth"),
    "a missing tensor": (network_bytes(lambda t, m: t.pop(TAIL)), TAIL),
    "a tensor too many": (
        network_bytes(lambda t, m: t.update({"extra": np.zeros(3, np.float32)})),
        "unexpected tensor",
    ),
    "a wrong shape": (
        network_bytes(lambda t, m: t.update({TAIL: np.zeros(3, np.float32)})),
        TAIL,
    ),
    "an empty tensor": (
        network_bytes(lambda t, m: t.update({WEIGHT: np.zeros((0, 1, 3, 3), np.float32)})),
        WEIGHT,
    ),
    "float16 weights": (
        network_bytes(lambda t, m: t.update({TAIL: np.zeros(1, np.float16)})),
        "F32 or F64",
    ),
    "an even kernel": (
        network_bytes(
            lambda t, m: t.update(
                {"blocks.0.xunit.features.0.weight": np.zeros((2, 1, 4, 4), np.float32)}
            )
        ),
        "odd",
    ),
}
for _name, (_data, _text) in HOSTILE.items():
    add("network file", f"safetensors: {_name}", ValueError, _text, _load("a.safetensors", _data))
for _name, _error, _text in (
    ("net.pkl", ValueError, "xunit-rs convert"),
    ("net.pt", ValueError, "xunit-rs convert"),
    ("none.safetensors", FileNotFoundError, "no such file"),
    ("nobody", ValueError, "unknown model 'nobody'"),
):
    add(
        "network file",
        f"{_name} given to Denoiser",
        _error,
        _text,
        call(Denoiser.from_pretrained, _name),
    )


@case("network file", "a folder given to Denoiser", OSError, "not a regular file")
def _(folder: Path) -> Any:
    return Denoiser.from_pretrained(_folder(folder / "dir.safetensors"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


class _Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def _load_checkpoint(value: Callable[[Path], bytes]) -> Runner:
    def run(folder: Path) -> Any:
        (folder / "net.pkl").write_bytes(value(folder / "unpickled"))
        try:
            return checkpoint_files.load(folder / "net.pkl")
        finally:
            assert not (folder / "unpickled").exists(), "code was run"

    return run


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


for _name, _content, _text in (
    (
        "a pickle that runs code",
        lambda path: pickle.dumps(_Evil(path), protocol=2),
        "plain tensors",
    ),
    ("a torch file that runs code", lambda path: _saved({"a": _Evil(path)}), "plain tensors"),
    ("empty", lambda _: b"", "not a PyTorch file"),
    ("text", lambda _: b"no network", "not a PyTorch file"),
    ("truncated", lambda _: _saved({"a": torch.zeros(999)})[:-600], "not a PyTorch file"),
    ("a list", lambda _: _saved([torch.zeros(3)]), "not a state dict"),
    ("other keys", lambda _: _saved({"a": torch.zeros(3)}), "not a network we know"),
):
    add("network file", f"checkpoint: {_name}", ValueError, _text, _load_checkpoint(_content))


# Arrays given to the Denoiser


_IMAGES: tuple[tuple[str, Any, type[Exception], str], ...] = (
    ("a list", [[0.0]], TypeError, "list"),
    ("dtype int32", np.zeros((4, 4), np.int32), TypeError, "int32"),
    ("dtype bool", np.zeros((4, 4), bool), TypeError, "bool"),
    ("dtype complex64", np.zeros((4, 4), np.complex64), TypeError, "complex64"),
    ("dtype object", np.zeros((4, 4), object), TypeError, "object"),
    ("masked array", np.ma.zeros((4, 4)), TypeError, "masked"),
    ("rank 1", np.zeros(4), ValueError, "(4,)"),
    ("rank 4", np.zeros((1, 4, 4, 3)), ValueError, "(1, 4, 4, 3)"),
    ("5 channels", np.zeros((4, 4, 5)), ValueError, "(4, 4, 5)"),
    ("zero height", np.zeros((0, 4)), ValueError, "(0, 4)"),
    ("zero channels", np.zeros((4, 4, 0)), ValueError, "(4, 4, 0)"),
    ("NaN", np.array([[0.5, np.nan]]), ValueError, "1 non-finite"),
    ("infinity", np.array([[np.inf, -np.inf]]), ValueError, "2 non-finite"),
    ("floats of 0 to 255", np.array([[0.0, 200.0]]), ValueError, "0..200"),
    ("PIL image CMYK", Image.new("CMYK", (4, 4)), ValueError, "CMYK"),
    ("PIL image of no pixels", Image.new("L", (0, 4)), ValueError, "empty"),
)
for _name, _image, _error, _text in _IMAGES:
    add("Denoiser", _name, _error, _text, call(Denoiser(identity()), _image))
add(
    "Denoiser",
    "tile -1",
    ValueError,
    "tile must be 0 or more, got -1",
    call(Denoiser, identity(), tile=-1),
)
add(
    "Denoiser",
    "threads 1.5",
    TypeError,
    "threads must be an integer, got 1.5",
    call(Denoiser, identity(), threads=1.5),
)


def layouts(image: Any) -> Iterator[tuple[str, Any]]:
    """The same values in other memory layouts."""
    record = np.zeros(image.shape, np.dtype([("pad", "u1"), ("v", image.dtype)]))
    record["v"] = image
    raw = np.zeros(image.nbytes + 1, np.uint8)[1:].view(image.dtype).reshape(image.shape)
    raw[...] = image
    yield "Fortran order", np.asfortranarray(image)
    yield "negative strides", np.ascontiguousarray(image[::-1])[::-1]
    yield "byte-swapped", image.astype(image.dtype.newbyteorder())
    yield "misaligned", raw
    yield "packed record field", record["v"]


PICTURE = np.random.default_rng(0).random((9, 7)).astype(np.float32)
for _name, _image in layouts(PICTURE):

    @case("Denoiser", _name, None)
    def _(folder: Path, image: Any = _image) -> str:
        denoiser = Denoiser.from_pretrained(save_network(folder))
        np.testing.assert_array_equal(denoiser(image), denoiser(PICTURE))
        return "as the contiguous array"


@case("Denoiser", "1×1 image", None)
def _(folder: Path) -> str:
    result = Denoiser.from_pretrained(save_network(folder))(np.full((1, 1), 128, np.uint8))
    assert result.shape == (1, 1) and result.dtype == np.uint8
    return "denoised"


@case("Denoiser", "float16 image", None)
def _(folder: Path) -> str:
    result = Denoiser.from_pretrained(save_network(folder))(PICTURE.astype(np.float16))
    assert result.dtype == np.float16
    return "denoised, float16"


# The command line


def command(line: str) -> Runner:
    """Run a command in the case's folder, which must stay as it is; its error must be one line."""

    def run(folder: Path) -> Any:
        save_network(folder)
        make_files(folder)
        before = snapshot(folder)
        arguments = line.split()
        if arguments[0] in ("denoise", "eval") and "--model" not in arguments:
            arguments += ["--model", "net.safetensors"]
        stdout, stderr = io.StringIO(), io.StringIO()
        home = Path.cwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                code = cli.main(arguments)
        finally:
            os.chdir(home)
        assert snapshot(folder) == before, "files were changed"
        error = stderr.getvalue()
        assert (stdout.getvalue(), error.count("\n")) == ("", 1) and code in (1, 2), (code, error)
        raise (Exit1 if code == 1 else Exit2)(error.removeprefix("xunit-rs: error: ").strip())

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def make_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 30, 4)).astype(np.uint8))
    image.save(folder / "alpha.png")
    image.convert("L").save(folder / "good.png")
    image.convert("RGB").save(folder / "whole.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    for name, source in (("cut.png", "good.png"), ("cut.jpg", "whole.jpg")):
        data = (folder / source).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "huge.png").write_bytes(png(1 << 20, 1 << 20, b""))
    (folder / "zero.png").write_bytes(png(0, 5, b""))
    (folder / "lying.png").write_bytes(png(50, 50, zlib.compress(b"\0" * 9)))
    bomb = zlib.compress(b"a" * 4_000_000)
    (folder / "text-bomb.png").write_bytes(png(2, 2, zlib.compress(b"\0" * 6), b"k\0\0" + bomb))
    (folder / "folder").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "net.pkl").write_bytes(b"anything")
    (folder / "bad.safetensors").write_bytes(b"anything")
    (folder / "lying.safetensors").write_bytes(HOSTILE["offsets beyond the file"][0])
    models.XDenseNet(1, 3, (1,), 2).save(folder / "dense.safetensors")
    frames = [image.convert("RGB"), image.convert("RGB").rotate(180)]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    Image.new("L", (65536, 3)).save(folder / "wide.png")


def png(width: int, height: int, pixels: bytes, text: bytes | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + b"\x08\0\0\0\0")
        + (b"" if text is None else chunk(b"zTXt", text))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


for _error, _lines in (
    (
        Exit1,
        (
            ("denoise none.png", "none.png: no such file"),
            ("denoise text.png", "text.png: not an image"),
            ("denoise empty.jpg", "empty.jpg: the file is empty"),
            ("denoise cut.png", "cut.png: damaged or truncated"),
            ("denoise cut.jpg", "cut.jpg: damaged or truncated"),
            ("denoise lying.png", "lying.png: damaged or truncated"),
            ("denoise zero.png", "zero.png"),
            ("denoise huge.png", "huge.png: too large: more than 179 megapixels"),
            ("denoise huge.png --max-megapixels 200", "too large: more than 200 megapixels"),
            ("denoise text-bomb.png", "text-bomb.png"),
            ("denoise cmyk.jpg", "mode CMYK"),
            ("denoise moving.gif", "moving.gif: an animation of 2 frames"),
            ("denoise moving.webp", "moving.webp: an animation of 2 frames"),
            ("denoise moving.png", "moving.png: an animation of 2 frames"),
            ("denoise folder.png", "no images in this folder"),
            ("denoise folder", "no images in this folder"),
            ("denoise alpha.png -o out.jpg", "JPEG cannot store mode RGBA"),
            ("denoise wide.png -o out.jpg", "more than 65500 pixels a side, got 65536×3"),
            ("denoise wide.png -o out.webp", "more than 16383 pixels a side, got 65536×3"),
            ("convert net.pkl out.safetensors", "not a PyTorch file"),
            ("convert none.pkl out.safetensors", "no such file"),
            ("convert net.safetensors bad.safetensors", "exists"),
            ("eval --data none", "no such folder"),
            ("eval --data folder", "no images"),
            ("eval --data folder --sigma nan", "sigma"),
            ("train --data none --out run", "no such folder"),
            ("train --data folder --out run", "no images"),
            ("train --data folder --out run --lr -1", "lr"),
        ),
    ),
    (
        Exit2,
        (
            ("denoise good.png -o good.png", "is the input itself"),
            ("denoise good.png -o alpha.png", "already exists"),
            ("denoise good.png alpha.png -o .", "is the input itself"),
            ("denoise good.png ./good.png -o out", "good.png: would hold what is made of"),
            ("denoise good.png -o none/out.png", "no such folder"),
            ("denoise good.png -o out.txt", "suffix '.txt'"),
            ("denoise good.png -o text.png/out.png", "no such folder"),
            ("denoise folder -o good.png", "is a file"),
            ("denoise good.png --model net.pkl", "xunit-rs convert"),
            ("denoise good.png --model bad.safetensors", "not a safetensors file"),
            ("denoise good.png --model lying.safetensors", "not a safetensors file"),
            ("denoise good.png --model dense.safetensors", "xdensenet"),
            ("denoise good.png --model none.safetensors", "no such file"),
        ),
    ),
):
    for _arguments, _text in _lines:
        add("command line", _arguments, _error, _text, command(_arguments))


@case("command line", "denoise good.png -o folder/out.png: no permission", Exit2, "not writable")
def _(folder: Path) -> Any:
    # What os.access says of a folder without permission; the real bits do not stop root.
    with mock.patch.object(os, "access", lambda path, mode: Path(path).name != "folder"):
        command("denoise good.png -o folder/out.png")(folder)


def batch(folder: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run `xunit-rs denoise` in a process of its own; return its status, stdout and stderr."""
    line = [*prefix, sys.executable, "-m", "xunit_rs", "denoise", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


BATCH = "denoise a folder"


@case(BATCH, "all of the above beside good ones", None)
def _(folder: Path) -> str:
    make_files(_folder(folder / "in"))
    code, _, stderr = batch(folder, "in", "-o", "out")
    good = {"alpha.png", "good.png", "whole.jpg", "wide.png"}
    assert (code, names(folder / "out")) == (1, good), stderr
    *lines, last = stderr.splitlines()
    bad = {name for name in names(folder / "in") - good if images.is_image_name(name)}
    assert {line.split(": ")[2] for line in lines} == {f"in/{name}" for name in bad}, stderr
    assert last == f"xunit-rs: {len(bad)} failed, 4 done"
    return f"exit 1, {len(bad)} named, 4 done"


@case(BATCH, "that cannot be read, inside another", None)
def _(folder: Path) -> str:
    make_files(_folder(folder / "in"))
    photographs(_folder(folder / "in" / "locked"), 1)
    for path in (folder / "in").glob("*.*"):
        if path.name not in ("good.png", "locked"):
            path.unlink() if path.is_file() else path.rmdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:  # the real bits do not stop root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    shown = io.StringIO()
    with (
        mock.patch.object(os, "scandir", scandir),
        contextlib.redirect_stderr(shown),
        contextlib.redirect_stdout(shown),
    ):
        code = cli.main(["denoise", str(folder / "in"), "-o", str(folder / "out")])
    assert "locked: Permission denied" in shown.getvalue()
    assert (code, names(folder / "out")) == (1, {"good.png"})
    return "exit 1, named, the rest done"


@case(BATCH, "whose results go into itself, twice", None)
def _(folder: Path) -> str:
    photographs(_folder(folder / "in"), 2)
    for _ in range(2):
        code, _, stderr = batch(folder, "in", "-o", "in/out", "--overwrite")
        assert (code, names(folder / "in" / "out")) == (0, {"0.png", "1.png"}), stderr
    return "exit 0, the results are not denoised again"


@case(BATCH, "to a disk of 1 MB", None)
def _(folder: Path) -> str:
    photographs(_folder(folder / "in"), 3)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (500, 900, 3), np.uint8)).save(folder / "in" / "1.png")
    _folder(folder / "disk")
    # A disk that only the command and its children see, so that none is left behind.
    mount = 'mount -t tmpfs -o size=1m tmpfs disk && "$@"; code=$?; ls -A disk; exit $code'
    private = ("unshare", *(() if os.geteuid() == 0 else ("-r",)), "--mount")
    try:
        subprocess.run((*private, "sh", "-c", mount, "-", "true"), cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not tried: no right to mount a disk"
    shell = (*private, "sh", "-c", mount, "-")
    code, stdout, stderr = batch(folder, "in", "-o", "disk", "--strength", "0.1", prefix=shell)
    assert "1.png: cannot be written (No space left on device)" in stderr, stderr
    lines = ["disk/0.png", "disk/2.png", "0.png", "2.png"]
    assert (code, stdout.splitlines()) == (1, lines), (stdout, stderr)
    return "exit 1, named, the smaller ones done, no part of a file left"


for _signal, _code in (("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 143)):

    @case(BATCH, f"{_signal} in the middle, then --skip-existing", None)
    def _(folder: Path, name: str = _signal, code: int = _code) -> str:
        photographs(_folder(folder / "in"), 12)
        line = [sys.executable, "-m", "xunit_rs", "denoise", "in", "-o", "out"]
        with subprocess.Popen(
            line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(getattr(signal, name))
            process.stdout.read()
        assert process.returncode == code, process.returncode
        done = {path for path in names(folder / "out") if path.endswith(".png")}
        assert 1 <= len(done) < 12
        status, stdout, stderr = batch(folder, "in", "-o", "out", "--skip-existing")
        assert (status, stdout.count("\n")) == (0, 12 - len(done)), stderr
        assert all(path.endswith(".png") for path in names(folder / "out"))
        assert batch(folder, "in", "-o", "whole")[0] == 0
        for path in (folder / "whole").iterdir():
            assert path.read_bytes() == (folder / "out" / path.name).read_bytes(), path.name
        return f"exit {code}, whole files only, the rest done then"


def photographs(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (96, 96), np.uint8)).save(folder / f"{i}.png")


@case("images", "write over a directory", images.ImageError, "is a directory")
def _(folder: Path) -> Any:
    images.write(Image.new("L", (2, 2)), _folder(folder / "a.png"), overwrite=True)


# The layers


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


KERNEL = t(4, 1, 3, 3)
FLOAT16, FLOAT64, INT32 = torch.float16, torch.float64, torch.int32
UNIT_NAMES = ("xUnit", "xUnitS", "xUnitD")


def unit(name: str = "xUnit", **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(modules, name)(4, 3, **options)


for _name, _error, _text, _args in (
    ("rank 2", ValueError, "(4, 5)", (t(4, 5), KERNEL)),
    ("rank 5", ValueError, "(1, 1, 4, 5, 5)", (t(1, 1, 4, 5, 5), KERNEL)),
    ("3 channels for 4", ValueError, "has 3", (t(2, 3, 5, 5), KERNEL)),
    ("weight of rank 3", ValueError, "(4, 3, 3)", (t(2, 4, 5, 5), t(4, 3, 3))),
    ("weight (4, 2, 3, 3)", ValueError, "(4, 2, 3, 3)", (t(2, 4, 5, 5), t(4, 2, 3, 3))),
    ("kernel of no taps", ValueError, "(4, 1, 0, 3)", (t(2, 4, 5, 5), t(4, 1, 0, 3))),
    ("bias of 3 for 4", ValueError, "(3,)", (t(2, 4, 5, 5), KERNEL, t(3))),
    ("kernel larger than the image", ValueError, "larger", (t(1, 4, 2, 2), KERNEL)),
    ("zero-size plane", ValueError, "(1, 4, 0, 5)", (t(1, 4, 0, 5), KERNEL)),
    ("stride 0", ValueError, "stride", (t(1, 4, 5, 5), KERNEL, None, 0)),
    ("padding -1", ValueError, "-1", (t(1, 4, 5, 5), KERNEL, None, 1, -1)),
    ("padding 'full'", ValueError, "full", (t(1, 4, 5, 5), KERNEL, None, 1, "full")),
    ("dilation 0", ValueError, "dilation", (t(1, 4, 5, 5), KERNEL, None, 1, 0, 0)),
    ("int input", TypeError, "int32", (t(1, 4, 5, 5, dtype=INT32), KERNEL)),
):
    add(
        "functional.depthwise_conv2d",
        _name,
        _error,
        _text,
        call(functional.depthwise_conv2d, *_args),
    )


def _refused_by_both(*arguments: Any) -> Any:
    """Raise what the fast path raises, having seen plain PyTorch refuse the same."""
    try:
        reference.depthwise_conv2d(*arguments)
    except Exception:  # whatever it is called there
        return functional.depthwise_conv2d(*arguments)
    raise AssertionError("PyTorch takes it")


@case("functional.depthwise_conv2d", "x float32, weight float64", Exception, "")
def _(folder: Path) -> Any:
    return _refused_by_both(t(1, 4, 5, 5), KERNEL.double())


@case("functional.depthwise_conv2d", "x float16, weight float32", Exception, "")
def _(folder: Path) -> Any:
    return _refused_by_both(t(1, 4, 5, 5, dtype=FLOAT16), KERNEL)


add(
    "functional.depthwise_conv2d",
    "padding to 2^50 bytes",
    MemoryError,
    "bytes",
    call(
        functional.depthwise_conv2d,
        t(1, 1, 1, 1),
        t(1, 1, 1, 1),
        stride=1 << 23,
        padding=1 << 23,
        backend="rust",
    ),
)


@case("functional.depthwise_conv2d", "x float16, weight float16", None)
def _(folder: Path) -> str:
    x, weight = t(1, 4, 5, 5, dtype=FLOAT16), KERNEL.half()
    y = functional.depthwise_conv2d(x, weight, padding=1)
    assert y.dtype == FLOAT16
    wide = reference.depthwise_conv2d(x.double(), weight.double(), padding=1)
    torch.testing.assert_close(y.double(), wide, rtol=2e-3, atol=2e-3)
    return "float16, as PyTorch"


@case("functional.depthwise_conv2d", "zero-size batch", None)
def _(folder: Path) -> str:
    x, weight = t(0, 4, 5, 5).requires_grad_(), KERNEL.clone().requires_grad_()
    y = functional.depthwise_conv2d(x, weight, padding=1)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.shape == (0, 4, 5, 5) and x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.abs().max() == 0
    return "empty result, zero gradient"


SPECIAL = {"NaN": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
for _name, _value in SPECIAL.items():

    @case("functional.depthwise_conv2d", f"{_name} in the image", None)
    def _(folder: Path, value: float = _value) -> str:
        x = t(2, 4, 9, 11)
        x[0, 1, 4, 5], x[1, 0, 0, 0] = value, value
        weight = t(4, 1, 3, 3)
        weight[1, 0, 1, 0] = 0  # inf times 0 is NaN
        same_places(
            functional.depthwise_conv2d(x, weight, padding=1),
            reference.depthwise_conv2d(x, weight, padding=1),
        )
        return "same places as PyTorch"


def same_places(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


for _unit in UNIT_NAMES:
    for _name, _error, _text, _x in (
        ("rank 3", ValueError, "(4, 5, 5)", t(4, 5, 5)),
        ("3 channels for 4", ValueError, "(1, 3, 5, 5)", t(1, 3, 5, 5)),
        ("int input", TypeError, "int32", t(1, 4, 5, 5, dtype=INT32)),
    ):
        add(
            _unit,
            _name,
            _error,
            _text,
            call(unit(_unit), _x),
        )
    add(
        _unit,
        "kernel_size 4",
        ValueError,
        "4",
        call(getattr(modules, _unit), 4, 4),
    )
    add(
        _unit,
        "one value per channel in training",
        ValueError,
        "more than 1 value",
        call(unit(_unit, batch_norm=True), t(1, 4, 1, 1)),
    )

    @case(_unit, "1×1 image, in evaluation", None)
    def _(folder: Path, name: str = _unit) -> str:
        module, x = unit(name, batch_norm=True).eval(), t(1, 4, 1, 1)
        same_places(module(x), x * module.features(x))
        return "as PyTorch"

    @case(_unit, "kernel larger than the image", None)
    def _(folder: Path, name: str = _unit) -> str:
        module, x = getattr(modules, name)(4, 9), t(1, 4, 2, 3)
        same_places(module(x), x * module.features(x))
        return "as PyTorch (zero padding)"

    for _batch, _shape in (("batch", (0, 4, 5, 5)), ("plane", (1, 4, 0, 5))):

        @case(_unit, f"zero-size {_batch}", None)
        def _(folder: Path, name: str = _unit, shape: Any = _shape) -> str:
            module, x = unit(name), t(*shape)

            def shape_of(run: Callable[[], torch.Tensor]) -> Any:
                try:
                    return tuple(run().shape)
                except (ValueError, RuntimeError):
                    return "error"

            ours = shape_of(lambda: module(x))
            assert ours == shape_of(lambda: x * module.features(x)), ours
            return f"as PyTorch: {ours}"

    for _name, _value in SPECIAL.items():
        for _training in (False, True):

            @case(_unit, f"{_name}, {'training' if _training else 'evaluation'}", None)
            def _(
                folder: Path, name: str = _unit, value: float = _value, training: bool = _training
            ) -> str:
                module = unit(name, batch_norm=not training).train(training)
                x = t(2, 4, 9, 11)
                x[0, 1, 4, 5], x[1, 2, 0, 0] = value, value
                same_places(module(x), x * module.features(x))
                return "same places as PyTorch"


add(
    "functional.xunit",
    "even kernel",
    ValueError,
    "2×2",
    call(functional.xunit, t(1, 4, 5, 5), t(4, 1, 2, 2)),
)
add(
    "functional.xunit",
    "gate 'tanh'",
    ValueError,
    "tanh",
    call(functional.xunit, t(1, 4, 5, 5), KERNEL, gate="tanh"),
)
add(
    "functional.xunit",
    "backend 'cuda'",
    ValueError,
    "cuda",
    call(functional.xunit, t(1, 4, 5, 5), KERNEL, backend="cuda"),
)
add(
    "functional.xunit",
    "backend 'rust' for x float32, weight float64",
    RuntimeError,
    "",
    call(functional.xunit, t(1, 4, 5, 5), KERNEL.double(), backend="rust"),
)


# The Rust extension, numpy arrays


def core_convolution(x: Any = None, weight: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": np.zeros((2, 4, 5, 5), np.float32) if x is None else x,
        "weight": np.zeros((4, 1, 3, 3), np.float32) if weight is None else weight,
        "bias": None,
        "stride": (1, 1),
        "padding": (1, 1, 1, 1),
        "dilation": (1, 1),
        "out": np.zeros((2, 4, 5, 5), np.float32),
        "threads": 0,
    } | changes
    return _core.depthwise_conv2d(*arguments.values())


X = np.zeros((2, 4, 5, 5), np.float32)
_CONVOLUTIONS: tuple[tuple[str, type[Exception], str, dict[str, Any]], ...] = (
    ("a list", TypeError, "list", {"x": [0.0]}),
    ("out of another shape", ValueError, "[2, 4, 5, 5]", {"out": X[:1].copy()}),
    ("out of another dtype", TypeError, "float64", {"out": np.zeros((2, 4, 5, 5))}),
    ("out that is x", ValueError, "shares memory", {"x": X, "out": X}),
    ("dtype float16", TypeError, "float16", {"x": X.astype(np.float16)}),
    ("dtype int32", TypeError, "int32", {"x": X.astype(np.int32)}),
    ("weight of another dtype", TypeError, "float64", {"weight": np.zeros((4, 1, 3, 3))}),
    ("bias of another dtype", TypeError, "float64", {"bias": np.zeros(4)}),
    ("rank 3", ValueError, "[4, 5, 5]", {"x": X[0]}),
    ("3 channels for 4", ValueError, "", {"x": X[:, :3].copy()}),
    ("zero-size plane, unpadded", ValueError, "", {"x": X[:, :, :0].copy(), "padding": (0,) * 4}),
    (
        "kernel larger than the image",
        ValueError,
        "",
        {"x": X[:, :, :1].copy(), "padding": (0,) * 4},
    ),
    ("stride 0", ValueError, "", {"stride": (0, 1)}),
    ("dilation 0", ValueError, "", {"dilation": (1, 0)}),
    ("padding 2^62", ValueError, "", {"padding": (1 << 62, 1 << 62, 0, 0)}),
    ("padding -1", OverflowError, "", {"padding": (-1, 0, 0, 0)}),
    ("non-contiguous", ValueError, "C-contiguous", {"x": X.transpose(0, 1, 3, 2)[:, :, 1:]}),
    ("negative strides", ValueError, "C-contiguous", {"x": X[:, :, ::-1]}),
    (
        "byte-swapped",
        TypeError,
        ">f4",
        {"x": X.astype(">f4" if sys.byteorder == "little" else "<f4")},
    ),
    ("misaligned", ValueError, "aligned", {"x": dict(layouts(X))["misaligned"]}),
    ("packed record field", ValueError, "aligned", {"x": dict(layouts(X))["packed record field"]}),
)
for _name, _error, _text, _changes in _CONVOLUTIONS:
    add(
        "_core.depthwise_conv2d",
        _name,
        _error,
        _text,
        call(core_convolution, **_changes),
    )


def network_call(image: Any) -> Runner:
    return lambda folder: _core.Network.load(str(save_network(folder))).denoise(image, 0, 0)


_NETWORK_IMAGES: tuple[tuple[str, type[Exception], str, Any], ...] = (
    ("a list", TypeError, "list", [[[0.0]]]),
    ("float64 image", TypeError, "float64", np.zeros((1, 5, 5))),
    ("rank 2", ValueError, "[5, 5]", np.zeros((5, 5), np.float32)),
    ("3 channels for 1", ValueError, "3", np.zeros((3, 5, 5), np.float32)),
    ("negative strides", ValueError, "C-contiguous", np.zeros((1, 5, 5), np.float32)[:, ::-1]),
    ("zero-size plane", ValueError, "positive", np.zeros((1, 0, 5), np.float32)),
)
for _name, _error, _text, _image in _NETWORK_IMAGES:
    add("_core.Network.denoise", _name, _error, _text, network_call(_image))


def outcome(item: Case, folder: Path) -> tuple[bool, str]:
    """Whether a case came out as it should, and its line in the table."""
    try:
        result = item.run(folder)
    except Exception as error:
        kind = {Exit1: "exit 1", Exit2: "exit 2"}.get(type(error), type(error).__name__)
        message = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())
        expected = item.error is not None and isinstance(error, item.error)
        return expected and item.text in message, f"{kind}: {message}"
    return item.error is None, f"ok, {result}"


def main() -> int:
    """Print the table."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    count, failures, section = 0, 0, ""
    for item in CASES:
        if not re.search(pattern, f"{item.section} {item.name}"):
            continue
        if item.section != section:
            section = item.section
            print(f"\n{section}")
        with tempfile.TemporaryDirectory() as folder:
            good, line = outcome(item, Path(folder))
        failures += not good
        line = line if len(line) <= 160 else f"{line[:157]}..."
        print(f"  {'' if good else 'WRONG: '}{item.name} → {line}")
        count += 1
    print(f"\n{count} cases, {failures} wrong")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
