"""xSRCNN, the small super-resolution networks of the xUnit paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..modules import xUnit
from ._base import Network, at_least_one

__all__ = ["XSRCNN"]


class XSRCNN(Network):
    """SRCNN with xUnits: cells conv - xUnit 9×9 (Gaussian, BN), and a last convolution.

    It sharpens an image that bicubic interpolation has enlarged: the luma Y of BT.601, in
    [16/255, 235/255]; the size stays.

    widths: features of each cell; kernel_sizes: of each cell's convolution and of the last one.
        The defaults are the paper's xSRCNN-f; xSRCNN-c has (42, 32) and (9, 5, 5).
    channels: of the image; kernel_size: of the units; `backend` is theirs.
    Raises ValueError for sizes below 1, even kernels, or lengths that do not fit.
    Source: Kligvasser, Rott Shaham, Michaeli, CVPR 2018, section 4.3.
    """

    architectures = ("xsrcnn",)

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (64, 32),
        kernel_sizes: Sequence[int] = (9, 3, 5),
        *,
        kernel_size: int = 9,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, widths=len(widths))
        for width in widths:
            at_least_one(widths=width)
        if len(kernel_sizes) != len(widths) + 1 or not all(k > 0 and k % 2 for k in kernel_sizes):
            raise ValueError(
                f"kernel_sizes must be {len(widths) + 1} odd numbers, not {tuple(kernel_sizes)!r}"
            )
        self.channels = channels
        self._config = {
            "channels": channels,
            "widths": tuple(widths),
            "kernel_sizes": tuple(kernel_sizes),
            "kernel_size": kernel_size,
        }
        cells = []
        before = channels
        for width, k in zip(widths, kernel_sizes, strict=False):
            unit = xUnit(width, kernel_size, True, gate="gaussian", backend=backend)
            conv = nn.Conv2d(before, width, k, padding=k // 2)
            cells.append(nn.Sequential(OrderedDict(conv=conv, xunit=unit)))
            before = width
        self.cells = nn.Sequential(*cells)
        last = kernel_sizes[-1]
        self.tail = nn.Conv2d(before, channels, last, padding=last // 2)

    def forward(self, x: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """The sharp image of x, (N, channels, H, W); sigma is accepted and not looked at."""
        self._check(x)
        out: Tensor = self.tail(self.cells(x))
        return out

    def config(self) -> dict[str, Any]:
        return dict(self._config)
