"""The kernels as operators of `torch.library`: what torch.compile puts into its graphs.

In eager mode the Functions of `_autograd.py` call the same kernels, at a third of the overhead. An
operator changes none of its arguments: the statistics of a batch are results, so that the compiler
sees what becomes of them. Results that there are not are tensors without elements.
"""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autograd
from ._autograd import Statistics, Vector, _Conv, _Norm, _Unit

__all__: list[str] = []


# ---------------------------------------------------------------- depthwise convolution

_CONV = "int[] stride, int[] padding, int[] dilation, ScalarType out_dtype"


@torch.library.custom_op(
    "xunit_rs::depthwise_conv2d",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> Tensor",
)
def _conv(x: Tensor, weight: Tensor, bias: Vector, *call: Any) -> Tensor:
    return _autograd._conv_forward(x, weight, bias, _conv_of(call))


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Vector, *call: Any) -> Tensor:
    size = _autograd._output_size(x, weight, _conv_of(call))
    y = x.new_empty(size, dtype=call[3])
    return _autograd._given_back(y, x, call[3])


@torch.library.custom_op(
    "xunit_rs::depthwise_conv2d_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_CONV}, bool[] needs)"
    " -> Tensor[]",
)
def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Vector, *rest: Any) -> Any:
    *call, needs = rest
    return _wanted(_autograd._conv_backward(grad, (x, weight, bias), needs, _conv_of(call)), needs)


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Vector, *rest: Any) -> Any:
    return _fake_gradients((x, weight, bias), rest[-1])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.set_materialize_grads(False)
    ctx.call = inputs[3:]


def _conv_gradient(ctx: Any, grad: Vector) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    saved, needs = ctx.saved_tensors, _needs(ctx.needs_input_grad[:3], ctx.saved_tensors)
    grads: Sequence[Vector]
    if torch.is_grad_enabled():
        call = _conv_of(ctx.call)
        grads = _autograd._replay(saved, needs, grad, lambda t: _autograd._conv_reference(t, call))
    else:
        found = torch.ops.xunit_rs.depthwise_conv2d_backward(grad, *saved, *ctx.call, needs)
        grads = _spread(found, needs)
    return *grads, *(None,) * 4


_conv.register_autograd(_conv_gradient, setup_context=_conv_setup)


def _conv_of(call: Sequence[Any]) -> _Conv:
    stride, padding, dilation, out_dtype = call
    return _Conv(tuple(stride), tuple(padding), tuple(dilation), out_dtype)


# ---------------------------------------------------------------- xUnits

_INPUTS = (
    "Tensor x, Tensor? pw_weight, Tensor? pw_bias, Tensor weight, Tensor? bias, "
    "Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn2_weight, Tensor? bn2_bias"
)
_STATISTICS = "Tensor? mean1, Tensor? var1, Tensor? mean2, Tensor? var2"
# norms: which of the two BNs there are; batch: which use the statistics of the batch.
_UNIT = "str variant, str gate, bool[] norms, bool[] batch, float[] eps"


@torch.library.custom_op(
    "xunit_rs::unit",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}, {_STATISTICS}, {_UNIT}, bool save)"
    " -> (Tensor out, Tensor d, Tensor p, Tensor m1, Tensor v1, Tensor m2, Tensor v2)",
)
def _unit(*args: Any) -> tuple[Tensor, ...]:
    inputs, given, call, save = args[:9], args[9:13], args[13:18], args[18]
    unit, _ = _unit_of(given, call)
    out, (d, p), statistics = _autograd._unit_forward(inputs, unit, save)
    found: list[Vector] = [d, p]
    for of_batch, pair in zip(call[3], statistics, strict=True):
        found += pair if of_batch and pair is not None else (None, None)
    return out, *(inputs[0].new_empty(0) if t is None else t for t in found)


@_unit.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    x, (variant, _, _, batch, _), save = args[0], args[13:18], args[18]
    dtype = _autograd._compute_dtype(x.dtype)
    kept = (save, save and variant == "dense")
    # Not one empty tensor for both: no result may be an alias of another.
    found = [_like(x, dtype) if keep else x.new_empty(0) for keep in kept]
    for of_batch in batch:
        size = x.shape[1]
        for _ in range(2):
            found.append(x.new_empty(size, dtype=torch.float64) if of_batch else x.new_empty(0))
    return _like(x), *found


@torch.library.custom_op(
    "xunit_rs::unit_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, {_INPUTS}, Tensor d, Tensor p, {_STATISTICS}, {_UNIT}, bool[] needs)"
    " -> Tensor[]",
)
def _unit_backward(grad: Tensor, *args: Any) -> Any:
    inputs, (d, p), given, call, needs = args[:9], args[9:11], args[11:15], args[15:20], args[20]
    unit, statistics = _unit_of(given, call)
    saved = d, p if call[0] == "dense" else None
    found = _autograd._unit_backward(grad, inputs, saved, statistics, needs, unit)
    return _wanted(found, needs)


@_unit_backward.register_fake
def _(grad: Tensor, *args: Any) -> Any:
    return _fake_gradients(args[:9], args[20])


def _unit_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, d, p, *found = output
    given = list(inputs[9:13])
    for i, of_batch in enumerate(inputs[16]):
        if of_batch:
            given[2 * i : 2 * i + 2] = found[2 * i : 2 * i + 2]
    ctx.save_for_backward(*inputs[:9], d, p, *given)
    ctx.mark_non_differentiable(d, p, *found)
    ctx.set_materialize_grads(False)
    ctx.call = inputs[13:18]


def _unit_gradient(ctx: Any, grad: Vector, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 19
    saved = ctx.saved_tensors
    inputs, needs = saved[:9], _needs(ctx.needs_input_grad[:9], saved)
    grads: Sequence[Vector]
    if torch.is_grad_enabled():
        unit, statistics = _unit_of(saved[11:], ctx.call)
        grads = _autograd._replay(
            inputs, needs, grad, lambda t: _autograd._unit_reference(unit, t, statistics)
        )
    else:
        grads = _spread(torch.ops.xunit_rs.unit_backward(grad, *saved, *ctx.call, needs), needs)
    return *grads, *(None,) * 10


_unit.register_autograd(_unit_gradient, setup_context=_unit_setup)


def _unit_of(given: Sequence[Vector], call: Sequence[Any]) -> tuple[_Unit, list[Statistics]]:
    """The call and its statistics: of `given`, those of a batch are results of the forward pass."""
    variant, gate, present, batch, eps = call
    norms: list[_Norm | None] = []
    statistics: list[Statistics] = []
    for i in range(2):
        mean, var = given[2 * i : 2 * i + 2]
        if not present[i]:
            norms.append(None)
        elif batch[i]:
            norms.append(_Norm(eps[i], None, None, None))
        else:
            norms.append(_Norm(eps[i], mean, var, None))
        if present[i] and mean is not None and var is not None:
            statistics.append((mean.double(), var.double()))
        else:
            statistics.append(None)
    return _Unit(variant, gate, tuple(norms)), statistics


# ---------------------------------------------------------------- shared


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as the kernels give back one of the shape of `t`, or keep one of that type."""
    dtype = dtype or t.dtype
    return _autograd._given_back(_autograd._empty(t, dtype), t, dtype)


def _needs(needs: Sequence[bool], inputs: Sequence[Vector]) -> list[bool]:
    return [need and t is not None for need, t in zip(needs, inputs)]  # noqa: B905


def _wanted(grads: Sequence[Vector], needs: Sequence[bool]) -> list[Tensor]:
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


def _fake_gradients(inputs: Sequence[Vector], needs: Sequence[bool]) -> list[Tensor]:
    return [_like(t) for t, need in zip(inputs, needs, strict=True) if need and t is not None]


def _spread(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Vector]:
    grads = iter(found)
    return [next(grads) if need else None for need in needs]
