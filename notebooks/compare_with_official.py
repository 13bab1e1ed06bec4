# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beside the official code
#
# The modules of [kligvasser/xUnit](https://github.com/kligvasser/xUnit) against ours: outputs,
# gradients, state dict, time, memory; then the authors' weights.
#
# - `XUNIT_OFFICIAL`: path of a checkout of that repository. Without it ours are compared with their
#   plain definition in PyTorch (`backend="torch"`), and the notebook says so.
# - `XUNIT_OFFICIAL_CHECKPOINT`: the authors' weights for σ = 25, `xdncnn_res_f64k3k9_s25.pkl`, from
#   the history of that repository.
# - `XUNIT_TEST_IMAGES`: a folder of test images, such as BSD68.

# %%
import functools
import importlib.util
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data
from torch import nn

import xunit_rs
from xunit_rs import Denoiser, accelerate, checkpoints
from xunit_rs.evaluation import PUBLISHED, evaluate, psnr
from xunit_rs.models import from_pretrained

SMALL = os.environ.get("XUNIT_NOTEBOOK_SIZE") == "small"
NAMES = ("xUnit", "xUnitS", "xUnitD")
plt.rcParams["figure.dpi"] = 72
torch.manual_seed(0)

official = {name: functools.partial(getattr(xunit_rs, name), backend="torch") for name in NAMES}
peer = "plain"
checkout = os.environ.get("XUNIT_OFFICIAL")
if checkout:
    file = Path(checkout) / "denoising/models/modules/activations.py"
    spec = importlib.util.spec_from_file_location("official_activations", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    official = {name: getattr(module, name) for name in NAMES}
    peer = "official"
    print("Compared with the official modules.")
else:
    print("XUNIT_OFFICIAL is not set: compared with the plain definition, not the official code.")
ours = {name: functools.partial(getattr(xunit_rs, name), backend="rust") for name in NAMES}


# %% [markdown]
# ## State dict, outputs, gradients
#
# The same keys in the same order, and weights load both ways. Output and gradients, of input and
# parameters, in training mode, from the same weights: the difference ‖a − b‖ / ‖b‖ from what the
# other side gives in float64, of both in float32, where it is rounding, and of ours in float64.


# %%
def run(module, x, grad):
    """Output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad)]


def difference(a, b):
    """Of two lists of tensors, each taken as one."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


n, c, side = (2, 8, 24) if SMALL else (4, 64, 64)
print(f"{'':8}{'keys':6}{'':19}{'output':>12}{'input':>12}{'parameters':>12}")
for name in NAMES:
    torch.manual_seed(0)
    theirs, mine = official[name](c, 7, True), ours[name](c, 7, True)
    for parameter in theirs.parameters():  # BatchNorm at its start would hide mistakes
        nn.init.normal_(parameter, 0.5, 0.2)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    same = list(mine.state_dict()) == list(theirs.state_dict())
    x, grad = torch.randn(2, n, c, side, side)
    results = {"ours float32": run(mine, x, grad), f"{peer} float32": run(theirs, x, grad)}
    x, grad = x.double(), grad.double()
    results["ours float64"] = run(mine.double(), x, grad)
    expected = run(theirs.double(), x, grad)
    for label, found in results.items():
        errors = [
            difference(found[part], expected[part])
            for part in (slice(1), slice(1, 2), slice(2, None))
        ]
        print(
            f"{name:8}{'same' if same else 'OTHER':6}{label:19}"
            + "".join(f"{error:12.1e}" for error in errors)
        )

# %% [markdown]
# ## In a model
#
# `accelerate` puts our units in the place of the official ones of a model that exists. Both classes
# have the same name; parameters are shared.

# %%
model = nn.Sequential(nn.Conv2d(1, c, 3, padding=1), official["xUnit"](c, 7, True), nn.ReLU())
x = torch.randn(n, 1, side, side)
before = model(x)
print(accelerate(model) if checkout else "No official units here.")
print(f"difference of the output: {difference([model(x)], [before]):.1e}")

# %% [markdown]
# ## Time
#
# A training step, forward and backward, of an `xUnit` with BatchNorm: the fastest of 15 that took
# turns, in this run on this machine. PyTorch is shown in both of its memory formats.

# %%
shape = (2, 16, 32, 32) if SMALL else (8, 64, 64, 64)
sizes, rounds = ((3, 7), 3) if SMALL else ((3, 5, 7, 9), 15)
formats = {
    "ours": (ours, torch.contiguous_format),
    peer: (official, torch.contiguous_format),
    f"{peer}, channels_last": (official, torch.channels_last),
}
data_of = {
    layout: [t.contiguous(memory_format=layout) for t in torch.randn(2, *shape)]
    for layout in (torch.contiguous_format, torch.channels_last)
}
calls = {
    (label, k): functools.partial(
        run, units["xUnit"](shape[1], k, True).to(memory_format=layout), *data_of[layout]
    )
    for label, (units, layout) in formats.items()
    for k in sizes
}
taken = {key: [] for key in calls}
for _ in range(rounds + 1):  # the first of each is slower
    for key, call in calls.items():
        start = time.perf_counter()
        call()
        taken[key].append(1e3 * (time.perf_counter() - start))
times = {label: [min(taken[label, k]) for k in sizes] for label in formats}

print(f"{'×'.join(map(str, shape))}, {torch.get_num_threads()} thread(s), ms")
print(f"{'k':24}" + "".join(f"{k:8}" for k in sizes))
for label, row in times.items():
    print(f"{label:24}" + "".join(f"{t:8.1f}" for t in row))

# %% [markdown]
# ## Memory
#
# What a unit keeps from forward to backward, in sizes of its input; parameters are not counted.


# %%
def kept(unit, x):
    """Bytes of the storages saved for the backward pass, the input among them."""
    own = {p.untyped_storage().data_ptr() for p in [*unit.parameters(), *unit.buffers()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unit(x)
        total = sum(found.values())
    del out
    return total


x = torch.randn(shape, requires_grad=True)
memory = {
    label: [kept(units[name](shape[1], 7, True), x) / x.nbytes for name in NAMES]
    for label, units in (("ours", ours), (peer, official))
}
print(f"{'':10}" + "".join(f"{name:>8}" for name in NAMES))
for label, row in memory.items():
    print(f"{label:10}" + "".join(f"{value:8.2f}" for value in row))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for label, row in times.items():
    left.plot(sizes, row, "o-", label=label)
left.set(xlabel="kernel size", ylabel="ms", title="Training step of an xUnit", xticks=sizes)
left.set_ylim(bottom=0)
left.legend()
position = np.arange(len(NAMES))
for i, (label, row) in enumerate(memory.items()):
    right.bar(position + 0.4 * i - 0.2, row, 0.4, label=label)
right.set_xticks(position, NAMES)
right.set(ylabel="sizes of the input", title="Kept for the backward pass")
right.legend()
plt.show()

# %% [markdown]
# ## The authors' weights
#
# The file is read by its keys, and runs in the Denoiser without PyTorch. The protocol is that of
# the official code of 2018 (the result not rounded), the noise from seed 0: with other noise, and
# other copies of the same 68 images, the PSNR differs by some hundredths of a dB.

# %%
checkpoint = os.environ.get("XUNIT_OFFICIAL_CHECKPOINT")
images = os.environ.get("XUNIT_TEST_IMAGES")
if checkpoint:
    network = from_pretrained(checkpoint)
    print(f"{network.architecture}, {sum(p.numel() for p in network.parameters()):,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "official.safetensors"
        checkpoints.convert(checkpoint, converted)
        denoiser = Denoiser.from_pretrained(converted)
else:
    print("XUNIT_OFFICIAL_CHECKPOINT is not set: the package's own gray-sigma25 in its place.")
    network = from_pretrained("gray-sigma25")
    denoiser = Denoiser.from_pretrained("gray-sigma25")

if images:
    result = evaluate(denoiser, images, 25, "official2018")
    print(f"{result.images} images, σ = 25, {result.protocol}: {result.psnr:.3f} dB")
    print(f"the noisy images: {result.noisy_psnr:.3f} dB")
else:
    print("XUNIT_TEST_IMAGES is not set: PSNR of one picture below only.")
for row in PUBLISHED:
    if row.method == "xDnCNN" and 25 in row.psnr:
        print(f"published: {row.data}, {row.images} images, {row.psnr[25]} dB ({row.source})")

# %%
side = 96 if SMALL else 200
clean = data.camera()[60 : 60 + side, 160 : 160 + side].astype(np.float32) / 255
noisy = clean + np.random.default_rng(0).normal(0, 25 / 255, clean.shape).astype(np.float32)
pictures = {"clean": clean, "σ = 25": noisy, "denoised": denoiser(noisy)}
with torch.no_grad():
    by_torch = network(torch.from_numpy(noisy)[None, None])[0, 0].numpy()
largest = np.abs(by_torch - pictures["denoised"]).max()
print(f"largest difference of the Denoiser from PyTorch, of white: {largest:.1e}")

figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
    value = "" if picture is clean else f", {psnr(np.clip(picture, 0, 1), clean):.2f} dB"
    axis.set_title(title + value)
    axis.axis("off")
plt.show()
