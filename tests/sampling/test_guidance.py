"""Guidance, against data whose score is known: class y is N(MEANS[y], S^2) in every pixel, both classes equally likely.

Then the exact conditional network, the exact unconditional one (of the mixture) and the exact classifier are known at
every noise level, and Bayes' rule ties them together: guiding by the classifier gives the conditional network.
"""

import math

import numpy as np
import pytest
import torch as th
from helpers import make_diffusion, set_golden_weights
from torch import nn

from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.nn import NULL_LABEL
from improved_diffusion.sampling.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGradient,
    ClassifierGuidance,
    WithoutClasses,
    dynamic_threshold,
)
from improved_diffusion.sampling.solvers import DDIM, RULES, Ancestral, BothWays, DPMSolverPP, Inpaint, sample_loop
from improved_diffusion.sampling.timestep_grids import timestep_grid
from improved_diffusion.unet import SuperResModel, UNetModel

MEANS, S = th.tensor([-0.4, 0.5]), 0.2


class World(nn.Module):
    """The exact network of a diffusion; y = NULL_LABEL, or none, is the mixture."""

    def __init__(self, diffusion, learned=False):
        super().__init__()
        self.diffusion, self.learned, self.batches = diffusion, learned, []

    def at(self, t):
        """(alpha_bar, its level) as float32 [N, 1, 1, 1] at the network's timesteps."""
        seen = np.array([self.diffusion.network_timestep(t) for t in self.diffusion.timestep_map])
        index = np.abs(np.subtract.outer(t.numpy(), seen)).argmin(1)
        return th.from_numpy(self.diffusion.alphas_cumprod[index]).view(-1, 1, 1, 1), th.from_numpy(index)

    def log_likelihood(self, x, t):
        """log p(x_t | y) of each class, up to a constant: [N, 2]."""
        alpha_bar, _ = self.at(t)
        variance = alpha_bar * S**2 + 1 - alpha_bar
        distance = x.double()[:, None] - alpha_bar.sqrt()[:, None] * MEANS.view(1, 2, 1, 1, 1)
        return -(distance**2 / (2 * variance[:, None])).sum(dim=(2, 3, 4))

    def x0(self, x, t, y):
        """E[x_0 | x_t, y]."""
        alpha_bar, _ = self.at(t)
        gain = S**2 * alpha_bar.sqrt() / (alpha_bar * S**2 + 1 - alpha_bar)
        each = [m + gain * (x.double() - alpha_bar.sqrt() * m) for m in MEANS]
        share = th.softmax(self.log_likelihood(x, t), dim=1)
        given = nn.functional.one_hot(y.clamp(min=0), 2)
        share = th.where((y == NULL_LABEL)[:, None], share, given)
        return sum(share[:, k].view(-1, 1, 1, 1) * each[k] for k in range(2))

    def forward(self, x, t, y=None):
        self.batches.append(len(x))
        y = th.full((len(x),), NULL_LABEL) if y is None else y
        alpha_bar, index = self.at(t)
        x0 = self.x0(x, t, y)
        out = {
            ModelMeanType.START_X: x0,
            ModelMeanType.EPSILON: (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt(),
            ModelMeanType.VELOCITY: (alpha_bar.sqrt() * x - x0) / (1 - alpha_bar).sqrt(),
            ModelMeanType.PREVIOUS_X: self.diffusion.q_posterior_mean_variance(x0, x.double(), index)[0],
        }[self.diffusion.model_mean_type].float()
        return th.cat([out, y.float().view(-1, 1, 1, 1).expand_as(out)], dim=1) if self.learned else out

    def classifier(self, x, t):
        """The exact logits."""
        return self.log_likelihood(x, t)


def seen_timesteps(diffusion, t):
    """The diffusion's timesteps as its network sees them."""
    return diffusion._wrap_model(lambda x, t: t)(None, t)


def batch(diffusion, n=6):
    index = th.arange(n) * (diffusion.num_timesteps - 1) // (n - 1)
    y = th.arange(n) % 2
    x0 = MEANS[y].view(-1, 1, 1, 1) + S * th.randn(n, 1, 2, 2)
    return diffusion.q_sample(x0, index), seen_timesteps(diffusion, index), y


MEAN_TYPES = dict(argvalues=list(ModelMeanType), ids=lambda m: m.name)


# Classifier-free guidance


@pytest.mark.parametrize("mean", **MEAN_TYPES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_classifier_free_guidance_goes_from_the_mixtures_prediction_through_the_classs(mean, scale):
    """In x_0 as in whatever is predicted."""
    diffusion = make_diffusion(50, mean=mean)
    world = World(diffusion)
    x, t, y = batch(diffusion)
    hidden = th.full_like(y, NULL_LABEL)
    guided = ClassifierFreeGuidance(world, scale)(x, t, y=y)
    expected = world(x, t, hidden) + scale * (world(x, t, y) - world(x, t, hidden))
    th.testing.assert_close(guided, expected)
    index = th.arange(6) * 49 // 5
    x0 = diffusion.p_mean_variance(lambda x, t: guided, x, index, clip_denoised=False)["pred_xstart"]
    expected = world.x0(x, t, hidden) + scale * (world.x0(x, t, y) - world.x0(x, t, hidden))
    th.testing.assert_close(x0.double(), expected.double(), rtol=1e-2, atol=1e-2)


def test_scale_one_is_the_model_bit_for_bit_and_evaluates_no_more():
    model = small_unet(num_classes=3).eval()
    x, t, y = th.randn(4, 3, 8, 8), th.tensor([3, 30, 60, 90]), th.tensor([0, 1, 2, 0])
    with th.no_grad():
        expected = model(x, t, y)
        assert th.equal(ClassifierFreeGuidance(model, 1.0)(x, t, y=y), expected)
        assert th.equal(Autoguidance(model, model, 1.0)(x, t, y=y), expected)
        assert th.equal(ClassifierGuidance(model, None, None, 0.0)(x, t, y=y), expected)
    world = World(make_diffusion(50))
    x, t, y = batch(world.diffusion)
    ClassifierFreeGuidance(world, 1.0)(x, t, y=y)
    ClassifierFreeGuidance(world, 0.0)(x, t, y=y)
    assert world.batches == [6, 6]
    ClassifierFreeGuidance(world, 2.0)(x, t, y=y)
    assert world.batches == [6, 6, 12]  # both branches in one batch


def test_a_learned_variance_is_the_conditional_models():
    diffusion = make_diffusion(50, var=ModelVarType.LEARNED)
    world = World(diffusion, learned=True)
    x, t, y = batch(diffusion)
    for model in (
        ClassifierFreeGuidance(world, 3.0),
        ClassifierFreeGuidance(world, 3.0, rescale=0.7),
        Autoguidance(world, World(diffusion), 3.0, guide_takes_classes=False),
        ClassifierGuidance(world, world.classifier, diffusion.score_weight, 3.0),
    ):
        assert th.equal(model(x, t, y=y)[:, 1:], y.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2))


@pytest.mark.parametrize("rescale", [False, True])
def test_guidance_acts_inside_its_interval_alone(rescale):
    diffusion = make_diffusion(50, rescale=rescale)
    world = World(diffusion)
    low, high = (diffusion.network_timestep(t) for t in (10, 30))
    guided = ClassifierFreeGuidance(world, 3.0, (low, high))
    x, _, y = batch(diffusion)
    for index in (0, 9, 10, 20, 30, 31, 49):
        t = seen_timesteps(diffusion, th.full((6,), index))
        plain, world.batches = world(x, t, y), []
        same = th.equal(guided(x, t, y=y), plain)
        assert same != (10 <= index <= 30)
        assert world.batches == ([12] if 10 <= index <= 30 else [6])


class Brighter(nn.Module):
    """Of more contrast with its class than without."""

    def forward(self, x, t, y):
        return th.where((y == NULL_LABEL).view(-1, 1, 1, 1), th.sin(3 * x), 1.5 * x)


def test_rescaling_restores_the_models_contrast():
    """Wholly for 1, not at all for 0 (Lin et al. 2024, eq. 14-16)."""
    x, t, y = th.randn(6, 1, 16, 16), th.zeros(6), th.arange(6) % 2

    def deviation(output):
        return output.std(dim=(1, 2, 3))

    model = deviation(Brighter()(x, t, y))
    plain = ClassifierFreeGuidance(Brighter(), 5.0)(x, t, y=y)
    full = ClassifierFreeGuidance(Brighter(), 5.0, rescale=1.0)(x, t, y=y)
    th.testing.assert_close(deviation(full), model)
    assert (deviation(plain) / model).min() > 2
    half = ClassifierFreeGuidance(Brighter(), 5.0, rescale=0.5)(x, t, y=y)
    th.testing.assert_close(half, (plain + full) / 2)


def test_guided_samples_go_further_into_their_class():
    """From exact networks: the mean of the samples moves away from the other class with the scale."""
    base = make_diffusion(200)
    diffusion = base.respaced(timestep_grid("logsnr", 20, base.alphas_cumprod))
    y, means = th.ones(100, dtype=th.int64), []
    for scale in (0.0, 1.0, 2.0, 4.0):
        th.manual_seed(0)
        sample = sample_loop(DPMSolverPP(), diffusion, ClassifierFreeGuidance(World(diffusion), scale), (100, 1, 1, 1),
            clip_denoised=False,
            model_kwargs={"y": y}, device="cpu",
        )  # fmt: skip
        means.append(sample.mean().item())
    assert means[0] == pytest.approx(0.05, abs=0.15) and means[1] == pytest.approx(0.5, abs=0.06)
    assert means[0] < means[1] < means[2] < means[3]


# Autoguidance


@pytest.mark.parametrize("takes_classes", [True, False])
def test_autoguidance_goes_from_the_weaker_models_prediction_through_the_models(takes_classes):
    diffusion = make_diffusion(50)
    world, weaker = World(diffusion), World(diffusion)
    x, t, y = batch(diffusion)
    guided = Autoguidance(world, weaker, 2.5, takes_classes)(x, t, y=y)
    theirs = weaker(x, t, y if takes_classes else None)
    th.testing.assert_close(guided, theirs + 2.5 * (world(x, t, y) - theirs))


def test_super_resolution_is_guided_too():
    def upsampler(classes):
        return set_golden_weights(SuperResModel(3, 32, 3, 1, (), channel_mult=(1, 1), num_classes=classes))

    model, guide = upsampler(2), upsampler(None)
    x, t, y, low_res = th.randn(2, 3, 8, 8), th.tensor([5, 5]), th.tensor([0, 1]), th.randn(2, 3, 4, 4)
    with th.no_grad():
        plain = model(x, t, low_res=low_res, y=y)
        hidden = model(x, t, low_res=low_res, y=th.full_like(y, NULL_LABEL))
        th.testing.assert_close(
            ClassifierFreeGuidance(model, 2.0)(x, t, low_res=low_res, y=y), 2 * plain - hidden, rtol=1e-4, atol=1e-4
        )
        th.testing.assert_close(
            Autoguidance(model, guide, 2.0, guide_takes_classes=False)(x, t, low_res=low_res, y=y),
            2 * plain - guide(x, t, low_res=low_res), rtol=1e-4, atol=1e-4,
        )  # fmt: skip


# Classifier guidance


@pytest.mark.parametrize("mean", **MEAN_TYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_the_mixture_guided_by_the_exact_classifier_is_the_conditional_network(mean, rescale):
    diffusion = make_diffusion(50, mean=mean, rescale=rescale)
    world = World(diffusion)
    x, t, y = batch(diffusion)
    with th.no_grad():  # as the sampling loop has it
        guided = ClassifierGuidance(WithoutClasses(world), world.classifier, diffusion.score_weight, 1.0)
        th.testing.assert_close(guided(x, t, y=y), world(x, t, y), rtol=1e-3, atol=2e-3)


def test_the_score_weight_of_a_network_of_x_before_shifts_x0_as_for_any_other():
    before, x0 = (make_diffusion(200, mean=mean) for mean in (ModelMeanType.PREVIOUS_X, ModelMeanType.START_X))
    t, x = th.tensor([50, 150, 199]), th.zeros(3, 1, 1, 1)
    plain, shifted = (before._predict_xstart_from_xprev(x, t, out) for out in (x, before.score_weight(t, x)))
    th.testing.assert_close(shifted - plain, x0.score_weight(t, x))


def test_the_gradient_counts_as_often_as_the_scale_says_and_with_the_class_as_well():
    diffusion = make_diffusion(50)
    world = World(diffusion)
    x, t, y = batch(diffusion)
    plain = world(x, t, y)
    shifts = [
        ClassifierGuidance(world, world.classifier, diffusion.score_weight, scale)(x, t, y=y) - plain
        for scale in (1.0, 3.0)
    ]
    th.testing.assert_close(3 * shifts[0], shifts[1], rtol=1e-4, atol=1e-5)
    assert shifts[0].abs().max() > 0.01


# Classifier guidance as published, by a cond_fn


@pytest.mark.parametrize("rescale", [False, True])
def test_the_gradient_gives_the_mixtures_process_the_score_of_the_class(rescale):
    diffusion = make_diffusion(50, rescale=rescale)
    world, index = World(diffusion), th.arange(6) * 49 // 5
    x, t, y = batch(diffusion)
    kwargs = dict(clip_denoised=False, model_kwargs={"y": y})
    with th.no_grad():
        plain = diffusion.p_mean_variance(WithoutClasses(world), x, index, **kwargs)
        gradient = ClassifierGradient(world.classifier, 1.0)
        guided = diffusion.condition_score(gradient, plain, x, index, model_kwargs={"y": y})
    expected = diffusion.p_mean_variance(world, x, index, **kwargs)
    th.testing.assert_close(guided["mean"], expected["mean"], rtol=1e-3, atol=1e-3)
    for scale in (0.0, 1.0, 2.5):
        scaled = ClassifierGradient(world.classifier, scale)(x, t, y, low_res=x)
        th.testing.assert_close(scaled, scale * gradient(x, t, y))


def test_the_gradient_is_zero_outside_of_the_interval():
    diffusion = make_diffusion(50, rescale=True)
    low, high = (diffusion.network_timestep(t) for t in (10, 30))
    gradient = ClassifierGradient(World(diffusion).classifier, 2.0, (low, high))
    x, _, y = batch(diffusion)
    for index in (0, 9, 10, 20, 30, 31, 49):
        acts = gradient(x, seen_timesteps(diffusion, th.full((6,), index)), y).any()
        assert acts == (10 <= index <= 30)


@pytest.mark.parametrize("rule,method", [(Ancestral(), "p_sample_loop"), (DDIM(0.4), "ddim_sample_loop")])
def test_the_published_rules_take_a_cond_fn_as_the_published_loops_do(rule, method):
    diffusion = make_diffusion(30, [0, 7, 15, 22, 29], "linear")
    world = World(diffusion)
    gradient = ClassifierGradient(world.classifier, 2.0)
    kwargs = dict(cond_fn=gradient, model_kwargs={"y": th.tensor([0, 1])}, device="cpu")
    eta = {"eta": 0.4} if method == "ddim_sample_loop" else {}
    th.manual_seed(5)
    expected = getattr(diffusion, method)(world, (2, 1, 2, 2), **kwargs, **eta)
    th.manual_seed(5)
    assert th.equal(sample_loop(rule, diffusion, world, (2, 1, 2, 2), **kwargs), expected)


def test_inpainting_guides_the_unknown_pixels():
    diffusion, x = make_diffusion(30, [0, 7, 15, 22, 29], "linear"), th.randn(2, 1, 2, 2)
    world = World(diffusion)
    kwargs = dict(
        noise=x, device="cpu", cond_fn=ClassifierGradient(world.classifier, 2.0), model_kwargs={"y": th.tensor([0, 1])}
    )
    expected = sample_loop(DDIM(), diffusion, world, x.shape, **kwargs)
    assert th.equal(sample_loop(Inpaint(DDIM(), x, th.ones(1)), diffusion, world, x.shape, **kwargs), expected)


@pytest.mark.parametrize("name", [*sorted(set(RULES) - {"ancestral", "ddim"}), "both ways"])
def test_no_other_rule_takes_a_cond_fn(name):
    rule = BothWays(DDIM()) if name == "both ways" else RULES[name]()
    diffusion = make_diffusion(5)
    with pytest.raises(ValueError, match=f"{type(rule).__name__} does not take a cond_fn"):
        sample_loop(rule, diffusion, World(diffusion), (1, 1, 2, 2), device="cpu", cond_fn=lambda x, t: x)


# The hidden class


def small_unet(num_classes=None):
    return set_golden_weights(
        UNetModel(3, 32, 3, 1, (), channel_mult=(1, 1), num_classes=num_classes, use_scale_shift_norm=True)
    )


def test_a_hidden_class_needs_no_weights_and_is_what_an_unconditional_network_does():
    conditional, unconditional = small_unet(num_classes=3), small_unet()
    state = {name: value for name, value in conditional.state_dict().items() if name != "label_emb.weight"}
    unconditional.load_state_dict(state)
    x, t = th.randn(4, 3, 8, 8), th.tensor([3, 30, 60, 90])
    hidden = th.full((4,), NULL_LABEL)
    th.testing.assert_close(conditional(x, t, hidden), unconditional(x, t))
    y = th.tensor([0, NULL_LABEL, 2, NULL_LABEL])
    mixed = conditional(x, t, y)
    th.testing.assert_close(mixed[1::2], unconditional(x, t)[1::2])
    assert (mixed[::2] - unconditional(x, t)[::2]).abs().max() > 1e-3
    for nonsense in (3, -7):
        with pytest.raises(IndexError):
            conditional(x, t, th.full((4,), nonsense))  # of a class that there is not, nothing is made


def test_a_hidden_class_trains_the_network_and_no_embedding():
    model = small_unet(num_classes=3)
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 30])
    model(x, t, th.tensor([NULL_LABEL, 1])).square().mean().backward()
    assert (model.label_emb.weight.grad.abs().sum(dim=1) > 0).tolist() == [False, True, False]


# Dynamic thresholding


def test_dynamic_thresholding_scales_what_is_too_bright_and_leaves_the_rest():
    """The 90th percentile of |x_0| becomes 1 where it is more (Saharia et al. 2022, sec. 2.3)."""
    x0 = th.stack([th.linspace(-0.9, 0.9, 101), th.linspace(-4, 4, 101)]).view(2, 1, 1, 101)
    out = dynamic_threshold(0.9)(x0)
    th.testing.assert_close(out[0], x0[0])
    limit = np.quantile(x0[1].abs().numpy(), 0.9)
    th.testing.assert_close(out[1], (x0[1] / limit).clamp(-1, 1).float(), rtol=1e-5, atol=1e-6)
    assert out.abs().max() <= 1 and math.isclose(float(limit), 3.6, rel_tol=0.02)
