"""Imported first by what needs PyTorch: where it is missing, the error says how to get it."""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "this part of xunit_rs needs PyTorch: pip install 'xunit-rs[torch]'", name="torch"
    ) from error
