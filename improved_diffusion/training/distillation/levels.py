"""Noise levels at any timestep, whole or not, each image at its own, on the device."""

from __future__ import annotations

import numpy as np
import torch as th

from ...gaussian_diffusion import ModelMeanType, _on_device
from ...schedules import sigma_at, timestep_of_sigma


class NoiseLevels:
    """The noise levels of a trained process, for training at levels between its own.

    In x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, alpha is the cosine and sigma the sine of an angle, which
    is interpolated between the timesteps, as the samplers do. "Noise to signal" is sigma / alpha, EDM's sigma.
    :param alpha_bar: float64 [T], of the process that the model was trained on.
    """

    def __init__(self, alpha_bar: np.ndarray):
        self.alpha_bar = alpha_bar
        self._angles = np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))

    def angle_at(self, t: th.Tensor) -> th.Tensor:
        """The angles [N] of timesteps [N] in [0, T-1]."""
        angles = _on_device(self._angles, t.device)
        below = t.long().clamp(0, len(angles) - 1)
        above = (below + 1).clamp(max=len(angles) - 1)
        return th.lerp(angles[below], angles[above], t.float() - below)

    def timestep_at(self, angle: th.Tensor) -> th.Tensor:
        """The timesteps [N] in [0, T-1] of angles [N]: the inverse of angle_at; those outside give the nearest end."""
        angles = _on_device(self._angles, angle.device)
        above = th.searchsorted(angles, angle).clamp(1, len(angles) - 1)
        low, high = angles[above - 1], angles[above]
        return (above - 1 + (angle - low) / (high - low)).clamp(0, len(angles) - 1)

    def range(self) -> tuple[float, float]:
        """The least and the largest noise to signal that the model was trained on."""
        low, high = sigma_at(self.alpha_bar, np.array([0, len(self.alpha_bar) - 1]))
        return float(low), float(high)

    def timesteps_of(self, noise_to_signal: np.ndarray) -> np.ndarray:
        """The timesteps [N] of noise levels [N], on the host, float64."""
        return timestep_of_sigma(self.alpha_bar, noise_to_signal)


def like(values: th.Tensor, x: th.Tensor) -> th.Tensor:
    """[N] as [N, 1, ...], to multiply with x [N, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def x0_of(kind: ModelMeanType, output: th.Tensor, x: th.Tensor, angle: th.Tensor) -> th.Tensor:
    """The predicted x_0, not clipped, from a network's output [N, C or 2C, ...] for x [N, C, ...] at angles [N].

    A learned variance, the output's second half, is left out.
    """
    output, alpha, sigma = output[:, : x.shape[1]], like(angle.cos(), x), like(angle.sin(), x)
    if kind == ModelMeanType.EPSILON:
        return (x - sigma * output) / alpha
    if kind == ModelMeanType.VELOCITY:
        return alpha * x - sigma * output  # Salimans & Ho 2022, app. D
    if kind == ModelMeanType.START_X:
        return output
    raise ValueError(f"a network that predicts {kind.name} has no x_0 between its timesteps")
