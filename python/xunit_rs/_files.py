"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["remove_leftovers", "replacing"]

_TEMPORARY = re.compile(r"\.xunit-rs-[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, on disk, when the block succeeds.

    Raises IsADirectoryError if `path` is a folder, FileNotFoundError if it has none.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    temporary = path.with_name(f".xunit-rs-{os.urandom(8).hex()}.tmp")
    try:
        with _held(temporary):
            # Of the old file, or what the umask allows; safetensors puts a private file there.
            permissions = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
            yield temporary
            temporary.chmod(permissions)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already, unless something failed


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Make a file, locked as long as the block or this process lasts, however that ends."""
    while True:
        with open(path, "xb") as file:
            _lock(file, wait=True)
            if path.exists():  # nobody took it for a leftover before it was locked
                yield
                return


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove the temporary files that killed processes left in a folder; return their number.

    Those that some process holds a lock on are being written, and stay.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb+") as file:
                    if _lock(file):
                        os.unlink(entry.path)
                        removed += 1
    return removed


def _lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock a file until it is closed; False if another process has, or the system cannot."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True
