"""torch.compile and torch.export: operators of torch.library, or the plain definition."""

from __future__ import annotations

import copy
import shutil

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from xunit_rs import functional, reference, replace_relu  # noqa: E402
from xunit_rs.functional import BatchNormState  # noqa: E402
from xunit_rs.modules import DepthwiseConv2d, xUnit, xUnitD, xUnitS  # noqa: E402

UNITS = [xUnit, xUnitS, xUnitD]
needs_inductor = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a compiler"
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def step(f, x):
    """What f gives and the gradient of x; those of parameters are left in them."""
    x = x.detach().requires_grad_()
    out = f(x)
    out.square().sum().backward()
    return out.detach(), x.grad


def same(module, twin):
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def plain_twin(module):
    twin = copy.deepcopy(module)
    for child in twin.modules():
        if hasattr(child, "backend"):
            child.backend = "torch"
    return twin


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_units_with_dynamic_shapes(unit, bn, training, compiler, kernels):
    module = unit(3, 3, bn, gate="gaussian").train(training)
    twin = plain_twin(module)
    compiled = torch.compile(module, backend=compiler, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 6, 7), (4, 3, 9, 5)):
        x = torch.randn(shape)
        for a, b in zip(step(compiled, x), step(twin, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    same(module, twin)
    assert kernels == ["xunit_forward", "xunit_backward"] * 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x))
    assert kernels[4:] == ["xunit_forward"]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"bias": False}])
def test_depthwise_convolution(options, kernels):
    module = DepthwiseConv2d(4, 3, backend="rust", **options)
    twin = plain_twin(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 4, 6, 7), (3, 4, 9, 12)):
        x = torch.randn(shape)
        for a, b in zip(step(compiled, x), step(twin, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    same(module, twin)
    assert kernels == ["depthwise_conv2d", "depthwise_conv2d_backward"] * 2


@needs_inductor
def test_inductor_trains_and_evaluates(kernels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), DepthwiseConv2d(4, 3), nn.ReLU())
    model = replace_relu(model, torch.zeros(1, 3, 8, 8), unit=lambda c: xUnit(c, 3, True))
    twin = plain_twin(model)
    compiled = torch.compile(model, fullgraph=True)
    for shape in ((2, 3, 8, 8), (3, 3, 10, 9)):
        x = torch.randn(shape)
        for a, b in zip(step(compiled, x), step(twin, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    same(model, twin)
    # Inductor may run a forward kernel again in a backward pass, to save memory.
    assert kernels.count("depthwise_conv2d_backward") == 2
    assert kernels.count("xunit_backward") == 2 * 2
    assert kernels.count("depthwise_conv2d") >= 2 and kernels.count("xunit_forward") >= 2 * 2
    kernels.clear()
    model.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    assert kernels == ["xunit_forward", "depthwise_conv2d", "xunit_forward"]


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum):
    module = xUnit(3, 3, True)
    for i in (0, 3):
        module.features[i].momentum = momentum
    twin = plain_twin(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6)
        compiled(x)
        twin(x)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert module.features[0].num_batches_tracked == 3


def test_one_frozen_norm_and_one_without_statistics(kernels):
    module = xUnitD(3, 3, True)
    module.features[1].eval()
    module.features[4] = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    twin = plain_twin(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    for a, b in zip(step(compiled, x), step(twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    same(module, twin)
    assert kernels == ["xunit_forward", "xunit_backward"]


def test_channels_last_is_kept(kernels):
    module = nn.Sequential(xUnit(8, 3, True), DepthwiseConv2d(8, 3))
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out, grad = step(compiled, x)
    assert len(kernels) == 4
    for t in (out, grad):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, kernels):
    module = xUnit(3, 3).to(dtype)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    out, grad = step(compiled, x)
    assert kernels == ["xunit_forward", "xunit_backward"]
    assert out.dtype is grad.dtype is dtype
    torch.testing.assert_close(out, module(x))


def test_autocast(kernels):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), xUnit(4, 3, True), DepthwiseConv2d(4, 3))
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x), twin(x)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.sum().backward()
    assert kernels.count("xunit_backward") == 1


def test_only_what_is_asked_for(kernels):
    module = xUnit(3, 3, True).requires_grad_(False)
    module.features[2].bias.requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 3, 6, 6)).square().sum().backward()
    twin = plain_twin(module)
    twin.zero_grad()
    assert kernels == ["xunit_forward", "xunit_backward"]
    assert [p.grad is not None for p in module.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.features[2].register_forward_hook(lambda m, a, out: out * 2),
        lambda m: nn.utils.parametrizations.weight_norm(m.features[2]),
        lambda m: m.features.__setitem__(4, nn.Tanh()),
    ],
)
def test_a_changed_child_compiles_as_the_definition(change, kernels):
    module = xUnit(3, 3)
    change(module)
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x * module.features(x))
    assert not kernels


def test_transforms_inside_compiled_code():
    """An operator alone has no forward-mode derivative, and jvp would be silently zero."""
    module = xUnit(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    v = torch.randn_like(x)

    def plain(t):
        return t * module.features(t)

    def run(f):
        return (
            torch.func.jvp(f, (x,), (v,))[1],
            torch.func.grad(lambda t: f(t).square().sum())(x),
            torch.vmap(lambda t: f(t))(
                x[None]
            ),  # a module's repr, which vmap asks for, cannot be traced
        )

    def compiled(f):
        return torch.compile(lambda: run(f), backend="aot_eager", fullgraph=True)()

    expected = run(plain)
    assert all(t.abs().max() > 0 for t in expected)
    for f in (module, lambda t: functional.depthwise_conv2d(t, module.features[2].weight)):
        reference_of = run(
            plain
            if f is module
            else lambda t: reference.depthwise_conv2d(t, module.features[2].weight)
        )
        for a, b in zip(compiled(f), reference_of, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_around_compiled_code():
    module = xUnit(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    v = torch.randn_like(x)
    compiled = torch.compile(module, backend="aot_eager")
    _, expected = torch.func.jvp(lambda t: t * module.features(t), (x,), (v,))
    compiled(x)
    _, tangent = torch.func.jvp(compiled, (x,), (v,))
    torch.testing.assert_close(tangent, expected)


def test_second_derivative_through_the_operators(kernels):
    """aot_autograd has none, a compiler that keeps autograd's graph has."""
    module = xUnit(2, 3, True, dtype=torch.float64)
    conv = DepthwiseConv2d(2, 3, dtype=torch.float64)
    weights = [module.features[2].weight, conv.weight]

    def penalty(f):
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.manual_seed(1))
        x.requires_grad_()
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad((g.flatten(1).norm(dim=1) - 1).square().mean(), [x, *weights])

    compiled = torch.compile(lambda t: conv(module(t)), backend="eager", fullgraph=True)
    ours = penalty(compiled)
    # The first derivative is replayed in plain operations; the second passes through the operators
    # once more, to what they were given.
    backward = ["depthwise_conv2d_backward", "xunit_backward"]
    assert kernels == ["xunit_forward", "depthwise_conv2d", *backward]
    twin = [plain_twin(m) for m in (module, conv)]
    weights = [twin[0].features[2].weight, twin[1].weight]
    for a, b in zip(ours, penalty(lambda t: twin[1](twin[0](t))), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- the operators


def conv_arguments(dtype=torch.float32, grad=True, out=None):
    x, w, b = torch.randn(2, 3, 7, 6), torch.randn(3, 1, 3, 3), torch.randn(3)
    tensors = [t.to(dtype).requires_grad_(grad) for t in (x, w, b)]
    return *tensors, [2, 1], [1, 1, 0, 2], [1, 2], out or dtype


def unit_arguments(variant, batch, dtype=torch.float32, grad=True, layout=torch.contiguous_format):
    def leaf(*shape):
        return torch.rand(shape, dtype=dtype).add_(0.5)

    x = (leaf(2, 3, 6, 5) - 1).contiguous(memory_format=layout)
    dense = (leaf(3, 3, 1, 1), leaf(3)) if variant == "dense" else (None, None)
    norms = [variant != "slim", True]
    affine = [leaf(3) if norms[i // 2] else None for i in range(4)]
    inputs = [x, *dense, leaf(3, 1, 3, 3), leaf(3), *affine]
    inputs = [t if t is None else t.requires_grad_(grad) for t in inputs]
    given = [leaf(3) if norms[i] and not batch else None for i in (0, 0, 1, 1)]
    return *inputs, *given, variant, "sigmoid", norms, [n and batch for n in norms], [1e-5, 1e-5]


def test_every_operator_has_an_opcheck():
    names = torch._C._dispatch_get_all_op_names()
    assert {name for name in names if name.startswith("xunit_rs::")} == {
        "xunit_rs::depthwise_conv2d",
        "xunit_rs::depthwise_conv2d_backward",
        "xunit_rs::unit",
        "xunit_rs::unit_backward",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_convolution(dtype):
    arguments = conv_arguments(dtype)
    torch.library.opcheck(torch.ops.xunit_rs.depthwise_conv2d.default, arguments)
    arguments = conv_arguments(dtype, grad=False)
    grad = torch.randn_like(torch.ops.xunit_rs.depthwise_conv2d(*arguments))
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.xunit_rs.depthwise_conv2d_backward.default, (grad, *arguments, needs)
        )


@pytest.mark.parametrize("variant", ["xunit", "slim", "dense"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_the_units(variant, batch, layout):
    unit = torch.ops.xunit_rs.unit
    for save in (False, True):
        arguments = unit_arguments(variant, batch, grad=save, layout=layout)
        torch.library.opcheck(unit.default, (*arguments, save))
    arguments = unit_arguments(variant, batch, grad=False, layout=layout)
    out, d, p, *found = unit(*arguments, True)
    given = found if batch else arguments[9:13]
    if variant == "slim":
        given = [None, None, *given[2:]]
    needs = [t is not None for t in arguments[:9]]
    backward = torch.ops.xunit_rs.unit_backward.default
    for asked in (needs, [False, *needs[1:]]):
        torch.library.opcheck(
            backward,
            (torch.randn_like(out), *arguments[:9], d, p, *given, *arguments[13:], asked),
        )


@pytest.mark.parametrize("variant", ["xunit", "slim", "dense"])
@pytest.mark.parametrize("batch", [False, True])
def test_gradients_of_the_operators(variant, batch):
    arguments = unit_arguments(variant, batch, torch.float64)
    asked = [i for i, t in enumerate(arguments[:9]) if t is not None]

    def run(*tensors):
        given = list(arguments)
        for i, t in zip(asked, tensors, strict=True):
            given[i] = t
        return torch.ops.xunit_rs.unit(*given, True)[0]

    tensors = [arguments[i] for i in asked]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, atol=1e-4)
    conv = conv_arguments(torch.float64)
    run = torch.ops.xunit_rs.depthwise_conv2d
    assert torch.autograd.gradcheck(lambda *t: run(*t, *conv[3:]), conv[:3])
    assert torch.autograd.gradgradcheck(lambda *t: run(*t, *conv[3:]), conv[:3])


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_plain_operations(unit, strict):
    module = nn.Sequential(unit(3, 3, True), DepthwiseConv2d(3, 3)).eval()
    batch, height = torch.export.Dim("n", min=2, max=16), torch.export.Dim("h", min=4, max=64)
    program = torch.export.export(
        module,
        (torch.randn(2, 3, 6, 6),),
        dynamic_shapes=({0: batch, 2: height},),
        strict=strict,
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("xunit_rs" in target for target in targets)
    x = torch.randn(3, 3, 9, 6)
    torch.testing.assert_close(program.module()(x), module(x))
    module[0].backend = "rust"
    with pytest.raises(Exception, match=r"torch\.export"):
        torch.export.export(module, (x,), strict=strict)


@pytest.mark.parametrize("unit", UNITS)
def test_onnx_agrees(unit, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = nn.Sequential(unit(3, 3, True, gate="gaussian"), DepthwiseConv2d(3, 5)).eval()
    path = tmp_path / "unit.onnx"
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        module,
        (torch.randn(2, 3, 8, 9),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=(dynamic,),
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 8, 9), (1, 3, 12, 5), (4, 3, 7, 7)):
        x = torch.randn(shape)
        (out,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), module(x), rtol=1e-5, atol=1e-5)


def test_functional_with_norms_compiles(kernels):
    bn = BatchNormState(torch.rand(3) + 0.5, torch.rand(3), torch.zeros(3), torch.ones(3))
    twin = BatchNormState(*(t.clone() if isinstance(t, torch.Tensor) else t for t in bn))
    x, w = torch.randn(2, 3, 6, 6), torch.randn(3, 1, 3, 3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return functional.xunit_slim(x, w, bn2=bn, training=True)

    torch.testing.assert_close(run(x), reference.xunit_slim(x, w, bn2=twin, training=True))
    torch.testing.assert_close(bn.running_mean, twin.running_mean)
    torch.testing.assert_close(bn.running_var, twin.running_var)
    assert kernels == ["xunit_forward"]
