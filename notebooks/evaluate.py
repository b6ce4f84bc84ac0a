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
# # Evaluate
#
# Are the samples as good as real digits? As varied? Copied from the training images? The notebook uses the model of
# `train_digits`.

# %% tags=["parameters"]
FOLDER = "digits"  # where train_digits keeps its run and the digits; in Colab "/content/drive/MyDrive/digits"
SOURCE = ""  # where to install the package from if it is missing: a folder, or "git+https://..." of your copy
NUM_SAMPLES = 300
STEPS = (5, 10, 20)  # steps of sampling to compare; the last is evaluated in full
CLASSIFIER_STEPS = 400  # steps of training for the feature network
NUM_BITS = 100  # images for the bits/dim

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

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from IPython.display import display
from PIL import Image
from torch import nn

import improved_diffusion as idf

folder = Path(FOLDER)
model = idf.load(folder / "run")
model

# %% [markdown]
# ## A network that looks at digits
#
# FID and the other scores compare images by the features of a network. For photographs there is
# `features="inception"`; digits need a network that knows digits, so a small classifier is trained here. Its last
# hidden layer are the features.


# %%
class Classifier(nn.Module):
    """uint8 [N, 3, H, W], grey -> features [N, 128] and logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, images):
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        features = self.body(grey)
        return {"features": features, "logits": self.head(features)}


def as_input(images):
    """idf.Images -> (uint8 [N, 3, 16, 16], digits [N])"""
    resized = np.stack([np.asarray(image.resize((16, 16))) for image in images.pil()])  # [N, 16, 16]
    return th.tensor(resized)[:, None].repeat(1, 3, 1, 1), th.tensor(images.labels)


def read(path):
    with np.load(path) as file:
        return as_input(idf.Images(file["arr_0"], file["arr_1"]))


train, test = read(folder / "train.npz"), read(folder / "test.npz")

# %%
th.manual_seed(0)
classifier = Classifier()
optimizer = th.optim.AdamW(classifier.parameters(), weight_decay=0.05)
schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=CLASSIFIER_STEPS)
for _ in range(CLASSIFIER_STEPS):
    chosen = th.randint(len(train[0]), (128,))
    moved = th.roll(train[0][chosen], th.randint(-2, 3, (2,)).tolist(), (2, 3))
    loss = nn.functional.cross_entropy(classifier(moved)["logits"], train[1][chosen], label_smoothing=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
classifier.eval().requires_grad_(False)


def accuracy(images, labels):
    return (classifier(images)["logits"].argmax(dim=1) == labels).float().mean().item()


print(f"accuracy on held-out digits: {accuracy(*test):.1%}")

# %% [markdown]
# `evaluate` takes the network as an exported program.

# %%
example = (train[0][:2].clone(),)
program = th.export.export(classifier, example, dynamic_shapes=({0: th.export.Dim("batch", min=1)},))
th.export.save(program, folder / "features.pt2")

# %% [markdown]
# ## Samples

# %%
samples = model.sample(
    NUM_SAMPLES, classes=model.class_names, sampler="dpmpp_2m_sde", steps=STEPS[-1], seed=0, batch_size=100
)
display(samples[:20].grid(columns=10))

# %% [markdown]
# Does the classifier see the digit that was asked for?

# %%
print(f"samples recognised as their digit: {accuracy(*as_input(samples)):.1%}")

# %% [markdown]
# ## The report
#
# The scores of the samples, and of as many real digits that were held out. `trust_features=True` allows the feature
# network, because such a file can run any code and this one is our own. With a few hundred images, look at KID,
# precision and recall; an FID for publication needs thousands.

# %%
options = dict(features=folder / "features.pt2", trust_features=True, resize=16)
report = idf.evaluate(samples, folder / "train.npz", held_out=folder / "test.npz", **options)
report.save(folder / "report")
report

# %% [markdown]
# ## Copies?
#
# Left, the samples that are nearest to a training image; right, the training images nearest to each. Copies would
# appear here. The copy score is 0.5 for a model that does not copy, and near 1 for one that does.

# %%
print("copy score:", report.copies)
Image.open(folder / "report/report_neighbours.png")

# %% [markdown]
# ## How many steps are enough?
#
# The same noise, drawn in fewer steps. Where the curve is flat, more steps only cost time.

# %%
fid = {STEPS[-1]: report.fid.value}
for steps in STEPS[:-1]:
    drawn = model.sample(
        NUM_SAMPLES, classes=model.class_names, sampler="dpmpp_2m_sde", steps=steps, seed=0, batch_size=100
    )
    fid[steps] = idf.evaluate(drawn, folder / "train.npz", **options).fid.value
print({steps: round(fid[steps], 3) for steps in STEPS})

figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(STEPS, [fid[steps] for steps in STEPS], "o-")
axes.set(xlabel="steps of sampling", ylabel="FID, lower is better", ylim=(0, None))
plt.show()

# %% [markdown]
# ## Bits per dimension
#
# How well the model would compress digits that it has never seen, estimated from 20 of its levels of noise.

# %%
bound = model.bits_per_dim(folder / "test.npz", num_samples=NUM_BITS, batch_size=NUM_BITS, nll_timesteps=20)
print(f"{bound.mean:.2f} +- {bound.standard_error:.2f} bits/dim")
