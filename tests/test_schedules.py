"""Beta schedules."""

import math

import numpy as np
import pytest
from helpers import assert_golden, golden

from improved_diffusion.schedules import betas_for_alpha_bar, get_named_beta_schedule

SCHEDULES = golden("schedules")


@pytest.mark.parametrize("key", SCHEDULES)
def test_betas_are_the_published_ones(key):
    name, T = key.split("_")
    betas = get_named_beta_schedule(name, int(T))
    assert betas.dtype == np.float64
    assert_golden(betas, SCHEDULES[key])


def test_linear_at_1000_steps_runs_from_1e4_to_002():
    betas = get_named_beta_schedule("linear", 1000)  # DDPM sec. 4
    assert betas[0] == pytest.approx(1e-4) and betas[-1] == pytest.approx(0.02)
    np.testing.assert_allclose(np.diff(betas), betas[1] - betas[0], rtol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 7, 250, 4000])
def test_cosine_follows_the_papers_alpha_bar_until_the_clip(T):
    betas = get_named_beta_schedule("cosine", T)
    u = np.arange(1, T + 1) / T
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # IDDPM eq. 17
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    clipped = betas == 0.999
    assert clipped[-1] and not clipped[:-1].any()
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected[:-1], rtol=1e-9)


@pytest.mark.parametrize("T", [1, 5, 100])
def test_betas_of_an_exponential_alpha_bar_are_constant(T):
    betas = betas_for_alpha_bar(T, lambda u: math.exp(-3 * u))
    np.testing.assert_allclose(betas, np.full(T, 1 - math.exp(-3 / T)), rtol=1e-12)


def test_max_beta_bounds_the_betas():
    betas = betas_for_alpha_bar(4, lambda u: 1 - u, max_beta=0.4)
    np.testing.assert_allclose(betas, [0.25, 1 / 3, 0.4, 0.4])


def test_unknown_schedule_is_named():
    with pytest.raises(NotImplementedError, match=r"quadratic.*linear or cosine"):
        get_named_beta_schedule("quadratic", 10)
