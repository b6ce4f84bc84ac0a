"""Our samplers step by step against the schedulers of diffusers, configured alike.

Differences of convention: DPM-Solver++, UniPC and Heun are given our timesteps, as their own spacings round otherwise
(the option for sigmas is theirs to compute from the timesteps); Heun there walks in EDM's x / alpha, and evaluates the
last step once, as ours does. Our DPM-Solver++ 3M counts the curvature once, theirs half, so that it is left out.
"""

import warnings

import pytest
import torch as th
from helpers import make_diffusion

from improved_diffusion.gaussian_diffusion import ModelVarType
from improved_diffusion.respace import space_timesteps
from improved_diffusion.sampling.solvers import RULES, sample_loop_progressive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports in turn
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )

# Theirs, of numpy arrays made of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

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


def trajectory(name, diffusion, x, clip=False):
    """Our x after each step."""
    steps = sample_loop_progressive(RULES[name](), diffusion, network, x.shape, x, clip, device="cpu")
    return [step["sample"] for step in steps]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [5, 20, 50])
@pytest.mark.parametrize(
    "name,make",
    [
        ("dpmpp_2m", lambda **kw: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **kw)),
        ("unipc", lambda **kw: UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **kw)),
    ],
)
def test_multistep_solvers_are_the_schedulers(schedule, count, name, make):
    diffusion, steps = both(schedule, count)
    scheduler = make(
        num_train_timesteps=T, prediction_type="epsilon", thresholding=False, final_sigmas_type="zero",
        timestep_spacing="leading", steps_offset=0, **SCHEDULES[schedule],
    )  # fmt: skip
    scheduler.set_timesteps(count)
    with_their_steps(scheduler, steps)
    x = th.randn(2, 3, 8, 8)
    ours = trajectory(name, diffusion, x)
    for mine, timestep in zip(ours, scheduler.timesteps):
        x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
        th.testing.assert_close(mine, x, **TOLERANCE)


def with_their_steps(scheduler, steps):
    """Give a scheduler our timesteps, from the first to the last, with the sigmas that it would compute for them."""
    timesteps = th.tensor([original for _, original in steps])
    alpha_bar = scheduler.alphas_cumprod.double()[timesteps]
    scheduler.timesteps = timesteps
    scheduler.sigmas = th.cat([((1 - alpha_bar) / alpha_bar).sqrt(), th.zeros(1, dtype=th.float64)]).float()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [2, 4, 20])
def test_renoising_is_the_lcm_schedulers(schedule, count):
    """But for t = 0, where theirs answers x itself, and with the boundary function's limit, 0 and 1, elsewhere."""
    kept = range(T // count - 1, T, T // count)
    diffusion, scheduler = make_diffusion(T, kept, schedule), LCMScheduler(timestep_scaling=1e9, **common(schedule))
    scheduler.set_timesteps(timesteps=[*kept][::-1], original_inference_steps=T)
    x = th.randn(2, 3, 8, 8)
    th.manual_seed(0)
    ours = trajectory("renoise", diffusion, x, clip=True)
    th.manual_seed(0)
    assert len(ours) == count
    for mine, timestep in zip(ours, scheduler.timesteps):
        x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
        th.testing.assert_close(mine, x, **TOLERANCE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [5, 20, 50])
def test_plms_steps_are_those_of_the_pndm_scheduler(schedule, count):
    diffusion, steps = both(schedule, count)
    scheduler = PNDMScheduler(
        num_train_timesteps=T, skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0,
        **SCHEDULES[schedule],
    )  # fmt: skip
    scheduler.set_timesteps(count)
    # Its second entry is the second evaluation of the first step.
    assert scheduler.timesteps.unique().tolist() == sorted(original for _, original in steps)
    x = th.randn(2, 3, 8, 8)
    theirs = []
    ours = trajectory("plms", diffusion, x)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.expand(2)), timestep, x).prev_sample
        theirs.append(x)
    assert len(theirs) == count + 1
    for mine, yours in zip(ours, theirs[1:]):
        th.testing.assert_close(mine, yours, **TOLERANCE)


@pytest.mark.parametrize("count", [5, 20, 50])
def test_heun_steps_are_those_of_the_heun_scheduler(count):
    """In EDM's x / alpha. On the linear schedule, whose sigma stays below 160; the cosine's goes to 20,000."""
    diffusion, _ = both("linear", count)
    scheduler = HeunDiscreteScheduler(
        num_train_timesteps=T, prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
        **SCHEDULES["linear"],
    )  # fmt: skip
    scheduler.set_timesteps(count)
    x = th.randn(2, 3, 8, 8)
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod).flip(0)
    alphas = [*alpha_bar.sqrt().tolist()[1:], 1.0]
    ours = trajectory("heun", diffusion, x)
    x = x / alpha_bar[0].sqrt().float()
    theirs = []
    for k, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(network(scaled, timestep.expand(2)), timestep, x).prev_sample
        if k % 2 or k == len(scheduler.timesteps) - 1:
            theirs.append(x)
    assert len(theirs) == count
    for mine, yours, alpha in zip(ours, theirs, alphas):
        th.testing.assert_close(mine, yours * alpha, **TOLERANCE)
