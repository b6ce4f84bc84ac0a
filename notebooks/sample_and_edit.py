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
# # Sample and edit
#
# What a trained model can do. The notebook uses the model of `train_digits`; a run of your own works too.

# %% tags=["parameters"]
FOLDER = "digits"  # where train_digits keeps its run and the digits; in Colab "/content/drive/MyDrive/digits"
SOURCE = ""  # where to install the package from if it is missing: a folder, or "git+https://..." of your copy
STEPS = 20  # steps of sampling
ENCODE_STEPS = 50  # steps that turn an image into noise and back
RESAMPLINGS = 10  # passes of inpainting at each step: more fit better

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

import improved_diffusion as idf

folder = Path(FOLDER)

# %% [markdown]
# ## The model
#
# A run's folder is enough: the checkpoint describes the network, the method and the classes.

# %%
model = idf.load(folder / "run")
model

# %% [markdown]
# ## Sampling
#
# Classes are taken in turn. A notebook shows `Images` as a grid.

# %%
fast = dict(sampler="dpmpp_2m_sde", steps=STEPS)
images = model.sample(20, classes=model.class_names, seed=0, **fast)
display(images.grid(columns=10))

# %% [markdown]
# Image number 13 of seed 0 is always the same, whatever is drawn beside it. So a number is enough to find it again.

# %%
again = model.sample(seeds="13", classes=model.class_names, seed=0, **fast)
print("the same bytes:", (again.array[0] == images.array[13]).all())
again

# %% [markdown]
# ## Which sampler, how many steps?
#
# The time is that of the steps. Samplers that add no new noise, such as `dpmpp_2m`, keep the mistakes of a model that
# was trained as briefly as this one. For a model that was trained long, `dpmpp_2m` with 15 steps is enough.

# %%
for sampler, steps in (("dpmpp_2m", STEPS), ("dpmpp_2m_sde", 5), ("dpmpp_2m_sde", STEPS)):
    print(sampler, steps, "steps")
    display(model.sample(10, classes=model.class_names, sampler=sampler, steps=steps).grid(columns=10))

# %% [markdown]
# ## From noise to image
#
# `sample_steps` gives each step's prediction of the finished image. Each row is one digit, from left to right in time.

# %%
steps = [step.images.array for step in model.sample_steps(4, classes=["2", "3", "5", "8"], seed=1, **fast)]
rows = np.stack(steps, axis=1)  # [digits, steps, H, W, C]
idf.Images(rows.reshape(-1, *rows.shape[2:])).grid(columns=len(steps))

# %% [markdown]
# ## Variations of a real digit
#
# Noise is added to an image, and removed again. With little noise it stays as it is, with much it becomes another one
# of its class. The digits here are held out: the model has never seen them.

# %%
with np.load(folder / "test.npz") as test:
    real = idf.Images(test["arr_0"][:10], test["arr_1"][:10], model.class_names)
display(real.grid(columns=10))
for strength in (0.3, 0.6, 0.9):
    print("strength", strength)
    display(model.variations(real, strength=strength, **fast).grid(columns=10))

# %% [markdown]
# ## Inpainting
#
# The lower half is painted anew; the upper half stays, pixel by pixel. Some digits have several answers.

# %%
_, height, width, _ = images.array.shape
mask = np.zeros((height, width), bool)
mask[height // 2 :] = True
for seed in range(3):
    painted = model.inpaint(real, mask, seed=seed, steps=STEPS, resamplings=RESAMPLINGS)
    display(painted.grid(columns=10))

# %% [markdown]
# ## Between two images
#
# A 4, a 9, and what lies between their noise. The class changes halfway. Two image numbers of a seed work too.

# %%
between = model.interpolate(real[2], real[7], frames=10, steps=ENCODE_STEPS)
display(between.grid(columns=10))

# %% [markdown]
# ## Another class, the same hand
#
# `encode` finds the noise that leads to an image. The same noise with another class gives another digit, often with
# the same slant and stroke.

# %%
latents = model.encode(real, steps=ENCODE_STEPS)
for digit in ("0", "3", "8"):
    print("as", digit)
    display(model.decode(latents, classes=digit).grid(columns=10))

# %% [markdown]
# ## Keeping images
#
# `save` writes PNGs, a grid and an npz. The command line makes the same bytes:
#
#     improved-diffusion sample --model_path digits/run --num_samples 20 --classes 0,1,2,3,4,5,6,7,8,9 \
#         --sampler dpmpp_2m_sde --steps 20 --out_dir samples

# %%
images.save(folder / "samples")
