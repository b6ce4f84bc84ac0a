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
# # Train a diffusion model of handwritten digits
#
# 1,500 real digits, one model, some minutes on two CPU cores. The model learns which digit is which, so that you
# can ask it for a 7. Your own images work the same way: see the last section.

# %% tags=["parameters"]
FOLDER = "digits"  # everything is kept here; in Colab "/content/drive/MyDrive/digits" survives a disconnect
SOURCE = ""  # where to install the package from if it is missing: a folder, or "git+https://..." of your copy
MAX_STEPS = 1500  # steps of training
SAVE_INTERVAL = 250  # steps between checkpoints: what a disconnect can cost
SMALLER: dict = {}  # options that replace those below, for a quick try
STEPS = 20  # steps of sampling

# %% [markdown]
# The package is installed where it is missing, and the Drive is mounted if `FOLDER` lies on it.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("improved_diffusion") is None:
    if not SOURCE:
        raise ValueError("improved_diffusion is not installed: set SOURCE in the cell above")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE], check=True)
if FOLDER.startswith("/content/drive"):
    from google.colab import drive

    drive.mount("/content/drive")

# %%
from pathlib import Path

import numpy as np
from IPython.display import display
from PIL import Image
from sklearn.datasets import load_digits

import improved_diffusion as idf

folder = Path(FOLDER)
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The images
#
# scikit-learn brings 1,797 digits of 8x8 pixels, so there is no download. They go into two files: 1,500 digits to
# train on, and 297, written by other people, to test with. One file is read faster from a Drive than 1,500 small ones.

# %%
digits = load_digits()
pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]  # [N, 8, 8, 1], 0 to 255
np.savez(folder / "train.npz", pixels[:1500], digits.target[:1500])
np.savez(folder / "test.npz", pixels[1500:], digits.target[1500:])
display(idf.Images(pixels[:40], digits.target[:40]).grid(columns=10))

# %% [markdown]
# ## Training
#
# `resume="auto"` continues from the newest checkpoint in the run's folder. So after a disconnect, or after the stop
# button, run the notebook again: it starts where it was. A finished run is loaded.

# %%
network = dict(image_size=16, channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,1,2")
method = dict(class_cond=True, learn_sigma=True, noise_schedule="cosine", attention_resolutions="8")
pace = dict(batch_size=32, lr=2e-3, lr_schedule="one-cycle", ema_rate="0.99", log_interval=50, num_workers=0)

model = idf.train(
    folder / "train.npz",
    out_dir=folder / "run",
    max_steps=MAX_STEPS,
    save_interval=SAVE_INTERVAL,
    sample_interval=SAVE_INTERVAL,
    resume="auto",
    **{**network, **method, **pace, **SMALLER},
)
model

# %% [markdown]
# The loss falls quickly and then slowly. Images still get better when the curve looks flat.

# %%
Image.open(folder / "run/curves.png")

# %% [markdown]
# The previews show it: the first, the middle and the last that training drew, from the same noise. They are drawn by
# DDIM, which keeps more mistakes of a briefly trained model than the sampler below.

# %%
previews = sorted((folder / "run/previews").glob("step_??????.png"))
for path in dict.fromkeys([previews[0], previews[len(previews) // 2], previews[-1]]):
    print(path.name)
    display(Image.open(path))

# %% [markdown]
# ## Samples
#
# Four of each digit. The model was trained on 1,000 levels of noise, but a good sampler needs few steps. This one adds
# a little new noise at each step, which corrects the mistakes of a model that was trained briefly.

# %%
images = model.sample(40, classes=[str(digit) for digit in range(10)], sampler="dpmpp_2m_sde", steps=STEPS, seed=0)
display(images.grid(columns=10))

# %% [markdown]
# ## Your own images
#
# Give `idf.train` a folder in place of the npz, and `preset="auto"` in place of the network, the method and the pace:
#
#     idf.train("photos/", preset="auto", out_dir="runs/photos", resume="auto")
#
# Classes come from file names such as `cat_001.jpg`, or from subfolders, with `class_cond=True`. Next:
# `sample_and_edit` and `evaluate`, which use the model trained here.
