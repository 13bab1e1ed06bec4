"""xDenseNet, the dense denoiser of 2021, built of xUnitD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import xUnitD
from ._base import ResidualDenoiser, at_least_one

__all__ = ["XDenseNet"]


class _Features(nn.Module):
    """A sequence under the official name `features`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(x)
        return out


class _DenseLayer(_Features):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.features(x)], 1)


class XDenseNet(ResidualDenoiser):
    """A densely connected denoiser: its last conv 5×5 predicts the correction, clean = x + it.

    The head and the end of each layer are a cell: conv 3×3 - xUnitD (k×k, sigmoid, BN) - BN. A
    layer BN - ReLU - conv 1×1 to `bottleneck` · `growth` channels - BN - ReLU - cell appends
    `growth` channels to its input; `blocks` says how many layers each dense block has; between
    two blocks BN - ReLU - conv 1×1 halves the channels.

    channels: of the image; features: of the head; kernel_size: of the units; `backend` is theirs.
    The state-dict keys are the official ones.
    Raises ValueError for sizes below 1, an even kernel_size or an unknown backend.
    Source: Kligvasser, Michaeli, Dense xUnit Networks, arXiv 1811.11051; sizes and order of the
    layers as the official code of 2021 (`g_xdense` for denoising) has them.
    """

    architectures = ("xdensenet",)

    def __init__(
        self,
        channels: int = 1,
        features: int = 64,
        blocks: Sequence[int] = (4, 6, 8),
        growth: int = 16,
        bottleneck: int = 2,
        *,
        kernel_size: int = 7,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, features=features, growth=growth, bottleneck=bottleneck)
        at_least_one(blocks=len(blocks))
        for layers in blocks:
            at_least_one(blocks=layers)
        self.channels = channels
        self._config = {
            "channels": channels,
            "features": features,
            "blocks": tuple(blocks),
            "growth": growth,
            "bottleneck": bottleneck,
            "kernel_size": kernel_size,
        }

        def cell(width: int, out: int) -> _Features:
            unit = xUnitD(out, kernel_size, True, backend=backend)
            return _Features(nn.Conv2d(width, out, 3, padding=1), unit, nn.BatchNorm2d(out))

        def squeeze(width: int, out: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 1, bias=False)]

        inner = bottleneck * growth
        width = features
        stages: list[nn.Module] = []
        for i, count in enumerate(blocks):
            if i > 0:
                stages.append(_Features(*squeeze(width, width // 2)))
                width //= 2
            dense: list[nn.Module] = []
            for _ in range(count):
                ahead = [*squeeze(width, inner), nn.BatchNorm2d(inner), nn.ReLU()]
                dense.append(_DenseLayer(*ahead, cell(inner, growth)))
                width += growth
            stages.append(_Features(*dense))
        self.image_to_features = cell(channels, features)
        self.features = nn.Sequential(*stages)
        self.features_to_image = nn.Conv2d(width, channels, 5, padding=2)

    def predict_noise(self, x: Tensor) -> Tensor:
        """The noise in x, (N, channels, H, W): minus the correction."""
        self._check(x)
        out: Tensor = self.features_to_image(self.features(self.image_to_features(x)))
        return -out

    def config(self) -> dict[str, Any]:
        return dict(self._config)
