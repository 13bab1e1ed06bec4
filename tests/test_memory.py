"""Memory of large tensors, which is kept from one to the next."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import xunit_rs

torch = pytest.importorskip("torch")

from xunit_rs import _autograd, _core  # noqa: E402

SHAPE = (2, 16, 256, 256)  # 8 MiB
MIB = {n: n << 20 for n in (8, 10)}
# Elsewhere `_fresh` gives ordinary tensors, which the tests without this cover.
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux alone")


@pytest.fixture(autouse=True)
def _nothing_kept():
    xunit_rs.empty_cache()


def fresh(*shape, dtype=torch.float32, channels_last=False):
    return _autograd._fresh(shape or SHAPE, dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 2048, 1025), (3, 700, 1, 1000), (2, 3, 4, 5)])
def test_a_fresh_tensor_is_as_torchs(shape, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    t, twin = (
        fresh(*shape, dtype=dtype, channels_last=channels_last),
        torch.empty(shape, dtype=dtype, memory_format=layout),
    )
    assert (t.shape, t.stride(), t.dtype) == (twin.shape, twin.stride(), twin.dtype)
    assert t.is_contiguous(memory_format=layout) and t.device == twin.device
    assert type(t) is torch.Tensor and not t.requires_grad and t.is_leaf and t._base is None
    assert t.data_ptr() % 64 == 0
    t.fill_(1.5)
    assert t.sum().item() == 1.5 * t.numel()


@linux
def test_memory_is_kept_from_one_tensor_to_the_next_and_given_back():
    t = fresh()
    at = t.data_ptr()
    assert xunit_rs.empty_cache() == 0
    del t
    t = fresh()
    assert t.data_ptr() == at
    # Not while a view, an array or the storage is there.
    for keep in (lambda t: t[0, 0], torch.Tensor.numpy, torch.Tensor.untyped_storage):
        kept = keep(t)
        del t
        t = fresh()
        assert t.data_ptr() != at
        at = t.data_ptr()
        del kept
        assert xunit_rs.empty_cache() == MIB[8]
    # For a tensor a quarter smaller, too, but for no larger one.
    del t
    larger = fresh(2, 16, 256, 320)
    assert xunit_rs.empty_cache() == MIB[8]
    at = larger.data_ptr()
    del larger
    assert fresh().data_ptr() == at
    assert xunit_rs.empty_cache() == MIB[10]
    assert xunit_rs.empty_cache() == 0


@linux
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["xUnit", "xUnitS", "xUnitD", "DepthwiseConv2d"])
def test_results_saved_tensors_and_gradients_are_in_it(name, layout):
    if name == "DepthwiseConv2d":
        net = xunit_rs.DepthwiseConv2d(16, 3, backend="rust")
    else:
        net = getattr(xunit_rs, name)(16, 7, True, backend="rust")
    x = torch.randn(SHAPE).contiguous(memory_format=layout)
    with torch.no_grad():
        net(x)
        assert xunit_rs.empty_cache() == MIB[8]
        net.eval()(x)
        assert xunit_rs.empty_cache() == MIB[8]
        net(x[:, :, :64, :64].contiguous(memory_format=layout))
        assert xunit_rs.empty_cache() == 0
    x.requires_grad_()
    out = net.train()(x)
    (gx,) = torch.autograd.grad(out, x, torch.ones_like(x))
    saved = {"DepthwiseConv2d": 0, "xUnitD": 2}.get(name, 1)
    # The gradient to x takes the place of a saved tensor, in NCHW and where torch can tell.
    own = layout is torch.channels_last or not saved or not hasattr(torch._C, "_storage_Use_Count")
    assert xunit_rs.empty_cache() == MIB[8] * (saved if own else saved - 1)
    del out
    assert xunit_rs.empty_cache() == MIB[8]
    del gx
    assert xunit_rs.empty_cache() == MIB[8]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["xUnit", "xUnitS", "xUnitD", "DepthwiseConv2d"])
def test_training_gives_the_same_with_memory_that_held_something_else(name, layout):
    torch.manual_seed(0)
    x, grad = (torch.randn(SHAPE).contiguous(memory_format=layout) for _ in range(2))
    arguments = (16, 5) if name == "DepthwiseConv2d" else (16, 5, True)
    net = getattr(xunit_rs, name)(*arguments, backend="rust")
    found = []
    for value in (0.0, float("nan")):
        tensors = [fresh() for _ in range(4)]
        for t in tensors:
            t.fill_(value)
        del tensors, t
        v = x.clone().requires_grad_()
        again = copy.deepcopy(net)
        out = again(v)
        found.append((out, *torch.autograd.grad(out, [v, *again.parameters()], grad)))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again) and once.isfinite().all()


def test_such_tensors_do_what_tensors_do():
    t = fresh().normal_()
    twin = t.clone()
    assert torch.equal(copy.deepcopy(t), twin)
    assert torch.equal(pickle.loads(pickle.dumps(t)), twin)
    assert np.array_equal(t.numpy(), twin.numpy())
    assert torch.equal(torch.from_dlpack(t), twin)
    t.mul_(2)
    assert torch.equal(t, twin * 2)
    assert torch.equal(t.resize_(3, 5), twin.flatten()[:15].reshape(3, 5) * 2)
    t = fresh().copy_(twin)
    assert torch.equal(t.share_memory_(), twin) and t.is_shared()
    with torch.inference_mode():
        assert fresh().is_inference()


@linux
def test_such_tensors_cannot_be_resized_beyond_their_storage():
    with pytest.raises(RuntimeError, match="not resizable"):
        fresh().resize_(3, *SHAPE)
    with pytest.raises(RuntimeError, match="not resizable"):
        fresh().untyped_storage().resize_(0)


@linux
def test_another_thread_may_drop_it():
    tensors = [fresh()]
    at = tensors[0].data_ptr()
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert fresh().data_ptr() == at


@linux
def test_a_forked_child_has_its_own():
    t = fresh().fill_(1)
    fresh().fill_(2)
    child = os.fork()
    if child == 0:
        try:
            # Nothing is kept that both would copy.
            fine = xunit_rs.empty_cache() == 0
            again = fresh()
            # By numpy: torch's threads do not live on in a child.
            again.numpy()[:] = 3
            t.numpy()[:] = 4
            del again
            os._exit(0 if fine and xunit_rs.empty_cache() == MIB[8] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert xunit_rs.empty_cache() == 0
    assert t.sum().item() == t.numel()


def test_a_capsule_that_nobody_takes_gives_its_memory_back():
    capsule = _core.empty(SHAPE, False, False, False)
    del capsule
    assert xunit_rs.empty_cache() == (MIB[8] if sys.platform == "linux" else 0)


def test_there_is_no_memory_for_small_and_for_impossible_tensors():
    for shape in ((1, 2, 3, 4), (1 << 58, 1, 1, 1), (1 << 62, 8, 1, 1), (0, 1 << 30, 1, 1)):
        assert _core.empty(shape, False, False, False) is None
    with pytest.raises(ValueError, match=r"5 dimensions: \[2, 2, 2, 2, 2\]"):
        _core.empty((2,) * 5, False, False, False)
    with pytest.raises(ValueError, match="1 dimensions"):
        _core.empty((1 << 30,), False, True, False)
    with pytest.raises(OverflowError):
        _core.empty((-1, 1), False, False, False)


LIMIT = """
import torch, xunit_rs
from xunit_rs._autograd import _fresh
tensors = [_fresh((2, 16, 256, 256), torch.float32) for _ in range(3)]
del tensors
print(xunit_rs.empty_cache() >> 20)
"""


@linux
@pytest.mark.parametrize(("limit", "kept"), [("0", 0), ("17", 16), ("", 24)])
def test_no_more_is_kept_than_the_environment_says(limit, kept):
    env = {**os.environ, "XUNIT_CACHE_MB": limit}
    done = subprocess.run([sys.executable, "-c", LIMIT], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(kept), done.stderr


@pytest.mark.parametrize("value", ["-1", "much", "1.5"])
def test_a_misspelt_limit_is_named(value):
    code = "import xunit_rs._core"
    env = {**os.environ, "XUNIT_CACHE_MB": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert f'XUNIT_CACHE_MB is "{value}", which is no whole number of MiB' in done.stderr
