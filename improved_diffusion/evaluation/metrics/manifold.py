"""Precision, recall, density and coverage: how samples and real images overlap in the features."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch as th

from .arrays import Device
from .neighbours import Pairs, nearest_of


class Share(NamedTuple):
    """A mean over images and its standard error, with the balls taken as given."""

    value: float
    standard_error: float


class ManifoldScores(NamedTuple):
    """The first two are of Kynkaanniemi et al. 2019, the others of Naeem et al. 2020."""

    precision: Share  # of the samples: those in the ball of any real image
    recall: Share  # of the real images: those in the ball of any sample
    density: Share  # of the samples: the number of real images' balls that each is in, over k; may exceed 1
    coverage: Share  # of the real images: those with any sample in their ball


def manifold_scores(
    features: np.ndarray,
    reference: np.ndarray,
    neighbours: int = 3,
    density_neighbours: int = 5,
    device: Device = "cpu",
) -> ManifoldScores:
    """How the samples' features [N, D] and the real images' [M, D] cover each other.

    The ball of an image reaches to its k-th nearest neighbour among the others of its own set (arXiv 1904.06991, eq. 1;
    arXiv 2002.09797): k is `neighbours` for precision and recall, and `density_neighbours` for density and coverage.
    Copies of an image are neighbours at distance 0, and a point on the edge of a ball is inside.
    :param device: what computes them; it must have float64. The scores are the same on all.
    Raises ValueError for too few images, and for sets of different widths.
    """
    own, _ = nearest_of(Pairs(features, features, device), neighbours, alone=True)
    real, _ = nearest_of(Pairs(reference, reference, device), max(neighbours, density_neighbours), alone=True)
    of_features, of_reference, of_density = own[:, -1], real[:, neighbours - 1], real[:, density_neighbours - 1]
    pairs = Pairs(features, reference, device)
    by_features = pairs.thresholds(pairs.x_squared[:, None], of_features[:, None])
    by_reference, by_density = (pairs.thresholds(pairs.y_squared, radius) for radius in (of_reference, of_density))
    precise = th.zeros_like(pairs.x_squared, dtype=th.bool)
    recalled, covered = (th.zeros_like(pairs.y_squared, dtype=th.bool) for _ in range(2))
    balls = th.zeros_like(pairs.x_squared)
    for rows, closeness in pairs.blocks():
        in_reference, doubtful = _classify(closeness, *by_reference)
        precise[rows] = in_reference.any(dim=1)
        in_features, unsure = _classify(closeness, *(part[rows] for part in by_features))
        recalled |= in_features.any(dim=0)
        doubtful |= unsure
        in_density, unsure = _classify(closeness, *by_density)
        covered |= in_density.any(dim=0)
        balls[rows] = in_density.sum(dim=1, dtype=th.int32)
        doubtful |= unsure
        row, j = doubtful.nonzero(as_tuple=True)
        i = row + rows.start
        squared = pairs.squared(i, j)
        precise[i[squared <= of_reference[j]]] = True
        recalled[j[squared <= of_features[i]]] = True
        dense = squared <= of_density[j]
        covered[j[dense]] = True
        balls += th.bincount(i[dense & ~in_density[row, j]], minlength=len(features))
    # Each of M balls holds k of M real images, so that a sample like those is in k of them: the density is about 1.
    return ManifoldScores(*(_share(part) for part in (precise, recalled, balls / density_neighbours, covered)))


def _classify(closeness: th.Tensor, least: th.Tensor, sure: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """(pairs that are inside for sure, pairs that float32 cannot decide): bool [rows, M] like the closeness."""
    inside = closeness >= sure
    return inside, (closeness >= least) ^ inside


def _share(values: th.Tensor) -> Share:
    values = values.double()
    return Share(float(values.mean()), float(values.std()) / math.sqrt(len(values)))
