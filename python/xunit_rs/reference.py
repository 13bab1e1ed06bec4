"""The operations of :mod:`xunit_rs.functional` in plain PyTorch: the definition, and the fallback.

Every function here is differentiable to any order, runs on any device and under any torch
transform. Tests compare the Rust path with these.
"""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BatchNormState",
    "depthwise_conv2d",
    "gaussian",
    "xunit",
    "xunit_dense",
    "xunit_slim",
]


class BatchNormState(NamedTuple):
    """What one BatchNorm2d holds: per-channel tensors of shape (C,) and its constants.

    In training the running statistics and ``num_batches_tracked`` are updated in place, exactly
    as ``torch.nn.BatchNorm2d`` does; ``momentum=None`` is the cumulative average. Without running
    statistics the batch's own are used, in evaluation too.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    num_batches_tracked: Tensor | None = None


def gaussian(x: Tensor) -> Tensor:
    """The Gaussian gate ``exp(-x²)``, elementwise (xUnit, CVPR 2018, section 3)."""
    return torch.exp(-(x * x))


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Depthwise 2-D convolution: x (N,C,H,W), weight (C,1,kh,kw), bias (C,)."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=weight.shape[0])


def xunit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn1: BatchNormState | None = None,
    bn2: BatchNormState | None = None,
    gate: str = "sigmoid",
    training: bool = False,
) -> Tensor:
    """``x · g([BN2] DW_k(relu([BN1] x)))``."""
    d = _same_conv(F.relu(_batch_norm(x, bn1, training)), weight, bias)
    return x * _gate(_batch_norm(d, bn2, training), gate)


def xunit_slim(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn2: BatchNormState | None = None,
    gate: str = "sigmoid",
    training: bool = False,
) -> Tensor:
    """``x · g([BN2] DW_k(x))``."""
    return x * _gate(_batch_norm(_same_conv(x, weight, bias), bn2, training), gate)


def xunit_dense(
    x: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn1: BatchNormState | None = None,
    bn2: BatchNormState | None = None,
    gate: str = "sigmoid",
    training: bool = False,
) -> Tensor:
    """``x · g([BN2] DW_k(relu([BN1] PW x)))``; PW is a 1×1 convolution, weight (C,C,1,1)."""
    p = F.relu(_batch_norm(F.conv2d(x, pw_weight, pw_bias), bn1, training))
    return x * _gate(_batch_norm(_same_conv(p, weight, bias), bn2, training), gate)


def advance(bn: BatchNormState) -> float:
    """Count one training batch in `bn` and return the weight of that batch's statistics."""
    if bn.num_batches_tracked is None:
        return 0.0 if bn.momentum is None else bn.momentum
    bn.num_batches_tracked.add_(1)
    return 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum


def _same_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kh, kw = weight.shape[-2:]
    return depthwise_conv2d(x, weight, bias, padding=(kh // 2, kw // 2))


def _batch_norm(x: Tensor, bn: BatchNormState | None, training: bool) -> Tensor:
    if bn is None:
        return x
    tracked = bn.running_mean is not None
    factor = advance(bn) if training and tracked else 0.0
    return F.batch_norm(
        x,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        training or not tracked,
        factor,
        bn.eps,
    )


def _gate(d: Tensor, gate: str) -> Tensor:
    return gaussian(d) if gate == "gaussian" else torch.sigmoid(d)
