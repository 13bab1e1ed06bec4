"""The memory that is kept from one large tensor to the next."""

from __future__ import annotations

__all__ = ["empty_cache"]


def empty_cache() -> int:
    """Give back to the system the memory that is kept for tensors to come; the bytes that were.

    Results, gradients and saved tensors of 8 MB and more take memory that was another such tensor
    before, where one of that size is free, because fresh memory takes the system as long as some of
    the arithmetic. It keeps up to 1 GiB of what nobody uses, or as many MiB as the environment
    variable XUNIT_CACHE_MB says (0: nothing, and such tensors are ordinary ones); the system takes
    it where memory is short. Tensors in use are not touched. Linux alone; 0 elsewhere.

    Such tensors are PyTorch's, with one difference: `resize_` cannot make them larger.

    >>> import xunit_rs
    >>> freed = xunit_rs.empty_cache()
    """
    from . import _core

    return _core.empty_cache()
