"""Models whose networks are exported as graphs, and inputs for them."""

import torch as th
from model_helpers import CLASSES, save_checkpoint, tiny_settings

import improved_diffusion as idf
from improved_diffusion.config import height_width
from improved_diffusion.config.settings import SuperResModel

ADM = dict(num_head_channels=16, use_new_attention_order=True, resblock_updown=True)
SUPER_RES = dict(image_size=None, large_size=16, small_size=8)
KINDS = {
    "class-conditional": lambda: tiny_settings(
        image_size="8x16", class_cond=True, label_drop=0.1, num_heads=4, use_checkpoint=True
    ),
    "unconditional": lambda: tiny_settings(channels=1, learn_sigma=False, dropout=0.1),
    "ADM": lambda: tiny_settings(image_size="16x8", channels=4, **ADM),
    "super-resolution": lambda: tiny_settings(SuperResModel, **SUPER_RES, class_cond=True),
}


def model_of(kind, folder):
    """A model of one of KINDS, with random weights."""
    settings = KINDS[kind]()
    names = CLASSES if settings.model.class_cond else None
    return idf.load(save_checkpoint(folder / kind / "ema_0.9_000003.pt", settings, class_names=names))


def inputs_of(model, count, seed=0):
    """Random inputs of a model's network, with hidden classes among the others."""
    generator = th.Generator().manual_seed(seed)
    options = model.settings.model
    size = height_width(options.size)
    inputs = {
        "x": th.randn(count, options.channels, *size, generator=generator),
        "timesteps": th.rand(count, generator=generator) * 1000,
    }
    if options.class_cond:
        inputs["y"] = th.tensor([0, -1, 1, 1, -1])[:count]
    if model.is_super_resolution:
        inputs["low_res"] = th.randn(count, options.channels, *height_width(options.small_size), generator=generator)
    return inputs


@th.no_grad()
def output_of(network, inputs):
    """A network's output, called as the diffusion calls it."""
    named = {name: value for name, value in inputs.items() if name not in ("x", "timesteps")}
    return network(inputs["x"], inputs["timesteps"], **named)
