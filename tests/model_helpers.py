"""Small checkpoints, made without the training command."""

import numpy as np
import torch as th

from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.models.build import build_model_and_diffusion
from improved_diffusion.utils.images import from_uint8

# A model that samples in milliseconds.
TINY = dict(
    image_size=8, num_channels=32, num_res_blocks=1, num_heads=1, channel_mult="1,1", attention_resolutions="4",
    diffusion_steps=20, noise_schedule="cosine", learn_sigma=True,
)  # fmt: skip
CLASSES = ["cat", "dog"]


def tiny_settings(kind=ImageModel, **options):
    """Settings of an image model of 8x8, or of another kind; an option that is None is left out."""
    return kind.of({name: value for name, value in {**TINY, **options}.items() if value is not None})


# What the file of a distilled model says.
STUDENT = {"teacher_sha256": "00", "method": "consistency", "sampler": "renoise", "steps": 3}


def save_checkpoint(path, settings, *, class_names=None, steps=0, images=None, labels=None, **facts):
    """A described checkpoint of a model with random weights, or of one trained on uint8 images; returns its path.

    :param steps: of training, on all images at once.
    :param facts: what else its file says of it.
    """
    th.manual_seed(0)
    if settings.model.class_cond:
        settings = settings.replace(num_classes=len(class_names))
    model, diffusion = build_model_and_diffusion(settings.model, settings.diffusion)
    for p in model.parameters():  # the published zeros at the end of the network would hide everything before it
        if not p.any():
            p.data.normal_(std=0.02)
    if steps:
        train(model, diffusion, from_uint8(images), labels, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"config": settings.values(), "class_names": class_names, "step": steps, **facts}
    checkpoint.save_state_dict(model.state_dict(), str(path), metadata)
    return path


def train(model, diffusion, x, labels, steps, lr=3e-3):
    """Some steps of Adam."""
    optimizer = th.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        t = th.from_numpy(np.random.default_rng(step).integers(diffusion.num_timesteps, size=len(x)))
        y = {} if labels is None else {"y": th.tensor(labels)}
        optimizer.zero_grad()
        diffusion.training_losses(model, x, t, model_kwargs=y, noise=th.randn_like(x))["loss"].mean().backward()
        optimizer.step()
