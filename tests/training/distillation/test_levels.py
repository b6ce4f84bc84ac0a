"""Noise levels between the timesteps, and x_0 from what a network predicts there."""

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion

from improved_diffusion.gaussian_diffusion import ModelMeanType
from improved_diffusion.models.factories import create_gaussian_diffusion
from improved_diffusion.schedules import alpha_bar_at, sigma_at, timestep_of_sigma
from improved_diffusion.training.distillation.levels import NoiseLevels, like, x0_of

SCHEDULES = [("linear", False), ("cosine", False), ("cosine", True)]
KINDS = [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.VELOCITY]


def alpha_bar_of(schedule, zero):
    made = create_gaussian_diffusion(steps=1000, noise_schedule=schedule, predict_v=zero, zero_terminal_snr=zero)
    return made.base_alphas_cumprod


@pytest.mark.parametrize("schedule, zero", SCHEDULES)
def test_levels_are_those_that_the_samplers_visit(schedule, zero):
    alpha_bar = alpha_bar_of(schedule, zero)
    levels, t = NoiseLevels(alpha_bar), np.array([0, 0.5, 1, 17.25, 500, 998.9, 999])
    angle = levels.angle_at(th.from_numpy(t)).double().numpy()
    np.testing.assert_allclose(np.cos(angle), np.sqrt(alpha_bar_at(alpha_bar, t)), atol=2e-6)
    np.testing.assert_allclose(levels.timestep_at(th.from_numpy(angle).float()).numpy(), t, atol=2e-2)
    assert levels.angle_at(th.tensor([3])).item() == pytest.approx(np.arctan(sigma_at(alpha_bar, np.array([3])))[0])
    sigma = np.array([0.02, 0.7, 12.0])
    np.testing.assert_array_equal(levels.timesteps_of(sigma), timestep_of_sigma(alpha_bar, sigma))


def test_levels_outside_of_the_trained_ones_are_taken_at_the_nearest():
    levels = NoiseLevels(alpha_bar_of("linear", False))
    assert levels.timestep_at(th.tensor([0.0, 1e-4, 1.5707])).tolist() == [0, 0, 999]
    low, high = levels.range()
    assert (low, high) == pytest.approx((0.0100005, 157.4), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 6])
def test_an_exact_prediction_gives_the_image(kind, channels):
    th.manual_seed(0)
    levels = NoiseLevels(alpha_bar_of("cosine", False))
    x0, eps = th.randn(4, 3, 2, 2), th.randn(4, 3, 2, 2)
    angle = levels.angle_at(th.tensor([0.3, 100.7, 500, 900.2]))
    alpha, sigma = like(angle.cos(), x0), like(angle.sin(), x0)
    output = {ModelMeanType.EPSILON: eps, ModelMeanType.START_X: x0, ModelMeanType.VELOCITY: alpha * eps - sigma * x0}
    wide = th.cat([output[kind], th.randn(4, 3, 2, 2)], dim=1)[:, :channels]
    assert (x0_of(kind, wide, alpha * x0 + sigma * eps, angle) - x0).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_at_whole_timesteps_x_0_is_the_diffusions(kind):
    diffusion = make_diffusion(20, mean=kind)
    output, x, t = th.randn(20, 3, 2, 2), th.randn(20, 3, 2, 2), th.arange(20)
    ours = x0_of(kind, output, x, NoiseLevels(diffusion.alphas_cumprod).angle_at(t))
    th.testing.assert_close(ours, diffusion._predict_xstart(output, x, t), rtol=1e-4, atol=1e-4)


def test_a_network_that_predicts_the_step_before_is_refused():
    with pytest.raises(ValueError, match="PREVIOUS_X"):
        x0_of(ModelMeanType.PREVIOUS_X, th.zeros(1, 3, 2, 2), th.zeros(1, 3, 2, 2), th.zeros(1))
