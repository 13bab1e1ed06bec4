"""Checkpoints of xDnCNN: the official files of 2018 and 2021, and safetensors of our own.

A file is recognised by its keys and shapes. Pickles are read by torch's restricted unpickler, which
makes tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._files import replacing
from .denoise import find_weights, pretrained_names

__all__ = ["Checkpoint", "CheckpointError", "convert", "list_weights", "load", "save"]

_PICKLES = (".pkl", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")
_MAX_KERNEL = 255  # as of the reader in Rust
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


class CheckpointError(ValueError):
    """A file that holds no network we know; the message names the file and what is wrong."""


class Checkpoint(NamedTuple):
    """state: tensors by the keys of models.XDnCNN; config: its arguments; metadata: of the file."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]


def list_weights() -> list[str]:
    """Names that `from_pretrained` takes: the weights that come with the package."""
    return pretrained_names()


def load(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Read a network by the name of one in the package, or from a .pkl, .pt or .safetensors file.

    Weights are float32, or float64, which become float32. Where safetensors have no metadata, the
    keys tell the version. Raises CheckpointError for a file that is no such network (truncated,
    hostile, other keys or shapes, NaN or infinity), FileNotFoundError for a missing one.
    """
    path = Path(os.fspath(name_or_path))
    if path.suffix.lower() not in _PICKLES:
        path = find_weights(name_or_path)
        return _load_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    return _load_pickle(path)


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the network in `source`, any file that `load` takes, as safetensors to `target`.

    Raises what `load` raises, FileExistsError if `target` exists and `overwrite` is not set, and
    ValueError if its name does not end in .safetensors.
    """
    target = Path(os.fspath(target))
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: exists already")
    checkpoint = load(source)
    metadata = dict(checkpoint.metadata)
    metadata.setdefault("source", Path(os.fspath(source)).name)
    save(target, checkpoint.state, checkpoint.config, metadata)


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write a state dict of models.XDnCNN as safetensors, whole or not at all.

    config: the arguments of XDnCNN; metadata: what else is known, values become strings.
    """
    save_file = _safetensors().save_file
    path = Path(os.fspath(path))
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    header = {str(k): str(v) for k, v in metadata.items()}
    header |= {k: str(v) for k, v in config.items() if k != "version"}
    header |= {"format": "xunit-rs", "architecture": f"xdncnn-{config['version']}"}
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "reading and writing .safetensors with PyTorch needs pip install 'xunit-rs[torch]'",
            name="safetensors",
        ) from error
    return safetensors.torch


def _load_safetensors(path: Path) -> Checkpoint:
    library = _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        state: dict[str, Tensor] = library.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    return _checked(path, _version(path, state, metadata), state, metadata)


def _version(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What the metadata say and the keys confirm; what the keys show where there are none.

    As the reader in Rust has it, so that the Denoiser and XDnCNN take the same files.
    """
    # "pt" is what the safetensors library itself writes for torch.
    if metadata.get("format", "pt") not in ("xunit-rs", "pt"):
        raise CheckpointError(
            f"{path}: not a network of xunit-rs: format is {metadata['format']!r}"
        )
    marks = {"2018": "blocks.0.xunit.features.3.weight", "2021": "blocks.0.norm.weight"}
    shown = [version for version, key in marks.items() if key in state]
    said = metadata.get("architecture")
    if said is None:
        if len(shown) != 1:
            raise CheckpointError(
                f"{path}: no metadata name an architecture, and the keys fit no or several"
            )
        return shown[0]
    version = said.removeprefix("xdncnn-")
    if version not in marks or version == said:
        raise CheckpointError(f"{path}: unknown architecture {said!r}")
    if len(shown) == 1 and shown[0] != version:
        raise CheckpointError(
            f"{path}: architecture is {said!r}, but {marks[shown[0]]} is of 'xdncnn-{shown[0]}'"
        )
    return version


def _load_pickle(path: Path) -> Checkpoint:
    # Read beforehand: a truncated file makes torch seek where the system answers with an OSError.
    file = io.BytesIO(path.read_bytes())
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler meets bad bytes in as many ways as Python has errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a PyTorch file of plain tensors: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not a state dict")
    state: dict[str, Tensor] = {}
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
        state[key.removeprefix("module.")] = value
    if "joints.weight" in state:
        version, rename = "2018", _from_2018
    elif "features_to_image.weight" in state:
        version, rename = "2021", _from_2021
    else:
        known = "joints.weight (2018) or features_to_image.weight (2021)"
        raise CheckpointError(
            f"{path}: not an official xDnCNN: no {known} among its {len(state)} keys, "
            f"the first of which is {next(iter(state))!r}"
        )
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name = rename(key)
        if name is None:
            raise CheckpointError(f"{path}: unexpected key {key!r}")
        ours[name] = value
    return _checked(path, version, ours, {})


def _from_2018(key: str) -> str | None:
    if key.startswith("joints."):
        return f"tail.{key.removeprefix('joints.')}"
    match = re.fullmatch(r"md([1-9]\d*)\.([01])\.(.+)", key)
    if match is None:
        return None
    block, slot, rest = int(match[1]) - 1, int(match[2]), match[3]
    # md1 holds a unit, every later md a BatchNorm and a unit.
    if block > 0 and slot == 0:
        return f"blocks.{block}.norm.{rest}"
    if slot == min(block, 1):
        for official, ours in (("features.0.", "conv."), ("module.", "xunit.features.")):
            if rest.startswith(official):
                return f"blocks.{block}.{ours}{rest.removeprefix(official)}"
    return None


def _from_2021(key: str) -> str | None:
    if key.startswith("features_to_image."):
        return f"tail.{key.removeprefix('features_to_image.')}"
    match = re.fullmatch(r"(?:image_to_features|features\.(\d+))\.(bn|conv|xunit)\.(.+)", key)
    if match is None:
        return None
    block = 0 if match[1] is None else int(match[1]) + 1
    layer = "norm" if match[2] == "bn" else match[2]
    return f"blocks.{block}.{layer}.{match[3]}"


def _checked(
    path: Path,
    version: str,
    state: dict[str, Tensor],
    metadata: dict[str, str],
) -> Checkpoint:
    """Read the sizes off the shapes, and compare every key and shape with what they call for."""
    _check_memory(path, state)
    first = state.get("blocks.0.conv.weight")
    unit = state.get(f"blocks.0.xunit.features.{2 if version == '2018' else 0}.weight")
    if first is None or unit is None or first.dim() != 4 or unit.dim() != 4:
        raise CheckpointError(f"{path}: an xDnCNN of {version} without its first block")
    config: dict[str, Any] = {
        "version": version,
        "channels": first.shape[1],
        "features": first.shape[0],
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "kernel_size": unit.shape[-1],
        "gate": metadata.get("gate", "gaussian" if version == "2018" else "sigmoid"),
    }
    if config["gate"] not in ("sigmoid", "gaussian"):
        raise CheckpointError(f"{path}: unknown gate {config['gate']!r}")
    if 0 in first.shape:
        raise CheckpointError(f"{path}: blocks.0.conv.weight is empty: {tuple(first.shape)}")
    if config["kernel_size"] % 2 == 0 or config["kernel_size"] > _MAX_KERNEL:
        raise CheckpointError(
            f"{path}: the kernel of the units must be odd and at most {_MAX_KERNEL}: "
            f"{tuple(unit.shape)}"
        )
    for name in ("channels", "features", "depth", "kernel_size"):
        said = metadata.get(name)
        if said is not None and said.strip() != str(config[name]):
            raise CheckpointError(
                f"{path}: the metadata say {name} = {said}, the shapes {config[name]}"
            )
    shapes = _shapes(**{k: v for k, v in config.items() if k != "gate"})
    for key, shape in shapes.items():
        if key not in state and key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)  # came with PyTorch 0.4.1; files of 2018 are older
        if key not in state:
            raise CheckpointError(f"{path}: {key} is missing")
        value = state[key]
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{path}: {key} is {tuple(value.shape)}, not {shape}")
        if not key.endswith("num_batches_tracked"):
            if value.dtype not in (torch.float32, torch.float64):
                raise CheckpointError(f"{path}: {key} is {value.dtype}, not float32 or float64")
            state[key] = value.float()
            if not state[key].isfinite().all():
                raise CheckpointError(f"{path}: {key} has values that are not finite")
    for key in state:
        if key not in shapes:
            raise CheckpointError(f"{path}: unexpected key {key!r}")
    return Checkpoint({key: state[key] for key in shapes}, config, metadata)


def _check_memory(path: Path, state: Mapping[str, Tensor]) -> None:
    """A few bytes can stand for any number of elements: let none of them be allocated."""
    held: dict[int, int] = {}
    for key, value in state.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = f"{value.layout}, {value.dtype}, on {value.device}"
            raise CheckpointError(f"{path}: {key} is not a plain tensor but {kind}")
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    called_for = sum(value.nbytes for value in state.values())
    if called_for > sum(held.values()):
        raise CheckpointError(
            f"{path}: its tensors are of {called_for} bytes, of which it holds {sum(held.values())}"
        )


def _shapes(
    version: str, channels: int, features: int, depth: int, kernel_size: int
) -> dict[str, tuple[int, ...]]:
    """Every key of models.XDnCNN with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in _STATISTICS})
        shapes[f"{name}.num_batches_tracked"] = ()

    def convolution(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    old = version == "2018"
    for i in range(depth):
        width = channels if i == 0 else features
        if i > 0 or not old:
            norm(f"blocks.{i}.norm", width)
        convolution(f"blocks.{i}.conv", features, width, 3, 3)
        unit = f"blocks.{i}.xunit.features"
        if old:
            norm(f"{unit}.0", features)
        convolution(f"{unit}.{2 if old else 0}", features, 1, kernel_size, kernel_size)
        norm(f"{unit}.{3 if old else 1}", features)
    k = 3 if old else 5
    convolution("tail", channels, features, k, k)
    return shapes
