"""Variations: draws from the images given a noisy one."""

import numpy as np
import pytest
from editing_helpers import gaussian_images, gaussian_model
from gaussian_world import MU, GaussianWorld, S

from improved_diffusion.config.settings import Variations
from improved_diffusion.editing.variations import Vary, _path, noising_path
from improved_diffusion.sampling.sampler import Sampler
from improved_diffusion.sampling.solvers import RULES


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8, 1.0])
def test_variations_are_draws_from_the_images_given_the_noisy_one(strength):
    world, pictures = GaussianWorld(100, 20), gaussian_images(200)
    model = gaussian_model(world, "ancestral", _path, Variations, strength=strength)
    start = model.to_device(pictures)
    for out in model.trajectory(range(200), {}, noise=start):
        x = out["sample"]
    k = model.sampler.path[1]
    alpha_bar, gain = world.alpha_bar[k], world.gain[k]
    expected = MU + gain * np.sqrt(alpha_bar) * (start - MU)
    variance = gain**2 * (1 - alpha_bar) + S**2 * (1 - alpha_bar) / world.x_variance[k] - world.reverse_variance[0]
    error = x - expected
    n = error.numel()
    assert error.mean().item() == pytest.approx(0, abs=5 * np.sqrt(variance / n))
    assert error.var().item() == pytest.approx(variance, rel=5 * np.sqrt(2 / n))
    along = (error * (start - MU)).mean().item()
    assert along == pytest.approx(0, abs=5 * S * np.sqrt(variance / n))


@pytest.mark.parametrize("strength, first", [(1, 9), (0.999, 9), (0.45, 4), (0.51, 5), (0.25, 2), (0.01, 0)])
def test_variations_start_at_the_nearest_step(strength, first):
    world = GaussianWorld(100, 10)  # at 0, 11, ..., 99
    sampler = Sampler("ddim", "", world.diffusion, RULES["ddim"], world.path, True, None)
    path = noising_path(sampler, strength)
    assert path == [-1, *range(first, -2, -1)]
    nearest = abs(np.array(world.diffusion.timestep_map) - strength * 99)
    assert nearest[first] == nearest.min()


def test_each_number_is_another_variation_whatever_the_batch():
    model = gaussian_model(GaussianWorld(100, 5), "ancestral", _path, Variations, num_samples=5)
    vary = Vary(model, gaussian_images(2))
    together = vary.draw(range(vary.count))
    assert vary.count == 5 and len(np.unique(together, axis=0)) == 5
    for i in range(5):
        np.testing.assert_array_equal(vary.draw([i])[0], together[i])
