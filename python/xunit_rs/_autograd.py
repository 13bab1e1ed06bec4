"""The one dispatcher between the Rust kernels and plain PyTorch, and the autograd Functions.

The kernels take plain, strided, real CPU tensors: through the Functions below in eager mode,
through the operators of `_ops.py` under torch.compile. Whatever else arrives runs the plain
definition the caller passed in as `fallback`; `_obstacle` is the list of what that is.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


def _parallel_for() -> int | None:
    """The address of torch's own thread pool, in its C interface since 2.10; None without it."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


# Whether the kernels take tensors; else, before torch 2.10, they are handed over as numpy arrays.
_TAKES_TENSORS = _NO_CORE is None and _core.use_torch(
    Tensor, getattr(Tensor, "__dlpack_c_exchange_api__", None), _parallel_for()
)

if _NO_CORE is None and hasattr(os, "register_at_fork"):
    # A child would share what is kept, and who of the two writes it next had to copy it.
    os.register_at_fork(before=_core.empty_cache)

# Channels that the kernels for channels_last take at a time.
_LANES = int(_core.build_info()["lanes"]) if _NO_CORE is None else 1

BACKENDS = ("auto", "rust", "torch")
GATES = ("sigmoid", "gaussian")
# Elements below which the caching allocator has no memory for a tensor: 8 MiB of float64.
_KEPT = 1 << 20
# Elements from which on the kernels write results past the caches, as src/ops/mod.rs says.
_STREAMED = 1 << 21
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)

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
    compiling = torch.compiler.is_compiling()
    reason = _obstacle(x, parameters, (), compiling)
    if reason is not None:
        refuse(backend, reason)
        return fallback()
    if x.numel() == 0:
        return fallback()
    graph = _needs_graph((x, *parameters))
    call = _Conv(stride, padding, dilation, _autocast_dtype(x.dtype))
    if backend == "auto" and _is_torchs_conv(x, weight, call, graph):
        return fallback()
    if compiling:
        return torch.ops.xunit_rs.depthwise_conv2d(x, weight, bias, *call)
    if graph:
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
    compiling = torch.compiler.is_compiling()
    if not compiling and _is_quick(x, training):
        found = _fresh(x.shape, x.dtype)
        threads = torch.get_num_threads()
        if _core.xunit_evaluate(variant, gate, operands, norms, found, threads, Parameter):
            return found
        del found
    vectors = [t for bn in norms if bn is not None for t in bn[:4]]
    reason = _obstacle(x, operands[1:], vectors, compiling)
    if reason is not None:
        refuse(backend, reason)
        return fallback()
    if x.numel() == 0:
        return fallback()

    affine = [t for bn in norms for t in (bn[:2] if bn is not None else (None, None))]
    inputs = (*operands, *affine)
    graph = _needs_graph(inputs)
    values = x.numel() // x.shape[1]
    for bn, live in zip(norms, training, strict=True):
        if values == 1 and bn is not None and (live or bn.running_mean is None):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
    if compiling:
        return _compiled_unit(variant, gate, inputs, norms, training, graph)
    frozen = tuple(_resolve(bn, live) for bn, live in zip(norms, training, strict=True))
    call = _Unit(variant, gate, frozen)
    if graph:
        out: Tensor = _XUnit.apply(*inputs, call)
    else:
        out, _, _ = _unit_forward(inputs, call, save=False)
    return out


def _is_quick(x: Tensor, training: tuple[bool, bool]) -> bool:
    """Whether an evaluation may be one call of the kernels, if the other tensors are as x is."""
    return (
        not (training[0] or training[1] or torch.is_grad_enabled())
        and _TAKES_TENSORS
        and type(x) is Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in (torch.float32, torch.float64)
        and _mode() is None
        and x.is_contiguous()
        and x.numel() > 0
    )


# ---------------------------------------------------------------- what the kernels do not take


def _obstacle(
    x: Tensor, parameters: Sequence[Vector], norms: Sequence[Vector], compiling: bool
) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    reason = _NO_CORE or (_mode_of_compiler() if compiling else _mode())
    if reason is not None:
        return reason
    tensors = (x, *parameters, *norms)
    if not compiling and _core.is_plain(tensors, Parameter):
        return None
    for t in tensors:
        if t is not None:
            reason = _not_ours(t) if compiling else _not_plain(t)
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
        return "torch.compile is tracing"
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


def _mode_of_compiler() -> str | None:
    """As :func:`_mode`, under torch.compile. An operator has no forward-mode derivative."""
    if _is_exporting():
        return "torch.export is tracing, which is to give plain operations"
    if _is_transforming():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def _is_transforming() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# The compiler is to ask, not to trace, it: torch.compiler.assume_constant_result would do the same,
# but import the compiler with us.
_is_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Before torch 2.7 nothing tells torch.export from torch.compile.
_is_exporting: Callable[[], bool] = getattr(
    torch.compiler, "is_exporting", torch.compiler.is_compiling
)


def _not_ours(t: Tensor) -> str | None:
    """Why the kernels do not take tensors of this type, device, layout or dtype."""
    if type(t) is not Tensor and type(t) is not Parameter:
        return f"{type(t).__name__} is not a plain tensor"
    if t.device.type != "cpu":
        return f"a tensor is on {t.device}"
    if t.layout is not torch.strided or t.is_nested:
        return f"a tensor is not strided ({t.layout})"
    if t.dtype not in _DTYPES:
        return f"a tensor is {t.dtype}"
    return None


def _not_plain(t: Tensor) -> str | None:
    reason = _not_ours(t)
    if reason is not None:
        return reason
    if t._is_zerotensor() or not torch._C._has_storage(t):
        return "a tensor has no memory behind it"
    if t.data_ptr() % t.element_size():
        return "a tensor's memory is not aligned to its elements"
    return None


def _evaluates_channels_last(x: Tensor) -> bool:
    """Whether there is a kernel for channels_last if batch norm is given its statistics."""
    return (
        x.dtype is not torch.float64
        and x.shape[1] % _LANES == 0
        and not x.is_contiguous()
        and _is_channels_last(x)
    )


def _is_torchs_conv(x: Tensor, weight: Tensor, call: _Conv, graph: bool) -> bool:
    """Whether torch is faster on large channels_last tensors.

    Where our kernels read pixels as they lie, one thread of a Xeon: only 3×3 kernels without
    gradients, whose time is the memory's, unless results go past the caches: 0.8 to 1.0 times as
    fast, else 1.5. Elsewhere small kernels, or no gradients (Zen 4, 16×64×64×64 and 16×96×56×56):
    with gradients k = 3 0.6 to 0.8, k = 5 2 to 3.3, k = 7 with strides 2.2, k = 3 dilated 3.7;
    without k = 3 and 5 0.5 to 0.8, k = 7 with strides 0.7.
    """
    if not _in_channels_last(x) or x.numel() < 1 << 16:
        return False
    taps = weight.shape[2] * weight.shape[3]
    if _is_direct(x, weight, call):
        past_caches = math.prod(_output_size(x, weight, call)) >= _STREAMED
        return taps < 25 and not graph and not past_caches
    if graph:
        return taps < 25 and call.dilation == (1, 1)
    return taps < 49 or call.stride != (1, 1)


def _is_direct(x: Tensor, weight: Tensor, call: _Conv) -> bool:
    """Whether kernels read channels_last as it lies, as src/ops/pixels.rs says."""
    kh, kw = weight.shape[2:]
    top, bottom, left, right = call.padding
    return (
        x.dtype is not torch.float64
        and kw in (3, 5, 7, 9)
        and 2 <= kh <= 9
        and call.stride in ((1, 1), (2, 2))
        and call.dilation == (1, 1)
        and max(top, bottom) < kh
        and max(left, right) < kw
        and x.shape[1] >= _LANES
    )


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def _needs_graph(tensors: Sequence[Vector]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch's own convolution would return for an input of `dtype`."""
    if dtype is not torch.float64 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return dtype


# ---------------------------------------------------------------- handover


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _ready(t: Tensor, dtype: torch.dtype) -> Any:
    """What the kernels read of `t`: contiguous, of `dtype`; a tensor, or an array of old torch."""
    if t.dtype is not dtype:
        t = t.to(dtype)
    if not t.is_contiguous():
        t = t.contiguous()
    if t.is_neg():
        t = t.resolve_neg()
    return t if _TAKES_TENSORS else t.detach().numpy()


def _optional(t: Tensor | None, dtype: torch.dtype) -> Any:
    return None if t is None else _ready(t, dtype)


def _to_write(t: Tensor | None) -> Any:
    """A tensor that the kernels write, as they take it."""
    return t if t is None or _TAKES_TENSORS else t.numpy()


def _all_ready(tensors: Sequence[Vector], dtype: torch.dtype, last: bool) -> Sequence[Any]:
    """As :func:`_ready`, of all; the first is an image, which with `last` is in channels_last."""
    if last:
        tensors = (_in_order(tensors[0], last), *tensors[1:])
    # The first one that it is asked about need not be contiguous.
    if _TAKES_TENSORS and _core.is_plain((None, *tensors), Parameter):
        return tensors
    return [_optional(t, dtype) for t in tensors]


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of that shape, of any content."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _fresh_like(x: Tensor, dtype: torch.dtype, last: bool, saved: bool = False) -> Tensor:
    """:func:`_fresh` of the shape of x; a small one takes less time so."""
    if x.numel() < _KEPT and not last:
        return _empty(x, dtype)
    return _fresh(x.shape, dtype, last, saved)


def _fresh(
    shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False, saved: bool = False
) -> Tensor:
    """A tensor of any content, float32 or float64, for the kernels to write, a result or one that
    is `saved` for backward: a large one in memory that was another one before, which takes the
    system no time."""
    if math.prod(shape) >= _KEPT:
        capsule = _core.empty(tuple(shape), dtype is torch.float64, channels_last, saved)
        if capsule is not None:
            return torch.from_dlpack(capsule)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)


def _given_back(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` as a tensor of `dtype`, channels_last if `like` is."""
    if t.dtype is not dtype:
        t = t.to(dtype)
    if _in_channels_last(like):
        t = t.contiguous(memory_format=torch.channels_last)
    return t


# ---------------------------------------------------------------- depthwise convolution


class _Conv(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    out_dtype: torch.dtype


def _output_size(x: Tensor, weight: Tensor, call: _Conv) -> tuple[int, ...]:
    size = (
        (x.shape[i + 2] + sum(call.padding[2 * i : 2 * i + 2]) - call.dilation[i] * (k - 1) - 1)
        // call.stride[i]
        + 1
        for i, k in enumerate(weight.shape[2:])
    )
    return *x.shape[:2], *size


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: _Conv) -> Tensor:
    dtype = _compute_dtype(x.dtype)
    last = _in_channels_last(x)
    y = _fresh(_output_size(x, weight, call), dtype, last)
    _core.depthwise_conv2d(
        _ready(_in_order(x, last), dtype),
        _ready(weight, dtype),
        _optional(bias, dtype),
        call.stride,
        call.padding,
        call.dilation,
        _to_write(_in_order(y, last)),
        torch.get_num_threads(),
        last,
    )
    return _given_back(y, x, call.out_dtype)


def _in_channels_last(x: Tensor) -> bool:
    """Whether the kernels for channels_last take x."""
    return not x.is_contiguous() and _is_channels_last(x)


def _in_order(t: Tensor | None, last: bool) -> Any:
    """(N, C, H, W), or with `last` (N, H, W, C)."""
    return t.permute(0, 2, 3, 1) if last and t is not None else t


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
        saved = ctx.saved_tensors
        call: _Conv = ctx.call
        needs = ctx.needs_input_grad[:3]
        if _must_replay(grad):
            return *_replay(saved, needs, grad, lambda t: _conv_reference(t, call)), None

        return *_conv_backward(grad, saved, needs, call), None


def _conv_backward(
    grad: Tensor, inputs: Sequence[Vector], needs: Sequence[bool], call: _Conv
) -> Sequence[Vector]:
    x, weight, _ = inputs
    assert x is not None and weight is not None
    dtype = _compute_dtype(x.dtype)
    last = _in_channels_last(x)
    grads: list[Vector] = [_fresh(x.shape, dtype, last) if needs[0] else None]
    grads += [
        _empty(t, dtype) if need and t is not None else None
        for t, need in zip(inputs[1:], needs[1:], strict=True)
    ]
    _core.depthwise_conv2d_backward(
        _ready(_in_order(grad, last), dtype),
        _ready(_in_order(x, last), dtype),
        _ready(weight, dtype),
        call.stride,
        call.padding,
        call.dilation,
        _to_write(_in_order(grads[0], last)),
        _to_write(grads[1]),
        _to_write(grads[2]),
        torch.get_num_threads(),
        last,
    )
    return _gradients(grads, inputs, needs)


def _conv_reference(inputs: Sequence[Vector], call: _Conv) -> Tensor:
    x, weight, bias = inputs
    assert x is not None and weight is not None
    top, bottom, left, right = call.padding
    x = F.pad(x, (left, right, top, bottom))
    y = reference.depthwise_conv2d(x, weight, bias, call.stride, 0, call.dilation)
    return y.to(call.out_dtype)


# ---------------------------------------------------------------- xUnits


class _Norm(NamedTuple):
    """One BN of one call: of the statistics given, or (mean None) of the batch's own.

    running: (mean, var, weight of this batch) to be updated by the kernel.
    """

    eps: float
    mean: Tensor | None
    var: Tensor | None
    running: tuple[Tensor, Tensor, float] | None


class _Unit(NamedTuple):
    """One xUnit call. Not a tensor argument, so what it holds is out of autograd's sight."""

    variant: str
    gate: str
    norms: tuple[_Norm | None, ...]


Statistics = tuple[Tensor, Tensor] | None


def _resolve(bn: BatchNormState | None, live: bool) -> _Norm | None:
    if bn is None:
        return None
    if not live and bn.running_mean is not None:
        return _Norm(bn.eps, bn.running_mean, bn.running_var, None)
    if live and bn.running_mean is not None and bn.running_var is not None:
        factor = reference.advance(bn)
        return _Norm(bn.eps, None, None, (bn.running_mean, bn.running_var, factor))
    return _Norm(bn.eps, None, None, None)


def _unit_forward(
    inputs: Sequence[Vector], call: _Unit, save: bool
) -> tuple[Tensor, tuple[Vector, Vector], list[Statistics]]:
    """Run the kernel: the output, d and p if they are to be saved, the statistics of each BN."""
    x = inputs[0]
    assert x is not None
    dtype = _compute_dtype(x.dtype)
    last = _in_channels_last(x)
    ready = _all_ready(inputs, dtype, last)
    norms: list[Any] = []
    statistics: list[Statistics] = []
    updated: list[tuple[Tensor, Tensor]] = []
    for i, bn in enumerate(call.norms):
        if bn is None:
            norms.append(None)
            statistics.append(None)
            continue
        affine = ready[5 + 2 * i : 7 + 2 * i]
        if bn.mean is not None and bn.var is not None:
            given = _ready(bn.mean, dtype), _ready(bn.var, dtype)
            norms.append((*affine, *given, bn.eps, False, None))
            # Copies: the running statistics may have moved on by the time of the backward pass.
            statistics.append((_copy(bn.mean), _copy(bn.var)) if save else None)
            continue
        size = x.shape[1]
        # On x's device, whatever the default one is.
        found = x.new_empty(size, dtype=torch.float64), x.new_empty(size, dtype=torch.float64)
        running = None
        if bn.running is not None:
            mean, var, weight_of_batch = bn.running
            follow = _running(mean, dtype), _running(var, dtype)
            updated += [(mean, follow[0]), (var, follow[1])]
            running = (*map(_to_write, follow), weight_of_batch)
        norms.append((*affine, *map(_to_write, found), bn.eps, True, running))
        statistics.append(found)
    operands = (ready[0], ready[1], ready[2], ready[3], ready[4], norms[0], norms[1])
    evaluates = all(bn is None or bn.mean is not None for bn in call.norms)
    if not save and evaluates and _evaluates_channels_last(x):
        out = _fresh(x.shape, dtype, channels_last=True)
        _core.xunit_evaluate_channels_last(
            call.variant,
            call.gate,
            *operands,
            _to_write(_in_order(out, True)),
            torch.get_num_threads(),
        )
        return out.to(x.dtype), (None, None), statistics
    out = _fresh_like(x, dtype, last)
    d = _fresh_like(x, dtype, last, saved=True) if save else None
    p = _fresh_like(x, dtype, last, saved=True) if save and call.variant == "dense" else None
    _core.xunit_forward(
        call.variant,
        call.gate,
        *operands,
        _to_write(_in_order(out, last)),
        _to_write(_in_order(d, last)),
        _to_write(_in_order(p, last)),
        last,
        torch.get_num_threads(),
    )
    for running_stat, follow_stat in updated:
        if follow_stat is not running_stat:
            running_stat.copy_(follow_stat)
        elif not running_stat.is_inference():
            torch.autograd.graph.increment_version(running_stat)
    return out.to(x.dtype), (d, p), statistics


def _copy(t: Tensor) -> Tensor:
    return t.to(torch.float64, copy=True)


def _running(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A running statistic that the kernel may update in place: itself, or a copy to copy back."""
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


class _XUnit(torch.autograd.Function):
    """x, pw_weight, pw_bias, weight, bias, bn1 weight and bias, bn2 weight and bias, call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, call = args
        out, (d, p), ctx.statistics = _unit_forward(inputs, call, save=True)
        ctx.save_for_backward(*inputs, d, p)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        inputs = saved[:9]
        call: _Unit = ctx.call
        needs = ctx.needs_input_grad[:9]
        if _must_replay(grad):
            return *_replay(
                inputs, needs, grad, lambda t: _unit_reference(call, t, ctx.statistics)
            ), None

        spent = _is_spent(saved, 10 if call.variant == "dense" else 9)
        d, p = saved[9:11]
        return *_unit_backward(grad, inputs, (d, p), ctx.statistics, needs, call, spent), None


# Bytes from which on it is worth asking whether a tensor is spent.
_LARGE = 1 << 20

# Whether the graph outlives the backward pass that is running: what the compiler asks before it
# reuses memory of saved tensors ("donated buffers"). Private, so it may be absent.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
_uses_of_storage: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count", lambda _: 0)


def _references_of_torch() -> int:
    """The references to a tensor's Python object that torch has while it keeps the tensor, too: 1,
    or 0 in older versions."""
    t, keeper = torch.empty(1, device="cpu"), torch.empty(1, device="cpu")
    before = sys.getrefcount(t)
    keeper.grad = t
    return sys.getrefcount(t) - before


_OF_TORCH = _references_of_torch()


def _is_spent(saved: tuple[Vector, ...], i: int) -> bool:
    """Whether `saved[i]`, which forward made, is for nobody but the backward pass that is running:
    nobody else has got hold of it, by `grad_fn.saved_tensors`, say, or by hooks.
    """
    t = saved[i]
    if t is None or t.numel() * t.element_size() < _LARGE or _keeps_graph():
        return False
    # Its Python object and the node that saved it. What hooks give back has only the first.
    if t._use_count() != 2:
        return False
    storage = t.untyped_storage()
    # Objects as well known as the two, if torch, `saved` and this function alone know them.
    both = (object(),)
    other, another = both[0], object()
    return (
        sys.getrefcount(t) == sys.getrefcount(other) + _OF_TORCH
        and sys.getrefcount(storage) == sys.getrefcount(another) + _OF_TORCH
        and _uses_of_storage(storage._cdata) == 2  # t's and that of `storage`
    )


def _unit_backward(
    grad: Tensor,
    inputs: Sequence[Vector],
    saved: tuple[Vector, Vector],
    statistics: Sequence[Statistics],
    needs: Sequence[bool],
    call: _Unit,
    spent: bool = False,
) -> Sequence[Vector]:
    """The gradients; `spent`: that of x may take the place of the last of the saved tensors, which
    `_is_spent`."""
    x = inputs[0]
    d, p = saved
    assert x is not None and d is not None
    dtype = _compute_dtype(x.dtype)
    last = _in_channels_last(x)
    if not spent or last:
        gx = _fresh_like(x, dtype, last)
    else:
        if p is None:
            gx, d = d, None
        else:
            gx, p = p, None
        # Who asks for it again, after an exception or in a hook on the node, is told so.
        torch.autograd.graph.increment_version(gx)
    images = [_in_order(t, last) for t in (grad, d, p)]
    ready = _all_ready((*inputs, *images), dtype, last)
    grads: list[Vector] = [gx]
    grads += [None if t is None else _empty(t, dtype) for t in inputs[1:5]]
    norms: list[Any] = []
    for i, (bn, stats) in enumerate(zip(call.norms, statistics, strict=True)):
        if bn is None or stats is None:
            norms.append(None)
            grads += [None, None]
            continue
        mean, var = map(_to_write, stats)
        pair = [x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)]
        affine = ready[5 + 2 * i : 7 + 2 * i]
        norms.append((*affine, mean, var, bn.eps, bn.mean is None, *map(_to_write, pair)))
        grads += pair
    _core.xunit_backward(
        call.variant,
        call.gate,
        ready[9],
        ready[0],
        ready[10],
        ready[11],
        ready[1],
        ready[3],
        norms[0],
        norms[1],
        _to_write(_in_order(gx, last)),
        _to_write(grads[1]),
        _to_write(grads[2]),
        _to_write(grads[3]),
        _to_write(grads[4]),
        last,
        torch.get_num_threads(),
    )
    return _gradients(grads, inputs, needs)


def _unit_reference(
    call: _Unit, inputs: Sequence[Vector], statistics: Sequence[Statistics]
) -> Tensor:
    """The unit from reference.py, with the statistics the forward pass used."""
    x, pw_weight, pw_bias, weight, bias = inputs[:5]
    assert x is not None and weight is not None
    norms: list[BatchNormState | None] = []
    for i, (bn, stats) in enumerate(zip(call.norms, statistics, strict=True)):
        if bn is None:
            norms.append(None)
            continue
        mean: Vector = None
        var: Vector = None
        if bn.mean is not None and stats is not None:
            mean, var = stats[0].to(x.dtype), stats[1].to(x.dtype)
        norms.append(BatchNormState(inputs[5 + 2 * i], inputs[6 + 2 * i], mean, var, bn.eps))
    bn1, bn2 = norms
    gate = call.gate
    if call.variant == "slim":
        return reference.xunit_slim(x, weight, bias, bn2=bn2, gate=gate)
    if call.variant == "dense":
        assert pw_weight is not None
        return reference.xunit_dense(
            x, pw_weight, pw_bias, weight, bias, bn1=bn1, bn2=bn2, gate=gate
        )
    return reference.xunit(x, weight, bias, bn1=bn1, bn2=bn2, gate=gate)


def _compiled_unit(
    variant: str,
    gate: str,
    inputs: Sequence[Vector],
    norms: Sequence[BatchNormState | None],
    training: Sequence[bool],
    graph: bool,
) -> Tensor:
    """The unit as torch.compile sees it: an operator that changes nothing, and then the updates of
    the running statistics, which the compiler fuses with what is around them."""
    x = inputs[0]
    assert x is not None
    given: list[Vector] = []
    eps: list[float] = []
    batch: list[bool] = []
    for bn, live in zip(norms, training, strict=True):
        own = bn is not None and (live or bn.running_mean is None)
        given += (None, None) if bn is None or own else (bn.running_mean, bn.running_var)
        eps.append(0.0 if bn is None else bn.eps)
        batch.append(own)
    present = [bn is not None for bn in norms]
    out, _, _, *found = torch.ops.xunit_rs.unit(
        *inputs, *given, variant, gate, present, batch, eps, graph
    )
    values = x.numel() // x.shape[1]
    for i, bn in enumerate(norms):
        if bn is not None and training[i] and bn.running_mean is not None:
            _follow(bn, found[2 * i], found[2 * i + 1] * (values / (values - 1)))
    return out


def _follow(bn: BatchNormState, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics towards those of a batch, as nn.BatchNorm2d does."""
    assert bn.running_mean is not None and bn.running_var is not None
    factor: Any = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = 1.0 / bn.num_batches_tracked
    for running, value in ((bn.running_mean, mean), (bn.running_var, var)):
        running.copy_(running + factor * (value - running))


# ---------------------------------------------------------------- backward, shared


def _must_replay(grad: Tensor) -> bool:
    """Whether backward itself is differentiated (create_graph), vmapped or traced."""
    if torch.is_grad_enabled() or _mode() is not None:
        return True
    # The vmap behind is_grads_batched shows in no mode, only on its tensors: they have no memory.
    return not _core.is_plain((grad,), Parameter) and _not_plain(grad) is not None


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
    grads: Sequence[Vector], inputs: Sequence[Vector], needs: Sequence[bool]
) -> list[Vector]:
    return [
        _given_back(g, t, t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(grads, inputs, needs, strict=True)
    ]
