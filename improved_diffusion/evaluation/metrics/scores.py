"""Every metric that two sets of features allow."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import Device
from .copies import copy_score, nearest
from .frechet import frechet_distance
from .inception_score import inception_score
from .kid import kernel_distance
from .manifold import manifold_scores

KEYS = 8  # columns to sort by; hardly two images agree in all of them

# The metrics in the order of the report, and their names.
METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "copies": "copy score",
}


class Scores(NamedTuple):
    """`metrics`: name -> dict of its `value` and, where it has one, its `error` (the standard error; of the inception
    score the deviation over ten parts). `missing`: name -> why it is missing."""

    metrics: dict[str, dict[str, float]]
    missing: dict[str, str]


def score(samples: Any, reference: Any, device: Device = "cpu") -> Scores:
    """Compare two sets, each with `features` [N, D], `probabilities` [N, C], `moments` and `spatial_moments`, or None.

    The samples have features and moments, the reference has moments at least.
    :param device: what computes the metrics; it must have float64. They are the same on all, but for rounding.
    """
    metrics: dict[str, dict[str, float]] = {
        "fid": {"value": frechet_distance(samples.moments, reference.moments, device)}
    }
    missing: dict[str, str] = {}
    if samples.spatial_moments and reference.spatial_moments:
        metrics["sfid"] = {"value": frechet_distance(samples.spatial_moments, reference.spatial_moments, device)}
    else:
        whose = "the network gives" if samples.spatial_moments is None else "the reference has"
        missing["sfid"] = f"{whose} no spatial features"
    if samples.probabilities is None:
        missing["inception_score"] = "the network gives no class probabilities: give --logits"
    else:
        # Files may be in the order of their classes, and each part should have all classes.
        order = np.random.default_rng(0).permutation(len(samples.probabilities))
        result = inception_score(samples.probabilities[_canonical(samples.probabilities)][order], device=device)
        metrics["inception_score"] = {"value": result.value, "error": result.deviation}
    if reference.features is None:
        for name in ("kid", "precision", "recall", "density", "coverage"):
            missing[name] = "the reference has statistics only: it needs images or their features"
        return Scores(metrics, missing)
    x, y = (found[_canonical(found)] for found in (samples.features, reference.features))
    distance = kernel_distance(x, y, device=device)
    metrics["kid"] = {"value": distance.value, "error": distance.standard_error}
    for name, share in manifold_scores(samples.features, reference.features, device=device)._asdict().items():
        metrics[name] = {"value": share.value, "error": share.standard_error}
    return Scores({name: metrics[name] for name in METRICS if name in metrics}, missing)


def _canonical(rows: np.ndarray) -> np.ndarray:
    """An order that depends on the rows and not on their own order, so that parts of them are always the same."""
    return np.lexsort(rows[:, :KEYS].T)


class Copies(NamedTuple):
    """The distances in the features to the nearest training images, [N] and [K], and their score."""

    distances: np.ndarray  # of the samples
    held_out: np.ndarray | None  # of images that the model was not trained on
    metric: dict[str, float] | None


def find_copies(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray | None, device: Device = "cpu") -> Copies:
    """The distances of samples [N, D] to training images [M, D], compared with those of held-out images.

    :param held_out: the distances [K] of held-out images to the training images, as `nearest` gives them.
    """
    distances, _ = nearest(samples, train, device)
    if held_out is None:
        return Copies(distances, None, None)
    result = copy_score(distances, held_out)
    return Copies(distances, held_out, {"value": result.nearer, "error": result.standard_error})
