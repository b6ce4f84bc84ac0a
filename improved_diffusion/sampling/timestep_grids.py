"""The noise levels that a sampler visits: grids of timesteps, which may be fractional, and paths over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..config import UserError, unknown_name
from ..respace import space_timesteps
from ..schedules import sigma_at, timestep_of_sigma

NAMES = ("uniform", "ddim", "trailing", "logsnr", "karras", "quadratic", "coarse")
# EDM's range of sigma and its rho (Karras et al. 2022, table 1). Noise above the largest hides any image of up to 64
# pixels a side, and a grid in log-SNR would spend most of its steps there; noise below the smallest is invisible.
SIGMA_MAX, SIGMA_MIN, RHO = 80.0, 0.002, 7.0
# The range of the coarse grid, for 64 pixels a side and for one step: near the best of those tried on digits with
# `renoise` in 2, 3, 4 and 8 steps (docs/sampling.md).
COARSE_MAX, COARSE_MIN = 40.0, 2.0
CLOSEST = 1e-6  # between two timesteps
ROUNDING = 1e-3  # of noise levels that are given
SIGMAS = "sigma:"  # before a list of noise levels


def side_of(height: int, width: int) -> float:
    """The side of a square of as many pixels."""
    return math.sqrt(height * width)


def is_list(name: str) -> bool:
    """Whether a grid is given as a list of its timesteps or noise levels, rather than by name."""
    return name[:1].isdigit() or name.startswith(SIGMAS)


def timestep_grid(name: str, count: int, alpha_bar: np.ndarray, side: float = 64) -> np.ndarray:
    """The timesteps to evaluate the network at, float64 [count], ascending, all different.

    :param name: one of NAMES, or a comma-separated list of timesteps in [0, T-1], or of noise levels in EDM's unit such
        as sigma:40,5,1.5,0.5 (then `count` is 0 or their number).
        uniform: evenly from 0 to T-1 as published, rounded. ddim: a stride from 0 as published. trailing: a stride down
        from T-1 (Lin et al. 2024). These are integers; the others are fractional. quadratic: denser near the image
        (DDIM app. D.2). logsnr: evenly in log-SNR (Lu et al. 2022). karras: evenly in sigma^(1/7) (Karras et al. 2022,
        eq. 5). coarse: evenly in log-SNR, over a range that ends far from the image, at a sigma of 2 / count.
    :param count: 1 to T. A single step is always T-1, or the noisiest of the grid.
    :param alpha_bar: float64 [T] of the process that the model was trained on.
    :param side: of the images, in pixels: larger images need more noise, as averages over pixels show through it.
    Raises UserError for another name, count or list.
    """
    T = len(alpha_bar)
    if is_list(name):
        return _from_list(name, count, alpha_bar)
    if name not in NAMES:
        raise unknown_name("--timestep_grid", name, NAMES)
    if not 1 <= count <= T:
        raise UserError(f"--steps {count}: the model was trained with {T} noise levels, give 1 to {T}")
    if name in ("logsnr", "karras"):
        return _in_sigma(name, count, alpha_bar, SIGMA_MAX * max(1.0, side / 64), SIGMA_MIN)
    if name == "coarse":
        grid = _in_sigma(name, count, alpha_bar, COARSE_MAX * side / 64, COARSE_MIN / count)
        return grid if alpha_bar[-1] > 0 else np.append(grid[:-1], T - 1.0)
    if count == 1:
        return np.array([T - 1.0])
    if name == "ddim":
        return _stride(T, count)
    if name == "trailing":
        return T - 1 - _stride(T, count)[::-1]
    if name == "quadratic":
        return (T - 1) * np.linspace(0, 1, count) ** 2
    return np.array(sorted(space_timesteps(T, [count])), dtype=np.float64)


def _from_list(text: str, count: int, alpha_bar: np.ndarray) -> np.ndarray:
    numbers, T = text.removeprefix(SIGMAS), len(alpha_bar)
    kind, low, high = "timesteps", 0.0, T - 1.0
    if numbers != text:
        kind, (low, high) = "noise levels sigma", sigma_at(alpha_bar, np.array([0, T - 1]))
    try:
        given = np.array(sorted(float(part) for part in numbers.split(",") if part.strip()))
    except ValueError:
        raise UserError(
            f"--timestep_grid {text}: expected a name, timesteps such as 0,10.5,500,999, or noise levels such as "
            "sigma:40,5,1.5,0.5"
        ) from None
    if kind != "timesteps":  # an end as it is shown is that end
        for end in (low, high):
            given = np.where(np.isclose(given, end, rtol=ROUNDING, atol=0), end, given)
    outside = not len(given) or not ((given >= low) & (given <= high)).all()
    grid = given if kind == "timesteps" or outside else timestep_of_sigma(alpha_bar, given)
    if outside or (np.diff(grid) < CLOSEST).any():
        raise UserError(f"--timestep_grid {text}: give different {kind} in {low:.4g}..{high:.6g}")
    if count not in (0, len(grid)):
        raise UserError(f"--steps {count} contradicts the {len(grid)} {kind} of --timestep_grid {text}")
    return grid


def _stride(T: int, count: int) -> np.ndarray:
    """0, i, 2i, ... for the integer stride i that gives exactly `count`, else for T / count, rounded down."""
    exact = next((i for i in range(1, T + 1) if len(range(0, T, i)) == count), None)
    return np.floor(np.arange(count) * (exact or T / count)).astype(np.float64)


def _in_sigma(name: str, count: int, alpha_bar: np.ndarray, sigma_max: float, sigma_min: float) -> np.ndarray:
    lowest, highest = sigma_at(alpha_bar, np.array([0, len(alpha_bar) - 1]))
    high = min(highest, sigma_max)
    low = min(max(lowest, min(sigma_min, high / 2)), high)  # in order also where there is little noise
    fractions = np.linspace(0, 1, count) if count > 1 else np.ones(1)
    if name == "karras":
        sigma = (low ** (1 / RHO) + fractions * (high ** (1 / RHO) - low ** (1 / RHO))) ** RHO
    else:
        sigma = np.exp(math.log(low) + fractions * math.log(high / low))
    t = timestep_of_sigma(alpha_bar, sigma)
    return np.where(np.abs(t - t.round()) < CLOSEST, t.round(), t)


def straight_path(count: int) -> list[int]:
    """From the noisiest of `count` steps down to the clean image, -1."""
    return list(range(count - 1, -2, -1))


def churned(
    grid: np.ndarray, alpha_bar: np.ndarray, churn: float, sigma_min: float = 0.0, sigma_max: float = math.inf
) -> tuple[np.ndarray, list[int]]:
    """A grid with the levels that churn adds noise up to, and the path over both (Karras et al. 2022, alg. 2).

    :param churn: S_churn, spread over the steps; :param sigma_min, sigma_max: S_tmin and S_tmax, the range of sigma in
        which noise is added.
    """
    sigma = sigma_at(alpha_bar, grid)
    gamma = np.where((sigma >= sigma_min) & (sigma <= sigma_max), min(churn / len(grid), math.sqrt(2) - 1), 0.0)
    raised = np.where(gamma > 0, timestep_of_sigma(alpha_bar, sigma * (1 + gamma)), grid)
    raised = np.where(raised > grid + CLOSEST, raised, grid)
    levels = np.unique(np.concatenate([grid, raised]))
    path: list[int] = []
    for k in reversed(range(len(grid))):
        for t in dict.fromkeys((grid[k], raised[k])):
            path.append(int(np.searchsorted(levels, t)))
    return levels, [*path, -1]


def repaint_path(count: int, jump: int, resamplings: int) -> list[int]:
    """The path of RePaint: each `jump` steps are taken `resamplings` times, adding noise in between.

    (Lugmayr et al. 2022, app. B.) With one resampling it is the straight path.
    """
    path = [count - 1]
    for top in range(count - 1, 0, -jump):
        down = list(range(top - 1, max(top - jump, 0) - 1, -1))
        path += down
        for _ in range(resamplings - 1):
            path += [top, *down]
    return [*path, -1]


def table(timesteps: Sequence[float], alpha_bar: np.ndarray, seen: Sequence[float], path: Sequence[int]) -> str:
    """A table of the steps of a path: timestep, what the network sees, alpha_bar, sigma in EDM's unit, log-SNR."""
    rows = [f"{'step':>5} {'timestep':>10} {'network':>10} {'alpha_bar':>12} {'sigma':>10} {'log-SNR':>8}"]
    for k, index in enumerate(path):
        if index < 0:
            rows.append(f"{k:>5} {'image':>10}")
            continue
        kept = alpha_bar[index]
        sigma = math.sqrt(1 / kept - 1) if kept else math.inf
        log_snr = -2 * math.log(sigma) if sigma else math.inf
        rows.append(
            f"{k:>5} {timesteps[index]:>10.4g} {seen[index]:>10.4g} {kept:>12.4g} {sigma:>10.4g} {log_snr:>8.2f}"
        )
    return "\n".join(rows)
