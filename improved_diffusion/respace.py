"""Subsets of the timesteps: fewer, larger steps of the same process (IDDPM sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch as th

from .config import UserError
from .gaussian_diffusion import GaussianDiffusion, ModelMeanType
from .schedules import alpha_bar_at


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps to keep of a process of `num_timesteps`.

    :param section_counts: how many to keep in each of equal sections, as a list or as "10,15,20"; or "ddimN" for the
        integer stride of DDIM that keeps exactly N.
    Raises UserError for counts that the sections do not hold and for an N that no stride gives.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_stride(num_timesteps, section_counts)
        try:
            section_counts = [int(count) for count in section_counts.split(",")]
        except ValueError:
            raise UserError(
                f"timestep_respacing {section_counts!r}: expected a count (250), counts (10,15,20) or a stride (ddim50)"
            ) from None
    sections = len(section_counts)
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = num_timesteps // sections + (1 if i < num_timesteps % sections else 0)
        if not 1 <= count <= size:
            raise UserError(
                f"timestep_respacing: section {i + 1} of {sections} holds {size} of the {num_timesteps} steps, "
                f"cannot take {count} of them: give 1 to {size}"
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
        raise UserError(f"timestep_respacing {text!r}: expected ddim and a number, such as ddim50") from None
    for stride in range(1, max(num_timesteps, 2)):
        if len(range(0, num_timesteps, stride)) == desired:
            return set(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    near = min(possible, key=lambda n: (abs(n - desired), n), default=1)
    raise UserError(f"no integer stride keeps exactly {desired} of {num_timesteps} steps: try ddim{near}, or {desired}")


class SpacedDiffusion(GaussianDiffusion):
    """The diffusion that skips to a subset of the steps of a base process.

    :param use_timesteps: the timesteps to keep, in [0, T-1] of the base process; they may lie between whole ones.
    :param kwargs: the arguments of the base GaussianDiffusion.
    The network still sees the base process's timesteps, through `timestep_map` (new -> old).
    """

    def __init__(self, use_timesteps, **kwargs):
        base = np.array(kwargs.pop("betas"), dtype=np.float64)
        self.base_betas, self.base_kwargs = base, dict(kwargs)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(base)
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] <= len(base) - 1:
            raise ValueError(f"use_timesteps must be a non-empty subset of 0..{len(base) - 1}")
        self.base_alphas_cumprod = np.cumprod(1.0 - base)
        kept = alpha_bar_at(self.base_alphas_cumprod, np.array(self.timestep_map))
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def respaced(self, use_timesteps) -> SpacedDiffusion:
        """The same base process on other timesteps, for sampling by any rule.

        Where the network predicts x_{t-1} that is the base process's, at any subset; constructed directly, a
        SpacedDiffusion takes it for that of its own larger step, as published.
        """
        timesteps = [int(t) if t == int(t) else float(t) for t in use_timesteps]
        spaced = SpacedDiffusion(timesteps, betas=self.base_betas, **self.base_kwargs)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            base = GaussianDiffusion(betas=self.base_betas, **self.base_kwargs)
            for name in ("xstart_from_xprev", "xstart_from_xt"):
                spaced._arrays[name] = np.interp(spaced.timestep_map, range(len(self.base_betas)), base._arrays[name])
            sigma_over_alpha = spaced.sqrt_one_minus_alphas_cumprod / spaced.sqrt_alphas_cumprod
            sigma_squared_over_alpha = sigma_over_alpha * spaced.sqrt_one_minus_alphas_cumprod
            spaced._arrays["score_weight"] = sigma_squared_over_alpha / spaced._arrays["xstart_from_xprev"]
            spaced.mean_is_output = False
        return spaced

    def network_timestep(self, t: float) -> float:
        """A timestep of the base process as the network sees it."""
        return t * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    def score_weight(self, timesteps: th.Tensor, x: th.Tensor) -> th.Tensor:
        """What a unit of the score, the gradient of log p(x_t), adds to the network's mean part at the network's
        `timesteps` [N]: [N, 1, ...]. 0 where there is no signal."""
        seen = self._scale_timesteps(th.arange(self.num_timesteps, device=timesteps.device)).float()
        index = (seen[None] - timesteps.float()[:, None]).abs().argmin(dim=1)
        return self._at("score_weight", index, x)

    def _scale_timesteps(self, t):
        key = ("timestep_map", t.device)
        if key not in self._on_device:
            self._on_device[key] = th.tensor(self.timestep_map, device=t.device)
        original = self._on_device[key][t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original
