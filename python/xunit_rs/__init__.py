"""xUnits for PyTorch on the CPU: fused Rust kernels behind drop-in modules, and a denoiser.

Names are imported when first asked for: ``import xunit_rs`` never imports torch, so the denoiser
runs where PyTorch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._info import info
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
    "find_relus": "convert",
    "replace_relu": "convert",
    "Denoiser": "denoise",
    "info": "_info",
}
_SUBMODULES = ("functional", "models", "reference")

__all__ = [
    "Denoiser",
    "DepthwiseConv2d",
    "Gaussian",
    "__version__",
    "accelerate",
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
        value = getattr(_load(_HOMES[name], name), name)
    elif name in _SUBMODULES:
        value = _load(name, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _load(module: str, wanted: str) -> Any:
    try:
        return import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"xunit_rs.{wanted} needs PyTorch: pip install 'xunit-rs[torch]'", name="torch"
        ) from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xunit-rs")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
