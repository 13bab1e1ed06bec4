"""xSRResNet, the residual super-resolution network of the xUnit paper."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ..modules import xUnit
from ._base import Network, at_least_one, doublings

__all__ = ["XSRResNet"]


class _Block(nn.Module):
    """x + BN(conv(xUnit(conv(x))))."""

    def __init__(self, features: int, kernel_size: int, backend: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.xunit = xUnit(features, kernel_size, True, gate="gaussian", backend=backend)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv2(self.xunit(self.conv1(x)))) + x
        return out


class XSRResNet(Network):
    """SRResNet with xUnits: enlarges an RGB image `scale` times, 2, 4 or another power of 2.

    A conv 9×9 - PReLU; `depth` residual blocks conv 3×3 - xUnit 9×9 (Gaussian, BN) - conv 3×3 - BN
    and conv 3×3 - BN, added to their input; conv 3×3 - pixel shuffle - PReLU for each doubling; a
    last conv 9×9.

    channels: of the image; features: of the blocks; kernel_size: of the units; `backend` is theirs.
    Raises ValueError for sizes below 1, another scale, or an even kernel_size.
    Source: Kligvasser, Rott Shaham, Michaeli, CVPR 2018, section 4.3; the sizes are those of the
    official code of 2018.
    """

    architectures = ("xsrresnet",)

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        depth: int = 10,
        scale: int = 4,
        *,
        kernel_size: int = 9,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, features=features, depth=depth)
        self.channels = channels
        self.scale = scale
        self._config = {
            "channels": channels,
            "features": features,
            "depth": depth,
            "scale": scale,
            "kernel_size": kernel_size,
        }

        def conv(width: int, out: int, k: int = 3) -> nn.Conv2d:
            return nn.Conv2d(width, out, k, padding=k // 2)

        self.head = nn.Sequential(OrderedDict(conv=conv(channels, features, 9), prelu=nn.PReLU()))
        self.residual = nn.Sequential(
            *(_Block(features, kernel_size, backend) for _ in range(depth))
        )
        self.body = nn.Sequential(
            OrderedDict(conv=conv(features, features), norm=nn.BatchNorm2d(features))
        )
        self.upsample = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        conv=conv(features, 4 * features),
                        shuffle=nn.PixelShuffle(2),
                        prelu=nn.PReLU(),
                    )
                )
                for _ in range(doublings(scale))
            )
        )
        self.tail = conv(features, channels, 9)

    def forward(self, x: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x, (N, channels, H, W), `scale` times as large; sigma is accepted and not looked at."""
        self._check(x)
        x = self.head(x)
        out: Tensor = self.tail(self.upsample(self.body(self.residual(x)) + x))
        return out

    def config(self) -> dict[str, Any]:
        return dict(self._config)
