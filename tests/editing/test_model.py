"""The model of an editing command: its path, its steps, and which samplers draw noise."""

import pytest
import torch as th
from editing_helpers import gaussian_model
from gaussian_world import GaussianWorld

from improved_diffusion.checkpoints.loading import LoadedModel
from improved_diffusion.config import SAMPLERS, UserError
from improved_diffusion.config.settings import Decoding
from improved_diffusion.editing.model import EditingModel, inversion_path
from improved_diffusion.editing.options import INVERTIBLE
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.sampling.solvers import NOISY, RULES


def test_one_step_has_no_way_back():
    world = GaussianWorld(100, 1)
    with pytest.raises(UserError, match="at least two steps"):
        gaussian_model(world, "ddim", inversion_path)


def test_every_rule_is_known_to_draw_noise_or_not():
    world = GaussianWorld(100, 10)
    noise, ends = world.start(1), {}
    for rule in RULES:
        for seed in (0, 1):
            *_, last = gaussian_model(world, rule, seed=seed).trajectory([0], {}, noise=noise)
            ends[rule, seed] = last["sample"]
    assert {rule for rule in RULES if not th.equal(ends[rule, 0], ends[rule, 1])} == set(NOISY)
    assert set(INVERTIBLE) < set(RULES) == set(SAMPLERS) - {"auto"}


def test_respacing_that_decoding_takes_from_the_latents_reaches_the_diffusion():
    settings = Decoding.of({"diffusion_steps": 50, "noise_schedule": "cosine"})
    world = GaussianWorld(50)
    loaded = LoadedModel("m.pt", settings, frozenset(), th.nn.Identity(), world.diffusion, {})
    respaced = settings.replace(timestep_respacing="ddim25", sampler="ddim")
    model = EditingModel.build(loaded, respaced, lambda settings, sampler: sampler.path)
    assert model.sampler.diffusion.num_timesteps == 25 == len(model.sampler.path) - 1
    assert model.sampler.steps == build_sampler(respaced, model.loaded.diffusion).steps
