"""Which files a batch reads and writes, settled before any of them is touched."""

from __future__ import annotations

import os
from typing import NamedTuple

from . import images
from ._terminal import Refused

__all__ = ["PIPE", "Job", "Plan", "plan", "remaining"]

PIPE = "-"  # standard input or output in the place of a file


class Job(NamedTuple):
    """An image to read, the file to write, and that of `--compare`."""

    source: str
    target: str
    sheet: str | None = None


class Plan(NamedTuple):
    """The images found, and the inputs that cannot be read, each with the reason."""

    jobs: list[Job]
    broken: list[tuple[str, str]]


def plan(inputs: list[str], output: str | None = None, sheets: str | None = None) -> Plan:
    """Find the images of files and folders, and where their results go.

    The images of one folder go straight into the folder `output`, its tree kept; several inputs
    go there by their names, as `cp -r` has it. Without `output`, results stand beside their
    input, `-denoised` added to its name. Hidden files and folders are left out, links to folders
    not followed, and folders that results go to are not searched.

    Raises Refused: inputs and outputs that do not go together, an output that cannot be written.
    """
    alone = len(inputs) == 1
    if PIPE in inputs and not alone:
        raise Refused("- (standard input) goes with no other input")
    many = not alone or os.path.isdir(inputs[0])
    if output == PIPE and many:
        raise Refused("-o - (standard output) takes the result of one image file")
    for path in (output, sheets):
        if path is not None and path != PIPE:
            _check_output(path, many=many)
    if inputs == [PIPE]:
        for path in (output, sheets):
            if path is not None and _is_folder(path):
                raise Refused(f"{path}: is a folder; name a file for what standard input brings")
        return Plan([Job(PIPE, output or PIPE, sheets)], [])

    homes = [output or _beside(text) for text in inputs if output or os.path.isdir(text)]
    apart = {os.path.realpath(path) for path in (*homes, sheets) if path is not None}
    jobs: list[Job] = []
    broken: list[tuple[str, str]] = []
    for text in inputs:
        reason = _unreadable(text)
        if reason is not None:
            named = alone or output is not None or text != inputs[-1]
            broken.append((text, reason if named else f"{reason}; results are named by -o"))
        elif os.path.isdir(text):
            found, unread = _walk(text, apart)
            broken += unread
            if not found and not unread:
                broken.append((text, "no images in this folder"))
            prefix = "" if alone else os.path.basename(os.path.realpath(text))
            for name in found:
                inner, base = os.path.split(name)
                home = os.path.join(output, prefix) if output else _beside(text)
                target = os.path.join(home, inner, _result_name(base))
                sheet = sheets and os.path.join(sheets, prefix, inner, _sheet_name(base))
                jobs.append(Job(os.path.join(text, name), target, sheet))
        else:
            folder, base = os.path.split(text)
            stem = os.path.splitext(base)[0]
            target = os.path.join(folder, f"{stem}-denoised{_suffix(base)}")
            if output is not None:
                target = _inside(output, _result_name(base), many=many)
            sheet = sheets and _inside(sheets, _sheet_name(base), many=many)
            jobs.append(Job(text, target, sheet))
    return Plan(jobs, broken)


def remaining(jobs: list[Job], *, overwrite: bool, skip_existing: bool) -> list[Job]:
    """The jobs to do: all, or those whose result does not exist with `skip_existing`.

    Raises Refused: two results of one name, a result that would replace an input, results that
    exist while neither `overwrite` nor `skip_existing` is set.
    """
    inputs = {_real(job.source): job.source for job in jobs if job.source != PIPE}
    written: dict[str, str] = {}
    for job in jobs:
        for path in (job.target, job.sheet):
            if path is None or path == PIPE:
                continue
            real = _real(path)
            if real in written:
                raise Refused(
                    f"{path}: would hold what is made of {written[real]} and {job.source}"
                )
            written[real] = job.source
            if real not in inputs:
                continue
            if path != job.target or real != _real(job.source):
                raise Refused(
                    f"{path}: is an input, and what is made of {job.source} would go there"
                )
            if not overwrite:
                raise Refused(f"{path}: is the input itself; only --overwrite replaces it")
    if overwrite:
        return jobs
    if skip_existing:
        return [job for job in jobs if not os.path.isfile(job.target)]
    files = [path for job in jobs for path in (job.target, job.sheet) if path and path != PIPE]
    existing = [path for path in files if os.path.isfile(path)]
    if existing:
        rest = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise Refused(
            f"{existing[0]}{rest}: already exists; --skip-existing leaves what exists, "
            "--overwrite replaces it"
        )
    return jobs


def _unreadable(path: str) -> str | None:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "no such file or folder"
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        return getattr(error, "strerror", None) or str(error)
    return None


def _real(path: str) -> str:
    return os.path.normcase(os.path.realpath(path))


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) or path.endswith(os.sep)


def _check_output(path: str, *, many: bool) -> None:
    """Raise Refused unless `path` can be written, or be a folder to write in."""
    if not many and not _is_folder(path):
        try:
            images.check_target(path, overwrite=True)
        except images.ImageError as error:
            more = "" if os.path.splitext(path)[1] else f", or {path}{os.sep} for a new folder"
            raise Refused(f"{error}{more}") from error
        return
    if os.path.exists(path) and not os.path.isdir(path):
        raise Refused(f"{path}: is a file; the results of several images need a folder")
    if images.output_format(path) is not None and not _is_folder(path):
        raise Refused(f"{path}: names a file; the results of several images need a folder")
    parent = os.path.abspath(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise Refused(f"{path}: no such folder, and {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(f"{path}: the folder {parent} is not writable")


def _walk(folder: str, apart: set[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of a folder's images relative to it, and the folders that cannot be read."""
    found: list[str] = []
    unread: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        unread.append((str(error.filename), error.strerror or str(error)))

    for place, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in apart
        )
        for name in sorted(filter(images.is_image_name, files)):
            path = os.path.join(place, name)
            if os.path.isfile(path) or not os.path.exists(path):  # a broken link is an error
                found.append(os.path.relpath(path, folder))
    return found, unread


def _beside(folder: str) -> str:
    path = folder.rstrip(os.sep)
    if os.path.basename(path) in ("", ".", ".."):
        path = os.path.realpath(folder)
    return f"{path}-denoised"


def _inside(path: str, name: str, *, many: bool) -> str:
    return os.path.join(path, name) if path != PIPE and (many or _is_folder(path)) else path


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1] if images.output_format(name) else ".png"


def _result_name(name: str) -> str:
    # The whole old name before a new suffix, so that a.gif and a.png do not meet.
    return name if images.output_format(name) else f"{name}.png"


def _sheet_name(name: str) -> str:
    return name if name.lower().endswith(".png") else f"{name}.png"
