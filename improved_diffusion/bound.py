"""Bits per dimension over a set of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

# The density of the timesteps that an estimate evaluates. The terms of trained models fall about as (t + 1)^-1.2 with
# either noise schedule; a uniform share bounds the weights where they do not.
DECAY = 1.2
UNIFORM_SHARE = 0.05


@dataclass(frozen=True)
class BoundSummary:
    """The variational bound of a set of images, in bits/dim."""

    total_bpd: np.ndarray  # [N], one for each image
    terms: dict[str, np.ndarray]  # name -> [N] or [N, K]; an estimate from K timesteps has `weights` too

    @property
    def mean(self) -> float:
        """The mean over the images."""
        return float(self.total_bpd.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over the images; nan for a single image."""
        n = len(self.total_bpd)
        return float(self.total_bpd.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

    @property
    def timesteps_error(self) -> float:
        """The part of the standard error that comes from the timesteps left out; 0 for a whole bound."""
        if "weights" not in self.terms:
            return 0.0
        variance = left_out_variance(self.terms["vb"], self.terms["weights"])
        return float(np.sqrt(variance.sum()) / len(variance))  # each image has its own offset


def summarize_bound(
    batches: Iterable[tuple],
    bound: Callable[..., dict[str, np.ndarray]],
    gather: Callable[[dict], list[dict]],
    report: Callable[[int, float], None],
    keep_terms: bool = True,
) -> BoundSummary:
    """Evaluate the bound on every batch.

    :param batches: arguments for `bound`; the same number on every rank, some possibly without images.
    :param bound: gives `total_bpd` [n], and terms [n] or [n, K] under other names; nothing for no images.
    :param gather: gives the dict of every rank, in rank order.
    :param report: called after each round with the number of images so far and their mean in bits/dim.
    :param keep_terms: False: keep `total_bpd` only, to save memory.
    """
    totals: list[np.ndarray] = []
    terms: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for part in gather(bound(*batch)):
            totals += [part.pop("total_bpd").astype(np.float64)] if part else []
            for name, values in part.items() if keep_terms else ():
                terms.setdefault(name, []).append(values)
        done = np.concatenate(totals)
        report(len(done), float(done.mean()))
    return BoundSummary(done, {name: np.concatenate(terms.pop(name)) for name in list(terms)})


def stratified_timesteps(num_timesteps: int, count: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and weights whose sum_k weight[:, k] * term(t[:, k]) estimates sum_t term(t) without bias.

    Systematic sampling (Madow 1949): t is taken with probability pi(t), at most once, and has the weight 1/pi(t).
    pi(0), for the decoder's term, is 1; the others fall as the terms do. With `count` >= T the sum is exact.
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
    """pi [T], each in (0, 1], with sum `count`: proportional to the density, and 1 where that would exceed 1."""
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


def left_out_variance(terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The variance [N] of each image's sum of weights * terms over the draw of its timesteps.

    For systematic sampling, estimated from one draw in two parts. The rough part, which includes the noise of the
    terms: second differences of the weighted terms, which are 0 for a straight line (Wolter 2007, Introduction to
    Variance Estimation, sec. 8.2, estimator v4, with the finite population correction of each timestep). The smooth
    part: the rise of the weighted terms from end to end, by which the offset changes the sum (the first term of Euler
    and Maclaurin's formula; Yates 1948).
    :param terms, weights: [N, K], of timesteps from `stratified_timesteps`.
    nan where one or two of the timesteps were drawn at random.
    """
    drawn = weights[0] > 1  # the others are always there
    z, share = (weights * terms)[:, drawn].astype(np.float64), 1 / weights[:, drawn]
    k = z.shape[1]
    if k < 3:
        return np.full(len(z), math.nan if k else 0.0)
    second = z[:, :-2] - 2 * z[:, 1:-1] + z[:, 2:]
    rough = (second**2 * (1 - share[:, 1:-1])).sum(axis=1) / 6 * k / (k - 2)
    rise = (z[:, -1] - z[:, 0]) * k / (k - 1)
    return rough + rise**2 / 12
