"""find_relus, replace_relu and accelerate."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import pickle
import re
import runpy
import threading
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from xunit_rs import (  # noqa: E402
    DepthwiseConv2d,
    accelerate,
    find_relus,
    modules,
    replace_relu,
    xUnit,
    xUnitS,
)


class Reused(nn.Module):
    """As torchvision's Bottleneck: one ReLU, called three times, with two channel counts."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 6, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        return self.relu(self.conv3(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Reused()
        self.tail = nn.Sequential(nn.Conv2d(6, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 6, 3), nn.ReLU())

    def forward(self, x):
        return self.head(self.tail(self.block(x)))


def image(*shape):
    return torch.randn(shape or (2, 3, 5, 6), generator=torch.Generator().manual_seed(1))


def simple():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


# ---------------------------------------------------------------- find_relus


def test_one_record_per_call():
    sites = find_relus(Net(), image())
    assert [(s.name, s.call, s.channels, s.action) for s in sites] == [
        ("block.relu", 0, 4, "convert"),
        ("block.relu", 1, 4, "convert"),
        ("block.relu", 2, 6, "convert"),
        ("tail.1", 0, 2, "convert"),
        ("head.2", 0, None, "skip"),
    ]
    assert sites[0].shapes == ((2, 4, 5, 6),)
    assert "4-dimensional" in sites[4].reason


def test_prints_as_a_table():
    lines = str(find_relus(Net(), image())).splitlines()
    assert lines[0].split() == ["name", "call", "shape", "channels", "action", "reason"]
    assert lines[3].split()[:5] == ["block.relu", "2", "2×6×5×6", "6", "convert"]
    assert repr(find_relus(Net(), image())).splitlines() == lines


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1))

    def forward(self, x):
        x = self.relu(self.conv(x))
        return torch.relu(F.relu(self.inner(x)).neg().relu())


def test_functional_relus_are_seen_and_left():
    sites = find_relus(Functional(), image())
    assert [s.action for s in sites] == ["convert", "skip", "skip", "skip"]
    assert all("functional" in s.reason and s.shapes == ((2, 4, 5, 6),) for s in sites[1:])
    with pytest.warns(UserWarning, match="3 call"):
        replace_relu(Functional(), image())


def test_transformer_encoder_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 8, activation=nn.ReLU(), batch_first=True)
    layer.eval()
    (site,) = find_relus(layer, torch.randn(2, 3, 8))
    assert site.action == "skip" and site.shapes == ((2, 3, 8),)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    (site,) = find_relus(layer, torch.randn(2, 3, 8))
    assert "functional" in site.reason


def test_not_called_subclass_and_relu6():
    class Mine(nn.ReLU):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), Mine(), nn.ReLU())
    model[0].spare = nn.ReLU()
    sites = {s.name: s for s in find_relus(model, image())}
    assert {n: s.action for n, s in sites.items()} == {
        "1": "skip",
        "2": "skip",
        "3": "convert",
        "0.spare": "skip",
    }
    assert "ReLU6" in sites["1"].reason and "Mine" in sites["2"].reason
    assert "not called" in sites["0.spare"].reason


def test_inside_units_and_root():
    (site,) = find_relus(xUnit(3), image())
    assert site.action == "skip" and "part of an xUnit" in site.reason
    (site,) = find_relus(nn.ReLU(), image())
    assert site.action == "skip" and "no module holds it" in site.reason
    once = replace_relu(simple(), image())
    with pytest.raises(ValueError, match="no ReLU to convert"):
        replace_relu(once, image())


def test_integer_input():
    class Integer(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(x.long())

    (site,) = find_relus(Integer(), image())
    assert site.action == "skip" and "int64" in site.reason


@pytest.mark.parametrize("inputs", [image(), (image(),), [image()], {"x": image()}])
def test_kinds_of_inputs(inputs):
    assert find_relus(Net(), inputs)[0].channels == 4


class Noisy(nn.Module):
    """Everything a probe could disturb."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(()))
        self.calls = []

    def forward(self, x):
        self.count += 1
        self.calls.append(1)
        x += torch.rand(())
        return self.relu(self.drop(self.bn(x)))


@pytest.mark.parametrize("run", [find_relus, replace_relu])
def test_nothing_is_disturbed(run):
    model = Noisy()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    x, state = image(), torch.get_rng_state()
    kept = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if run is find_relus:
            run(model, x)
            assert torch.equal(torch.get_rng_state(), state)
        else:
            run(model, x, unit=lambda c: nn.Identity())
            assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.calls == [] and not model._forward_hooks and not model.relu._forward_pre_hooks
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("case", "devices"),
    [("plain", {"meta"}), ("values", {"meta", "cpu"}), ("in place", {"cpu"}), ("hook", {"cpu"})],
)
def test_the_probe_runs_on_the_meta_device_where_the_model_allows_it(case, devices):
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=case == "in place")

        def forward(self, x):
            seen.append(x.device.type)
            if case == "values":
                float(x.sum())
            return self.relu(self.bn(self.conv(x)))

    model = Watched().double()
    if case == "hook":
        model.conv.register_forward_hook(lambda *_: None)
    (site,) = find_relus(model, image().double())
    assert site[:4] == ("relu", ((2, 4, 5, 6),), 4, "convert") and set(seen) == devices
    new = replace_relu(model, image().double())
    assert {(p.device.type, p.dtype) for p in new.parameters()} == {("cpu", torch.float64)}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_lazy_parameters_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU())
    assert find_relus(model, image())[0].channels == 4
    assert nn.parameter.is_lazy(model[0].weight)


# ---------------------------------------------------------------- functional relus, via torch.fx


def test_via_fx_rewrites_functional_relus():
    model = Functional().eval()
    sites = find_relus(model, image(), via="fx")
    assert [(s.name, s.action) for s in sites] == [
        ("relu", "convert"),
        ("relu_1", "convert"),
        ("relu_2", "convert"),
        ("relu_3", "convert"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = replace_relu(model, image(), unit=lambda c: nn.ReLU(), via="fx")
        new = replace_relu(model, image(), via="fx")
    assert torch.equal(same(image()), model(image()))
    assert isinstance(new, torch.fx.GraphModule)
    assert not new.training and not new.relu_3.training
    assert sum(type(m) is xUnit for m in new.modules()) == 4
    # A copy, under the keys of old; what the model had is as it was.
    old = model.state_dict()
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.items())
    assert new.conv.weight is not model.conv.weight and type(model.relu) is nn.ReLU
    x = h = model.conv(image())
    x = model.inner(h * new.relu.features(h))
    x = x * new.relu_1.features(x)
    x = x.neg()
    x = x * new.relu_2.features(x)
    torch.testing.assert_close(new(image()), x * new.relu_3.features(x))


class FunctionalBlock(nn.Module):
    """In place and out of place, keywords, methods, a ReLU called twice, a head of 2 dimensions."""

    def __init__(self):
        super().__init__()
        self.inner = Functional()
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        x = self.relu(self.relu(self.inner(x)) - 0.1)
        x = F.relu(x - 0.1, inplace=True) + F.relu(input=x, inplace=False)
        y = x - 0.2
        torch.relu_(y)  # for its effect
        return F.relu(self.head((y.relu_() + x).mean((2, 3))))


def test_via_fx_of_every_kind_of_call():
    model = FunctionalBlock()
    sites = find_relus(model, image(), via="fx")
    assert sorted(s.name for s in sites if s.action == "convert") == [
        *("inner.relu", "inner.relu_1", "inner.relu_2", "inner.relu_3"),
        *("relu", "relu", "relu_1", "relu_2", "relu_4"),
    ]
    assert {s.name: s.reason for s in sites if s.action == "skip"} == {
        "relu_3": "its in-place effect is used",
        "relu_5": "the input is not 4-dimensional (N, C, H, W)",
    }
    same = replace_relu(model, image(), unit=lambda c: nn.ReLU(), via="fx")
    assert torch.equal(same(image()), model(image()))
    new = replace_relu(model, image(), via="fx")
    assert len(new.relu) == 2 and not hasattr(new, "unused")
    expected = new.eval()(image())
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        for _ in range(2):
            torch.testing.assert_close(again(image()), expected)
    torch.testing.assert_close(
        torch.compile(new, backend="eager", fullgraph=True)(image()), expected
    )
    new.train()(image()).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_via_fx_keeps_our_layers_and_training_flags():
    model = nn.Sequential(Functional(), xUnit(4), DepthwiseConv2d(4, 3)).eval()
    model[0].train()
    new = replace_relu(model, image(), via="fx")
    assert type(new.get_submodule("1")) is xUnit
    assert type(new.get_submodule("2")) is DepthwiseConv2d
    flags = {name: m.training for name, m in new.named_modules()}
    assert not flags[""] and not flags["1"] and flags["0.conv"] and flags["0.relu_1"]
    assert [m.training for m in model.modules()][:3] == [False, True, True]


def test_via_fx_says_what_it_cannot_do():
    class Branching(Functional):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    class Mode(Functional):
        def forward(self, x):
            return F.dropout(super().forward(x), training=self.training)

    hooked = nn.Sequential(Functional())
    hooked[0].register_forward_hook(lambda *_: None)
    for model, match in (
        (Branching(), "cannot trace Branching"),
        (Mode(), "Mode differs between training and evaluation"),
        (hooked, "0 has hooks"),
    ):
        with pytest.raises(ValueError, match=match):
            replace_relu(model, image(), via="fx")
        assert all(m.training for m in model.modules())
    with pytest.raises(ValueError, match="inplace=True"):
        replace_relu(Functional(), image(), via="fx", inplace=True)
    with pytest.raises(ValueError, match="'jit'"):
        find_relus(Functional(), image(), via="jit")
    # torch.fx does not enter the modules of torch.nn.
    layer = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8), nn.Unflatten(1, (1, 5)), nn.ReLU())
    with pytest.warns(UserWarning, match=r"1 call\(s\) of a functional relu are left"):
        replace_relu(layer, torch.randn(2, 5, 6), via="fx")
    with pytest.warns(UserWarning, match="via='fx' converts"):
        replace_relu(Functional(), image())


# ---------------------------------------------------------------- replace_relu


def test_replaces_a_copy():
    model = simple().eval()
    new = replace_relu(model, image())
    assert type(new) is nn.Sequential and type(model[1]) is nn.ReLU
    assert type(new[1]) is xUnit and new[1].num_features == 4
    assert not new[1].training and not new[1].features.training
    assert torch.equal(new[0].weight, model[0].weight) and new[0].weight is not model[0].weight
    x = image()
    hidden = new[0](x)
    torch.testing.assert_close(new(x), new[2](hidden * new[1].features(hidden)))


def test_inplace():
    model = simple()
    weight = model[0].weight
    assert replace_relu(model, image(), inplace=True) is model
    assert type(model[1]) is xUnit and model[0].weight is weight


def test_unit_is_any_callable():
    unit = functools.partial(xUnitS, kernel_size=9, batch_norm=True, gate="gaussian")
    new = replace_relu(simple(), image(), unit=unit)
    assert type(new[1]) is xUnitS and new[1].features[0].kernel_size == (9, 9)
    asked = []
    replace_relu(Net(), image(), unit=lambda c: asked.append(c) or nn.PReLU(c))
    assert asked == [4, 4, 6, 2]


def test_filter():
    seen = []

    def only_the_tail(site):
        seen.append(site.name)
        return site.name.startswith("tail")

    new = replace_relu(Net(), image(), filter_fn=only_the_tail)
    assert type(new.block.relu) is nn.ReLU and type(new.tail[1]) is xUnit
    assert seen == ["block.relu"] * 3 + ["tail.1"]


def test_filter_of_single_calls():
    new = replace_relu(Reused(), image(), filter_fn=lambda site: site.call != 1)
    assert [type(m) for m in new.relu] == [xUnit, nn.ReLU, xUnit]
    assert new.relu[1].inplace
    assert new(image()).shape == (2, 6, 5, 6)


def test_filter_may_ask_for_relu6_and_subclasses():
    class Mine(nn.ReLU):
        pass

    class Clipped(Reused):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU6(inplace=True)

    model = nn.Sequential(Clipped(), Mine(), nn.ReLU(), nn.Flatten(), nn.ReLU6())
    heard = []
    model[0].relu.register_forward_hook(lambda *_: heard.append(1))
    asked = []

    def two(site):
        asked.append((site.name, site.action))
        return site.name == "1" or site.call == 2

    new = replace_relu(model, image(), filter_fn=two)
    assert sorted(asked) == [*[("0.relu", "skip")] * 3, ("1", "skip"), ("2", "convert")]
    assert [type(m) for m in new[0].relu] == [nn.ReLU6, nn.ReLU6, xUnit]
    assert type(new[1]) is xUnit and [type(m) for m in new[2:]] == [type(m) for m in model[2:]]
    heard.clear()
    new(image())
    assert heard == [1, 1, 1]
    used = InPlace(USES["pre-activation"])
    used.relu = nn.ReLU6(inplace=True)
    sites = {s.name: s.reason for s in find_relus(used, image())}
    assert sites["relu"] == "its in-place effect is used"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_training(dtype):
    new = replace_relu(simple().to(dtype), image().to(dtype))
    assert all(p.dtype is dtype for p in new.parameters())
    assert new[1].training and new(image().to(dtype)).dtype is dtype


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        new = replace_relu(simple(), image())
        assert new(image()).dtype is torch.bfloat16
    assert new[1].features[2].weight.dtype is torch.float32


def test_meta_device():
    new = replace_relu(simple().to("meta"), image().to("meta"))
    assert all(p.device.type == "meta" for p in new.parameters())


def test_split():
    new = replace_relu(Reused(), image())
    assert type(new) is Reused
    assert [unit.num_features for unit in new.relu] == [4, 4, 6]
    assert len({id(unit) for unit in new.relu}) == 3
    x = image()
    h = x
    for i, conv in enumerate((lambda t: new.bn1(new.conv1(t)), new.conv2, new.conv3)):
        h = conv(h)
        h = h * new.relu[i].features(h)
    torch.testing.assert_close(new(x), h)
    torch.testing.assert_close(new(x), h)


def test_split_trains_every_unit():
    new = replace_relu(Net(), image(), unit=functools.partial(xUnit, batch_norm=True))
    new(image()).sum().backward()
    assert all(p.grad is not None for p in new.block.parameters())


def test_split_after_an_interrupted_forward():
    new = replace_relu(Reused(), image())
    expected = new(image())
    handle = new.conv3.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new(image())
    handle.remove()
    torch.testing.assert_close(new(image()), expected)


class Repeated(nn.Module):
    """Calls one ReLU as often as it is told."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.times = 2

    def features(self, x):
        for _ in range(self.times):
            x = self.relu(x + 0.1)
        return x

    def forward(self, x):
        return self.features(x)


def test_split_refuses_a_call_too_many():
    new = replace_relu(Repeated(), image())
    expected = new(image())
    new.times = 3
    with pytest.raises(RuntimeError, match=r"call 3 .* 2 times"):
        new(image())
    new.times = 2
    assert torch.equal(new.features(image()), expected)  # after an exception, too


def test_split_around_the_call_of_the_scope():
    new = replace_relu(Repeated(), image()).eval()
    expected = new(image())
    for _ in range(3):
        assert torch.equal(new.features(image()), expected)
    traced = torch.fx.symbolic_trace(new)
    assert [n.target for n in traced.graph.nodes if str(n.target).endswith("features.2")] == [
        "relu.0.features.2",
        "relu.1.features.2",
    ]
    torch.testing.assert_close(traced(image()), expected)
    # A forward that makes fewer calls leaves nothing behind either.
    new.times = 1
    new(image())
    new.times = 2
    assert torch.equal(new.features(image()), expected)


def test_split_in_several_threads():
    new = replace_relu(Repeated(), image()).eval()
    expected = new(image())
    meet = threading.Barrier(2, timeout=30)
    new.relu.register_forward_pre_hook(lambda *_: print(meet.wait()))
    found = []
    threads = [threading.Thread(target=lambda: found.append(new(image()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(out, expected) for out in found)


def test_split_refuses_checkpointing_of_single_calls():
    class Recomputed(Repeated):
        def features(self, x):
            for _ in range(2):
                x = checkpoint(lambda t: self.relu(t + 0.1), x, use_reentrant=False)
            return x

    out = replace_relu(Recomputed(), image())(image().requires_grad_())
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        out.sum().backward()


# ---------------------------------------------------------------- in place


class InPlace(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
        self.use = use

    def forward(self, x):
        x = self.conv(x)
        return self.tail(self.use(x, self.relu))


def statement(x, relu):
    relu(x)
    return x


USES = {
    "statement": statement,
    "pre-activation": lambda x, relu: x + relu(x).neg(),
    "part": lambda x, relu: [relu(x[:1]), x][1],
    "twice": lambda x, relu: [relu(x), relu(x), x][2],
    "check": lambda x, relu: [relu(x), x][0 if float(x.sum()) >= 0 else 1 / 0],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("example", [image(), torch.zeros(2, 3, 5, 6)])
def test_a_relu_whose_in_place_effect_is_used_stays(use, example):
    model = InPlace(USES[use]).eval()
    before = copy.deepcopy(model.state_dict())
    sites = [site for site in find_relus(model, example) if site.name == "relu"]
    assert {s.action for s in sites} == {"skip"}
    assert {s.reason for s in sites} == {"its in-place effect is used"}
    new = replace_relu(model, example, unit=lambda c: nn.ReLU())
    assert new.relu.inplace and not new.tail[1].inplace
    torch.testing.assert_close(new(image()), model(image()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_in_place_relus_are_converted():
    model = InPlace(lambda x, relu: relu(x) + image())
    assert [s.action for s in find_relus(model, image())] == ["convert"] * 2
    # On the meta device there are no values to tell by.
    model = InPlace(lambda x, relu: relu(x)).to("meta")
    assert [s.action for s in find_relus(model, image().to("meta"))] == ["convert"] * 2
    # Nor does a model tell that gives another result each time.
    counts = itertools.count()
    model = InPlace(lambda x, relu: relu(x) + next(counts))
    assert [s.action for s in find_relus(model, image())] == ["convert"] * 2


@pytest.mark.parametrize("kind", [dict, tuple, list, "dataclass"])
def test_in_place_effects_are_seen_in_every_kind_of_output(kind):
    @dataclasses.dataclass
    class Output:
        x: torch.Tensor

    class Wrapped(InPlace):
        def forward(self, x):
            out = self.conv(x)
            self.relu(out)
            if kind == "dataclass":
                return Output(out)
            return {"x": out} if kind is dict else kind([out])

    sites = find_relus(Wrapped(None), image())
    assert sites[0].reason == "its in-place effect is used"


def test_split_of_a_block_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Sequential(nn.ReLU())

        def forward(self, x):
            return self.act(self.act(x))

    model = nn.Sequential(Twice(), nn.Conv2d(3, 1, 1))
    new = replace_relu(model, image())
    assert len(new[0].act[0]) == 2
    # The scope is Twice, not `act`, whose own forward would start over between the two calls.
    assert list(new[0]._forward_pre_hooks) and not new[0].act._forward_pre_hooks
    x = image()
    h = x
    for unit in new[0].act[0]:
        h = h * unit.features(h)
    torch.testing.assert_close(new(x), new[1](h))
    torch.testing.assert_close(new[0](x), h)


def test_aliases_in_a_sequential():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 6, 1), relu)
    sites = find_relus(model, image())
    assert [(s.name, s.channels, s.call) for s in sites] == [("1", 4, 0), ("3", 6, 0)]
    new = replace_relu(model, image(), reused="error")
    assert new[1].num_features == 4 and new[3].num_features == 6
    new(image())


def test_alias_of_a_block():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    new = replace_relu(nn.Sequential(block, block), image())
    assert new[0] is new[1] and len(new[0][1]) == 2
    assert new(image()).shape == (2, 3, 5, 6)


def test_share():
    new = replace_relu(Same(), image(), reused="share")
    assert type(new.relu) is xUnit
    new(image())
    model = nn.Sequential(Reused(), nn.ReLU())
    new = replace_relu(model, image(), reused="share")
    assert type(new[0].relu) is nn.ReLU and type(new[1]) is xUnit
    with pytest.raises(ValueError, match="called with 4, 4, 6 channels"):
        replace_relu(Reused(), image(), reused="share")


def test_skip_and_error():
    new = replace_relu(Net(), image(), reused="skip")
    assert type(new.block.relu) is nn.ReLU and type(new.tail[1]) is xUnit
    with pytest.raises(ValueError, match=r"'block.relu' is called 3 times"):
        replace_relu(Net(), image(), reused="error")


def test_copy_pickle_and_state_dict():
    new = replace_relu(Net(), image()).eval()
    expected = new(image())
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(again(image()), expected)
        assert again.block.relu is not new.block.relu
        # The hook is that of the copy.
        (hook,) = again.block._forward_pre_hooks.values()
        assert hook.__self__ is again.block.relu
        again(image())
    buffer = io.BytesIO()
    torch.save(new.state_dict(), buffer)
    buffer.seek(0)
    other = replace_relu(Net(), image()).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(image()), expected)
    assert "block.relu.2.features.2.weight" in new.state_dict()


def test_checkpointing_of_the_scope():
    new = replace_relu(Reused(), image())
    plain = copy.deepcopy(new)
    plain(image()).sum().backward()
    checkpoint(new, image().requires_grad_(), use_reentrant=False).sum().backward()
    for a, b in zip(plain.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Same(Reused):
    """One ReLU, called three times with as many channels."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(("reused", "units"), [("split", 3), ("share", 1), ("skip", 0)])
def test_what_becomes_of_a_reused_relu_works_in_every_mode(reused, units):
    torch._dynamo.reset()
    model = nn.Sequential(Same(), nn.Conv2d(4, 2, 1), nn.ReLU())

    def convert():
        unit = functools.partial(xUnit, kernel_size=3, batch_norm=True)
        return replace_relu(model, image(), unit=unit, reused=reused)

    new = convert()
    assert type(new) is nn.Sequential and type(new[0]) is Same
    assert sum(type(m) is xUnit for m in new.modules()) == units + 1

    def gradients(run, module):
        module.zero_grad()
        run(image().requires_grad_()).square().sum().backward()
        return [p.grad for p in module.parameters()]

    twin = copy.deepcopy(new)
    expected = gradients(twin, twin)
    for wrap in (
        lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        lambda m: functools.partial(checkpoint, m, use_reentrant=False),
        lambda m: functools.partial(checkpoint, m, use_reentrant=True),
    ):
        twin = copy.deepcopy(new)
        for a, b in zip(gradients(wrap(twin), twin), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    new(image())  # running statistics of its own
    expected = new.eval()(image())
    other = convert().eval()
    other.load_state_dict(new.state_dict())
    for again in (
        other,
        copy.deepcopy(new),
        pickle.loads(pickle.dumps(new)),
        torch.export.export(new, (image(),)).module(),
        torch.jit.trace(new, image()),
        torch.compile(new, backend="eager", fullgraph=True),
    ):
        for _ in range(2):
            torch.testing.assert_close(again(image()), expected)


def test_compiles_without_graph_breaks():
    new = replace_relu(Net(), image()).eval()
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(image()), new(image()))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    new = replace_relu(Net(), image()).eval()
    program = torch.export.export(new, (image(),), strict=strict)
    torch.testing.assert_close(program.module()(image()), new(image()))
    assert "aten.convolution" in str(program.graph) or "conv2d" in str(program.graph)


def test_maps_of_one_pixel_with_batch_norm():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU())
    new = replace_relu(model, image(), unit=functools.partial(xUnit, batch_norm=True))
    assert new(image()).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        new(image()[:1])
    assert new.eval()(image()[:1]).isfinite().all()


def test_unbatched_images_are_left():
    sites = find_relus(simple(), image(3, 5, 6))
    assert [s.action for s in sites] == ["skip"] and "4-dimensional" in sites[0].reason


def test_hooks_carry_over():
    model = simple()
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    new = replace_relu(model, image(), inplace=True)
    calls.clear()
    new(image())
    assert calls == [1]
    handle.remove()
    new(image())
    assert calls == [1]


def test_requires_grad_carries_over():
    model = simple()
    model[0].requires_grad_(False)
    new = replace_relu(model, image())
    assert {name: p.requires_grad for name, p in new.named_parameters()} == {
        **dict.fromkeys(("0.weight", "0.bias"), False),
        **dict.fromkeys(("1.features.2.weight", "1.features.2.bias"), True),
        **dict.fromkeys(("2.weight", "2.bias"), True),
    }


def test_a_unit_that_raises_leaves_the_model_whole():
    def unit(channels):
        if channels == 6:
            raise KeyError(channels)
        return xUnit(channels)

    model = Net()
    with pytest.raises(KeyError):
        replace_relu(model, image(), unit=unit, inplace=True)
    assert type(model.tail[1]) is nn.ReLU and type(model.block.relu) is nn.ReLU


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": "net"}, TypeError, "'net'"),
        ({"example_inputs": 3}, TypeError, "not 3"),
        ({"example_inputs": image(1, 7, 5, 6)}, ValueError, r"\(1, 7, 5, 6\)"),
        ({"unit": 64}, TypeError, "64"),
        ({"unit": lambda c: c}, TypeError, r"unit\(4\).*not 4"),
        ({"filter_fn": "tail"}, TypeError, "'tail'"),
        ({"reused": "copy"}, ValueError, "'copy'"),
        ({"model": nn.Sequential(nn.Conv2d(3, 1, 1))}, ValueError, "Sequential has no ReLU"),
        ({"model": torch.compile(simple())}, TypeError, "OptimizedModule"),
    ],
)
def test_bad_arguments(arguments, error, match):
    arguments = {"model": Net(), "example_inputs": image()} | arguments
    with pytest.raises(error, match=match):
        replace_relu(**arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules():
    script = torch.jit.script(simple())
    with pytest.raises(TypeError, match="compiled"):
        find_relus(script, image())
    sites = find_relus(nn.Sequential(script, nn.ReLU()), image())
    assert {s.name: s.action for s in sites} == {"0.1": "skip", "1": "convert"}


# ---------------------------------------------------------------- real models


def test_the_page_of_models_is_that_of_the_tool():
    root = Path(__file__).parents[1]
    tool = runpy.run_path(str(root / "tools" / "real_models.py"))
    page = (root / "docs" / "models.md").read_text("utf-8")
    assert page.startswith(tool["HEAD"])
    rows = [line.split(" | ") for line in page[len(tool["HEAD"]) :].splitlines()]
    names = [row[0].removeprefix("| ").removesuffix(", via fx") for row in rows]
    assert names == [name.replace("/", " ") for name in tool["MODELS"]]
    for _, calls, converted, left, swapped, apart, exported, _ in rows:
        assert (left == "-") == (calls == converted)
        assert int(converted) + int(swapped) > 0
        assert float(apart) <= 1e-4 and exported == "both"


# ---------------------------------------------------------------- accelerate


def test_the_example_of_the_readme(capsys):
    readme = Path(__file__).parents[1] / "README.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text("utf-8"), re.M | re.S)
    names: dict = {}
    for block in blocks:
        if "replace_relu" in block or "accelerate" in block:
            exec(block, names)
    out = capsys.readouterr().out
    assert "DepthwiseConv2d" in out and "rust" in out
    assert type(names["model"][1]) is nn.Conv2d


def official(variant, channels=4, gate="sigmoid", product=True):
    """A class as in the official code of 2021: not ours, but of the same name and layout."""

    def init(self):
        nn.Module.__init__(self)
        unit = getattr(modules, variant)(channels, 5, True, gate=gate)
        self.features = unit.features
        if gate == "gaussian":
            kind = type("Gaussian", (nn.Module,), {"forward": lambda _, x: torch.exp(-x * x)})
            self.features[-1] = kind()

    def forward(self, x):
        return x * self.features(x) if product else self.features(x)

    return type(variant, (nn.Module,), {"__init__": init, "forward": forward})()


@pytest.mark.parametrize("variant", ["xUnit", "xUnitS", "xUnitD"])
@pytest.mark.parametrize("gate", ["sigmoid", "gaussian"])
def test_accelerate_official_units(variant, gate):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), official(variant, gate=gate))
    plain = copy.deepcopy(model)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    assert accelerate(model).model is model
    assert type(model[1]) is getattr(modules, variant)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    assert not isinstance(model[1]._parts(), str)
    assert all(type(m) is not DepthwiseConv2d for m in model.modules())
    for training in (True, False):
        x = image()
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_accelerate_leaves_lookalikes():
    different = official("xUnit", product=False)
    assert type(accelerate(different).model) is type(different)
    hooked = official("xUnit")
    hooked.features[1].register_forward_hook(lambda *_: None)
    conv = hooked.features[2]
    assert accelerate(hooked).model is hooked
    assert type(hooked.features[2]) is DepthwiseConv2d and hooked.features[2].weight is conv.weight
    short = official("xUnit")
    del short.features[3]
    assert accelerate(short).model is short
    extra = official("xUnit")
    extra.scale = nn.Parameter(torch.ones(()))
    assert accelerate(extra).model is extra


CONVS = {
    "plain": nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "stride": nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False),
    "dilation": nn.Conv2d(4, 4, (3, 5), padding="same", dilation=2, groups=4),
    "double": nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64),
}


@pytest.mark.parametrize("name", CONVS)
def test_accelerate_depthwise(name):
    conv = copy.deepcopy(CONVS[name]).eval()
    conv.weight.requires_grad_(False)
    new = accelerate(nn.Sequential(conv)).model[0]
    assert type(new) is DepthwiseConv2d and not new.training
    assert new.weight is conv.weight and new.bias is conv.bias
    x = image(2, 4, 9, 11).to(conv.weight.dtype)
    torch.testing.assert_close(new(x), conv(x))
    assert repr(new).split("(", 1)[1] == repr(conv).split("(", 1)[1]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_accelerate_keeps_types_that_only_torch_computes(dtype):
    conv = nn.Conv2d(2, 2, 3, groups=2, bias=False).requires_grad_(False)
    conv.weight = nn.Parameter((conv.weight * 9).to(dtype), requires_grad=False)
    x = (image(1, 2, 5, 5) * 9).to(dtype)
    expected = conv(x)
    new = accelerate(nn.Sequential(conv)).model[0]
    assert type(new) is DepthwiseConv2d
    assert torch.equal(new(x), expected)
    new.backend = "rust"
    with pytest.raises(ValueError, match=str(dtype)):
        new(x)


def test_accelerate_keeps_what_a_convolution_holds_besides():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.register_buffer("scale", torch.ones(3))
    conv.act = nn.ReLU()
    conv.note = "mine"
    keys = list(conv.state_dict())
    new = accelerate(nn.Sequential(conv)).model[0]
    assert type(new) is DepthwiseConv2d
    assert list(new.state_dict()) == keys and new.scale is conv.scale
    assert new.act is conv.act and new.note == "mine"


def test_accelerate_leaves_other_convolutions():
    hooked = nn.Conv2d(4, 4, 3, groups=4)
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    saved = nn.Conv2d(4, 4, 3, groups=4)
    saved.register_state_dict_post_hook(lambda *_: None)

    class Mine(nn.Conv2d):
        pass

    convs = [
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
        hooked,
        normed,
        saved,
        Mine(4, 4, 3, groups=4),
        xUnit(4),
    ]
    model = accelerate(nn.ModuleList(convs)).model
    assert all(a is b for a, b in zip(model, convs, strict=True))
    assert type(model[-1].features[2]) is nn.Conv2d


def test_accelerate_keeps_aliases_and_optimizers():
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)
    model = nn.Sequential(conv, nn.Sequential(conv), nn.Conv2d(3, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerate(model)
    assert type(model[0]) is DepthwiseConv2d and model[0] is model[1][0]
    before = model[0].weight.detach().clone()
    model(image()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_accelerate_the_model_itself():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    assert type(accelerate(conv).model) is DepthwiseConv2d
    assert type(accelerate(official("xUnitS")).model) is xUnitS
    unit = xUnit(3)
    assert accelerate(unit).model is unit


def test_accelerate_bad_model():
    with pytest.raises(TypeError, match="'net'"):
        accelerate("net")


def test_accelerate_reports():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Sequential(official("xUnitS", channels=8), nn.Conv2d(8, 1, 1)),
        official("xUnit", product=False),
    )
    report = accelerate(model)
    # The convolution of a unit that is left is swapped by itself.
    assert [tuple(swap) for swap in report] == [
        ("0", "Conv2d", "DepthwiseConv2d", "swap", ""),
        ("1", "Conv2d", "Conv2d", "leave", "8 output channels of 4"),
        ("2.0", "xUnitS", "xUnitS", "swap", ""),
        ("3", "xUnit", "xUnit", "leave", "it computes something else"),
        ("3.features.2", "Conv2d", "DepthwiseConv2d", "swap", ""),
    ]
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "before", "after", "action", "reason"]
    assert lines[1].split() == ["0", "Conv2d", "DepthwiseConv2d", "swap"] and len(lines) == 6
    assert [swap.name for swap in accelerate(model)] == ["1", "3"]
    assert not accelerate(nn.Sequential(nn.ReLU()))
    assert str(accelerate(nn.Conv2d(2, 2, 3, groups=2))).split()[5] == "(model)"


def test_accelerate_and_back():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(
        conv,
        official("xUnit"),
        official("xUnitD", gate="gaussian"),
        DepthwiseConv2d(4, 3),
        xUnit(4),
        conv,
    )
    kinds = [type(m) for m in model.modules()]
    keys, x = list(model.state_dict()), image(2, 4, 5, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerate(model)
    assert {type(m) for m in model} == {DepthwiseConv2d, xUnit, modules.xUnitD}
    # What happens to it meanwhile is not lost.
    model(x).sum().backward()
    optimizer.step()
    model.double().eval()
    model[2].features[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[2].features[1])
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    x = x.double()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[:1]))):
        back = accelerate(twin, inverse=True)
        assert type(twin[0]) is nn.Conv2d and back[0][:4] == (
            "0",
            "DepthwiseConv2d",
            "Conv2d",
            "swap",
        )
        assert twin[0].weight.dtype is torch.float64
    report = accelerate(model, inverse=True)
    assert report.model is model and [swap.name for swap in report] == ["0", "1", "2"]
    assert model[0] is conv and model[5] is conv and list(model.state_dict()) == keys
    after = [type(m) for m in model.modules()]
    assert [k for k in after if k is not nn.SyncBatchNorm] == [
        k for i, k in enumerate(kinds) if after[i] is not nn.SyncBatchNorm
    ]
    assert after.count(nn.SyncBatchNorm) == 1 and not any(m.training for m in model.modules())
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    assert not accelerate(model, inverse=True)
    again = [swap.name for swap in accelerate(model) if swap.action == "swap"]
    assert again == ["0", "1.features.2", "2.features.3"]  # the hook and the norm are in the way
    single = accelerate(accelerate(conv).model, inverse=True)
    assert single.model is conv


class Modulecell(nn.Module):
    """As the cell of the official code of 2018."""

    def __init__(self, inputs, channels, *, product=True, inplace=False):
        super().__init__()
        gaussian = type("Gaussian", (nn.Module,), {"forward": lambda _, x: torch.exp(-x * x)})
        self.features = nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1))
        self.module = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(channels, channels, 9, padding=4, groups=channels),
            nn.BatchNorm2d(channels),
            gaussian(),
        )
        self.product = product

    def forward(self, x):
        x = self.features(x)
        return x * self.module(x) if self.product else x + self.module(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_accelerate_the_cells_of_2018(inplace):
    torch.manual_seed(0)
    model = nn.Sequential(
        Modulecell(3, 4, inplace=inplace),
        nn.Sequential(nn.BatchNorm2d(4), Modulecell(4, 2, inplace=inplace)),
    )
    plain = copy.deepcopy(model)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    report = accelerate(model)
    assert [tuple(swap) for swap in report] == [
        ("0", "Modulecell", "Cell", "swap", ""),
        ("1.1", "Modulecell", "Cell", "swap", ""),
    ]
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    assert "0.module.2.weight" in after
    for unit in (model[0], model[1][1]):
        assert modules.obstacle(unit) is None
        unit.backend = "rust"
    for training in (True, False):
        grads = []
        for m in (model.train(training), plain.train(training)):
            m.zero_grad()
            m(image()).square().sum().backward()
            grads.append([p.grad for p in m.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    model[0].backend = model[1][1].backend = "auto"
    expected = plain(image())
    for other in (
        copy.deepcopy(model),
        torch.compile(model, backend="eager", fullgraph=True),
        torch.export.export(model, (image(),)).module(),
        torch.fx.symbolic_trace(model),
    ):
        torch.testing.assert_close(other(image()), expected)
    assert {s.reason for s in find_relus(model, image())} == {"part of an xUnit"}
    assert {s.reason for s in find_relus(plain, image())} == {"part of an xUnit"}
    accelerate(model, inverse=True)
    assert type(model[0]) is Modulecell and type(model[0].module[4]).__module__ == __name__
    torch.testing.assert_close(model(image()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_accelerated_models_script_and_trace():
    model = nn.Sequential(Modulecell(3, 4), nn.Conv2d(4, 4, 3, groups=4)).eval()
    accelerate(model)
    expected = model(image())
    torch.testing.assert_close(torch.jit.script(model)(image()), expected)
    torch.testing.assert_close(torch.jit.trace(model, image())(image()), expected)


def test_accelerate_leaves_other_cells():
    (swap, inner) = accelerate(nn.Sequential(Modulecell(3, 4, product=False)))
    assert swap == ("0", "Modulecell", "Modulecell", "leave", "it computes something else")
    assert inner[:3] == ("0.module.2", "Conv2d", "DepthwiseConv2d")
    other = Modulecell(3, 4)
    del other.module[3]
    assert [swap.name for swap in accelerate(other)] == ["module.2"]
    hooked = Modulecell(3, 4)
    hooked.module[1].register_forward_hook(lambda *_: None)
    assert "hooks" in accelerate(hooked)[0].reason
