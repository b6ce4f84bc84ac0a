"""The Frechet distance of two sets of features, as Gaussians with their means and covariances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROWS = 4096  # of the features converted to float64 at once


class Moments(NamedTuple):
    """The mean and covariance of a set of features, float64."""

    mu: np.ndarray  # [D]
    sigma: np.ndarray  # [D, D]


class RunningMoments:
    """The mean and the unbiased covariance of features, added in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.mu = np.zeros(0)  # [D]
        self.scatter = np.zeros((0, 0))  # [D, D], the sum of the squares about the mean

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D]."""
        n, mu = len(features), features.mean(axis=0, dtype=np.float64)
        # Centred first: the mean of squares minus the square of the mean loses digits where the mean is large.
        centred = features - mu
        if not self.count:
            self.mu, self.scatter = np.zeros_like(mu), np.zeros((len(mu), len(mu)))
        shift, total = mu - self.mu, self.count + n
        # Chan, Golub & LeVeque 1979, eq. 2.1: the distance of the means is part of the scatter.
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * n / total)
        self.mu = self.mu + shift * (n / total)
        self.count = total

    def result(self) -> Moments:
        """Raises ValueError for fewer than two rows, and for numbers that are not finite."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: give at least 2")
        if not np.isfinite(self.scatter).all():
            raise ValueError("features that are not finite numbers have no covariance")
        return Moments(self.mu, self.scatter / (self.count - 1))


def moments(features: np.ndarray) -> Moments:
    """The mean and the unbiased covariance of features [N, D].

    Raises ValueError for fewer than two rows, and for numbers that are not finite.
    """
    running = RunningMoments()
    for start in range(0, len(features), ROWS):
        running.add(features[start : start + ROWS])
    return running.result()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^1/2), at least 0.

    (Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500, eq. 6.) Biased upwards, the
    more so for smaller sets: compare only results for equal numbers of images.
    Raises ValueError for moments of different widths.
    """
    if len(a.mu) != len(b.mu):
        raise ValueError(f"features of {len(a.mu)} and {len(b.mu)} dimensions cannot be compared")
    # With sigma = F F', the product's eigenvalues are the squares of the singular values of F_a' F_b, which
    # are real and computed directly: roots of the product's own eigenvalues have only half of the digits.
    cross = np.linalg.svd(_factor(a.sigma).T @ _factor(b.sigma), compute_uv=False).sum()
    difference = a.mu - b.mu
    return max(float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross), 0.0)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F [D, rank] with F F' = sigma."""
    values, vectors = np.linalg.eigh(sigma)
    # Smaller values are rounding errors (as in numpy's matrix_rank), and their roots would matter: 1e-16 gives 1e-8.
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
