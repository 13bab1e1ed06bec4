"""Checkpoints of xDnCNN: what is read, what is refused, and that both readers agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from xunit_rs import Denoiser, checkpoints  # noqa: E402
from xunit_rs.checkpoints import CheckpointError  # noqa: E402
from xunit_rs.denoise import find_weights  # noqa: E402
from xunit_rs.models import XDnCNN  # noqa: E402

METADATA = {"format": "xunit-rs", "architecture": "xdncnn-2018"}


@pytest.fixture
def state() -> dict[str, Any]:
    return dict(XDnCNN("2018", 1, 4, 2, kernel_size=3).state_dict())


def official(state: dict[str, Any]) -> dict[str, Any]:
    """The keys of the official code of 2018."""
    result = {}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part == "tail":
            result[f"joints.{rest[0]}"] = value
            continue
        block = int(rest[0])
        slot = min(block, 1)
        inner = {
            "norm": f"0.{rest[-1]}",
            "conv": f"{slot}.features.0.{rest[-1]}",
            "xunit": f"{slot}.module.{'.'.join(rest[3:])}",
        }[rest[1]]
        result[f"md{block + 1}.{inner}"] = value
    return result


def test_official_keys(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(official(state), tmp_path / "a.pkl")
    loaded = checkpoints.load(tmp_path / "a.pkl").state
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    double = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(official(double), tmp_path / "a.pkl")
    assert checkpoints.load(tmp_path / "a.pkl").state["tail.bias"].dtype is torch.float32


def test_tensors_without_memory_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    wide = {}
    for key, value in state.items():
        # As of 30 000 features: a file of some kilobytes for 30 GB.
        shape = [30_000 if size == 4 else size for size in value.shape]
        wide[key] = torch.zeros((), dtype=value.dtype).expand(shape)
    one = torch.zeros(max(v.numel() for v in state.values()))
    for name, hostile in (
        ("meta", {k: v.to("meta") for k, v in state.items()}),
        ("wide", wide),
        ("shared", {k: one[: v.numel()].view(v.shape).to(v.dtype) for k, v in state.items()}),
        ("sparse", state | {"tail.weight": state["tail.weight"].to_sparse()}),
    ):
        path = tmp_path / f"{name}.pkl"
        torch.save(official(hostile), path)
        with pytest.raises(CheckpointError, match=rf"{name}\.pkl: .*(plain tensor|bytes)"):
            checkpoints.load(path)
        with pytest.raises(CheckpointError):
            checkpoints.convert(path, tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_refused(
    state: dict[str, Any], tmp_path: Path, value: float
) -> None:
    state["tail.weight"] = state["tail.weight"].double()
    state["tail.weight"][0, 0, 0, 0] = value
    torch.save(official(state), tmp_path / "a.pkl")
    save_file(state, tmp_path / "a.safetensors", METADATA)
    for name in ("a.pkl", "a.safetensors"):
        with pytest.raises(CheckpointError, match=r"tail\.weight .*not finite"):
            XDnCNN.from_pretrained(tmp_path / name)


def _agree(path: Path, match: str | None) -> None:
    if match is None:
        model = XDnCNN.from_pretrained(path)
        x = torch.rand(1, 1, 9, 8)
        clean = torch.from_numpy(Denoiser.from_pretrained(path)(x[0, 0].numpy()))
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0, 0], clean, atol=1e-5, rtol=1e-4)
        return
    for load in (XDnCNN.from_pretrained, Denoiser.from_pretrained):
        with pytest.raises(ValueError, match=match):
            load(path)


@pytest.mark.parametrize("version", ["2018", "2021"])
@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (None, None),
        ({"format": "pt"}, None),
        ({"format": "xunit-rs"}, None),
        ({"architecture": "VERSION", "features": " 4 "}, None),
        ({"format": "tf"}, "format"),
        ({"architecture": "unet"}, "unknown architecture 'unet'|unknown architecture \"unet\""),
        ({"architecture": "OTHER"}, "architecture is .*xdncnn-"),
        ({"gate": "step"}, "gate .*step"),
        ({"features": "5"}, "features"),
        ({"depth": "3"}, "depth"),
        ({"kernel_size": "5"}, "kernel_size"),
        ({"channels": "x"}, "channels"),
    ],
)
def test_metadata_mean_the_same_to_both_readers(
    tmp_path: Path, version: str, metadata: dict[str, str] | None, match: str | None
) -> None:
    other = {"2018": "2021", "2021": "2018"}[version]
    if metadata is not None:
        words = {"VERSION": f"xdncnn-{version}", "OTHER": f"xdncnn-{other}"}
        metadata = {key: words.get(value, value) for key, value in metadata.items()}
    state = dict(XDnCNN(version, 1, 4, 2, kernel_size=3).state_dict())
    save_file(state, tmp_path / "a.safetensors", metadata)
    _agree(tmp_path / "a.safetensors", match)


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.float16, r"(F32 or F64|float16, not float32 or float64)"),
        (torch.bfloat16, r"(F32 or F64|bfloat16, not float32 or float64)"),
    ],
)
def test_types_of_weights(
    state: dict[str, Any], tmp_path: Path, dtype: Any, match: str | None
) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, tmp_path / "a.safetensors", METADATA)
    _agree(tmp_path / "a.safetensors", match)


def test_save_refuses_what_the_file_cannot_say(tmp_path: Path) -> None:
    model = XDnCNN("2018", 1, 4, 2, kernel_size=3)
    model.save(tmp_path / "a.safetensors")
    model.blocks[1].norm.eps = 1e-3
    with pytest.raises(ValueError, match=r"blocks\.1\.norm: eps is 0\.001"):
        model.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_weights_of_the_package_say_what_they_are() -> None:
    names = checkpoints.list_weights()
    assert {"gray-sigma25", "gray-blind", "color-blind"} <= set(names)
    assert sum(find_weights(name).stat().st_size for name in names) <= 12_000_000
    for name in names:
        loaded = checkpoints.load(name)
        told = loaded.metadata
        assert told["sha256"] == checkpoints.sha256(loaded.state), name
        assert told["license"] == "MIT OR Apache-2.0"
        colour, level = name.startswith("color-"), name.rpartition("-")[2].removeprefix("sigma")
        assert loaded.config["channels"] == (3 if colour else 1)
        assert told["sigma"] == ("0-55" if level == "blind" else level)
        # Trained on another set than what they are measured on.
        assert told["data"].startswith("CBSD400 (")
        levels = (15, 25, 50) if level == "blind" else (level,)
        for test_set in ("CBSD68",) if colour else ("BSD68", "Set12"):
            for sigma in levels:
                assert f"dB (kair, sigma {sigma})" in told[f"psnr_{test_set}"], name
        assert "steps of" in told["recipe"]


def test_the_page_of_weights_has_the_figures_of_the_files() -> None:
    page = (Path(__file__).parents[1] / "docs/weights.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for name in checkpoints.list_weights():
        for key, told in checkpoints.load(name).metadata.items():
            if key.startswith("psnr_"):
                (row,) = re.findall(rf"^\| `{name}` \|(.*)$", sections[key[5:]], re.MULTILINE)
                cells = [cell.split("/")[0].strip() for cell in row.split("|")[:3]]
                measured = dict(re.findall(r"([\d.]+) dB \(kair, sigma (\d+)\)", told))
                expected = {sigma: float(value) for value, sigma in measured.items()}
                for sigma, cell in zip(("15", "25", "50"), cells, strict=True):
                    assert (cell == "") == (sigma not in expected), name
                    # Either is rounded, to two and to three places.
                    assert not cell or abs(float(cell) - expected[sigma]) <= 0.0055 + 1e-9, name
