"""The xUnit modules against their plain definition: keys, values, gradients, layouts, errors."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from xunit_rs import functional, reference  # noqa: E402
from xunit_rs.modules import DepthwiseConv2d, Gaussian, xUnit, xUnitD, xUnitS  # noqa: E402

UNITS = [xUnit, xUnitS, xUnitD]
BACKENDS = ["torch", "rust"]


def conv(n: int) -> list[str]:
    return [f"features.{n}.weight", f"features.{n}.bias"]


def norm(n: int) -> list[str]:
    buffers = [f"features.{n}.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")]
    return conv(n) + buffers


# The official 2021 layout, written out.
KEYS = {
    (xUnit, False): conv(2),
    (xUnit, True): norm(0) + conv(2) + norm(3),
    (xUnitS, False): conv(0),
    (xUnitS, True): conv(0) + norm(1),
    (xUnitD, False): conv(0) + conv(3),
    (xUnitD, True): conv(0) + norm(1) + conv(3) + norm(4),
}


def build(unit, *, backend="auto", bn=True, gate="sigmoid", channels=3, k=5, dtype=torch.float32):
    torch.manual_seed(0)
    module = unit(channels, k, bn, gate=gate, backend=backend, dtype=dtype)
    for child in module.features:
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
            child.running_mean.uniform_(-0.3, 0.3)
            child.running_var.uniform_(0.5, 1.5)
    return module


def plain(module, x):
    """The definition."""
    return x * module.features(x)


@pytest.mark.parametrize(("unit", "bn"), KEYS)
def test_keys_are_the_official_ones(unit, bn):
    module = unit(4, 7, bn)
    assert list(module.state_dict()) == KEYS[unit, bn]
    unit(4, 7, bn, gate="gaussian").load_state_dict(module.state_dict())


def test_gate_and_identity_slots():
    assert isinstance(xUnit(gate="gaussian").features[4], Gaussian)
    assert isinstance(xUnitS().features[2], nn.Sigmoid)
    assert isinstance(xUnitD().features[1], nn.Identity)
    assert xUnit().features[2].weight.shape == (64, 1, 7, 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gate", ["sigmoid", "gaussian"])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_matches_a_float64_twin(unit, gate, bn, training, backend):
    module = build(unit, backend=backend, gate=gate, bn=bn).train(training)
    twin = copy.deepcopy(module).double()
    x = torch.randn(2, 3, 13, 18, requires_grad=True)
    z = x.detach().double().requires_grad_()
    seed = torch.randn(2, 3, 13, 18)

    out, expected = module(x), plain(twin, z)
    torch.testing.assert_close(out, expected.float(), rtol=2e-5, atol=2e-6)
    out.backward(seed)
    expected.backward(seed.double())
    torch.testing.assert_close(x.grad, z.grad.float(), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-4, atol=1e-4, msg=name)
    for (name, a), b in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b[1].to(a.dtype), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("unit", UNITS)
def test_running_statistics_follow_batch_norm(unit, momentum, backend):
    module = build(unit, backend=backend)
    for child in module.features:
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = momentum
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(2, 3, 6, 5)
        with torch.no_grad():
            module(x)
            plain(twin, x)
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("freeze", [3, 0])
def test_one_frozen_norm(freeze, backend):
    module = build(xUnit, backend=backend).train()
    module.features[freeze].eval()
    twin = copy.deepcopy(module)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(module(x), plain(twin, x))
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["no affine", "never tracked", "no longer tracked"])
def test_batch_norm_options(case, training, backend):
    module = build(xUnit, backend=backend)
    if case == "no longer tracked":
        module.features[0].track_running_stats = False
    else:
        module.features[0] = nn.BatchNorm2d(
            3, affine=case != "no affine", track_running_stats=case != "never tracked"
        )
    module.train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    out, expected = module(x), plain(twin, z)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gate", ["sigmoid", "gaussian"])
@pytest.mark.parametrize("bn", [False, True])
def test_nan_and_inf_go_where_torch_sends_them(unit, gate, bn, backend):
    module = build(unit, backend=backend, gate=gate, bn=bn).eval()
    x = torch.randn(1, 3, 24, 24)
    x[0, 0, 2, 3] = float("nan")
    x[0, 1, 12, 12] = float("inf")
    x[0, 2, 20, 20] = -float("inf")
    out, expected = module(x), plain(module, x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert torch.equal(out.isneginf(), expected.isneginf())
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "gaussian"])
def test_evaluation_in_channels_last(unit, gate, batch_norm, dtype):
    for channels, size, kernel in ((32, 40, 7), (64, 33, 9), (19, 60, 3)):
        module = unit(channels, kernel, batch_norm, gate=gate)
        module(torch.randn(2, channels, 9, 9))  # running statistics
        module = module.eval().to(dtype)
        x = torch.randn(2, channels, size, size, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        want = reference_of(module, x)
        with torch.no_grad():
            out = module(x)
        assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
        bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(out.double(), want, rtol=bound, atol=bound)


def reference_of(module, x):
    """The plain definition in float64."""
    twin = copy.deepcopy(module).double()
    twin.backend = "torch"
    with torch.no_grad():
        return twin(x.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
def test_channels_last_is_kept(unit, backend):
    module = build(unit, backend=backend).train()
    x = torch.randn(2, 3, 8, 9).to(memory_format=torch.channels_last).requires_grad_()
    out = module(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(out, x, torch.randn(2, 3, 8, 9))
    if backend == "rust":  # PyTorch lets the contiguous gradient decide
        assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, plain(module, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_negative_views(backend):
    module = build(xUnit, backend=backend).eval()
    big = torch.randn(2, 3, 12, 20)
    for x in (big[:, :, ::2, 3:11], big.transpose(2, 3), big[:1].expand(4, -1, -1, -1)):
        torch.testing.assert_close(module(x), plain(module, x))
    x = torch.randn(2, 3, 8, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(module(x), plain(module, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_its_own_type(dtype, backend):
    module = build(xUnit, backend=backend).to(dtype)
    x = torch.randn(2, 3, 9, 9).to(dtype).requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == module.features[2].weight.grad.dtype == dtype
    assert module.features[0].running_mean.dtype == dtype
    expected = plain(build(xUnit).to(dtype).float(), x.detach().float())
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype, backend):
    module = build(xUnit, backend=backend)
    x = torch.randn(2, 3, 9, 9).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        expected = plain(module, x)
    assert out.dtype == expected.dtype == dtype
    out.sum().backward()
    assert module.features[2].weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 3, 1, 1), (2, 3, 1, 9), (1, 3, 2, 2)])
def test_small_and_empty(unit, shape, backend):
    module = build(unit, backend=backend, k=7).eval()
    x = torch.randn(shape, requires_grad=True)
    out = module(x)
    assert out.shape == shape
    torch.testing.assert_close(out, plain(module, x))
    out.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_weight_and_input_twice_in_a_graph(backend):
    module = build(xUnitS, backend=backend)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 3, 6, 6)
    module(module(x)).sum().backward()
    plain(twin, plain(twin, x)).sum().backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 4},
        {"kernel_size": (2, 5), "dilation": (2, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": (1, 2), "padding": (0, 3), "bias": False},
        {"kernel_size": 3, "padding": "valid", "dilation": 2},
    ],
)
def test_depthwise_conv_is_the_conv2d_it_extends(options, shape, backend):
    torch.manual_seed(0)
    module = DepthwiseConv2d(3, backend=backend, **options)
    twin = nn.Conv2d(3, 3, groups=3, **{"padding": "same", **options})
    twin.load_state_dict(module.state_dict())
    x = torch.randn(shape, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    out, expected = module(x), twin(z)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, z.grad)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_depthwise_conv_other_padding_modes():
    module = DepthwiseConv2d(3, 3, padding_mode="reflect")
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(module(x), nn.Conv2d.forward(module, x))
    module.backend = "rust"
    with pytest.raises(ValueError, match="reflect"):
        module(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_functional_equals_reference(training, backend):
    torch.manual_seed(0)

    def state():
        torch.manual_seed(1)
        return functional.BatchNormState(
            torch.rand(3) + 0.5, torch.randn(3), torch.randn(3), torch.rand(3) + 0.5,
            num_batches_tracked=torch.tensor(4),
        )  # fmt: skip

    x, w, b = torch.randn(2, 3, 7, 8), torch.randn(3, 1, 5, 5), torch.randn(3)
    pw = torch.randn(3, 3, 1, 1)
    for name, args, norms in [
        ("xunit", (x, w, b), ("bn1", "bn2")),
        ("xunit_slim", (x, w, None), ("bn2",)),
        ("xunit_dense", (x, pw, b, w, b), ("bn1", "bn2")),
        ("xunit", (x, w), ()),
    ]:
        ours, theirs = ({n: state() for n in norms} for _ in range(2))
        out = getattr(functional, name)(*args, training=training, backend=backend, **ours)
        expected = getattr(reference, name)(*args, training=training, **theirs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for n in norms:
            for a, c in zip(ours[n], theirs[n], strict=True):
                torch.testing.assert_close(a, c)


X = torch.zeros(1, 3, 5, 5)
W = torch.zeros(3, 1, 3, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: xUnit(3, 4), ValueError, "odd, not 4"),
        (lambda b: xUnit(0), ValueError, "num_features.*0"),
        (lambda b: xUnit(3, gate="tanh"), ValueError, "tanh"),
        (lambda b: xUnit(3, backend="cuda"), ValueError, "cuda"),
        (lambda b: DepthwiseConv2d(3, 3, backend="cuda"), ValueError, "cuda"),
        (lambda b: DepthwiseConv2d(3, 3, stride=2), ValueError, "same"),
        (lambda b: xUnit(3, backend=b)(torch.zeros(3, 5, 5)), ValueError, r"\(3, 5, 5\)"),
        (lambda b: xUnitS(3, backend=b)(torch.zeros(1, 4, 5, 5)), ValueError, r"\(1, 4, 5, 5\)"),
        (lambda b: xUnitD(3, backend=b)(X.long()), TypeError, "int64"),
        (
            lambda b: xUnit(3, 3, True, backend=b)(torch.zeros(1, 3, 1, 1)),
            ValueError,
            r"more than 1 value per channel when training.*\[1, 3, 1, 1\]",
        ),
        (lambda b: functional.xunit(X, W, gate="x", backend=b), ValueError, "'x'"),
        (lambda b: functional.xunit(X, W, backend="x"), ValueError, "'x'"),
        (lambda b: functional.xunit(X[0], W, backend=b), ValueError, r"\(3, 5, 5\)"),
        (lambda b: functional.xunit(X, W[:2], backend=b), ValueError, "2 channels"),
        (lambda b: functional.xunit(X, W, X[0, 0, 0], backend=b), ValueError, r"bias.*\(5,\)"),
        (lambda b: functional.xunit(X, W[..., :2], backend=b), ValueError, "3×2"),
        (
            lambda b: functional.xunit(
                X, W, bn1=functional.BatchNormState(torch.ones(4)), backend=b
            ),
            ValueError,
            r"bn1.weight.*\(4,\)",
        ),
        (lambda b: functional.xunit_dense(X, W, None, W, backend=b), ValueError, "pw_weight"),
        (lambda b: functional.depthwise_conv2d(X.long(), W, backend=b), TypeError, "int64"),
        (lambda b: functional.depthwise_conv2d(X, W, stride=0, backend=b), ValueError, "stride.*0"),
        (lambda b: functional.depthwise_conv2d(X, W, padding=-1, backend=b), ValueError, "-1"),
        (lambda b: functional.depthwise_conv2d(X, W, padding="x", backend=b), ValueError, "'x'"),
        (lambda b: functional.depthwise_conv2d(X, W, dilation=9, backend=b), ValueError, "larger"),
        (
            lambda b: functional.depthwise_conv2d(X, W, None, 2, "same", backend=b),
            ValueError,
            "stride 1",
        ),
    ],
)
def test_errors_name_the_value(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(backend)


def test_arguments_that_are_no_integers_are_named():
    for unit in UNITS:
        for size in (7.0, (3, 3), "3"):
            with pytest.raises(
                TypeError, match=re.escape(f"kernel_size must be an integer, not {size!r}")
            ):
                unit(3, size)
        with pytest.raises(TypeError, match=r"num_features.*3\.5"):
            unit(3.5)
    for name in ("kernel_size", "stride", "padding", "dilation"):
        with pytest.raises(TypeError, match=rf"{name}.*1\.5"):
            DepthwiseConv2d(**({"channels": 2, "kernel_size": 3} | {name: 1.5}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_numpy_are_integers(backend):
    two = np.int64(2)
    assert xUnit(np.int64(3), np.int64(5)).features[2].kernel_size == (5, 5)
    conv = DepthwiseConv2d(two, np.int64(3), two, two, two, backend=backend)
    plain = nn.Conv2d(2, 2, 3, 2, 2, 2, groups=2)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(conv(x), plain(x))
    out = functional.depthwise_conv2d(x, conv.weight, None, two, (two, 1), two, backend=backend)
    assert out.shape == (1, 2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {}),
        (7, {}),
        ((3, 5), {"padding": (0, 4)}),
        (3, {"padding": 4}),
        (5, {"stride": 2, "padding": 2}),
        (3, {"dilation": 2}),
        (7, {"bias": False}),
    ],
)
def test_depthwise_conv_in_channels_last(dtype, kernel, options):
    torch.manual_seed(0)
    module = DepthwiseConv2d(19, kernel, backend="rust", dtype=dtype, **options)
    twin = DepthwiseConv2d(19, kernel, backend="torch", dtype=torch.float64, **options)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 19, 11, 12, dtype=dtype).to(memory_format=torch.channels_last)
    outputs = []
    for m in (module, twin):
        t = x.detach().to(m.weight.dtype).requires_grad_()
        out = m(t)
        assert out.is_contiguous(memory_format=torch.channels_last) or m is twin
        out.backward(torch.ones_like(out) * out.detach())
        outputs.append([out.detach(), t.grad, *(p.grad for p in m.parameters())])
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}[dtype]
    for got, want in zip(*outputs, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)
