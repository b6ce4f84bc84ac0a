"""Noise schedules: beta for each step, in float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas [T] of a schedule, float64.

    `linear` (DDPM sec. 4) keeps its total noise when T is not 1000 by scaling both ends; `cosine` is IDDPM eq. 17;
    `sigmoid` is that of Jabri et al. 2022 (arXiv 2212.11972) from -3 to 3 with temperature 1.
    Raises NotImplementedError for another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    if schedule_name == "sigmoid":
        first, last = _sigmoid(-3.0), _sigmoid(3.0)
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda u: (last - _sigmoid(6 * u - 3)) / (last - first))
    raise NotImplementedError(f"unknown beta schedule {schedule_name!r}: choose linear, cosine or sigmoid")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """The betas [T] that make the cumulative product of 1 - beta follow `alpha_bar(u)`, u = t/T in [0, 1].

    `max_beta` below 1 prevents a singularity at the end (IDDPM sec. 3.2).
    """
    T = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)])


def _betas(alpha_bar: np.ndarray) -> np.ndarray:
    """The betas [T] whose cumulative product of 1 - beta is alpha_bar [T]."""
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def shift_schedule(betas: np.ndarray, shift: float) -> np.ndarray:
    """The betas [T] of the schedule whose signal-to-noise ratio is that of `betas` divided by shift^2.

    A larger image needs more noise for the same loss of information: shift is its side divided by 64, the side that the
    schedule was made for (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 5).
    """
    alpha_bar = np.cumprod(1.0 - betas)
    return _betas(alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar)))


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """The betas [T] of the schedule rescaled to end in pure noise, alpha_bar = 0 (Lin et al. 2024, alg. 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    return _betas((root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2)


# Between the timesteps we interpolate the angle with cos^2 = alpha_bar. For the cosine schedule it is a straight line,
# for others nearly so from one timestep to the next, and unlike log-SNR it is finite at both ends.


def alpha_bar_at(alpha_bar: np.ndarray, t: np.ndarray) -> np.ndarray:
    """alpha_bar [K] at any timesteps t [K] in [0, T-1], whole or not, of a schedule alpha_bar [T]; float64."""
    t = np.asarray(t, dtype=np.float64)
    between = np.cos(np.interp(t, np.arange(len(alpha_bar)), _angle(alpha_bar))) ** 2
    return np.where(t == np.floor(t), alpha_bar[t.astype(int)], between)


def sigma_at(alpha_bar: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The noise levels [K] at any timesteps t [K], in EDM's unit sqrt(1/alpha_bar - 1); inf without a signal."""
    with np.errstate(divide="ignore"):
        return np.sqrt(1 / alpha_bar_at(alpha_bar, t) - 1)


def timestep_of_sigma(alpha_bar: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The timesteps t [K] in [0, T-1], rarely whole, of noise levels sigma [K] in EDM's unit: sigma_at's inverse."""
    return np.interp(np.arctan(sigma), _angle(alpha_bar), np.arange(len(alpha_bar)))


def _angle(alpha_bar: np.ndarray) -> np.ndarray:
    return np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))
