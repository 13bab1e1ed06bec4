"""Train a network of the package on one CUDA GPU, for as long as it may take.

    python tools/train_on_gpu.py CBSD400 OUT.safetensors --init gray-sigma25 --sigma 25 --minutes 9

What `xunit-rs train` does, for a GPU hired by the minute: all images, patches and noise are on the
device, the step is compiled, and each pass of the 9×9 depthwise convolutions goes by whichever is
faster there, PyTorch's own or a dense convolution with zeros, for which a GPU has matrix units.
BatchNorm's statistics are taken anew for the averaged weights, in float32. Runs on a CPU, slowly.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xunit_rs.models import XDnCNN
from xunit_rs.modules import Gaussian
from xunit_rs.training.data import fingerprint, read_folder
from xunit_rs.training.loop import _start_from

WARM_UP = 0.04  # share of the run in which the learning rate rises
AVERAGE = 0.999
STATISTICS = 100  # batches
RESERVE = 30.0  # seconds kept for what follows the last step

Pass = Callable[..., Tensor]


def native(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=w.shape[-1] // 2, groups=w.shape[0])


def native_weight(x: Tensor, dy: Tensor, k: int) -> Tensor:
    c = x.shape[1]
    return torch.nn.grad.conv2d_weight(x, (c, 1, k, k), dy, padding=k // 2, groups=c)


def dense(x: Tensor, w: Tensor) -> Tensor:
    eye = torch.eye(w.shape[0], dtype=w.dtype, device=w.device)[:, :, None, None]
    full = (eye * w).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, full, padding=w.shape[-1] // 2)


def dense_weight(x: Tensor, dy: Tensor, k: int) -> Tensor:
    c = x.shape[1]
    full = torch.nn.grad.conv2d_weight(x, (c, c, k, k), dy, padding=k // 2)
    return full.diagonal(dim1=0, dim2=1).permute(2, 0, 1)[:, None]


class Depthwise(torch.autograd.Function):
    """A depthwise convolution, stride 1, of odd k and "same" padding; passes by `choose`."""

    forward_pass: Pass = staticmethod(native)
    weight_pass: Pass = staticmethod(native_weight)

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, w)
        return Depthwise.forward_pass(x, w)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def, override]
        x, w = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = Depthwise.forward_pass(dy, w.flip(2, 3))
        return dx, Depthwise.weight_pass(x, dy, w.shape[-1])


class FastDepthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        dtype = torch.bfloat16
        d: Tensor = Depthwise.apply(x.to(dtype), self.weight.to(dtype))
        return d + self.bias.to(dtype)[:, None, None]


class ShortGaussian(Gaussian):
    """The gate in the precision of its input: autocast would widen everything after it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x * x)).to(x.dtype)


def choose(batch: int, patch: int, device: torch.device) -> None:
    """Time the passes on this device and keep the faster of each."""
    if device.type == "cpu":
        return
    shape = batch, 64, patch, patch
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 1, 9, 9, device=device, dtype=torch.bfloat16)

    def milliseconds(run: Callable[[], Tensor]) -> float:
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 10

    forward = {f: milliseconds(lambda f=f: f(x, w)) for f in (native, dense)}  # type: ignore[misc]
    weight = {f: milliseconds(lambda f=f: f(x, x, 9)) for f in (native_weight, dense_weight)}  # type: ignore[misc]
    Depthwise.forward_pass = staticmethod(min(forward, key=forward.__getitem__))
    Depthwise.weight_pass = staticmethod(min(weight, key=weight.__getitem__))
    for f, ms in (*forward.items(), *weight.items()):
        print(f"{f.__name__}: {ms:.3f} ms", flush=True)


class Patches:
    """Random patches, flipped and turned, cut on the device."""

    def __init__(self, folder: Path, channels: int, size: int, device: torch.device) -> None:
        images = read_folder(folder, channels)
        self.description = f"{folder.resolve().name} ({fingerprint(images)})"
        images = [p for p in images if min(p.shape[:2]) >= size]
        self.size, self.device = size, device
        flat = np.concatenate([p.reshape(-1, channels) for p in images])
        self.pixels = torch.from_numpy(flat).to(device)
        shapes = torch.tensor([p.shape[:2] for p in images], device=device)
        self.heights, self.widths = shapes.unbind(1)
        areas = self.heights * self.widths
        self.starts = areas.cumsum(0) - areas
        self.areas = areas.float()

    def draw(self, count: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Clean patches in [0, 1] and noise, (count, C, size, size), of σ between low and high."""
        device, size = self.device, self.size
        which = torch.multinomial(self.areas, count, replacement=True)
        place = torch.rand(2, count, device=device)
        top = (place[0] * (self.heights[which] - size + 1)).long()
        left = (place[1] * (self.widths[which] - size + 1)).long()
        line = torch.arange(size, device=device)
        flips = torch.randint(0, 2, (3, count, 1), device=device, dtype=torch.bool)
        down = torch.where(flips[0], size - 1 - line, line)
        along = torch.where(flips[1], size - 1 - line, line)
        width = self.widths[which]
        rows = self.starts[which, None] + (top[:, None] + down) * width[:, None]
        columns = left[:, None] + along
        index = rows[:, :, None] + columns[:, None, :]
        index = torch.where(flips[2][:, :, None], index.transpose(1, 2), index)
        x = self.pixels[index].permute(0, 3, 1, 2).float() / 255
        sigma = low + (high - low) * torch.rand(count, 1, 1, 1, device=device)
        return x, torch.randn_like(x) * (sigma / 255)


def psnr(network: nn.Module, folder: Path, channels: int, sigma: float) -> float:
    """Mean over the images of a folder, by the protocol "kair"."""
    device = next(network.parameters()).device
    values = []
    for pixels in read_folder(folder, channels):
        clean = np.asarray(pixels, np.float32).reshape(*pixels.shape[:2], channels) / 255
        noise = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
        noisy = (clean + noise).astype(np.float32)
        x = torch.from_numpy(noisy).permute(2, 0, 1)[None].to(device)
        with torch.no_grad():
            y = (network(x).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).double().cpu().numpy()
        error = float(np.mean((y - np.asarray(clean * 255, np.float64)) ** 2))
        values.append(20 * math.log10(255) - 10 * math.log10(error))
    return float(np.mean(values))


def noise_range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    return float(low), float(high or low)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of clean images")
    parser.add_argument("out", type=Path, help="file of the result, .safetensors")
    parser.add_argument("--init", help="name or file of the network to start from")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--sigma", type=noise_range, default=(25.0, 25.0), help="LOW-HIGH or one")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, start to file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val", type=Path, help="folder of clean images for a last PSNR")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low, high = args.sigma
    torch.manual_seed(args.seed)
    choose(args.batch_size, args.patch_size, device)
    patches = Patches(args.data, args.channels, args.patch_size, device)

    network = XDnCNN(channels=args.channels, backend="torch")
    if args.init:
        _start_from(network, args.init)
    average = copy.deepcopy(network).to(device)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cuda":
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.__class__ = FastDepthwise
            elif isinstance(module, Gaussian):
                module.__class__ = ShortGaussian
    parameters, means = list(network.parameters()), list(average.parameters())
    adam = torch.optim.Adam(parameters, lr=args.lr, fused=device.type == "cuda")

    def loss_of(noisy: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            predicted = network.predict_noise(noisy)
        return F.mse_loss(predicted.float(), noise)

    compiled = torch.compile(loss_of) if device.type == "cuda" else loss_of
    steps, total, reported = 0, 0.0, time.monotonic()
    losses = torch.zeros((), device=device)
    start = None
    end = began + 60 * args.minutes - RESERVE * min(1.0, args.minutes)
    while True:
        now = time.monotonic()
        progress = 0.0 if start is None else (now - start) / (end - start)
        if now >= end:
            break
        rise = min(1.0, progress / WARM_UP) if start is not None else 0.0
        for group in adam.param_groups:
            group["lr"] = args.lr * rise * (0.5005 + 0.4995 * math.cos(math.pi * progress))
        clean, noise = patches.draw(args.batch_size, low, high)
        noisy = (clean + noise).contiguous(memory_format=torch.channels_last)
        loss = compiled(noisy, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        steps += 1
        with torch.no_grad():
            decay = min(AVERAGE, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(means, parameters, 1 - decay)
            losses += loss.detach()
        if steps % 50 == 0 or start is None:
            total = float(losses)  # waits for the device, so that the clock is the device's
            if not math.isfinite(total):
                raise SystemExit(f"the loss is not finite at step {steps}")
        if start is None:  # the first step compiled
            start = time.monotonic()
            print(f"first step after {start - began:.0f} s", flush=True)
            losses.zero_()
        elif steps % 50 == 0 and time.monotonic() - reported > 15:
            reported = time.monotonic()
            rate = (steps - 1) * args.batch_size * args.patch_size**2 / (reported - start)
            mean = -10 * math.log10(total / (steps - 1)) if steps > 1 else math.nan
            print(f"step {steps}, {rate / 1e6:.2f} Mpx/s, mean {mean:.3f} dB", flush=True)

    assert start is not None, "not even one step"
    for module in average.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    average.train()
    with torch.no_grad():
        for _ in range(STATISTICS):
            clean, noise = patches.draw(args.batch_size, low, high)
            average.predict_noise(clean + noise)
            if device.type == "cpu":
                break
    average.eval()
    sigma = f"{low:g}" if low == high else f"{low:g}-{high:g}"
    metadata = {
        "sigma": sigma,
        "recipe": f"{steps} steps of {args.batch_size} patches {args.patch_size}x"
        f"{args.patch_size}, mse, Adam, lr {args.lr:g}, warm-up and cosine, average {AVERAGE:g}, "
        f"bfloat16, seed {args.seed}, {end - start:.0f} s on one "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}",
        "data": patches.description,
        "license": "not stated",
    }
    average.cpu().save(args.out, **metadata)
    print(metadata["recipe"], flush=True)
    if args.val:
        average.to(device)
        for level in (15.0, 25.0, 50.0):
            if low <= level <= high:
                value = psnr(average, args.val, args.channels, level)
                print(f"{args.val.name}, sigma {level:g}: {value:.3f} dB", flush=True)


if __name__ == "__main__":
    main()
