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


@pytest.mark.parametrize("name", ["xUnit", "DepthwiseConv2d", "Gaussian", "functional"])
def test_without_torch_the_error_says_what_to_install(name):
    out = python(
        NO_TORCH
        + f"""
try:
    from xunit_rs import {name}
except ImportError as error:
    print(error)
"""
    )
    assert out == f"xunit_rs.{name} needs PyTorch: pip install 'xunit-rs[torch]'\n"


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
