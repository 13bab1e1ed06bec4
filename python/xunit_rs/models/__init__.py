"""Networks built of xUnits, and DnCNN, which they are measured against."""

from __future__ import annotations

from .. import _torch  # noqa: F401

# isort: split
import functools
import os
from collections.abc import Callable
from typing import Any

from .. import checkpoints
from ._base import Network
from .dncnn import DnCNN
from .xdensenet import XDenseNet
from .xdncnn import XDnCNN
from .xsrcnn import XSRCNN
from .xsrgan import XSRGAN
from .xsrresnet import XSRResNet

__all__ = [
    "XSRCNN",
    "XSRGAN",
    "DnCNN",
    "Network",
    "XDenseNet",
    "XDnCNN",
    "XSRResNet",
    "create_model",
    "from_pretrained",
    "list_models",
]

_MODELS: dict[str, Callable[..., Network]] = {
    "dncnn": DnCNN,
    "xdensenet": XDenseNet,
    "xdncnn-2018": functools.partial(XDnCNN, version="2018"),
    "xdncnn-2021": functools.partial(XDnCNN, version="2021"),
    "xsrcnn-c": functools.partial(XSRCNN, widths=(42, 32), kernel_sizes=(9, 5, 5)),
    "xsrcnn-f": functools.partial(XSRCNN, widths=(64, 32), kernel_sizes=(9, 3, 5)),
    "xsrgan": XSRGAN,
    "xsrresnet": XSRResNet,
}
_CLASSES: dict[str, type[Network]] = {
    architecture: kind
    for kind in (DnCNN, XDenseNet, XDnCNN, XSRCNN, XSRGAN, XSRResNet)
    for architecture in kind.architectures
}


def list_models(pretrained: bool = False) -> list[str]:
    """The names that :func:`create_model` takes: of architectures, or of weights in the package."""
    return checkpoints.list_weights() if pretrained else sorted(_MODELS)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Network:
    """A new network of an architecture, or with `pretrained` one with weights of the package.

    name: one of ``list_models(pretrained)``. kwargs: arguments of the network's class; with
    `pretrained` only those that no file holds, such as `backend`.
    A pretrained network is in evaluation mode, a new one in training mode.
    Raises ValueError for an unknown name.
    """
    names = list_models(pretrained)
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(names) or 'none'}, not {name!r}")
    return from_pretrained(name, **kwargs) if pretrained else _MODELS[name](**kwargs)


def from_pretrained(name_or_path: str | os.PathLike[str], **options: Any) -> Network:
    """Load a network of any architecture, as :meth:`Network.from_pretrained` of its class does."""
    checkpoint = checkpoints.load(name_or_path)
    return _CLASSES[checkpoint.architecture].of(checkpoint, **options)


def build(architecture: str, config: dict[str, Any]) -> Network:
    """A new network of an architecture as files name it."""
    return _CLASSES[architecture](**config)
