"""Time training steps of models of timm, accelerated and as they are.

    python tools/real_models.py [MODEL ...] --size 64 --batch 8 --threads 2

Random weights, nothing is downloaded. `accelerate` puts our depthwise convolutions in place of
nn.Conv2d; both models share their weights and see the same images, in turns. Printed: how many
modules were replaced, the largest relative difference of a parameter's gradient (in float64, where
rounding does not hide a mistake), and the medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import timm
import torch
from torch import nn

from xunit_rs import DepthwiseConv2d, accelerate


def step(model: nn.Module, images: torch.Tensor) -> None:
    model.zero_grad()
    model(images).square().mean().backward()


def difference(model: nn.Module, twin: nn.Module, images: torch.Tensor) -> float:
    pair = [copy.deepcopy(m).double() for m in (model, twin)]
    for m in pair:
        torch.manual_seed(0)
        step(m, images.double())
    grads = [
        (a.grad, b.grad)
        for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    # What is zero but for rounding, as that of a bias before a batch norm, has no scale of its own.
    least = 1e-6 * max(b.abs().max().item() for _, b in grads)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(least)).item() for a, b in grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["convnext_atto", "efficientnet_b0"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | layout | replaced | gradients differ by | ours, ms | PyTorch, ms | |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        plain = timm.create_model(name, pretrained=False).train()
        ours = copy.deepcopy(plain)
        ours = accelerate(ours) or ours
        count = sum(isinstance(m, DepthwiseConv2d) for m in ours.modules())
        images = torch.randn(args.batch, 3, args.size, args.size)
        apart = difference(ours, plain, images)
        for layout in (torch.contiguous_format, torch.channels_last):
            models = [m.to(memory_format=layout) for m in (ours, plain)]
            x = images.contiguous(memory_format=layout)
            times: list[list[float]] = [[], []]
            for i in range(args.rounds + 1):
                for model, found in zip(models, times, strict=True):
                    start = time.perf_counter()
                    step(model, x)
                    if i:
                        found.append(1e3 * (time.perf_counter() - start))
            a, b = map(statistics.median, times)
            kind = "channels_last" if layout is torch.channels_last else "NCHW"
            print(f"| {name} | {kind} | {count} | {apart:.1e} | {a:.0f} | {b:.0f} | {b / a:.2f}× |")


if __name__ == "__main__":
    main()
