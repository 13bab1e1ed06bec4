"""What is installed, and that the README and the metadata tell the truth about it."""

from __future__ import annotations

import re
import shlex
from importlib import import_module, metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import xunit_rs
from xunit_rs import _core, cli, denoise

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_one_version():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert metadata.version("xunit-rs") == version
    assert xunit_rs.__version__ == version
    assert _core.build_info()["version"] == version


def test_metadata():
    fields = metadata.metadata("xunit-rs")
    assert fields["License-Expression"] == "MIT OR Apache-2.0"
    assert set(fields.get_all("License-File")) == {"LICENSE", "LICENSE-APACHE", "LICENSE-MIT"}
    assert fields["Author"] == "The xunit-rs developers"
    assert fields["Requires-Python"] == ">=3.10"
    extras = {"torch", "train", "eval", "demo", "test", "notebooks", "dev"}
    assert set(fields.get_all("Provides-Extra")) == extras


def needs(*extras):
    """Names of what the package requires with these extras, extras of its own resolved."""
    names = set()
    for text in metadata.requires("xunit-rs"):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name == "xunit-rs":
            names |= needs(*requirement.extras)
        else:
            names.add(requirement.name.lower())
    return names


def test_requirements():
    core = {"numpy", "pillow", "tifffile"}
    assert needs() == core
    for extra in ("torch", "train", "test", "notebooks", "dev"):
        assert needs(extra) >= core | {"torch", "safetensors"}, extra
    # Before 2.6 a checkpoint could run code.
    assert any(text.startswith("torch>=2.6") for text in metadata.requires("xunit-rs"))
    assert needs("train") >= {"lightning", "matplotlib", "scikit-image", "tensorboard"}
    assert needs("test") >= needs("train") | {"pytest", "gradio"}
    assert needs("demo") == core | {"gradio"}
    assert needs("notebooks") >= {"jupytext", "nbmake", "matplotlib", "torchvision", "scikit-image"}
    assert needs("dev") >= needs("test") | needs("notebooks") | {"ruff", "mypy", "maturin"}


def test_command():
    (command,) = metadata.entry_points(group="console_scripts", name="xunit-rs")
    assert command.load() is cli.main


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi"])
def test_types_are_installed(name):
    assert (resources.files(xunit_rs) / name).is_file()


def test_the_weights_are_installed():
    names = sorted(path.stem for path in (ROOT / "python/xunit_rs/weights").glob("*.safetensors"))
    assert denoise.DEFAULT_MODEL in names
    assert denoise.pretrained_names() == names


def test_the_installed_package_is_under_test():
    assert ROOT / "python" not in Path(xunit_rs.__file__).parents, "pip install . , then pytest"


def test_public_names_are_in_the_readme():
    for name in set(xunit_rs.__all__) - {"__version__"}:
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_python_imports_what_exists(number):
    pytest.importorskip("torch")
    code = blocks("python")[number]
    compile(code, "README.md", "exec")
    for module, names in re.findall(r"^from (xunit_rs\S*) import (.+)$", code, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(import_module(module), name), f"{module}.{name}"


def test_readme_replaces_a_relu():
    pytest.importorskip("torch")
    (code,) = (block for block in blocks("python") if "replace_relu" in block)
    names = {}
    exec(code, names)
    assert any(isinstance(module, xunit_rs.xUnit) for module in names["model"].modules())


@pytest.mark.parametrize("name", ["README.md", "docs/weights.md"])
def test_command_lines_parse(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", page) for line in re.split(r"\n| && ", block)]
    lines = [line for line in lines if line.startswith("xunit-rs ")]
    assert len(lines) >= 5
    for line in lines:
        cli._parser().parse_args(shlex.split(line, comments=True)[1:])


def test_readme_links_resolve():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
