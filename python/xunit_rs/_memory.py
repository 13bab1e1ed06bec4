"""The memory that is kept from one large tensor to the next."""

from __future__ import annotations

__all__ = ["empty_cache"]


def empty_cache() -> int:
    """Give back to the system the memory that is kept for tensors to come, and return the bytes.

    Results, gradients and saved tensors of 8 MiB and more, float32 and float64, take memory that
    was another such tensor before, where one of about that size is free, because fresh memory takes
    the system as long as some of the arithmetic. It keeps up to 1024 MiB of what nobody uses, or as
    many as the environment variable XUNIT_CACHE_MB says when the package is imported (0: nothing,
    and such tensors are ordinary ones). What has lain unused for a second when another such tensor
    goes is the system's to take where physical memory is short, though until then it counts as
    resident. Tensors in use are not touched. Linux alone; 0 elsewhere.

    Such tensors are PyTorch's, but their storage cannot be resized, not even to nothing
    (RuntimeError), nor a result of PyTorch be written to one that is too small for it; and its
    profiler does not see their memory.

    >>> import xunit_rs
    >>> freed = xunit_rs.empty_cache()
    """
    from . import _core

    return _core.empty_cache()
