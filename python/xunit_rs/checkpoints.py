"""Checkpoints: the official files of 2018 and 2021, KAIR's DnCNN, and safetensors of our own.

A file is recognised by its keys and shapes. Pickles are read by torch's restricted unpickler, which
makes tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

from . import _torch  # noqa: F401

# isort: split
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._files import replacing
from ._layouts import LAYOUTS, OFFICIAL, merge_batch_norm
from .denoise import find_weights, pretrained_names

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert",
    "list_weights",
    "load",
    "merge_batch_norm",
    "save",
    "sha256",
    "write",
]

_PICKLES = (".pkl", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")
_MAX_KERNEL = 255  # as of the reader in Rust
# Not in the metadata: the architecture says the one, and the other is the same in every file.
_UNSAID = ("version", "batch_norm")


class CheckpointError(ValueError):
    """A file that holds no network we know; the message names the file and what is wrong."""


class Checkpoint(NamedTuple):
    """What a file holds.

    architecture: such as "xdncnn-2018"; state: tensors by the keys of its class in `models`;
    config: the arguments of that class; metadata: of the file.
    """

    architecture: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]


def list_weights() -> list[str]:
    """Names that `from_pretrained` takes: the weights that come with the package."""
    return pretrained_names()


def load(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Read a network by the name of one in the package, or from a .pkl, .pt or .safetensors file.

    Weights are float32, or float64, which become float32. Where safetensors have no metadata, the
    keys tell the architecture. Raises CheckpointError for a file that is no such network
    (truncated, hostile, other keys or shapes, NaN or infinity), FileNotFoundError for a missing
    one.
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
    save(target, checkpoint.architecture, checkpoint.state, checkpoint.config, metadata)


def save(
    path: str | os.PathLike[str],
    architecture: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Write a network as safetensors, whole or not at all.

    architecture, state and config: as in :class:`Checkpoint`; metadata: what else is known, values
    become strings. Raises ValueError for a state that `config` does not call for.
    """
    path = Path(os.fspath(path))
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    shapes = _shapes(architecture, config)
    for key in sorted(shapes.keys() ^ state.keys()):
        what = "missing" if key in shapes else "not of this architecture"
        raise ValueError(f"{path}: not written: {key} is {what}, {architecture!r}")
    header = {str(k): str(v) for k, v in metadata.items()}
    header |= {k: str(v) for k, v in config.items() if k not in _UNSAID}
    header |= {"format": "xunit-rs", "architecture": architecture}
    write(path, state, header)


def write(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors as safetensors, whole or not at all, with their :func:`sha256` beside them."""
    save_file = _safetensors().save_file
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in state.items()}
    with replacing(Path(os.fspath(path))) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata) | {"sha256": sha256(tensors)})


def sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes, little endian, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    _check_memory(path, state)
    return _checked(path, _architecture(path, state, metadata), state, metadata)


def _architecture(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What the metadata say and the keys confirm; what the keys show where there are none.

    As the reader in Rust has it, so that the Denoiser and the models take the same files.
    """
    # "pt" is what the safetensors library itself writes for torch.
    if metadata.get("format", "pt") not in ("xunit-rs", "pt"):
        raise CheckpointError(
            f"{path}: not a network of xunit-rs: format is {metadata['format']!r}"
        )
    shown = _shown(state)
    said = metadata.get("architecture")
    if said is None:
        if len(shown) != 1:
            raise CheckpointError(
                f"{path}: no metadata name an architecture, and the keys fit no or several"
            )
        return shown[0]
    if said not in LAYOUTS:
        raise CheckpointError(f"{path}: unknown architecture {said!r}")
    if len(shown) == 1 and shown[0] != said:
        raise CheckpointError(
            f"{path}: architecture is {said!r}, but {LAYOUTS[shown[0]].mark} is of {shown[0]!r}"
        )
    return said


def _shown(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout.mark in state]


def _load_pickle(path: Path) -> Checkpoint:
    # Read beforehand: a truncated file makes torch seek where the system answers with an OSError.
    file = io.BytesIO(path.read_bytes())
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler meets bad bytes in as many ways as Python has errors
        # Not in torch's words, which tell programmers how to load it all the same.
        why = "damaged, of another kind, or able to run code"
        raise CheckpointError(f"{path}: not a PyTorch file of plain tensors: {why}") from error
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
    _check_memory(path, state)
    for official in OFFICIAL:
        if all(mark in state for mark in official.marks):
            try:
                state = official.ours(state)
            except KeyError as error:
                raise CheckpointError(f"{path}: unexpected or missing key {error}") from error
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            return _checked(path, official.architecture, state, {})
    shown = _shown(state)
    if len(shown) != 1:
        raise CheckpointError(
            f"{path}: not a network we know: its {len(state)} keys tell none, "
            f"the first of which is {next(iter(state))!r}"
        )
    return _checked(path, shown[0], state, {})


def _checked(
    path: Path,
    architecture: str,
    state: dict[str, Tensor],
    metadata: dict[str, str],
) -> Checkpoint:
    """Read the sizes off the shapes, and compare every key and shape with what they call for."""
    try:
        config = LAYOUTS[architecture].sizes(state)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: not a whole {architecture!r}: {error}") from error
    if architecture.startswith("xdncnn"):
        config["gate"] = metadata.get("gate", "gaussian" if "2018" in architecture else "sigmoid")
    if config.get("kernel_size", 1) > _MAX_KERNEL:
        raise CheckpointError(
            f"{path}: the kernel of the units is {config['kernel_size']}, over {_MAX_KERNEL}"
        )
    for name, value in config.items():
        said = metadata.get(name)
        if said is not None and said.strip() != str(value) and name not in _UNSAID:
            raise CheckpointError(f"{path}: the metadata say {name} = {said}, the shapes {value}")
    try:
        shapes = _shapes(architecture, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
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
    return Checkpoint(architecture, {key: state[key] for key in shapes}, config, metadata)


def _shapes(architecture: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of a network with its shape; ValueError for sizes that its class refuses."""
    from .models import build  # which reads its files through this module

    with torch.device("meta"):  # whatever a file asks for, nothing is allocated
        model = build(architecture, dict(config))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


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
