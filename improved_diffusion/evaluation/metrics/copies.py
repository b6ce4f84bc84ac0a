"""Copied training images: the nearest one of each sample, and whether samples are nearer than unseen images are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import Device
from .neighbours import nearest_neighbours


class CopyScore(NamedTuple):
    """How much nearer to the training images the samples are than held-out images."""

    nearer: float  # P(a sample is nearer than a held-out image), ties count half: 0.5 without copies, near 1 with them
    standard_error: float


def nearest(features: np.ndarray, train: np.ndarray, device: Device = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """(Euclidean distance float64 [N], row int64 [N]) of the nearest of train [M, D] to each of the features [N, D].

    Among equal rows, any may be returned. Raises ValueError for sets of different widths.
    """
    squared, index = nearest_neighbours(features, train, device=device)
    return np.sqrt(squared[:, 0]), index[:, 0]


def copy_score(distances: np.ndarray, held_out: np.ndarray) -> CopyScore:
    """Compare the samples' distances [N] to the training images with those of images held out [K], as in `nearest`.

    (Meehan et al. 2020, arXiv 2004.05675: the Mann-Whitney statistic, here as a share of all pairs.) The standard error
    is that of DeLong et al. 1988, over both groups, with the training images taken as given; 0 for groups that do not
    overlap. Raises ValueError for fewer than two in either.
    """
    if min(len(distances), len(held_out)) < 2:
        raise ValueError(f"{min(len(distances), len(held_out))} images are too few to compare: give at least 2")
    of_samples = 1 - _share_below(distances, held_out)  # [N]: share of the held-out images that are further
    of_held_out = _share_below(held_out, distances)  # [K]: share of the samples that are nearer
    variance = of_samples.var(ddof=1) / len(of_samples) + of_held_out.var(ddof=1) / len(of_held_out)
    return CopyScore(float(of_samples.mean()), float(np.sqrt(variance)))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the share of the others below it, plus half of those equal to it: [len(values)]."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (left + right) / 2 / len(others)
