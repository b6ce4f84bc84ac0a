"""Consistency tuning: the student learns to reach the end of the probability flow from anywhere on it.

ECT is Geng et al. 2024 (arXiv 2406.14548); consistency models are Song et al. 2023 (arXiv 2303.01469). Their
f(x, sigma) is the predicted x_0, which at sigma = 0 is x itself. Of two points x_0 + sigma e and x_0 + r e on a line,
r < sigma, f of the noisier one is to be what f of the other one is now. All sigma are EDM's, sigma / alpha of ours, for
images in [-1, 1], whose standard deviation EDM takes as 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch as th

from ... import distributed
from ...config import height_width
from ...sampling.timestep_grids import SIGMA_MAX, side_of
from .levels import NoiseLevels, like, x0_of
from .objective import Distillation, RandomState
from .teacher import prediction_of

FIRST_Q = 2


class LogNormalLevels:
    """Timesteps whose noise level has a normal logarithm (Karras et al. 2022, table 1).

    :param mean, std: of log sigma.
    :param largest: the noise level above which none is drawn; none is drawn outside of the trained ones either.
    """

    def __init__(self, levels: NoiseLevels, mean: float, std: float, largest: float):
        self.levels, self.mean, self.std = levels, mean, std
        low, high = levels.range()
        self.bounds = low, min(high, largest)

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """(t, weight), both float32 [batch_size]: timesteps, rarely whole, and 1. Draws from numpy's generator."""
        sigma = np.exp(np.random.normal(self.mean, self.std, batch_size)).clip(*self.bounds)
        t = th.from_numpy(self.levels.timesteps_of(sigma)).float()
        return distributed.to_device(t, device), th.ones(batch_size, device=device)


class Consistency(Distillation):
    """Consistency tuning. The student starts as the teacher; the teacher is not needed any more."""

    sampler = "renoise"

    def __init__(self, settings, diffusion, teacher):
        super().__init__(settings, diffusion, teacher)
        self.levels = NoiseLevels(diffusion.base_alphas_cumprod)
        self.least, _ = self.levels.range()
        self.at_step(0)

    def schedule_sampler(self) -> LogNormalLevels:
        options = self.settings.distill
        side = side_of(*height_width(self.settings.model.size))
        largest = SIGMA_MAX * max(1.0, side / 64)  # beyond, no image shows through
        return LogNormalLevels(self.levels, options.p_mean, options.p_std, largest)

    @property
    def qs(self) -> list[int]:
        """q of each stage. At q = 1 every r is 0: the student learns to denoise, which a new prediction needs first."""
        doublings = int(math.log2(self.settings.distill.max_q))
        tuned = [FIRST_Q**n for n in range(1, doublings + 1)]
        return tuned if prediction_of(self.settings.diffusion) == self.teacher.prediction else [1, *tuned]

    def at_step(self, step: int) -> None:
        train, qs = self.settings.train, self.qs
        length = self.settings.distill.q_steps or math.ceil((train.max_steps or train.lr_anneal_steps) / len(qs))
        self.q = qs[min(step // length, len(qs) - 1)]

    def next_sigma(self, sigma: th.Tensor) -> th.Tensor:
        """r of each sigma (Geng et al. 2024, sec. 3.2), 0 instead of a level below those that the model was trained on.

        There f is known, x_0; a network that predicts x_0 would otherwise learn from itself alone, and collapse.
        """
        n = 1 + 8 * th.sigmoid(-sigma)
        r = sigma * (1 - n / self.q)
        return th.where(r < self.least, 0, r)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """`loss`, ||f(x_sigma) - f(x_r)|| / (sigma - r), and `distance`, the same without weight; both per pixel."""
        if noise is None:
            noise = th.randn_like(x_start)
        angle = self.levels.angle_at(t)
        sigma = angle.tan()
        r = self.next_sigma(sigma)
        random = RandomState(x_start.device)
        x0 = self.predict(model, x_start, noise, angle, t, model_kwargs)
        random.restore()  # the same dropout in both
        with th.no_grad():
            angle = r.atan()
            target = self.predict(model, x_start, noise, angle, self.levels.timestep_at(angle), model_kwargs)
        target = th.where(like(r > 0, x_start), target, x_start)
        distance = th.linalg.vector_norm((x0 - target).flatten(1), dim=1) / math.sqrt(x_start[0].numel())
        return {"loss": distance / (sigma - r), "distance": distance}

    def predict(
        self, model: Callable[..., th.Tensor], x_start: th.Tensor, noise: th.Tensor, angle: th.Tensor, t: th.Tensor,
        model_kwargs: dict[str, th.Tensor] | None,
    ) -> th.Tensor:  # fmt: skip
        """f of the images with noise, at the timesteps t [N] whose angles are given."""
        x = like(angle.cos(), noise) * x_start + like(angle.sin(), noise) * noise
        output = model(x, self.diffusion.network_timestep(t), **(model_kwargs or {}))
        return x0_of(self.diffusion.model_mean_type, output, x, angle)
