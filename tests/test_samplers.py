"""The sampling rules, against data whose best denoiser is known: every pixel is an independent N(MU, S^2).

Then x_t is N(sqrt(alpha_bar) MU, alpha_bar S^2 + 1 - alpha_bar), E[x_0 | x_t] is linear in x_t, p(x_{t-1} | x_t) is
exactly Gaussian, and the probability-flow ODE keeps x_t at its number of standard deviations from the mean.
"""

import math

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion, slope, stand_in_network

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.respace import space_timesteps
from improved_diffusion.samplers import DDIM, Ancestral, Level, Prediction, Rule, SeededNoise, Step, sample_loop

MU, S = 0.15, 0.25
FIXED = (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE)


class GaussianWorld:
    """A diffusion of `kept` of T steps, and its exact network."""

    def __init__(self, T, count=None, schedule="cosine", mean=ModelMeanType.START_X, var=ModelVarType.LEARNED):
        kept = space_timesteps(T, [count or T])
        self.diffusion = make_diffusion(T, kept, schedule, mean, var, LossType.KL)
        d = self.diffusion
        self.alpha_bar = d.alphas_cumprod  # float64 [n]
        self.x_mean = np.sqrt(self.alpha_bar) * MU
        self.x_variance = self.alpha_bar * S**2 + 1 - self.alpha_bar
        self.gain = S**2 * np.sqrt(self.alpha_bar) / self.x_variance  # of E[x_0 | x_t]
        x0_variance = S**2 * (1 - self.alpha_bar) / self.x_variance
        self.reverse_variance = d.posterior_variance + d.posterior_mean_coef1**2 * x0_variance

    def model(self, x, t):
        """The exact network: of x_0 or the noise, and the exact log-variance where it is learned."""
        index = np.searchsorted(self.diffusion.timestep_map, t.numpy())

        def at(array):
            return th.from_numpy(array[index]).float().view(-1, *[1] * (x.ndim - 1))

        out = MU + at(self.gain) * (x - at(self.x_mean))
        if self.diffusion.model_mean_type == ModelMeanType.EPSILON:
            out = (x - at(np.sqrt(self.alpha_bar)) * out) / at(np.sqrt(1 - self.alpha_bar))
        if self.diffusion.model_var_type == ModelVarType.LEARNED:
            out = th.cat([out, at(np.log(self.reverse_variance)).expand_as(x)], dim=1)
        return out

    def start(self, n):
        """[n, 1, 16, 16] draws of x_T."""
        x = self.x_mean[-1] + math.sqrt(self.x_variance[-1]) * np.random.standard_normal((n, 1, 16, 16))
        return th.from_numpy(x).float()

    def flow(self, x, here, there=None):
        """Where the probability-flow ODE takes x from step `here` to `there`, or to the clean image."""
        z = (x - self.x_mean[here]) / math.sqrt(self.x_variance[here])
        return MU + S * z if there is None else self.x_mean[there] + math.sqrt(self.x_variance[there]) * z


def assert_moments(sample, mean, variance):
    """The sample's mean and variance are within five standard errors of the given ones."""
    n = sample.numel()
    assert sample.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert sample.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


# Ancestral sampling


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [4, 20, 100])
@pytest.mark.parametrize("mean", [ModelMeanType.START_X, ModelMeanType.EPSILON], ids=lambda m: m.name)
def test_ancestral_sampling_with_the_exact_variance_gives_the_data(schedule, count, mean):
    """However few the steps, up to the last one, which adds no noise."""
    world = GaussianWorld(100, count, schedule, mean)
    x = world.start(200)
    sample = world.diffusion.p_sample_loop(world.model, x.shape, noise=x, clip_denoised=False, device="cpu")
    assert_moments(sample, MU, S**2 - world.reverse_variance[0])


@pytest.mark.parametrize("var", FIXED, ids=lambda v: v.name)
@pytest.mark.parametrize("count", [5, 50])
def test_ancestral_sampling_with_a_fixed_variance_gives_the_chains_moments(var, count):
    """The chain is linear and Gaussian, so the mean and the variance of its end follow step by step."""
    world = GaussianWorld(100, count, var=var)
    d = world.diffusion
    variance = d.posterior_variance if var == ModelVarType.FIXED_SMALL else d.betas
    m, v = world.x_mean[-1], world.x_variance[-1]
    for t in reversed(range(count)):
        factor = d.posterior_mean_coef1[t] * world.gain[t] + d.posterior_mean_coef2[t]
        m = d.posterior_mean_coef1[t] * (MU - world.gain[t] * world.x_mean[t]) + factor * m
        v = factor**2 * v + (variance[t] if t else 0)
    x = world.start(200)
    sample = d.p_sample_loop(world.model, x.shape, noise=x, clip_denoised=False, device="cpu")
    assert_moments(sample, m, v)
    assert m == pytest.approx(MU, abs=1e-6)
    assert (v < S**2) == (var == ModelVarType.FIXED_SMALL)  # between which the data's variance lies


def test_clipping_keeps_x0_inside_the_range():
    world = GaussianWorld(20)
    steps = world.diffusion.p_sample_loop_progressive(
        lambda x, t: 5 * world.model(x, t).clamp(-0.5, 0.5), (4, 1, 4, 4), device="cpu"
    )
    assert all(step["pred_xstart"].abs().max() <= 1 for step in steps)


# The bound


def bits_of_quantized_gaussian(x):
    """-log2 of the probability of each of x's levels under N(MU, S^2), with 256 bins open at both ends."""
    x = x.double()
    above = th.where(x > 0.999, math.inf, x + 1 / 255)
    below = th.where(x < -0.999, -math.inf, x - 1 / 255)
    return -th.log2(th.special.ndtr((above - MU) / S) - th.special.ndtr((below - MU) / S))


def quantized_data():
    """Images of the data at 256 levels, and the bits per dimension that no code can go below on average."""
    x = th.from_numpy(np.random.normal(MU, S, (40, 1, 32, 32)))
    x = (((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1).float()
    return x, bits_of_quantized_gaussian(x).mean().item()


def bound(world, x):
    return world.diffusion.calc_bpd_loop(world.model, x, clip_denoised=False)["total_bpd"].mean().item()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [25, 200])
def test_bound_of_the_exact_network_is_the_datas_bits_per_dimension(schedule, T):
    """With the exact reverse process the bound is tight for any number of steps, but for the noise of its draws."""
    x, truth = quantized_data()
    assert bound(GaussianWorld(T, schedule=schedule), x) == pytest.approx(truth, abs=0.02)


def test_bound_with_another_variance_is_above_the_datas_bits_and_falls_with_the_steps():
    x, truth = quantized_data()
    small = [bound(GaussianWorld(T, None, "linear", var=ModelVarType.FIXED_SMALL), x) for T in (25, 100, 400)]
    assert small[0] > small[1] > small[2] > truth + 0.02
    large = bound(GaussianWorld(100, None, "linear", var=ModelVarType.FIXED_LARGE), x)
    assert truth + 0.02 < large < small[2]  # of the two, beta suits broad data (DDPM sec. 3.2)


# DDIM


COUNTS = (20, 40, 80, 160)


def test_ddim_converges_to_the_exact_flow_at_first_order():
    errors = []
    for count in COUNTS:
        world = GaussianWorld(640, count)
        x = world.start(2)
        sample = world.diffusion.ddim_sample_loop(world.model, x.shape, noise=x, clip_denoised=False, device="cpu")
        errors.append((sample - world.flow(x, -1)).abs().mean().item())
    assert slope(np.log(COUNTS), np.log(errors)) == pytest.approx(-1, abs=0.2)
    assert errors[-1] < 0.02


def test_ddim_inversion_converges_to_the_exact_flow_at_first_order():
    errors = []
    for count in COUNTS:
        world = GaussianWorld(640, count)
        x0 = world.flow(world.start(2), -1, 0)
        latent = world.diffusion.ddim_reverse_sample_loop(world.model, x0, clip_denoised=False)
        errors.append((latent - world.flow(x0, 0, -1)).abs().mean().item())
    assert slope(np.log(COUNTS), np.log(errors)) == pytest.approx(-1, abs=0.2)


def test_ddim_inversion_and_back_is_where_it_started():
    errors = []
    for count in COUNTS:
        world = GaussianWorld(640, count)
        x0 = world.flow(world.start(2), -1, None)
        latent = world.diffusion.ddim_reverse_sample_loop(world.model, x0, clip_denoised=False)
        back = world.diffusion.ddim_sample_loop(world.model, x0.shape, noise=latent, clip_denoised=False, device="cpu")
        errors.append((back - x0).abs().mean().item())
    assert errors[-1] < 0.01 and slope(np.log(COUNTS), np.log(errors)) < -0.8


def test_one_step_up_and_down_again_is_exact_where_eps_does_not_change():
    """For a network that always sees the same noise DDIM walks a straight line, there and back."""
    diffusion, eps = make_diffusion(10), th.randn(2, 1, 3, 3)
    x, t = th.rand(2, 1, 3, 3), th.tensor([0, 6])
    up = diffusion.ddim_reverse_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
    down = diffusion.ddim_sample(lambda x, t: eps, up, t + 1, clip_denoised=False)["sample"]
    th.testing.assert_close(down, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_gives_the_data_too(eta):
    world = GaussianWorld(400)
    x = world.start(100)
    sample = world.diffusion.ddim_sample_loop(world.model, x.shape, noise=x, clip_denoised=False, device="cpu", eta=eta)
    assert sample.mean().item() == pytest.approx(MU, abs=0.01)
    assert sample.std().item() == pytest.approx(S, rel=0.03)


# The loop and the rules


def test_a_rule_is_its_step_and_the_loop_walks_the_levels():
    class Halve(Rule):
        def __init__(self):
            self.visited = []

        def step(self, predict, x, here, there, draw):
            self.visited.append((here.t.item(), there.t.item()))
            return Step(x / 2, predict(x, here.t))

    levels = [Level(th.tensor([t]), th.ones(1, 1)) for t in (2, 1, 0, -1)]
    rule = Halve()
    out = list(sample_loop(rule, lambda x, t: x + t, th.full((1, 1), 8.0), levels, th.zeros_like))
    assert rule.visited == [(2, 1), (1, 0), (0, -1)]
    assert [(o["sample"].item(), o["pred_xstart"].item()) for o in out] == [(4, 10), (2, 5), (1, 2)]


@pytest.mark.parametrize("rule", [Ancestral(), DDIM(), DDIM(0.5), DDIM(1.0)])
def test_rules_draw_once_and_add_no_noise_to_the_clean_image(rule):
    x = th.randn(2, 1, 3, 3)
    prediction = Prediction(x0=x + 1, eps=x + 2, mean=x + 3, log_variance=th.zeros_like(x))
    here = Level(th.tensor([0, 5]), th.tensor([0.9, 0.5]).view(2, 1, 1, 1))
    there = Level(th.tensor([-1, 4]), th.tensor([1.0, 0.6]).view(2, 1, 1, 1))
    outcomes = []
    for noise in (th.zeros_like(x), th.ones_like(x)):
        draws = iter([noise])  # a second draw would stop the iteration
        outcomes.append(rule.step(lambda x, t: prediction, x, here, there, lambda x, draws=draws: next(draws)))
        assert next(draws, None) is None
    still, noisy = outcomes
    th.testing.assert_close(still.x[0], noisy.x[0])
    assert (still.x[1] == noisy.x[1]).all() == (isinstance(rule, DDIM) and rule.eta == 0)
    expected = prediction.mean if isinstance(rule, Ancestral) else prediction.x0
    th.testing.assert_close(noisy.x[0], expected[0], rtol=1e-5, atol=1e-5)


# Seeded noise


def test_noise_of_a_seed_does_not_depend_on_the_batch():
    x = th.zeros(3, 1, 2, 2)
    together, alone, other = SeededNoise([3, 4, 5]), SeededNoise([4]), SeededNoise([5, 4, 9])
    for _ in range(3):
        noise = together(x)
        th.testing.assert_close(noise[1], alone(x[:1])[0], rtol=0, atol=0)
        th.testing.assert_close(noise[1], other(x)[1], rtol=0, atol=0)
    assert together.integers(1000)[1] == alone.integers(1000)[0]


def test_noise_is_standard_normal_and_follows_its_tensor():
    noise = SeededNoise(range(4))(th.zeros(4, 3, 64, 64, dtype=th.float64))
    assert noise.dtype == th.float64 and noise.shape == (4, 3, 64, 64)
    assert_moments(noise, 0, 1)
    integers = SeededNoise(range(100)).integers(10)
    assert integers.dtype == th.int64 and set(integers.tolist()) == set(range(10))


def test_images_of_seeds_do_not_depend_on_the_batch():
    diffusion, model = make_diffusion(5), stand_in_network(False)

    def sample(loop, seeds, **kwargs):
        shape = (len(seeds), 1, 4, 4)
        return getattr(diffusion, loop)(model, shape, device="cpu", noise_fn=SeededNoise(seeds), **kwargs)

    for loop, kwargs in (("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.7})):
        together = sample(loop, [7, 8, 9], **kwargs)
        th.testing.assert_close(together[1:2], sample(loop, [8], **kwargs), rtol=0, atol=0)
        assert (together[0] != together[1]).any()


def test_seeded_noise_leaves_the_global_generator_alone():
    before = th.get_rng_state()
    noise = SeededNoise([1, 2])
    noise(th.zeros(2, 3))
    noise.integers(4)
    assert (th.get_rng_state() == before).all()
