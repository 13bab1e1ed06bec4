"""Training of denoisers on a folder of clean images."""

from .loop import TrainingError, train

__all__ = ["TrainingError", "train"]
