"""A model in, a guided model out: what it predicts is moved away from a guide's prediction, or towards a class.

Each is called as the model is, `(x [N, C, ...], timesteps [N], **kwargs)`, and gives what the model gives: the mean
part guided, a learned variance as the conditional model has it. Timesteps are as the network sees them. The mean part
is a noise, an x_0, a v or an x_{t-1}: all are affine in each other at a given x and t, so that guiding one guides all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th
from torch import nn

from ..nn import NULL_LABEL

EVERYWHERE = (-math.inf, math.inf)
ROUNDING = 1e-3  # of timesteps up to 4000


class Guided(nn.Module):
    """What the guided models share: where guidance acts, and how far it goes.

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
        """Whether guidance changes anything; all images of a batch are at the same timestep."""
        if self.scale == 1:
            return False
        if self.interval == EVERYWHERE:
            return True
        # A bound that is one of the timesteps counts as inside, though these are rounded to float32.
        return self.interval[0] - ROUNDING <= float(timesteps[0]) <= self.interval[1] + ROUNDING

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
    """Guided by the same model with the class hidden (Ho & Salimans 2022, arXiv 2207.12598); both in one batch.

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
    """Guided by another, weaker model: smaller, or trained for less time (Karras et al. 2024, arXiv 2406.02507).

    An unconditional one makes it classifier-free guidance with two networks.
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


class ClassifierGuidance(Guided):
    """Moved along the gradient of log p(y | x_t) of a noisy classifier (Dhariwal & Nichol 2021, sec. 4).

    :param classifier: (x [N, C, ...], timesteps [N]) -> logits [N, classes].
    :param score_weight: timesteps [N] -> what a unit of the score adds to the network's mean part,
        [N, 1, ...]; see SpacedDiffusion.score_weight. For the noise it is -sigma (their alg. 2).
    :param scale: s, what the gradient counts; 0 is the model itself.
    :param model_takes_classes: whether the model is called with y, as well as the classifier.
    """

    def __init__(
        self, model: nn.Module, classifier: nn.Module, score_weight: Callable[[th.Tensor, th.Tensor], th.Tensor],
        scale: float, model_takes_classes: bool = True, interval: tuple[float, float] = EVERYWHERE,
    ):  # fmt: skip
        super().__init__(model, 1 + scale, interval)
        self.classifier, self.score_weight, self.model_takes_classes = classifier, score_weight, model_takes_classes

    def forward(self, x, timesteps, y, **kwargs):
        """y [N]: the classes to move towards."""
        output = self.model(x, timesteps, **({**kwargs, "y": y} if self.model_takes_classes else kwargs))
        if not self.acts_at(timesteps):
            return output
        channels = x.shape[1]
        moved = output[:, :channels] + (self.scale - 1) * self.score_weight(timesteps, x) * self._score(x, timesteps, y)
        return th.cat([moved, output[:, channels:]], dim=1)

    def _score(self, x, timesteps, y):
        """The gradient of log p(y | x_t) with respect to x_t, of x's shape."""
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = th.log_softmax(self.classifier(x, timesteps).float(), dim=-1)
            return th.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def dynamic_threshold(percentile: float) -> Callable[[th.Tensor], th.Tensor]:
    """A `denoised_fn`: x_0 clipped to its own range and scaled back to [-1, 1] (Saharia et al. 2022, sec. 2.3).

    :param percentile: in (0, 1], of |x_0| of each image, which becomes 1 where it is more.
    """

    def threshold(x0: th.Tensor) -> th.Tensor:
        limit = th.quantile(x0.flatten(1).abs().float(), percentile, dim=1).clamp(min=1).to(x0)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return threshold
