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
# # Denoise your photos
#
# `Denoiser` takes a numpy array, a PIL image or a path, and gives its own kind back. It needs no
# PyTorch. Set `XUNIT_NOTEBOOK_PHOTO` to the path of a photo of yours to see it at the end.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image
from skimage import data

from xunit_rs import Denoiser
from xunit_rs.denoise import pretrained_names
from xunit_rs.evaluation import psnr, ssim
from xunit_rs.noise import estimate_sigma, nearest_model

SMALL = os.environ.get("XUNIT_NOTEBOOK_SIZE") == "small"
plt.rcParams["figure.dpi"] = 72
# Noise as PNG would make this file five times as large.
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80, "subsampling": 0})


def show(pictures, columns=3):
    """Pictures of one size, arrays or PIL images, pixel by pixel under their titles."""
    arrays = {title: np.asarray(picture) for title, picture in pictures.items()}
    height, width = next(iter(arrays.values())).shape[:2]
    rows = -(-len(arrays) // columns)
    cell = np.array([width + 8, height + 40])
    size = cell * [columns, rows]
    figure = plt.figure(figsize=size / 72)
    for i, (title, picture) in enumerate(arrays.items()):
        corner = cell * [i % columns, rows - 1 - i // columns]
        axis = figure.add_axes((*(corner / size), *([width, height] / size)))
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## A picture with noise
#
# These networks come with the package. `gray-sigma25` was trained for noise of standard deviation
# 25 (of 255), the two blind ones for anything from 0 to 55.

# %%
print(*pretrained_names(), sep="\n")
path = Path("..") / "samples" / "noisy.png"
noisy = Image.open(path)
denoiser = Denoiser.from_pretrained("gray-sigma25")
clean = denoiser(noisy)
print(type(clean).__name__, clean.mode, clean.size)
assert clean == denoiser(path)
assert np.array_equal(clean, denoiser(np.asarray(noisy)))
show({"samples/noisy.png": noisy, "denoised by gray-sigma25": clean}, columns=2)

# %% [markdown]
# ## How noisy is it?
#
# `estimate_sigma` says, and `nearest_model` which of the networks suits that.

# %%
sigma = estimate_sigma(noisy)
name, _ = nearest_model(sigma, channels=1)
print(f"{path.name}: σ = {sigma:.1f}, which suits {name}")

# %% [markdown]
# `compare` shows the picture, what becomes of it, and what was taken away, with an estimate of the
# noise of both. If one can recognise the picture in the difference, detail was lost with the noise.

# %%
sheet = Denoiser.from_pretrained(name).compare(noisy)
show({"": sheet}, columns=1)

# %% [markdown]
# ## How good is it?
#
# For that the clean picture has to be known: a photo, to which we add the noise. The network sees
# colours together (`color-blind`), and is not told how much noise there is. The columns are the
# noise; PSNR and SSIM are those of the pictures shown. What `estimate_sigma` finds in them is
# printed below: fur counts as noise, and strong noise that is clipped at black and white as less.

# %%
side = 96 if SMALL else 224
photo = data.chelsea()[20 : 20 + side, 90 : 90 + side]
rng = np.random.default_rng(0)
denoiser = Denoiser.from_pretrained("color-blind")
before, after = {}, {}
for sigma in (10, 25, 50):
    noise = rng.normal(0, sigma, photo.shape)
    image = np.clip(np.rint(photo + noise), 0, 255).astype(np.uint8)
    for pictures, picture in ((before, image), (after, denoiser(image))):
        quality = f"{psnr(picture, photo, 255):.1f} dB, SSIM {ssim(picture, photo, 255):.2f}"
        name = f"σ = {sigma}" if pictures is before else f"σ = {sigma}, denoised"
        pictures[f"{name}\n{quality}"] = picture
    print(f"σ = {sigma}: estimated {estimate_sigma(image):.1f}")
show(before | after)

# %% [markdown]
# ## Strength
#
# `strength` is the share of the noise to take away: the result is
# `image + strength · (network(image) − image)`. Less than 1 leaves a little grain, and some detail
# that the network would take for noise. Whatever looks best to you, the PSNR is highest near 1.

# %%
image = np.clip(np.rint(photo + rng.normal(0, 25, photo.shape)), 0, 255).astype(np.uint8)
strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
results = {s: Denoiser.from_pretrained("color-blind", strength=s)(image) for s in strengths}
show({f"strength {s:g}": results[s] for s in (0.0, 0.5, 1.0)})

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(strengths, [psnr(results[s], photo, 255) for s in strengths], "o-")
axis.set(xlabel="strength", ylabel="PSNR in dB", title="color-blind, σ = 25")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Where the detail went
#
# What was taken away, what should have been, and the error left, around mid-grey and amplified
# four times. The error is where the detail is, and the low frequencies of the noise.


# %%
def amplified(a, b):
    return np.clip(128 + 4 * (a.astype(float) - b), 0, 255).astype(np.uint8)


clean = results[1.0]
show(
    {
        "taken away, ×4": amplified(image, clean),
        "the noise itself, ×4": amplified(image, photo),
        "error left, ×4": amplified(clean, photo),
    }
)

# %% [markdown]
# ## Kinds of image
#
# The same kind comes back: type, shape, 8 or 16 bits, and alpha as it was.

# %%
grey = Denoiser.from_pretrained("gray-blind")
part = image[:48, :64]
alpha = np.full((*part.shape[:2], 1), 200, np.uint8)
for kind, denoise, sample in (
    ("grey, 8 bits", grey, part[:, :, 0]),
    ("grey, 16 bits", grey, part[:, :, 0].astype(np.uint16) * 257),
    ("grey, float in [0, 1]", grey, part[:, :, 0] / 255),
    ("colour, 8 bits", denoiser, part),
    ("colour and alpha", denoiser, np.concatenate([part, alpha], axis=2)),
):
    result = denoise(sample)
    assert result.shape == sample.shape and result.dtype == sample.dtype
    print(f"{kind:22} {result.dtype!s:8} {result.shape}")

# %% [markdown]
# ## Your photo

# %%
path = os.environ.get("XUNIT_NOTEBOOK_PHOTO")
if path:
    mine = Image.open(path).convert("RGB")
    print(f"{mine.width}×{mine.height}, σ = {estimate_sigma(mine):.1f}")
    show({"": denoiser.compare(mine)}, columns=1)
else:
    print("XUNIT_NOTEBOOK_PHOTO is not set: no photo of yours to show.")

# %% [markdown]
# In a shell the same is `xunit-rs denoise photo.jpg --strength 0.7`, or `xunit-rs denoise photos/`
# for a folder, and keeps EXIF and colour profile. PyTorch was not needed:

# %%
print("PyTorch was imported:", "torch" in sys.modules)
