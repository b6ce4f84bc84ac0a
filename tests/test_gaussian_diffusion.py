"""The diffusion process: golden arrays, and what mathematics says of them."""

import gc
import inspect
import math

import numpy as np
import pytest
import torch as th
from helpers import assert_golden, golden, make_diffusion, stand_in_network

from improved_diffusion import gaussian_diffusion
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.respace import space_timesteps
from improved_diffusion.schedules import zero_terminal_snr

G = golden("diffusion")
LOOPS = golden("loops")
X0, NOISE, NOISE2, T30 = (th.from_numpy(G[key]) for key in ("x_start", "noise", "noise2", "t"))
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def prefixes(arrays, depth):
    return sorted({"/".join(key.split("/")[:depth]) for key in arrays if "/" in key})


def diffusion_of(prefix):
    """(diffusion, network) of a key of diffusion.npz."""
    schedule, mean, var, loss, scaling = prefix.split("/")
    kept = None if schedule == "linear" else space_timesteps(30, [15])
    diffusion = make_diffusion(
        30, kept, schedule, ModelMeanType[mean], ModelVarType[var], LossType[loss], scaling == "rescale"
    )
    return diffusion, stand_in_network(var.startswith("LEARNED"))


@pytest.mark.parametrize("prefix", prefixes(G, 5))
def test_every_published_number_of_one_step(prefix, monkeypatch):
    diffusion, model = diffusion_of(prefix)
    t = T30.clamp(max=diffusion.num_timesteps - 1)
    x_t = diffusion.q_sample(X0, t, NOISE)
    monkeypatch.setattr(th, "randn_like", lambda x: NOISE2)
    compute = {
        "p_mean_variance": lambda clip, name: diffusion.p_mean_variance(model, x_t, t, clip == "clip=True")[name],
        "p_sample": lambda: diffusion.p_sample(model, x_t, t)["sample"],
        "ddim_sample": lambda eta: diffusion.ddim_sample(model, x_t, t, eta=float(eta.removeprefix("eta=")))["sample"],
        "ddim_reverse_sample": lambda: diffusion.ddim_reverse_sample(model, x_t, t)["sample"],
        "training_losses": lambda name: diffusion.training_losses(model, X0, t, noise=NOISE)[name],
        "timestep_map": lambda: diffusion.timestep_map,
        "betas": lambda: diffusion.betas,
    }
    keys = [key for key in G if key.startswith(prefix + "/")]
    assert keys
    for key in keys:
        name, *arguments = key.removeprefix(prefix + "/").split("/")
        assert_golden(compute[name](*arguments), G[key])


@pytest.mark.parametrize("prefix", prefixes(LOOPS, 2))
def test_every_published_number_of_the_loops(prefix):
    schedule, respacing = prefix.split("/")
    diffusion = make_diffusion(
        35, None if respacing == "all" else space_timesteps(35, respacing), schedule,
        var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_MSE, rescale=True,
    )  # fmt: skip
    model, shape = stand_in_network(True), (2, 3, 8, 8)
    th.manual_seed(11)
    assert_golden(diffusion.p_sample_loop(model, shape, device="cpu"), LOOPS[f"{prefix}/p_sample_loop"])
    th.manual_seed(11)
    sample = diffusion.ddim_sample_loop(model, shape, device="cpu", eta=0.3)
    assert_golden(sample, LOOPS[f"{prefix}/ddim_sample_loop"])
    th.manual_seed(11)
    bound = diffusion.calc_bpd_loop(model, th.from_numpy(LOOPS["x_start"]))
    assert set(bound) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name, value in bound.items():
        assert_golden(value, LOOPS[f"{prefix}/calc_bpd_loop/{name}"])


# The forward process


def test_published_attributes_are_float64_of_length_T():
    diffusion = make_diffusion(12)
    for name in (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):  # fmt: skip
        value = getattr(diffusion, name)
        assert value.shape == (12,) and value.dtype == np.float64, name
    assert diffusion.num_timesteps == 12
    assert diffusion.alphas_cumprod_prev[0] == 1 and diffusion.alphas_cumprod_next[-1] == 0


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: a product of Gaussians in x_{t-1}."""
    diffusion = make_diffusion(20, schedule="linear")
    x_0, x_t, t = th.randn(19, 1, 2, 2), th.randn(19, 1, 2, 2), th.arange(1, 20)
    beta, ab_prev = (a[1:].reshape(-1, 1, 1, 1) for a in (diffusion.betas, diffusion.alphas_cumprod_prev))
    precision = (1 - beta) / beta + 1 / (1 - ab_prev)
    mean = (np.sqrt(1 - beta) / beta * x_t.numpy() + np.sqrt(ab_prev) / (1 - ab_prev) * x_0.numpy()) / precision
    got_mean, got_variance, got_log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got_variance[:, 0, 0, 0], (1 / precision).ravel(), rtol=1e-5)
    np.testing.assert_allclose(got_log_variance[:, 0, 0, 0], -np.log(precision).ravel(), rtol=1e-5)


def test_q_sample_has_the_moments_of_q_mean_variance():
    diffusion, t = make_diffusion(10), th.tensor([0, 4, 9])
    x_0 = th.full((3, 1, 200, 200), 0.7)
    x_t = diffusion.q_sample(x_0, t)
    mean, variance, log_variance = diffusion.q_mean_variance(x_0, t)
    assert mean.shape == variance.shape == log_variance.shape == x_0.shape
    th.testing.assert_close(variance.log(), log_variance, rtol=1e-4, atol=1e-5)
    error = variance[:, 0, 0, 0].sqrt() / 200  # of a mean over 200 x 200 draws
    assert ((x_t.mean(dim=(1, 2, 3)) - mean[:, 0, 0, 0]).abs() < 5 * error).all()
    th.testing.assert_close(x_t.var(dim=(1, 2, 3)), variance[:, 0, 0, 0], rtol=0.05, atol=0)


def test_last_step_of_a_long_process_is_nearly_standard_normal():
    for schedule in ("linear", "cosine"):
        diffusion = make_diffusion(1000, schedule=schedule)
        mean, variance, _ = diffusion.q_mean_variance(th.ones(1, 1, 1, 1), th.tensor([999]))
        assert mean.item() < 0.01 and variance.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, -0.2], [0.5, 1.5], [[0.1]], [0.1, math.nan]])
def test_betas_outside_0_1_are_an_error(betas):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        GaussianDiffusion(
            betas=betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_a_beta_of_one_is_allowed():
    diffusion = GaussianDiffusion(
        betas=[0.5, 1.0], model_mean_type=ModelMeanType.START_X, model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )  # fmt: skip
    noise = th.randn(1, 1, 2, 2)
    th.testing.assert_close(diffusion.q_sample(th.ones(1, 1, 2, 2), th.tensor([1]), noise), noise)


def test_process_works_on_any_number_of_dimensions():
    diffusion = make_diffusion(5)
    for shape in ((2, 7), (2, 3, 9), (2, 1, 2, 3, 4)):
        losses = diffusion.training_losses(lambda x, t: x, th.randn(shape), th.tensor([1, 4]))
        assert losses["loss"].shape == (2,)


# Weightings


@pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
def test_min_snr_weighs_the_error_in_x0_alike_whatever_is_predicted(mean):
    """For a network whose x_0 is off by 0.1 the weighted loss is min(SNR, gamma) 0.01 (Hang et al. 2023, eq. 8)."""
    betas = get_named_beta_schedule("cosine", 50)
    diffusion = GaussianDiffusion(
        betas=betas, model_mean_type=mean, model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE,
        min_snr_gamma=5.0,
    )  # fmt: skip
    t = th.tensor([1, 5, 25, 40, 48])
    x_0, noise = th.rand(5, 1, 4, 4) - 0.5, th.randn(5, 1, 4, 4)
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = diffusion.q_sample(x_0, t, noise).double()
    wrong = x_0.double() + 0.1
    output = {
        ModelMeanType.START_X: wrong,
        ModelMeanType.EPSILON: (x_t - alpha * wrong) / sigma,
        ModelMeanType.VELOCITY: (alpha * x_t - wrong) / sigma,
        ModelMeanType.PREVIOUS_X: diffusion.q_posterior_mean_variance(wrong, x_t, t)[0],
    }[mean]
    losses = diffusion.training_losses(lambda x, t: output.float(), x_0, t, noise=noise)
    expected = 0.01 * (alpha_bar / (1 - alpha_bar)).clamp(max=5).flatten()
    th.testing.assert_close(losses["loss"].double(), expected, rtol=2e-3, atol=1e-7)
    assert losses["mse"].shape == (5,) and (losses["mse"] != losses["loss"]).any()


def test_min_snr_leaves_the_bounds_part_alone():
    kwargs = dict(
        betas=get_named_beta_schedule("cosine", 20), model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE, loss_type=LossType.RESCALED_MSE,
    )  # fmt: skip
    x, noise, t = th.rand(3, 1, 4, 4), th.randn(3, 1, 4, 4), th.tensor([2, 9, 17])
    plain, weighted = (
        GaussianDiffusion(**kwargs, min_snr_gamma=gamma).training_losses(stand_in_network(True), x, t, noise=noise)
        for gamma in (0.0, 5.0)
    )
    th.testing.assert_close(plain["vb"], weighted["vb"], rtol=0, atol=0)
    th.testing.assert_close(plain["mse"], weighted["mse"], rtol=0, atol=0)
    snr = np.cumprod(1 - kwargs["betas"])[t] / (1 - np.cumprod(1 - kwargs["betas"])[t])
    weight = th.from_numpy(np.minimum(snr, 5) / snr).float()
    th.testing.assert_close(weighted["loss"], weight * weighted["mse"] + weighted["vb"])


# Zero terminal SNR


@pytest.mark.parametrize("mean", [ModelMeanType.START_X, ModelMeanType.VELOCITY], ids=lambda m: m.name)
@pytest.mark.parametrize("var", list(ModelVarType), ids=lambda v: v.name)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_a_process_that_ends_in_pure_noise_trains_samples_and_measures_in_finite_numbers(mean, var, gamma):
    diffusion = GaussianDiffusion(
        betas=zero_terminal_snr(get_named_beta_schedule("linear", 30)), model_mean_type=mean, model_var_type=var,
        loss_type=LossType.RESCALED_MSE, min_snr_gamma=gamma,
    )  # fmt: skip
    model, x = stand_in_network("LEARNED" in var.name), th.rand(3, 1, 4, 4)
    losses = diffusion.training_losses(model, x, th.tensor([0, 28, 29]))
    assert all(values.isfinite().all() for values in losses.values())
    bound = diffusion.calc_bpd_loop(model, x)
    assert all(values.isfinite().all() for values in bound.values())
    if gamma:
        assert losses["loss"][2] > 0  # where sampling starts, there is something to learn
    assert bound["prior_bpd"].abs().max() < 1e-6  # nothing of the image is left
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        assert loop(model, x.shape, device="cpu").isfinite().all()


# The model's output


@pytest.mark.parametrize("mean", list(ModelMeanType), ids=lambda m: m.name)
def test_a_perfect_network_recovers_x0(mean):
    """Whatever it predicts: given the true target, pred_xstart is x_0 and the mean is the true posterior's."""
    diffusion = make_diffusion(20, mean=mean)
    x_0, noise, t = th.rand(4, 1, 3, 3) * 2 - 1, th.randn(4, 1, 3, 3), th.tensor([1, 5, 12, 18])
    x_t = diffusion.q_sample(x_0, t, noise)
    true_mean = diffusion.q_posterior_mean_variance(x_0, x_t, t)[0]
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    target = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x_0,
        ModelMeanType.PREVIOUS_X: true_mean,
        ModelMeanType.VELOCITY: alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
    }[mean]
    out = diffusion.p_mean_variance(lambda x, t: target, x_t, t)
    th.testing.assert_close(out["pred_xstart"], x_0, rtol=1e-3, atol=1e-4)
    th.testing.assert_close(out["mean"], true_mean, rtol=1e-3, atol=1e-4)
    assert diffusion.training_losses(lambda x, t: target, x_0, t, noise=noise)["mse"].max() < 1e-8


def test_learned_range_interpolates_between_the_fixed_variances():
    small, large = (make_diffusion(10, var=var) for var in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE))
    learned = make_diffusion(10, var=ModelVarType.LEARNED_RANGE)
    x, t = th.zeros(9, 1, 1, 1), th.arange(1, 10)  # at t = 0 the large one stands in for beta

    def log_variance(diffusion, v=None):
        output = th.zeros_like(x) if v is None else th.cat([th.zeros_like(x), th.full_like(x, v)], dim=1)
        return diffusion.p_mean_variance(lambda x, t: output, x, t)["log_variance"]

    th.testing.assert_close(log_variance(learned, -1.0), log_variance(small))
    th.testing.assert_close(log_variance(learned, 1.0), log_variance(large))
    th.testing.assert_close(log_variance(learned, 0.0), (log_variance(small) + log_variance(large)) / 2)


def test_denoised_fn_comes_before_clipping():
    diffusion = make_diffusion(10, mean=ModelMeanType.START_X)
    x, t = th.zeros(1, 1, 2, 2), th.tensor([5])
    given = th.full_like(x, 0.4)
    out = diffusion.p_mean_variance(lambda x, t: given, x, t, True, lambda x0: 10 * x0)
    th.testing.assert_close(out["pred_xstart"], th.ones_like(x))
    out = diffusion.p_mean_variance(lambda x, t: given, x, t, clip_denoised=False, denoised_fn=lambda x0: 10 * x0)
    th.testing.assert_close(out["pred_xstart"], 10 * given)


def test_model_kwargs_reach_the_network():
    diffusion, x = make_diffusion(3, mean=ModelMeanType.START_X), th.zeros(2, 1, 1, 1)

    def model(x, t, y):
        return y.view(-1, 1, 1, 1).float().expand_as(x)

    kwargs = {"y": th.tensor([0, 1])}
    for sample in (
        diffusion.p_sample_loop(model, x.shape, model_kwargs=kwargs, device="cpu"),
        diffusion.ddim_sample_loop(model, x.shape, model_kwargs=kwargs, device="cpu"),
    ):
        assert sample[1] - sample[0] == pytest.approx(1, abs=1e-5)
    target = kwargs["y"].view(-1, 1, 1, 1).float()
    assert diffusion.training_losses(model, target, th.tensor([1, 1]), kwargs)["mse"].max() == 0


def test_timesteps_are_rescaled_to_a_thousand():
    diffusion = GaussianDiffusion(
        betas=[0.1] * 40, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE, rescale_timesteps=True,
    )  # fmt: skip
    seen = []
    diffusion.p_mean_variance(lambda x, t: (seen.append(t), x)[1], th.zeros(2, 1, 1, 1), th.tensor([0, 39]))
    th.testing.assert_close(seen[0], th.tensor([0.0, 975.0]))


@pytest.mark.parametrize("var, channels", [(ModelVarType.LEARNED_RANGE, 1), (ModelVarType.FIXED_SMALL, 2)])
def test_a_network_whose_channels_do_not_fit_is_named(var, channels):
    diffusion = make_diffusion(5, var=var)
    with pytest.raises(ValueError, match=rf"\(2, {channels}, 4, 4\).*learn_sigma"):
        diffusion.p_mean_variance(lambda x, t: th.zeros(2, channels, 4, 4), th.zeros(2, 1, 4, 4), th.tensor([0, 1]))


def test_shapes_that_disagree_are_named():
    diffusion, x, t = make_diffusion(5), th.zeros(2, 1, 4, 4), th.tensor([0, 1])
    with pytest.raises(ValueError, match=r"noise \(1, 4, 4\)"):
        diffusion.q_sample(x, t, th.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"x_start \(2, 1, 4, 5\)"):
        diffusion.q_posterior_mean_variance(th.zeros(2, 1, 4, 5), x, t)


# Losses


def losses_of(loss, var=ModelVarType.LEARNED_RANGE, T=20):
    diffusion = make_diffusion(T, var=var, loss=loss)
    return diffusion.training_losses(stand_in_network(var in LEARNED), X0, T30.clamp(max=T - 1), noise=NOISE)


def test_rescaled_losses_are_the_plain_ones_times_their_factor():
    plain, rescaled = losses_of(LossType.MSE), losses_of(LossType.RESCALED_MSE)
    th.testing.assert_close(rescaled["mse"], plain["mse"])
    th.testing.assert_close(rescaled["vb"], plain["vb"] * 20 / 1000)
    for terms in (plain, rescaled):
        th.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    th.testing.assert_close(losses_of(LossType.RESCALED_KL)["loss"], losses_of(LossType.KL)["loss"] * 20)


def test_loss_types_name_their_terms():
    assert set(losses_of(LossType.MSE)) == {"loss", "mse", "vb"}
    assert set(losses_of(LossType.MSE, ModelVarType.FIXED_LARGE)) == {"loss", "mse"}
    assert set(losses_of(LossType.KL)) == {"loss"}
    assert [kind for kind in LossType if kind.is_vb()] == [LossType.KL, LossType.RESCALED_KL]


def test_the_bounds_term_trains_the_variance_alone():
    diffusion = make_diffusion(20, var=ModelVarType.LEARNED_RANGE)
    output = stand_in_network(True)(X0, T30).requires_grad_()
    losses = diffusion.training_losses(lambda x, t: output, X0, T30.clamp(max=19), noise=NOISE)
    (gradient,) = th.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert (gradient[:, :3] == 0).all() and (gradient[:, 3:] != 0).any()
    (gradient,) = th.autograd.grad(losses["mse"].sum(), output)
    assert (gradient[:, :3] != 0).any() and (gradient[:, 3:] == 0).all()


def test_kl_trains_the_mean_as_well():
    diffusion = make_diffusion(20, var=ModelVarType.LEARNED_RANGE, loss=LossType.KL)
    output = stand_in_network(True)(X0, T30).requires_grad_()
    loss = diffusion.training_losses(lambda x, t: output, X0, T30.clamp(max=19), noise=NOISE)["loss"]
    (gradient,) = th.autograd.grad(loss.sum(), output)
    assert (gradient[:, :3] != 0).any() and (gradient[:, 3:] != 0).any()


def test_noise_is_drawn_unless_given():
    diffusion, model, t = make_diffusion(20), stand_in_network(False), T30.clamp(max=19)
    th.manual_seed(3)
    drawn = diffusion.training_losses(model, X0, t)["loss"]
    th.manual_seed(3)
    given = diffusion.training_losses(model, X0, t, noise=th.randn_like(X0))["loss"]
    th.testing.assert_close(drawn, given, rtol=0, atol=0)


def test_the_perfect_posterior_has_no_divergence():
    """With x_0 known and the posterior's own variance, every KL of the bound is 0, and only the decoder is left."""
    diffusion = make_diffusion(20, mean=ModelMeanType.START_X)
    bound = diffusion.calc_bpd_loop(lambda x, t: X0, X0)
    assert bound["vb"].shape == (6, 20)
    assert bound["vb"][:, :-1].abs().max() < 1e-5 < bound["vb"][:, -1].min()
    assert bound["xstart_mse"].max() == 0 and bound["mse"].max() < 1e-6
    th.testing.assert_close(bound["total_bpd"], bound["vb"].sum(dim=1) + bound["prior_bpd"])


# Sampling


def test_sampling_draws_the_start_and_then_one_noise_a_step():
    diffusion, model = make_diffusion(4), stand_in_network(False)
    th.manual_seed(5)
    sample = diffusion.p_sample_loop(model, (2, 1, 3, 3), device="cpu")
    after = th.rand(1)
    th.manual_seed(5)
    x = th.randn(2, 1, 3, 3)
    for t in (3, 2, 1, 0):
        noise = th.randn_like(x)
        out = diffusion.p_mean_variance(model, x, th.tensor([t, t]))
        x = out["mean"] + (0.5 * out["log_variance"]).exp() * noise * (t > 0)
    th.testing.assert_close(sample, x)
    assert after == th.rand(1)  # the noise of t = 0 is drawn too


def test_ddim_draws_though_eta_is_zero():
    diffusion, model = make_diffusion(4), stand_in_network(False)
    th.manual_seed(5)
    diffusion.p_sample_loop(model, (2, 1, 3, 3), device="cpu")
    after = th.rand(1)
    th.manual_seed(5)
    diffusion.ddim_sample_loop(model, (2, 1, 3, 3), device="cpu", eta=0.0)
    assert after == th.rand(1)


def test_ddim_of_eta_one_is_ancestral_sampling_with_the_small_variance():
    """DDIM sec. 4.1; with clipping left out, which DDIM takes into account in eps."""
    diffusion, model = make_diffusion(30), stand_in_network(False)
    x, t = th.randn(6, 3, 8, 8), th.tensor([0, 1, 5, 12, 20, 28])
    th.manual_seed(1)
    ancestral = diffusion.p_sample(model, x, t, clip_denoised=False)
    th.manual_seed(1)
    ddim = diffusion.ddim_sample(model, x, t, clip_denoised=False, eta=1.0)
    th.testing.assert_close(ddim["sample"], ancestral["sample"], rtol=1e-4, atol=1e-4)
    th.testing.assert_close(ddim["pred_xstart"], ancestral["pred_xstart"])


@pytest.mark.parametrize("kind", ["p", "ddim"])
def test_progressive_loops_yield_every_step_and_end_in_the_sample(kind):
    diffusion, model = make_diffusion(6), stand_in_network(False)
    noise = th.randn(2, 1, 3, 3)
    steps = getattr(diffusion, f"{kind}_sample_loop_progressive")(model, noise.shape, noise=noise, device="cpu")
    assert inspect.isgenerator(steps)
    th.manual_seed(2)
    steps = list(steps)
    assert len(steps) == 6
    assert all(set(step) == {"sample", "pred_xstart"} and step["sample"].shape == noise.shape for step in steps)
    th.manual_seed(2)
    last = getattr(diffusion, f"{kind}_sample_loop")(model, noise.shape, noise=noise, device="cpu")
    th.testing.assert_close(steps[-1]["sample"], last, rtol=0, atol=0)
    th.testing.assert_close(last, steps[-1]["pred_xstart"], rtol=1e-4, atol=1e-5)  # no noise after the last step


class Timeless(th.nn.Conv2d):
    """A network that does not look at t."""

    def forward(self, x, t):
        return super().forward(x)


def test_sampling_keeps_no_gradients_and_finds_the_models_device():
    model = Timeless(1, 1, 1)
    diffusion = make_diffusion(3)
    sample = diffusion.p_sample_loop(model, (1, 1, 2, 2))
    assert not sample.requires_grad and sample.device == model.weight.device


def test_progress_shows_a_bar_on_stderr(capsys):
    make_diffusion(3).p_sample_loop(stand_in_network(False), (1, 1, 2, 2), device="cpu", progress=True)
    assert "3/3" in capsys.readouterr().err


def test_noise_fn_replaces_the_global_generator():
    diffusion, model = make_diffusion(3), stand_in_network(False)
    before = th.get_rng_state()
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        assert loop(model, (1, 1, 2, 2), device="cpu", noise_fn=th.ones_like).shape == (1, 1, 2, 2)
    diffusion.calc_bpd_loop(model, th.zeros(1, 1, 2, 2), noise_fn=th.ones_like)
    assert (th.get_rng_state() == before).all()


def test_a_shape_that_is_no_tuple_is_an_error():
    with pytest.raises(ValueError, match="shape"):
        make_diffusion(3).p_sample_loop(stand_in_network(False), 4, device="cpu")


def test_inversion_takes_eta_zero_only():
    with pytest.raises(ValueError, match="eta"):
        make_diffusion(3).ddim_reverse_sample(stand_in_network(False), th.zeros(1, 1, 2, 2), th.tensor([0]), eta=0.5)


def test_the_bound_is_evaluated_without_gradients():
    bound = make_diffusion(3).calc_bpd_loop(Timeless(1, 1, 1), th.zeros(1, 1, 2, 2))
    assert not any(value.requires_grad for value in bound.values())


def test_public_names():
    assert set(gaussian_diffusion.__all__) >= {
        "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "betas_for_alpha_bar",
        "discretized_gaussian_log_likelihood", "get_named_beta_schedule", "mean_flat", "normal_kl",
    }  # fmt: skip


# Replaced coefficients


def test_an_array_that_is_assigned_takes_effect_though_the_old_one_was_used():
    diffusion, t = make_diffusion(5), th.tensor([3])
    x = th.ones(1, 1, 2, 2)
    diffusion.q_sample(x, t, noise=x * 0)
    diffusion.sqrt_alphas_cumprod = np.full(5, 0.25)
    assert (diffusion.q_sample(x, t, noise=x * 0) == 0.25).all()


def test_copies_of_coefficients_live_as_long_as_their_arrays():
    gc.collect()
    before = len(gaussian_diffusion._device_copies)
    diffusion = make_diffusion(5)
    diffusion.training_losses(stand_in_network(False), th.rand(1, 1, 2, 2), th.tensor([3]))
    assert len(gaussian_diffusion._device_copies) > before
    del diffusion
    gc.collect()
    assert len(gaussian_diffusion._device_copies) <= before


@pytest.mark.parametrize("missing", ["model_mean_type", "model_var_type", "loss_type"])
def test_a_type_that_is_missing_is_an_error_where_it_is_needed(missing):
    types = dict(model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)
    diffusion = GaussianDiffusion(betas=[0.1, 0.2], **{**types, missing: None})
    x, t = th.zeros(1, 1, 2, 2), th.tensor([1])
    assert diffusion.q_sample(x, t).shape == x.shape
    with pytest.raises((NotImplementedError, AttributeError, KeyError)):
        if missing == "loss_type":
            diffusion.training_losses(lambda x, t: x, x, t)
        else:
            diffusion.p_mean_variance(lambda x, t: x, x, t)
