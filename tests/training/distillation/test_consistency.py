"""Consistency tuning against its closed form, and its random numbers."""

import math

import numpy as np
import pytest
import torch as th
from train_helpers import small_model

from improved_diffusion.config import UserError
from improved_diffusion.config.settings import ImageDistillation
from improved_diffusion.logs import logger
from improved_diffusion.models.build import build_diffusion
from improved_diffusion.training.distillation.consistency import Consistency, LogNormalLevels
from improved_diffusion.training.distillation.levels import NoiseLevels, like
from improved_diffusion.training.distillation.teacher import Teacher
from improved_diffusion.training.flops import training_flops

MU, S = 0.15, 0.25  # every pixel is an independent N(MU, S^2)


def consistency(teacher="eps", network=None, **options):
    given = {
        "teacher": "gone.pt",
        "image_size": 8,
        "diffusion_steps": 100,
        "noise_schedule": "cosine",
        "max_steps": 40,
        **options,
    }
    settings = ImageDistillation.of(given)
    known = Teacher(settings, {"teacher_prediction": teacher})
    known.network = network
    return Consistency(settings, build_diffusion(settings.diffusion), known)


def batch_of(count=6, size=8):
    generator = th.Generator().manual_seed(0)
    x, noise = (th.randn(count, 3, size, size, generator=generator) for _ in range(2))
    return x.clamp(-1, 1), noise, th.linspace(4.5, 99, count)


@pytest.mark.parametrize("fast", [{"compile": "blocks"}, {"cuda_graphs": True}])
def test_dropout_needs_calls_that_are_alike(fast):
    consistency(**fast)
    with pytest.raises(UserError, match=r"--dropout 0\.1"):
        consistency(dropout=0.1, **fast)


# Stages


@pytest.mark.parametrize("options, expected", [
    (dict(max_q=16), {0: 2, 9: 2, 10: 4, 20: 8, 30: 16, 39: 16, 1000: 16}),
    (dict(max_q=2), {0: 2, 39: 2}),
    (dict(max_q=8, q_steps=3), {0: 2, 2: 2, 3: 4, 6: 8, 39: 8}),
    (dict(max_q=8, predict_v=True), {0: 1, 9: 1, 10: 2, 20: 4, 30: 8}),
    (dict(max_q=8, predict_v=True, teacher="v"), {0: 2, 39: 8}),
    (dict(max_q=4, max_steps=0, lr_anneal_steps=10), {4: 2, 5: 4}),
])  # fmt: skip
def test_q_is_a_function_of_the_step(options, expected):
    made = consistency(**options)
    assert made.q == expected.get(0, made.q)
    for step, q in expected.items():
        made.at_step(step)
        assert made.q == q


@pytest.mark.parametrize("options, expected, last", [
    (dict(max_q=16), "2 in 10, 4 in 10, 8 in 10, 16 in 10", 16),
    (dict(max_q=8, max_steps=10), "2 in 4, 4 in 4, 8 in 2", 8),
    (dict(max_q=16, max_steps=3), "2 in 1, 4 in 1, 8 in 1", 8),
    (dict(max_q=4, max_steps=1), "2 in 1", 2),
    (dict(max_q=4, q_steps=3), "2 in 3, 4 in 37", 4),
    (dict(max_q=4, q_steps=50), "2 in 40", 2),
    (dict(max_q=4, predict_v=True, max_steps=6), "1 in 2, 2 in 2, 4 in 2", 4),
])  # fmt: skip
def test_the_log_lists_the_stages_that_there_are(options, expected, last, tmp_path):
    logger.configure(str(tmp_path), format_strs=["log"])
    made = consistency(**options)
    logger.reset()
    log = (tmp_path / "log.txt").read_text()
    assert f": {expected}\n" in log
    made.at_step(made.settings.train.max_steps - 1)
    assert made.q == last and (f"ends at q = {last}" in log) == (last < made.qs[-1])


@pytest.mark.parametrize("q", [2, 16, 1024])
def test_r_is_below_sigma_and_the_nearer_the_larger_q(q):
    made = consistency()
    made.q = q
    sigma = th.tensor([0.01, 0.5, 2.0, 10.0, 80.0])
    r = made.next_sigma(sigma)
    expected = [s * (1 - (1 + 8 / (1 + math.exp(s))) / q) for s in sigma.tolist()]
    expected = [each if each >= made.least else 0 for each in expected]
    assert r.tolist() == pytest.approx(expected, rel=1e-5) and (r < sigma).all()


# The loss


def test_with_r_of_0_the_target_is_the_image():
    made, (x, noise, t) = consistency(predict_xstart=True), batch_of()
    made.q = 1
    terms = made.training_losses(lambda x, t: th.zeros_like(x), x, t, noise=noise)
    sigma = made.levels.angle_at(t).tan()
    th.testing.assert_close(terms["distance"], x.square().flatten(1).mean(1).sqrt())
    th.testing.assert_close(terms["loss"], terms["distance"] / sigma)


def test_a_learned_variance_is_left_alone_and_the_target_has_no_gradient():
    made, (x, noise, t) = consistency(learn_sigma=True), batch_of()
    model = small_model()
    made.training_losses(model, x, t, noise=noise)["loss"].mean().backward()
    assert model.out.weight.grad[:3].abs().max() > 0 and not model.out.weight.grad[3:].any()


def test_microbatches_change_nothing():
    made, (x, noise, t), model = consistency(), batch_of(), small_model()
    whole = made.training_losses(model, x, t, noise=noise)["loss"]
    parts = [made.training_losses(model, x[i : i + 2], t[i : i + 2], noise=noise[i : i + 2])["loss"] for i in (0, 2, 4)]
    th.testing.assert_close(th.cat(parts), whole)


def test_both_evaluations_have_the_same_dropout_and_draw_once():
    made, (x, noise, t), model = consistency(predict_xstart=True), batch_of(), small_model(dropout=0.5)
    made.q = 2**20  # r is sigma, nearly
    th.manual_seed(0)
    distance = made.training_losses(model, x, t, noise=noise)["distance"]
    after = th.rand(())
    assert distance.max() < 1e-3
    th.manual_seed(0)
    one, other = (model(x, made.diffusion.network_timestep(t))[:, :3] for _ in range(2))
    assert (one - other).square().mean().sqrt() > 0.02
    th.manual_seed(0)
    model(x, t)
    assert th.rand(()) == after


def test_the_drawn_levels_are_log_normal_within_the_trained_ones_and_follow_the_seed():
    levels = NoiseLevels(consistency().diffusion.base_alphas_cumprod)
    sampler = LogNormalLevels(levels, mean=-1.1, std=0.5, largest=80)

    def draw(sampler, count):
        np.random.seed(3)
        return sampler.sample(count, th.device("cpu"))

    t, weights = draw(sampler, 4000)
    assert t.dtype == th.float32 and (weights == 1).all() and th.equal(draw(sampler, 4000)[0], t)
    log_sigma = levels.angle_at(t).tan().log()
    assert log_sigma.mean().item() == pytest.approx(-1.1, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(0.5, abs=0.03)
    wide = levels.angle_at(draw(LogNormalLevels(levels, 0, 20, largest=3), 1000)[0]).tan()
    assert wide.max().item() == pytest.approx(3, rel=1e-3) and wide.min().item() == pytest.approx(levels.range()[0])


# The closed form. For such pixels E[x_r | x_sigma] - MU = (S^2 + r sigma) / (S^2 + sigma^2) (x_sigma - MU), so that of
# all f(x, sigma) = MU + a(sigma) (x - MU) consistency training has the fixed point
# a(sigma) = a(r) (S^2 + r sigma) / (S^2 + sigma^2), a(0) = 1.


def fixed_point(made, sigma):
    gain = np.ones_like(sigma)
    while (sigma > 0).any():
        r = made.next_sigma(th.from_numpy(sigma)).numpy()
        gain *= (S**2 + r * sigma) / (S**2 + sigma**2)
        sigma = r
    return gain


def solution_map(sigma):
    """Where the probability flow ends: S / sqrt(S^2 + sigma^2) (x - MU) from MU."""
    return S / np.sqrt(S**2 + sigma**2)


def test_the_fixed_point_becomes_the_solution_map_as_q_grows():
    made, sigma, errors = consistency(diffusion_steps=1000, noise_schedule="linear"), np.geomspace(0.02, 40, 12), []
    for q in (16, 64, 256):
        made.q = q
        errors.append(np.abs(fixed_point(made, sigma) / solution_map(sigma) - 1).max())
    assert errors[-1] < 0.02
    assert np.diff(np.log(errors)) == pytest.approx([-math.log(4)] * 2, abs=0.35)  # of first order in 1/q


class LinearModel(th.nn.Module):
    """Predicts x_0 as MU + a(t) (x / alpha - MU), with a(t) between two whole timesteps."""

    def __init__(self, levels, start):
        super().__init__()
        self.levels, self.log_gain = levels, th.nn.Parameter(th.from_numpy(np.log(start)).float())

    def forward(self, x, timesteps):
        low = timesteps.long().clamp(max=len(self.log_gain) - 2)
        gain = th.lerp(self.log_gain[low], self.log_gain[low + 1], timesteps - low).exp()
        return MU + like(gain, x) * (x / like(self.levels.angle_at(timesteps).cos(), x) - MU)


def test_training_reaches_the_fixed_point_from_the_exact_denoiser():
    made = consistency(predict_xstart=True, teacher="x0", rescale_timesteps=False, diffusion_steps=30)
    made.q = 16
    sigma = made.levels.angle_at(th.arange(30)).tan().double().numpy()
    denoiser = S**2 / (S**2 + sigma**2)
    model = LinearModel(made.levels, denoiser)
    opt = th.optim.Adam(model.parameters(), lr=0.05)
    steps, sampler = 500, LogNormalLevels(made.levels, -1.0, 1.5, largest=20)
    schedule = th.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    np.random.seed(0)
    th.manual_seed(0)
    for _ in range(steps):
        t, _ = sampler.sample(32, th.device("cpu"))
        x = MU + S * th.randn(32, 1, 8, 8)
        opt.zero_grad()
        made.training_losses(model, x, t, noise=th.randn_like(x))["loss"].mean().backward()
        opt.step()
        schedule.step()
    used = (sigma > 0.1) & (sigma < 0.8)  # the larger ones follow from these, in more steps
    learned = model.log_gain.detach().double().exp().numpy()[used]
    assert learned == pytest.approx(fixed_point(made, sigma[used]), rel=0.05)
    assert learned == pytest.approx(solution_map(sigma[used]), rel=0.2)  # as far as q = 16 allows
    assert (denoiser[used] / solution_map(sigma[used])).min() < 0.4  # where it began


# A guided teacher


class TwoMeans(th.nn.Module):
    """The exact noise in x_t, for pixels that are N(0.5, S^2) in class 0 and N(-0.3, S^2) with the class hidden."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, x, timesteps, y):
        angle = self.levels.angle_at(timesteps)
        alpha, sigma = like(angle.cos(), x), like(angle.sin(), x)
        mean = th.where(like(y, x) == 0, 0.5, -0.3)
        return sigma * (x - alpha * mean) / (alpha**2 * S**2 + sigma**2)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_guided_teacher_leads_along_its_flow(scale):
    """Guided by w, the mean of these pixels is that of the hidden class moved w times as far."""
    plain = consistency(rescale_timesteps=False)
    made = consistency(rescale_timesteps=False, guidance_scale=scale, max_q=64, network=TwoMeans(plain.levels))
    assert made.qs == [8, 16, 32, 64]
    made.q = 16
    sigma = th.tensor([0.05, 0.3, 1.0, 4.0, 20.0])
    r, mean = made.next_sigma(sigma), -0.3 + scale * 0.8
    th.manual_seed(0)
    x = mean + like((S**2 + sigma**2).sqrt(), th.empty(5, 1, 1, 1)) * th.randn(5, 3, 4, 4)
    reached = made.nearer(x, None, None, sigma, r, {"y": th.zeros(5, dtype=th.int64)})
    shrunk = like(((S**2 + r**2) / (S**2 + sigma**2)).sqrt(), x)
    th.testing.assert_close(reached, mean + shrunk * (x - mean), rtol=0.01, atol=0.01)


def test_the_arithmetic_that_is_counted_is_the_students():
    made = consistency(guidance_scale=2.0, network=small_model(num_classes=2))
    plain, batch, kwargs = consistency(), th.zeros(2, 3, 8, 8), {"y": th.zeros(2, dtype=th.int64)}
    counts = [training_flops(small_model(num_classes=2), losses, batch, kwargs)
              for losses in (made.training_losses, plain.training_losses)]  # fmt: skip
    assert counts[0] == counts[1] > 0


def test_a_teacher_whose_predictions_are_not_finite_is_named():
    made, (x, noise, t) = consistency(guidance_scale=2.0, network=lambda x, t, y: x * math.nan), batch_of()
    with pytest.raises(UserError, match=r"the teacher gone\.pt predicts numbers that are not finite"):
        made.training_losses(small_model(num_classes=2), x, t, {"y": th.zeros(6, dtype=th.int64)}, noise=noise)


def test_without_guidance_the_neighbour_lies_on_the_line_to_the_image():
    made, (x, noise, t) = consistency(), batch_of()
    sigma = made.levels.angle_at(t).tan()
    r = made.next_sigma(sigma)
    th.testing.assert_close(made.nearer(None, x, noise, sigma, r, None), x + like(r, x) * noise)
