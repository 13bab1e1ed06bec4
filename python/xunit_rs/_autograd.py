"""The one dispatcher between the Rust kernels and plain PyTorch, and the autograd Functions.

The kernels take plain, strided, real CPU tensors in eager mode. Whatever else arrives runs the
plain definition the caller passed in as `fallback`; `_obstacle` is the list of what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from . import reference
from .reference import BatchNormState

try:
    from . import _core
except ImportError as error:  # a source tree without the compiled extension
    _NO_CORE: str | None = f"the compiled extension cannot be imported ({error})"
else:
    _NO_CORE = None

BACKENDS = ("auto", "rust", "torch")
GATES = ("sigmoid", "gaussian")
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)

Array = NDArray[Any]
Vector = Tensor | None


class BackendError(ValueError, RuntimeError):
    """``backend="rust"`` was asked for and the Rust kernels do not apply; the message says why."""


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")


def check_gate(gate: str) -> None:
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, not {gate!r}")


def refuse(backend: str, reason: str) -> None:
    """Raise if the caller insisted on Rust."""
    if backend == "rust":
        raise BackendError(f"backend='rust' cannot run: {reason}")


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    backend: str,
    fallback: Callable[[], Tensor],
) -> Tensor:
    """Depthwise convolution of checked shapes; padding is (top, bottom, left, right)."""
    if backend == "torch":
        return fallback()
    parameters = (weight, bias)
    reason = _obstacle(x, parameters, ())
    if reason is not None:
        refuse(backend, reason)
        return fallback()
    if x.numel() == 0:
        return fallback()
    call = _Conv(stride, padding, dilation, _autocast_dtype(x.dtype))
    if _needs_graph((x, *parameters)):
        result: Tensor = _DepthwiseConv2d.apply(x, weight, bias, call)
        return result
    return _conv_forward(x, weight, bias, call)


def xunit(
    variant: str,
    gate: str,
    operands: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None],
    norms: tuple[BatchNormState | None, BatchNormState | None],
    training: tuple[bool, bool],
    backend: str,
    fallback: Callable[[], Tensor],
) -> Tensor:
    """One xUnit of checked shapes.

    operands = (x, pw_weight, pw_bias, weight, bias); the pointwise pair only for "dense".
    training holds one flag per BN: frozen and live BNs may be mixed in one unit.
    """
    if backend == "torch":
        return fallback()
    x = operands[0]
    vectors = [t for bn in norms if bn is not None for t in bn[:4]]
    reason = _obstacle(x, operands[1:], vectors)
    if reason is not None:
        refuse(backend, reason)
        return fallback()
    if x.numel() == 0:
        return fallback()

    frozen = [_resolve(bn, live) for bn, live in zip(norms, training, strict=True)]
    values = x.numel() // x.shape[1]
    if values == 1 and any(bn is not None and bn.mean is None for bn in frozen):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    call = _Unit(variant, gate, frozen[0], frozen[1])
    affine = [t for bn in norms for t in (bn[:2] if bn is not None else (None, None))]
    inputs = (*operands, *affine)
    if _needs_graph(inputs):
        out: Tensor = _XUnit.apply(*inputs, call)
    else:
        out = _unit_forward(inputs, call, save=False).out
    for bn, live, stats in zip(norms, training, call.stats, strict=True):
        if live and bn is not None and stats is not None:
            _update_running(bn, stats, values)
    return out


# ---------------------------------------------------------------- what the kernels do not take


def _obstacle(x: Tensor, parameters: Sequence[Vector], norms: Sequence[Vector]) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    reason = _NO_CORE or _mode()
    if reason is not None:
        return reason
    for t in (x, *parameters, *norms):
        if t is not None:
            reason = _not_plain(t)
            if reason is not None:
                return reason
    dtype = x.dtype
    autocast = dtype is not torch.float64 and torch.is_autocast_enabled("cpu")
    for t in parameters:
        if t is None or t.dtype is dtype:
            continue
        if not autocast or t.dtype is torch.float64:
            return f"the input is {dtype} and a parameter is {t.dtype}"
    for t in norms:
        if t is None or t.dtype is dtype:
            continue
        if t.dtype is not torch.float32 or dtype not in _HALF:
            return f"the input is {dtype} and a BatchNorm tensor is {t.dtype}"
    return None


def _mode() -> str | None:
    """The interpreter-wide states in which a call must be seen as torch operations."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    for i in range(torch._C._len_torch_function_stack()):
        # `with torch.device(...)` and set_default_device only redirect factory functions.
        if not isinstance(torch._C._get_function_stack_at(i), DeviceContext):
            return "a TorchFunctionMode is active"
    return None


def _not_plain(t: Tensor) -> str | None:
    if type(t) is not Tensor and type(t) is not Parameter:
        return f"{type(t).__name__} is not a plain tensor"
    if t.device.type != "cpu":
        return f"a tensor is on {t.device}"
    if t.layout is not torch.strided or t.is_nested:
        return f"a tensor is not strided ({t.layout})"
    if t.dtype not in _DTYPES:
        return f"a tensor is {t.dtype}"
    if t._is_zerotensor():  # has no memory behind it
        return "a tensor is a ZeroTensor"
    return None


def _needs_graph(tensors: Sequence[Vector]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch's own convolution would return for an input of `dtype`."""
    if dtype is not torch.float64 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return dtype


# ---------------------------------------------------------------- to and from numpy


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _array(t: Tensor, dtype: torch.dtype) -> Array:
    t = t.detach()
    if t.dtype is not dtype:
        t = t.to(dtype)
    if t.is_neg():
        t = t.resolve_neg()
    array: Array = t.contiguous().numpy()
    return array if array.flags.aligned else array.copy()


def _optional(t: Tensor | None, dtype: torch.dtype) -> Array | None:
    return None if t is None else _array(t, dtype)


def _tensor(array: Array, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`array` as a tensor of `dtype`, channels_last if `like` is."""
    t = torch.from_numpy(array)
    if t.dtype is not dtype:
        t = t.to(dtype)
    if t.dim() == 4 and _is_channels_last(like):
        t = t.contiguous(memory_format=torch.channels_last)
    return t


def _is_channels_last(t: Tensor) -> bool:
    return (
        t.dim() == 4
        and not t.is_contiguous()
        and t.is_contiguous(memory_format=torch.channels_last)
    )


# ---------------------------------------------------------------- depthwise convolution


class _Conv(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    out_dtype: torch.dtype


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: _Conv) -> Tensor:
    dtype = _compute_dtype(x.dtype)
    y = _core.depthwise_conv2d(
        _array(x, dtype),
        _array(weight, dtype),
        _optional(bias, dtype),
        call.stride,
        call.padding,
        call.dilation,
        torch.get_num_threads(),
    )
    return _tensor(y, x, call.out_dtype)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Conv) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return _conv_forward(x, weight, bias, call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None, None
        x, weight, _ = saved = ctx.saved_tensors
        call: _Conv = ctx.call
        needs = ctx.needs_input_grad[:3]
        if _must_replay(grad):
            return *_replay(saved, needs, grad, lambda t: _conv_reference(t, call)), None

        dtype = _compute_dtype(x.dtype)
        gx, gweight, gbias = _core.depthwise_conv2d_backward(
            _array(grad, dtype),
            _array(x, dtype),
            _array(weight, dtype),
            call.stride,
            call.padding,
            call.dilation,
            needs,
            torch.get_num_threads(),
        )
        return *_gradients((gx, gweight, gbias), saved, needs), None


def _conv_reference(inputs: Sequence[Vector], call: _Conv) -> Tensor:
    x, weight, bias = inputs
    assert x is not None and weight is not None
    top, bottom, left, right = call.padding
    x = F.pad(x, (left, right, top, bottom))
    y = reference.depthwise_conv2d(x, weight, bias, call.stride, 0, call.dilation)
    return y.to(call.out_dtype)


# ---------------------------------------------------------------- xUnits


class _Norm(NamedTuple):
    """One BN of one call; mean None = the batch's own statistics."""

    eps: float
    mean: Tensor | None
    var: Tensor | None


class _Unit:
    """One xUnit call. Not a tensor argument, so what it holds is out of autograd's sight."""

    __slots__ = ("gate", "norms", "stats", "variant")

    def __init__(self, variant: str, gate: str, bn1: _Norm | None, bn2: _Norm | None) -> None:
        self.variant = variant
        self.gate = gate
        self.norms = (bn1, bn2)
        self.stats: tuple[tuple[Tensor, Tensor] | None, ...] = (None, None)


class _Forward(NamedTuple):
    out: Tensor
    d: Tensor | None
    p: Tensor | None


def _resolve(bn: BatchNormState | None, live: bool) -> _Norm | None:
    if bn is None:
        return None
    if live or bn.running_mean is None:
        return _Norm(bn.eps, None, None)
    return _Norm(bn.eps, bn.running_mean, bn.running_var)


def _affine(
    weight: Tensor | None, bias: Tensor | None, channels: int, dtype: torch.dtype
) -> tuple[Array, Array]:
    kind = np.float64 if dtype is torch.float64 else np.float32
    return (
        np.ones(channels, kind) if weight is None else _array(weight, dtype),
        np.zeros(channels, kind) if bias is None else _array(bias, dtype),
    )


def _unit_forward(inputs: Sequence[Vector], call: _Unit, save: bool) -> _Forward:
    """Run the kernel; the statistics of the batch, where used, are left in `call.stats`."""
    x, pw_weight, pw_bias, weight, bias = inputs[:5]
    assert x is not None and weight is not None
    dtype = _compute_dtype(x.dtype)
    norms = [
        None
        if bn is None
        else (
            *_affine(inputs[5 + 2 * i], inputs[6 + 2 * i], x.shape[1], dtype),
            _optional(bn.mean, dtype),
            _optional(bn.var, dtype),
            bn.eps,
        )
        for i, bn in enumerate(call.norms)
    ]
    out, d, p, *stats = _core.xunit_forward(
        call.variant,
        call.gate,
        _array(x, dtype),
        _optional(pw_weight, dtype),
        _optional(pw_bias, dtype),
        _array(weight, dtype),
        _optional(bias, dtype),
        norms[0],
        norms[1],
        save,
        torch.get_num_threads(),
    )
    call.stats = tuple(
        None if s is None else (torch.from_numpy(s[0]), torch.from_numpy(s[1])) for s in stats
    )
    return _Forward(
        _tensor(out, x, x.dtype),
        None if d is None else torch.from_numpy(d),
        None if p is None else torch.from_numpy(p),
    )


class _XUnit(torch.autograd.Function):
    """x, pw_weight, pw_bias, weight, bias, bn1 weight and bias, bn2 weight and bias, call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, call = args
        done = _unit_forward(inputs, call, save=True)
        statistics: list[Tensor | None] = []
        for bn, stats in zip(call.norms, call.stats, strict=True):
            if bn is None:
                statistics += [None, None]
            else:
                statistics += stats if stats is not None else (bn.mean, bn.var)
        # The running statistics are saved too: autograd then notices if they change meanwhile.
        ctx.save_for_backward(*inputs, done.d, done.p, *statistics)
        ctx.set_materialize_grads(False)
        ctx.variant, ctx.gate = call.variant, call.gate
        ctx.norms = tuple(None if bn is None else (bn.eps, bn.mean is None) for bn in call.norms)
        return done.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        inputs, (d, p), statistics = saved[:9], saved[9:11], saved[11:]
        needs = ctx.needs_input_grad[:9]
        if _must_replay(grad):
            return *_replay(
                inputs, needs, grad, lambda t: _unit_reference(ctx, t, statistics)
            ), None

        x, pw_weight, _, weight = inputs[:4]
        dtype = _compute_dtype(x.dtype)
        norms = [
            None
            if bn is None
            else (
                *_affine(inputs[5 + 2 * i], inputs[6 + 2 * i], x.shape[1], dtype),
                _array(statistics[2 * i], dtype),
                _array(statistics[2 * i + 1], dtype),
                *bn,
            )
            for i, bn in enumerate(ctx.norms)
        ]
        grads = _core.xunit_backward(
            ctx.variant,
            ctx.gate,
            _array(grad, dtype),
            _array(x, dtype),
            _array(d, dtype),
            _optional(p, dtype),
            _optional(pw_weight, dtype),
            _array(weight, dtype),
            norms[0],
            norms[1],
            torch.get_num_threads(),
        )
        return *_gradients(grads, inputs, needs), None


def _unit_reference(ctx: Any, inputs: Sequence[Vector], statistics: Sequence[Vector]) -> Tensor:
    """The unit from reference.py, with the statistics the forward pass used."""
    x, pw_weight, pw_bias, weight, bias = inputs[:5]
    assert x is not None and weight is not None
    norms: list[BatchNormState | None] = []
    for i, bn in enumerate(ctx.norms):
        if bn is None:
            norms.append(None)
            continue
        eps, batch = bn
        mean, var = (None, None) if batch else statistics[2 * i : 2 * i + 2]
        affine = inputs[5 + 2 * i : 7 + 2 * i]
        if mean is not None and var is not None:
            mean, var = mean.to(x.dtype), var.to(x.dtype)
        norms.append(BatchNormState(affine[0], affine[1], mean, var, eps))
    bn1, bn2 = norms
    gate = ctx.gate
    if ctx.variant == "slim":
        return reference.xunit_slim(x, weight, bias, bn2=bn2, gate=gate)
    if ctx.variant == "dense":
        assert pw_weight is not None
        return reference.xunit_dense(
            x, pw_weight, pw_bias, weight, bias, bn1=bn1, bn2=bn2, gate=gate
        )
    return reference.xunit(x, weight, bias, bn1=bn1, bn2=bn2, gate=gate)


@torch.no_grad()
def _update_running(bn: BatchNormState, stats: tuple[Tensor, Tensor], values: int) -> None:
    if bn.running_mean is None or bn.running_var is None:
        return
    factor = reference.advance(bn)
    mean, var = (s.double() for s in stats)
    var = var * (values / (values - 1))  # the running variance is the unbiased one
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        running.copy_(new * factor + running.double() * (1.0 - factor))


# ---------------------------------------------------------------- backward, shared


def _must_replay(grad: Tensor) -> bool:
    """Whether backward itself is differentiated (create_graph), vmapped or traced."""
    return (
        torch.is_grad_enabled()
        or _mode() is not None
        or _not_plain(grad) is not None
        # The vmap behind is_grads_batched shows in no mode, only on its tensors.
        or not torch._C._has_storage(grad)
    )


def _replay(
    inputs: Sequence[Vector],
    needs: Sequence[bool],
    grad: Tensor,
    run: Callable[[Sequence[Vector]], Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients by way of the plain definition, differentiable again if grad mode is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Fresh aliases, because one input may have been computed from another: the gradient
        # must stop at each of them.
        aliases: list[Vector] = [
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        ]
        x = aliases[0]
        assert x is not None
        dtype = _compute_dtype(x.dtype)
        out = run([None if t is None else t.to(dtype) for t in aliases])
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                out, wanted, grad.to(out.dtype), create_graph=again, allow_unused=True
            )
        )
        return tuple(next(found) if need else None for need in needs)


def _gradients(
    arrays: Sequence[Array | None], inputs: Sequence[Vector], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(
        _tensor(a, t, t.dtype) if need and a is not None and t is not None else None
        for a, t, need in zip(arrays, inputs, needs, strict=True)
    )
