"""The Frechet distance, against closed forms, scipy and torchmetrics."""

import numpy as np
import pytest
import torch as th
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from improved_diffusion.evaluation.metrics import frechet
from improved_diffusion.evaluation.metrics.frechet import Moments, frechet_distance, moments


def features(n, d=24, seed=0, shift=0.0):
    """Correlated, with a spectrum that falls over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (n, d)) * np.geomspace(1, 0.03, d) @ np.random.default_rng(9).normal(size=(d, d))


def turned(*spectra, seed=3):
    """Covariances of these eigenvalues along the same axes, at an angle to the coordinates."""
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectra[0]),) * 2))[0]
    return [axes * np.array(spectrum, float) @ axes.T for spectrum in spectra]


@pytest.mark.parametrize("rows", [10, 4096])
def test_the_moments_are_the_mean_and_the_unbiased_covariance(rows, monkeypatch):
    monkeypatch.setattr(frechet, "ROWS", rows)
    x = features(123, shift=1000.0).astype(np.float32)
    mu, sigma = moments(x)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_distance_of_known_gaussians_is_the_closed_form():
    """Of covariances with common axes it is that of the means and the standard deviations."""
    a, b = np.array([4.0, 1, 0.25, 1e-4, 9]), np.array([1.0, 1, 16, 1e-2, 0])
    sigma_a, sigma_b = turned(a, b)
    mu_a, mu_b = np.arange(5.0), np.array([0, 2, 2, 3, 4.5])
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(Moments(mu_a, sigma_a), Moments(mu_b, sigma_b)) == pytest.approx(expected, rel=1e-12)


def test_in_two_dimensions_the_trace_of_the_root_is_known():
    """tr A^1/2 = (tr A + 2 det(A)^1/2)^1/2 for A of size 2, here the product of two that do not commute."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, rel=1e-12)


def test_it_is_that_of_scipys_matrix_root():
    """As the published code computes it."""
    a, b = moments(features(400)), moments(features(300, seed=1, shift=0.2))
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * sqrtm(a.sigma @ b.sigma).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_it_is_that_of_torchmetrics():
    network = th.nn.Identity()
    network.num_features = 24
    theirs = FrechetInceptionDistance(feature=network)
    x, y = features(400), features(300, seed=1, shift=0.2)
    theirs.update(th.from_numpy(x), real=False)
    theirs.update(th.from_numpy(y), real=True)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(theirs.compute().item(), rel=1e-7)


def test_it_is_symmetric():
    a, b = moments(features(50)), moments(features(60, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize("n", [2, 10, 24, 25, 500])
def test_a_set_is_no_distance_from_itself(n):
    """Nor where there are fewer images than features."""
    of_set = moments(features(n))
    assert 0 <= frechet_distance(of_set, of_set) < 1e-12 * np.trace(of_set.sigma)


def test_covariances_without_full_rank_are_no_trouble():
    """Half of the axes of one are empty, and as many of the other: rounding may not fill them."""
    d = 200
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 2, (2, d))
    a[:100], b[50:150] = 0, 0
    sigma_a, sigma_b = turned(a, b)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    zero = np.zeros(d)
    assert frechet_distance(Moments(zero, sigma_a), Moments(zero, sigma_b)) == pytest.approx(expected, rel=1e-11)


def test_features_that_are_all_equal_are_a_point():
    point, spread = moments(np.ones((5, 24), np.float32)), moments(features(100))
    expected = ((1 - spread.mu) ** 2).sum() + np.trace(spread.sigma)
    assert frechet_distance(point, spread) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(point, point) == 0


def test_it_grows_with_the_distance():
    values = [frechet_distance(moments(features(300)), moments(features(300, seed=1, shift=s))) for s in (0, 0.3, 1)]
    assert values == sorted(values) and values[-1] > 10 * values[0] > 0


def test_what_has_no_distance_is_named():
    with pytest.raises(ValueError, match="24 and 5 dimensions"):
        frechet_distance(moments(features(50)), moments(features(50, d=5)))
    with pytest.raises(ValueError, match="1 images have no covariance"):
        moments(features(1))
    broken = features(10)
    broken[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        moments(broken)
