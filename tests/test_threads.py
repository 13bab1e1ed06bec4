"""Results do not depend on the thread count, and a forked child can compute."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from xunit_rs import _core

THREADS = (1, 2, 3, 7)


def random(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(results):
    first, *others = results
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.tobytes() == b.tobytes()


def flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        else:
            yield value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 5, 33, 29), (1, 2, 70, 65), (9, 1, 8, 8)])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(7, 1, 1), (4, 2, 1), (3, 1, 2)])
def test_depthwise_is_bit_identical(shape, dtype, k, stride, dilation):
    x, w = random(shape, dtype, 0), random((shape[1], 1, k, k), dtype, 1)
    b = random(shape[1], dtype, 2)
    geometry = ((stride,) * 2, (2, 3, 3, 2), (dilation,) * 2)
    results = []
    for threads in THREADS:
        y = _core.depthwise_conv2d(x, w, b, *geometry, threads)
        grad = random(y.shape, dtype, 3)
        needs = (True, True, True)
        results.append((y, *_core.depthwise_conv2d_backward(grad, x, w, *geometry, needs, threads)))
    same(results)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gate", ["sigmoid", "gaussian"])
@pytest.mark.parametrize("variant", ["xunit", "slim", "dense"])
def test_xunits_are_bit_identical(variant, gate, dtype):
    shape, c = (3, 5, 33, 29), 5
    x, grad = random(shape, dtype, 0), random(shape, dtype, 1)
    weight, bias = random((c, 1, 9, 9), dtype, 2), random(c, dtype, 3)
    dense = variant == "dense"
    pw = (random((c, c, 1, 1), dtype, 4), random(c, dtype, 5)) if dense else (None, None)
    affine = (random(c, dtype, 6), random(c, dtype, 7))
    bn = (*affine, None, None, 1e-5)
    norms = (None if variant == "slim" else bn, bn)
    results = []
    for threads in THREADS:
        forward = _core.xunit_forward(variant, gate, x, *pw, weight, bias, *norms, True, threads)
        _, d, p, *stats = forward
        used = [None if s is None else (*affine, *s, 1e-5, True) for s in stats]
        backward = _core.xunit_backward(variant, gate, grad, x, d, p, pw[0], weight, *used, threads)
        results.append((*flat(forward), *backward))
    same(results)


FORK = """
import os, sys
import numpy as np
from xunit_rs import _core

x = np.random.default_rng(0).standard_normal((4, 8, 64, 64)).astype("f4")
w = np.random.default_rng(1).standard_normal((8, 1, 7, 7)).astype("f4")

def run():
    return _core.depthwise_conv2d(x, w, None, (1, 1), (3, 3, 3, 3), (1, 1), 2)

before = run()  # the parent's pool has started
child = os.fork()
if child == 0:
    os._exit(0 if (run() == before).all() else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert (run() == before).all()
"""

LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset
from xunit_rs import xUnit

class Units(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.unit, self.x = xUnit(8, 7, backend="rust"), torch.randn(4, 8, 64, 64)
    def __len__(self):
        return 4
    def __getitem__(self, i):
        torch.set_num_threads(2)  # workers are given one thread
        with torch.no_grad():
            return self.unit(self.x[i : i + 1])[0]

units = Units()
expected = torch.stack([units[i] for i in range(4)])
loader = DataLoader(units, batch_size=2, num_workers=2, multiprocessing_context="fork")
assert torch.equal(torch.cat(list(loader)), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("script", [FORK, LOADER], ids=["fork", "DataLoader"])
def test_forked_child_computes(script):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
