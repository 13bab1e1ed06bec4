"""Networks built of xUnits."""

from .xdncnn import XDnCNN

__all__ = ["XDnCNN"]
