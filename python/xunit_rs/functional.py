"""The operations as functions on torch tensors: fused Rust kernels where they apply.

``backend="auto"`` runs the Rust kernels on plain CPU tensors, where they win, and
:mod:`xunit_rs.reference` on everything else; ``"torch"`` always runs the reference; ``"rust"``
raises where the kernels do not apply and says why. All are differentiable to any order.
"""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
import operator

from torch import Tensor

from . import _autograd, _ops, reference  # noqa: F401  (the operators are registered)
from .reference import BatchNormState

__all__ = [
    "BatchNormState",
    "depthwise_conv2d",
    "gaussian",
    "xunit",
    "xunit_dense",
    "xunit_slim",
]


def gaussian(x: Tensor) -> Tensor:
    """The Gaussian gate ``exp(-x²)``, elementwise (xUnit, CVPR 2018, section 3)."""
    return reference.gaussian(x)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Depthwise 2-D convolution (cross-correlation), as ``F.conv2d(..., groups=C)``.

    x (N,C,H,W) or (C,H,W), weight (C,1,kh,kw), bias (C,). Padding is zeros: an int, a pair,
    "valid", or "same" (stride 1 only; an even kernel pads one more at the bottom and right).
    Raises ValueError for shapes or a geometry that do not fit.
    """
    _autograd.check_backend(backend)
    if x.dim() == 3:
        y = depthwise_conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, backend=backend
        )
        return y.squeeze(0)
    _check_input(x, weight)
    _check_vector("bias", bias, x.shape[1])
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    kernel = (weight.shape[2], weight.shape[3])
    pads = _padding(padding, kernel, strides, dilations)
    for axis in (0, 1):
        size = x.shape[2 + axis] + pads[2 * axis] + pads[2 * axis + 1]
        if size < dilations[axis] * (kernel[axis] - 1) + 1:
            raise ValueError(
                f"kernel {kernel} with dilation {dilations} is larger than the padded input: "
                f"input {tuple(x.shape)}, padding {padding!r}"
            )
    return _autograd.depthwise_conv2d(
        x,
        weight,
        bias,
        strides,
        pads,
        dilations,
        backend,
        lambda: reference.depthwise_conv2d(
            x,
            weight,
            bias,
            strides,
            padding if isinstance(padding, str) else (pads[0], pads[2]),
            dilations,
        ),
    )


def xunit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn1: BatchNormState | None = None,
    bn2: BatchNormState | None = None,
    gate: str = "sigmoid",
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The xUnit ``x · g([BN2] DW_k(relu([BN1] x)))`` (CVPR 2018, section 3).

    x (N,C,H,W), weight (C,1,k,k) with k odd, bias (C,), gate "sigmoid" or "gaussian". In training
    a BN uses the batch's statistics and updates its running ones in place. Raises ValueError for
    shapes that do not fit, and for one value per channel in training.
    """
    _check_unit(x, weight, bias, bn1, bn2, gate, backend)
    return _autograd.xunit(
        "xunit",
        gate,
        (x, None, None, weight, bias),
        (bn1, bn2),
        (training, training),
        backend,
        lambda: reference.xunit(x, weight, bias, bn1=bn1, bn2=bn2, gate=gate, training=training),
    )


def xunit_slim(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn2: BatchNormState | None = None,
    gate: str = "sigmoid",
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The slim xUnit ``x · g([BN2] DW_k(x))`` (arXiv 1811.11051). Arguments as :func:`xunit`."""
    _check_unit(x, weight, bias, None, bn2, gate, backend)
    return _autograd.xunit(
        "slim",
        gate,
        (x, None, None, weight, bias),
        (None, bn2),
        (training, training),
        backend,
        lambda: reference.xunit_slim(x, weight, bias, bn2=bn2, gate=gate, training=training),
    )


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
    backend: str = "auto",
) -> Tensor:
    """The dense xUnit ``x · g([BN2] DW_k(relu([BN1] PW x)))`` (arXiv 1811.11051).

    PW is a 1×1 convolution: pw_weight (C,C,1,1), pw_bias (C,). The rest as :func:`xunit`.
    """
    _check_unit(x, weight, bias, bn1, bn2, gate, backend)
    channels = x.shape[1]
    if tuple(pw_weight.shape) != (channels, channels, 1, 1):
        raise ValueError(
            f"pw_weight must be ({channels}, {channels}, 1, 1), not {tuple(pw_weight.shape)}"
        )
    _check_vector("pw_bias", pw_bias, channels)
    return _autograd.xunit(
        "dense",
        gate,
        (x, pw_weight, pw_bias, weight, bias),
        (bn1, bn2),
        (training, training),
        backend,
        lambda: reference.xunit_dense(
            x, pw_weight, pw_bias, weight, bias, bn1=bn1, bn2=bn2, gate=gate, training=training
        ),
    )


def _check_unit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn1: BatchNormState | None,
    bn2: BatchNormState | None,
    gate: str,
    backend: str,
) -> None:
    _autograd.check_backend(backend)
    _autograd.check_gate(gate)
    _check_input(x, weight)
    kh, kw = weight.shape[2:]
    if kh != kw or kh % 2 == 0:
        raise ValueError(f"the kernel must be square and odd, not {kh}×{kw}")
    _check_vector("bias", bias, x.shape[1])
    for name, bn in (("bn1", bn1), ("bn2", bn2)):
        if bn is None:
            continue
        for field in ("weight", "bias", "running_mean", "running_var"):
            _check_vector(f"{name}.{field}", getattr(bn, field), x.shape[1])
        if (bn.running_mean is None) != (bn.running_var is None):
            raise ValueError(f"{name} must have both running_mean and running_var, or neither")


def _check_input(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating point, not {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"the input must have 4 dimensions (N, C, H, W), not {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 1 or 0 in weight.shape[2:]:
        raise ValueError(f"the weight must be (C, 1, kh, kw), not {tuple(weight.shape)}")
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"the weight {tuple(weight.shape)} is for {weight.shape[0]} channels, "
            f"the input {tuple(x.shape)} has {x.shape[1]}"
        )


def _check_vector(name: str, value: Tensor | None, channels: int) -> None:
    if value is not None and tuple(value.shape) != (channels,):
        raise ValueError(f"{name} must be ({channels},), not {tuple(value.shape)}")


def _pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    try:
        pair = tuple(
            map(operator.index, value if isinstance(value, (tuple, list)) else [value] * 2)
        )
    except TypeError:
        raise TypeError(f"{name} must be an int or a pair of ints, not {value!r}") from None
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an int or a pair of ints, at least {least}: {value!r}")
    return pair[0], pair[1]


def _padding(
    padding: int | tuple[int, int] | str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(f"padding must be 'same', 'valid' or ints, not {padding!r}")
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, not {stride}")
        th, tw = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return th // 2, th - th // 2, tw // 2, tw - tw // 2
    ph, pw = _pair("padding", padding, least=0)
    return ph, ph, pw, pw
