"""Grids of timesteps, and the paths over them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from helpers import golden_json

from improved_diffusion.config import UserError
from improved_diffusion.respace import space_timesteps
from improved_diffusion.sampling.timestep_grids import (
    COARSE_MAX,
    COARSE_MIN,
    NAMES,
    SIGMA_MAX,
    SIGMA_MIN,
    churned,
    repaint_path,
    side_of,
    straight_path,
    table,
    timestep_grid,
)
from improved_diffusion.schedules import (
    alpha_bar_at,
    get_named_beta_schedule,
    sigma_at,
    timestep_of_sigma,
    zero_terminal_snr,
)


def alpha_bars(schedule, T):
    return np.cumprod(1 - get_named_beta_schedule(schedule, T))


SCHEDULES = [("linear", 1000), ("cosine", 1000), ("cosine", 4000), ("sigmoid", 50), ("cosine", 7), ("cosine", 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule,T", SCHEDULES)
def test_every_count_gives_as_many_different_timesteps_in_range(name, schedule, T):
    alpha_bar = alpha_bars(schedule, T)
    for count in range(1, T + 1) if T <= 1000 else (1, 2, 3, 999, 1000, 2500, 3999, 4000):
        grid = timestep_grid(name, count, alpha_bar)
        assert grid.shape == (count,) and grid.dtype == np.float64
        assert grid[0] >= 0 and grid[-1] <= T - 1 and (np.diff(grid) > 0).all()


@pytest.mark.parametrize("schedule,T", SCHEDULES)
def test_the_first_and_the_last_step_are_right(schedule, T):
    alpha_bar = alpha_bars(schedule, T)
    top, coarse_top = (min(T - 1, timestep_of_sigma(alpha_bar, sigma)) for sigma in (SIGMA_MAX, COARSE_MAX))
    bottom = max(0, timestep_of_sigma(alpha_bar, SIGMA_MIN))
    for count in {min(T, count) for count in (2, 10, 50)}:
        ends = {name: timestep_grid(name, count, alpha_bar)[[0, -1]] for name in NAMES}
        if count == 1:
            continue
        for name in ("uniform", "quadratic"):
            assert ends[name].tolist() == [0, T - 1]
        assert ends["ddim"][0] == 0 and ends["ddim"][1] >= T - 1 - math.ceil(T / (count - 1))
        assert ends["trailing"][1] == T - 1 and ends["trailing"][0] <= math.ceil(T / (count - 1))
        for name in ("logsnr", "karras"):
            np.testing.assert_allclose(ends[name], [bottom, top], atol=1e-6)
        if COARSE_MIN / count > sigma_at(alpha_bar, np.zeros(1))[0]:
            coarse_bottom = timestep_of_sigma(alpha_bar, COARSE_MIN / count)
            np.testing.assert_allclose(ends["coarse"], [coarse_bottom, coarse_top], atol=1e-6)
    first = {"logsnr": top, "karras": top, "coarse": coarse_top}
    for name in NAMES:
        assert timestep_grid(name, 1, alpha_bar)[0] == pytest.approx(first.get(name, T - 1), abs=1e-6)


def test_the_uniform_grid_is_the_published_one():
    for T, counts, kept in golden_rows():
        if counts != [1]:
            assert timestep_grid("uniform", counts[0], alpha_bars("cosine", T)).tolist() == kept


def golden_rows():
    rows = [row for row in golden_json("respacing") if isinstance(row["section_counts"], list)]
    rows = [(row["num_timesteps"], row["section_counts"], row["timesteps"]) for row in rows]
    rows = [row for row in rows if len(row[1]) == 1]
    assert rows
    return rows


def test_the_ddim_grid_is_the_published_stride_where_there_is_one():
    for T in (50, 100, 1000):
        for count in range(2, T + 1):
            grid = timestep_grid("ddim", count, alpha_bars("cosine", T)).tolist()
            try:
                published = sorted(space_timesteps(T, f"ddim{count}"))
            except UserError:
                assert np.diff(grid).max() - np.diff(grid).min() <= 1  # as even as it gets
            else:
                assert grid == published


def test_the_trailing_grid_mirrors_the_stride():
    assert timestep_grid("trailing", 10, alpha_bars("cosine", 1000)).tolist() == [99 + 100 * k for k in range(10)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_logsnr_is_even_in_log_snr_and_karras_in_a_root_of_sigma(schedule):
    alpha_bar = alpha_bars(schedule, 1000)
    for name in ("logsnr", "coarse"):
        sigma = sigma_at(alpha_bar, timestep_grid(name, 20, alpha_bar))
        np.testing.assert_allclose(np.diff(np.log(sigma)), np.log(sigma[-1] / sigma[0]) / 19, rtol=2e-3)
    sigma = sigma_at(alpha_bar, timestep_grid("karras", 20, alpha_bar))
    expected = np.linspace(sigma[0] ** (1 / 7), sigma[-1] ** (1 / 7), 20) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=2e-3)
    assert sigma[-1] == pytest.approx(80, rel=1e-6)


def test_larger_images_start_at_more_noise():
    """The mean of four times as many pixels is seen through twice the noise."""
    assert side_of(64, 64) == 64 and side_of(128, 512) == 256
    alpha_bar = alpha_bars("cosine", 1000)
    for name, tops in (("logsnr", (80, 80, 320)), ("karras", (80, 80, 320)), ("coarse", (10, 40, 160))):
        for side, sigma in zip((16, 64, 256), tops):
            grid = timestep_grid(name, 10, alpha_bar, side)
            assert sigma_at(alpha_bar, grid)[-1] == pytest.approx(sigma, rel=1e-6)


def test_the_coarse_grid_of_a_model_of_pure_noise_starts_there():
    alpha_bar = np.cumprod(1 - zero_terminal_snr(get_named_beta_schedule("linear", 1000)))
    ordinary = timestep_grid("coarse", 4, alpha_bar)
    for count in (1, 2, 4):
        grid = timestep_grid("coarse", count, alpha_bar)
        assert len(grid) == count and grid[-1] == 999
    assert sigma_at(alpha_bar, ordinary[:-1])[0] == pytest.approx(COARSE_MIN / 4)


def test_a_list_is_taken_as_it_is():
    alpha_bar = alpha_bars("cosine", 1000)
    assert timestep_grid("999, 0,10.5,500", 0, alpha_bar).tolist() == [0, 10.5, 500, 999]
    assert timestep_grid("7", 1, alpha_bar).tolist() == [7]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "zero terminal"])
def test_a_list_of_noise_levels_is_at_their_timesteps(schedule):
    betas = get_named_beta_schedule("linear" if schedule == "zero terminal" else schedule, 1000)
    alpha_bar = np.cumprod(1 - (zero_terminal_snr(betas) if schedule == "zero terminal" else betas))
    grid = timestep_grid("sigma:40, 0.5,5,1.5", 0, alpha_bar)
    np.testing.assert_allclose(sigma_at(alpha_bar, grid), [0.5, 1.5, 5, 40], rtol=1e-9)
    assert timestep_grid("sigma:2", 1, alpha_bar).shape == (1,)
    low, high = sigma_at(alpha_bar, np.array([0, len(alpha_bar) - 1]))
    for shown in ("{:.4g}", "{:.6g}"):  # as messages show the ends
        ends = timestep_grid(f"sigma:{shown.format(low)},{shown.format(high)}", 0, alpha_bar)
        assert ends.tolist() == [0, len(alpha_bar) - 1]


@pytest.mark.parametrize(
    "name,count,words",
    [
        ("karas", 5, ["unknown --timestep_grid 'karas'", "did you mean karras", "trailing"]),
        ("uniform", 0, ["--steps 0", "1 to 100"]),
        ("uniform", 101, ["--steps 101", "1 to 100"]),
        ("0,5,100", 0, ["0,5,100", "0..99"]),
        ("0,5,5", 0, ["0,5,5", "different"]),
        ("0,5,x", 0, ["0,5,x", "expected"]),
        ("0,5,nan", 0, ["0,5,nan", "0..99"]),
        ("0,1e-18,5", 0, ["0,1e-18,5", "different"]),
        ("0,5,9", 4, ["--steps 4", "3 timesteps"]),
        ("sigma:", 0, ["sigma:", "noise levels"]),
        ("sigma:5,x", 0, ["sigma:5,x", "expected"]),
        ("sigma:5,5", 0, ["sigma:5,5", "different"]),
        ("sigma:5,nan", 0, ["sigma:5,nan", "0.02"]),
        ("sigma:5,0", 0, ["sigma:5,0", "0.02"]),
        ("sigma:5,1e9", 0, ["sigma:5,1e9", "0.02"]),
        ("sigma:9,5,1", 4, ["--steps 4", "3 noise levels"]),
    ],
)
def test_a_wrong_grid_is_named_with_the_remedy(name, count, words):
    with pytest.raises(UserError) as error:
        timestep_grid(name, count, alpha_bars("cosine", 100))
    assert all(word in str(error.value) for word in words)


# Between whole timesteps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "zero terminal"])
def test_alpha_bar_between_timesteps_falls_and_is_exact_at_them(schedule):
    betas = get_named_beta_schedule("linear" if schedule == "zero terminal" else schedule, 200)
    alpha_bar = np.cumprod(1 - (zero_terminal_snr(betas) if schedule == "zero terminal" else betas))
    t = np.linspace(0, 199, 1991)
    between = alpha_bar_at(alpha_bar, t)
    assert (np.diff(between) < 0).all()
    np.testing.assert_array_equal(between[::10], alpha_bar)
    sigma = np.sqrt(1 / between[:-1] - 1)
    np.testing.assert_allclose(timestep_of_sigma(alpha_bar, sigma), t[:-1], atol=1e-6)


def test_the_cosine_schedule_between_its_timesteps_is_the_cosine():
    alpha_bar = alpha_bars("cosine", 100)

    def cosine(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0.5, 20.25, 90.9):
        assert alpha_bar_at(alpha_bar, np.array([t]))[0] == pytest.approx(cosine((t + 1) / 100) / cosine(0), rel=1e-3)


# Paths


def test_the_straight_path_ends_at_the_image():
    assert straight_path(3) == [2, 1, 0, -1]


def test_churn_rises_by_its_share_before_each_step():
    alpha_bar = alpha_bars("cosine", 1000)
    grid = timestep_grid("karras", 10, alpha_bar)
    levels, path = churned(grid, alpha_bar, 3.0, sigma_min=0.05, sigma_max=50)
    sigma = sigma_at(alpha_bar, levels)
    assert path[-1] == -1 and path[0] == len(levels) - 1
    rises = [(a, b) for a, b in pairwise(path) if b > a]
    inside = (sigma_at(alpha_bar, grid) >= 0.05) & (sigma_at(alpha_bar, grid) <= 50)
    assert len(rises) == inside.sum() == len(levels) - 10
    for low, high in rises:
        assert sigma[high] / sigma[low] == pytest.approx(1.3, rel=1e-6)
    visited = [levels[i] for i in path[:-1]]
    assert [t for t in visited if t in grid] == grid[::-1].tolist()


def test_churn_never_more_than_doubles_the_variance_and_none_leaves_the_grid():
    alpha_bar = alpha_bars("cosine", 1000)
    grid = timestep_grid("karras", 10, alpha_bar)
    levels, path = churned(grid, alpha_bar, 1e6)
    sigma = sigma_at(alpha_bar, levels)
    ratios = [sigma[b] / sigma[a] for a, b in pairwise(path) if b > a]
    assert len(ratios) == 10 and max(ratios) == pytest.approx(math.sqrt(2), rel=1e-6)
    for churn in (0.0, 1e-13):
        levels, path = churned(grid, alpha_bar, churn)
    assert levels.tolist() == grid.tolist() and path == straight_path(10)


@pytest.mark.parametrize("count,jump,resamplings", [(10, 3, 4), (10, 1, 2), (10, 20, 3), (1, 5, 5), (10, 4, 1)])
def test_the_path_of_repaint_walks_each_stretch_down_as_often_as_asked(count, jump, resamplings):
    path = repaint_path(count, jump, resamplings)
    assert path[0] == count - 1 and path[-2:] == [0, -1]
    downs = [(a, b) for a, b in pairwise(path) if b < a]
    assert all(a - b == 1 for a, b in downs)
    for step in range(1, count):
        assert downs.count((step, step - 1)) == resamplings
    assert all(b - a <= jump for a, b in pairwise(path))
    if resamplings == 1:
        assert path == straight_path(count)


def test_the_table_shows_the_levels_of_the_path():
    text = table([0, 10.5], np.array([1.0 - 1e-4, 0.2]), [0, 42.0], [1, 0, -1]).splitlines()
    assert text[0].split() == ["step", "timestep", "network", "alpha_bar", "sigma", "log-SNR"]
    assert text[1].split() == ["0", "10.5", "42", "0.2", "2", "-1.39"]
    assert text[2].split() == ["1", "0", "0", "0.9999", "0.01", "9.21"]
    assert text[3].split() == ["2", "image"]
