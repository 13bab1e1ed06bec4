"""Convert real models of torchvision and timm, check what comes of it, and time it.

    python tools/real_models.py sites [MODEL ...] --out docs/models.md
    python tools/real_models.py time [MODEL ...] --size 64 --batch 8 --threads 2

Random weights, nothing is downloaded. A model is named by its library and its name there.

sites: for each model the calls of ReLUs that `find_relus` sees, those that `replace_relu` converts
and why not the others (via torch.fx where there are functional relus), and what `accelerate` swaps;
then one training step in float64 by the kernels and by the plain path, from the same weights: the
outputs are finite, and the largest relative difference of a parameter's gradient is printed; then
torch.export of both, where it exports the model as it was.
time: training steps of the model accelerated and as it was, from the same weights and on the same
images, in turns: how many modules were swapped, how far gradients are apart, and the medians.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xunit_rs import accelerate, find_relus, replace_relu, xUnitS

MODELS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/densenet121",
    "torchvision/googlenet",
    "torchvision/vgg11_bn",
    "torchvision/mobilenet_v2",
    "torchvision/convnext_tiny",
    "torchvision/deeplabv3_resnet50",
    "timm/resnet50",
    "timm/convnext_atto",
    "timm/mobilenetv3_small_100",
    "timm/efficientnet_b0",
    "timm/hrnet_w18_small",
)
TIMED = ("timm/convnext_atto", "timm/efficientnet_b0")
HEAD = """# Real models

What `replace_relu` and `accelerate` do with models as they come, by `tools/real_models.py sites`:
random weights, two images of 64×64. *Calls* are the calls of ReLUs in one forward, *converted*
those that became an `xUnitS`; models with functional relus were converted with `via="fx"`.
*Swapped* are depthwise convolutions that `accelerate` replaced. *Gradients* is the largest relative
difference of a parameter's gradient after one training step between the kernels and the plain path,
in float64, every output finite.
*Export*: whether `torch.export` takes the model before and after. The times are of `find_relus`.

| model | calls | converted | left, and why | swapped | gradients | export | find_relus, s |
|---|---|---|---|---|---|---|---|
"""


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        return timm.create_model(model, pretrained=False)
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if "deeplab" in model:
        options["weights_backbone"] = None
    if model == "googlenet":  # its auxiliary heads run in training only, which torch.fx cannot keep
        options |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(model, **options)


def tensor(out: Any) -> torch.Tensor:
    return out["out"] if isinstance(out, dict) else out


def step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    out = tensor(model(images))
    out.square().mean().backward()
    return out.detach()


def difference(models: Iterable[nn.Module], images: torch.Tensor) -> float:
    """The largest relative difference of a parameter's gradient between two models, in float64.

    Gradients are let go as they come, as VGG in float64 is large: those of the first model lie in
    files until the second has its own.
    """
    found: list[tuple[float, float]] = []

    def store(file: Path, grad: torch.Tensor) -> None:
        grad.numpy().tofile(file)

    def compare(file: Path, grad: torch.Tensor) -> None:
        apart = 0.0
        with file.open("rb") as stored:
            for part in grad.flatten().split(1 << 20):
                other = torch.from_numpy(np.fromfile(stored, count=part.numel()))
                apart = max(apart, (part - other).abs_().max().item())
        found.append((apart, torch.linalg.vector_norm(grad, float("inf")).item()))

    with tempfile.TemporaryDirectory() as folder:
        for use, model in zip((store, compare), models, strict=True):
            model.double()

            def take(p: nn.Parameter, file: Path, use: Any = use) -> None:
                use(file, p.grad)
                p.grad = None

            hooks = [
                p.register_post_accumulate_grad_hook(
                    functools.partial(take, file=Path(folder, name))
                )
                for name, p in model.named_parameters()
            ]
            torch.manual_seed(0)
            if not step(model, images.double()).isfinite().all():
                raise ValueError("the output is not finite")
            for hook in hooks:
                hook.remove()
        if len(found) != len(list(Path(folder).iterdir())):
            raise ValueError("some parameters have a gradient in one model only")
    # What is zero but for rounding, as that of a bias before a batch norm, has no scale of its own.
    least = 1e-6 * max(scale for _, scale in found)
    return max(apart / max(scale, least) for apart, scale in found)


def by_kernels_and_plainly(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    for m in model.modules():
        if hasattr(m, "backend"):
            m.backend = "torch"
    yield model


def exports(model: nn.Module, images: torch.Tensor) -> bool:
    try:
        program = torch.export.export(model.eval(), (images,), strict=False)
    except Exception:
        return False
    with torch.no_grad():
        torch.testing.assert_close(tensor(program.module()(images)), tensor(model(images)))
    return True


def sites(name: str) -> str:
    model, images = create(name).train(), torch.randn(2, 3, 64, 64)
    start = time.perf_counter()
    table = find_relus(model, images)
    took = time.perf_counter() - start
    via = "fx" if any("functional" in site.reason for site in table) else "modules"
    table = find_relus(model, images, via=via)
    left = collections.Counter(site.reason for site in table if site.action == "skip")
    new = copy.deepcopy(model)
    converted = sum(site.action == "convert" for site in table)
    if converted:
        unit = functools.partial(xUnitS, kernel_size=7)
        new = replace_relu(model, images, unit=unit, via=via)
    swaps = accelerate(new)
    for swap in swaps:
        if swap.action == "leave":
            left[f"convolution: {swap.reason}"] += 1
    swapped = sum(swap.action == "swap" for swap in swaps)
    exported = "-"
    if exports(model, images):
        exported = "both" if exports(new, images) else "only before"
    del model
    gc.collect()  # the exported programs hold it in a cycle
    new.train()
    apart = difference(by_kernels_and_plainly(new), images) if converted or swapped else None
    row = (
        f"{name.replace('/', ' ')}{', via fx' if via == 'fx' else ''}",
        str(len(table)),
        str(converted),
        "; ".join(f"{n}: {reason}" for reason, n in left.items()) or "-",
        str(swapped),
        "-" if apart is None else f"{apart:.0e}",
        exported,
        f"{took:.2f}",
    )
    return f"| {' | '.join(row)} |"


def timing(name: str, size: int, batch: int, rounds: int) -> list[str]:
    plain = create(name).train()
    ours = copy.deepcopy(plain)
    count = sum(swap.action == "swap" for swap in accelerate(ours))
    images = torch.randn(batch, 3, size, size)
    apart = difference(map(copy.deepcopy, (ours, plain)), images)
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        models = [m.to(memory_format=layout) for m in (ours, plain)]
        x = images.contiguous(memory_format=layout)
        times: list[list[float]] = [[], []]
        for i in range(rounds + 1):
            for model, found in zip(models, times, strict=True):
                start = time.perf_counter()
                step(model, x)
                if i:
                    found.append(1e3 * (time.perf_counter() - start))
        a, b = map(statistics.median, times)
        kind = "channels_last" if layout is torch.channels_last else "NCHW"
        rows.append(
            f"| {name} | {kind} | {count} | {apart:.1e} | {a:.0f} | {b:.0f} | {b / a:.2f}× |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sites", "time"))
    parser.add_argument("models", nargs="*", metavar="LIBRARY/MODEL")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where to write the page of sites")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "time":
        print("| model | layout | swapped | gradients differ by | ours, ms | PyTorch, ms | |")
        print("|---|---|---|---|---|---|---|")
        for name in args.models or TIMED:
            print(*timing(name, args.size, args.batch, args.rounds), sep="\n", flush=True)
        return
    rows = []
    for name in args.models or MODELS:
        try:
            rows.append(sites(name))
        except Exception as error:
            sys.exit(f"{name}: {error}")
        print(rows[-1], flush=True)
    if args.out:
        args.out.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
