"""Data whose best denoiser is known: every pixel is an independent N(MU, S^2).

Then x_t is N(sqrt(alpha_bar) MU, alpha_bar S^2 + 1 - alpha_bar), E[x_0 | x_t] is linear in x_t, p(x_{t-1} | x_t) is
exactly Gaussian, and the probability-flow ODE keeps x_t at its number of standard deviations from the mean.
"""

import math

import numpy as np
import torch as th
from helpers import make_diffusion

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.respace import space_timesteps
from improved_diffusion.sampling.timestep_grids import churned, straight_path, timestep_grid

MU, S = 0.15, 0.25


class GaussianWorld:
    """A diffusion of `count` of T steps, evenly spaced or on a grid, and its exact network."""

    def __init__(
        self, T, count=None, schedule="cosine", mean=ModelMeanType.START_X, var=ModelVarType.LEARNED, grid=None,
        churn=0.0,
    ):  # fmt: skip
        kept = space_timesteps(T, [count or T])
        self.schedule = schedule
        self.diffusion = make_diffusion(T, kept, schedule, mean, var, LossType.KL)
        self.path = straight_path(len(kept))
        if grid:
            base = self.diffusion.base_alphas_cumprod
            levels, self.path = churned(timestep_grid(grid, count, base), base, churn)
            self.diffusion = self.diffusion.respaced(levels)
        d = self.diffusion
        self.alpha_bar = d.alphas_cumprod  # float64 [n]
        self.x_mean = np.sqrt(self.alpha_bar) * MU
        self.x_variance = self.alpha_bar * S**2 + 1 - self.alpha_bar
        self.gain = S**2 * np.sqrt(self.alpha_bar) / self.x_variance  # of E[x_0 | x_t]
        x0_variance = S**2 * (1 - self.alpha_bar) / self.x_variance
        self.reverse_variance = d.posterior_variance + d.posterior_mean_coef1**2 * x0_variance

    def model(self, x, t):
        """The exact network: of x_0 or the noise, and the exact log-variance where it is learned."""
        # Rounded to float32 on its way here, where it lies between whole timesteps.
        index = np.abs(np.subtract.outer(t.numpy(), self.diffusion.timestep_map)).argmin(1)

        def at(array):
            return th.from_numpy(array[index]).float().view(-1, *[1] * (x.ndim - 1))

        out = MU + at(self.gain) * (x - at(self.x_mean))
        if self.diffusion.model_mean_type == ModelMeanType.EPSILON:
            out = (x - at(np.sqrt(self.alpha_bar)) * out) / at(np.sqrt(1 - self.alpha_bar))
        elif self.diffusion.model_mean_type == ModelMeanType.VELOCITY:
            out = (at(np.sqrt(self.alpha_bar)) * x - out) / at(np.sqrt(1 - self.alpha_bar))
        elif self.diffusion.model_mean_type == ModelMeanType.PREVIOUS_X:
            d = self.diffusion
            base = make_diffusion(d.original_num_steps, None, self.schedule)
            t = np.array(d.timestep_map)[index]
            out = base.q_posterior_mean_variance(out, x, th.from_numpy(t).long())[0]
        if self.diffusion.model_var_type == ModelVarType.LEARNED:
            out = th.cat([out, at(np.log(self.reverse_variance)).expand_as(x)], dim=1)
        return out

    def start(self, n):
        """[n, 1, 16, 16] draws of x_T."""
        x = self.x_mean[-1] + math.sqrt(self.x_variance[-1]) * np.random.standard_normal((n, 1, 16, 16))
        return th.from_numpy(x).float()

    def flow(self, x, here, there=None):
        """Where the probability-flow ODE takes x from step `here` to `there`, or to the clean image."""
        z = (x - self.x_mean[here]) / math.sqrt(self.x_variance[here])
        return MU + S * z if there is None else self.x_mean[there] + math.sqrt(self.x_variance[there]) * z
