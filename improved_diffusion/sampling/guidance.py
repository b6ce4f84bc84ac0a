"""Guided models: predictions are moved away from a guide's prediction, or towards a class.

Each of them is called like the model, `(x [N, C, ...], timesteps [N], **kwargs)`, and returns the same shape: the mean
part is guided, a learned variance is the conditional model's. Timesteps are as the network sees them. The mean part is
the noise, x_0, v or x_{t-1}: each is an affine function of the others at a given x and t, so guiding one guides all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th
from torch import nn

from ..nn import NULL_LABEL

EVERYWHERE = (-math.inf, math.inf)
ROUNDING = 1e-3  # of timesteps up to 4000


def is_inside(interval: tuple[float, float], timesteps: th.Tensor) -> bool:
    """Whether timesteps are in an interval; all images of a batch are at the same one."""
    if interval == EVERYWHERE:
        return True
    # Timesteps are rounded to float32: a bound that equals one still counts as inside.
    return interval[0] - ROUNDING <= float(timesteps[0]) <= interval[1] + ROUNDING


class Guided(nn.Module):
    """What the guided models share: at which timesteps guidance acts, and how strongly.

    :param scale: w in guide + w (model - guide): 1 is the model itself, bit for bit, 0 the guide.
    :param interval: the (lowest, highest) timestep at which guidance acts (Kynkaanniemi et al. 2024, arXiv 2404.07724);
        elsewhere the model is evaluated alone.
    :param rescale: phi, how much of the model's own contrast is restored (Lin et al. 2024, eq. 16); 0: none.
    """

    def __init__(
        self, model: nn.Module, scale: float, interval: tuple[float, float] = EVERYWHERE, rescale: float = 0.0
    ):
        super().__init__()
        self.model, self.scale, self.interval, self.rescale = model, scale, interval, rescale

    def acts_at(self, timesteps: th.Tensor) -> bool:
        """Whether guidance acts."""
        return self.scale != 1 and is_inside(self.interval, timesteps)

    def combine(self, output: th.Tensor, guide: th.Tensor, channels: int) -> th.Tensor:
        """The guided output; both are [N, C or 2C, ...] with the mean part, of `channels`, first."""
        mean, rest = output[:, :channels], output[:, channels:]
        guided = guide[:, :channels] + self.scale * (mean - guide[:, :channels])
        if self.rescale:
            dims = tuple(range(1, mean.ndim))
            matched = guided * (mean.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
            guided = self.rescale * matched + (1 - self.rescale) * guided
        return th.cat([guided, rest], dim=1)


class ClassifierFreeGuidance(Guided):
    """Guidance by the same model with its class hidden (Ho & Salimans 2022, arXiv 2207.12598), both in one batch.

    The model must have been trained with hidden classes.
    """

    def forward(self, x, timesteps, y, **kwargs):
        """y [N]: the classes."""
        if not self.acts_at(timesteps):
            return self.model(x, timesteps, y=y, **kwargs)
        hidden = th.full_like(y, NULL_LABEL)
        if self.scale == 0:
            return self.model(x, timesteps, y=hidden, **kwargs)
        twice = {key: th.cat([value, value]) for key, value in kwargs.items()}
        output = self.model(th.cat([x, x]), th.cat([timesteps, timesteps]), y=th.cat([y, hidden]), **twice)
        conditional, unconditional = output.chunk(2)
        return self.combine(conditional, unconditional, x.shape[1])


class Autoguidance(Guided):
    """Guidance by a weaker model: smaller, or trained for less time (Karras et al. 2024, arXiv 2406.02507).

    With an unconditional guide this is classifier-free guidance with two networks.
    :param guide_takes_classes: whether the guide is called with y.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, scale: float, guide_takes_classes: bool = True, **kwargs):
        super().__init__(model, scale, **kwargs)
        self.guide, self.guide_takes_classes = guide, guide_takes_classes

    def forward(self, x, timesteps, **kwargs):
        """kwargs: what the model takes."""
        output = self.model(x, timesteps, **kwargs)
        if not self.acts_at(timesteps):
            return output
        theirs = {key: value for key, value in kwargs.items() if key != "y" or self.guide_takes_classes}
        return self.combine(output, self.guide(x, timesteps, **theirs), x.shape[1])


class WithoutClasses(nn.Module):
    """A model that takes no classes, called with those of a classifier."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x, timesteps, y, **kwargs):
        """y: not used."""
        return self.model(x, timesteps, **kwargs)


class ClassifierGuidance(Guided):
    """Guidance by the gradient of log p(y | x_t) of a classifier of noisy images (Dhariwal & Nichol 2021, sec. 4).

    :param classifier: (x [N, C, ...], timesteps [N]) -> logits [N, classes].
    :param score_weight: timesteps [N] -> what a unit of the score adds to the network's mean part,
        [N, 1, ...]; see SpacedDiffusion.score_weight. For the noise it is -sigma (their alg. 2).
    :param scale: s, the weight of the gradient; 0 is the model itself.
    """

    def __init__(
        self, model: nn.Module, classifier: nn.Module, score_weight: Callable[[th.Tensor, th.Tensor], th.Tensor],
        scale: float, interval: tuple[float, float] = EVERYWHERE,
    ):  # fmt: skip
        super().__init__(model, 1 + scale, interval)
        self.classifier, self.score_weight = classifier, score_weight

    def forward(self, x, timesteps, y, **kwargs):
        """y [N]: the classes to move towards."""
        output = self.model(x, timesteps, y=y, **kwargs)
        if not self.acts_at(timesteps):
            return output
        channels = x.shape[1]
        weight = (self.scale - 1) * self.score_weight(timesteps, x)
        moved = output[:, :channels] + weight * class_score(self.classifier, x, timesteps, y)
        return th.cat([moved, output[:, channels:]], dim=1)


class ClassifierGradient:
    """The same gradient as a `cond_fn` of the diffusion's sampling methods, which is how guided-diffusion guides.

    :param scale: s, the weight of the gradient; :param interval: see Guided; elsewhere the gradient counts as zero.
    """

    def __init__(self, classifier: nn.Module, scale: float, interval: tuple[float, float] = EVERYWHERE):
        self.classifier, self.scale, self.interval = classifier, scale, interval

    def __call__(self, x, timesteps, y, **kwargs):
        """y [N]: the classes to move towards; kwargs: what else the model takes."""
        if not self.scale or not is_inside(self.interval, timesteps):
            return th.zeros_like(x)
        return self.scale * class_score(self.classifier, x, timesteps, y)


def class_score(classifier: nn.Module, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
    """The gradient of log p(y | x_t) with respect to x_t, of x's shape; see ClassifierGuidance."""
    with th.enable_grad():
        x = x.detach().requires_grad_(True)
        log_p = th.log_softmax(classifier(x, timesteps).float(), dim=-1)
        return th.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def dynamic_threshold(percentile: float) -> Callable[[th.Tensor], th.Tensor]:
    """A `denoised_fn`: x_0 clipped to its own range and scaled back to [-1, 1] (Saharia et al. 2022, sec. 2.3).

    :param percentile: in (0, 1], of |x_0| of each image; where it is more than 1 it becomes 1.
    """

    def threshold(x0: th.Tensor) -> th.Tensor:
        limit = th.quantile(x0.flatten(1).abs().float(), percentile, dim=1).clamp(min=1).to(x0)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return threshold
