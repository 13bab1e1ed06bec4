"""The command `xunit-rs`: denoise images, convert checkpoints, train, evaluate."""

from __future__ import annotations

import argparse
import functools
import inspect
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, final

from . import _demo, _eval_cli, images
from .denoise import Denoiser, pretrained_names

__all__ = ["main"]

# What `denoise` runs where no model is named: the noise of a photo is not known.
_GREY_MODEL = "gray-blind"
_COLOUR_MODEL = "color-blind"


def _sigmas(text: str) -> float | tuple[float, float]:
    try:
        return float(text)
    except ValueError:
        low, _, high = text.partition("-")
        return float(low), float(high)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# Keywords of training.train, which holds the defaults: what is not given is not passed on.
_TRAIN_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("version", str, "form of the network: 2018 or 2021"),
    ("sigma", _sigmas, "noise standard deviation, 0-255 scale, or a range such as 0-55"),
    ("steps", int, "number of optimiser steps; with --resume by default those of before"),
    ("time-budget", float, "seconds after which training ends, results saved"),
    ("patch-size", int, "side of the training patches, pixels"),
    ("batch-size", int, "patches per step"),
    ("lr", float, "peak learning rate"),
    ("seed", int, "seed of weights, patches and noise"),
    ("channels", int, "1 (grey) or 3 (colour)"),
    ("features", int, "width of the network"),
    ("depth", int, "number of blocks"),
    ("init", Path, "checkpoint to start from; not read with --resume"),
    ("val", Path, "folder of clean images to measure PSNR on"),
    ("val-sigma", _numbers, "noise to measure it at, such as 25,50 (default: of training)"),
    ("validations", int, "how often over the run"),
    ("precision", str, "auto, float32 or bfloat16"),
    ("ema-decay", float, "decay of the moving average of the weights"),
    ("checkpoint-every", float, "seconds between checkpoints"),
    ("threads", int, "number of threads"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or --help
        return stop.code if isinstance(stop.code, int) else 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(args.run(args))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of stdout, `head` say, has left. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("torch", "safetensors"):
            raise
        return _fail(f"`{args.command}` needs PyTorch: pip install 'xunit-rs[torch]'")
    except MemoryError:
        return _fail("out of memory" + ("; try --tile 256" if args.command == "denoise" else ""))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail(str(error) or type(error).__name__)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="xunit-rs",
        description="Image denoising with xUnit networks, on the CPU.",
        epilog="With XUNIT_DEBUG=1 in the environment an error shows where it came from.",
    )
    parser.add_argument("--version", action="version", version=f"xunit-rs {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, **options: Any
    ) -> Any:
        description = f"{text[0].upper()}{text[1:]}."
        sub = commands.add_parser(name, help=text, description=description, **options)
        sub.set_defaults(run=run)
        return sub

    sub = command("denoise", _denoise, "denoise an image or the images of a folder")
    sub.add_argument("input", metavar="IN", type=Path, help="image file or folder")
    sub.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="file or folder to write (default: IN with '-denoised' added to its name); as a "
        "shell's *.jpg may put a photo here, --overwrite does not replace a file OUT other than IN",
    )
    sub.add_argument(
        "-o",
        "--output",
        dest="named",
        metavar="OUT",
        type=Path,
        help="the same, and with --overwrite it is replaced if it exists",
    )
    _add_model(sub, None, f"{_GREY_MODEL} for grey images, {_COLOUR_MODEL} for colour")
    sub.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="share of the noise to take away, 0 to 1 (default: %(default)g)",
    )
    sub.add_argument(
        "--tile",
        type=_natural,
        default=0,
        help="width of the panels a large image is cut into, pixels; 0 = by memory (default)",
    )
    sub.add_argument("--threads", type=_natural, default=0, help="0 = all cores (default)")
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")
    sub.add_argument("-q", "--quiet", action="store_true", help="print errors only")

    sub = command("convert", _convert, "convert a checkpoint to safetensors")
    sub.add_argument("source", metavar="SRC", type=Path, help="official .pkl or .pt checkpoint")
    sub.add_argument("target", metavar="DST", type=Path, help=".safetensors file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it exists")

    sub = command("train", _train, "train a denoiser (needs PyTorch)", formatter_class=_TrainHelp)
    sub.add_argument("--data", type=Path, required=True, help="folder of clean images")
    sub.add_argument("--out", type=Path, required=True, help="folder for the results")
    # Options not given stay out of the namespace: training.train holds the defaults.
    for name, kind, text in _TRAIN_OPTIONS:
        sub.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sub.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS, help="go on from OUT"
    )

    _eval_cli.add_arguments(
        command("eval", _eval_cli.run, "measure denoisers' PSNR and SSIM on clean images")
    )

    _demo.add_arguments(command("demo", _demo.run, "try the denoiser on a page in the browser"))

    command("info", _info, "print versions, instruction set and threads")
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str | None, what: str) -> None:
    names = ", ".join(pretrained_names()) or "none shipped"
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        default=default,
        help=f"{names}, or a .safetensors file (default: {what})",
    )


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {number}")
    return number


class _TrainHelp(argparse.HelpFormatter):
    """Adds the defaults of training.train, read only when help is asked for: it needs PyTorch."""

    def add_argument(self, action: argparse.Action) -> None:
        try:
            from .training import loop
        except ImportError:
            return super().add_argument(action)
        parameters = inspect.signature(loop.train).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        defaults["steps"] = f"{loop._DEFAULT_STEPS} without --time-budget"
        default = defaults.get(action.dest)
        if default not in (None, False, inspect.Parameter.empty):
            action.help = f"{action.help} (default: {default})"
        super().add_argument(action)


def _denoise(args: argparse.Namespace) -> int:
    if args.output is not None and args.named is not None:
        raise ValueError(f"two outputs: {args.output} and --output {args.named}")
    files = args.output is not None and args.output.is_file() and args.input.is_file()
    if args.overwrite and files and not args.output.samefile(args.input):
        raise images.ImageError(
            f"{args.output}: already exists; to replace it, name it with --output"
        )
    args.output = args.output or args.named
    jobs, existing = _jobs(args.input, args.output, args.overwrite)

    @functools.cache
    def load(name: str) -> Denoiser:
        return Denoiser.from_pretrained(
            name, tile=args.tile, threads=args.threads, strength=args.strength
        )

    if args.model is not None:
        load(args.model)  # or fail before the first image
    if args.input.is_dir() and jobs:
        jobs[0][1].parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    with _Bar(quiet=args.quiet) as bar:
        for number, (source, target) in enumerate(jobs):
            bar.show(number, len(jobs), source.name)
            try:
                image = images.read(source)
                images.check_target(target, image.mode, overwrite=args.overwrite)
                colour = image.mode in ("RGB", "RGBA")
                model = args.model or (_COLOUR_MODEL if colour else _GREY_MODEL)
                images.write(load(model)(image), target, overwrite=args.overwrite)
            except (ValueError, TypeError, OSError) as error:
                bar.clear()
                text = str(error)
                failures = _fail(text if str(source.name) in text else f"{source}: {text}")
            else:
                bar.clear()
                if not args.quiet:
                    print(target, flush=True)
    if existing and not args.quiet:
        print(
            f"xunit-rs: {existing} results exist already and were left; --overwrite replaces them",
            file=sys.stderr,
        )
    return failures


def _jobs(
    source: Path, target: Path | None, overwrite: bool
) -> tuple[list[tuple[Path, Path]], int]:
    """Pairs of input and output, and how many outputs of a folder exist and are left alone."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not source.is_dir():
        if target is None:
            target = source.with_name(f"{source.stem}-denoised{_suffix(source)}")
        elif target.is_dir():
            target = target / _result_name(source)
        images.check_target(target, overwrite=overwrite)
        return [(source, target)], 0
    source = Path(os.path.normpath(source))
    if target is None:
        whole = source.resolve()  # gives "." and ".." a name
        target = source if source.name not in ("", "..") else whole
        target = target.with_name(f"{whole.name}-denoised")
    if target.exists() and not target.is_dir():
        raise images.ImageError(f"{target}: is a file; the result of a folder is a folder")
    if target.exists() and target.samefile(source) and not overwrite:
        raise images.ImageError(f"{target}: is the input; its files are replaced by --overwrite")
    names = sorted(p for p in source.iterdir() if images.is_image_name(p) and p.is_file())
    if not names:
        raise images.ImageError(f"{source}: no images in this folder")
    jobs = [(path, target / _result_name(path)) for path in names]
    todo = [job for job in jobs if overwrite or not job[1].exists()]
    return todo, len(jobs) - len(todo)


def _suffix(path: Path) -> str:
    return path.suffix if path.suffix.lower() in images.TRUE_COLOUR_SUFFIXES else ".png"


def _result_name(path: Path) -> str:
    # The whole old name before a new suffix, so that a.gif and a.png do not meet.
    return path.name if _suffix(path) == path.suffix else path.name + _suffix(path)


def _convert(args: argparse.Namespace) -> int:
    from . import checkpoints

    checkpoints.convert(args.source, args.target, overwrite=args.overwrite)
    print(args.target)
    return 0


def _train(args: argparse.Namespace) -> int:
    from . import training

    names = [name.replace("-", "_") for name, _, _ in _TRAIN_OPTIONS] + ["resume"]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    print(training.train(args.data, args.out, **options))
    return 0


def _info(args: argparse.Namespace) -> int:
    from ._info import info

    print(info())
    return 0


def _fail(message: str, code: int = 1) -> int:
    """Print the error being handled as one line to stderr and return the exit status."""
    if os.environ.get("XUNIT_DEBUG", "0") != "0":
        traceback.print_exc()
    print(f"xunit-rs: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"xunit-rs: warning: {' '.join(str(message).split())}", file=sys.stderr)


@final
class _Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = not quiet and self.stream.isatty()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, done: int, total: int, name: str = "") -> None:
        if self.live and total > 1:
            bar = ("#" * (20 * done // total)).ljust(20, ".")
            self._print(f"\r\x1b[K[{bar}] {done}/{total} {name[:40]}")

    def clear(self) -> None:
        if self.live:
            self._print("\r\x1b[K")

    def _print(self, text: str) -> None:
        print(text, end="", file=self.stream, flush=True)
