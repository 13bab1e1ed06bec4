"""What the commands share: errors of one line, progress, types of options."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import TextIO, final

__all__ = ["Bar", "Refused", "fail", "gauge", "natural", "note", "numbers", "plain", "reason"]

_CLEAR = "\r\x1b[K"


class Refused(ValueError):
    """A command that cannot run as it was given: nothing was done, and the exit status is 2."""


def fail(message: str, code: int = 1) -> int:
    """Print an error, that being handled, as one line to stderr and return the exit status."""
    if os.environ.get("XUNIT_DEBUG", "0") != "0" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    note(f"error: {message}")
    return code


def note(message: str) -> None:
    """Print one line to stderr, in the place of a progress bar."""
    clear = _CLEAR if sys.stderr.isatty() else ""
    print(f"{clear}xunit-rs: {plain(message)}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """What an exception says, as one would say it: without the number of a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def plain(text: str) -> str:
    """Text as one line, which a file's name cannot make a terminal obey."""
    return "".join(c if c.isprintable() or c > "\x9f" else "?" for c in " ".join(text.split()))


@final
class Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = not quiet and self.stream.isatty()
        self._start = time.monotonic()
        self._next = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, done: int, total: int, name: str = "") -> None:
        if self.live and total > 1:
            self._print(f"{gauge(done / total)} {done}/{total} {name}")

    def pixels(self, done: float, total: int, megapixels: float, name: str = "") -> None:
        """Show how many images are done, shares included, and at what pace since the start."""
        now = time.monotonic()
        if not self.live or now < self._next:
            return
        self._next = now + 0.1
        seconds = max(now - self._start, 1e-3)
        left = f", {_duration(seconds * (total - done) / done)} left" if done > 0 else ""
        self._print(
            f"{gauge(done / total)} {int(done)}/{total} images, {megapixels:.1f} MP, "
            f"{megapixels / seconds:.2f} MP/s{left} {name}"
        )

    def clear(self) -> None:
        if self.live:
            print(_CLEAR, end="", file=self.stream, flush=True)

    def _print(self, text: str) -> None:
        try:
            width = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            width = 0
        # A line that wraps could not be cleared.
        print(_CLEAR + plain(text)[: (width or 80) - 1], end="", file=self.stream, flush=True)


def gauge(share: float) -> str:
    """How much of the whole is done, as a bar of twenty places."""
    return f"[{('#' * int(20 * share)).ljust(20, '.')}]"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def natural(text: str) -> int:
    """The type of an option that counts."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {number}")
    return number


def numbers(text: str) -> list[float]:
    """The type of an option that takes numbers, with commas between them."""
    return [float(part) for part in text.split(",")]
