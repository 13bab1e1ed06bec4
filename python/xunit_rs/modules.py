"""xUnit layers: per-pixel activations with a learned spatial gate, and a depthwise convolution."""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from . import _autograd, functional
from .reference import BatchNormState

__all__ = ["DepthwiseConv2d", "Gaussian", "xUnit", "xUnitD", "xUnitS"]


class Gaussian(nn.Module):
    """The gate ``exp(-x²)``, elementwise, any shape (xUnit, CVPR 2018, section 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x * x))


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution: an ``nn.Conv2d(C, C, groups=C)`` with fast CPU kernels.

    (N,C,H,W) or (C,H,W) in and out; weight (C,1,kh,kw). `backend` is "auto", "rust" or "torch".
    Raises ValueError for shapes or a geometry that do not fit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = "same",
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        padding_mode: str = "zeros",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _autograd.check_backend(backend)
        channels = _integer("channels", channels)
        pair = functional._pair
        super().__init__(
            channels,
            channels,
            pair("kernel_size", kernel_size),
            pair("stride", stride),
            padding if isinstance(padding, str) else pair("padding", padding, least=0),
            pair("dilation", dilation),
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:
            return self._dispatch(input)

    @torch.jit.unused
    def _dispatch(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or self.padding_mode != "zeros":
            _autograd.refuse(self.backend, f"input {type(x).__name__}, {self.padding_mode} padding")
            return self._conv_forward(x, self.weight, self.bias)
        if not x.is_floating_point():
            _autograd.refuse(self.backend, f"the input is {x.dtype}")
            return self._conv_forward(x, self.weight, self.bias)
        return functional.depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            backend=self.backend,
        )


class _Base(nn.Module):
    """``x · features(x)``: what the three units share."""

    # Which slots of `features` hold what; the order and so the keys are the official ones.
    _variant: ClassVar[str]
    _slots: ClassVar[tuple[str, ...]]
    # The nn.Sequential that computes the gate.
    _body: ClassVar[str] = "features"

    def __init__(
        self,
        num_features: int = 64,
        kernel_size: int = 7,
        batch_norm: bool = False,
        *,
        gate: str = "sigmoid",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_features = _integer("num_features", num_features)
        kernel_size = _integer("kernel_size", kernel_size)
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size!r}")
        _autograd.check_gate(gate)
        _autograd.check_backend(backend)
        self.num_features = num_features
        self.backend = backend
        c: Any = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for slot in self._slots:
            if slot in ("bn1", "bn2"):
                layers.append(nn.BatchNorm2d(num_features, **c) if batch_norm else nn.Identity())
            elif slot == "pw":
                layers.append(nn.Conv2d(num_features, num_features, 1, **c))
            elif slot == "relu":
                layers.append(nn.ReLU())
            elif slot == "dw":
                layers.append(
                    nn.Conv2d(
                        num_features,
                        num_features,
                        kernel_size,
                        padding=kernel_size // 2,
                        groups=num_features,
                        **c,
                    )
                )
            else:
                layers.append(Gaussian() if gate == "gaussian" else nn.Sigmoid())
        self.features = nn.Sequential(*layers)

    def extra_repr(self) -> str:
        return "" if self.backend == "auto" else f"backend={self.backend!r}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x * self.features(x)
        else:
            return self._dispatch(x)

    @torch.jit.unused
    def _dispatch(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # torch.fx hands in its Proxy
            _autograd.refuse(self.backend, f"the input is a {type(x).__name__}")
            return x * getattr(self, self._body)(x)
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected an input of shape (N, {self.num_features}, H, W), not {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"the input must be floating point, not {x.dtype}")
        if self.backend == "torch":
            return x * getattr(self, self._body)(x)
        parts = self._parts()
        if isinstance(parts, str):
            _autograd.check_backend(self.backend)
            _autograd.refuse(self.backend, parts)
            return x * getattr(self, self._body)(x)
        gate, parameters, norms, training = parts
        return _autograd.xunit(
            self._variant,
            gate,
            (x, *parameters),
            norms,
            training,
            self.backend,
            lambda: x * getattr(self, self._body)(x),
        )

    def _parts(self) -> str | tuple[str, Any, Any, Any]:
        """(gate, parameters, BN states, BN training flags), or why the fused call is not the same.

        Reads `_modules` and `_parameters` directly: `nn.Module.__getattr__` is slow.
        """
        if _has_any_global_hook():
            return "a global module hook is registered"
        features = self._modules[self._body]
        if not _untouched(features, nn.Sequential):
            return f"{self._body} is not a plain nn.Sequential"
        children = list(features._modules.values())  # type: ignore[union-attr]
        if len(children) != len(self._slots):
            return f"{self._body} has {len(children)} layers, not {len(self._slots)}"

        gate = ""
        conv: dict[str, tuple[Tensor | None, Tensor | None]] = {"pw": (None, None)}
        norm: dict[str, tuple[BatchNormState | None, bool]] = {"bn1": (None, False)}
        for slot, child in zip(self._slots, children, strict=True):
            if slot in ("bn1", "bn2"):
                if _untouched(child, nn.Identity):
                    norm[slot] = (None, False)
                elif _untouched(child, nn.BatchNorm2d) and _is_whole(child):
                    norm[slot] = _batch_norm_state(child), child.training  # type: ignore[union-attr]
                else:
                    return _changed(slot, child)
            elif slot == "relu":
                if not _untouched(child, nn.ReLU):
                    return _changed(slot, child)
                # Without a BN before it, it would change x itself, which the product then sees.
                if child.inplace and norm["bn1"][0] is None:  # type: ignore[union-attr]
                    return "the ReLU works in place on the input"
            elif slot == "gate":
                if _untouched(child, nn.Sigmoid):
                    gate = "sigmoid"
                elif _untouched(child, Gaussian):
                    gate = "gaussian"
                else:
                    return _changed(slot, child)
            elif not self._is_convolution(child, depthwise=slot == "dw"):
                return _changed(slot, child)
            else:
                p = child._parameters  # type: ignore[union-attr]
                conv[slot] = p["weight"], p["bias"]
        return (
            gate,
            (*conv["pw"], *conv["dw"]),
            (norm["bn1"][0], norm["bn2"][0]),
            (norm["bn1"][1], norm["bn2"][1]),
        )

    def _is_convolution(self, child: Any, *, depthwise: bool) -> bool:
        if not (_untouched(child, nn.Conv2d) or (depthwise and _untouched(child, DepthwiseConv2d))):
            return False
        p = child._parameters
        weight = p.get("weight")
        if weight is None or "bias" not in p:
            return False
        c = self.num_features
        k = weight.shape[-1]
        bias = p["bias"]
        if k % 2 == 0 or tuple(weight.shape) != ((c, 1, k, k) if depthwise else (c, c, 1, 1)):
            return False
        return (
            (bias is None or tuple(bias.shape) == (c,))
            and child.groups == (c if depthwise else 1)
            and tuple(child.stride) == (1, 1)
            and tuple(child.dilation) == (1, 1)
            and child.padding in ((k // 2, k // 2), "same")
            and child.padding_mode == "zeros"
        )


class xUnit(_Base):
    """The xUnit ``x · g([BN] DW_k(relu([BN] x)))`` in place of an activation.

    (N, num_features, H, W) in and out. `gate` g is "sigmoid" or "gaussian" (``exp(-d²)``, the
    paper's); `kernel_size` k is odd; `backend` is "auto", "rust" (raise where the kernels do not
    apply) or "torch". state_dict keys are the official ``features.N.*``.
    Raises ValueError for an even kernel, an unknown gate or backend, or a wrong input shape.
    Source: Kligvasser, Rott Shaham, Michaeli, CVPR 2018, section 3.
    """

    _variant = "xunit"
    _slots = ("bn1", "relu", "dw", "bn2", "gate")


class xUnitS(_Base):
    """The slim xUnit ``x · g([BN] DW_k(x))``. Arguments and errors as :class:`xUnit`.

    Source: Kligvasser, Michaeli, Dense xUnit Networks, arXiv 1811.11051.
    """

    _variant = "slim"
    _slots = ("dw", "bn2", "gate")


class xUnitD(_Base):
    """The dense xUnit ``x · g([BN] DW_k(relu([BN] PW x)))``; PW is a 1×1 convolution.

    Arguments and errors as :class:`xUnit`.
    Source: Kligvasser, Michaeli, Dense xUnit Networks, arXiv 1811.11051.
    """

    _variant = "dense"
    _slots = ("pw", "bn1", "relu", "dw", "bn2", "gate")


class _Cell(xUnit):
    """The cell of the official code of 2018, ``h · module(h)`` of ``h = features(x)``.

    Made by :func:`accelerate` only: `module` holds the layers of an :class:`xUnit`.
    """

    _body = "module"

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.features(x)
        if torch.jit.is_scripting():
            return h * self.module(h)  # type: ignore[operator]
        else:
            return self._dispatch(h)


def obstacle(module: nn.Module) -> str | None:
    """Why `module`, one of ours, would not run the Rust kernels, or None if it would.

    For inputs of the device and dtype of its weight, in the state of the interpreter as it is.
    """
    assert isinstance(module, (_Base, DepthwiseConv2d))
    if module.backend == "torch":
        return "backend='torch'"
    norms: list[Tensor | None] = []
    if isinstance(module, _Base):
        parts = module._parts()
        if isinstance(parts, str):
            return parts
        _, parameters, states, _ = parts
        norms = [t for state in states if state is not None for t in state[:4]]
    else:
        if module.padding_mode != "zeros":
            return f"{module.padding_mode} padding"
        parameters = (module.weight, module.bias)
    weight = next(t for t in reversed(parameters) if t is not None and t.dim() == 4)
    if is_lazy(weight):
        return "the weight is not initialized"
    x = torch.empty((1, weight.shape[0], 1, 1), dtype=weight.dtype, device=weight.device)
    return _autograd._obstacle(x, parameters, norms, torch.compiler.is_compiling())


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def _changed(slot: str, child: Any) -> str:
    return f"features has {type(child).__name__} (or a hook on it) as {slot}"


def _untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind` and calling it does nothing but its forward."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _is_whole(bn: Any) -> bool:
    parameters, buffers = bn._parameters, bn._buffers
    # An affine BN whose weight is not a Parameter (a replica, a pruned layer) is not ours.
    absent = bn.affine and parameters.get("weight") is None
    split = (buffers.get("running_mean") is None) != (buffers.get("running_var") is None)
    return not absent and not split


def _batch_norm_state(bn: Any) -> BatchNormState:
    parameters, buffers = bn._parameters, bn._buffers
    # As nn.BatchNorm2d: buffers are used in evaluation, and in training only if tracked.
    used = not bn.training or bn.track_running_stats
    return BatchNormState(
        parameters["weight"],
        parameters["bias"],
        buffers["running_mean"] if used else None,
        buffers["running_var"] if used else None,
        bn.eps,
        bn.momentum,
        buffers["num_batches_tracked"] if used else None,
    )
