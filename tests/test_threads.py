"""Results do not depend on the thread count, and a forked child can compute."""

from __future__ import annotations

import os
import signal
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 5, 33, 29), (1, 2, 70, 65), (9, 1, 8, 8)])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(7, 1, 1), (4, 2, 1), (3, 1, 2)])
def test_depthwise_is_bit_identical(shape, dtype, k, stride, dilation):
    x, w = random(shape, dtype, 0), random((shape[1], 1, k, k), dtype, 1)
    b = random(shape[1], dtype, 2)
    geometry = ((stride,) * 2, (2, 3, 3, 2), (dilation,) * 2)
    effective = dilation * (k - 1) + 1
    height, width = ((extent + 5 - effective) // stride + 1 for extent in shape[2:])
    grad = random((*shape[:2], height, width), dtype, 3)
    results = []
    for threads in THREADS:
        y, *grads = done = [np.full_like(t, np.nan) for t in (grad, x, w, b)]
        _core.depthwise_conv2d(x, w, b, *geometry, y, threads)
        _core.depthwise_conv2d_backward(grad, x, w, *geometry, *grads, threads)
        results.append(done)
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
    which = [variant != "slim", True]
    results = []
    for threads in THREADS:
        out, d, p, gx = (np.full_like(x, np.nan) for _ in range(4))
        stats = [tuple(np.full(c, np.nan) for _ in range(2)) for _ in which]
        norms = [
            (*affine, *found, 1e-5, True, None) if there else None
            for there, found in zip(which, stats, strict=True)
        ]
        p = p if dense else None
        _core.xunit_forward(variant, gate, x, *pw, weight, bias, *norms, out, d, p, False, threads)
        grads = [np.full_like(t, np.nan) if t is not None else None for t in (*pw, weight, bias)]
        pairs = [tuple(np.full(c, np.nan, dtype) for _ in range(2)) for _ in which]
        used = [
            (*affine, *found, 1e-5, True, *pair) if there else None
            for there, found, pair in zip(which, stats, pairs, strict=True)
        ]
        _core.xunit_backward(
            variant, gate, grad, x, d, p, pw[0], weight, *used, gx, *grads, False, threads
        )
        found = [t for there, *pair in zip(which, stats, pairs, strict=True) if there for t in pair]
        results.append((out, d, p, gx, *grads, *(t for pair in found for t in pair)))
        assert not any(np.isnan(t).any() for t in results[-1] if t is not None)
    same(results)


FORK = """
import os, sys
import numpy as np
from xunit_rs import _core

x = np.random.default_rng(0).standard_normal((4, 8, 64, 64)).astype("f4")
w = np.random.default_rng(1).standard_normal((8, 1, 7, 7)).astype("f4")

def run():
    y = np.empty_like(x)
    _core.depthwise_conv2d(x, w, None, (1, 1), (3, 3, 3, 3), (1, 1), y, 2)
    return y

before = run()  # the parent's pool has started
child = os.fork()
if child == 0:
    os._exit(0 if (run() == before).all() else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert (run() == before).all()
"""

# A child that is forked while another thread starts pools.
FORK_DURING = """
import os, threading
import numpy as np
from xunit_rs import _core

x = np.ones((1, 16, 64, 64), "f4")
w = np.ones((16, 1, 31, 31), "f4")

def run(threads):
    y = np.empty_like(x)
    _core.depthwise_conv2d(x, w, None, (1, 1), (15, 15, 15, 15), (1, 1), y, threads)

started = threading.Event()

def start_pools():
    for threads in range(3, 16):
        started.set()
        run(threads)

thread = threading.Thread(target=start_pools)
thread.start()
started.wait()
for _ in range(8):
    child = os.fork()
    if child == 0:
        run(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
thread.join()
"""

# With torch's own threads, warm in the parent.
FORK_TORCH = """
import os
import torch
from xunit_rs import xUnit

torch.set_num_threads(2)
unit, x = xUnit(8, 7, backend="rust"), torch.randn(4, 8, 64, 64)
with torch.no_grad():
    before = unit(x)
    child = os.fork()
    if child == 0:
        after = unit(x)
        torch.set_num_threads(1)  # torch's own operations cannot use two here
        os._exit(0 if torch.equal(after, before) else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
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
@pytest.mark.parametrize(
    "script",
    [FORK, FORK_DURING, FORK_TORCH, LOADER],
    ids=["fork", "during the start of pools", "torch", "DataLoader"],
)
def test_forked_child_computes(script):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["banana", "0", "-1", "1.5"])
def test_a_misspelt_number_of_threads_is_an_error(value):
    done = subprocess.run(
        [sys.executable, "-c", "import xunit_rs._core"],
        env={**os.environ, "XUNIT_NUM_THREADS": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f'XUNIT_NUM_THREADS is "{value}"' in done.stderr


INTERRUPT = """
import signal, sys, time
import numpy as np
from xunit_rs import Denoiser

denoise = Denoiser.from_pretrained(threads=1)
image = np.zeros((6000, 6000), np.float32)  # minutes of work
signal.setitimer(signal.ITIMER_REAL, 0.5)
signal.signal(signal.SIGALRM, signal.default_int_handler)
start = time.monotonic()
try:
    denoise(image)
except KeyboardInterrupt:
    sys.exit(0 if time.monotonic() - start < 20 else 2)
"""


# The timer is how the script interrupts itself; Windows has none.
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_a_signal_is_heard_between_rows():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
