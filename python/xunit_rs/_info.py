"""What is installed and what it runs on, for bug reports and `xunit-rs info`."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["Info", "info"]


class Info(dict[str, str]):
    """A dict of facts that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())

    __repr__ = __str__


def info() -> Info:
    """Versions, instruction set, threads and shipped networks, as a dict that prints as a table.

    Reads PyTorch's version from its metadata: nothing is imported for it.
    """
    from . import _core
    from .denoise import pretrained_names

    build = _core.build_info()
    return Info(
        {
            "xunit-rs": build["version"],
            "isa": build["isa"],
            "isas": build["isas"],
            "threads": str(_core.default_threads()),
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": platform.platform(),
            "numpy": _version("numpy"),
            "pillow": _version("pillow"),
            "torch": _version("torch"),
            "models": ", ".join(pretrained_names()) or "none",
        }
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
