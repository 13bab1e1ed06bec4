"""Every network against a plain twin with the keys of its official file, and its own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from xunit_rs import checkpoints, models, replace_relu  # noqa: E402
from xunit_rs.checkpoints import CheckpointError  # noqa: E402
from xunit_rs.models import DnCNN, XDenseNet, XDnCNN, create_model, list_models  # noqa: E402

State = dict[str, Tensor]
Twin = Callable[[State, Tensor], Tensor]


class _Drawn(dict):  # type: ignore[type-arg]
    """The state of an official network, of random values that float32 can hold, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value.float().double())

    def conv(self, name: str, out: int, width: int, k: int, bias: bool = True) -> None:
        scale = (width * k * k) ** -0.5
        self[f"{name}.weight"] = self._normal(out, width, k, k) * scale
        if bias:
            self[f"{name}.bias"] = self._normal(out) * 0.1

    def norm(self, name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            value = self._normal(width) * 0.2
            self[f"{name}.{part}"] = value if part in ("bias", "running_mean") else 1 + value.abs()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def conv(s: State, name: str, x: Tensor, groups: int = 1) -> Tensor:
    w = s[f"{name}.weight"]
    return F.conv2d(x, w, s.get(f"{name}.bias"), padding=w.shape[-1] // 2, groups=groups)


def norm(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    parts = (s[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts, eps=eps)


def cell_2018(s: State, name: str, x: Tensor) -> Tensor:
    x = conv(s, f"{name}.features.0", x)
    d = F.relu(norm(s, f"{name}.module.0", x))
    d = norm(s, f"{name}.module.3", conv(s, f"{name}.module.2", d, x.shape[1]))
    return x * torch.exp(-d * d)


def draw_cell_2018(s: _Drawn, name: str, out: int, width: int, k: int, unit: int = 9) -> None:
    s.conv(f"{name}.features.0", out, width, k)
    s.norm(f"{name}.module.0", out)
    s.conv(f"{name}.module.2", out, 1, unit)
    s.norm(f"{name}.module.3", out)


def xdncnn_2018() -> tuple[State, Twin]:
    s = _Drawn()
    for i in range(3):
        if i:
            s.norm(f"md{i + 1}.0", 4)
        draw_cell_2018(s, f"md{i + 1}.{min(i, 1)}", 4, 4 if i else 1, 3)
    s.conv("joints", 1, 4, 3)

    def twin(s: State, x: Tensor) -> Tensor:
        noisy, x = x, cell_2018(s, "md1.0", x)
        for i in (2, 3):
            x = cell_2018(s, f"md{i}.1", norm(s, f"md{i}.0", x))
        return noisy - conv(s, "joints", x)

    return s, twin


def xdncnn_2021() -> tuple[State, Twin]:
    s = _Drawn()
    names = ["image_to_features", "features.0", "features.1"]
    for i, name in enumerate(names):
        s.norm(f"{name}.bn", 4 if i else 3)
        s.conv(f"{name}.conv", 4, 4 if i else 3, 3)
        s.conv(f"{name}.xunit.features.0", 4, 1, 7)
        s.norm(f"{name}.xunit.features.1", 4)
    s.conv("features_to_image", 3, 4, 5)

    def twin(s: State, x: Tensor) -> Tensor:
        noisy = x
        for name in names:
            x = conv(s, f"{name}.conv", norm(s, f"{name}.bn", x))
            d = conv(s, f"{name}.xunit.features.0", x, 4)
            x = x * torch.sigmoid(norm(s, f"{name}.xunit.features.1", d))
        return noisy + conv(s, "features_to_image", x)

    return s, twin


def xsrcnn() -> tuple[State, Twin]:
    s = _Drawn()
    draw_cell_2018(s, "md1.0", 6, 1, 9)
    draw_cell_2018(s, "md2.0", 4, 6, 3)
    s.conv("joints", 1, 4, 5)
    return s, lambda s, x: conv(s, "joints", cell_2018(s, "md2.0", cell_2018(s, "md1.0", x)))


def xsrresnet() -> tuple[State, Twin]:
    s = _Drawn()
    s.conv("conv1", 4, 3, 9)
    s["prelu1.weight"] = torch.tensor([0.3])
    for i in (1, 2):
        draw_cell_2018(s, f"xresidual_block{i}.md", 4, 4, 3)
        s.conv(f"xresidual_block{i}.conv2", 4, 4, 3)
        s.norm(f"xresidual_block{i}.bn1", 4)
    s.conv("conv2", 4, 4, 3)
    s.norm("bn2", 4)
    for i in (1, 2):
        s.conv(f"upsample{i}.conv", 16, 4, 3)
        s[f"upsample{i}.prelu.weight"] = torch.tensor([0.1 * i])
    s.conv("conv3", 3, 4, 9)

    def twin(s: State, x: Tensor) -> Tensor:
        x = y = F.prelu(conv(s, "conv1", x), s["prelu1.weight"])
        for i in (1, 2):
            z = conv(s, f"xresidual_block{i}.conv2", cell_2018(s, f"xresidual_block{i}.md", y))
            y = norm(s, f"xresidual_block{i}.bn1", z) + y
        x = norm(s, "bn2", conv(s, "conv2", y)) + x
        for i in (1, 2):
            x = F.pixel_shuffle(conv(s, f"upsample{i}.conv", x), 2)
            x = F.prelu(x, s[f"upsample{i}.prelu.weight"])
        return conv(s, "conv3", x)

    return s, twin


def xsrgan() -> tuple[State, Twin]:
    s = _Drawn()
    s.conv("image_to_features", 4, 3, 5)
    for i in (0, 1, 2):
        s.conv(f"features.{i}.xunit.features.0", 4, 1, 7)
        s.conv(f"features.{i}.conv1", 4, 4, 3, bias=False)
        s.conv(f"features.{i}.conv2", 4, 4, 3, bias=False)
    s.conv("usample.0.conv", 16, 4, 3)
    s.conv("hrconv", 4, 4, 3)
    s.conv("features_to_image", 3, 4, 5)

    def twin(s: State, x: Tensor) -> Tensor:
        large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.leaky_relu(conv(s, "image_to_features", x), 0.1)
        for i in (0, 1, 2):
            y = conv(s, f"features.{i}.conv1", x)
            y = y * torch.sigmoid(conv(s, f"features.{i}.xunit.features.0", y, 4))
            x = x + conv(s, f"features.{i}.conv2", y)
        x = F.leaky_relu(F.pixel_shuffle(conv(s, "usample.0.conv", x), 2), 0.1)
        return conv(s, "features_to_image", F.leaky_relu(conv(s, "hrconv", x), 0.1)) + large

    return s, twin


def xdensenet() -> tuple[State, Twin]:
    s = _Drawn()
    blocks, growth, inner, width = (2, 1), 3, 6, 5

    def draw_cell(name: str, out: int, width: int) -> None:
        s.conv(f"{name}.features.0", out, width, 3)
        s.conv(f"{name}.features.1.features.0", out, out, 1)
        s.norm(f"{name}.features.1.features.1", out)
        s.conv(f"{name}.features.1.features.3", out, 1, 7)
        s.norm(f"{name}.features.1.features.4", out)
        s.norm(f"{name}.features.2", out)

    def cell(s: State, name: str, x: Tensor) -> Tensor:
        x = conv(s, f"{name}.features.0", x)
        d = conv(s, f"{name}.features.1.features.0", x)
        d = F.relu(norm(s, f"{name}.features.1.features.1", d))
        d = norm(
            s,
            f"{name}.features.1.features.4",
            conv(s, f"{name}.features.1.features.3", d, x.shape[1]),
        )
        return norm(s, f"{name}.features.2", x * torch.sigmoid(d))

    draw_cell("image_to_features", width, 3)
    for b, count in enumerate(blocks):
        if b:
            s.norm(f"features.{2 * b - 1}.features.0", width)
            s.conv(f"features.{2 * b - 1}.features.2", width // 2, width, 1, bias=False)
            width //= 2
        for i in range(count):
            name = f"features.{2 * b}.features.{i}.features"
            s.norm(f"{name}.0", width)
            s.conv(f"{name}.2", inner, width, 1, bias=False)
            s.norm(f"{name}.3", inner)
            draw_cell(f"{name}.5", growth, inner)
            width += growth
    s.conv("features_to_image", 3, width, 5)

    def twin(s: State, x: Tensor) -> Tensor:
        noisy, x = x, cell(s, "image_to_features", x)
        for b, count in enumerate(blocks):
            if b:
                name = f"features.{2 * b - 1}.features"
                x = conv(s, f"{name}.2", F.relu(norm(s, f"{name}.0", x)))
            for i in range(count):
                name = f"features.{2 * b}.features.{i}.features"
                y = conv(s, f"{name}.2", F.relu(norm(s, f"{name}.0", x)))
                x = torch.cat([x, cell(s, f"{name}.5", F.relu(norm(s, f"{name}.3", y)))], 1)
        return noisy + conv(s, "features_to_image", x)

    return s, twin


def dncnn_kair() -> tuple[State, Twin]:
    s = _Drawn()
    for i in (0, 2, 4, 6):
        s.conv(f"model.{i}", 1 if i == 6 else 4, 4 if i else 1, 3)

    def twin(s: State, x: Tensor) -> Tensor:
        y = x
        for i in (0, 2, 4):
            y = F.relu(conv(s, f"model.{i}", y))
        return x - conv(s, "model.6", y)

    return s, twin


def dncnn_kair_in_training() -> tuple[State, Twin]:
    s = _Drawn()
    for i in (0, 2, 5, 8):
        s.conv(f"model.{i}", 3 if i == 8 else 4, 4 if i else 3, 3)
    s.norm("model.3", 4)
    s.norm("model.6", 4)

    def twin(s: State, x: Tensor) -> Tensor:
        y = F.relu(conv(s, "model.0", x))
        for i in (2, 5):
            y = F.relu(norm(s, f"model.{i + 1}", conv(s, f"model.{i}", y), eps=1e-4))
        return x - conv(s, "model.8", y)

    return s, twin


def dncnn_2021() -> tuple[State, Twin]:
    s = _Drawn()
    names = ["image_to_features", "features.0", "features.1"]
    for i, name in enumerate(names):
        s.conv(f"{name}.conv", 4, 4 if i else 3, 3, bias=i == 0)
        s.norm(f"{name}.bn", 4)
    s.conv("features_to_image", 3, 4, 5)

    def twin(s: State, x: Tensor) -> Tensor:
        y = x
        for name in names:
            y = F.relu(norm(s, f"{name}.bn", conv(s, f"{name}.conv", y)))
        return x + conv(s, "features_to_image", y)

    return s, twin


CASES: dict[str, tuple[Callable[[], tuple[State, Twin]], str, dict[str, Any]]] = {
    "xdncnn-2018": (xdncnn_2018, "xdncnn-2018", {"channels": 1, "features": 4, "depth": 3}),
    "xdncnn-2021": (xdncnn_2021, "xdncnn-2021", {"channels": 3, "features": 4, "depth": 3}),
    "xsrcnn": (xsrcnn, "xsrcnn", {"widths": (6, 4), "kernel_sizes": (9, 3, 5), "kernel_size": 9}),
    "xsrresnet": (xsrresnet, "xsrresnet", {"channels": 3, "depth": 2, "scale": 4}),
    "xsrgan": (xsrgan, "xsrgan", {"features": 4, "depth": 3, "scale": 2, "kernel_size": 7}),
    "xdensenet": (xdensenet, "xdensenet", {"blocks": (2, 1), "growth": 3, "bottleneck": 2}),
    "dncnn-kair": (dncnn_kair, "dncnn", {"channels": 1, "features": 4, "depth": 2, "tail": 3}),
    "dncnn-kair-bn": (dncnn_kair_in_training, "dncnn", {"channels": 3, "depth": 2}),
    "dncnn-2021": (dncnn_2021, "dncnn", {"channels": 3, "features": 4, "depth": 2, "tail": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_official_files_give_the_official_function(case: str, tmp_path: Path) -> None:
    make, architecture, config = CASES[case]
    state, twin = make()
    torch.save(dict(state), tmp_path / "a.pt")
    checkpoint = checkpoints.load(tmp_path / "a.pt")
    assert checkpoint.architecture == architecture
    assert config.items() <= checkpoint.config.items()

    model = models.from_pretrained(tmp_path / "a.pt")
    assert not any(module.training for module in model.modules())
    x = torch.rand(2, model.channels, 9, 8, dtype=torch.float64) + 0.1
    y = twin(state, x)
    assert y.shape == (2, model.channels, 9 * model.scale, 8 * model.scale)
    # Merging a BN rounds the weights to float32.
    tolerance = 1e-5 if architecture == "dncnn" and case != "dncnn-kair" else 1e-12
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x), y, atol=tolerance, rtol=tolerance)
        assert torch.equal(model(x, sigma=0.1), model(x))

    # Our own file: with and without the metadata, which say what the shapes say.
    model.float().save(tmp_path / "a.safetensors", sigma=25)
    checkpoint = checkpoints.load(tmp_path / "a.safetensors")
    assert checkpoint.metadata["architecture"] == architecture
    assert checkpoint.metadata["sigma"] == "25"
    again = models.from_pretrained(tmp_path / "a.safetensors")
    assert type(again) is type(model) and again.config() == model.config()
    assert all(torch.equal(value, model.state_dict()[k]) for k, value in again.state_dict().items())
    # The keys alone tell the architecture.
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    assert checkpoints.load(tmp_path / "ours.pt").config == checkpoint.config


@pytest.mark.parametrize("case", ["xsrgan", "xdensenet"])
def test_networks_of_2021_have_the_official_keys(case: str) -> None:
    make, architecture, _ = CASES[case]
    state, _ = make()
    config = checkpoints.LAYOUTS[architecture].sizes(state)
    ours = {k for k in models.build(architecture, config).state_dict() if "num_b" not in k}
    assert ours == set(state)


def _count(model: nn.Module) -> int:
    """By the rule of the paper's code: no biases, but those of BN; no slopes of PReLUs."""
    return sum(
        module.weight.numel() + (module.bias.numel() if isinstance(module, nn.BatchNorm2d) else 0)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "published"),
    [
        ("xdncnn-2018", {}, 303_616),  # 303K
        ("xsrcnn-c", {}, 44_092),  # 44K
        ("xsrcnn-f", {}, 32_576),  # 32K
        ("xsrresnet", {}, 1_155_968),  # 1.155M
        ("dncnn", {}, 556_032),  # 556K
    ],
)
def test_published_numbers_of_parameters(name: str, kwargs: dict[str, Any], published: int) -> None:
    assert _count(create_model(name, **kwargs)) == published


def test_numbers_of_all_parameters() -> None:
    def parameters(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert parameters(create_model("xdncnn-2018")) == 304_641
    assert parameters(DnCNN(batch_norm=False)) == 555_137  # as KAIR's dncnn_25


def test_create_model() -> None:
    assert "xdncnn-2018" in list_models() and "dncnn" in list_models()
    for name in list_models():
        kwargs = {} if name.startswith("xsrcnn") else {"channels": 2, "features": 3}
        model = create_model(name, **kwargs)
        assert model.training and model.channels == kwargs.get("channels", 1)
        assert model.architecture in name or name in model.architecture
    weights = list_models(pretrained=True)
    assert "gray-sigma25" in weights
    model = create_model("gray-sigma25", pretrained=True, backend="torch")
    assert isinstance(model, XDnCNN) and not model.training
    assert model.blocks[0].xunit.backend == "torch"
    for name, pretrained in (("gray-sigma25", False), ("dncnn", True), ("dncn", False)):
        with pytest.raises(ValueError, match=f"'{name}'"):
            create_model(name, pretrained)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_are_those_of_the_twin(backend: str) -> None:
    state, twin = xdensenet()
    config = checkpoints.LAYOUTS["xdensenet"].sizes(state)
    model = XDenseNet(**config, backend=backend).double().eval()
    model.load_state_dict(dict(state), strict=False)
    x = torch.rand(1, 3, 9, 8, dtype=torch.float64)
    key = "features.0.features.1.features.5.features.1.features.3.weight"
    weight = dict(model.named_parameters())[key]
    state[key].requires_grad_()
    (ours,) = torch.autograd.grad(model(x).square().sum(), weight)
    (plain,) = torch.autograd.grad(twin(state, x).square().sum(), state[key])
    torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


def test_dncnn_files_hold_no_batch_norm(tmp_path: Path) -> None:
    model = DnCNN(1, 4, 2)
    x = torch.rand(2, 1, 9, 8)
    for _ in range(3):
        model(x)  # running statistics other than 0 and 1
    model.eval().save(tmp_path / "a.safetensors")
    state = checkpoints.load(tmp_path / "a.safetensors").state
    assert list(state) == [
        *("head.weight", "head.bias"),
        *("blocks.0.conv.weight", "blocks.0.conv.bias"),
        *("blocks.1.conv.weight", "blocks.1.conv.bias"),
        *("tail.weight", "tail.bias"),
    ]
    merged = DnCNN.from_pretrained(tmp_path / "a.safetensors")
    assert not merged.batch_norm and model.batch_norm
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(x - merged.predict_noise(x), merged(x))


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    model = DnCNN(1, 4, 2, batch_norm=False)
    converted = replace_relu(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"relu\.features.*not of this architecture"):
        converted.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'dncnn', not of XDnCNN"):
        XDnCNN.from_pretrained(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("case", "key", "value", "match"),
    [
        ("dncnn-kair", "model.2.extra", torch.zeros(1), "unexpected key"),
        ("dncnn-kair", "model.4.weight", None, "missing"),
        ("dncnn-kair-bn", "model.3.running_var", torch.zeros(2), "does not fit"),
        ("dncnn-kair-bn", "model.3.bias", None, "missing key"),
        ("dncnn-2021", "features.1.bn.bias", None, "missing key"),
        ("xsrcnn", "md2.1.weight", torch.zeros(1), "unexpected"),
        ("xsrresnet", "bn3.weight", torch.zeros(1), "unexpected"),
        ("xsrresnet", "conv1.weight", torch.zeros(4), "not a whole"),
        ("xsrgan", "usample.1.lrelu.weight", torch.zeros(1), "missing"),
        ("xdensenet", "features.2.features.0.features.5.features.0.bias", None, "missing"),
    ],
)
def test_damaged_files_are_refused(
    case: str, key: str, value: Tensor | None, match: str, tmp_path: Path
) -> None:
    state = dict(CASES[case][0]()[0])
    state.pop(key, None)
    if value is not None:
        state[key] = value
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{match}"):
        checkpoints.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("dncnn", {"depth": 0}, "depth.*0"),
        ("dncnn", {"tail": 4}, "tail.*4"),
        ("xdensenet", {"blocks": (1, 0)}, "blocks.*0"),
        ("xdensenet", {"kernel_size": 2}, "kernel_size.*2"),
        ("xsrcnn-f", {"widths": (4,)}, "kernel_sizes.*2 odd"),
        ("xsrcnn-c", {"channels": 0}, "channels.*0"),
        ("xsrresnet", {"scale": 3}, "scale.*3"),
        ("xsrgan", {"scale": 1}, "scale.*1"),
        ("xsrgan", {"backend": "gpu"}, "gpu"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_model(name, **kwargs)


def test_wrong_inputs() -> None:
    for name in list_models():
        model = create_model(name, **({} if "xsrcnn" in name else {"features": 2}))
        with pytest.raises(ValueError, match=r"\(N, \d, H, W\), not \(1, 5, 8, 8\)"):
            model(torch.zeros(1, 5, 8, 8))
