"""Notebooks say what their sources say, and were executed in a state to be shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def cells_of_source(name):
    """(kind, text) of each cell of a script in jupytext's percent format."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# %%", text, flags=re.MULTILINE)
    cells = []
    for part in parts:
        mark, _, body = part.partition("\n")
        assert mark in ("", " [markdown]"), mark
        if mark:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(("markdown" if mark else "code", body.strip()))
    return cells


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_each_source_has_its_notebook():
    assert NAMES == [
        "compare_with_official",
        "denoise_your_photos",
        "half_the_parameters",
        "replace_relu",
    ]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_source_agree(name):
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(name)["cells"]]
    assert cells == cells_of_source(name)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_was_executed_whole_and_is_clean(name):
    code = [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/jpeg"}
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not re.search(r"(^|[\s'\"(])/\w+/", text), text  # a path of one machine
    # Over that, GitHub shows none.
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1_000_000
