"""The Rust extension: numpy arrays in and out, C-contiguous, all float32 or all float64."""

from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

_F = TypeVar("_F", np.float32, np.float64)

def depthwise_conv2d(
    x: NDArray[_F],
    weight: NDArray[_F],
    bias: NDArray[_F] | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    threads: int,
) -> NDArray[_F]: ...
def depthwise_conv2d_backward(
    grad: NDArray[_F],
    x: NDArray[_F],
    weight: NDArray[_F],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    needs: tuple[bool, bool, bool],
    threads: int,
) -> tuple[NDArray[_F] | None, NDArray[_F] | None, NDArray[_F] | None]: ...
def xunit_forward(
    variant: str,
    gate: str,
    x: NDArray[_F],
    pw_weight: NDArray[_F] | None,
    pw_bias: NDArray[_F] | None,
    weight: NDArray[_F],
    bias: NDArray[_F] | None,
    bn1: tuple[NDArray[_F], NDArray[_F], NDArray[_F] | None, NDArray[_F] | None, float] | None,
    bn2: tuple[NDArray[_F], NDArray[_F], NDArray[_F] | None, NDArray[_F] | None, float] | None,
    save: bool,
    threads: int,
) -> tuple[
    NDArray[_F],
    NDArray[_F] | None,
    NDArray[_F] | None,
    tuple[NDArray[_F], NDArray[_F]] | None,
    tuple[NDArray[_F], NDArray[_F]] | None,
]: ...
def xunit_backward(
    variant: str,
    gate: str,
    grad: NDArray[_F],
    x: NDArray[_F],
    d: NDArray[_F],
    p: NDArray[_F] | None,
    pw_weight: NDArray[_F] | None,
    weight: NDArray[_F],
    bn1: tuple[NDArray[_F], NDArray[_F], NDArray[_F], NDArray[_F], float, bool] | None,
    bn2: tuple[NDArray[_F], NDArray[_F], NDArray[_F], NDArray[_F], float, bool] | None,
    threads: int,
) -> tuple[
    NDArray[_F],
    NDArray[_F] | None,
    NDArray[_F] | None,
    NDArray[_F],
    NDArray[_F],
    NDArray[_F] | None,
    NDArray[_F] | None,
    NDArray[_F] | None,
    NDArray[_F] | None,
]: ...
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
        self, image: NDArray[np.float32], tile: int, threads: int
    ) -> NDArray[np.float32]: ...
