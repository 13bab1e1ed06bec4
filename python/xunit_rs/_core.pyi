"""The Rust extension: numpy arrays or torch tensors, contiguous, all float32 or all float64."""

from collections.abc import Callable
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Network",
    "build_info",
    "default_threads",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "empty",
    "empty_cache",
    "fma_peak",
    "is_plain",
    "memory_bandwidth",
    "use_torch",
    "xunit_backward",
    "xunit_evaluate",
    "xunit_evaluate_channels_last",
    "xunit_forward",
]

_Array: TypeAlias = Any
_Running: TypeAlias = tuple[_Array, _Array, float]
_ForwardNorm: TypeAlias = tuple[
    _Array | None, _Array | None, _Array, _Array, float, bool, _Running | None
]
_BackwardNorm: TypeAlias = tuple[
    _Array | None, _Array | None, _Array, _Array, float, bool, _Array, _Array
]

def use_torch(tensor: type, exchange_api: Any, parallel_for: int | None) -> bool: ...
def is_plain(tensors: tuple[Any, ...], parameter: type) -> bool: ...
def empty(shape: tuple[int, ...], double: bool, channels_last: bool, saved: bool) -> Any | None: ...
def empty_cache() -> int: ...
def depthwise_conv2d(
    x: _Array,
    weight: _Array,
    bias: _Array | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    out: _Array,
    threads: int,
    channels_last: bool = False,
) -> None: ...
def depthwise_conv2d_backward(
    grad: _Array,
    x: _Array,
    weight: _Array,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    gx: _Array | None,
    gweight: _Array | None,
    gbias: _Array | None,
    threads: int,
    channels_last: bool = False,
) -> None: ...
def xunit_evaluate(
    variant: str,
    gate: str,
    operands: tuple[_Array, _Array | None, _Array | None, _Array, _Array | None],
    norms: tuple[tuple[Any, ...] | None, tuple[Any, ...] | None],
    out: _Array,
    threads: int,
    parameter: type,
) -> bool: ...
def xunit_evaluate_channels_last(
    variant: str,
    gate: str,
    x: _Array,
    pw_weight: _Array | None,
    pw_bias: _Array | None,
    weight: _Array,
    bias: _Array | None,
    bn1: _ForwardNorm | None,
    bn2: _ForwardNorm | None,
    out: _Array,
    threads: int,
) -> None: ...
def xunit_forward(
    variant: str,
    gate: str,
    x: _Array,
    pw_weight: _Array | None,
    pw_bias: _Array | None,
    weight: _Array,
    bias: _Array | None,
    bn1: _ForwardNorm | None,
    bn2: _ForwardNorm | None,
    out: _Array,
    d: _Array | None,
    p: _Array | None,
    channels_last: bool,
    threads: int,
) -> None: ...
def xunit_backward(
    variant: str,
    gate: str,
    grad: _Array,
    x: _Array,
    d: _Array | None,
    p: _Array | None,
    pw_weight: _Array | None,
    weight: _Array,
    bn1: _BackwardNorm | None,
    bn2: _BackwardNorm | None,
    gx: _Array,
    gpw_weight: _Array | None,
    gpw_bias: _Array | None,
    gweight: _Array,
    gbias: _Array | None,
    channels_last: bool,
    threads: int,
) -> None: ...
def build_info() -> dict[str, str]: ...
def default_threads() -> int: ...
def fma_peak(threads: int, seconds: float) -> float: ...
def memory_bandwidth(threads: int, seconds: float, mib: int) -> dict[str, float]: ...

@final
class Network:
    @staticmethod
    def load(path: str) -> Network: ...
    @property
    def architecture(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def halo(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def denoise(
        self,
        image: NDArray[np.float32],
        tile: int,
        threads: int,
        progress: Callable[[float], object] | None = None,
    ) -> NDArray[np.float32]: ...
