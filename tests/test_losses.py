"""Likelihood terms, against torch.distributions and the exact normal CDF."""

import math

import numpy as np
import pytest
import torch as th
from helpers import assert_golden, golden

from improved_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    nats_to_bits,
    normal_kl,
)

G = {key: th.from_numpy(value) for key, value in golden("losses").items()}
LEVELS = th.arange(256, dtype=th.float64) / 127.5 - 1


def test_normal_kl_is_the_golden_one():
    assert_golden(normal_kl(G["mean1"], G["logvar1"], G["mean2"], G["logvar2"]), G["normal_kl"].numpy())


def test_normal_kl_is_that_of_torch_distributions():
    p = th.distributions.Normal(G["mean1"], th.exp(0.5 * G["logvar1"]))
    q = th.distributions.Normal(G["mean2"], th.exp(0.5 * G["logvar2"]))
    expected = th.distributions.kl_divergence(p, q)
    th.testing.assert_close(
        normal_kl(G["mean1"], G["logvar1"], G["mean2"], G["logvar2"]), expected, rtol=1e-4, atol=1e-5
    )


def test_normal_kl_broadcasts_and_takes_numbers():
    mean, logvar = th.randn(2, 3, dtype=th.float64), th.randn(3, dtype=th.float64)
    kl = normal_kl(mean, logvar, 0.0, 0.0)
    assert kl.shape == (2, 3) and kl.dtype == th.float64
    th.testing.assert_close(kl, 0.5 * (logvar.exp() + mean**2 - 1 - logvar))
    th.testing.assert_close(normal_kl(0.0, 0.0, mean, 0.0), 0.5 * mean**2)


def test_normal_kl_of_numbers_alone_is_an_error():
    with pytest.raises(ValueError, match="tensor"):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_approximate_cdf_is_near_the_exact_one():
    x = th.linspace(-6, 6, 1001, dtype=th.float64)
    assert (approx_standard_normal_cdf(x) - th.special.ndtr(x)).abs().max() < 5e-4


def test_discretized_likelihood_is_the_golden_one():
    value = discretized_gaussian_log_likelihood(G["x"], means=G["means"], log_scales=G["log_scales"])
    assert_golden(value, G["discretized_gaussian_log_likelihood"].numpy())


@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 1.0])
def test_probabilities_of_the_256_levels_add_up_to_one(mean, log_scale):
    x = LEVELS
    log_p = discretized_gaussian_log_likelihood(x, means=th.full_like(x, mean), log_scales=th.full_like(x, log_scale))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_discretized_likelihood_is_near_the_exact_bin_mass():
    x, mean, scale = LEVELS, 0.1, 0.3
    above = th.where(x > 0.999, math.inf, x + 1 / 255)
    below = th.where(x < -0.999, -math.inf, x - 1 / 255)
    exact = th.special.ndtr((above - mean) / scale) - th.special.ndtr((below - mean) / scale)
    log_p = discretized_gaussian_log_likelihood(
        x, means=th.full_like(x, mean), log_scales=th.full_like(x, math.log(scale))
    )
    middle = (x - mean).abs() < 2 * scale
    th.testing.assert_close(log_p.exp()[middle], exact[middle], rtol=0.03, atol=0)


def test_discretized_likelihood_is_floored():
    x = th.zeros(1)
    value = discretized_gaussian_log_likelihood(x, means=th.ones(1), log_scales=th.full((1,), -7.0))
    assert value.item() == pytest.approx(math.log(1e-12))


def test_shapes_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\).*\(2, 3\)"):
        discretized_gaussian_log_likelihood(th.zeros(2, 3), means=th.zeros(3), log_scales=th.zeros(2, 3))


def test_a_factor_of_two_is_one_bit():
    assert nats_to_bits(np.log(2.0)) == pytest.approx(1)
    assert nats_to_bits(th.tensor(math.log(8.0))).item() == pytest.approx(3)
