"""The command `xunit-rs denoise`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from . import images
from ._files import remove_leftovers
from ._plan import PIPE, Job, plan, remaining
from ._terminal import Bar, Refused, fail, natural, note, reason
from .denoise import Denoiser, _sheet_of_images, pretrained_names
from .noise import BLIND, estimate_sigma, halves_colours, is_grey, model_for

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 all done; 1 some images failed, the others are done; 2 refused, nothing "
        "done; 130 interrupted; 143 terminated. A result appears under its name when it is whole, "
        "so that a run that was cut off goes on with --skip-existing. One that was killed may "
        "leave a hidden file, .xunit-rs-*.tmp, which the next run that writes there removes."
    )
    parser.add_argument(
        "inputs",
        metavar="IN",
        nargs="+",
        help="image files, folders (with those inside; not links to folders, nor hidden ones), "
        "or - for standard input",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file to write, or for several images the folder, which is made; the results of one "
        "folder go straight into it, several inputs by their names; - is standard output "
        "(default: beside IN with '-denoised' added to its name; of - standard output)",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip-existing", action="store_true", help="leave results that exist, do the others"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace results that exist")
    group.add_argument(
        "--strip",
        action="store_true",
        help="leave out EXIF, ICC profile, XMP, resolution and comments; the pixels are turned as "
        "the orientation says",
    )
    group.add_argument(
        "--compare",
        metavar="OUT.png",
        help="also write a picture of before, after and difference, with the numbers; of several "
        "images, the folder for them",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be read and written"
    )

    group = parser.add_argument_group("denoising")
    models = group.add_mutually_exclusive_group()
    models.add_argument(
        "--model",
        metavar="NAME|PATH",
        help=f"{', '.join(pretrained_names()) or 'none shipped'}, or a .safetensors file "
        f"(default: {BLIND[1]} for grey images, {BLIND[3]} for colour, but {BLIND[1]} for that of "
        "noisy JPEG and WebP files at half the width and height, 4:2:0)",
    )
    models.add_argument(
        "--sigma",
        metavar="auto|N",
        type=_sigma,
        help="choose the model for this noise: standard deviation on the scale 0-255, or auto to "
        "estimate that of each image",
    )
    group.add_argument(
        "--strength",
        metavar="S",
        type=_strength,
        default=1.0,
        help="share of the noise to take away, 0 to 1 (default: %(default)g)",
    )
    group.add_argument(
        "--threads", metavar="N", type=natural, default=0, help="0 = all cores (default)"
    )
    group.add_argument(
        "--tile",
        metavar="N",
        type=natural,
        default=0,
        help="height of the bands a large image is cut into, pixels, to save memory; 0 = by "
        "memory (default)",
    )

    group.add_argument(
        "--max-megapixels",
        metavar="N",
        type=natural,
        default=None,
        help="refuse larger images, as a small file can unpack to any size; 0 = none is too large "
        f"(default: {images.size_limit():.4g})",
    )

    group = parser.add_argument_group("messages")
    group.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON for each image: input, output, model, sigma, megapixels, "
        "seconds, error",
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    amount.add_argument(
        "-v", "--verbose", action="store_true", help="print model, size and time of each image"
    )


def _strength(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 to 1, got {text}")
    return number


def _sigma(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be auto or a number, 0 or more, got {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    with _limit(args.max_megapixels), _ended_by_signals():
        try:
            return _run(args)
        except _Terminated as stop:
            return fail("terminated", 128 + int(stop.args[0]))


@contextlib.contextmanager
def _limit(megapixels: int | None) -> Iterator[None]:
    """The size of images that are read; None leaves what Pillow has."""
    # Pillow warns at its limit and refuses at twice that.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    before = Image.MAX_IMAGE_PIXELS
    if megapixels is not None:
        Image.MAX_IMAGE_PIXELS = megapixels * 500_000 or None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class _Terminated(KeyboardInterrupt):
    """A signal that ends the work as Ctrl-C does: with no temporary file left."""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise _Terminated, with their number, unless they are handled."""

    def end(number: int, _: object) -> None:
        raise _Terminated(number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    with contextlib.suppress(ValueError):  # another thread than the main one cannot
        for number in taken:
            signal.signal(number, end)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number in taken:
                signal.signal(number, signal.SIG_DFL)


def _run(args: argparse.Namespace) -> int:
    jobs, broken = plan(args.inputs, args.output, args.compare)
    todo = remaining(jobs, overwrite=args.overwrite, skip_existing=args.skip_existing)
    _check_pipes(todo, args)
    load = functools.cache(
        functools.partial(
            Denoiser.from_pretrained, tile=args.tile, threads=args.threads, strength=args.strength
        )
    )
    if args.model is not None:
        try:
            load(args.model)
        except (ValueError, OSError) as error:
            raise Refused(reason(error)) from error

    failures = 0
    for source, why in broken:
        failures += fail(f"{source}: {why}")
        _report(args, Job(source, ""), {"error": why})
    batch = _Batch(todo, args, load)
    if args.dry_run:
        for job in todo:
            _report(args, job, {}, " -> ".join([job.source, ", ".join(filter(None, job[1:]))]))
    else:
        _clear_up(jobs, args)
        stop = batch.run()
        if stop is not None:
            number = int(stop.args[0]) if isinstance(stop, _Terminated) else int(signal.SIGINT)
            how = "terminated" if isinstance(stop, _Terminated) else "interrupted"
            more = "; --skip-existing goes on from there" if len(todo) > 1 else ""
            return fail(f"{how}, {batch.done} of {len(todo)} images done{more}", 128 + number)
    failures += batch.failed
    if not args.quiet:
        if len(todo) < len(jobs):
            note(f"{len(jobs) - len(todo)} of {len(jobs)} results exist already and were left")
        if failures and len(jobs) + len(broken) > 1 and not args.dry_run:
            note(f"{failures} failed, {batch.done} done")
    return int(failures > 0)


def _clear_up(jobs: list[Job], args: argparse.Namespace) -> None:
    """Remove what runs that were killed left where results go."""
    paths = {path for job in jobs for path in job[1:] if path and path != PIPE}
    folders = {os.path.dirname(os.path.realpath(path)) for path in paths}
    count = sum(remove_leftovers(folder) for folder in sorted(folders))
    if count and not args.quiet:
        files = "1 unfinished file" if count == 1 else f"{count} unfinished files"
        note(f"removed {files} of a run that was killed")


def _check_pipes(jobs: list[Job], args: argparse.Namespace) -> None:
    if args.dry_run:
        return
    if any(job.source == PIPE for job in jobs) and sys.stdin.isatty():
        raise Refused("standard input is a terminal: pipe an image into it")
    if any(job.target == PIPE for job in jobs):
        if args.json:
            raise Refused(
                "--json and the image would both go to standard output: name a file by -o"
            )
        if sys.stdout.isatty():
            raise Refused("standard output is a terminal: name a file by -o, or redirect it")


class _Batch:
    """Jobs being done, one after the other."""

    def __init__(
        self, jobs: list[Job], args: argparse.Namespace, load: Callable[[str], Denoiser]
    ) -> None:
        self.jobs, self.args, self.load = jobs, args, load
        self.bar = Bar(quiet=args.quiet)
        self.done = self.failed = 0
        self.pixels = 0.0  # millions, of the images done
        self.job = Job("", "")
        self.record: dict[str, Any] = {}  # what is learnt of the job being done

    def run(self) -> KeyboardInterrupt | None:
        """Do the jobs; return what interrupted them."""
        start = time.monotonic()
        with self.bar:
            for job in self.jobs:
                self.job, self.record = job, {}
                try:
                    self._step()
                except KeyboardInterrupt as stop:
                    return stop
        if self.args.verbose and len(self.jobs) > 1:
            seconds = time.monotonic() - start
            pace = self.pixels / max(seconds, 1e-3)
            note(f"{self.pixels:.1f} MP in {seconds:.1f} s, {pace:.2f} MP/s")
        return None

    def _step(self) -> None:
        start = time.monotonic()
        self._tell(0.0)
        try:
            self._denoise()
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, MemoryError) as error:
            why = _reason(error, self.job)
            self.bar.clear()
            self.failed += fail(f"{_name(self.job.source)}: {why}")
            _report(self.args, self.job, self.record | {"error": why})
        else:
            self.done += 1
            self.pixels += self.record["megapixels"]
            self.record["seconds"] = round(time.monotonic() - start, 3)
            self.bar.clear()
            record = self.record | {"output": self.job.target}
            _report(self.args, self.job, record, self.job.target)
            if self.args.verbose:
                _tell_all(self.job, self.record)

    def _tell(self, share: float) -> None:
        pixels = self.pixels + share * self.record.get("megapixels", 0.0)
        place = self.done + self.failed + share
        self.bar.pixels(place, len(self.jobs), pixels, _name(self.job.source))

    def _denoise(self) -> None:
        job, args, record, name = self.job, self.args, self.record, _name(self.job.source)
        piped = job.source == PIPE
        source: Any = io.BytesIO(sys.stdin.buffer.read()) if piped else job.source
        image = images.read(source, name, animations=False, deep=True)
        file_format = image.format
        record["megapixels"] = image.width * image.height / 1e6
        if args.strip:
            image = images.stripped(image)
        if job.target != PIPE:
            os.makedirs(os.path.dirname(job.target) or ".", exist_ok=True)
            images.check_target(job.target, image.mode, image.size, overwrite=args.overwrite)
        sheet = job.sheet
        if sheet is not None and args.skip_existing and os.path.exists(sheet):
            sheet = None
        if sheet is not None:
            os.makedirs(os.path.dirname(sheet) or ".", exist_ok=True)
            images.check_target(sheet, "RGB", overwrite=args.overwrite)
        record["model"], record["sigma"] = _choose(image, args, name)
        tell = self._tell if self.bar.live else None
        clean = self.load(record["model"])(image, progress=tell)
        # The sheet first: once the result exists, all of the job is done.
        if sheet is not None:
            images.write(_sheet_of_images(image, clean), sheet, overwrite=args.overwrite)
        if job.target != PIPE:
            images.write(clean, job.target, overwrite=args.overwrite)
            return
        content = images.encode(clean, file_format)
        sys.stdout.flush()
        # Not sys.stdout.buffer, which would try again at exit to write what it could not.
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            file.write(content)


def _choose(
    image: Image.Image | images.DeepImage, args: argparse.Namespace, name: str
) -> tuple[str, float | None]:
    """The network for an image and the noise it was chosen by."""
    if args.model is not None:
        return args.model, None
    sigma = args.sigma
    if sigma == "auto" or (sigma is None and halves_colours(image) and not is_grey(image)):
        sigma = estimate_sigma(image) if min(image.size) >= 3 else None
    if sigma is None:
        return BLIND[1 if is_grey(image) else 3], None
    model, (low, high) = model_for(image, sigma)
    if args.sigma is None:
        return model, None
    if not args.quiet:
        how = "estimated" if args.sigma == "auto" else "given"
        known = "" if sigma <= high or low == high else f", trained for {low:g}-{high:g} only"
        note(f"{name}: sigma {sigma:.1f} {how}, model {model}{known}")
    return model, round(sigma, 2)


def _report(
    args: argparse.Namespace, job: Job, record: dict[str, Any], line: str | None = None
) -> None:
    """Print what came of a job to stdout, unless the image itself goes there."""
    if args.json:
        keys = ("input", "output", "model", "sigma", "megapixels", "seconds", "error")
        output = job.target if args.dry_run and job.target else None
        values = dict.fromkeys(keys) | {"input": job.source, "output": output} | record
        print(json.dumps(values), flush=True)
    elif line is not None and not args.quiet and (args.dry_run or job.target != PIPE):
        print(line, flush=True)


def _tell_all(job: Job, record: dict[str, Any]) -> None:
    size, seconds = record["megapixels"], record["seconds"]
    note(
        f"{_name(job.source)}: {record['model']}, {size:.2f} MP in {seconds:.2f} s, "
        f"{size / max(seconds, 1e-3):.2f} MP/s"
    )


def _name(source: str) -> str:
    return "standard input" if source == PIPE else source


def _reason(error: Exception, job: Job) -> str:
    """What went wrong, without the name of the input in front."""
    if isinstance(error, MemoryError):
        return "out of memory; try --tile 256"
    if isinstance(error, OSError) and not error.filename and job.target == PIPE:
        return f"standard output: {reason(error)}"
    text = reason(error).removeprefix(f"{_name(job.source)}: ")
    if isinstance(error, images.TooLargeError):
        return (
            f"too large: more than {images.size_limit():.4g} megapixels; if it is no decompression "
            "bomb, --max-megapixels N lets it through"
        )
    return text
