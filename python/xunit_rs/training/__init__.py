"""Training of denoisers on a folder of clean images."""

from __future__ import annotations

from .loop import TrainingError, train

__all__ = ["TrainingError", "train"]
