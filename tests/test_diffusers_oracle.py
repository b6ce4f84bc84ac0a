"""Our samplers step by step against the schedulers of diffusers, configured alike."""

import warnings

import pytest
import torch as th
from helpers import make_diffusion

from improved_diffusion.gaussian_diffusion import ModelVarType
from improved_diffusion.respace import space_timesteps

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports in turn
    from diffusers import DDIMScheduler, DDPMScheduler

T = 1000
SCHEDULES = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def network(x, t):
    return th.sin(2 * x + 0.003 * t.view(-1, 1, 1, 1)) + 0.3 * x


def both(schedule, count, var=ModelVarType.FIXED_SMALL):
    """Our diffusion on `count` evenly strided steps, and (our t, their t) from the first step to the last."""
    diffusion = make_diffusion(T, space_timesteps(T, f"ddim{count}"), schedule, var=var)
    return diffusion, list(enumerate(diffusion.timestep_map))[::-1]


def common(schedule):
    return dict(
        num_train_timesteps=T, prediction_type="epsilon", clip_sample=True, timestep_spacing="leading", steps_offset=0,
        **SCHEDULES[schedule],
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_steps_are_those_of_the_ddpm_scheduler(schedule, count, variance):
    diffusion, steps = both(schedule, count, ModelVarType[variance.upper()])
    scheduler = DDPMScheduler(variance_type=variance, **common(schedule))
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == [original for _, original in steps]
    x = th.randn(2, 3, 8, 8)
    for ours, original in steps:
        th.manual_seed(ours)
        step = diffusion.p_sample(network, x, th.tensor([ours, ours]))
        generator = th.Generator().manual_seed(ours)
        theirs = scheduler.step(network(x, th.tensor([original, original])), original, x, generator=generator)
        th.testing.assert_close(step["sample"], theirs.prev_sample, **TOLERANCE)
        th.testing.assert_close(step["pred_xstart"], theirs.pred_original_sample, **TOLERANCE)
        x = step["sample"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_steps_are_those_of_the_ddim_scheduler(schedule, count, eta):
    diffusion, steps = both(schedule, count)
    scheduler = DDIMScheduler(set_alpha_to_one=True, **common(schedule))
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == [original for _, original in steps]
    x = th.randn(2, 3, 8, 8)
    for ours, original in steps:
        th.manual_seed(ours)
        step = diffusion.ddim_sample(network, x, th.tensor([ours, ours]), eta=eta)
        th.manual_seed(ours)
        theirs = scheduler.step(
            network(x, th.tensor([original, original])), original, x, eta=eta, use_clipped_model_output=True,
            variance_noise=th.randn_like(x) if eta else None,
        )  # fmt: skip
        th.testing.assert_close(step["sample"], theirs.prev_sample, **TOLERANCE)
        th.testing.assert_close(step["pred_xstart"], theirs.pred_original_sample, **TOLERANCE)
        x = step["sample"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_is_theirs(schedule):
    diffusion = make_diffusion(T, schedule=schedule)
    scheduler = DDPMScheduler(**common(schedule))
    x, noise, t = th.randn(5, 3, 8, 8), th.randn(5, 3, 8, 8), th.tensor([0, 1, 250, 800, 999])
    th.testing.assert_close(diffusion.q_sample(x, t, noise), scheduler.add_noise(x, noise, t), **TOLERANCE)
