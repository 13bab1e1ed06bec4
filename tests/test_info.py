from __future__ import annotations

import subprocess
import sys

import xunit_rs


def test_info_is_a_dict_that_prints_as_a_table() -> None:
    facts = xunit_rs.info()
    assert {"xunit-rs", "isa", "threads", "numpy", "torch", "models"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["threads"]) >= 1
    lines = str(facts).splitlines()
    assert len(lines) == len(facts)
    assert len({line.index(value) for line, value in zip(lines, facts.values(), strict=True)}) <= 2


def test_info_imports_no_torch() -> None:
    code = "import sys, xunit_rs; print(xunit_rs.info()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
