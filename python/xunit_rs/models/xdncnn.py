"""xDnCNN, the denoiser of the xUnit paper, in the forms of 2018 and 2021."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import checkpoints
from ..modules import xUnit, xUnitS

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


class XDnCNN(nn.Module):
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
        for name, value in (("channels", channels), ("features", features), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")
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

    def forward(self, x: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """Denoise x, (N, channels, H, W), white at 1: the clean image, of the same shape.

        sigma, the noise level on the scale of x, is accepted so that all denoisers are called
        alike; this network is trained for one level and does not look at it.
        """
        tail = self._tail(x)
        return x - tail if self.version == "2018" else x + tail

    def predict_noise(self, x: Tensor) -> Tensor:
        """The noise in x, (N, channels, H, W): what the official network of 2018 returns."""
        tail = self._tail(x)
        return tail if self.version == "2018" else -tail

    def _tail(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"expected an input of shape (N, {self.channels}, H, W), not {tuple(x.shape)}"
            )
        out: Tensor = self.tail(self.blocks(x))
        return out

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, backend: str = "auto"
    ) -> XDnCNN:
        """Load a network, in evaluation mode, by the name of one in the package or from a file.

        Files: the official ``.pkl`` of 2018, the official ``.pt`` of 2021, our ``.safetensors``;
        each is known by its keys and shapes, and no pickle is allowed to run code.
        Raises CheckpointError (a ValueError) for anything else, FileNotFoundError for a missing
        file.
        """
        checkpoint = checkpoints.load(name_or_path)
        model = cls(backend=backend, **checkpoint.config)
        model.load_state_dict(checkpoint.state)
        return model.eval()

    def save(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write weights and `metadata` (as strings) to a .safetensors file, whole or not at all.

        Raises ValueError for a BatchNorm of another eps than 1e-5: the file has no place for it.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and module.eps != 1e-5:
                raise ValueError(f"{name}: eps is {module.eps!r}; the file can only mean 1e-5")
        config = {
            "version": self.version,
            "channels": self.channels,
            "features": self.features,
            "depth": len(self.blocks),
            "kernel_size": self.kernel_size,
            "gate": self.gate,
        }
        checkpoints.save(path, self.state_dict(), config, metadata)

    def extra_repr(self) -> str:
        return f"version={self.version!r}"
