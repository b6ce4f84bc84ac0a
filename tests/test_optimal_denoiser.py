"""The posterior over a finite set of images: brute force, limits, a Gaussian, subsets, the units of other targets."""

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion

from improved_diffusion.gaussian_diffusion import ModelMeanType
from improved_diffusion.optimal_denoiser import error_factor, posterior
from improved_diffusion.schedules import get_named_beta_schedule


def brute_force(points, own, noise, alpha_bar):
    """(variance, sum of squared weights) of each noisy image, by the definition."""
    found = []
    for i, eps, ab in zip(own, noise, alpha_bar):
        x_t = np.sqrt(ab) * points[i] + np.sqrt(1 - ab) * eps
        log_w = -((x_t - np.sqrt(ab) * points) ** 2).sum(1) / (2 * (1 - ab))
        w = np.exp(log_w - log_w.max())
        w /= w.sum()
        found.append(((w * ((points - w @ points) ** 2).mean(1)).sum(), (w**2).sum()))
    return np.array(found).T


def computed(points, own, noise, alpha_bar, size=None):
    x_0, eps, numbers, ab = map(th.from_numpy, (points[own], noise, own, alpha_bar))
    parts = th.from_numpy(points).split(size or len(points))
    return np.stack([each.numpy() for each in posterior(x_0, eps, numbers, ab, parts)])


def images(count, dims=192, seed=0, spread=1.0):
    return spread * (np.random.default_rng(seed).integers(0, 256, (count, dims)) / 127.5 - 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize("size", [50, 7, 1])
def test_it_agrees_with_brute_force_on_50_images(schedule, spread, size):
    points = images(50, spread=spread)
    points[7] = points[3]  # there are duplicates in real sets
    alpha_bar = np.cumprod(1 - get_named_beta_schedule(schedule, 1000))[2::5]
    own = np.arange(len(alpha_bar)) % 50
    noise = np.random.default_rng(1).standard_normal((len(own), 192))
    expected = brute_force(points, own, noise, alpha_bar)
    np.testing.assert_allclose(computed(points, own, noise, alpha_bar, size), expected, rtol=1e-6, atol=1e-12)
    assert (expected[0] > 1e-6).mean() > 0.1


def test_the_variance_goes_to_nothing_without_noise_and_to_that_of_the_set_without_signal():
    points, own = images(20), np.arange(20)
    noise = np.random.default_rng(1).standard_normal(points.shape)
    little = computed(points, own, noise, np.full(20, 1 - 1e-6))
    assert (little[0] < 1e-12).all() and little[1] == pytest.approx(1)
    for alpha_bar in (1e-12, 0.0):
        much = computed(points, own, noise, np.full(20, alpha_bar))
        assert much[0] == pytest.approx(points.var(axis=0).mean(), rel=1e-4)
        assert much[1] == pytest.approx(1 / 20, rel=1e-4)


def test_of_many_points_of_a_gaussian_it_is_that_of_the_gaussian():
    rng, s = np.random.default_rng(0), 0.4
    points, own = s * rng.standard_normal((6000, 2)), np.arange(1500)
    noise = rng.standard_normal((1500, 2))
    for alpha_bar in (0.9, 0.5, 0.1):
        variance, _ = computed(points, own, noise, np.full(1500, alpha_bar), 4096)
        exact = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)
        assert variance.mean() == pytest.approx(exact, rel=0.04)


def test_one_image_has_no_error():
    found = computed(images(1), np.zeros(3, np.int64), np.ones((3, 192)), np.array([0.9, 0.5, 0.0]))
    assert (found[0] < 1e-15).all() and found[1] == pytest.approx(1)


def test_the_floor_of_a_subset_is_on_average_a_lower_bound():
    rng, points, ab = np.random.default_rng(0), images(32, dims=4, seed=2), np.full(32, 0.5)
    noise = rng.standard_normal((200, 32, 4))
    whole = np.array([computed(points, np.arange(32), eps, ab)[0].mean() for eps in noise])
    means = [whole.mean()]
    for n in (16, 8, 4):
        chosen = [points[rng.permutation(32)[:n]] for _ in range(200)]
        means.append(np.mean([computed(some, np.arange(n), eps[:n], ab[:n])[0] for some, eps in zip(chosen, noise)]))
    error = whole.std() / np.sqrt(200)
    assert (np.diff(means) < -4 * error).all()


@pytest.mark.parametrize("target", ["epsilon", "v", "x_0"])
def test_an_error_of_x_0_is_this_many_times_as_large_in_other_units(target):
    diffusion = make_diffusion(mean=ModelMeanType.VELOCITY)
    rng, t = np.random.default_rng(0), np.arange(diffusion.num_timesteps)
    x_t, x_0, guess = rng.standard_normal((3, len(t)))
    a, s = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod

    def meant(x_0):
        eps = (x_t - a * x_0) / s
        return {"epsilon": eps, "v": a * eps - s * x_0, "x_0": x_0}[target]

    expected = (meant(guess) - meant(x_0)) ** 2
    np.testing.assert_allclose(error_factor(a**2, target) * (guess - x_0) ** 2, expected, rtol=1e-6)


def test_other_targets_are_refused():
    with pytest.raises(ValueError, match="unknown target"):
        error_factor(np.array([0.5]), "noise")
