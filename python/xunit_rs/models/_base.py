"""What the networks share: how they are called, and their files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .. import checkpoints

if TYPE_CHECKING:  # in typing itself only from Python 3.11 on
    from typing_extensions import Self

__all__ = ["Network", "ResidualDenoiser", "at_least_one", "doublings"]


class Network(nn.Module):
    """An image in, (N, channels, H, W) and white at 1, an image out.

    architecture: its name in files. channels: of the image. scale: the sides of the output over
    those of the input, 1 but for super-resolution.
    """

    architectures: ClassVar[tuple[str, ...]]
    """The names in files that the class reads."""

    channels: int
    scale: int = 1

    @property
    def architecture(self) -> str:
        return self.architectures[0]

    def config(self) -> dict[str, Any]:
        """The arguments that build a network of the same shapes."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load a network, in evaluation mode, by the name of one in the package or from a file.

        Files: the official ``.pkl`` of 2018 and ``.pt`` of 2021, KAIR's ``.pth`` of DnCNN, our
        ``.safetensors``; each is known by its keys and shapes, and no pickle is allowed to run
        code. options: arguments that no file holds, such as `backend`.
        Raises CheckpointError (a ValueError) for anything else, FileNotFoundError for a missing
        file.
        """
        checkpoint = checkpoints.load(name_or_path)
        if checkpoint.architecture not in cls.architectures:
            raise checkpoints.CheckpointError(
                f"{name_or_path}: the network is of {checkpoint.architecture!r}, "
                f"not of {cls.__name__}"
            )
        return cls.of(checkpoint, **options)

    @classmethod
    def of(cls, checkpoint: checkpoints.Checkpoint, **options: Any) -> Self:
        """The network of a checkpoint that is of this class, in evaluation mode."""
        model = cls(**checkpoint.config, **options)
        model.load_state_dict(checkpoint.state)
        return model.eval()

    def save(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write weights and `metadata` (as strings) to a .safetensors file, whole or not at all.

        Raises ValueError for what the file has no place for: layers that are not of the
        architecture, such as units in place of its ReLUs, or a BatchNorm of another eps than 1e-5.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and module.eps != 1e-5:
                raise ValueError(f"{name}: eps is {module.eps!r}; the file can only mean 1e-5")
        state, config = self._stored()
        checkpoints.save(path, self.architecture, state, config, metadata)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the file, and the arguments that call for them."""
        return self.state_dict(), self.config()

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"expected an input of shape (N, {self.channels}, H, W), not {tuple(x.shape)}"
            )


class ResidualDenoiser(Network):
    """A denoiser that estimates the noise and takes it away."""

    def forward(self, x: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """Denoise x, (N, channels, H, W), white at 1: the clean image, of the same shape.

        sigma, the noise level on the scale of x, is accepted so that all denoisers are called
        alike; these networks are trained for their levels and do not look at it.
        """
        return x - self.predict_noise(x)

    def predict_noise(self, x: Tensor) -> Tensor:
        """The noise in x, (N, channels, H, W)."""
        raise NotImplementedError


def at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")


def doublings(scale: int) -> int:
    """How often a network for super-resolution doubles the sides."""
    if scale < 2 or scale & (scale - 1):
        raise ValueError(f"scale must be 2, 4, 8 or another power of 2, not {scale!r}")
    return scale.bit_length() - 1
