"""The Frechet distance of two sets of features, as Gaussians with their means and covariances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th

from .arrays import Device, on_device

ROWS = 4096  # of the features converted to float64 at once


class Moments(NamedTuple):
    """The mean and covariance of a set of features, float64."""

    mu: np.ndarray  # [D]
    sigma: np.ndarray  # [D, D]


class RunningMoments:
    """The mean and the unbiased covariance of features, added in parts.

    :param device: what computes them; it must have float64.
    """

    def __init__(self, device: Device = "cpu") -> None:
        self.device, self.count = device, 0
        self.mu = th.zeros(0)  # [D]
        self.scatter = th.zeros(0, 0)  # [D, D], the sum of the squares about the mean

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D]."""
        rows = on_device(features, self.device).double()
        n, mu = len(rows), rows.mean(dim=0)
        # Centred first: the mean of squares minus the square of the mean loses digits where the mean is large.
        centred = rows - mu
        if not self.count:
            self.mu, self.scatter = th.zeros_like(mu), mu.new_zeros(len(mu), len(mu))
        shift, total = mu - self.mu, self.count + n
        # Chan, Golub & LeVeque 1979, eq. 2.1: the distance of the means is part of the scatter.
        self.scatter.addmm_(centred.T, centred).addr_(shift, shift, alpha=self.count * n / total)
        self.mu = self.mu + shift * (n / total)
        self.count = total

    def result(self) -> Moments:
        """Raises ValueError for fewer than two rows, and for numbers that are not finite."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: give at least 2")
        if not self.scatter.isfinite().all():
            raise ValueError("features that are not finite numbers have no covariance")
        return Moments(self.mu.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())


def moments(features: np.ndarray, device: Device = "cpu") -> Moments:
    """The mean and the unbiased covariance of features [N, D].

    Raises ValueError for fewer than two rows, and for numbers that are not finite.
    """
    running = RunningMoments(device)
    for start in range(0, len(features), ROWS):
        running.add(features[start : start + ROWS])
    return running.result()


def frechet_distance(a: Moments, b: Moments, device: Device = "cpu") -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^1/2), at least 0.

    (Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500, eq. 6.) Biased upwards, the
    more so for smaller sets: compare only results for equal numbers of images.
    Raises ValueError for moments of different widths.
    """
    if len(a.mu) != len(b.mu):
        raise ValueError(f"features of {len(a.mu)} and {len(b.mu)} dimensions cannot be compared")
    factors = [_factor(on_device(each.sigma, device).double()) for each in (a, b)]
    # With sigma = F F', the product's eigenvalues are the squares of the singular values of F_a' F_b, which
    # are real and computed directly: roots of the product's own eigenvalues have only half of the digits.
    cross = float(th.linalg.svdvals(factors[0].T @ factors[1]).sum())
    difference = a.mu - b.mu
    return max(float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross), 0.0)


def _factor(sigma: th.Tensor) -> th.Tensor:
    """F [D, rank] with F F' = sigma."""
    values, vectors = th.linalg.eigh(sigma)
    # Smaller values are rounding errors (as in numpy's matrix_rank), and their roots would matter: 1e-16 gives 1e-8.
    kept = values > values[-1].clamp(min=0) * len(values) * th.finfo(th.float64).eps
    return vectors[:, kept] * values[kept].sqrt()
