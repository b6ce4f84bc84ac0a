"""The sampling rules, against data whose best denoiser is known: every pixel is an independent N(MU, S^2).

Then x_t is N(sqrt(alpha_bar) MU, alpha_bar S^2 + 1 - alpha_bar), E[x_0 | x_t] is linear in x_t, p(x_{t-1} | x_t) is
exactly Gaussian, and the probability-flow ODE keeps x_t at its number of standard deviations from the mean.
"""

import math

import numpy as np
import pytest
import torch as th
from gaussian_world import MU, GaussianWorld, S
from helpers import make_diffusion, slope, stand_in_network

from improved_diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
    noise_from,
)
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.noise import SeededNoise, slerp
from improved_diffusion.sampling.solvers import (
    DDIM,
    NOISY,
    PLMS,
    RULES,
    Ancestral,
    BothWays,
    Euler,
    Heun,
    Inpaint,
    Renoise,
    Rule,
    SDEDPMSolverPP,
    sample_loop,
    sample_loop_progressive,
)
from improved_diffusion.sampling.timestep_grids import NAMES, churned, repaint_path, timestep_grid
from improved_diffusion.schedules import zero_terminal_snr

FIXED = (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE)


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


def invert(world, x0):
    """The noise that DDIM takes to x0."""
    path = range(world.diffusion.num_timesteps)
    return sample_loop(
        BothWays(DDIM()), world.diffusion, world.model, x0.shape, noise=x0, clip_denoised=False, device="cpu", path=path
    )


def test_ddim_inversion_converges_to_the_exact_flow_at_first_order():
    errors = []
    for count in COUNTS:
        world = GaussianWorld(640, count)
        x0 = world.flow(world.start(2), -1, 0)
        errors.append((invert(world, x0) - world.flow(x0, 0, -1)).abs().mean().item())
    assert slope(np.log(COUNTS), np.log(errors)) == pytest.approx(-1, abs=0.2)


def test_ddim_inversion_and_back_is_where_it_started():
    errors = []
    for count in COUNTS:
        world = GaussianWorld(640, count)
        x0 = world.flow(world.start(2), -1, None)
        latent = invert(world, x0)
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


# Every rule

DETERMINISTIC = [name for name in RULES if name not in NOISY]


def error_at_the_last_level(name, world, x):
    """Of a walk from the grid's first level to its last, before the clean image: the mean distance to the flow."""
    options = dict(noise=x, clip_denoised=False, device="cpu", path=world.path[:-1])
    sample = sample_loop(RULES[name](), world.diffusion, world.model, x.shape, **options)
    return (sample - world.flow(x, -1, 0)).abs().mean().item()


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_error_falls_at_the_rules_order(name, schedule):
    """From 40 steps on, where the first steps of a multistep rule weigh little."""
    counts, errors = (40, 57, 80, 113), []
    for count in counts:
        world = GaussianWorld(1000, count, schedule, grid="karras")
        errors.append(error_at_the_last_level(name, world, world.start(1).double()))
    assert slope(np.log(counts), np.log(errors)) == pytest.approx(-RULES[name]().order, abs=0.25)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if RULES[name]().order > 1])
def test_rules_of_second_order_and_above_are_accurate_to_a_thousandth_in_100_evaluations(name):
    rule = RULES[name]()
    count = max(n for n in range(1, 101) if rule.evaluations(n) <= 100)
    world = GaussianWorld(1000, count, grid="logsnr")
    assert error_at_the_last_level(name, world, world.start(1)) < 1e-3


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
@pytest.mark.parametrize("var", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED], ids=lambda v: v.name)
def test_whatever_the_network_predicts_the_samples_are_the_flows(name, mean, var):
    """One that predicts x_{t-1} takes the steps that it was trained on."""
    T = 50 if mean == ModelMeanType.PREVIOUS_X else 1000
    world = GaussianWorld(T, 50, "linear", mean, var, grid="ddim")
    x = world.start(1)
    options = dict(noise=x, clip_denoised=False, device="cpu", path=world.path)
    sample = sample_loop(RULES[name](), world.diffusion, world.model, x.shape, **options)
    assert (sample - world.flow(x, -1)).abs().mean().item() < (0.05 if name in ("ddim", "euler") else 0.04)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("grid", [*NAMES, "0,3.5,20,77.25,99"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_rule_walks_every_grid_of_any_length(name, grid, count):
    """To finite samples in range, evaluating the network as often as it says, at the grid's timesteps."""
    count = 5 if grid[0] == "0" else count
    base = make_diffusion(100)
    levels = timestep_grid(grid, count, base.alphas_cumprod)
    diffusion, rule, seen = base.respaced(levels), RULES[name](), []

    def network(x, t):
        seen.append(t[0].item())
        return stand_in_network(False)(x, t)

    sample = sample_loop(rule, diffusion, network, (2, 1, 4, 4), device="cpu")
    assert sample.isfinite().all() and (count > 1 or sample.abs().max() < 1.001)
    assert len(seen) == rule.evaluations(count)
    assert seen[0] == pytest.approx(levels[-1]) and {round(t, 3) for t in seen} == {round(t, 3) for t in levels}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_starts_at_a_signal_to_noise_ratio_of_zero(name):
    """Where only x_0, or v, can be predicted, and the rules in log-SNR stand on an infinity."""
    for mean in (ModelMeanType.START_X, ModelMeanType.VELOCITY):
        diffusion = SpacedDiffusion(
            range(50), betas=zero_terminal_snr(get_named_beta_schedule("linear", 50)), model_mean_type=mean,
            model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE,
        )  # fmt: skip

        def network(x, t, diffusion=diffusion, mean=mean):  # that always sees the same image
            alpha_bar = th.from_numpy(diffusion.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
            if mean == ModelMeanType.START_X:
                return th.full_like(x, 0.3)
            return (alpha_bar.sqrt() * x - 0.3) / (1 - alpha_bar).sqrt()

        sample = sample_loop(RULES[name](), diffusion, network, (2, 1, 4, 4), device="cpu")
        th.testing.assert_close(sample, th.full_like(sample, 0.3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "zero terminal"])
def test_ddim_as_noisy_as_ancestral_sampling_stays_finite_in_any_number_of_steps(schedule):
    """Where almost all is noise, what DDIM keeps of the direction is rounded to less than nothing."""
    betas = get_named_beta_schedule("linear" if schedule == "zero terminal" else schedule, 1000)
    base = SpacedDiffusion(
        range(1000), betas=zero_terminal_snr(betas) if schedule == "zero terminal" else betas,
        model_mean_type=ModelMeanType.VELOCITY, model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE,
    )  # fmt: skip
    for count in range(2, 20):
        diffusion = base.respaced(timestep_grid("uniform", count, base.alphas_cumprod))
        assert sample_loop(DDIM(1.0), diffusion, stand_in_network(False), (1, 1, 2, 2), device="cpu").isfinite().all()


def test_heun_walks_up_to_pure_noise():
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 30))
    diffusion = SpacedDiffusion(
        range(30), betas=betas, model_mean_type=ModelMeanType.START_X, model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )  # fmt: skip
    x = sample_loop(
        BothWays(Heun()),
        diffusion,
        stand_in_network(False),
        (1, 1, 2, 2),
        noise=th.zeros(1, 1, 2, 2),
        device="cpu",
        path=range(30),
    )
    assert x.isfinite().all()


def test_published_methods_cannot_pass_over_timesteps():
    """Each goes to the adjacent one, wherever the path goes."""
    diffusion = make_diffusion(20)
    for rule in (Ancestral(), DDIM(), Inpaint(Ancestral(), th.zeros(1, 1, 2, 2), th.ones(2, 2))):
        with pytest.raises(ValueError, match="next: use respaced"):
            sample_loop(rule, diffusion, stand_in_network(False), (1, 1, 2, 2), device="cpu", path=[19, 10, 0, -1])
    with pytest.raises(ValueError, match="next: use respaced"):
        sample_loop(BothWays(DDIM()), diffusion, stand_in_network(False), (1, 1, 2, 2), device="cpu", path=[0, 5, 19])
    for rule in (PLMS(), Euler()):
        sample_loop(rule, diffusion, stand_in_network(False), (1, 1, 2, 2), device="cpu", path=[19, 10, 0, -1])


@pytest.mark.parametrize("path", [[], [3], range(1)])
def test_a_path_without_a_step_is_an_error(path):
    with pytest.raises(ValueError, match="two levels"):
        sample_loop(Euler(), make_diffusion(5), stand_in_network(False), (1, 1, 2, 2), device="cpu", path=path)


# Stochastic rules, on two pixels that depend on each other

MEAN = th.tensor([0.3, -0.2])
COVARIANCE = th.tensor([[0.5, 0.3], [0.3, 0.4]])


def correlated_network(diffusion):
    """The exact one of x_0 ~ N(MEAN, COVARIANCE), x of shape [N, 2, 1, 1]."""

    def model(x, t):
        index = np.abs(np.subtract.outer(t.numpy(), diffusion.timestep_map)).argmin(1)[0]
        alpha_bar = diffusion.alphas_cumprod[index]
        variance = alpha_bar * COVARIANCE.double() + (1 - alpha_bar) * th.eye(2)
        gain = math.sqrt(alpha_bar) * COVARIANCE.double() @ th.linalg.inv(variance)
        return (MEAN + (x[:, :, 0, 0].double() - math.sqrt(alpha_bar) * MEAN) @ gain.T).float()[..., None, None]

    return model


@pytest.mark.parametrize(
    "rule,count,grid,churn",
    [
        (Ancestral, 250, "uniform", 0),
        (lambda: DDIM(1.0), 250, "uniform", 0),
        (lambda: DDIM(0.5), 200, "uniform", 0),
        (SDEDPMSolverPP, 100, "logsnr", 0),
        (SDEDPMSolverPP, 100, "karras", 0),
        (Heun, 60, "karras", 20),
        pytest.param(Euler, 400, "karras", 40, marks=pytest.mark.slow),
    ],
)
def test_stochastic_rules_give_the_datas_mean_and_covariance(rule, count, grid, churn):
    base = make_diffusion(1000, mean=ModelMeanType.START_X)
    levels, path = churned(timestep_grid(grid, count, base.alphas_cumprod), base.alphas_cumprod, churn)
    assert len(path) == count + 1 or (churn and len(path) > 1.9 * count)
    diffusion, n = base.respaced(levels), 10_000
    sample = sample_loop(
        rule(), diffusion, correlated_network(diffusion), (n, 2, 1, 1), clip_denoised=False, device="cpu", path=path
    )[:, :, 0, 0]
    # Five standard errors, and as much again as the finite steps may leave.
    for i in range(2):
        assert sample[:, i].mean().item() == pytest.approx(
            MEAN[i].item(), abs=5 * math.sqrt(COVARIANCE[i, i] / n) + 0.005
        )
    error = (th.cov(sample.T) - COVARIANCE).abs().max().item()
    assert error < 5 * math.sqrt(2 / n) * 0.5 + 0.01


def matrix_power(matrix, power):
    values, vectors = th.linalg.eigh(matrix)
    return vectors @ th.diag(values**power) @ vectors.T


@pytest.mark.parametrize("kind", ["consistency function", "denoiser"])
@pytest.mark.parametrize("grid", ["coarse", "karras"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_renoising_has_the_mean_and_covariance_of_its_closed_form(kind, grid, count):
    """The data's own with the exact consistency function; with the exact denoiser, less by what each average loses."""
    base, n, data = make_diffusion(1000, mean=ModelMeanType.START_X), 20_000, COVARIANCE.double()
    diffusion = base.respaced(timestep_grid(grid, count, base.alphas_cumprod))
    noisy = [a * data + (1 - a) * th.eye(2) for a in diffusion.alphas_cumprod]  # the covariances of x_t
    root = [math.sqrt(a) for a in diffusion.alphas_cumprod]
    if kind == "denoiser":
        gain = [r * data @ th.linalg.inv(v) for r, v in zip(root, noisy)]
    else:  # the end of the flow, which keeps the number of standard deviations from the mean
        gain = [matrix_power(data, 0.5) @ matrix_power(v, -0.5) for v in noisy]

    def model(x, t):
        index = np.abs(np.subtract.outer(t.numpy(), diffusion.timestep_map)).argmin(1)[0]
        return (MEAN + (x[:, :, 0, 0] - root[index] * MEAN) @ gain[index].T.float())[..., None, None]

    expected = data
    for k in reversed(range(count)):
        before = noisy[k] if k == count - 1 else diffusion.alphas_cumprod[k] * (expected - data) + noisy[k]
        expected = gain[k] @ before @ gain[k].T
    x = (root[-1] * MEAN + th.randn(n, 2) @ matrix_power(noisy[-1], 0.5).float())[..., None, None]
    sample = sample_loop(Renoise(), diffusion, model, x.shape, noise=x, clip_denoised=False, device="cpu")[:, :, 0, 0]
    variances = expected.diagonal()
    assert ((sample.mean(0) - MEAN).abs() < 5 * (variances / n).sqrt()).all()
    standard_errors = ((variances.outer(variances) + expected**2) / n).sqrt()
    assert ((th.cov(sample.T.double()) - expected).abs() < 5 * standard_errors).all()
    if kind == "denoiser":
        assert (th.linalg.eigvalsh(data - expected) > 0).all()
    else:
        th.testing.assert_close(expected, data)


def test_noise_of_the_sde_and_of_churn_decides_the_sample():
    base = make_diffusion(100, mean=ModelMeanType.START_X)
    levels, path = churned(timestep_grid("karras", 10, base.alphas_cumprod), base.alphas_cumprod, 5.0)
    diffusion = base.respaced(levels)
    x = th.randn(1, 1, 4, 4)
    for make, way in ((SDEDPMSolverPP, None), (Euler, path), (Heun, path)):
        samples = [
            sample_loop(make(), diffusion, stand_in_network(False), x.shape, noise=x, device="cpu", path=way)
            for _ in range(2)
        ]
        assert (samples[0] != samples[1]).any()


# Paths that rise


def test_an_image_noised_and_denoised_again_stays_near_where_little_noise_is_added():
    """A path that starts at the image."""
    world = GaussianWorld(100)
    x = world.flow(world.start(4), -1)
    distances = []
    for top in (1, 30, 99):
        path = [-1, *range(top, -2, -1)]
        for rule in (Ancestral(), PLMS()):
            sample = sample_loop(
                rule, world.diffusion, world.model, x.shape, noise=x, clip_denoised=False, device="cpu", path=path
            )
            assert_moments(sample, MU, S**2 if top > 1 else sample.var().item())
        distances.append((sample - x).abs().mean().item())
    assert distances[0] < 0.04 < distances[1] < distances[2]


def test_rising_draws_from_the_forward_process():
    """By one long rise or by two short ones, the moments are those of q(x_t | x_0)."""
    diffusion, start = make_diffusion(50), th.full((1, 1, 200, 200), 0.5)
    for path in ([-1, 30], [-1, 10, 30]):
        *_, last = sample_loop_progressive(Ancestral(), diffusion, None, start.shape, start, device="cpu", path=path)
        alpha_bar = diffusion.alphas_cumprod[30]
        assert_moments(last["sample"], 0.5 * math.sqrt(alpha_bar), 1 - alpha_bar)


@pytest.mark.parametrize("name", RULES)
def test_inpainting_keeps_the_known_pixels_and_continues_them(name):
    """Of images of one grey each, with the exact network: the unknown half becomes the known half's grey."""
    base = make_diffusion(250, mean=ModelMeanType.START_X)
    count = 25 if RULES[name]().order > 1 else 50
    diffusion = base.respaced(timestep_grid("ddim", count, base.alphas_cumprod))

    def network(x, t):
        """The exact one of x_0 = g everywhere with g ~ N(0, 1): what all pixels say together of g."""
        alpha_bar = diffusion.base_alphas_cumprod[int(t[0])]
        n = x[0].numel()
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (math.sqrt(alpha_bar) * mean / (alpha_bar + (1 - alpha_bar) / n)).expand_as(x)

    image, unknown = th.linspace(-0.8, 0.8, 5).view(5, 1, 1, 1).repeat(1, 1, 8, 8), th.zeros(8, 8)
    unknown[:, :4] = 1
    path = repaint_path(count, 10, 5)
    sample = sample_loop(
        Inpaint(RULES[name](), image, unknown),
        diffusion,
        network,
        image.shape,
        clip_denoised=False,
        device="cpu",
        path=path,
    )
    assert (sample[..., 4:] == image[..., 4:]).all()
    assert (sample[..., :4] - image[..., :4]).abs().mean() < 0.1


# Between two noises


def test_slerp_of_a_noise_with_itself_is_that_noise():
    a = th.randn(3, 1, 8, 8)
    for weight in (0.0, 0.3, 1.0):
        assert (slerp(a, a, weight) == a).all()


def test_slerp_goes_from_one_to_the_other_and_stays_a_noise_on_the_way():
    a, b = th.randn(2, 3, 32, 32), th.randn(2, 3, 32, 32)
    th.testing.assert_close(slerp(a, b, 0.0), a)
    th.testing.assert_close(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert middle.std().item() == pytest.approx(1, abs=0.05)  # a straight line would give 0.71
    th.testing.assert_close((middle * a).sum((1, 2, 3)), (middle * b).sum((1, 2, 3)), rtol=0.05, atol=10)


# The loop and the rules


def test_a_rule_is_its_step_and_the_loop_visits_the_path():
    class Halve(Rule):
        def __init__(self):
            self.visited = []

        def step(self, denoise, x, here, there):
            self.visited.append((here.t, there.t))
            return {"sample": x / 2, "pred_xstart": denoise(x, here).x0, "mine": here.t}

    rule = Halve()
    diffusion = make_diffusion(3, mean=ModelMeanType.START_X)
    out = list(
        sample_loop_progressive(rule, diffusion, lambda x, t: x + t, (1, 1), th.full((1, 1), 8.0), False, device="cpu")
    )
    assert rule.visited == [(2, 1), (1, 0), (0, -1)]
    assert [(o["sample"].item(), o["pred_xstart"].item(), o["mine"]) for o in out] == [(4, 10, 2), (2, 5, 1), (1, 2, 0)]


def test_a_sample_that_the_caller_replaces_is_where_the_next_step_starts():
    """In the published loops and in ours."""
    diffusion, model, shape = make_diffusion(4), stand_in_network(False), (1, 1, 2, 2)
    start = dict(noise=th.zeros(shape), device="cpu")
    for steps in (
        diffusion.ddim_sample_loop_progressive(model, shape, **start),
        sample_loop_progressive(DDIM(), diffusion, model, shape, **start),
    ):
        next(steps)["sample"] = th.ones(shape)
        expected = diffusion.ddim_sample(model, th.ones(shape), th.tensor([2]))["sample"]
        th.testing.assert_close(next(steps)["sample"], expected, rtol=0, atol=0)


def test_trajectories_of_one_diffusion_taken_in_turns_keep_their_own_noise():
    diffusion, model, shape = make_diffusion(4), stand_in_network(False), (1, 1, 2, 2)

    def steps(seed):
        return diffusion.p_sample_loop_progressive(model, shape, device="cpu", noise_fn=SeededNoise(seed, [0]))

    alone = [[out["sample"] for out in steps(seed)] for seed in (1, 2)]
    together = [(a["sample"], b["sample"]) for a, b in zip(steps(1), steps(2))]
    assert all((a == x).all() and (b == y).all() for (a, b), x, y in zip(together, *alone))


# Replaced methods

METHODS = {"p_sample": Ancestral, "ddim_sample": DDIM, "ddim_reverse_sample": lambda: BothWays(DDIM())}


class Counting(SpacedDiffusion):
    """Replaces every method of a step, with the published arguments."""

    calls = ()

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        self.calls = (*self.calls, "p_mean_variance")
        return super().p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        self.calls = (*self.calls, "p_sample")
        return {**super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs), "mine": 7}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        self.calls = (*self.calls, "ddim_sample")
        return {**super().ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta), "mine": 7}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        self.calls = (*self.calls, "ddim_reverse_sample")
        return {**super().ddim_reverse_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta), "mine": 7}


def counting(T=10):
    return Counting(
        range(T), betas=get_named_beta_schedule("cosine", T), model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE,
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_subclass_runs_its_own_methods_on_any_steps_with_each_images_own_noise(name):
    plain, mine = make_diffusion(10).respaced([0, 4, 9]), counting().respaced([0, 4, 9])
    path = range(3) if name == "ddim_reverse_sample" else None
    common = dict(shape=(2, 1, 4, 4), model=stand_in_network(False), device="cpu", path=path)
    expected = list(sample_loop_progressive(METHODS[name](), plain, noise_fn=SeededNoise(0, [1, 2]), **common))
    found = list(sample_loop_progressive(METHODS[name](), mine, noise_fn=SeededNoise(0, [1, 2]), **common))
    assert mine.calls == (name, "p_mean_variance") * len(found)
    assert [out["mine"] for out in found] == [7] * len(expected)
    assert all((a["sample"] == b["sample"]).all() for a, b in zip(found, expected))


def test_inpainting_runs_a_subclasss_p_sample_and_passes_on_its_keys():
    mine, image = counting(), th.zeros(1, 1, 4, 4)
    rule = Inpaint(Ancestral(), image, th.ones(4, 4))
    steps = list(sample_loop_progressive(rule, mine, stand_in_network(False), image.shape, device="cpu"))
    assert mine.calls.count("p_sample") == 10 and all(out["mine"] == 7 for out in steps)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("ancestral", "ddim")])
def test_other_rules_predict_by_a_subclasss_p_mean_variance(name):
    mine, rule = counting(), RULES[name]()
    sample_loop(rule, mine, stand_in_network(False), (1, 1, 4, 4), device="cpu")
    assert mine.calls == ("p_mean_variance",) * rule.evaluations(10)


def test_an_instances_own_p_sample_is_what_runs():
    diffusion, calls = make_diffusion(4), []

    def p_sample(model, x, t, **kwargs):
        calls.append(t.item())
        return {"sample": x, "pred_xstart": x}

    diffusion.p_sample = p_sample
    sample_loop(Ancestral(), diffusion, stand_in_network(False), (1, 1, 2, 2), device="cpu")
    assert calls == [3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"p_sample.*subclass"):  # on other steps it could not be right
        diffusion.respaced([0, 3])


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_published_steps_draw_once_and_add_no_noise_to_the_clean_image(eta):
    diffusion, model, x, t = make_diffusion(10), stand_in_network(False), th.randn(2, 1, 3, 3), th.tensor([0, 5])
    outcomes = []
    for noise in (th.zeros_like(x), th.ones_like(x)):
        draws = iter([noise])  # a second draw would stop the iteration
        with noise_from(lambda x, draws=draws: next(draws)):
            if eta is None:
                outcomes.append(diffusion.p_sample(model, x, t)["sample"])
            else:
                outcomes.append(diffusion.ddim_sample(model, x, t, eta=eta)["sample"])
        assert next(draws, None) is None
    still, noisy = outcomes
    th.testing.assert_close(still[0], noisy[0])
    assert (still[1] == noisy[1]).all() == (eta == 0)


# Seeded noise


def test_noise_of_a_seed_does_not_depend_on_the_batch():
    x = th.zeros(3, 1, 2, 2)
    together, alone, other = SeededNoise(0, [3, 4, 5]), SeededNoise(0, [4]), SeededNoise(0, [5, 4, 9])
    for _ in range(3):
        noise = together(x)
        th.testing.assert_close(noise[1], alone(x[:1])[0], rtol=0, atol=0)
        th.testing.assert_close(noise[1], other(x)[1], rtol=0, atol=0)
    assert together.integers(1000)[1] == alone.integers(1000)[0]


def test_noise_is_standard_normal_and_follows_its_tensor():
    noise = SeededNoise(0, range(4))(th.zeros(4, 3, 64, 64, dtype=th.float64))
    assert noise.dtype == th.float64 and noise.shape == (4, 3, 64, 64)
    assert_moments(noise, 0, 1)
    integers = SeededNoise(0, range(100)).integers(10)
    assert integers.dtype == th.int64 and set(integers.tolist()) == set(range(10))


def test_images_of_seeds_do_not_depend_on_the_batch():
    diffusion, model = make_diffusion(5), stand_in_network(False)

    def sample(loop, seeds, **kwargs):
        shape = (len(seeds), 1, 4, 4)
        return getattr(diffusion, loop)(model, shape, device="cpu", noise_fn=SeededNoise(0, seeds), **kwargs)

    for loop, kwargs in (("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.7})):
        together = sample(loop, [7, 8, 9], **kwargs)
        th.testing.assert_close(together[1:2], sample(loop, [8], **kwargs), rtol=0, atol=0)
        assert (together[0] != together[1]).any()


def test_seeded_noise_leaves_the_global_generator_alone():
    before = th.get_rng_state()
    noise = SeededNoise(0, [1, 2])
    noise(th.zeros(2, 3))
    noise.integers(4)
    assert (th.get_rng_state() == before).all()
