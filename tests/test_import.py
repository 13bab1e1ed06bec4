"""What `import xunit_rs` does, with and without torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import xunit_rs

NO_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_does_not_import_torch():
    assert python("import sys, xunit_rs; print('torch' in sys.modules)") == "False\n"


NEED_TORCH = (
    "from xunit_rs import xUnit",
    "from xunit_rs import DepthwiseConv2d",
    "from xunit_rs import replace_relu",
    "from xunit_rs import functional",
    "from xunit_rs import training",
    "import xunit_rs; xunit_rs.models",
    "from xunit_rs.checkpoints import load",
    "from xunit_rs.convert import accelerate",
    "from xunit_rs.functional import xunit",
    "from xunit_rs.models import XDnCNN",
    "from xunit_rs.modules import xUnit",
    "from xunit_rs.reference import xunit",
    "from xunit_rs.training import train",
    "from xunit_rs.training.data import Patches",
)


@pytest.mark.parametrize("statement", NEED_TORCH)
def test_without_torch_the_error_says_what_to_install(statement):
    out = python(
        NO_TORCH
        + f"""
for _ in range(2):
    try:
        {statement}
    except ImportError as error:
        print(error.name, error)
"""
    )
    line = "torch this part of xunit_rs needs PyTorch: pip install 'xunit-rs[torch]'\n"
    assert out == 2 * line


def test_submodules_are_attributes():
    names = ("checkpoints", "cli", "convert", "denoise", "evaluation", "functional", "images")
    names += ("models", "modules", "reference", "training")
    for name in names:
        code = f"import xunit_rs; print(xunit_rs.{name}.__name__, {name!r} in dir(xunit_rs))"
        assert python(code) == f"xunit_rs.{name} True\n"
    for name in ("cli", "denoise", "evaluation", "images"):
        assert python(f"{NO_TORCH}import xunit_rs; print(xunit_rs.{name}.__name__)")


def test_every_public_name_is_there():
    pytest.importorskip("torch")
    for name in xunit_rs.__all__:
        assert getattr(xunit_rs, name) is not None
        assert name in dir(xunit_rs)
    assert xunit_rs.functional.xunit is not None


def test_info_is_the_function_even_after_its_module_is_imported():
    out = python("import xunit_rs._info, xunit_rs; print(callable(xunit_rs.info))")
    assert out == "True\n"


def test_version_is_a_string():
    assert xunit_rs.__version__[0].isdigit()


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'xunit_'"):
        _ = xunit_rs.xunit_
