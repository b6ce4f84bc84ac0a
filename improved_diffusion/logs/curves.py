"""Plots of a run's progress.csv, in one figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import UserError
from ..utils import files
from ..utils.figures import new_figure, save_figure

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
COLUMNS = 3  # panels in a row
POINTS_TO_SMOOTH = 40  # curves with at least so many values also get a smoothed line
POINTS_TO_MARK = 60  # curves with at most so many values get dots
LOG_RATIO = 3.0  # largest over smallest value above which the axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: the columns it shows, and how."""

    title: str
    unit: str
    shows: Callable[[str], bool]  # whether the panel shows a column
    label: Callable[[str], str] = str
    smooth: bool = False
    log: bool = False  # if all values are positive
    share: bool = False  # values from 0 to 1, shown in percent


def _is(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys


def _weights(key: str) -> str:
    """The weights that a column validates: val_bpd_ema_0.9999 is "EMA 0.9999", val_bpd is "model"."""
    name = key.removeprefix("val_loss").removeprefix("val_bpd").lstrip("_")
    return name.replace("ema_", "EMA ") or "model"


def _quarter(key: str) -> str:
    return key[-2:] + {"q0": " (least noise)", "q3": " (most noise)"}.get(key[-2:], "")


VALIDATION_LOSS = Panel(
    title="Validation loss", unit="loss", label=_weights, log=True,
    shows=lambda key: key.startswith("val_loss") and not key.endswith("_se"),
)  # fmt: skip
PANELS = (
    Panel(title="Training loss", unit="loss", shows=_is("loss", "mse", "vb"), smooth=True, log=True),
    Panel(
        title="Training loss by quarter of the timesteps", unit="loss", label=_quarter, smooth=True, log=True,
        shows=_is("loss_q0", "loss_q1", "loss_q2", "loss_q3"),
    ),
    Panel(
        title="Squared error on training images by quarter, and its floor (dashed)", unit="mse", label=_quarter,
        shows=_is("train_mse_q0", "train_mse_q1", "train_mse_q2", "train_mse_q3"), log=True,
    ),
    Panel(
        title="Squared error on held-out images by quarter", unit="mse", label=_quarter, log=True,
        shows=_is("val_mse_q0", "val_mse_q1", "val_mse_q2", "val_mse_q3"),
    ),
    VALIDATION_LOSS,
    Panel(
        title="Validation bound, \N{PLUS-MINUS SIGN} standard error", unit="bits/dim", label=_weights,
        shows=lambda key: key.startswith("val_bpd") and not key.endswith("_se"),
    ),
    Panel(title="Gradient norm", unit="norm", shows=_is("grad_norm", "grad_norm_clipped"), smooth=True, log=True),
    Panel(title="Learning rate", unit="lr", shows=_is("lr")),
    Panel(title="Loss scale of float16", unit="log2", shows=_is("lg_loss_scale")),
    Panel(title="Speed", unit="images/s", shows=_is("images_per_second"), smooth=True),
    Panel(title="Waiting for data", unit="share of the time", shows=_is("data_wait"), smooth=True, share=True),
    Panel(title="Skipped steps", unit="share of the steps", shows=_is("skipped_steps"), share=True),
)  # fmt: skip
# Of a distillation, whose val_loss compares samples in few steps with held-out images.
DISTILLATION_PANELS = tuple(
    replace(panel, title="Energy distance to held-out images", unit="energy distance")
    if panel is VALIDATION_LOSS
    else panel
    for panel in PANELS
)


def write_curves(
    csv_path: str | os.PathLike, png_path: str | os.PathLike, panels: Sequence[Panel] = PANELS
) -> None:  # fmt: skip
    """Plot the columns of a run's progress.csv against the step, without panels that have no column.

    Raises UserError if there is nothing to plot, or if it cannot be drawn.
    """
    save_figure(png_path, figure_of, csv_path, panels)


def figure_of(csv_path: str | os.PathLike, panels: Sequence[Panel] = PANELS) -> Any:
    """The matplotlib Figure that `write_curves` saves."""
    steps, columns = _read(csv_path)
    found = [(panel, sorted(filter(panel.shows, columns))) for panel in panels]
    found = [(panel, keys) for panel, keys in found if keys]
    if not found:
        raise UserError(f"{csv_path} has no rows to plot yet: the first log row with a step and a loss is needed")
    across = min(COLUMNS, len(found))
    down = -(-len(found) // across)
    figure = new_figure((5.4 * across, 3.4 * down + 0.4))
    run = os.path.basename(os.path.dirname(os.path.abspath(csv_path)))
    figure.suptitle(f"{run}: {len(steps):,} rows up to step {int(steps[-1]):,}", fontsize=12, parse_math=False)
    for i, (panel, keys) in enumerate(found):
        _draw(figure.add_subplot(down, across, i + 1), panel, keys, steps, columns)
    return figure


def _read(csv_path: str | os.PathLike) -> tuple[np.ndarray, dict[str, np.ma.MaskedArray]]:
    """The steps [rows], ascending, and each numeric column [rows], masked at empty cells."""
    text = files.read_bytes(csv_path).decode(errors="replace").replace("\0", "")
    header, *records = files.parse_csv(text, str(csv_path)) or [[]]
    cells = {key: [record[i] if i < len(record) else "" for record in records] for i, key in enumerate(header)}
    steps = _numbers(cells.pop("step", []))
    known = np.isfinite(steps.filled(np.nan))
    order = np.argsort(steps[known], kind="stable")
    columns = {key: _numbers(column)[known][order] for key, column in cells.items() if known.any()}
    return steps[known][order].filled(), {
        key: column for key, column in columns.items() if np.isfinite(column.filled(np.nan)).any()
    }


def _numbers(cells: Sequence[str]) -> np.ma.MaskedArray:
    values = np.full(len(cells), np.nan)
    empty = np.zeros(len(cells), bool)
    for i, cell in enumerate(cells):
        try:
            values[i] = float(cell)
        except ValueError:
            empty[i] = True
    return np.ma.array(values, mask=empty)


def _curve(steps: np.ndarray, column: np.ma.MaskedArray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the line through a column's values. It is broken by a nan at values that are not finite and at
    gaps that are longer than usual."""
    rows = np.flatnonzero(~np.ma.getmaskarray(column))
    x, y = steps[rows], np.where(np.isfinite(column.data[rows]), column.data[rows], np.nan)
    apart = np.diff(rows)
    usual = np.median(apart) if len(apart) else 0.0
    breaks = np.flatnonzero(apart > 4 * usual) + 1
    return np.insert(x, breaks, x[breaks]), np.insert(y, breaks, np.nan)


def _running_median(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The trend of a noisy curve at no more than 500 places: medians over a twentieth of the values.

    The window starts small because a loss falls fast at first.
    """
    half = max(len(y) // 40, 5)
    gaps = np.flatnonzero(np.isnan(y))
    places = np.unique(np.concatenate([np.linspace(0, len(y) - 1, min(len(y), 500)).astype(int), gaps]))
    medians = np.full(len(places), np.nan)
    for i, place in enumerate(places):
        if np.isfinite(y[place]):
            reach = min(half, place)
            window = y[place - reach : place + reach + 1]
            medians[i] = np.median(window[np.isfinite(window)])
    return x[places], medians


def _draw(
    axes: Any, panel: Panel, keys: Sequence[str], steps: np.ndarray, columns: Mapping[str, np.ma.MaskedArray]
) -> None:
    curves = {key: _curve(steps, columns[key]) for key in keys}
    finite = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()])
    for i, (key, (x, y)) in enumerate(curves.items()):
        color, label = COLORS[i % len(COLORS)], panel.label(key)
        width = 2.8 if key == "loss" else 1.4  # visible behind mse, which covers it
        n = np.isfinite(y).sum()
        dots = {"marker": "o", "markersize": 3.0} if n <= POINTS_TO_MARK else {}
        if panel.smooth and n >= POINTS_TO_SMOOTH:
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(*_running_median(x, y), color=color, linewidth=width, label=label)
        else:
            axes.plot(x, y, color=color, linewidth=width, label=label, **dots)
        if f"{key}_se" in columns:
            _draw_band(axes, steps, columns[key], columns[f"{key}_se"], color)
    floors = {key: columns[_floor(key)] for key in keys if key.startswith("train_mse") and _floor(key) in columns}
    for i, column in enumerate(floors.values()):
        axes.plot(*_curve(steps, column), color=COLORS[i % len(COLORS)], linewidth=1.2, linestyle="--")
    _dress(axes, panel, finite, len(keys), steps)
    if floors:  # which may be next to nothing: they must not press the curves together
        axes.set_ylim(bottom=max(min(column.min() for column in floors.values()), finite.min() / 10))


def _floor(key: str) -> str:
    """The column of the floor of a column of squared errors on training images."""
    return key.replace("train_mse", "floor")


def _draw_band(axes: Any, steps: np.ndarray, mean: np.ma.MaskedArray, error: np.ma.MaskedArray, color: str) -> None:
    mean, error = mean[both := ~(np.ma.getmaskarray(mean) | np.ma.getmaskarray(error))], error[both]
    axes.fill_between(steps[both], mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _dress(axes: Any, panel: Panel, values: np.ndarray, n_curves: int, steps: np.ndarray) -> None:
    """Scales, ticks, title and legend."""
    from matplotlib import ticker

    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.share:
        top = max(1.1 * values.max(), 0.01) if len(values) else 0.01
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    elif panel.log and len(values) and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        axes.set_yscale("log")
        few_decades = values.max() < 1e3 * values.min()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if steps[-1] > steps[0]:
        margin = 0.02 * (steps[-1] - steps[0])
        axes.set_xlim(steps[0] - margin, steps[-1] + margin)  # the same in all panels
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = -(-n_curves // 4) if n_curves > 1 else 0
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=6 + 13 * lines)
    if lines:  # above the axes, away from the curves
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.1, ncol=4, frameon=False, fontsize=8,
            handlelength=1.2, columnspacing=1.0,
        )  # fmt: skip
