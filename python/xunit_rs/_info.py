"""What is installed and what it runs on, for bug reports and `xunit-rs info`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Info", "info"]


class Info(dict[str, str]):
    """A dict of facts that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())

    __repr__ = __str__


def info(module: nn.Module | None = None) -> Info:
    """Versions, instruction set, threads and shipped networks, as a dict that prints as a table.

    Reads PyTorch's version from its metadata: nothing is imported for it.

    module: instead, for each layer of it that is ours, "rust", or "torch" and why the kernels do
    not apply; for each depthwise nn.Conv2d and official xUnit, whether :func:`accelerate` would
    swap it. Judged for NCHW inputs of the device and dtype of the weights: of large channels_last
    tensors `backend="auto"` leaves some depthwise convolutions to PyTorch, which does them faster.
    Raises TypeError for what is no module.
    """
    if module is not None:
        return _paths(module)
    from . import _core
    from .denoise import pretrained_names

    build = _core.build_info()
    return Info(
        {
            "xunit-rs": build["version"],
            "isa": build["isa"],
            "isas": build["isas"],
            "threads": str(_core.default_threads()),
            "pool": _pool(),
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": platform.platform(),
            "numpy": _version("numpy"),
            "pillow": _version("pillow"),
            "torch": _version("torch"),
            "models": ", ".join(pretrained_names()) or "none",
        }
    )


def _paths(module: nn.Module) -> Info:
    from .convert import _check_model, _faster
    from .modules import DepthwiseConv2d, _Base, obstacle

    _check_model(module)
    facts: dict[str, str] = {}
    inside: set[int] = set()
    for name, m in module.named_modules():
        if id(m) in inside:
            continue
        if isinstance(m, (_Base, DepthwiseConv2d)):
            reason = obstacle(m)
            facts[name or "(model)"] = "rust" if reason is None else f"torch: {reason}"
            if isinstance(m, _Base):
                inside.update(map(id, m.get_submodule(m._body).modules()))
        else:
            new = _faster(m)
            if new is not None:
                reason = new if isinstance(new, str) else "accelerate(model) would swap it"
                facts[name or "(model)"] = f"torch: a {type(m).__name__}; {reason}"
                if not isinstance(new, (str, DepthwiseConv2d)):
                    inside.update(map(id, m.modules()))
    return Info(facts)


def _pool() -> str:
    """Whose threads run the kernels, in this process as it is."""
    if "torch" not in sys.modules:
        return "our own"
    from ._autograd import _parallel_for

    return "our own" if _parallel_for() is None else "PyTorch's, on its tensors; else our own"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
