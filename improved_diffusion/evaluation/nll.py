"""Bits per dimension over a set of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


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
