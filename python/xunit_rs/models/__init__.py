"""Networks built of xUnits."""

from .. import _torch  # noqa: F401

# isort: split
from .xdncnn import XDnCNN

__all__ = ["XDnCNN"]
