"""xUnits for PyTorch on the CPU: fused Rust kernels behind drop-in modules, and a denoiser.

Names are imported when first asked for: ``import xunit_rs`` never imports torch, so the denoiser
runs where PyTorch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._info import info
    from ._memory import empty_cache
    from .convert import accelerate, find_relus, replace_relu
    from .denoise import Denoiser
    from .modules import DepthwiseConv2d, Gaussian, xUnit, xUnitD, xUnitS

    __version__: str

_HOMES = {
    "DepthwiseConv2d": "modules",
    "Gaussian": "modules",
    "xUnit": "modules",
    "xUnitD": "modules",
    "xUnitS": "modules",
    "accelerate": "convert",
    "empty_cache": "_memory",
    "find_relus": "convert",
    "replace_relu": "convert",
    "Denoiser": "denoise",
    "info": "_info",
}
_SUBMODULES = (
    "checkpoints",
    "cli",
    "convert",
    "denoise",
    "evaluation",
    "functional",
    "images",
    "models",
    "modules",
    "reference",
    "training",
)

__all__ = [
    "Denoiser",
    "DepthwiseConv2d",
    "Gaussian",
    "__version__",
    "accelerate",
    "empty_cache",
    "find_relus",
    "info",
    "replace_relu",
    "xUnit",
    "xUnitD",
    "xUnitS",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xunit-rs")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
