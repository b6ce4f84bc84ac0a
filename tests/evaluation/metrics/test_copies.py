"""Copied training images."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from improved_diffusion.evaluation.metrics.copies import copy_score, nearest


def points(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_the_nearest_training_image_is_found():
    features, train = points(70), points(90, seed=1)
    distance, index = nearest(features, train)
    every = np.sqrt(((features[:, None].astype(np.float64) - train) ** 2).sum(axis=2))
    np.testing.assert_allclose(distance, every.min(axis=1), rtol=1e-13)
    assert index.tolist() == every.argmin(axis=1).tolist()
    assert distance.dtype == np.float64 and index.dtype == np.int64


def test_a_copy_is_at_distance_zero():
    """Far from the origin and beside neighbours that are all but equal, too."""
    train = 500 + 1e-2 * points(200)
    distance, index = nearest(train[40:60], train)
    assert (distance == 0).all() and index.tolist() == list(range(40, 60))


def test_the_share_is_that_of_mann_and_whitney():
    """Ties count half."""
    rng = np.random.default_rng(0)
    samples, held_out = rng.integers(0, 8, 60) / 4, rng.integers(2, 10, 45) / 4
    pairs = (samples[:, None] < held_out) + 0.5 * (samples[:, None] == held_out)
    score = copy_score(samples, held_out)
    assert score.nearer == pytest.approx(pairs.mean(), rel=1e-12)
    assert score.nearer == pytest.approx(mannwhitneyu(held_out, samples).statistic / (60 * 45), rel=1e-12)
    variance = pairs.mean(axis=1).var(ddof=1) / 60 + pairs.mean(axis=0).var(ddof=1) / 45
    assert score.standard_error == pytest.approx(np.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_error_is_that_of_repetition(shift):
    rng = np.random.default_rng(1)
    scores = [copy_score(rng.normal(10, 1, 80), rng.normal(10 + shift, 2, 50)) for _ in range(600)]
    values, errors = np.array(scores).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)
    if not shift:
        assert values.mean() == pytest.approx(0.5, abs=4 * values.std() / np.sqrt(len(values)))


def test_copying_shows():
    train, held_out, samples = points(400), points(200, seed=1), points(200, seed=2)
    normal, _ = nearest(held_out, train)
    honest = copy_score(nearest(samples, train)[0], normal)
    assert abs(honest.nearer - 0.5) < 4 * honest.standard_error
    copies = copy_score(nearest(train[:200] + 0.05 * points(200, seed=3), train)[0], normal)
    assert copies.nearer > 0.99
    half = copy_score(nearest(np.concatenate([train[:100], samples[:100]]), train)[0], normal)
    assert half.nearer == pytest.approx(0.75, abs=4 * half.standard_error)


def test_all_at_distance_zero_is_no_evidence():
    score = copy_score(np.zeros(5), np.zeros(4))
    assert score.nearer == 0.5 and score.standard_error == 0


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="1 images are too few"):
        copy_score(np.ones(5), np.ones(1))
    with pytest.raises(ValueError, match="16 and 3 dimensions"):
        nearest(points(5), points(5, d=3))
