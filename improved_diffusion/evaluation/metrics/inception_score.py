"""The inception score: whether a classifier is certain about each sample, and finds all classes among them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch as th

from .arrays import Device, on_device


class InceptionScore(NamedTuple):
    """The mean of the parts' scores, between 1 and the number of classes, and their standard deviation."""

    value: float
    deviation: float


def inception_score(probabilities: np.ndarray, splits: int = 10, device: Device = "cpu") -> InceptionScore:
    """exp of the mean Kullback-Leibler divergence of p(y | x) from p(y), for probabilities [N, C] of N samples.

    (Salimans et al. 2016, arXiv 1606.03498, sec. 4.) As in the published code, the mean and the deviation (with ddof 0;
    torchmetrics uses 1, and shuffles first) are those of `splits` consecutive parts: give the samples in random order,
    not class by class. Smaller parts have a lower score: compare only results for equal numbers of samples.
    Raises ValueError for fewer samples than parts, and for rows that are not probabilities.
    """
    count = len(probabilities)
    if not 1 <= splits <= count:
        raise ValueError(f"{count} samples cannot be split into {splits} parts")
    if not (np.min(probabilities) >= 0 and np.allclose(np.sum(probabilities, axis=1, dtype=np.float64), 1, atol=1e-3)):
        raise ValueError("each row of probabilities must be at least 0 and sum to 1: apply a softmax first")
    bounds = [part * count // splits for part in range(splits + 1)]
    scores = [_score(on_device(probabilities[start:end], device).double()) for start, end in pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(p: th.Tensor) -> float:
    # Of a class that no sample has, the mean is 0 and its sum too: 0 log 0 is 0.
    divergence = th.special.xlogy(p, p) - th.special.xlogy(p, p.mean(dim=0))
    return float(divergence.sum(dim=1).mean().exp())
