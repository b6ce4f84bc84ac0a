"""Guidance by `cond_fn` in the published sampling methods, as guided-diffusion's users call them.

The data are Gaussian, and log p(y | x_0) = TILT x_0 up to a constant. Then class y is N(MU + TILT S^2, S^2), and the
gradient of log p(y | x_t) is TILT times that of E[x_0 | x_t].
"""

import math

import numpy as np
import pytest
import torch as th
from adm_helpers import ADM, DESCRIBED, build, normal
from gaussian_world import MU, GaussianWorld, S
from helpers import make_diffusion, stand_in_network

from improved_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.guidance import ClassifierGradient
from improved_diffusion.sampling.solvers import RULES, sample_loop
from improved_diffusion.schedules import get_named_beta_schedule, zero_terminal_snr
from improved_diffusion.script_util import create_gaussian_diffusion

TILT = 4.0
MEAN_TYPES = pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
VAR_TYPES = pytest.mark.parametrize("var", list(ModelVarType), ids=lambda v: v.name)


def exact_gradient(world):
    """The cond_fn of a GaussianWorld."""

    def cond_fn(x, t):
        index = np.searchsorted(world.diffusion.timestep_map, t.numpy())
        return th.from_numpy(TILT * world.gain[index]).float().view(-1, 1, 1, 1).expand_as(x)

    return cond_fn


def some_gradient(x, t, **kwargs):
    """A cond_fn that depends on all that it is given."""
    return th.cos(2 * x) + 0.01 * t.float().view(-1, 1, 1, 1)


def at(array, t):
    return np.asarray(array)[t.numpy()].reshape(-1, 1, 1, 1)


# The formulas


@MEAN_TYPES
@pytest.mark.parametrize("count", [None, 7])
def test_the_score_is_conditioned_by_bayes_rule(mean, count):
    """E[x_0 | x_t, y] is E[x_0 | x_t] + TILT Var[x_0 | x_t] for these classes."""
    count = None if mean == ModelMeanType.PREVIOUS_X else count
    world = GaussianWorld(20, count, mean=mean, var=ModelVarType.FIXED_SMALL)
    diffusion, n = world.diffusion, world.diffusion.num_timesteps
    t = th.arange(n)
    x = th.from_numpy(at(world.x_mean, t) + np.random.standard_normal((n, 1, 4, 4))).float()
    plain = diffusion.p_mean_variance(world.model, x, t, clip_denoised=False)
    out = diffusion.condition_score(exact_gradient(world), plain, x, t)
    variance = S**2 * (1 - world.alpha_bar) / world.x_variance
    x0 = MU + at(world.gain, t) * (x.numpy() - at(world.x_mean, t)) + TILT * at(variance, t)
    d = diffusion
    expected = at(d.posterior_mean_coef1, t) * x0 + at(d.posterior_mean_coef2, t) * x.numpy()
    np.testing.assert_allclose(out["pred_xstart"], x0, atol=5e-3)  # the noisiest step amplifies float32's rounding
    np.testing.assert_allclose(out["pred_xstart"][:-2], x0[:-2], atol=1e-4)
    np.testing.assert_allclose(out["mean"], expected, atol=1e-4)
    assert th.equal(out["variance"], plain["variance"]) and th.equal(out["log_variance"], plain["log_variance"])


@VAR_TYPES
@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
def test_one_step_is_what_the_papers_algorithms_say(var, eta, monkeypatch):
    """Evaluated here in float64: algorithm 1 for ancestral sampling (eta None), algorithm 2 for DDIM."""
    noise = th.randn(3, 1, 4, 4)
    monkeypatch.setattr(th, "randn_like", lambda x: noise)
    diffusion = make_diffusion(30, [0, 4, 11, 19, 29], "linear", var=var)
    model = stand_in_network("LEARNED" in var.name)
    x, t = 1.5 * th.randn(3, 1, 4, 4), th.tensor([0, 2, 4])
    plain = diffusion.p_mean_variance(model, x, t)
    assert plain["pred_xstart"].abs().max() == 1  # clipped in part
    gradient = some_gradient(x, th.tensor([0, 11, 29])).double().numpy()
    x64, z = x.double().numpy(), at([0, 1, 1, 1, 1], t) * noise.double().numpy()
    alpha_bar, before = at(diffusion.alphas_cumprod, t), at(diffusion.alphas_cumprod_prev, t)
    x0, log_variance = plain["pred_xstart"].double().numpy(), plain["log_variance"].double().numpy()
    if eta is None:
        out = diffusion.p_sample(model, x, t, cond_fn=some_gradient)
        shifted = plain["mean"].double().numpy() + plain["variance"].double().numpy() * gradient
        expected = shifted + np.exp(log_variance / 2) * z
    else:
        out = diffusion.ddim_sample(model, x, t, eta=eta, cond_fn=some_gradient)
        eps = (x64 - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar) - np.sqrt(1 - alpha_bar) * gradient
        x0 = (x64 - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
        sigma = eta * np.sqrt((1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before))
        expected = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps + sigma * z
    np.testing.assert_allclose(out["sample"], expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(out["pred_xstart"], x0, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
def test_samples_are_of_the_class(method):
    """Their mean, to an error that falls with the number of steps, and their deviation."""
    errors = []
    for steps in (25, 100):
        world = GaussianWorld(400, steps)
        x = world.start(40)
        sample = getattr(world.diffusion, method)(
            world.model, x.shape, noise=x, clip_denoised=False, cond_fn=exact_gradient(world), device="cpu"
        )
        errors.append(abs(sample.mean().item() - (MU + TILT * S**2)))
    assert sample.std().item() == pytest.approx(S, rel=0.05)
    sampling_error = 4 * S / math.sqrt(40 * 16 * 16)
    assert errors[1] < 0.02 + sampling_error and errors[1] < errors[0] / 2 + sampling_error


@VAR_TYPES
def test_a_gradient_of_zero_guides_nothing_and_draws_the_same_noise(var):
    diffusion, model = make_diffusion(30, schedule="linear", var=var), stand_in_network("LEARNED" in var.name)
    for method, tolerance in (("p_sample_loop", 0), ("ddim_sample_loop", 1e-4)):
        samples = []
        for cond_fn in (None, lambda x, t: th.zeros_like(x)):
            th.manual_seed(3)
            samples.append(getattr(diffusion, method)(model, (2, 1, 4, 4), device="cpu", cond_fn=cond_fn))
        th.testing.assert_close(*samples, rtol=0, atol=tolerance)


def test_a_process_that_ends_in_pure_noise_is_guided_in_finite_numbers():
    """There the class says nothing yet of x_t, and the predicted x_0 stays."""
    diffusion = GaussianDiffusion(
        betas=zero_terminal_snr(get_named_beta_schedule("linear", 20)), model_mean_type=ModelMeanType.VELOCITY,
        model_var_type=ModelVarType.FIXED_SMALL, loss_type=None,
    )  # fmt: skip
    model, x, t = stand_in_network(False), th.randn(2, 1, 4, 4), th.tensor([19, 10])
    plain = diffusion.p_mean_variance(model, x, t)
    out = diffusion.condition_score(some_gradient, plain, x, t)
    assert th.equal(out["pred_xstart"][0], plain["pred_xstart"][0])
    assert (out["pred_xstart"][1] != plain["pred_xstart"][1]).any()
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        assert loop(model, x.shape, device="cpu", cond_fn=some_gradient).isfinite().all()


# The published code's numbers (golden/adm)

PROCESS = DESCRIBED["guidance"]["guided_a"]


@pytest.fixture(scope="module")
def golden():
    with np.load(ADM / "networks.npz") as arrays:
        prefix = "guided_a:"
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


@pytest.fixture(scope="module")
def published():
    """(diffusion, model, classifier, x) of the process."""
    diffusion = create_gaussian_diffusion(
        steps=PROCESS["steps"], learn_sigma=True, noise_schedule=PROCESS["noise_schedule"], rescale_timesteps=False,
        timestep_respacing=PROCESS["timestep_respacing"],
    )  # fmt: skip
    assert diffusion.timestep_map == PROCESS["timestep_map"]
    x = th.from_numpy(normal("guided_a:x", (2, 3, 16, 16)))
    return diffusion, build("unet", PROCESS["model"]), build("encoder", PROCESS["classifier"]), x


@pytest.fixture(scope="module")
def theirs(published):
    """The arguments of a sampling method, with a cond_fn as in guided-diffusion's classifier_sample.py."""
    classifier = published[2]

    def cond_fn(x, t, y):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = th.log_softmax(classifier(x, t), dim=-1)[range(len(x)), y]
            return th.autograd.grad(chosen.sum(), x)[0] * PROCESS["classifier_scale"]

    return {"cond_fn": cond_fn, "model_kwargs": {"y": th.tensor(PROCESS["labels"])}}


def assert_published(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=2e-4)


def test_a_step_is_the_published_one(published, theirs, golden):
    diffusion, model, _, x = published
    t = th.full((2,), PROCESS["index"])
    with th.no_grad():
        plain = diffusion.p_mean_variance(model, x, t, model_kwargs=theirs["model_kwargs"])
        mean = diffusion.condition_mean(p_mean_var=plain, x=x, t=t, **theirs)
        score = diffusion.condition_score(p_mean_var=plain, x=x, t=t, **theirs)
        ddim = diffusion.ddim_sample(model, x, t, **theirs)
    for name in ("mean", "log_variance", "pred_xstart"):
        assert_published(plain[name], golden[f"p_{name}"])
    assert_published(mean, golden["condition_mean"])
    assert_published(score["mean"], golden["condition_score_mean"])
    assert_published(score["pred_xstart"], golden["condition_score_pred_xstart"])
    assert_published(ddim["sample"], golden["ddim_sample"])
    assert np.abs(golden["condition_mean"] - golden["p_mean"]).max() > 0.02  # a gradient left out would be seen


LOOPS = {"ancestral": ("p_sample_loop", "p_sample_loop_seed7"), "ddim": ("ddim_sample_loop", "ddim_loop")}


@pytest.mark.parametrize("name", LOOPS)
def test_all_steps_are_the_published_ones(name, published, theirs, golden):
    """By the published methods, and by the rules that the commands sample with."""
    diffusion, model, classifier, x = published
    method, key = LOOPS[name]
    th.manual_seed(7)
    assert_published(getattr(diffusion, method)(model, x.shape, noise=x, **theirs), golden[key])
    ours = ClassifierGradient(classifier, PROCESS["classifier_scale"])
    th.manual_seed(7)
    kwargs = {**theirs, "cond_fn": ours}
    assert_published(sample_loop(RULES[name](), diffusion, model, x.shape, noise=x, **kwargs), golden[key])


# What a cond_fn sees


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kept", [None, [3, 8, 39]])
def test_it_sees_the_timesteps_and_arguments_of_the_model(kept, rescale):
    diffusion = make_diffusion(40, kept, rescale=rescale)
    seen = {"model": [], "cond_fn": []}

    def model(x, t, y):
        seen["model"].append((t, y))
        return x

    def cond_fn(x, t, y=None):
        seen["cond_fn"].append((t, y))
        return x

    y = th.tensor([1, 0])
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        loop(model, (2, 1, 2, 2), device="cpu", model_kwargs={"y": y}, cond_fn=cond_fn)
    assert len(seen["model"]) == len(seen["cond_fn"]) == 2 * diffusion.num_timesteps
    for ours, theirs in zip(seen["cond_fn"], seen["model"]):
        th.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert seen["cond_fn"][0][0].tolist() == [39 * 1000 / 40 if rescale else 39] * 2


@pytest.mark.parametrize("rescale", [False, True])
def test_a_process_that_is_not_respaced_scales_timesteps_too(rescale):
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", 40), model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL, loss_type=None, rescale_timesteps=rescale,
    )  # fmt: skip
    seen = []
    out = {"mean": th.zeros(1, 1, 2, 2), "variance": th.ones(1, 1, 2, 2), "pred_xstart": th.zeros(1, 1, 2, 2)}
    for method in (diffusion.condition_mean, diffusion.condition_score):
        method(lambda x, t: seen.append(t.item()) or x, out, out["mean"], th.tensor([39]))
    assert seen == [39 * 1000 / 40 if rescale else 39] * 2


def test_it_may_differentiate_a_classifier():
    """The loops run without gradients; it enables them for itself, as guided-diffusion's classifier_sample.py does."""
    diffusion, weights = make_diffusion(30, [0, 7, 15, 22, 29], "linear"), th.randn(3, 16)

    def cond_fn(x, t, y):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = th.log_softmax(x.flatten(1) @ weights.T, dim=1)[range(len(x)), y]
            return th.autograd.grad(chosen.sum(), x)[0] * 5.0

    def model(x, t, y):
        return stand_in_network(False)(x, t)

    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        samples = []
        for each in (None, cond_fn):
            th.manual_seed(0)
            kwargs = {"y": th.tensor([2, 2])}
            samples.append(loop(model, (2, 1, 4, 4), device="cpu", model_kwargs=kwargs, cond_fn=each))
        plain, guided = ((sample.flatten(1) @ weights.T).log_softmax(1)[:, 2] for sample in samples)
        assert (guided > plain).all() and not samples[1].requires_grad


# Code that extends the published classes


def published_arguments(diffusion, x):
    """A step in improved-diffusion's order of arguments."""
    model, t = stand_in_network(False), th.zeros(len(x), dtype=th.int64)
    return [
        diffusion.p_sample(model, x, t, True, None, {"y": 1})["sample"],
        diffusion.ddim_sample(model, x, t, True, None, {"y": 1}, 0.5)["sample"],
        diffusion.p_sample_loop(model, x.shape, x, True, None, {"y": 1}, "cpu", False),
        diffusion.ddim_sample_loop(model, x.shape, x, True, None, {"y": 1}, "cpu", False, 0.5),
    ]


def test_published_arguments_keep_their_order():
    diffusion = make_diffusion(5)
    assert all(sample.isfinite().all() for sample in published_arguments(diffusion, th.randn(2, 1, 2, 2)))


class BeforeGuidance(SpacedDiffusion):
    """Replaces methods in the published signatures, without cond_fn."""

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return super().p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return {**super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs), "mine": 1}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        return {**super().ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta), "mine": 1}

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
        progress=False,
    ):  # fmt: skip
        yield from super().p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress
        )


def subclass(kind):
    base = make_diffusion(30, [0, 11, 29], "linear")
    return kind(base.use_timesteps, betas=base.base_betas, **base.base_kwargs)


def test_methods_replaced_without_cond_fn_run_as_before():
    diffusion, x = subclass(BeforeGuidance), th.randn(2, 1, 2, 2)
    for loop in (diffusion.p_sample_loop_progressive, diffusion.ddim_sample_loop_progressive):
        assert all(out["mine"] == 1 for out in loop(stand_in_network(False), x.shape, x, device="cpu"))
    th.manual_seed(1)
    ours = published_arguments(diffusion, x)
    th.manual_seed(1)
    for mine, plain in zip(ours, published_arguments(make_diffusion(30, [0, 11, 29], "linear"), x)):
        assert th.equal(mine, plain)
    with pytest.raises(TypeError, match="cond_fn"):  # rather than samples that are not guided
        diffusion.p_sample_loop(stand_in_network(False), x.shape, x, device="cpu", cond_fn=some_gradient)


@pytest.mark.parametrize("method,loop", [("condition_mean", "p_sample_loop"), ("condition_score", "ddim_sample_loop")])
def test_a_replaced_condition_is_called(method, loop):
    calls = []

    def counted(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        calls.append(model_kwargs)
        return getattr(SpacedDiffusion, method)(self, cond_fn, p_mean_var, x, t, model_kwargs=model_kwargs)

    diffusion = subclass(type("Mine", (SpacedDiffusion,), {method: counted}))
    plain, kwargs = make_diffusion(30, [0, 11, 29], "linear"), dict(device="cpu", model_kwargs={"y": 4})
    samples = []
    for each in (plain, diffusion):
        th.manual_seed(2)
        sample = getattr(each, loop)(stand_in_network(False), (2, 1, 2, 2), cond_fn=some_gradient, **kwargs)
        samples.append(sample)
    assert calls == [{"y": 4}] * 3 and th.equal(*samples)
