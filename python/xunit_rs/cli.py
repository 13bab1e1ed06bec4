"""The command `xunit-rs`: denoise images, convert checkpoints, train, evaluate."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ._terminal import Refused, fail, note, numbers, reason

__all__ = ["main"]


def _sigmas(text: str) -> float | tuple[float, float]:
    try:
        return float(text)
    except ValueError:
        low, _, high = text.partition("-")
        return float(low), float(high)


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


# Keywords of training.train, which holds the defaults: what is not given is not passed on.
_TRAIN_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("model", str, "network to train: xdncnn, dncnn or another denoiser of list_models()"),
    ("version", str, "form of xdncnn: 2018 or 2021"),
    ("sigma", _sigmas, "noise standard deviation, 0-255 scale, or a range such as 0-55"),
    ("steps", int, "number of optimiser steps; with --resume by default those of before"),
    ("time-budget", _seconds, "time after which training ends, results saved: 90s, 30m, 2h"),
    ("patch-size", int, "side of the training patches, pixels"),
    ("batch-size", int, "patches per step, of all processes together"),
    ("lr", float, "peak learning rate"),
    ("loss", str, "mse or l1"),
    ("schedule", str, "how the learning rate falls: cosine or step"),
    ("seed", int, "seed of weights, patches and noise"),
    ("channels", int, "1 (grey) or 3 (colour)"),
    ("features", int, "width of the network (default: its own)"),
    ("depth", int, "number of blocks (default: its own)"),
    ("init", Path, "checkpoint to start from; not read with --resume"),
    ("val", Path, "folder of clean images to measure PSNR and SSIM on"),
    ("val-sigma", numbers, "noise to measure it at, such as 25,50 (default: of training)"),
    ("validations", int, "how often over the run"),
    ("precision", str, "auto, float32 or bfloat16"),
    ("ema-decay", float, "decay of the moving average of the weights"),
    ("checkpoint-every", float, "seconds between checkpoints"),
    ("accelerator", str, "auto, cpu or cuda"),
    ("devices", int, "number of processes; torchrun may start them instead"),
    ("threads", int, "number of threads of each process"),
    ("license", str, "of the result, for its metadata"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (done), 1 (failed), 2 (refused) or 130 (interrupted)."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or --help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:  # which imports of half a second leave time for
        return fail("interrupted", 130)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(args.run(args))
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of stdout, `head` say, has left
        _let_go_of_stdout()
        return 1
    except ImportError as error:
        if "pip install 'xunit-rs[train]'" in str(error):
            return fail(str(error))
        if error.name is None or error.name.split(".")[0] not in ("torch", "safetensors"):
            raise
        return fail(f"`{args.command}` needs PyTorch: pip install 'xunit-rs[torch]'")
    except Refused as error:
        return fail(str(error), 2)
    except MemoryError:
        return fail("out of memory")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        status = fail(reason(error))
        try:
            sys.stdout.flush()
        except OSError:  # that was the error: its disk is full, say
            _let_go_of_stdout()
        return status


def _let_go_of_stdout() -> None:
    """Keep Python from writing what is left at exit, which would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xunit-rs",
        description="Image denoising with xUnit networks, on the CPU.",
        epilog="With XUNIT_DEBUG=1 in the environment an error shows where it came from.",
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )

    def command(
        name: str, text: str, run: Callable[[argparse.Namespace], int] | str, **options: Any
    ) -> argparse.ArgumentParser:
        """Add a command; `run` is a function, or the module that adds the options and has one."""
        description = f"{text[0].upper()}{text[1:]}."
        sub: _Command = commands.add_parser(name, help=text, description=description, **options)
        if isinstance(run, str):
            sub.module = run
        else:
            sub.set_defaults(run=run)
        return sub

    command("denoise", "denoise images, files and folders", "._denoise_cli")

    sub = command("convert", "convert a checkpoint to safetensors", _convert)
    sub.add_argument("source", metavar="SRC", type=Path, help="official .pkl or .pt checkpoint")
    sub.add_argument("target", metavar="DST", type=Path, help=".safetensors file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace DST if it exists")

    sub = command("train", "train a denoiser (needs PyTorch)", _train, formatter_class=_TrainHelp)
    sub.add_argument("--data", type=Path, required=True, help="folder of clean images")
    sub.add_argument("--out", type=Path, required=True, help="folder for the results")
    # Options not given stay out of the namespace: training.train holds the defaults.
    for name, kind, text in _TRAIN_OPTIONS:
        sub.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sub.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS, help="go on from OUT"
    )

    command("eval", "measure denoisers' PSNR and SSIM on clean images", "._eval_cli")
    command("demo", "try the denoiser on a page in the browser", "._demo")
    command("info", "print versions, instruction set and threads", _info)
    return parser


class _Command(argparse.ArgumentParser):
    """A command whose module is imported when it is run: --version need not wait for it."""

    module: str | None = None

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        if self.module is not None:
            module, self.module = import_module(self.module, __package__), None
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(*args, **options)


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, 0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from . import __version__

        print(f"xunit-rs {__version__}")
        parser.exit()


class _TrainHelp(argparse.HelpFormatter):
    """Adds the defaults of training.train, read only when help is asked for: it needs PyTorch."""

    def add_argument(self, action: argparse.Action) -> None:
        try:
            from .training import loop
        except ImportError:
            return super().add_argument(action)
        import inspect

        parameters = inspect.signature(loop.train).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        defaults["steps"] = f"{loop._DEFAULT_STEPS} without --time-budget"
        default = defaults.get(action.dest)
        if default not in (None, False, inspect.Parameter.empty):
            action.help = f"{action.help} (default: {default})"
        super().add_argument(action)


def _convert(args: argparse.Namespace) -> int:
    from . import checkpoints

    checkpoints.convert(args.source, args.target, overwrite=args.overwrite)
    print(args.target)
    return 0


def _train(args: argparse.Namespace) -> int:
    from . import training

    names = [name.replace("-", "_") for name, _, _ in _TRAIN_OPTIONS] + ["resume"]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    path = training.train(args.data, args.out, **options)
    if os.environ.get("RANK", "0") == "0":  # torchrun has one of these processes on each device
        print(path)
    return 0


def _info(args: argparse.Namespace) -> int:
    from ._info import info

    print(info())
    return 0


def _show_warning(message: Warning | str, *_: Any) -> None:
    note(f"warning: {message}")
