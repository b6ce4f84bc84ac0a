"""The inception score, against its definition and torchmetrics."""

import numpy as np
import pytest
import torch as th
from torchmetrics.image.inception import InceptionScore as TheirScore

from improved_diffusion.evaluation.metrics.inception_score import inception_score


def probabilities(n, classes=10, seed=0, sharpness=2.0):
    logits = sharpness * np.random.default_rng(seed).normal(size=(n, classes))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def published(p, splits):
    """The lines of the published code, with the mean over images of the divergence."""
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [500, 507, 10])
def test_it_is_the_published_one(n):
    """Whether or not the samples can be split evenly."""
    assert inception_score(probabilities(n)) == pytest.approx(published(probabilities(n), 10), rel=1e-12)


def test_it_is_that_of_torchmetrics_but_for_the_deviations_degrees_of_freedom(monkeypatch):
    p = probabilities(500)
    with pytest.warns(UserWarning, match="Metric `InceptionScore` will save all extracted features"):
        theirs = TheirScore(feature=th.nn.Identity(), splits=10)
    theirs.update(th.from_numpy(np.log(p)))
    monkeypatch.setattr(th, "randperm", th.arange)  # which it shuffles by
    value, deviation = (part.item() for part in theirs.compute())
    ours = inception_score(p)
    assert ours.value == pytest.approx(value, rel=1e-9)
    assert ours.deviation * np.sqrt(10 / 9) == pytest.approx(deviation, rel=1e-9)


def test_sure_and_even_probabilities_score_the_number_of_classes():
    """With the zeros of a one-hot row, and of a class that is never seen."""
    sure = np.eye(12)[np.arange(200) % 10]
    assert inception_score(sure) == pytest.approx((10, 0), abs=1e-12)
    assert inception_score(sure.astype(np.float32), splits=1) == pytest.approx((10, 0), abs=1e-12)


def test_equal_probabilities_score_one():
    assert inception_score(np.full((40, 7), 1 / 7)) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(np.repeat(probabilities(1), 40, axis=0)) == pytest.approx((1, 0), abs=1e-12)


def test_probabilities_too_small_for_a_product_are_no_trouble():
    p = np.array([[1 - 1e-300, 1e-300], [1e-300, 1 - 1e-300]])
    assert inception_score(p, splits=1).value == pytest.approx(2, rel=1e-12)


def test_what_has_no_score_is_named():
    with pytest.raises(ValueError, match="9 samples cannot be split into 10 parts"):
        inception_score(probabilities(9))
    for wrong in (np.log(probabilities(20)), 2 * probabilities(20), np.full((20, 3), np.nan)):
        with pytest.raises(ValueError, match="apply a softmax first"):
            inception_score(wrong)
