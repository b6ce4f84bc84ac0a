"""A plot of the bound's terms over the timesteps."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..bound import BoundSummary
from ..utils.figures import new_figure, save_figure

COLOR, COLOR_MEAN = "#1f77b4", "#d62728"
BINS = 40  # at most, for estimates from some timesteps, which evaluate few timesteps often


def write_terms_plot(path: str | os.PathLike, result: BoundSummary, num_timesteps: int) -> None:
    """Plot the terms of `vb` over t, and their cumulative share. Raises UserError if it cannot be drawn."""
    save_figure(path, figure_of, result, num_timesteps)


def figure_of(result: BoundSummary, num_timesteps: int) -> Any:
    """The plot of `write_terms_plot` as a matplotlib Figure."""
    figure = new_figure((11, 4.2))
    from matplotlib.ticker import PercentFormatter

    n, evaluations = result.terms["vb"].shape
    of = f"{evaluations:,} of the " if evaluations < num_timesteps else ""
    figure.suptitle(f"{result.mean:.3f} bits/dim: {n:,} images, {of}{num_timesteps:,} timesteps", fontsize=12)
    left, right = figure.subplots(1, 2)

    x, quartiles, mean = spread_over_timesteps(result, num_timesteps)
    left.fill_between(x, quartiles[0], quartiles[2], color=COLOR, alpha=0.25, linewidth=0, label="quartiles")
    left.plot(x, quartiles[1], color=COLOR, linewidth=1.4, label="median of the images")
    left.plot(x, mean, color=COLOR_MEAN, linewidth=1.0, linestyle="--", label="mean")
    left.set_yscale("log", nonpositive="mask")
    left.set_title("The term of each timestep", loc="left", fontsize=10, fontweight="bold")
    left.set_ylabel("bits/dim", fontsize=9)

    x, share = share_up_to(result, num_timesteps)
    right.step(x, share, where="post", color=COLOR, linewidth=1.4, label="terms of the timesteps up to t")
    prior = float(result.terms["prior_bpd"].mean()) / result.mean
    right.plot([], [], " ", label=f"the prior's share: {prior:.2%}")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(0, 1.03)
    right.set_title("How the terms add up", loc="left", fontsize=10, fontweight="bold")
    right.set_ylabel("share of the bound", fontsize=9)
    for axes, place in ((left, "upper right"), (right, "lower right")):
        axes.set_xscale("log")
        axes.set_xlabel("t + 1 (1: the step to the clean image)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(loc=place, frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _timesteps(result: BoundSummary, num_timesteps: int) -> np.ndarray:
    """The timestep of each of the terms, [N, K]."""
    falling = np.broadcast_to(np.arange(num_timesteps)[::-1], (len(result.total_bpd), num_timesteps))
    return result.terms.get("timesteps", falling)


def spread_over_timesteps(result: BoundSummary, num_timesteps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t + 1 [B], the quartiles [3, B] and the mean [B] of the terms) for each timestep, or for bins of timesteps.

    Bins are used where not all timesteps were evaluated. Their terms are weighted, so that they show what all
    timesteps would.
    """
    vb = result.terms["vb"].astype(np.float64)
    if "weights" not in result.terms:
        return np.arange(1, num_timesteps + 1), np.quantile(vb, (0.25, 0.5, 0.75), axis=0)[:, ::-1], vb.mean(0)[::-1]
    edges = np.unique(np.geomspace(1, num_timesteps + 1, BINS + 1).round().astype(int))
    t, weights = result.terms["timesteps"].ravel() + 1, result.terms["weights"].ravel()
    place = np.searchsorted(edges, t, side="right") - 1
    x, rows = [], []
    for i in np.unique(place):
        values, counts = vb.ravel()[place == i], weights[place == i]
        order = np.argsort(values)
        level = (np.cumsum(counts[order]) - counts[order] / 2) / counts.sum()
        quartiles = np.interp((0.25, 0.5, 0.75), level, values[order])
        x.append(np.exp(np.average(np.log(t[place == i]), weights=counts)))
        rows.append([*quartiles, np.average(values, weights=counts)])
    table = np.array(rows).T
    return np.array(x), table[:3], table[3]


def share_up_to(result: BoundSummary, num_timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """(t + 1 [T], the share of the bound due to the terms of timesteps up to t [T])."""
    terms = result.terms["vb"] * result.terms.get("weights", 1.0)
    sums = np.bincount(_timesteps(result, num_timesteps).ravel(), terms.ravel(), minlength=num_timesteps)
    return np.arange(1, num_timesteps + 1), np.cumsum(sums) / result.total_bpd.sum()
