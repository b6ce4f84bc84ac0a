"""Precision, recall, density and coverage: how samples and real images overlap in the features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .neighbours import Pairs, nearest_neighbours


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
    features: np.ndarray, reference: np.ndarray, neighbours: int = 3, density_neighbours: int = 5
) -> ManifoldScores:
    """How the samples' features [N, D] and the real images' [M, D] cover each other.

    The ball of an image reaches to its k-th nearest neighbour among the others of its own set (arXiv 1904.06991, eq. 1;
    arXiv 2002.09797): k is `neighbours` for precision and recall, and `density_neighbours` for density and coverage.
    Copies of an image are neighbours at distance 0, and a point on the edge of a ball is inside.
    Raises ValueError for too few images, and for sets of different widths.
    """
    own, _ = nearest_neighbours(features, count=neighbours)
    real, _ = nearest_neighbours(reference, count=max(neighbours, density_neighbours))
    of_features, of_reference, of_density = own[:, -1], real[:, neighbours - 1], real[:, density_neighbours - 1]
    pairs = Pairs(features, reference)
    by_features = pairs.thresholds(pairs.x_squared[:, None], of_features[:, None])
    by_reference, by_density = (pairs.thresholds(pairs.y_squared, radius) for radius in (of_reference, of_density))
    precise, recalled, covered = (np.zeros(n, bool) for n in (len(features), len(reference), len(reference)))
    balls = np.zeros(len(features))
    for rows, closeness in pairs.blocks():
        in_reference, doubtful = _classify(closeness, *by_reference)
        precise[rows] = in_reference.any(axis=1)
        in_features, unsure = _classify(closeness, *(part[rows] for part in by_features))
        recalled |= in_features.any(axis=0)
        doubtful |= unsure
        in_density, unsure = _classify(closeness, *by_density)
        covered |= in_density.any(axis=0)
        balls[rows] = in_density.sum(axis=1)
        doubtful |= unsure
        found = np.flatnonzero(doubtful)
        i, j = np.divmod(found, len(reference))
        i += rows.start
        squared = pairs.squared(i, j)
        precise[i[squared <= of_reference[j]]] = True
        recalled[j[squared <= of_features[i]]] = True
        dense = squared <= of_density[j]
        covered[j[dense]] = True
        balls += np.bincount(i[dense & ~in_density.ravel()[found]], minlength=len(features))
    # Each of M balls holds k of M real images, so that a sample like those is in k of them: the density is about 1.
    return ManifoldScores(*(_share(part) for part in (precise, recalled, balls / density_neighbours, covered)))


def _classify(closeness: np.ndarray, least: np.ndarray, sure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs that are inside for sure, pairs that float32 cannot decide): bool [rows, M] like the closeness."""
    inside = closeness >= sure
    return inside, (closeness >= least) ^ inside


def _share(values: np.ndarray) -> Share:
    return Share(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
