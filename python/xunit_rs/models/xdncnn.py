"""xDnCNN, the denoiser of the xUnit paper, in the forms of 2018 and 2021."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules import xUnit, xUnitS
from ._base import ResidualDenoiser, at_least_one

__all__ = ["XDnCNN"]


class _Form(NamedTuple):
    unit: type[nn.Module]
    kernel_size: int
    gate: str
    depth: int
    first_norm: bool
    tail: int


_FORMS = {
    "2018": _Form(xUnit, 9, "gaussian", 8, False, 3),
    "2021": _Form(xUnitS, 7, "sigmoid", 9, True, 5),
}


class XDnCNN(ResidualDenoiser):
    """DnCNN with xUnits: a residual network of 3×3 convolutions that estimates the noise.

    version "2018" (the paper): `depth` = 8 blocks [BN] - conv 3×3 - xUnit 9×9 (Gaussian gate, BN),
        no BN ahead of the first; a last conv 3×3 predicts the noise: clean = x − noise.
    version "2021" (the official code of that year): `depth` = 9 blocks BN - conv 3×3 - xUnitS 7×7
        (sigmoid, BN); a last conv 5×5 predicts the correction: clean = x + correction.

    channels: of the image; features: of the blocks. `kernel_size` and `gate` of the units default
    to those of the version; `backend` is that of the units.
    Raises ValueError for an unknown version, gate or backend, or sizes below 1.
    Source: Kligvasser, Rott Shaham, Michaeli, CVPR 2018, section 4.1.
    """

    architectures = ("xdncnn-2018", "xdncnn-2021")

    def __init__(
        self,
        version: str = "2018",
        channels: int = 1,
        features: int = 64,
        depth: int | None = None,
        *,
        kernel_size: int | None = None,
        gate: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if version not in _FORMS:
            raise ValueError(f"version must be one of {', '.join(_FORMS)}, not {version!r}")
        form = _FORMS[version]
        depth = form.depth if depth is None else depth
        at_least_one(channels=channels, features=features, depth=depth)
        self.version = version
        self.channels = channels
        self.features = features
        self.kernel_size = form.kernel_size if kernel_size is None else kernel_size
        self.gate = form.gate if gate is None else gate

        blocks = []
        for i in range(depth):
            width = channels if i == 0 else features
            block: OrderedDict[str, nn.Module] = OrderedDict()
            if i > 0 or form.first_norm:
                block["norm"] = nn.BatchNorm2d(width)
            block["conv"] = nn.Conv2d(width, features, 3, padding=1)
            block["xunit"] = form.unit(
                features, self.kernel_size, True, gate=self.gate, backend=backend
            )
            blocks.append(nn.Sequential(block))
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(features, channels, form.tail, padding=form.tail // 2)

    @property
    def architecture(self) -> str:
        return f"xdncnn-{self.version}"

    def predict_noise(self, x: Tensor) -> Tensor:
        """The noise in x, (N, channels, H, W): what the official network of 2018 returns."""
        self._check(x)
        tail: Tensor = self.tail(self.blocks(x))
        return tail if self.version == "2018" else -tail

    def config(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "channels": self.channels,
            "features": self.features,
            "depth": len(self.blocks),
            "kernel_size": self.kernel_size,
            "gate": self.gate,
        }

    def extra_repr(self) -> str:
        return f"version={self.version!r}"
