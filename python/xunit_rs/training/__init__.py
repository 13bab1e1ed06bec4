"""Training of denoisers on a folder of clean images."""

from __future__ import annotations

from .. import _torch  # noqa: F401

# isort: split
from .loop import TrainingError, train

__all__ = ["TrainingError", "train"]
