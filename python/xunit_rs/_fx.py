"""Functional relus as nn.ReLU modules: what ``via="fx"`` does before ReLUs are looked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import DepthwiseConv2d, Gaussian, _Base

__all__ = ["with_relu_modules"]

_FUNCTIONS: dict[Any, bool] = {  # and whether it works in place
    F.relu: False,
    torch.relu: False,
    F.relu_: True,
    torch.relu_: True,
    "relu": False,
    "relu_": True,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Traced, ours would become their plain definitions.
        ours = (_Base, DepthwiseConv2d, Gaussian, torch.jit.ScriptModule)
        return isinstance(m, ours) or super().is_leaf_module(m, module_qualified_name)


def with_relu_modules(model: nn.Module) -> fx.GraphModule:
    """`model` as a GraphModule that shares its leaf modules and calls an nn.ReLU for each relu.

    Raises ValueError if torch.fx cannot trace it, or if the trace would not stand for it.
    """
    kind = type(model).__name__
    tracer = _Tracer()
    for name, m in model.named_modules():
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        if any(hooks) and not tracer.is_leaf_module(m, name):
            raise ValueError(
                f"via='fx': {name or kind} has hooks, which torch.fx runs while it traces and "
                "never again"
            )

    flags = {m: m.training for m in model.modules()}
    try:
        training, graph = (_Tracer().trace(model.train(mode)) for mode in (True, False))
    except Exception as error:
        raise ValueError(f"via='fx': torch.fx cannot trace {kind}: {error}") from error
    finally:
        for m, flag in flags.items():
            m.training = flag
    if str(training) != str(graph):
        raise ValueError(
            f"via='fx': the forward of {kind} differs between training and evaluation, "
            "and torch.fx keeps only one of them"
        )

    traced = fx.GraphModule(model, graph, class_name=kind)
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
            _use_module(traced, model, node)
    graph.lint()
    traced.recompile()
    for name, m in traced.named_modules():
        # New are only the containers around the leaf modules.
        if _has(model, name):
            m.training = flags[model.get_submodule(name)]
    return traced


def _use_module(traced: fx.GraphModule, model: nn.Module, node: fx.Node) -> None:
    inplace = bool(node.kwargs.get("inplace", [*node.args, None][1:2] == [True]))
    relu = nn.ReLU(inplace or _FUNCTIONS[node.target])
    stack = node.meta.get("nn_module_stack") or {}
    owner = str(list(stack.values())[-1][0]) if stack else ""
    relu.training = model.get_submodule(owner).training
    name, n = f"{owner}.relu".lstrip("."), 0
    while _has(model, name) or _has(traced, name):
        n += 1
        name = f"{owner}.relu_{n}".lstrip(".")
    traced.add_submodule(name, relu)
    x = node.args[0] if node.args else node.kwargs["input"]
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, (x,))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
