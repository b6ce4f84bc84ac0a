"""From images to their noise: against data whose best denoiser is known."""

import numpy as np
import pytest
import torch as th
from editing_helpers import gaussian_images, gaussian_model
from gaussian_world import GaussianWorld
from helpers import slope

from improved_diffusion.config.settings import Encoding
from improved_diffusion.editing.encode import Encode, psnr
from improved_diffusion.editing.options import ENCODING_GRID, ENCODING_STEPS
from improved_diffusion.gaussian_diffusion import ModelMeanType
from improved_diffusion.utils import images


@pytest.mark.parametrize("rule, order", [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_inversion_follows_the_flow_from_the_image_at_the_rules_order(rule, order):
    pictures, counts, errors = gaussian_images(2), (25, 50, 100), []
    for count in counts:
        world = GaussianWorld(1000, count, grid="karras")
        found = Encode(gaussian_model(world, rule, kind=Encoding), pictures).invert([0, 1])
        exact = world.flow(images.from_uint8(pictures), 0, -1)
        errors.append(np.abs(found - exact.numpy()).mean())
    assert slope(np.log(counts), np.log(errors)) == pytest.approx(-order, abs=0.2)


def round_trip(world, rule, network=None):
    """The lowest PSNR in dB of images that went to their noise and back."""
    pictures = gaussian_images(4)
    encode = Encode(gaussian_model(world, rule, kind=Encoding, network=network), pictures)
    return psnr(encode.draw([0, 1, 2, 3]), pictures).min()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("rule, steps, least", [("ddim", ENCODING_STEPS, 45), ("heun", 50, 49)])
def test_an_image_comes_back_from_its_noise(rule, steps, least, schedule):
    """Up to the error of rounding to 8 bits, some 51 dB."""
    world = GaussianWorld(1000, steps, schedule, ModelMeanType.EPSILON, grid=ENCODING_GRID)
    assert least < round_trip(world, rule) < 54


@pytest.mark.parametrize("grid, low, high", [(ENCODING_GRID, 40, 54), ("uniform", 0, 20)])
def test_the_grid_of_encoding_forgives_the_error_of_a_network(grid, low, high):
    """On the published grid, its error at the last timestep, where nothing is left of the image, spoils the result."""
    world = GaussianWorld(1000, ENCODING_STEPS, "cosine", ModelMeanType.EPSILON, grid=grid)

    def network(x, t):
        eps, log_variance = world.model(x, t).chunk(2, dim=1)
        return th.cat([eps + 2e-2 * th.sin(0.1 * t.float()).view(-1, 1, 1, 1), log_variance], dim=1)

    assert low < round_trip(world, "ddim", network) < high


def test_latents_are_found_in_batches_and_know_their_steps():
    options = dict(sampler="ddim", steps=9, timestep_grid="karras", batch_size=2)
    encode = Encode(gaussian_model(GaussianWorld(100, 9), "ddim", kind=Encoding, **options), gaussian_images(5))
    latents = encode.latents()
    np.testing.assert_allclose(latents.arrays, encode.invert(range(5)), atol=1e-5)
    assert latents.arrays.dtype == np.float32 and latents.arrays.shape == (5, 1, 16, 16) and latents.labels is None
    assert latents.step_options == dict(sampler="ddim", steps=9, timestep_grid="karras", timestep_respacing="")


def test_psnr():
    a = np.full((3, 4, 4, 1), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    b[2, 0, 0] = 0
    expected = [np.inf, 20 * np.log10(25.5), 10 * np.log10(255**2 * 16 / 100**2)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)
