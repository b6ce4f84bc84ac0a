"""Precision, recall, density and coverage, against their papers' definitions."""

import numpy as np
import pytest

from improved_diffusion.evaluation.metrics import neighbours
from improved_diffusion.evaluation.metrics.manifold import manifold_scores


def points(n, d=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d)).astype(np.float32)


def distance(a, b):
    return np.sqrt(((a.astype(np.float64) - b) ** 2).sum())


def radius(image, others, k):
    """The distance of the k-th nearest of the other images."""
    return sorted(distance(image, other) for other in others)[k - 1]


def by_hand(features, reference, k, k_density):
    """Kynkaanniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, sec. 3."""

    def radii(points, k):
        return [radius(p, np.delete(points, i, axis=0), k) for i, p in enumerate(points)]

    of_features, of_reference, of_density = radii(features, k), radii(reference, k), radii(reference, k_density)
    precision = [any(distance(x, y) <= r for y, r in zip(reference, of_reference)) for x in features]
    recall = [any(distance(x, y) <= r for x, r in zip(features, of_features)) for y in reference]
    density = [sum(distance(x, y) <= r for y, r in zip(reference, of_density)) / k_density for x in features]
    coverage = [any(distance(x, y) <= r for x in features) for y, r in zip(reference, of_density)]
    return precision, recall, density, coverage


def assert_scores(features, reference, k=3, k_density=5):
    scores = manifold_scores(features, reference, k, k_density)
    for score, images in zip(scores, by_hand(features, reference, k, k_density)):
        assert score.value == pytest.approx(np.mean(images), rel=1e-12, abs=1e-12)
        assert score.standard_error == pytest.approx(np.std(images, ddof=1) / np.sqrt(len(images)), abs=1e-12)
    return scores


@pytest.mark.parametrize("elements", [200, 1 << 24])
@pytest.mark.parametrize("k, k_density", [(3, 5), (5, 3), (1, 1)])
def test_they_are_those_of_the_definitions(k, k_density, elements, monkeypatch):
    monkeypatch.setattr(neighbours, "ELEMENTS", elements)
    scores = assert_scores(points(60), points(45, seed=1, shift=0.7), k, k_density)
    assert all(0.05 < score.value < 0.95 for score in scores), "the test is to be one of both outcomes"


def test_copies_count_as_the_definitions_say():
    """Within a set and across; in balls of no radius too, and in balls whose edge they lie on."""
    base = points(30)
    reference = np.concatenate([base[:20], base[:4], base[:4], base[:4], base[:4], base[:4]])
    features = np.concatenate([base[2:10], base[2:3].repeat(5, axis=0), base[20:]])
    assert_scores(features, reference)
    assert_scores(reference, features)
    assert_scores(base.round(), np.concatenate([base[:20].round(), points(20, seed=1).round()]))  # many equal distances


def test_a_far_corner_of_the_space_is_no_trouble():
    """There float32's squared distances have lost all digits."""
    x, y = 3000 + points(40), 3000 + points(40, seed=1)
    y[:10] = x[:10]
    assert_scores(x, y)
    far = np.concatenate([x, -x])
    assert_scores(far, np.concatenate([y, 1 - y]))


@pytest.mark.parametrize("scale", [1, 1e-6])
def test_of_a_set_and_itself_they_are_one(scale):
    """And of the density, every ball holds its centre beside the k images that it is made to hold."""
    x = (100 + scale * np.random.default_rng(0).normal(size=(200, 8))).astype(np.float64)
    scores = manifold_scores(x, x)
    assert scores.precision == scores.recall == scores.coverage == (1, 0)
    assert scores.density.value == pytest.approx(6 / 5, rel=1e-12)


def test_samples_from_the_middle_are_precise_and_samples_from_everywhere_have_recall():
    real = points(300)
    narrow = manifold_scores(points(300, seed=1) / 4, real)
    assert narrow.precision.value == 1 and narrow.density.value > 1 and narrow.recall.value < 0.1
    wide = manifold_scores(4 * points(300, seed=1), real)
    assert wide.precision.value < 0.3 and wide.recall.value > 0.9


def test_sets_too_small_and_of_other_widths_are_named():
    with pytest.raises(ValueError, match="3 images are too few to have 3 neighbours"):
        manifold_scores(points(3), points(30))
    with pytest.raises(ValueError, match="5 images are too few to have 5 neighbours"):
        manifold_scores(points(30), points(5))
    with pytest.raises(ValueError, match="6 and 7 dimensions"):
        manifold_scores(points(30), points(30, d=7))
