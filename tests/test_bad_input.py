"""The cases of tools/bad_input.py, which prints the same as a table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "bad_input", Path(__file__).parents[1] / "tools" / "bad_input.py"
)
assert _SPEC is not None and _SPEC.loader is not None
bad_input: Any = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = bad_input
_SPEC.loader.exec_module(bad_input)


@pytest.mark.parametrize(
    "item", bad_input.CASES, ids=lambda item: f"{item.section}: {item.name}".replace(" ", "_")
)
def test_bad_input(item: Any, tmp_path: Path) -> None:
    good, line = bad_input.outcome(item, tmp_path)
    assert good, line
