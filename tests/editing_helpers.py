"""Editing commands on a model whose best predictions are known."""

import torch as th
from gaussian_world import MU, S

from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config.settings import Editing
from improved_diffusion.editing.model import EditingModel
from improved_diffusion.sampling.sampler import Sampler
from improved_diffusion.sampling.solvers import RULES
from improved_diffusion.utils import images


def gaussian_images(count):
    """uint8 [count, 16, 16, 1] of the Gaussian world's data."""
    return images.to_uint8(MU + S * th.randn(count, 1, 16, 16))


def gaussian_model(world, rule, path=None, kind=Editing, network=None, **options):
    """The world's exact network, or another, as a model for editing.

    :param path: (settings, sampler) -> the levels to visit; straight down unless given.
    """
    settings = kind.of({"image_size": 16, "channels": 1, **options})
    sampler = Sampler(rule, "", world.diffusion, RULES[rule], world.path, False, None)
    if path:
        sampler = Sampler(rule, "", world.diffusion, RULES[rule], path(settings, sampler), False, None)
    loaded = LoadedModel("m.pt", settings, frozenset(), None, world.diffusion, {})
    return EditingModel(loaded, sampler, network or world.model, None)
