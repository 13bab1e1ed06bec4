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
# # Half the parameters
#
# The paper's claim is that a network of xUnits needs fewer layers, and about half the parameters,
# for the quality of one of ReLUs. Here in small: denoisers of 1, 3 and 5 blocks, with ReLUs and
# with xUnits, all else the same, each trained for the same number of steps on the same noisy
# patches. Half a minute of training is no proof; the published figures are shown beside.

# %%
import copy
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import nn

from xunit_rs.evaluation import PUBLISHED, evaluate
from xunit_rs.models import DnCNN, XDnCNN

SMALL = os.environ.get("XUNIT_NOTEBOOK_SIZE") == "small"
DEPTHS = (1, 3, 5)
STEPS, FEATURES, BATCH = (4, 8, 4) if SMALL else (2500, 16, 4)
SIGMA = 25  # of 255
plt.rcParams["figure.dpi"] = 72


def grey(photo):
    return np.asarray(Image.fromarray(photo).convert("L"))


training = [grey(p) for p in (data.astronaut(), data.coffee(), data.rocket(), data.coins())]
test = {"camera": data.camera()[50:306, 130:386], "chelsea": grey(data.chelsea())[20:276, 90:346]}

# %% [markdown]
# ## Networks
#
# Blocks of BatchNorm, convolution 3×3 and activation (the first without BatchNorm), and a
# convolution that predicts the noise: the network of the paper. The ones with ReLUs have the same
# convolutions. At equal depth the xUnits add parameters, a 9×9 kernel and two BatchNorms for
# each channel; so look at the parameters as well as at the depth. With the 16 features of these
# networks that is more than half of a 3×3 convolution, with the 64 of the paper a seventh.


# %%
def network(depth, activation):
    torch.manual_seed(0)
    model = XDnCNN(features=FEATURES, depth=depth)
    if activation == "ReLU":
        for block in model.blocks:
            block.xunit = nn.ReLU()
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


networks = {(a, d): network(d, a) for a in ("ReLU", "xUnit") for d in DEPTHS}
print(f"{'':8}" + "".join(f"{d:>4} block(s)" for d in DEPTHS))
for activation in ("ReLU", "xUnit"):
    row = (f"{parameters(networks[activation, d]):13,}" for d in DEPTHS)
    print(f"{activation:8}" + "".join(row))


# %% [markdown]
# ## Training
#
# σ = 25, patches of 40×40, Adam with a learning rate that falls from 0.005 along a cosine. The
# seconds are of processor time: a step with xUnits takes longer.


# %%
def batch(rng, side=40):
    patches = []
    for number in rng.integers(len(training), size=BATCH):
        photo = training[number]
        top, left = (rng.integers(size - side) for size in photo.shape)
        patch = np.rot90(photo[top : top + side, left : left + side], rng.integers(4))
        patches.append(patch[None].astype(np.float32) / 255)
    clean = np.stack(patches)
    noise = rng.normal(0, SIGMA / 255, clean.shape).astype(np.float32)
    return torch.from_numpy(clean), torch.from_numpy(noise)


def train(model):
    rng = np.random.default_rng(0)  # the same batches for every network
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        clean, noise = batch(rng)
        loss = F.mse_loss(model.predict_noise(clean + noise), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


scores, seconds = {}, {}
with tempfile.TemporaryDirectory() as folder:
    for name, pixels in test.items():
        Image.fromarray(pixels).save(Path(folder) / f"{name}.png")
    for key, model in networks.items():
        start = time.process_time()
        train(model.train())
        seconds[key] = time.process_time() - start
        result = evaluate(model, folder, SIGMA)
        scores[key] = result.psnr
    print(f"{STEPS} steps each; PSNR of {result.images} pictures, protocol {result.protocol}")

print(f"{'':8}" + "".join(f"{d:>17} block(s)" for d in DEPTHS))
for activation in ("ReLU", "xUnit"):
    cells = (f"{scores[activation, d]:8.2f} dB {seconds[activation, d]:8.1f} s   " for d in DEPTHS)
    print(f"{activation:11}" + "".join(f"{cell:26}" for cell in cells))
print(f"noisy: {result.noisy_psnr:.2f} dB")

# %% [markdown]
# ## Depth, parameters and PSNR
#
# Left and middle: what was trained above. Right: published networks, trained to the end, on another
# test set (BSD68, σ = 25): 17 convolutions with ReLUs, 9 with xUnits. The paper also has a figure
# of PSNR over depth; its points are left out, for want of a source that gives them as numbers.
#
# In the run shown, one block of xUnits comes near three of ReLUs with a third of the parameters,
# and three are ahead of five with as many.

# %%
published = []
for method, full in (("DnCNN-S", DnCNN()), ("xDnCNN", XDnCNN())):
    (row,) = (p for p in PUBLISHED if p.method == method and p.data == "BSD68")
    published.append((method, parameters(full), row.psnr[SIGMA]))
    print(f"{method:8} {parameters(full):9,} parameters, {row.psnr[SIGMA]} dB ({row.source})")

colours = {"ReLU": "tab:orange", "xUnit": "tab:blue"}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for activation, colour in colours.items():
    found = [scores[activation, d] for d in DEPTHS]
    counts = [parameters(networks[activation, d]) / 1e3 for d in DEPTHS]
    axes[0].plot(DEPTHS, found, "o-", color=colour, label=activation)
    axes[1].plot(counts, found, "o-", color=colour, label=activation)
axes[0].set(xlabel="blocks", ylabel="PSNR in dB", title="trained here", xticks=DEPTHS)
axes[1].set(xlabel="thousand parameters", title="trained here")
for (method, count, value), colour in zip(published, colours.values(), strict=True):
    axes[2].plot(count / 1e3, value, "s", color=colour, label=method)
axes[2].set(
    xlabel="thousand parameters", title="published, BSD68", xlim=(0, 650), ylim=(28.5, 29.5)
)
for axis in axes:
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Activation maps
#
# Of the networks of 5 blocks, on one noisy picture. A map is called dead here if its largest value
# is below 1 % of the largest of its layer; an element is called silent if it is below 0.1 % of it.


# %%
clean = torch.from_numpy(test["camera"].copy())[None, None] / 255
noise = np.random.default_rng(1).normal(0, SIGMA / 255, clean.shape).astype(np.float32)
noisy = clean + torch.from_numpy(noise)
dead, silent, shown = {}, {}, {}
for activation in colours:
    model = copy.deepcopy(networks[activation, DEPTHS[-1]]).eval()
    maps = []
    for block in model.blocks:
        block.xunit.register_forward_hook(lambda m, a, out, maps=maps: maps.append(out[0]))
    with torch.no_grad():
        model(noisy)
    dead[activation] = [
        (m.abs().amax((1, 2)) < 0.01 * m.abs().max()).float().mean().item() for m in maps
    ]
    silent[activation] = [(m.abs() < 0.001 * m.abs().max()).float().mean().item() for m in maps]
    shown[activation] = maps[2]

print(f"{'block':26}" + "".join(f"{i + 1:7}" for i in range(DEPTHS[-1])))
for title, table in (("dead maps", dead), ("silent elements", silent)):
    for activation, row in table.items():
        print(f"{title + ', ' + activation:26}" + "".join(f"{value:7.1%}" for value in row))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
position = np.arange(1, DEPTHS[-1] + 1)
for axis, title, table in zip(axes, ("dead maps", "silent elements"), (dead, silent), strict=True):
    for i, (activation, colour) in enumerate(colours.items()):
        heights = 100 * np.array(table[activation])
        axis.bar(position + 0.4 * i - 0.2, heights, 0.4, color=colour, label=activation)
    axis.set(xlabel="block", ylabel="%", title=title, ylim=(0, 100))
    axis.legend()
plt.show()

# %% [markdown]
# Four maps of the third block of each, those with the most variance, each on its own scale around
# 0 (white):

# %%
figure, axes = plt.subplots(2, 4, figsize=(9, 4.9), layout="constrained")
for row, (activation, maps) in zip(axes, shown.items(), strict=True):
    chosen = maps.flatten(1).var(1).topk(4).indices
    for axis, channel in zip(row, chosen, strict=True):
        bound = maps[channel].abs().quantile(0.99).item() or 1.0
        axis.imshow(maps[channel], cmap="RdBu", vmin=-bound, vmax=bound)
        axis.set_title(f"{activation}, channel {channel}")
        axis.axis("off")
plt.show()
