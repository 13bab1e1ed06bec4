"""DnCNN, the ReLU network that xDnCNN is measured against."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from .. import checkpoints
from ._base import ResidualDenoiser, at_least_one

__all__ = ["DnCNN"]


class DnCNN(ResidualDenoiser):
    """A conv 3×3, `depth` blocks conv 3×3 - [BN] - ReLU, a last conv predicts the noise.

    depth: 15 for the paper's network for one noise level (17 convolutions), 18 for its blind one.
    channels: of the image; features: of the blocks; tail: side of the last kernel, 3 in the paper,
    5 in the official xUnit code of 2021.
    batch_norm: as published for training. Files hold the network without it: :meth:`save` merges
    each BN in evaluation mode into its convolution, as KAIR's files are, and what is loaded has
    none. Merging rounds the weights; the function is the same.
    Raises ValueError for sizes below 1 or an even tail.
    Source: Zhang, Zuo, Chen, Meng, Zhang, IEEE TIP 2017, arXiv 1608.03981, section III.
    """

    architectures = ("dncnn",)

    def __init__(
        self,
        channels: int = 1,
        features: int = 64,
        depth: int = 15,
        *,
        tail: int = 3,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        at_least_one(channels=channels, features=features, depth=depth)
        if tail < 1 or tail % 2 == 0:
            raise ValueError(f"tail must be odd, not {tail!r}")
        self.channels = channels
        self.features = features
        self.batch_norm = batch_norm
        self.head = nn.Conv2d(channels, features, 3, padding=1)
        self.relu = nn.ReLU()
        blocks = []
        for _ in range(depth):
            block: OrderedDict[str, nn.Module] = OrderedDict()
            block["conv"] = nn.Conv2d(features, features, 3, padding=1, bias=not batch_norm)
            if batch_norm:
                block["norm"] = nn.BatchNorm2d(features)
            block["relu"] = nn.ReLU()
            blocks.append(nn.Sequential(block))
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(features, channels, tail, padding=tail // 2)

    def predict_noise(self, x: Tensor) -> Tensor:
        """The noise in x, (N, channels, H, W)."""
        self._check(x)
        out: Tensor = self.tail(self.blocks(self.relu(self.head(x))))
        return out

    def config(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "features": self.features,
            "depth": len(self.blocks),
            "tail": self.tail.kernel_size[0],
            "batch_norm": self.batch_norm,
        }

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.state_dict()
        if self.batch_norm:
            for i in range(len(self.blocks)):
                checkpoints.merge_batch_norm(state, f"blocks.{i}.conv", f"blocks.{i}.norm")
        return state, self.config() | {"batch_norm": False}
