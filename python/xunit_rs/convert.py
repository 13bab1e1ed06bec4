"""xUnits in place of the ReLUs of a model, and our layers in place of equal ones."""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ._fx import with_relu_modules
from .modules import DepthwiseConv2d, Gaussian, _Base, _Cell, _untouched, xUnit, xUnitD, xUnitS

__all__ = [
    "ReluSite",
    "ReluTable",
    "Swap",
    "SwapTable",
    "accelerate",
    "find_relus",
    "replace_relu",
]

REUSED = ("split", "share", "skip", "error")
VIA = ("modules", "fx")
_UNITS: dict[str, type[_Base]] = {c.__name__: c for c in (xUnit, xUnitS, xUnitD)}
_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_FUNCTIONAL = "a functional relu: only nn.ReLU modules are replaced"
_OTHER_KIND = ", not nn.ReLU"
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


class ReluSite(NamedTuple):
    """One call of a ReLU in the example run, or a ReLU that was not called.

    name: path of the nn.ReLU, or of the module whose forward calls a functional relu.
    shapes: of the input, one per call; empty if it was not called.
    channels: the argument of `unit`; None where there is none.
    action: "convert" or "skip"; reason: why.
    call: which call of its ReLU in one forward this is, from 0.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    channels: int | None
    action: str
    reason: str
    call: int = 0


class ReluTable(list[ReluSite]):
    """A list of :class:`ReluSite` that prints as a table."""

    def __str__(self) -> str:
        rows = [("name", "call", "shape", "channels", "action", "reason")]
        for site in self:
            shapes = ", ".join("×".join(map(str, shape)) for shape in site.shapes)
            channels = "-" if site.channels is None else str(site.channels)
            name = site.name or "(model)"
            rows.append((name, str(site.call), shapes or "-", channels, site.action, site.reason))
        return _aligned(rows)

    __repr__ = __str__


class Swap(NamedTuple):
    """One layer that :func:`accelerate` swapped, or left although it looks like one it swaps.

    name: path of the layer; before, after: names of its classes, the same where it was left.
    action: "swap" or "leave"; reason: why it was left.
    """

    name: str
    before: str
    after: str
    action: str
    reason: str


class SwapTable(list[Swap]):
    """A list of :class:`Swap` that prints as a table; `model` is the model that was changed."""

    def __init__(self, swaps: Iterable[Swap], model: nn.Module) -> None:
        super().__init__(swaps)
        self.model = model

    def __str__(self) -> str:
        rows = [(s.name or "(model)", *s[1:]) for s in self]
        return _aligned([("name", "before", "after", "action", "reason"), *rows])

    __repr__ = __str__


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def find_relus(model: nn.Module, example_inputs: Any, *, via: str = "modules") -> ReluTable:
    """Every ReLU call of one forward pass of `model`, and what :func:`replace_relu` would do.

    example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword
    arguments. A copy of the model, which shares its parameters, is run once in evaluation mode
    without gradients, hooks included: buffers, training flags and torch's random state stay as they
    are. It runs on the meta device, which computes nothing, if it can there, is on the CPU and has
    neither hooks nor in-place ReLUs. A model with in-place ReLUs is copied and run again, to see
    whether it relies on what they do to their input, as ``x + conv(relu_(x))`` does: those are not
    converted.
    via: as in :func:`replace_relu`.
    Raises TypeError for what is no model or no inputs, ValueError if the model does not run.
    """
    model = _via(model, via)
    return ReluTable(site for _, sites in _plan(model, example_inputs) for site in sites)


def replace_relu(
    model: nn.Module,
    example_inputs: Any,
    *,
    unit: Callable[[int], nn.Module] = xUnit,
    filter_fn: Callable[[ReluSite], bool] | None = None,
    reused: str = "split",
    inplace: bool = False,
    via: str = "modules",
) -> Any:
    """`model` with ``unit(channels)`` in place of every nn.ReLU whose input is (N, C, H, W).

    The result is a deep copy, or `model` itself if `inplace`. Units take over training flag,
    device, dtype and hooks of their ReLU. `filter_fn` is asked about each site that would be
    converted, and those it answers with False stay; and about each nn.ReLU6 and subclass of
    nn.ReLU, which are not converted otherwise: `site.action` of these is "skip".

    reused: what becomes of a ReLU that one forward calls several times.
        "split"  each call has a unit of its own, told apart by the order of the calls, which must
                 be that of the example run. The count starts anew with each forward of the module
                 that makes the calls, in each thread; a call too many in it is a RuntimeError, and
                 so is activation checkpointing that recomputes single calls. Where its forward is
                 run without calling it (``model.features(x)``, ``torch.fx``), the count starts
                 anew after as many calls as the example run made: a method that makes only some
                 of them, or is interrupted, leaves the next such run at the wrong unit.
        "share"  one unit for all calls, if all have the same number of channels
        "skip"   it stays a ReLU
        "error"  ValueError
    via: what becomes of functional relus (``F.relu``, ``torch.relu``, ``Tensor.relu``).
        "modules"  they stay, and one warning says how many there are
        "fx"       `torch.fx` rewrites them to nn.ReLU modules beforehand, which are then converted
                   as any other. The result is a GraphModule of what one forward calls: modules that
                   it does not call and methods are gone. Not with `inplace`; ValueError for what
                   torch.fx cannot trace, for hooks on modules that it dissolves, and for a forward
                   that differs between training and evaluation.
    Raises as :func:`find_relus`, and ValueError if there is nothing to convert.
    """
    if not callable(unit):
        raise TypeError(f"unit must be a callable of the number of channels, not {unit!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable or None, not {filter_fn!r}")
    if reused not in REUSED:
        raise ValueError(f"reused must be one of {', '.join(REUSED)}, not {reused!r}")
    if via == "fx" and inplace:
        raise ValueError("via='fx' makes a new model: inplace=True is not possible")
    model = _via(model, via)
    plan = []
    for slot, sites in _plan(model, example_inputs):
        sites = [_filtered(site, filter_fn) for site in sites]
        plan.append((slot, _reuse(sites, reused)))
    if not any(site.action == "convert" for _, sites in plan for site in sites):
        table = ReluTable(site for _, sites in plan for site in sites)
        raise ValueError(
            f"{type(model).__name__} has no ReLU to convert" + (f":\n{table}" if table else "")
        )

    # Made before anything is put in place, so that a `unit` that raises leaves `model` whole.
    made = []
    for slot, sites in plan:
        if slot is not None and any(site.action == "convert" for site in sites):
            relu = model.get_submodule(slot.parent)._modules[slot.attribute]
            made.append((slot, _replacement(slot, sites, unit, relu, shared=reused == "share")))
    target = model if inplace else _deepcopy(model, {})
    for slot, new in made:
        parent = target.get_submodule(slot.parent)
        old = parent._modules[slot.attribute]
        assert old is not None
        new.train(old.training)
        _move_hooks(old, new)
        parent._modules[slot.attribute] = new
        if isinstance(new, _PerCall):
            scope = target.get_submodule(slot.scope)
            scope.register_forward_pre_hook(new._enter)
            scope.register_forward_hook(new._leave, always_call=True)
    left = sum(site.reason == _FUNCTIONAL for _, sites in plan for site in sites)
    if left:
        import warnings

        remedy = "" if via == "fx" else "; via='fx' converts those that torch.fx can trace"
        warnings.warn(
            f"{left} call(s) of a functional relu are left as they are: see find_relus{remedy}",
            stacklevel=2,
        )
    return target


def accelerate(model: nn.Module, *, inverse: bool = False) -> SwapTable:
    """Put our layers in place of the depthwise nn.Conv2d of `model` and of the official xUnits.

    Changes `model` in place and returns what was swapped, and what was left and why, as a list that
    prints as a table; its `model` is `model`, or our layer if `model` is such a layer itself.
    Parameters and buffers are shared, not copied, so an optimizer made before still works, and keys
    of the state dict stay.

    Depthwise: groups = in_channels = out_channels, zero padding. Official: a class named xUnit,
    xUnitS or xUnitD with the official `features` (2021), or a cell that multiplies what its
    `features` give by what its `module`, the layers of an xUnit, makes of it (2018), that computes
    what ours does. Layers with hooks or parametrizations are left alone.
    inverse: put back the layers that an earlier call has taken out; parameters stay the same.
    Raises TypeError for what is no model.
    """
    _check_model(model)
    swaps: list[Swap] = []
    done: dict[int, nn.Module] = {}

    def swapped(module: nn.Module, name: str) -> nn.Module:
        if id(module) not in done:
            new = _slower(module) if inverse else _faster(module)
            done[id(module)] = new if isinstance(new, nn.Module) else module
            kinds = type(module).__name__, type(done[id(module)]).__name__.lstrip("_")
            if isinstance(new, str):
                swaps.append(Swap(name, *kinds, "leave", new))
            elif new is not None:
                swaps.append(Swap(name, *kinds, "swap", ""))
        return done[id(module)]

    visited: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        # What a unit of ours or a ScriptModule is made of is run by it, not by itself.
        if id(module) in visited or isinstance(module, torch.jit.ScriptModule):
            return
        visited.add(id(module))
        for attribute, child in module._modules.items():
            gate = isinstance(module, _Base) and attribute == module._body
            if child is not None and not gate:
                path = f"{name}.{attribute}".lstrip(".")
                new = module._modules[attribute] = swapped(child, path)
                visit(new, path)

    top = swapped(model, "")
    visit(top, "")
    return SwapTable(swaps, top)


# ---------------------------------------------------------------- what was called


class _Slot(NamedTuple):
    """Where a ReLU is: `attribute` of the module at `parent`."""

    parent: str
    attribute: str
    # Innermost module whose one forward makes all the calls.
    scope: str
    # Of the input of each call.
    options: tuple[dict[str, Any], ...]


class _Seen(NamedTuple):
    """What is kept of an input: the tensors of a large model would fill the memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any, device: torch.device | None) -> _Seen | None:
        if not isinstance(x, Tensor):
            return None
        return cls(tuple(x.shape), x.dtype, device or x.device)


class _Call(NamedTuple):
    input: _Seen | None
    # The forwards around it, from outside in: (id of the module, how many forwards began before).
    stack: tuple[tuple[int, int], ...]


class _Probe(TorchFunctionMode):
    """Notes every forward of the modules of `model`, and the functional relus in them.

    places: of the ReLUs, (path of the parent, attribute); that of the model itself is ("", "").
    device: where tensors are in truth, if they are on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Iterable[tuple[str, str]],
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.relus = {
            id(model.get_submodule(path)._modules[attribute]): (path, attribute)
            for path, attribute in places
        }
        if isinstance(model, nn.ReLU):
            self.relus[id(model)] = ("", "")
        self.names = {id(m): name for name, m in model.named_modules()}
        self.calls: dict[tuple[str, str], list[_Call]] = {p: [] for p in self.relus.values()}
        self.functional: list[tuple[str, _Seen | None]] = []
        self.stack: list[tuple[int, int]] = []
        self.forwards = 0
        for module in list(model.modules()):
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self.enter, with_kwargs=True)
                module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) in self.relus:
            x = args[0] if args else kwargs.get("input")
            seen = _Seen.of(x, self.device)
            self.calls[self.relus[id(module)]].append(_Call(seen, tuple(self.stack)))
        self.stack.append((id(module), self.forwards))
        self.forwards += 1

    def leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and not (self.stack and self.stack[-1][0] in self.relus):
            name = self.names[self.stack[-1][0]] if self.stack else ""
            x = args[0] if args else kwargs.get("input")
            self.functional.append((name, _Seen.of(x, self.device)))
        return func(*args, **kwargs)


def _plan(model: nn.Module, example_inputs: Any) -> Iterator[tuple[_Slot | None, list[ReluSite]]]:
    """The sites of each ReLU module (its slot) and of each functional relu (None)."""
    _check_model(model)
    args, kwargs = _arguments(example_inputs)
    # Parameters are shared, except those that a first forward would fill in.
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not is_lazy(p)}
    probed = _deepcopy(model, dict(memo)).eval()

    slots: list[tuple[str, str, nn.Module, str]] = []
    units = {id(m) for u in probed.modules() for m in _gate_of(u)}
    for path, parent in list(probed.named_modules()):
        for attribute, child in parent._modules.items():
            if isinstance(child, torch.jit.ScriptModule):
                for inner, m in child.named_modules(prefix=f"{path}.{attribute}".lstrip(".")):
                    if getattr(m, "original_name", "") == "ReLU":
                        site = ReluSite(inner, (), None, "skip", "inside a ScriptModule")
                        yield None, [site]
            elif isinstance(child, (nn.ReLU, nn.ReLU6)):
                reason = ""
                if id(parent) in units:
                    reason = "part of an xUnit"
                elif type(child) is not nn.ReLU:
                    reason = type(child).__name__ + _OTHER_KIND
                # One object in several places becomes several, so that each counts its own calls.
                child = parent._modules[attribute] = copy.copy(child)
                child._forward_pre_hooks = child._forward_pre_hooks.copy()
                child._forward_hooks = child._forward_hooks.copy()
                slots.append((path, attribute, child, reason))

    places = [(path, attribute) for path, attribute, _, _ in slots]
    inplace = [
        (path, attribute)
        for path, attribute, relu, reason in slots
        if (not reason or reason.endswith(_OTHER_KIND)) and getattr(relu, "inplace", False)
    ]
    probe = None if inplace else _on_meta(probed, places, args, kwargs)
    used: set[tuple[str, str]] = set()
    if probe is None:
        untouched = _deepcopy(probed, dict(memo)) if inplace else probed
        probe = _Probe(probed, places)
        outputs = _run(probed, args, kwargs, probe)
        if inplace:
            used = _used_in_place(untouched, inplace, args, kwargs, outputs)

    if isinstance(probed, nn.ReLU):
        shapes = tuple(_shape(call.input) for call in probe.calls["", ""])
        reason = "the model itself is the ReLU: no module holds it"
        yield None, [ReluSite("", shapes, None, "skip", reason)]
    for path, attribute, _, reason in slots:
        name = f"{path}.{attribute}".lstrip(".")
        calls = probe.calls[path, attribute]
        if (path, attribute) in used:
            reason = "its in-place effect is used"
        scope = _scope(calls, probe.names)
        options = tuple(_options(call.input, model) for call in calls)
        slot = _Slot(path, attribute, scope, options)
        if calls:
            yield slot, [_site(name, c.input, reason, i, len(calls)) for i, c in enumerate(calls)]
        else:
            reason = reason or "not called in the example run, in evaluation mode"
            yield slot, [ReluSite(name, (), None, "skip", reason)]
    for name, x in probe.functional:
        yield None, [ReluSite(name, (_shape(x),), _channels(x), "skip", _FUNCTIONAL)]


def _on_meta(
    model: nn.Module,
    places: Iterable[tuple[str, str]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Probe | None:
    """What a run on the meta device shows; None if that is not possible.

    Hooks of the user's, which may keep what they see, are not shown such tensors.
    """
    tensors = [*model.parameters(), *model.buffers()]
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if (
        {t.device.type for t in (*tensors, *inputs)} != {"cpu"}
        or any(type(t) not in (Tensor, nn.Parameter) for t in tensors)
        or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ):
        return None
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.detach().to("meta")
        for t in tensors
    }
    sketch = _deepcopy(model, memo)
    probe = _Probe(sketch, places, torch.device("cpu"))
    try:
        _run(sketch, _cloned(args, "meta"), _cloned(kwargs, "meta"), probe)
    except ValueError:  # it reads values, or makes tensors of its own
        return None
    return probe


def _run(
    probed: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    probe: contextlib.AbstractContextManager[Any],
) -> Any:
    tensors = [*probed.parameters(), *probed.buffers(), *args, *kwargs.values()]
    devices = {t.device for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}
    # An in-place first layer must not change the caller's tensors.
    args, kwargs = _cloned(args), _cloned(kwargs)
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), probe:
        try:
            return probed(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(map(_describe, (*args, *kwargs.values())))
            raise ValueError(
                f"{type(probed).__name__} does not run on example_inputs ({shapes}): {error}"
            ) from error


def _used_in_place(
    model: nn.Module,
    sites: list[tuple[str, str]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Any,
) -> set[tuple[str, str]]:
    """Those of the in-place ReLUs whose input is read again after the call.

    Each leaves NaN in its input, and is found by what becomes of the outputs: other values would
    depend on the inputs, and relu changes nothing in an example of zeros.
    """

    def harmless(spoiled: list[tuple[str, str]]) -> bool:
        twin = _deepcopy(model, {})  # with its own parameters, should one of them be the input
        for path, attribute in spoiled:
            relu: Any = twin.get_submodule(path)._modules[attribute]
            relu.forward = functools.partial(_run_and_spoil, relu)
        try:
            return _same(_run(twin, args, kwargs, contextlib.nullcontext()), expected)
        except ValueError:  # ran before, and stumbles over NaN
            return False

    # Without any to compare with: a model whose every run is another.
    if harmless(sites) or not harmless([]):
        return set()
    return {site for site in sites if not harmless([site])}


def _run_and_spoil(relu: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = type(relu).forward(relu, x.clone())
    if x.is_floating_point():
        x.fill_(torch.nan)
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        try:
            return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        except RuntimeError:  # on the meta device: there is nothing to compare
            return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return _same(list(a.values()), list(b.values()))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
        return _same(vars(a), vars(b))
    return True


def _site(name: str, x: _Seen | None, reason: str, call: int, calls: int) -> ReluSite:
    shapes = (_shape(x),)
    if not reason or reason.endswith(_OTHER_KIND):
        if x is None or len(x.shape) != 4:
            reason = "the input is not 4-dimensional (N, C, H, W)"
        elif not x.dtype.is_floating_point:
            reason = f"the input is {x.dtype}"
    if reason:
        return ReluSite(name, shapes, _channels(x), "skip", reason, call)
    reason = "" if calls == 1 else f"call {call + 1} of {calls} of one nn.ReLU"
    return ReluSite(name, shapes, _channels(x), "convert", reason, call)


def _scope(calls: list[_Call], names: Mapping[int, str]) -> str:
    common: tuple[tuple[int, int], ...] = calls[0].stack if calls else ()
    for call in calls[1:]:
        n = 0
        while n < min(len(common), len(call.stack)) and common[n] == call.stack[n]:
            n += 1
        common = common[:n]
    return names[common[-1][0]] if common else ""


def _options(x: _Seen | None, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of a unit that sees x."""
    if x is None:
        return {}
    dtype, kind = x.dtype, x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Then x has not the type of the parameters.
        own = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(own, torch.float32)
    return {"device": x.device, "dtype": dtype}


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple or list of arguments or a dict of keyword "
        f"arguments, not {example_inputs!r}"
    )


def _cloned(value: Any, device: str | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if type(value) in (tuple, list):
        return type(value)(_cloned(v, device) for v in value)
    if type(value) is dict:
        return {k: _cloned(v, device) for k, v in value.items()}
    return value


def _shape(x: _Seen | None) -> tuple[int, ...]:
    return () if x is None else x.shape


def _channels(x: _Seen | None) -> int | None:
    return None if x is None or len(x.shape) != 4 else x.shape[1]


def _describe(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x)


def _via(model: nn.Module, via: str) -> nn.Module:
    if via not in VIA:
        raise ValueError(f"via must be one of {', '.join(VIA)}, not {via!r}")
    if via == "modules":
        return model
    _check_model(model)
    return with_relu_modules(model)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{type(model).__name__} is compiled: convert the model it was made from")
    if type(model).__name__ in _WRAPPERS:
        raise TypeError(f"convert the model before it is wrapped in {type(model).__name__}")


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error


# ---------------------------------------------------------------- what takes its place


class _Count(threading.local):
    """Of the calls in one forward of a scope, in each thread, and whether one is running."""

    calls = 0
    inside = False

    def __reduce__(self) -> Any:  # a copy counts for itself
        return _Count, ()


class _PerCall(nn.ModuleList):
    """Calls its first module, then its second, and so on, in each forward of a scope.

    Hooks at both ends of the scope's forward start it over: an interrupted forward does no harm.
    """

    calls: int
    inside: bool

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__(modules)
        self._count = _Count()
        self.calls, self.inside = 0, False

    def _state(self) -> Any:
        # torch.compile traces one thread, and knows no thread-local attributes.
        return self if torch.compiler.is_compiling() else self._count

    def _enter(self, *_: Any) -> None:
        state = self._state()
        state.calls, state.inside = 0, True

    def _leave(self, *_: Any) -> None:
        state = self._state()
        state.calls, state.inside = 0, False

    def forward(self, x: Tensor) -> Tensor:
        state = self._state()
        if not state.inside and _in_backward():
            raise RuntimeError(
                f"activation checkpointing recomputes single calls of a ReLU that was called "
                f"{len(self)} times in the example run: checkpoint what makes all of them"
            )
        if state.calls >= len(self):
            if state.inside:
                raise RuntimeError(
                    f"call {state.calls + 1} of a ReLU that was called {len(self)} times in the "
                    "example run"
                )
            state.calls = 0
        unit = self[state.calls]
        state.calls += 1
        out: Tensor = unit(x)
        return out


def _in_backward() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _filtered(site: ReluSite, filter_fn: Callable[[ReluSite], bool] | None) -> ReluSite:
    if filter_fn is None:
        return site
    if site.action == "convert" and not filter_fn(site):
        return site._replace(action="skip", reason="filter_fn")
    if site.reason.endswith(_OTHER_KIND) and filter_fn(site):
        return site._replace(action="convert", reason="filter_fn")
    return site


def _reuse(sites: list[ReluSite], reused: str) -> list[ReluSite]:
    """`sites`, all of one ReLU, as `reused` has it."""
    if len(sites) == 1 or reused == "split" or all(s.action == "skip" for s in sites):
        return sites
    name, n = sites[0].name, len(sites)
    if reused == "error":
        raise ValueError(f"the ReLU {name!r} is called {n} times in one forward")
    if reused == "skip":
        reason = f"called {n} times in one forward"
    elif any(site.action == "skip" for site in sites):
        reason = "shared with a call that cannot be converted"
    elif len({site.channels for site in sites}) > 1:
        reason = f"called with {', '.join(str(site.channels) for site in sites)} channels"
    else:
        return sites
    return [site._replace(action="skip", reason=reason) for site in sites]


def _replacement(
    slot: _Slot,
    sites: list[ReluSite],
    unit: Callable[[int], nn.Module],
    relu: Any,
    *,
    shared: bool,
) -> nn.Module:
    def make(site: ReluSite) -> nn.Module:
        if site.action != "convert":
            kept: nn.Module = copy.copy(relu)
            for name in _HOOKS:  # what takes its place has them
                setattr(kept, name, type(getattr(relu, name))())
            return kept
        assert site.channels is not None
        new = unit(site.channels)
        if not isinstance(new, nn.Module):
            raise TypeError(f"unit({site.channels}) must be a torch.nn.Module, not {new!r}")
        return new.to(**slot.options[site.call])

    if len(sites) == 1 or shared:
        return make(sites[0])
    return _PerCall([make(site) for site in sites])


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """The very dictionaries, so that the handles of the hooks still remove them."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(new, name))
        setattr(new, name, hooks)
    new._is_full_backward_hook = new._is_full_backward_hook or old._is_full_backward_hook


# ---------------------------------------------------------------- accelerate


def _is_unit(module: nn.Module) -> bool:
    if isinstance(module, _Base):
        return True
    return type(module).__name__ in _UNITS and isinstance(
        getattr(module, "features", None), nn.Sequential
    )


def _is_cell(module: nn.Module) -> bool:
    """Whether it is built as the cells of the official code of 2018, whatever its name."""
    if isinstance(module, (_Base, torch.jit.ScriptModule)):
        return False
    if set(module._modules) != {"features", "module"}:
        return False
    features, gate = module.features, module.module
    if type(features) is not nn.Sequential or type(gate) is not nn.Sequential:
        return False
    kinds = [type(m).__name__ for m in gate]
    norms = ("BatchNorm2d", "Identity")
    return (
        len(kinds) == 5
        and kinds[0] in norms
        and kinds[1:3] == ["ReLU", "Conv2d"]
        and kinds[3] in norms
        and kinds[4] in ("Gaussian", "Sigmoid")
    )


def _gate_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that compute the gate, if it is a unit or a cell."""
    if _is_cell(module) or isinstance(module, _Cell):
        yield from module.get_submodule("module").modules()
    elif _is_unit(module):
        yield from module.modules()


def _faster(module: nn.Module) -> nn.Module | str | None:
    """Our layer with the parameters of `module`, why there is none, or None for other layers."""
    if isinstance(module, (_Base, DepthwiseConv2d, torch.jit.ScriptModule)):
        return None
    if isinstance(module, nn.Conv2d):
        return _faster_convolution(module)
    if _is_unit(module) or _is_cell(module):
        return _faster_unit(module)
    return None


def _kept(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a swap would lose of `module`."""
    state_hooks = (
        module._state_dict_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    if type(module) is not kind:
        return f"{type(module).__name__}, not {kind.__name__}"
    if not _untouched(module, kind) or any(state_hooks):
        return f"{kind.__name__} has hooks or a forward of its own"
    return None


def _faster_convolution(conv: Any) -> nn.Module | str | None:
    if conv.groups != conv.in_channels or (conv.groups == 1 and conv.out_channels != 1):
        return None
    if conv.groups != conv.out_channels:
        return f"{conv.out_channels} output channels of {conv.in_channels}"
    if conv.padding_mode != "zeros":
        return f"{conv.padding_mode} padding"
    lost = _kept(conv, nn.Conv2d)
    if lost is not None:
        return lost
    new = DepthwiseConv2d(
        conv.in_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
        device="meta",
    )
    # All it has, the user's own attributes, buffers and modules included.
    new.__dict__.update(conv.__dict__, backend=new.backend, _swapped_for=(conv,))
    return new


def _faster_unit(unit: Any) -> nn.Module | str:
    cell = _is_cell(unit)
    kind = _Cell if cell else _UNITS[type(unit).__name__]
    gate: Any = getattr(unit, kind._body)
    if unit._parameters or unit._buffers or not (cell or set(unit._modules) == {"features"}):
        return f"it holds more than {kind._body}"
    for m in (unit, gate, *gate):
        lost = _kept(m, type(m))
        if lost is not None:
            return lost
    convs = [m for m in gate if isinstance(m, nn.Conv2d)]
    if not convs:
        return f"{kind._body} has no convolution"
    children = list(gate)
    last = children[-1]
    if type(last).__name__ == "Gaussian" and not last._parameters:  # of the official code
        children[-1] = Gaussian().train(last.training)
    new = kind(convs[-1].out_channels, device="meta")
    new.__dict__.update(unit.__dict__, num_features=new.num_features, backend=new.backend)
    new._modules = {**unit._modules, kind._body: nn.Sequential(*children).train(gate.training)}
    parts = new._parts()
    if isinstance(parts, str):
        return parts
    heads = [m for m in unit.features.modules() if isinstance(m, nn.Conv2d)] if cell else convs[-1:]
    if not heads or not _equal(unit, new, heads[0].in_channels, convs[-1].weight):
        return "it computes something else"
    # The user's own Sequential, where it holds the same modules, as others may refer to it.
    if all(a is b for a, b in zip(gate, children, strict=True)):
        new._modules[kind._body] = gate
    new.__dict__["_swapped_for"] = (unit,)
    return new


def _equal(unit: nn.Module, new: _Base, channels: int, like: Tensor) -> bool:
    """Whether both compute the same: the name of a class says little about its forward."""
    flags = {m: m.training for part in (unit, new) for m in part.modules()}
    shape = (2, channels, 11, 13)
    n = 2 * channels * 11 * 13
    x = torch.linspace(-2, 2, n, device=like.device, dtype=like.dtype).reshape(shape)
    backend, new.backend = new.backend, "torch"
    try:
        unit.eval()
        new.eval()
        with torch.no_grad():
            return torch.allclose(unit(x), new(x), rtol=1e-4, atol=1e-5, equal_nan=True)
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        new.backend = backend
        for module, training in flags.items():
            module.training = training


def _slower(module: Any) -> nn.Module | None:
    """What :func:`_faster` made `module` of, with what became of it since; or None."""
    (old,) = module.__dict__.get("_swapped_for", (None,))
    if old is None or not isinstance(module, (_Base, DepthwiseConv2d)):
        return None
    own = {k: v for k, v in module.__dict__.items() if k not in ("backend", "_swapped_for")}
    if isinstance(module, _Base):
        del own["num_features"]
        gate: Any = module._modules[module._body]
        new: Any = old._modules[module._body]
        if gate is not new and isinstance(gate, nn.Sequential) and len(gate) == len(new):
            # Our own Sequential, for our Gaussian in place of the official one.
            for name, child in gate._modules.items():
                if type(child) is not Gaussian:
                    new._modules[name] = child
            new.training = new[-1].training = gate.training
            gate = new
        own["_modules"] = {**module._modules, module._body: gate}
    old.__dict__.update(own)
    return old
