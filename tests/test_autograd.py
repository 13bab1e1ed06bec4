"""First and second derivatives, and what autograd's corners ask of a custom Function."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from xunit_rs import _autograd, functional, reference  # noqa: E402
from xunit_rs.functional import BatchNormState  # noqa: E402
from xunit_rs.modules import DepthwiseConv2d, xUnit, xUnitD, xUnitS  # noqa: E402

BACKENDS = ["torch", "rust"]
GATES = ["sigmoid", "gaussian"]


def leaf(*shape: int, shift: float = 0.0) -> torch.Tensor:
    t = torch.randn(shape, dtype=torch.float64) + shift
    # Away from relu's kink, where finite differences mean nothing.
    return torch.where(t.abs() < 0.05, t + 0.2, t).requires_grad_()


def unit(variant: str, gate: str, bn: bool, training: bool, backend: str):
    """A function of tensors only, and inputs for it."""
    torch.manual_seed(3)
    x, w, b = leaf(2, 2, 4, 3), leaf(2, 1, 3, 3), leaf(2)
    inputs = [x, w, b]
    if variant == "dense":
        inputs += [leaf(2, 2, 1, 1), leaf(2)]
    norms = {"slim": ["bn2"]}.get(variant, ["bn1", "bn2"]) if bn else []
    for _ in norms:
        inputs += [leaf(2, shift=1.0), leaf(2)]
    stats = [(leaf(2).detach(), leaf(2).detach().abs() + 0.5) for _ in norms]

    def run(*args):
        x, w, b, *rest = args
        options = {"gate": gate, "training": training, "backend": backend}
        dense = (rest.pop(0), rest.pop(0)) if variant == "dense" else ()
        for name, (mean, var) in zip(norms, stats, strict=True):
            # Clones, as finite differences call this many times.
            options[name] = BatchNormState(rest.pop(0), rest.pop(0), mean.clone(), var.clone())
        if variant == "dense":
            return functional.xunit_dense(x, *dense, w, b, **options)
        f = functional.xunit if variant == "xunit" else functional.xunit_slim
        return f(x, w, b, **options)

    return run, inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["xunit", "slim", "dense"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("bn", "training"), [(False, False), (True, False), (True, True)])
def test_unit_gradients(variant, gate, bn, training, backend):
    run, inputs = unit(variant, gate, bn, training, backend)
    assert gradcheck(run, inputs, check_batched_grad=True)
    assert gradgradcheck(run, inputs, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("k", "options"),
    [
        ((3, 3), {"padding": "same"}),
        ((2, 3), {"padding": "same", "dilation": 2}),
        ((3, 3), {"stride": 2, "padding": (1, 0)}),
    ],
)
def test_conv_gradients(k, options, backend):
    torch.manual_seed(0)
    inputs = [leaf(2, 2, 5, 6), leaf(2, 1, *k), leaf(2)]

    def run(x, w, b):
        return functional.depthwise_conv2d(x, w, b, backend=backend, **options)

    assert gradcheck(run, inputs, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [[0], [1], [2], [1, 2], [0, 2]])
def test_only_what_is_asked_for(wanted, backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 6, 6), torch.randn(3, 1, 3, 3), torch.randn(3)]
    for i in wanted:
        inputs[i].requires_grad_()
    for f, g in (
        (functional.xunit, reference.xunit),
        (functional.depthwise_conv2d, reference.depthwise_conv2d),
    ):
        chosen = [inputs[i] for i in wanted]
        ours = torch.autograd.grad(f(*inputs, backend=backend).square().sum(), chosen)
        theirs = torch.autograd.grad(g(*inputs).square().sum(), chosen)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    """The use for double backward: a loss on the norm of a gradient."""

    def penalty(f):
        torch.manual_seed(0)
        x, w = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(3, 1, 3, 3)
        w.requires_grad_()
        (g,) = torch.autograd.grad(f(x, w).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, w])

    ours = penalty(lambda x, w: functional.xunit(x, w, backend=backend))
    for a, b in zip(ours, penalty(reference.xunit), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_when_the_weight_depends_on_the_input(backend):
    def second(f):
        torch.manual_seed(0)
        x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        w = x.mean((0, 2, 3)).view(2, 1, 1, 1).expand(2, 1, 3, 3)
        (g,) = torch.autograd.grad(f(x, w).sin().sum(), x, create_graph=True)
        return g.detach(), torch.autograd.grad(g.square().sum(), x)[0]

    ours = second(lambda x, w: functional.xunit(x, w, backend=backend))
    for a, b in zip(ours, second(reference.xunit), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_change_before_backward_is_noticed(backend):
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    y = x * 1
    out = xUnit(3, 3, backend=backend)(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_undefined_gradient(backend):
    class TwoOutputs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * 2

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    w = torch.randn(3, 1, 3, 3, requires_grad=True)
    for f in (functional.xunit, functional.depthwise_conv2d):
        out = TwoOutputs.apply(f(x, w, backend=backend))
        assert torch.autograd.grad(out.sum(), [x, w], allow_unused=True) == (None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_checkpoint(backend):
    module = xUnit(3, 3, True, backend=backend)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    out = module(x)
    (a,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    (c,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(a, c)


# Without the count nothing is ever taken to be spent: gradients have memory of their own, which the
# other tests of this file cover. It is a private function, which a torch may lack.
needs_counts = pytest.mark.skipif(
    not hasattr(torch._C, "_storage_Use_Count"), reason="this torch counts no uses of memory"
)


@pytest.fixture
def in_place(monkeypatch):
    """For each backward pass whether the gradient took the place of what forward saved."""
    found = []
    backward = _autograd._core.xunit_backward

    def spy(*args):
        d, p = args[4:6]
        found.append(d is None or (args[0] == "dense" and p is None))
        backward(*args)

    monkeypatch.setattr(_autograd._core, "xunit_backward", spy)
    return found


@needs_counts
@pytest.mark.parametrize("unit", [xUnit, xUnitS, xUnitD])
# The second one in memory of the caching allocator.
@pytest.mark.parametrize("shape", [(2, 8, 128, 130), (2, 8, 512, 260)])
def test_a_gradient_takes_the_place_of_what_nobody_reads_again(unit, shape, in_place):
    torch.manual_seed(0)
    module = unit(8, 5, True, backend="rust")
    x = torch.randn(shape, requires_grad=True)
    wanted = [x, *module.parameters()]

    def step(out, **options):
        return torch.autograd.grad(out, wanted, torch.ones_like(out), **options)

    def same(got):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)

    out = module(x)
    want = step(out, retain_graph=True)
    kept = [None if t is None else t.clone() for t in out.grad_fn.saved_tensors]
    assert in_place == [False]
    same(step(out, retain_graph=True))
    same(step(out))
    assert in_place == [False, False, True]

    # Somebody has them still: all, one, its memory, or a graph.
    last = 9 if unit is not xUnitD else 10
    factor = torch.ones((), requires_grad=True)
    holders = [
        lambda saved: saved,
        lambda saved: saved[last],
        lambda saved: saved[last].view(-1),
        lambda saved: saved[last].untyped_storage(),
        lambda saved: saved[last].numpy(),
        lambda saved: np.from_dlpack(saved[last]),
        lambda saved: torch.from_dlpack(saved[last]),
        lambda saved: saved[last] * factor,
    ]
    for hold in holders:
        out = module(x)
        held = hold(out.grad_fn.saved_tensors)
        same(step(out))
        if isinstance(held, tuple):
            for a, b in zip(held, kept, strict=True):
                assert a is None or torch.equal(a, b)
    (found,) = torch.autograd.grad(held.sum(), factor)
    torch.testing.assert_close(found, kept[last].sum())
    assert in_place[3:] == [False] * len(holders)

    # Hooks: those that keep the tensors, and those that give back others.
    stored = {}

    def store(t):
        stored[len(stored)] = t
        return len(stored) - 1

    hooks = [(store, stored.get), (torch.clone, lambda t: t), (lambda t: t.numpy(), torch.tensor)]
    for pack, unpack in hooks:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = module(x)
        same(step(out))
    same(torch.autograd.grad(checkpoint(module, x, use_reentrant=False).sum(), wanted))
    assert in_place[3:] == [False] * (len(holders) + len(hooks) + 1)


@needs_counts
def test_what_a_gradient_took_the_place_of_is_gone(in_place, monkeypatch):
    module = xUnit(8, 3, True, backend="rust")
    x = torch.randn(2, 8, 128, 128, requires_grad=True)
    out = module(x)
    node, seen = out.grad_fn, []

    def after(*_):
        with pytest.raises(RuntimeError, match="inplace"):
            seen.append(node.saved_tensors)

    node.register_hook(after)
    out.sum().backward()
    assert in_place == [True] and seen == []

    # An exception keeps the graph; the next backward pass would read what is there now.
    out = module(x)
    with monkeypatch.context() as patch:
        patch.setattr(_autograd, "_gradients", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_small_and_channels_last_gradients_have_places_of_their_own(in_place):
    module = xUnit(4, 3, backend="rust")
    for x in (torch.randn(1, 4, 8, 8), torch.randn(4, 4, 256, 256)):
        if x.numel() > 1 << 16:
            x = x.contiguous(memory_format=torch.channels_last)
        module(x.requires_grad_()).sum().backward()
    assert in_place == [False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectorized_jacobian_and_hessian(backend):
    module = DepthwiseConv2d(2, 3, backend=backend, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(module, x, vectorize=True), jacobian(module, x))

    def loss(x):
        return functional.xunit(x, module.weight, backend=backend).sum()

    hessian = torch.autograd.functional.hessian(loss, x, vectorize=True)
    expected = torch.autograd.functional.hessian(
        lambda x: reference.xunit(x, module.weight).sum(), x
    )
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step_reduces_a_loss(backend):
    torch.manual_seed(0)
    module = xUnit(3, 5, True, backend=backend)
    x = torch.randn(4, 3, 8, 8)
    target = F.relu(x)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_no_graph_when_none_is_needed():
    module = xUnit(3, 3)
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        assert module(x).grad_fn is None
    with torch.inference_mode():
        assert module(x).is_inference()
    assert module(x).grad_fn is not None
    assert module.requires_grad_(False)(x).grad_fn is None
