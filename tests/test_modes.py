"""The modes of PyTorch, each on the modules and on the functions: which path runs, same numbers."""

from __future__ import annotations

import ast
import copy
import io
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwd  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from xunit_rs import _autograd, functional, replace_relu  # noqa: E402
from xunit_rs.modules import DepthwiseConv2d, xUnit, xUnitD, xUnitS  # noqa: E402

ROOT = Path(__file__).parents[1]


class Function(nn.Module):
    """A function of `functional` with parameters to call it with."""

    def __init__(self, name, backend="auto", dtype=None):
        super().__init__()
        self.name, self.backend = name, backend
        shapes = [(3, 1, 3, 3), (3,)]
        if name == "xunit_dense":
            shapes = [(3, 3, 1, 1), (3,), *shapes]
        self.operands = nn.ParameterList([torch.randn(s, dtype=dtype) for s in shapes])

    def forward(self, x):
        options = {"padding": "same"} if self.name == "depthwise_conv2d" else {}
        run = getattr(functional, self.name)
        return run(x, *self.operands, backend=self.backend, **options)


MODULES = {
    "xUnit": lambda **k: xUnit(3, 3, True, **k),
    "xUnitS": lambda **k: xUnitS(3, 3, True, gate="gaussian", **k),
    "xUnitD": lambda **k: xUnitD(3, 3, True, **k),
    "DepthwiseConv2d": lambda **k: DepthwiseConv2d(3, 3, **k),
}
FUNCTIONS = {
    f"functional.{name}": lambda name=name, **k: Function(name, **k)
    for name in ("xunit", "xunit_slim", "xunit_dense", "depthwise_conv2d")
}
SUBJECTS = MODULES | FUNCTIONS
every_module = pytest.mark.parametrize("subject", MODULES)
everything = pytest.mark.parametrize("subject", SUBJECTS)


def pair(subject, dtype=None):
    """The same module twice: ours, and its plain definition."""
    torch.manual_seed(0)
    ours = SUBJECTS[subject](dtype=dtype)
    plain = copy.deepcopy(ours)
    plain.backend = "torch"
    return ours, plain


def image(*shape, dtype=None):
    shape = shape or (2, 3, 6, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(module, x, loss=lambda out: out.square().mean()):
    module.zero_grad()
    x = x.detach().requires_grad_()
    loss(module(x)).backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


# ---------------------------------------------------------------- derivatives


@everything
def test_training_step_and_inference_mode(subject, kernels):
    ours, plain = pair(subject)
    close(gradients(ours, image()), gradients(plain, image()))
    assert len(kernels) == 2
    with torch.inference_mode():
        out = ours.eval()(image())
    assert out.is_inference() and len(kernels) == 3
    close([out], [plain.eval()(image())])
    with torch.inference_mode():
        x = image()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        ours(x).sum().backward()


@everything
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(subject, reentrant, kernels):
    ours, plain = pair(subject)

    def run(module):
        return lambda x: checkpoint(module, x, use_reentrant=reentrant)

    found = []
    for module in (ours, plain):
        x = image().requires_grad_()
        run(module)(x).square().mean().backward()
        found.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    close(*found)
    assert len(kernels) == 3


@everything
def test_func(subject, kernels):
    from torch.func import functional_call, grad, jvp, stack_module_state, vmap

    ours, plain = pair(subject, torch.float64)
    ours.eval(), plain.eval()
    x, v = image(dtype=torch.float64), torch.randn(2, 3, 6, 7, dtype=torch.float64)

    def both(f):
        close(*([f(m)] if isinstance(f(m), torch.Tensor) else f(m) for m in (ours, plain)))

    both(lambda m: vmap(m)(x[:, None]))
    both(lambda m: jvp(m, (x,), (v,)))
    parameters = {n: torch.randn_like(p) for n, p in ours.named_parameters()}
    both(lambda m: functional_call(m, parameters, (x,)))

    def loss(module):
        return lambda p, x: functional_call(module, p, (x,)).square().sum()

    both(lambda m: list(grad(loss(m))(parameters, x).values()))
    # Gradients per sample, and an ensemble.
    both(lambda m: list(vmap(grad(loss(m)), (None, 0))(parameters, x[:, None]).values()))
    stacked, buffers = stack_module_state([ours, copy.deepcopy(ours)])
    both(lambda m: vmap(lambda p, b: functional_call(m, (p, b), (x,)))(stacked, buffers))
    # functional_call alone is an ordinary call; the transforms are torch's.
    assert len(kernels) == 2


@everything
def test_forward_mode(subject, kernels):
    ours, plain = pair(subject)
    found = []
    for module in (ours, plain):
        with fwd.dual_level():
            found.append(fwd.unpack_dual(module(fwd.make_dual(image(), image() + 1))))
    assert found[1].tangent.abs().max() > 0
    close(*found)
    assert not kernels


@everything
def test_gradient_penalty(subject, kernels):
    """The critic's loss of WGAN-GP: its gradient holds second derivatives."""

    def loss(critic, real, fake):
        mixed = (0.3 * real + 0.7 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    found = []
    for module in pair(subject, torch.float64):
        critic = nn.Sequential(nn.Conv2d(3, 3, 1), module, nn.Conv2d(3, 1, 3)).double()
        torch.manual_seed(2)
        for p in critic[::2].parameters():
            nn.init.normal_(p)
        real = image(dtype=torch.float64)
        loss(critic, real, real.flip(0) + 1).backward()
        found.append([p.grad for p in critic.parameters()])
    close(*found)
    assert kernels


@everything
def test_autocast(subject, kernels):
    ours, plain = pair(subject)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(image()), plain(image())
    assert out.dtype is expected.dtype
    close([out], [expected], rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())
    assert len(kernels) == 2


@everything
def test_anomaly_mode_finds_our_backward(subject, kernels):
    ours, _ = pair(subject)
    x = image().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        ours(x).sum().backward()
        out = ours(x)
        with (
            pytest.warns(UserWarning, match="Error detected in _"),
            pytest.raises(RuntimeError, match=r"(_XUnit|_DepthwiseConv2d)Backward.*nan"),
        ):
            out.backward(torch.full_like(out, torch.nan))
    assert kernels


@everything
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(subject, dtype, layout, kernels):
    ours, plain = pair(subject, dtype)
    x = image(dtype=dtype).contiguous(memory_format=layout)
    out = ours(x)
    assert out.dtype is dtype and out.is_contiguous(memory_format=layout)
    found = gradients(ours, x)
    assert {g.dtype for g in found} == {dtype} and len(kernels) == 3
    exact = {"rtol": 1e-9, "atol": 1e-9}
    tolerance = exact if dtype is torch.float64 else {"rtol": 0.05, "atol": 0.05}
    close([out.double()], [plain.double()(x.double())], **tolerance)
    close([g.double() for g in found], gradients(plain, x.double()), **tolerance)


# ---------------------------------------------------------------- graphs


@everything
def test_compiled_training_with_dynamic_shapes(subject, kernels):
    torch._dynamo.reset()
    ours, plain = pair(subject)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 6, 7), (4, 3, 9, 5)):
        close(gradients(compiled, image(*shape)), gradients(plain, image(*shape)))
    assert len(kernels) == 4
    with torch.no_grad():
        close([compiled.eval()(image())], [plain.eval()(image())])
    assert len(kernels) == 5


@everything
def test_exported_and_traced(subject, kernels):
    ours, plain = pair(subject)
    ours.eval(), plain.eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    graphs = [
        torch.export.export(ours, (image(),), dynamic_shapes=(dynamic,)).module(),
        torch.jit.trace(ours, image()),
    ]
    if subject in MODULES:  # torch.fx cannot trace what the functions check
        graphs.append(torch.fx.symbolic_trace(ours))
    kernels.clear()  # torch.jit.trace checks what it gives
    for x in (image(), image(4, 3, 9, 5)):
        for graph in graphs:
            close([graph(x)], [plain(x)])
    assert not kernels


def test_onnx_of_the_functions(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for make in FUNCTIONS.values())).eval()
    torch.onnx.export(
        model,
        (image(),),
        tmp_path / "functions.onnx",
        dynamo=True,
        opset_version=18,
        dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),),
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(
        tmp_path / "functions.onnx", providers=["CPUExecutionProvider"]
    )
    for x in (image(), image(1, 3, 12, 5), image(4, 3, 7, 9)):
        (out,) = session.run(None, {"x": x.numpy()})
        close([torch.from_numpy(out)], [model(x)], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
@every_module
def test_reparametrized_convolutions_train(subject, change, kernels):
    """In a unit the plain definition runs; DepthwiseConv2d only reads the weight it is given."""
    found = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        module = MODULES[subject](backend=backend)
        # In every unit the depthwise convolution is the last but two.
        conv = module if isinstance(module, DepthwiseConv2d) else module.features[-3]
        change(conv)
        found.append(gradients(module, image()))
    close(*found)
    assert all(g is not None and g.abs().max() > 0 for g in found[0])
    assert len(kernels) == (2 if subject == "DepthwiseConv2d" else 0)


@every_module
def test_hooks_on_children_are_heard(subject, kernels):
    ours, plain = pair(subject)
    if subject == "DepthwiseConv2d":
        ours, plain = nn.Sequential(ours), nn.Sequential(plain)
    heard = []
    for module in (ours, plain):
        for child in module.modules():
            if not list(child.children()):
                child.register_forward_hook(lambda m, a, out: heard.append("forward") or out * 1.5)
                child.register_full_backward_hook(lambda *_: heard.append("backward"))
    close(gradients(ours, image()), gradients(plain, image()))
    assert heard[: len(heard) // 2] == heard[len(heard) // 2 :] and "backward" in heard
    # A hook on DepthwiseConv2d itself is run around it.
    assert len(kernels) == (2 if subject == "DepthwiseConv2d" else 0)


def test_sync_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(xUnit(3, 3, True), xUnitS(3, 3, True))
    model[0].features[0].running_mean.uniform_()
    expected = copy.deepcopy(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for training in (True, False):
        close([model.train(training)(image())], [expected.train(training)(image())])
    close(model.buffers(), expected.buffers())
    model[0].backend = "rust"
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        model(image())


@everything
def test_requires_grad_on_some(subject):
    ours, plain = pair(subject)
    for module in (ours, plain):
        for p in list(module.parameters())[::2]:
            p.requires_grad_(False)
    found, expected = gradients(ours, image()), gradients(plain, image())
    assert [g is None for g in found] == [g is None for g in expected]
    close([g for g in found if g is not None], [g for g in expected if g is not None])


@everything
def test_meta_and_materialized(subject, kernels):
    ours, plain = pair(subject)
    state = ours.state_dict()
    empty = copy.deepcopy(ours).to("meta")
    assert empty(image().to("meta")).is_meta and not kernels
    for module in (
        copy.deepcopy(empty).to_empty(device="cpu"),
        copy.deepcopy(empty),
    ):
        on_meta = next(module.parameters()).is_meta
        # Assigned on the meta device, as there is no memory to copy into.
        module.load_state_dict({k: v.clone() for k, v in state.items()}, assign=on_meta)
        close(gradients(module, image()), gradients(plain, image()))
        plain.load_state_dict(state)
    assert len(kernels) == 4


def test_built_under_a_device_context():
    with torch.device("meta"):
        model = nn.Sequential(xUnit(3), nn.Conv2d(3, 3, 1), DepthwiseConv2d(3, 3))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    out = model(image())
    assert out.shape == (2, 3, 6, 7) and out.isfinite().all()


def test_lazy_models_are_converted_and_materialized():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU(), nn.LazyConv2d(2, 1))
    new = replace_relu(model, image())
    assert nn.parameter.is_lazy(new[0].weight) and type(new[1]) is xUnit
    new(image()).sum().backward()
    assert new[0].weight.grad is not None


@every_module
def test_saved_with_weights_only(subject):
    ours, _ = pair(subject)
    gradients(ours, image())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = MODULES[subject]()
    again.load_state_dict(torch.load(file, weights_only=True))
    close([again.eval()(image())], [ours.eval()(image())])
    # A whole module is code: loaded if its classes are allowed.
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(file, weights_only=True)
    file.seek(0)
    close([torch.load(file, weights_only=False)(image())], [ours(image())])


# ---------------------------------------------------------------- devices


@everything
def test_other_devices_run_the_plain_path(subject, kernels):
    """Of CUDA tensors that exist in name only: no machine with a GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        module = SUBJECTS[subject]()
        x = torch.randn(2, 3, 6, 7)
        out = module(x)
        assert out.device == x.device == torch.device("cuda:0") and out.shape == x.shape
        module.backend = "rust"
        with pytest.raises(ValueError, match="cannot run"):
            module(x)
    assert not kernels


@pytest.mark.parametrize("device", ["cuda:0", "mps", "xpu", "privateuseone:1"])
def test_the_dispatcher_asks_for_the_device(device, monkeypatch):
    """Of any operand; the check reads nothing but attributes, so a look-alike will do."""

    class Elsewhere:
        def __init__(self):
            self.device = torch.device(device)

    monkeypatch.setattr(_autograd, "Tensor", Elsewhere)
    assert _autograd._not_ours(Elsewhere()) == f"a tensor is on {torch.device(device)}"


# ---------------------------------------------------------------- threads and processes


@everything
def test_inference_in_eight_threads(subject, kernels):
    ours, plain = pair(subject)
    ours.eval(), plain.eval()
    inputs = [image(2, 3, 16 + i, 20) for i in range(8)]
    expected = [plain(x) for x in inputs]
    meet = threading.Barrier(8, timeout=60)
    found: list = [None] * 8

    def work(i):
        with torch.inference_mode():
            for _ in range(5):
                meet.wait()
                found[i] = ours(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(found, expected)
    assert len(kernels) == 40


# Both processes run this; it ends with an assertion of what each has seen.
PROCESSES = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from xunit_rs import DepthwiseConv2d, accelerate, replace_relu, xUnit, xUnitD, xUnitS

kind, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()
    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))))

torch.manual_seed(0)
bn = kind == "norm"
unit = lambda c: xUnit(c, 3, bn, backend="rust")
net = nn.Sequential(
    nn.Conv2d(3, 4, 1), xUnitS(4, 3, bn, backend="rust"), xUnitD(4, 3, bn, backend="rust"),
    replace_relu(Reused(), torch.zeros(1, 4, 6, 6), unit=unit),
    DepthwiseConv2d(4, 3, backend="rust"), nn.Conv2d(4, 2, 1),
)
single = copy.deepcopy(net)
x = torch.randn(4, 3, 6, 6)
half = x[2 * rank : 2 * rank + 2]
if kind == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for i in (1, 2, 3, 4):
        fully_shard(net[i], mesh=mesh)
    wrapped = fully_shard(net, mesh=mesh)
else:
    wrapped = DistributedDataParallel(net)
    for convert in (accelerate, lambda m: replace_relu(m, x)):
        try:
            convert(wrapped)
        except TypeError as error:
            assert "before it is wrapped in DistributedDataParallel" in str(error)
        else:
            raise AssertionError("converted what is wrapped already")
wrapped(half).square().mean().backward()
# A BatchNorm sees its own half: then the single process takes the halves in turn.
for part in (x[:2], x[2:]) if bn else (x,):
    (single(part).square().mean() / (2 if bn else 1)).backward()
for (name, p), q in zip(net.named_parameters(), single.parameters(), strict=True):
    grad = p.grad.full_tensor() if kind == "fsdp" else p.grad
    torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m: name + m)
assert any(p.grad.abs().max() > 0 for p in single[1].parameters())
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
# Else a thread of gloo's that is still there may abort the process at its end, as it has once.
os._exit(0)
"""


# Every wheel of PyTorch has gloo; builds without torch.distributed cannot start several processes.
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)
@pytest.mark.parametrize("kind", ["plain", "norm", "fsdp"])
def test_two_processes_give_the_gradients_of_one(kind, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES, kind]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=600)
            assert process.returncode == 0 and "equal" in out, error
    finally:
        for process in processes:
            process.kill()


# ---------------------------------------------------------------- the page


def test_the_page_names_tests_that_exist():
    rows = [
        line
        for line in (ROOT / "docs" / "modes.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert len(rows) > 20
    named = 0
    for row in rows[1:]:
        mode, _, tests = (cell.strip() for cell in row.strip("|").split("|"))
        found = re.findall(r"`(test_\w+)\.py::(test_\w+)`", tests)
        assert found, f"{mode} names no test"
        for file, test in found:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in names, f"{mode}: {file}.py has no {test}"
            named += 1
    assert named >= len(rows) - 1
