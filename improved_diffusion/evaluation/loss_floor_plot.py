"""A plot of the floor of the loss by noise level."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..utils.figures import new_figure, save_figure

COLOR_FLOOR, COLOR_MODEL = "#1f77b4", "#d62728"
ABOVE = 30  # times the largest floor: more of the model's loss is not shown
DECADES = 6  # below the largest value that are shown: the floor falls to nothing where there is little noise


def write_floor_plot(path: str | os.PathLike, report: Any) -> None:
    """Plot a FloorReport. Raises UserError if it cannot be drawn."""
    save_figure(path, figure_of, report)


def figure_of(report: Any) -> Any:
    """The plot of `write_floor_plot` as a matplotlib Figure: one panel for each target."""
    targets, levels = report.targets, report.levels()
    figure = new_figure((5.5 * len(targets), 4.2))
    figure.suptitle(title_of(report), fontsize=12, parse_math=False)
    t = np.array([np.mean(level["timesteps"]) for level in levels])
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets):
        _draw(axes, t, levels, target, "floor", COLOR_FLOOR, "floor: no model is better on these images")
        if report.has_model:
            _draw(axes, t, levels, target, "loss", COLOR_MODEL, "the model on the same images")
        top = max(level[target]["floor"].value for level in levels)
        if report.has_model:  # whose x_0 is far off where nearly all is noise
            top = min(max(level[target]["loss"].value for level in levels), ABOVE * top)
        if top > 0:
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(top * 10.0**-DECADES, 2 * top)
        axes.set_title(f"Squared error of {target}", loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("timestep (more noise to the right)", fontsize=9)
        axes.set_ylabel("mean over pixels", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def title_of(report: Any) -> str:
    """What the plot is of."""
    about = report.about
    part = "" if about["is_whole"] else f" of {about['of_images']:,} (a lower bound)"
    return f"Floor of the loss on {about['images']:,} images{part}, {about['noise_schedule']} schedule"


def _draw(axes: Any, t: np.ndarray, levels: Any, target: str, name: str, color: str, label: str) -> None:
    value, error = np.array([level[target][name] for level in levels]).T
    axes.plot(t, value, color=color, linewidth=1.4, marker="o", markersize=3, label=label)
    low = np.maximum(value - 2 * error, np.finfo(float).tiny)  # a logarithmic axis drops the corners that are below 0
    axes.fill_between(t, low, value + 2 * error, color=color, alpha=0.25, linewidth=0)
