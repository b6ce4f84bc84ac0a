"""Beta schedules."""

import math

import numpy as np
import pytest
from helpers import assert_golden, golden

from improved_diffusion.schedules import betas_for_alpha_bar, get_named_beta_schedule, shift_schedule, zero_terminal_snr

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
    with pytest.raises(NotImplementedError, match=r"quadratic.*linear, cosine or sigmoid"):
        get_named_beta_schedule("quadratic", 10)


# Beyond the published


def snr(betas):
    alpha_bar = np.cumprod(1 - betas)
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_sigmoid_follows_its_alpha_bar_until_the_clip(T):
    """Jabri et al. 2022, alg. 2 with start -3, end 3, tau 1; by tanh, of which the sigmoid is half."""
    betas = get_named_beta_schedule("sigmoid", T)
    u = np.arange(1, T + 1) / T
    expected = (np.tanh(1.5) - np.tanh(3 * u - 1.5)) / (2 * np.tanh(1.5))
    assert betas[-1] == 0.999 and (betas > 0).all()
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected[:-1], rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("shift", [0.5, 2.0, 4.0])
def test_a_shift_divides_the_snr_by_its_square(name, shift):
    betas = get_named_beta_schedule(name, 100)
    shifted = shift_schedule(betas, shift)
    assert ((shifted > 0) & (shifted <= 1)).all()
    np.testing.assert_allclose(snr(shifted), snr(betas) / shift**2, rtol=1e-7)
    np.testing.assert_allclose(shift_schedule(betas, 1.0), betas, rtol=1e-9)


def test_the_shifted_cosine_is_the_papers():
    """Hoogeboom et al. 2023, eq. 5: log SNR = -2 log tan(pi t / 2) + 2 log(64 / d), for d = 256."""
    T = 2000
    t = np.arange(1, T + 1) / T
    expected = -2 * np.log(np.tan(np.pi * t[400:1600] / 2)) + 2 * np.log(64 / 256)
    found = np.log(snr(shift_schedule(get_named_beta_schedule("cosine", T), 256 / 64)))[400:1600]
    np.testing.assert_allclose(found, expected, atol=0.08)  # but for the published offset of 0.008


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step(name):
    betas = get_named_beta_schedule(name, 100)
    rescaled = zero_terminal_snr(betas)
    alpha_bar = np.cumprod(1 - rescaled)
    assert rescaled[-1] == 1 and alpha_bar[-1] == 0
    assert ((rescaled > 0) & (rescaled <= 1)).all()
    assert alpha_bar[0] == pytest.approx(1 - betas[0], rel=1e-12)
    root, before = np.sqrt(alpha_bar), np.sqrt(np.cumprod(1 - betas))  # moved and stretched: a line of the other
    line = np.polyfit(before, root, 1)
    np.testing.assert_allclose(root, np.polyval(line, before), atol=1e-12)
