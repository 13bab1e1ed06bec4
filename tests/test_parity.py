"""Every row of the table of benches/parity.py is a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("xunit_rs._core")

_path = Path(__file__).resolve().parents[1] / "benches" / "parity.py"
_spec = importlib.util.spec_from_file_location("parity", _path)
parity = importlib.util.module_from_spec(_spec)
sys.modules["parity"] = parity
_spec.loader.exec_module(parity)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", list(parity.cases()), ids=str)
def test_parity(case):
    result = parity.check(case)
    assert result.passed, f"{result.quantity}: {result.error:.1e}, PyTorch {result.plain:.1e}"


def test_check_notices_a_wrong_gradient(monkeypatch):
    case = next(iter(parity.cases()))
    run = parity.quantities

    def wrong(layer, backend, *rest):
        found = run(layer, backend, *rest)
        if backend == "rust":
            found["grad x"] = found["grad x"] * 1.001
        return found

    monkeypatch.setattr(parity, "quantities", wrong)
    result = parity.check(case)
    assert not result.passed and result.quantity == "grad x"


def test_check_notices_nan(monkeypatch):
    case = next(iter(parity.cases()))
    run = parity.quantities

    def wrong(layer, backend, *rest):
        found = run(layer, backend, *rest)
        if backend == "rust":
            found["output"] = found["output"] * float("nan")
        return found

    monkeypatch.setattr(parity, "quantities", wrong)
    result = parity.check(case)
    assert not result.passed and result.quantity == "output"
