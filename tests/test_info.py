from __future__ import annotations

import subprocess
import sys

import pytest

import xunit_rs


def test_info_is_a_dict_that_prints_as_a_table() -> None:
    facts = xunit_rs.info()
    assert {"xunit-rs", "isa", "threads", "numpy", "torch", "models"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["threads"]) >= 1
    lines = str(facts).splitlines()
    assert len(lines) == len(facts)
    assert len({line.index(value) for line, value in zip(lines, facts.values(), strict=True)}) <= 2


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    from xunit_rs.cli import main

    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{xunit_rs.info()}\n"


def test_info_imports_no_torch() -> None:
    code = "import sys, xunit_rs; print(xunit_rs.info()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pool_is_named() -> None:
    code = "import xunit_rs; print(xunit_rs.info()['pool'])"
    alone = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert alone.stdout.strip() == "our own"
    pytest.importorskip("torch")
    from xunit_rs import _autograd

    assert ("PyTorch" in xunit_rs.info()["pool"]) == (_autograd._parallel_for() is not None)


def test_paths_of_a_model() -> None:
    torch = pytest.importorskip("torch")
    from torch import nn

    hooked = xunit_rs.xUnit(4)
    hooked.features[2].register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "unit": xunit_rs.xUnitD(4, batch_norm=True),
            "hooked": hooked,
            "synced": nn.SyncBatchNorm.convert_sync_batchnorm(xunit_rs.xUnitS(4, 3, True)),
            "off": xunit_rs.DepthwiseConv2d(4, 3, backend="torch"),
            "on": xunit_rs.DepthwiseConv2d(4, 3, dtype=torch.bfloat16),
            "meta": xunit_rs.DepthwiseConv2d(4, 3, device="meta"),
            "mirror": xunit_rs.DepthwiseConv2d(4, 3, padding_mode="reflect"),
            "complex": xunit_rs.DepthwiseConv2d(4, 3, dtype=torch.complex64),
            "mixed": xunit_rs.xUnit(4, batch_norm=True),
            "conv": nn.Conv2d(4, 4, 3, groups=4),
            "wide": nn.Conv2d(4, 8, 3, groups=4),
            "dense": nn.Conv2d(4, 4, 3),
        }
    )
    model["mixed"].features[2].double()
    paths = xunit_rs.info(model)
    expected = {
        "unit": "rust",
        "hooked": "torch: features has Conv2d (or a hook on it) as dw",
        "synced": "torch: features has SyncBatchNorm",
        "off": "torch: backend='torch'",
        "on": "rust",
        "meta": "torch: a tensor is on meta",
        "mirror": "torch: reflect padding",
        "complex": "torch: a tensor is torch.complex64",
        "mixed": "torch: the input is torch.float64 and a BatchNorm tensor is torch.float32",
        "conv": "torch: a Conv2d; accelerate(model) would swap it",
        "wide": "torch: a Conv2d; 8 output channels of 4",
    }
    assert list(paths) == list(expected)
    for name, path in expected.items():
        assert paths[name].startswith(path), name
    assert list(xunit_rs.info(hooked)) == ["(model)"]
    with torch.device("cpu"), torch.inference_mode():
        assert xunit_rs.info(model)["unit"] == "rust"
    with pytest.raises(TypeError, match="'net'"):
        xunit_rs.info("net")
    assert str(xunit_rs.info(nn.ReLU())) == ""


def test_paths_are_those_that_the_modules_take() -> None:
    torch = pytest.importorskip("torch")

    for unit in (xunit_rs.xUnit(3), xunit_rs.xUnitS(3, dtype=torch.float64)):
        for change in (None, torch.nn.InstanceNorm2d(3)):
            if change is not None:
                unit.features[-2] = change
            unit.backend = "rust"
            path = xunit_rs.info(unit)["(model)"]
            x = torch.zeros(1, 3, 8, 8, dtype=unit.features[-3].weight.dtype)
            if path == "rust":
                unit(x)
            else:
                with pytest.raises(ValueError, match="InstanceNorm2d"):
                    unit(x)
            assert (path == "rust") == (change is None)
