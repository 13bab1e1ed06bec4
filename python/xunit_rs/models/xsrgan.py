"""The generator of xSRGAN, the super-resolution network of 2021."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import xUnitS
from ._base import Network, at_least_one, doublings

__all__ = ["XSRGAN"]


class _Block(nn.Module):
    """x + conv(xUnitS(conv(x)))."""

    def __init__(self, features: int, kernel_size: int, backend: str) -> None:
        super().__init__()
        self.xunit = xUnitS(features, kernel_size, backend=backend)
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.xunit(self.conv1(x)))
        return out


class XSRGAN(Network):
    """The generator: enlarges an RGB image `scale` times, 2, 4 or another power of 2.

    A conv 5×5 - LeakyReLU; `depth` residual blocks conv 3×3 - xUnitS (k×k, sigmoid, no BN) - conv
    3×3; conv 3×3 - pixel shuffle - LeakyReLU for each doubling; conv 3×3 - LeakyReLU - conv 5×5;
    the input, enlarged bilinearly, is added. The slope of the LeakyReLUs is 0.1.

    channels: of the image; features: of the blocks; kernel_size: of the units; `backend` is theirs.
    The state-dict keys are the official ones.
    Raises ValueError for sizes below 1, another scale, or an even kernel_size.
    Source: the official code of 2021 (`g_xsrgan`); after Ledig et al., SRGAN, arXiv 1609.04802.
    """

    architectures = ("xsrgan",)

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        depth: int = 10,
        scale: int = 4,
        *,
        kernel_size: int = 7,
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
        self.lrelu = nn.LeakyReLU(0.1)
        self.image_to_features = nn.Conv2d(channels, features, 5, padding=2)
        self.features = nn.Sequential(
            *(_Block(features, kernel_size, backend) for _ in range(depth))
        )
        self.usample = nn.Sequential(  # the official spelling
            *(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(features, 4 * features, 3, padding=1),
                        shuffle=nn.PixelShuffle(2),
                        lrelu=nn.LeakyReLU(0.1),
                    )
                )
                for _ in range(doublings(scale))
            )
        )
        self.hrconv = nn.Conv2d(features, features, 3, padding=1)
        self.features_to_image = nn.Conv2d(features, channels, 5, padding=2)

    def forward(self, x: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """x, (N, channels, H, W), `scale` times as large; sigma is accepted and not looked at."""
        self._check(x)
        large = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        x = self.usample(self.features(self.lrelu(self.image_to_features(x))))
        out: Tensor = self.features_to_image(self.lrelu(self.hrconv(x))) + large
        return out

    def config(self) -> dict[str, Any]:
        return dict(self._config)
