"""Bits per dimension over a set of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

# The density of the timesteps that an estimate evaluates. Trained models' terms fall about as (t + 1)^-1.2, with either
# noise schedule; an even share bounds the weights where they do not.
DECAY = 1.2
UNIFORM_SHARE = 0.05


@dataclass(frozen=True)
class BoundSummary:
    """The variational bound over a set of images, in bits/dim."""

    total_bpd: np.ndarray  # [N], one for each image
    terms: dict[str, np.ndarray]  # name -> [T], means over the images

    @property
    def mean(self) -> float:
        """The mean over the images."""
        return float(self.total_bpd.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over the images; nan for a single one."""
        n = len(self.total_bpd)
        return float(self.total_bpd.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def summarize_bound(
    batches: Iterable[tuple],
    bound: Callable[..., dict[str, np.ndarray]],
    gather: Callable[[dict], list[dict]],
    report: Callable[[int, float], None],
) -> BoundSummary:
    """Evaluate the bound on every batch.

    :param batches: arguments for `bound`; every rank must have as many, some perhaps of no images.
    :param bound: gives `total_bpd` [n], and [n, T] terms under other names.
    :param gather: every rank's dict, in rank order.
    :param report: called after each round with the number of images so far and their mean in bits/dim.
    """
    totals: list[float] = []
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        for part in gather(bound(*batch)):
            totals += [float(value) for value in part.pop("total_bpd", [])]
            for name, values in part.items():
                sums[name] = sums.get(name, 0.0) + values.astype(np.float64).sum(axis=0)
        report(len(totals), float(np.mean(totals)))
    return BoundSummary(np.array(totals), {name: total / len(totals) for name, total in sums.items()})


def stratified_timesteps(num_timesteps: int, count: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and weights whose sum_k weight[:, k] * term(t[:, k]) estimates sum_t term(t) without bias.

    Systematic sampling (Madow 1949): t is taken with probability pi(t), at most once, and then weighs 1/pi(t). pi(0),
    of the decoder's term, is 1; the others fall like the terms do. With `count` >= T the sum is exact.
    :param count: timesteps for each image, at least 2 unless T is 1.
    :param offsets: [N], in [0, 1); each image's own, drawn uniformly, makes the images' estimates independent.
    :return: t int64 and weight float64, both [N, min(count, T)], t rising.
    """
    count = min(count, num_timesteps)
    if count < 2 <= num_timesteps:
        raise ValueError(f"count must be at least 2, for the decoder's term and the others, got {count}")
    inclusion = _inclusion(num_timesteps, count)
    points = np.asarray(offsets, dtype=np.float64)[:, None] + np.arange(count)
    t = np.searchsorted(np.cumsum(inclusion), points, side="right").clip(max=num_timesteps - 1)
    return t, 1 / inclusion[t]


def _inclusion(num_timesteps: int, count: int) -> np.ndarray:
    """pi [T], each in (0, 1], of sum `count`: proportional to the density, but where that would go above 1."""
    inclusion = np.ones(num_timesteps)
    if count == num_timesteps:
        return inclusion
    falling = np.arange(1.0, num_timesteps + 1) ** -DECAY
    density = (1 - UNIFORM_SHARE) * falling / falling.sum() + UNIFORM_SHARE / num_timesteps
    certain = np.arange(num_timesteps) == 0
    while True:
        others = density[~certain]
        inclusion[~certain] = others / others.sum() * (count - certain.sum())
        if (inclusion <= 1).all():
            return inclusion
        certain |= inclusion > 1
        inclusion[certain] = 1
