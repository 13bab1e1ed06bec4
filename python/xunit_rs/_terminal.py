"""What the commands print to a terminal: errors of one line, and progress."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TextIO, final

__all__ = ["Bar", "fail", "note"]


def fail(message: str, code: int = 1) -> int:
    """Print the error being handled as one line to stderr and return the exit status."""
    if os.environ.get("XUNIT_DEBUG", "0") != "0":
        traceback.print_exc()
    note(f"error: {message}")
    return code


def note(message: str) -> None:
    """Print one line to stderr."""
    print(f"xunit-rs: {' '.join(message.split())}", file=sys.stderr, flush=True)


@final
class Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = not quiet and self.stream.isatty()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, done: int, total: int, name: str = "") -> None:
        if self.live and total > 1:
            self._print(f"{_gauge(done, total)} {done}/{total} {name[:40]}")

    def pixels(
        self, images: tuple[int, int], megapixels: tuple[float, float], since: float, name: str
    ) -> None:
        """Show images and megapixels, done and in all, and their pace since a time.monotonic()."""
        if not self.live:
            return
        done, total = megapixels
        pace = done / max(time.monotonic() - since, 1e-3)
        left = f", {(total - done) / pace:.0f} s left" if done else ""
        self._print(
            f"{_gauge(done, total)} {images[0]}/{images[1]} images, {done:.1f}/{total:.1f} MP, "
            f"{pace:.2f} MP/s{left} {name[:30]}"
        )

    def clear(self) -> None:
        if self.live:
            self._print("")

    def _print(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=self.stream, flush=True)


def _gauge(done: float, total: float) -> str:
    return f"[{('#' * int(20 * done / total) if total else '').ljust(20, '.')}]"
