"""Peak memory of one training step of a unit, in a process of its own.

    python benches/peak_memory.py UNIT KERNEL_SIZE NxCxHxW THREADS rust|torch NCHW|chl

Prints the bytes that the step, forward and backward, needs at its worst moment above what was there
before (the input and the gradient at the output) and above its own output.

Counted are resident pages, by the kernel: its high-water mark (VmHWM) is put back to what is
resident now, by writing 5 to /proc/self/clear_refs, and read after the step. That sees everything,
whoever allocated it: PyTorch, oneDNN, Rust. A step of the smallest size goes first, so that code
and thread pools are loaded, and MALLOC_MMAP_THRESHOLD_ gives every tensor pages of its own, which
leave with it, instead of a place in a heap that only grows. What our caching allocator keeps counts
as well; after a step of the smallest size that is nothing. Linux alone has these; elsewhere it
exits with 3.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
UNSUPPORTED = 3


def measure(arguments: list[str], backend: str, layout: str) -> int | None:
    """Run this file; None where the system cannot tell."""
    command = [sys.executable, __file__, *arguments, backend, layout]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == UNSUPPORTED:
        return None
    done.check_returncode()
    return int(done.stdout)


def status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def main() -> int:
    name, kernel_size, size, threads, backend, layout = sys.argv[1:]
    try:
        CLEAR.write_text("5")
        status("VmHWM")
    except OSError:
        return UNSUPPORTED
    import torch

    import xunit_rs

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    shape = [int(n) for n in size.split("x")]
    unit = getattr(xunit_rs, name)(shape[1], int(kernel_size), True, backend=backend)
    order = {"NCHW": torch.contiguous_format, "chl": torch.channels_last}[layout]
    unit.to(memory_format=order)

    def tensor(shape: list[int]) -> torch.Tensor:
        return torch.randn(shape).contiguous(memory_format=order)

    def step(x: torch.Tensor, grad: torch.Tensor) -> int:
        wanted = [x, *unit.parameters()]
        out = unit(x)
        torch.autograd.grad(out, wanted, grad)
        return out.numel() * out.element_size()

    small = [2, shape[1], 8, 8]
    step(tensor(small).requires_grad_(), tensor(small))
    x, grad = tensor(shape).requires_grad_(), tensor(shape)
    gc.collect()
    CLEAR.write_text("5")
    before = status("VmHWM")
    output = step(x, grad)
    print(status("VmHWM") - before - output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
