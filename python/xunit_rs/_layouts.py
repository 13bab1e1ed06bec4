"""The keys of each architecture, ours and those of the files of others, and the sizes they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["LAYOUTS", "OFFICIAL", "Layout", "Official", "merge_batch_norm"]

State = Mapping[str, Tensor]


class Layout(NamedTuple):
    """mark: a key that networks of one architecture have, and others have not.

    sizes: the arguments of its class, read off the shapes; KeyError or IndexError for a state that
    is of another one.
    """

    mark: str
    sizes: Callable[[State], dict[str, Any]]


class Official(NamedTuple):
    """A file of others: the keys that tell it, its architecture, and its state by our keys.

    `ours` raises KeyError for a key that does not belong there or is missing, ValueError for
    tensors that do not fit together.
    """

    marks: tuple[str, ...]
    architecture: str
    ours: Callable[[State], dict[str, Tensor]]


def merge_batch_norm(state: dict[str, Tensor], conv: str, norm: str, eps: float = 1e-5) -> None:
    """Put a BN in evaluation mode into the convolution `conv` ahead of it; `norm` leaves `state`.

    ``w · γ/√(v + ε)`` and ``β + (b − μ) · γ/√(v + ε)``, in float64, rounded to the type of w.
    """
    weight = state[f"{conv}.weight"]
    parts = [
        state.pop(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    ]
    state.pop(f"{norm}.num_batches_tracked", None)
    if any(part.shape != weight.shape[:1] for part in parts):
        raise ValueError(f"{norm} does not fit {conv}")
    gamma, beta, mean, variance = (part.double() for part in parts)
    factor = gamma / (variance + eps).sqrt()
    bias = state.get(f"{conv}.bias")
    shift = beta - mean * factor if bias is None else beta + (bias.double() - mean) * factor
    scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    state[f"{conv}.weight"] = scaled.to(weight.dtype)
    state[f"{conv}.bias"] = shift.to(weight.dtype)


def _count(state: State, pattern: str) -> int:
    """How many numbers the group of `pattern` takes in the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _xdncnn(version: str, unit: int) -> Callable[[State], dict[str, Any]]:
    def sizes(state: State) -> dict[str, Any]:
        conv = state["blocks.0.conv.weight"].shape
        return {
            "version": version,
            "channels": conv[1],
            "features": conv[0],
            "depth": _count(state, r"blocks\.([^.]+)\."),
            "kernel_size": state[f"blocks.0.xunit.features.{unit}.weight"].shape[3],
        }

    return sizes


def _dncnn(state: State) -> dict[str, Any]:
    return {
        "channels": state["head.weight"].shape[1],
        "features": state["head.weight"].shape[0],
        "depth": _count(state, r"blocks\.([^.]+)\."),
        "tail": state["tail.weight"].shape[3],
        "batch_norm": False,
    }


def _xdensenet(state: State) -> dict[str, Any]:
    head = state["image_to_features.features.0.weight"].shape
    growth = state["features.0.features.0.features.5.features.0.weight"].shape[0]
    inner = state["features.0.features.0.features.2.weight"].shape[0]
    layers: dict[str, set[str]] = {}
    for key in state:
        if match := re.match(r"features\.(\d+)\.features\.(\d+)\.", key):
            layers.setdefault(match[1], set()).add(match[2])
    return {
        "channels": head[1],
        "features": head[0],
        # Every other stage is a transition.
        "blocks": tuple(len(layers.get(str(i), ())) for i in range(0, len(layers), 2)),
        "growth": growth,
        "bottleneck": inner // max(growth, 1),
        "kernel_size": state["image_to_features.features.1.features.3.weight"].shape[3],
    }


def _xsrcnn(state: State) -> dict[str, Any]:
    count = _count(state, r"cells\.([^.]+)\.")
    convs = [state[f"cells.{i}.conv.weight"].shape for i in range(count)]
    return {
        "channels": convs[0][1],
        "widths": tuple(shape[0] for shape in convs),
        "kernel_sizes": tuple(shape[3] for shape in (*convs, state["tail.weight"].shape)),
        "kernel_size": state["cells.0.xunit.features.2.weight"].shape[3],
    }


def _xsrresnet(state: State) -> dict[str, Any]:
    return {
        "channels": state["head.conv.weight"].shape[1],
        "features": state["head.conv.weight"].shape[0],
        "depth": _count(state, r"residual\.([^.]+)\."),
        "scale": 2 ** _count(state, r"upsample\.([^.]+)\."),
        "kernel_size": state["residual.0.xunit.features.2.weight"].shape[3],
    }


def _xsrgan(state: State) -> dict[str, Any]:
    return {
        "channels": state["image_to_features.weight"].shape[1],
        "features": state["image_to_features.weight"].shape[0],
        "depth": _count(state, r"features\.([^.]+)\."),
        "scale": 2 ** _count(state, r"usample\.([^.]+)\."),
        "kernel_size": state["features.0.xunit.features.0.weight"].shape[3],
    }


LAYOUTS = {
    "xdncnn-2018": Layout("blocks.0.xunit.features.3.weight", _xdncnn("2018", 2)),
    "xdncnn-2021": Layout("blocks.0.norm.weight", _xdncnn("2021", 0)),
    "dncnn": Layout("head.weight", _dncnn),
    "xdensenet": Layout("image_to_features.features.2.weight", _xdensenet),
    "xsrcnn": Layout("cells.0.conv.weight", _xsrcnn),
    "xsrresnet": Layout("body.norm.weight", _xsrresnet),
    "xsrgan": Layout("image_to_features.weight", _xsrgan),
}


def _by_key(rename: Callable[[str], str | None]) -> Callable[[State], dict[str, Tensor]]:
    def ours(state: State) -> dict[str, Tensor]:
        renamed = {}
        for key, value in state.items():
            name = rename(key)
            if name is None:
                raise KeyError(key)
            renamed[name] = value
        return renamed

    return ours


def _cell_2018(key: str) -> str | None:
    """A convolution and its unit."""
    for official, ours in (("features.0.", "conv."), ("module.", "xunit.features.")):
        if key.startswith(official):
            return ours + key.removeprefix(official)
    return None


def _xdncnn_2018(key: str) -> str | None:
    if key.startswith("joints."):
        return f"tail.{key.removeprefix('joints.')}"
    match = re.fullmatch(r"md([1-9]\d*)\.([01])\.(.+)", key)
    if match is None:
        return None
    block, slot, rest = int(match[1]) - 1, int(match[2]), match[3]
    # md1 holds a cell, every later md a BatchNorm and a cell.
    if block > 0 and slot == 0:
        return f"blocks.{block}.norm.{rest}"
    cell = _cell_2018(rest) if slot == min(block, 1) else None
    return cell and f"blocks.{block}.{cell}"


def _xdncnn_2021(key: str) -> str | None:
    if key.startswith("features_to_image."):
        return f"tail.{key.removeprefix('features_to_image.')}"
    match = re.fullmatch(r"(?:image_to_features|features\.(\d+))\.(bn|conv|xunit)\.(.+)", key)
    if match is None:
        return None
    block = 0 if match[1] is None else int(match[1]) + 1
    layer = "norm" if match[2] == "bn" else match[2]
    return f"blocks.{block}.{layer}.{match[3]}"


def _xsrcnn_2018(key: str) -> str | None:
    if key.startswith("joints."):
        return f"tail.{key.removeprefix('joints.')}"
    match = re.fullmatch(r"md([1-9]\d*)\.0\.(.+)", key)
    cell = _cell_2018(match[2]) if match else None
    return cell and match and f"cells.{int(match[1]) - 1}.{cell}"


def _xsrresnet_2018(key: str) -> str | None:
    match = re.fullmatch(r"(xresidual_block|upsample)([1-9]\d*)\.(.+)", key)
    if match and match[1] == "upsample":
        return f"upsample.{int(match[2]) - 1}.{match[3]}"
    if match:
        layer, _, part = match[3].partition(".")
        names = {"md": _cell_2018(part), "conv2": f"conv2.{part}", "bn1": f"norm.{part}"}
        name = names.get(layer)
        if layer == "md" and name and name.startswith("conv."):
            name = f"conv1.{name.removeprefix('conv.')}"
        return name and f"residual.{int(match[2]) - 1}.{name}"
    layer, _, part = key.partition(".")
    ours = {
        "conv1": "head.conv",
        "prelu1": "head.prelu",
        "conv2": "body.conv",
        "bn2": "body.norm",
        "conv3": "tail",
    }.get(layer)
    return ours and f"{ours}.{part}"


def _dncnn_kair(state: State) -> dict[str, Tensor]:
    """``model.N.*``: convolutions and, in files of a training run, BN; N counts the ReLUs, too."""
    groups: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"model\.(\d+)\.(\w+)", key)
        if match is None:
            raise KeyError(key)
        groups.setdefault(int(match[1]), {})[match[2]] = value
    last = max(groups)
    ours: dict[str, Tensor] = {}
    norms, name, blocks = [], "", 0
    for number, group in sorted(groups.items()):
        layer = name
        if "running_mean" in group:
            layer = f"{name}.norm"
            norms.append(name)
        elif number == 0:
            layer = name = "head"
        elif number == last:
            layer = name = "tail"
        else:
            layer = name = f"blocks.{blocks}.conv"
            blocks += 1
        ours |= {f"{layer}.{part}": value for part, value in group.items()}
    for name in norms:
        merge_batch_norm(ours, name, f"{name}.norm", eps=1e-4)  # KAIR's own eps
    return ours


def _dncnn_2021(state: State) -> dict[str, Tensor]:
    """conv - BN - ReLU throughout, and a correction that is added where ours is taken away."""

    def rename(key: str) -> str | None:
        key = (_xdncnn_2021(key) or "").replace("blocks.0.", "head.")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        key = f"blocks.{int(block[1]) - 1}.{block[2]}" if block else key
        return re.sub(r"^head\.conv", "head", key) or None

    ours = _by_key(rename)(state)
    merge_batch_norm(ours, "head", "head.norm")
    for i in range(_count(ours, r"blocks\.([^.]+)\.")):
        merge_batch_norm(ours, f"blocks.{i}.conv", f"blocks.{i}.norm")
    return ours | {key: -ours[key] for key in ("tail.weight", "tail.bias")}


# The first whose marks are all there; what has the marks of LAYOUTS is by our keys already, such
# as the official files of xDenseNet and xSRGAN.
OFFICIAL = (
    Official(("joints.weight", "md2.0.features.0.weight"), "xsrcnn", _by_key(_xsrcnn_2018)),
    Official(("joints.weight",), "xdncnn-2018", _by_key(_xdncnn_2018)),
    Official(("xresidual_block1.conv2.weight",), "xsrresnet", _by_key(_xsrresnet_2018)),
    Official(("image_to_features.xunit.features.0.weight",), "xdncnn-2021", _by_key(_xdncnn_2021)),
    Official(("image_to_features.bn.weight",), "dncnn", _dncnn_2021),
    Official(("model.0.weight",), "dncnn", _dncnn_kair),
)
