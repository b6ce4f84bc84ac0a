"""Subsets of the timesteps: fewer, larger steps of the same process (IDDPM sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch as th

from .config import UserError, shown
from .gaussian_diffusion import GaussianDiffusion, GivenOutput, ModelMeanType, _extract_into_tensor, _on_device
from .schedules import alpha_bar_at


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps to keep of a process of `num_timesteps`.

    :param section_counts: how many to keep in each of equal sections, as a list or as "10,15,20"; or "ddimN" for the
        integer stride of DDIM that keeps exactly N.
    Raises UserError for counts that the sections do not hold and for an N that no stride gives.
    """
    option = f"--timestep_respacing {shown(section_counts)}"
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_stride(num_timesteps, section_counts)
        try:
            section_counts = [int(count) for count in section_counts.split(",")]
        except ValueError:
            raise UserError(f"{option}: expected a count (250), counts (10,15,20) or a stride (ddim50)") from None
    sections = len(section_counts)
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = num_timesteps // sections + (1 if i < num_timesteps % sections else 0)
        if not 1 <= count <= size:
            raise UserError(
                f"{option}: section {i + 1} of {sections} holds {size} of the {num_timesteps} steps, cannot take "
                f"{shown(count)} of them: give 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Accumulated by addition: another order of operations rounds to other steps.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += size
    return kept


def _ddim_stride(num_timesteps: int, text: str) -> set[int]:
    try:
        desired = int(text[len("ddim") :])
    except ValueError:
        raise UserError(f"--timestep_respacing {shown(text)}: expected ddim and a number, such as ddim50") from None
    for stride in range(1, max(num_timesteps, 2)):
        if len(range(0, num_timesteps, stride)) == desired:
            return set(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    number = shown(desired)
    near = min(possible, key=lambda n: (abs(n - desired), n), default=1)
    raise UserError(
        f"--timestep_respacing {shown(text)}: no integer stride keeps exactly {number} of {num_timesteps} steps: try "
        f"ddim{near}, or {number}"
    )


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion that skips to a subset of the steps of a base process.

    :param use_timesteps: the timesteps to keep, in [0, T-1] of the base process; they may lie between whole ones.
    :param kwargs: the arguments of the base GaussianDiffusion.
    The network still sees the base process's timesteps, through `timestep_map` (new -> old).
    Raises ValueError for timesteps that the base process does not have.
    """

    def __init__(self, use_timesteps, **kwargs):
        base = np.array(kwargs.pop("betas"), dtype=np.float64)
        self.base_betas, self.base_kwargs = base, dict(kwargs)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(base)
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] <= len(base) - 1:
            raise ValueError(f"use_timesteps must be a non-empty subset of 0..{len(base) - 1}")
        self._timestep_array = np.array(self.timestep_map)
        self.base_alphas_cumprod = np.cumprod(1.0 - base)
        kept = alpha_bar_at(self.base_alphas_cumprod, self._timestep_array)
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def respaced(self, use_timesteps) -> SpacedDiffusion:
        """The same base process on other timesteps, of the same class.

        Raises ValueError for a network that predicts x_{t-1}, unless all timesteps are kept: it knows only its own
        steps. Also where a method was replaced on this instance: it may refer to this instance's timesteps.
        """
        timesteps = [int(t) if t == int(t) else float(t) for t in use_timesteps]
        if self.model_mean_type == ModelMeanType.PREVIOUS_X and sorted(timesteps) != [*range(self.original_num_steps)]:
            raise ValueError("a network that predicts x_{t-1} cannot take other steps than it was trained on: keep all")
        replaced = [name for name in vars(self) if callable(getattr(type(self), name, None))]
        if replaced:
            raise ValueError(f"{', '.join(replaced)} was replaced on the diffusion itself: replace it in a subclass")
        return type(self)(timesteps, betas=self.base_betas, **self.base_kwargs)

    def p_mean_variance(self, model, *args, **kwargs):
        """GaussianDiffusion.p_mean_variance of a model that sees the base process's timesteps."""
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        """GaussianDiffusion.condition_mean of a cond_fn that sees the base process's timesteps."""
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        """GaussianDiffusion.condition_score of a cond_fn that sees the base process's timesteps."""
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        """GaussianDiffusion.training_losses of a model that sees the base process's timesteps."""
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def _wrap_model(self, model):
        """The model called with this process's timesteps; one that is wrapped, or takes none, is returned as it is."""
        if isinstance(model, (_WrappedModel, GivenOutput)):
            return model
        return _WrappedModel(model, self._timestep_array, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t):
        """t itself: the wrapped model scales."""
        return t

    def network_timestep(self, t: Any) -> Any:
        """A timestep of the base process, or a tensor of them, as the network sees it."""
        return t * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    def score_weight(self, timesteps: th.Tensor, x: th.Tensor) -> th.Tensor:
        """The change of the network's mean part for a unit of the score, the gradient of log p(x_t).

        :param timesteps: [N], as the network sees them.
        :return: [N, 1, ...], as many dimensions as x; 0 where there is no signal.
        """
        seen = self._wrap_model(lambda x, t: t)(x, th.arange(self.num_timesteps, device=timesteps.device)).float()
        index = (seen[None] - timesteps.float()[:, None]).abs().argmin(dim=1)
        return _extract_into_tensor(self._score_weights, index, (len(x), *[1] * (x.ndim - 1)))

    @cached_property
    def _score_weights(self) -> np.ndarray:
        """The weights of `score_weight`, [T] (Dhariwal & Nichol 2021, alg. 2, for the noise)."""
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = {
                ModelMeanType.START_X: sigma**2 / alpha,
                ModelMeanType.EPSILON: -sigma,
                ModelMeanType.VELOCITY: -sigma / alpha,
                ModelMeanType.PREVIOUS_X: self.posterior_mean_coef1 * sigma**2 / alpha,
            }[self.model_mean_type]
        return np.where(alpha > 0, weight, 0.0)


class _WrappedModel:
    """A model called with the timesteps t [N] of a respaced process; it sees those of the base process.

    :param timestep_map: new -> old; :param original_num_steps: T of the base process.
    """

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model = model
        self.timestep_map = np.asarray(timestep_map)
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x, ts, **kwargs):
        timesteps = _on_device(self.timestep_map, ts.device)[ts]
        if self.rescale_timesteps:
            timesteps = timesteps.float() * (1000.0 / self.original_num_steps)
        return self.model(x, timesteps, **kwargs)
