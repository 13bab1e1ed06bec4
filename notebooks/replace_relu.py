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
# # xUnits in a model that exists
#
# `replace_relu` puts an xUnit in place of every ReLU. Here in torchvision's ResNet-18 and in a
# DnCNN, both with random weights, trained for a few steps on crops of the photos that come with
# scikit-image. This shows how, and what changes; so few steps do not say which is better
# (`half_the_parameters` takes a few more).

# %%
import functools
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torchvision.models import resnet18

from xunit_rs import find_relus, info, replace_relu, xUnit
from xunit_rs.models import DnCNN

SMALL = os.environ.get("XUNIT_NOTEBOOK_SIZE") == "small"
plt.rcParams["figure.dpi"] = 72

photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
photos = [torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in photos]


def crops(count, side, rng):
    """Random crops, (count, 3, side, side), and the numbers of their photos."""
    which = rng.integers(len(photos), size=count)
    parts = []
    for number in which:
        _, height, width = photos[number].shape
        top, left = rng.integers(height - side), rng.integers(width - side)
        parts.append(photos[number][:, top : top + side, left : left + side])
    return torch.stack(parts), torch.from_numpy(which)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def train(model, steps, loss_of, lr=1e-3):
    """Losses, and the time of the fastest step in ms."""
    rng = np.random.default_rng(0)  # the same batches for every model
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = loss_of(model, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return losses, 1e3 * min(times)


def smooth(values, width):
    return np.convolve(values, np.ones(width) / width, mode="valid")


# %% [markdown]
# ## ResNet-18
#
# `find_relus` says what would become of each ReLU. ResNet-18 calls the ReLU of a block twice: by
# default each call gets a unit of its own.

# %%
torch.manual_seed(0)
resnet = resnet18(weights=None, num_classes=len(photos))
print(find_relus(resnet, torch.zeros(1, 3, 64, 64)))

# %% [markdown]
# The unit is any callable of the number of channels. Pretrained weights of the other layers would
# be kept; the units are new, so the model has to be trained again.

# %%
unit = functools.partial(xUnit, kernel_size=7, batch_norm=True)
converted = replace_relu(resnet, torch.zeros(1, 3, 64, 64), unit=unit)
print(converted.layer1[0])
for name, model in (("ReLU", resnet), ("xUnit", converted)):
    print(f"{name:6} {parameters(model):,} parameters")
print("what runs the units:", *set(info(converted).values()))

# %% [markdown]
# Trained to tell which photo a crop is of:


# %%
def classify(model, rng):
    x, which = crops(4 if SMALL else 16, 64, rng)
    return F.cross_entropy(model(x), which)


steps = 4 if SMALL else 60
history = {}
for name, model in (("ReLU", resnet), ("xUnit", converted)):
    history[name], milliseconds = train(model, steps, classify)
    model.eval()
    x, which = crops(8 if SMALL else 256, 64, np.random.default_rng(1))
    with torch.no_grad():
        right = (model(x).argmax(1) == which).float().mean()
    print(f"{name:6} {milliseconds:6.0f} ms a step, {right:.0%} of other crops right")

# %%
width = 2 if SMALL else 8
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, losses in history.items():
    axis.plot(np.arange(width, steps + 1), smooth(losses, width), label=name)
axis.set(xlabel="step", ylabel=f"cross entropy, mean of {width}", title="ResNet-18")
axis.legend()
plt.show()

# %% [markdown]
# ## DnCNN
#
# A small one: grey, 16 features, 4 blocks. With so few features the units are a large share of the
# parameters: a 9×9 kernel for each of 16 channels is more than half of a 3×3 convolution of 16 to
# 16, and a seventh of one of 64 to 64.

# %%
torch.manual_seed(0)
plain = DnCNN(features=8 if SMALL else 16, depth=2 if SMALL else 4)
unit = functools.partial(xUnit, kernel_size=9, batch_norm=True, gate="gaussian")
spatial = replace_relu(plain, torch.zeros(1, 1, 40, 40), unit=unit)
denoisers = {"ReLU": plain, "xUnit": spatial}


def denoise(model, rng):
    x = crops(4, 40, rng)[0].mean(1, keepdim=True)
    noise = torch.from_numpy(rng.normal(0, 25 / 255, x.shape).astype(np.float32))
    return F.mse_loss(model(x + noise), x)


steps = 5 if SMALL else 1200
for name, model in denoisers.items():
    history[name], milliseconds = train(model, steps, denoise, lr=1e-2)
    print(f"{name:6} {parameters(model):7,} parameters, {milliseconds:6.1f} ms a step")

# %% [markdown]
# A picture that neither has seen, and the loss on the way. Both have had seconds of training.

# %%
side = 96 if SMALL else 200
clean = torch.from_numpy(data.camera()[60 : 60 + side, 160 : 160 + side].copy())[None, None] / 255
noise = np.random.default_rng(0).normal(0, 25 / 255, clean.shape).astype(np.float32)
noisy = clean + torch.from_numpy(noise)
pictures = {"σ = 25": noisy}
with torch.no_grad():
    pictures |= {name: model.eval()(noisy) for name, model in denoisers.items()}

figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.2), layout="constrained")
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    error = F.mse_loss(picture.clamp(0, 1), clean)
    axis.imshow(picture[0, 0], cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"{title}, {-10 * error.log10():.2f} dB")
    axis.axis("off")
plt.show()

width = 2 if SMALL else 50
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name in denoisers:
    axis.plot(np.arange(width, steps + 1), smooth(history[name], width), label=name)
axis.set(xlabel="step", ylabel=f"squared error, mean of {width}", title="DnCNN", yscale="log")
axis.legend()
plt.show()

# %% [markdown]
# ## What a unit does
#
# A ReLU's gate is 0 or 1, by the sign of the one pixel. That of an xUnit lies between and follows
# the neighbourhood. The four channels of the first activation with the most contrast in the gate:

# %%
seen = {}


def look(name):
    def hook(module, args, out):
        x = args[0]
        gate = module.features(x) if isinstance(module, xUnit) else (x > 0).float()
        seen[name] = gate[0]

    return hook


with torch.no_grad():
    for name, model in denoisers.items():
        handle = model.get_submodule("relu").register_forward_hook(look(name))
        model(noisy)
        handle.remove()

figure, axes = plt.subplots(2, 4, figsize=(9, 5), layout="constrained")
for row, (name, gates) in zip(axes, seen.items(), strict=True):
    chosen = gates.flatten(1).std(1).topk(4).indices
    for axis, channel in zip(row, chosen, strict=True):
        shown = axis.imshow(gates[channel], cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"{name}, channel {channel}")
        axis.axis("off")
figure.colorbar(shown, ax=axes, shrink=0.6, label="gate")
plt.show()
