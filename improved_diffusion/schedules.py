"""How much noise each step adds: schedules of beta, in float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas [T] of a published schedule, float64.

    `linear` (DDPM sec. 4) keeps its total noise when T is not 1000 by scaling both ends; `cosine` is IDDPM eq. 17.
    Raises NotImplementedError for a name it does not know.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"unknown beta schedule {schedule_name!r}: choose linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """The betas [T] that make the cumulative product of 1 - beta follow `alpha_bar(u)`, u = t/T in [0, 1].

    `max_beta` below 1 prevents a singularity at the end (IDDPM sec. 3.2).
    """
    T = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)])
