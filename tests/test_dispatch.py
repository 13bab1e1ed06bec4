"""Which path runs: Rust for plain CPU tensors, the plain definition for everything else."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from xunit_rs import _autograd, functional  # noqa: E402
from xunit_rs.modules import DepthwiseConv2d, xUnit, xUnitD, xUnitS  # noqa: E402

UNITS = [xUnit, xUnitS, xUnitD]


class Calls:
    """Counts calls of the kernels: of all that computes."""

    def __init__(self, core):
        self.core = core
        self.count = 0

    def __getattr__(self, name):
        function = getattr(self.core, name)
        if name == "is_plain":
            return function

        def counted(*args):
            self.count += 1
            return function(*args)

        return counted


@pytest.fixture
def calls(monkeypatch):
    counter = Calls(_autograd._core)
    monkeypatch.setattr(_autograd, "_core", counter)
    return counter


def plain(module, x):
    return x * module.features(x)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bn", [False, True])
def test_rust_runs_forward_and_backward(unit, bn, calls):
    module = unit(3, 3, bn)
    out = module(torch.randn(2, 3, 6, 6))
    assert calls.count == 1
    out.sum().backward()
    assert calls.count == 2


@pytest.mark.parametrize(
    ("options", "width", "evaluates", "trains"),
    [
        ({"kernel_size": 5, "stride": 2, "padding": 2}, 48, True, True),
        ({"kernel_size": 9, "padding": 4}, 48, True, True),
        # As fast as memory, which is all that torch's take, too, unless results go past the caches.
        ({"kernel_size": 3, "padding": 1}, 48, False, True),
        ({"kernel_size": (2, 3), "padding": 1}, 48, False, True),
        ({"kernel_size": 3, "padding": 1}, 1500, True, True),
        ({"kernel_size": 3, "padding": 1}, 7, False, True),
        ({"kernel_size": 5, "padding": 2}, 7, True, True),
        # Kernels that do not read pixels as they lie.
        ({"kernel_size": 3, "padding": 1, "dilation": 2}, 48, False, True),
        ({"kernel_size": 3, "padding": 3}, 48, False, False),
        ({"kernel_size": 4, "padding": 1}, 48, False, False),
        ({"kernel_size": 7, "stride": (1, 2), "padding": 3}, 48, False, True),
        ({"kernel_size": 8, "padding": 3}, 48, True, True),
    ],
)
def test_auto_takes_the_faster_one_in_channels_last(options, width, evaluates, trains, calls):
    x = torch.randn(1, 32, 48 if width > 7 else 320, width)
    x = x.contiguous(memory_format=torch.channels_last)
    module = DepthwiseConv2d(32, **options).to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = module(x)
    assert (calls.count > 0) is evaluates
    before = calls.count
    module(x)
    assert (calls.count > before) is trains
    twin = module.double()(x.double())
    torch.testing.assert_close(out.double(), twin.detach(), rtol=1e-4, atol=1e-5)


def test_torch_backend_never_calls_rust(calls):
    x = torch.randn(2, 3, 6, 6)
    xUnit(3, 3, backend="torch")(x).sum().backward()
    DepthwiseConv2d(3, 3, backend="torch")(x).sum().backward()
    assert calls.count == 0


def hook_forward(module):
    module.features[2].register_forward_hook(lambda m, a, out: out * 2)


def hook_pre(module):
    module.features[2].register_forward_pre_hook(lambda m, a: (a[0] * 2,))


def hook_backward(module):
    module.features[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2,))


def hook_sequential(module):
    module.features.register_forward_hook(lambda m, a, out: out * 2)


def weight_norm(module):
    parametrizations.weight_norm(module.features[2])


def spectral_norm(module):
    nn.utils.spectral_norm(module.features[2])


def pruned(module):
    prune.l1_unstructured(module.features[2], "weight", 0.5)


def other_norm(module):
    module.features[0] = nn.InstanceNorm2d(3)


def other_gate(module):
    module.features[4] = nn.Tanh()


def other_relu(module):
    module.features[1] = nn.LeakyReLU()


def relu_in_place(module):
    module.features[0] = nn.Identity()
    module.features[1].inplace = True


def dilated(module):
    module.features[2] = nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3)


def reflecting(module):
    module.features[2].padding_mode = "reflect"
    module.features[2]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def not_depthwise(module):
    module.features[2] = nn.Conv2d(3, 3, 3, padding=1)


def longer(module):
    module.features.append(nn.Dropout(0.0))


def monkeypatched(module):
    module.features[2].forward = lambda x: x * 3


@pytest.mark.parametrize(
    "change",
    [
        hook_forward,
        hook_pre,
        hook_backward,
        hook_sequential,
        weight_norm,
        spectral_norm,
        pruned,
        other_norm,
        other_gate,
        other_relu,
        relu_in_place,
        dilated,
        reflecting,
        not_depthwise,
        longer,
        monkeypatched,
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_child_runs_the_definition(change, training):
    def changed():  # twice, as a pruned module cannot be copied
        torch.manual_seed(0)
        module = xUnit(3, 3, True)
        change(module)
        return module.train(training)

    module, twin = changed(), changed()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(module(x), plain(twin, x), rtol=0, atol=0)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    module.backend = "rust"
    with pytest.raises(ValueError, match=r"backend='rust' cannot run: \w+"):
        module(x)


def test_backward_hook_fires():
    module = xUnit(3, 3)
    seen = []
    module.features[2].register_full_backward_hook(lambda m, i, o: seen.append(m))
    module(torch.randn(1, 3, 5, 5)).sum().backward()
    assert len(seen) == 1


def test_global_module_hook_sees_the_children():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: seen.append(type(m).__name__)
    )
    try:
        xUnit(3, 3)(torch.randn(1, 3, 5, 5))
    finally:
        handle.remove()
    assert seen == ["Identity", "ReLU", "Conv2d", "Identity", "Sigmoid", "Sequential", "xUnit"]


def test_hook_on_the_unit_itself_is_ordinary():
    module = xUnit(3, 3)
    module.register_forward_hook(lambda m, a, out: out * 0)
    assert module(torch.randn(1, 3, 5, 5)).abs().max() == 0


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(unit, compiler):
    module = unit(3, 3, True).eval()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, plain(module, x))
    (a,) = torch.autograd.grad(out.sum(), x)
    (b,) = torch.autograd.grad(plain(module, x).sum(), x)
    torch.testing.assert_close(a, b)


def test_compile_depthwise_and_functional():
    module = DepthwiseConv2d(3, 3)
    x = torch.randn(2, 3, 6, 6)

    def both(x):
        return functional.xunit(module(x), module.weight)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), both(x))


@pytest.mark.parametrize("unit", UNITS)
def test_export_and_fx_and_trace(unit):
    module = unit(3, 3, True).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = module(x)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), expected)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [xUnit(3, 3), xUnitD(3, 3, True), DepthwiseConv2d(3, 3)])
def test_script(module):
    x = torch.randn(2, 3, 6, 6)
    module.eval()
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


def test_functorch():
    module = xUnit(2, 3, dtype=torch.float64)
    x = torch.randn(4, 1, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(module)(x), torch.stack([plain(module, t) for t in x]))

    x, v = x[0], torch.randn_like(x[0])
    _, ours = torch.func.jvp(module, (x,), (v,))
    _, theirs = torch.func.jvp(lambda t: plain(module, t), (x,), (v,))
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).sum()

    parameters = dict(module.named_parameters())
    gradients = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(plain(module, x).sum(), list(parameters.values()))
    for a, b in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_call_uses_the_given_weights():
    module = xUnit(2, 3)
    x = torch.randn(1, 2, 5, 5)
    other = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict(other)
    torch.testing.assert_close(torch.func.functional_call(module, other, (x,)), plain(twin, x))


def test_forward_mode():
    import torch.autograd.forward_ad as fwd

    module = xUnit(2, 3)
    x, v = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 5)
    with fwd.dual_level():
        tangent = fwd.unpack_dual(module(fwd.make_dual(x, v))).tangent
        expected = fwd.unpack_dual(plain(module, fwd.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, expected)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert xUnit(3, 3, device="meta")(torch.empty(2, 3, 6, 6, device="meta")).is_meta
    with FakeTensorMode():
        fake = torch.empty(2, 3, 6, 6)
        assert xUnit(3, 3)(fake).shape == fake.shape


def test_subclass_and_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sub(torch.Tensor):
        pass

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    module = xUnit(3, 3)
    x = torch.randn(2, 3, 6, 6)
    assert type(module(x.as_subclass(Sub))) is Sub
    with Log():
        module(x)
    assert any("convolution" in str(f) for f in seen)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_does_not_turn_rust_off(calls, unit, device):
    # With batch norm and gradients, so that all that a step allocates has to follow x.
    module = unit(3, 3, True)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    upstream = torch.randn_like(x)
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x), inputs, upstream)
    assert calls.count == 2
    with torch.device(device):
        found = torch.autograd.grad(module(x), inputs, upstream)
    assert calls.count == 4
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("unit", UNITS)
def test_cuda_runs_the_definition(unit):
    module = unit(3, 3, True).cuda()
    twin = copy.deepcopy(module)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    torch.testing.assert_close(module(x), plain(twin, x))
    module.backend = "rust"
    with pytest.raises(ValueError, match="cuda"):
        module(x)


def test_rust_backend_says_why_not():
    x = torch.randn(2, 3, 6, 6)
    module = xUnit(3, 3, backend="rust")
    with pytest.raises(RuntimeError, match="cannot run"):
        module(torch.empty(2, 3, 6, 6, device="meta"))
    with pytest.raises(_autograd.BackendError, match="func"):
        torch.vmap(module)(x[None])
    with pytest.raises(ValueError, match="float64"):
        module(x.double())
    with pytest.raises(ValueError, match="Proxy"):
        torch.fx.symbolic_trace(module)
    with pytest.raises(ValueError, match="meta"):
        functional.depthwise_conv2d(
            x.to("meta"), torch.empty(3, 1, 3, 3, device="meta"), backend="rust"
        )


def test_mixed_dtypes_fail_as_torch_does():
    with pytest.raises(RuntimeError, match="type"):
        xUnit(3, 3)(torch.randn(2, 3, 6, 6).double())


def test_half_input_with_float32_norms():
    """Mixed precision by hand: half convolutions, float32 BatchNorm."""
    module = xUnit(3, 3, True).eval()
    module.features[2].bfloat16()
    x = torch.randn(2, 3, 6, 6).bfloat16()
    torch.testing.assert_close(module(x), plain(module, x), rtol=0.05, atol=0.05)


def test_copies_and_pickles():
    module = xUnitD(3, 3, True, gate="gaussian", backend="torch")
    x = torch.randn(2, 3, 6, 6)
    module.eval()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert "backend='torch'" in repr(other)


def test_nan_check_of_anomaly_mode_works():
    with torch.autograd.detect_anomaly(check_nan=True):
        xUnit(3, 3, True)(torch.randn(2, 3, 6, 6)).sum().backward()


# Older torch hands over numpy arrays and evaluates by xunit_forward, which other tests cover.
@pytest.mark.skipif(not _autograd._TAKES_TENSORS, reason="one call needs torch 2.10's tensors")
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_is_one_call_of_the_kernels(unit, bn, dtype, kernels):
    torch.manual_seed(0)
    module = unit(3, 5, bn, gate="gaussian", backend="rust", dtype=dtype).eval()
    x = torch.randn(2, 3, 7, 6, dtype=dtype)
    want = plain(module, x).detach()
    with torch.no_grad():
        torch.testing.assert_close(module(x), want)
        assert kernels == ["xunit_evaluate"]
        with torch.inference_mode():
            assert torch.equal(module(x), module(x.clone()))
        del kernels[:]
        # Whatever is not plain takes the longer way, to the same result.
        aside = torch.randn(2, 3, 6, 7, dtype=dtype).transpose(2, 3)
        torch.testing.assert_close(module(aside), plain(module, aside))
        assert kernels == ["xunit_forward"]
        weight = module.features[-3].weight
        weight.data = weight.data.mT
        torch.testing.assert_close(module(x), plain(module, x))
        assert kernels[1:] == ["xunit_evaluate", "xunit_forward"]
        weight.data = weight.data.contiguous()
        if bn:  # of whose statistics there are none
            module.features[-2].running_mean = module.features[-2].running_var = None
            torch.testing.assert_close(module(x), plain(module, x))
            assert kernels[3:] == ["xunit_evaluate", "xunit_forward"]


@torch.no_grad()
def test_evaluation_of_tensors_that_are_not_strided(calls):
    auto, rust = (xUnit(4, 3, backend=backend).eval() for backend in ("auto", "rust"))
    x = torch.randn(2, 4, 6, 6)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(RuntimeError, match="not strided"):
            rust(x.to_mkldnn())
        torch.testing.assert_close(auto(x.to_mkldnn()).to_dense(), plain(auto, x))
    with pytest.raises(RuntimeError, match="not strided"):
        rust(x.to_sparse())
    assert calls.count == 0


def test_threads_are_torchs(monkeypatch):
    seen = []

    class Core:
        def __getattr__(self, name):
            def run(*args):
                seen.append(args[-1])
                return getattr(core, name)(*args)

            return core.is_plain if name == "is_plain" else run

    core = _autograd._core
    monkeypatch.setattr(_autograd, "_core", Core())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        xUnit(3, 3)(torch.randn(2, 3, 6, 6)).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
