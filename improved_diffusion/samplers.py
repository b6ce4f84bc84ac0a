"""One sampling loop, and one small update rule per method.

A rule turns x at one noise level into x at the next. It knows neither the network, nor clipping, nor where the noise
comes from: `predict(x, t)` gives a Prediction, `draw(x)` gives noise of x's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th


class Prediction(NamedTuple):
    """What the model says of x at t, after clipping; all of x's shape."""

    x0: th.Tensor
    eps: th.Tensor
    mean: th.Tensor
    log_variance: th.Tensor


class Level(NamedTuple):
    """A noise level for each sample; t = -1 is the clean image."""

    t: th.Tensor  # [N] int64
    alpha_bar: th.Tensor  # [N, 1, ...] float32


class Step(NamedTuple):
    """The outcome of a rule's step; both of x's shape."""

    x: th.Tensor
    x0: th.Tensor


Predict = Callable[[th.Tensor, th.Tensor], Prediction]
Draw = Callable[[th.Tensor], th.Tensor]


class Rule:
    """An update rule. A fresh instance serves one trajectory, so that it may keep state between steps."""

    def step(self, predict: Predict, x: th.Tensor, here: Level, there: Level, draw: Draw) -> Step:
        """x [N, C, ...] at level `here` taken to level `there`."""
        raise NotImplementedError


class Ancestral(Rule):
    """A draw from p(x_{t-1} | x_t) (DDPM alg. 2)."""

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here.t)
        # Drawn at the last step too, where it is not used: seeds depend on the order of the draws.
        noise = draw(x)
        return Step(
            prediction.mean + _unless_clean(there, th.exp(0.5 * prediction.log_variance) * noise), prediction.x0
        )


class DDIM(Rule):
    """DDIM (Song et al. 2020, eq. 12): deterministic for eta = 0, and then good both ways; ancestral for eta = 1."""

    def __init__(self, eta: float = 0.0):
        self.eta = eta

    def step(self, predict, x, here, there, draw):
        prediction = predict(x, here.t)
        noise = draw(x)
        direction = 1 - there.alpha_bar
        if self.eta:
            sigma = self.eta * th.sqrt((1 - there.alpha_bar) / (1 - here.alpha_bar))
            sigma = sigma * th.sqrt(1 - here.alpha_bar / there.alpha_bar)
            direction = direction - sigma**2
        mean = prediction.x0 * th.sqrt(there.alpha_bar) + th.sqrt(direction) * prediction.eps
        return Step(mean + _unless_clean(there, sigma * noise) if self.eta else mean, prediction.x0)


def _unless_clean(level: Level, noise: th.Tensor) -> th.Tensor:
    """Zero where the level is the clean image, to which no noise is added."""
    return (level.t >= 0).to(noise).view(-1, *[1] * (noise.ndim - 1)) * noise


def sample_loop(
    rule: Rule, predict: Predict, x: th.Tensor, levels: Sequence[Level], draw: Draw, progress: bool = False
) -> Iterator[dict[str, th.Tensor]]:
    """Walk x along `levels`, yielding `sample` and `pred_xstart` after each step."""
    steps = range(len(levels) - 1)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps)
    for k in steps:
        with th.no_grad():
            x, x0 = rule.step(predict, x, levels[k], levels[k + 1], draw)
        yield {"sample": x, "pred_xstart": x0}


class SeededNoise:
    """Noise whose i-th image depends on the i-th seed alone, whatever the batch, the ranks or the device.

    Drawn on the CPU, because generators of different devices give different numbers.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [th.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Standard normal noise of x's shape, [N, ...] with N the number of seeds."""
        shape = x.shape[1:]
        return th.stack([th.randn(shape, generator=generator) for generator in self.generators]).to(x)

    def integers(self, high: int) -> th.Tensor:
        """One integer in 0..high-1 for each seed: [N] int64."""
        return th.cat([th.randint(high, (1,), generator=generator) for generator in self.generators])
