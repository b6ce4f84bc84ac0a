"""All metrics at once: which there are, why others are missing, and that the order of the samples does not matter."""

from types import SimpleNamespace

import numpy as np
import pytest

from improved_diffusion.evaluation.metrics.copies import copy_score, nearest
from improved_diffusion.evaluation.metrics.frechet import frechet_distance, moments
from improved_diffusion.evaluation.metrics.inception_score import inception_score
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.evaluation.metrics.manifold import manifold_scores
from improved_diffusion.evaluation.metrics.scores import METRICS, find_copies, score


def points(n, seed=0, offset=0.0, d=6):
    return np.random.default_rng(seed).normal(offset, 1, (n, d)).astype(np.float32)


def a_set(n=300, seed=0, offset=0.0, spatial=True, classes=True):
    features = points(n, seed, offset)
    logits = 3 * features[:, :5].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return SimpleNamespace(
        features=features, moments=moments(features), probabilities=probabilities if classes else None,
        spatial_moments=moments(points(n, seed + 50, offset, d=4)) if spatial else None,
    )  # fmt: skip


def reordered(given, order):
    features = given.features[order]
    return SimpleNamespace(
        features=features, moments=moments(features), probabilities=given.probabilities[order],
        spatial_moments=given.spatial_moments,
    )  # fmt: skip


def test_every_metric_is_there_in_the_order_of_the_table():
    samples, reference = a_set(seed=1, offset=0.3), a_set(400)
    found = score(samples, reference)
    assert list(found.metrics) == [name for name in METRICS if name != "copies"] and found.missing == {}
    assert found.metrics["fid"] == {"value": frechet_distance(samples.moments, reference.moments)}
    assert found.metrics["sfid"] == {"value": frechet_distance(samples.spatial_moments, reference.spatial_moments)}
    distance = kernel_distance(samples.features, reference.features)
    assert found.metrics["kid"]["value"] == pytest.approx(distance.value, rel=1e-9)
    assert found.metrics["kid"]["error"] == pytest.approx(distance.standard_error, rel=0.5)  # of other blocks
    for name, share in manifold_scores(samples.features, reference.features)._asdict().items():
        assert found.metrics[name] == {"value": share.value, "error": share.standard_error}
    assert found.metrics["inception_score"]["error"] > 0
    assert found.metrics["inception_score"]["value"] == pytest.approx(
        inception_score(samples.probabilities).value, rel=0.05
    )


@pytest.mark.parametrize("samples, reference, missing", [
    ({"spatial": False}, {}, {"sfid": "the network gives no spatial features"}),
    ({}, {"spatial": False}, {"sfid": "the reference has no spatial features"}),
    ({"spatial": False}, {"spatial": False}, {"sfid": "the network gives no spatial features"}),
    ({"classes": False}, {}, {"inception_score": "the network gives no class probabilities: give --logits"}),
    ({}, {"classes": False}, {}),
])  # fmt: skip
def test_what_is_missing_has_a_reason(samples, reference, missing):
    found = score(a_set(**samples), a_set(seed=1, **reference))
    assert found.missing == missing
    assert set(found.metrics) | set(missing) == set(METRICS) - {"copies"}


def test_a_reference_of_statistics_alone_is_enough_for_the_frechet_distances():
    samples, reference = a_set(), a_set(seed=1)
    reference.features = reference.probabilities = None
    found = score(samples, reference)
    assert list(found.metrics) == ["fid", "sfid", "inception_score"]
    assert found.metrics["fid"]["value"] == score(samples, a_set(seed=1)).metrics["fid"]["value"]
    assert set(found.missing) == {"kid", "precision", "recall", "density", "coverage"}
    assert set(found.missing.values()) == {"the reference has statistics only: it needs images or their features"}


def test_a_set_is_itself():
    found = score(a_set(), a_set()).metrics
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["precision"]["value"] == found["recall"]["value"] == found["coverage"]["value"] == 1


def test_the_order_of_the_samples_changes_nothing_but_rounding():
    samples, reference = a_set(800, seed=1, offset=0.2), a_set(300)
    by_class = np.argsort(samples.probabilities.argmax(axis=1), kind="stable")
    found, sorted_ = score(samples, reference).metrics, score(reordered(samples, by_class), reference).metrics
    for name in ("fid", "sfid", "precision", "recall", "density", "coverage"):
        assert sorted_[name]["value"] == pytest.approx(found[name]["value"], rel=1e-6, abs=1e-9)
    assert sorted_["kid"]["value"] == pytest.approx(found["kid"]["value"], rel=1e-5)
    # The parts of the inception score are of other samples, but of all classes.
    naive = inception_score(samples.probabilities[by_class]).value
    assert sorted_["inception_score"]["value"] == pytest.approx(found["inception_score"]["value"], rel=0.02)
    assert abs(naive - found["inception_score"]["value"]) > 0.2 * found["inception_score"]["value"]


def test_copies_are_told_by_held_out_images():
    train = points(200)
    normal, _ = nearest(points(100, 1), train)
    copied = find_copies(train[:100] + 0.01, train, normal)
    fresh = find_copies(points(100, 2), train, normal)
    expected = copy_score(copied.distances, copied.held_out)
    assert copied.metric == {"value": expected.nearer, "error": expected.standard_error}
    assert copied.metric["value"] > 0.99 and abs(fresh.metric["value"] - 0.5) < 0.15
    np.testing.assert_allclose(copied.distances, 0.01 * np.sqrt(6), rtol=1e-3)
    alone = find_copies(train[:100], train, None)
    assert alone.held_out is None and alone.metric is None and alone.distances.shape == (100,)


def test_the_order_of_the_images_changes_nothing():
    samples, reference = a_set(), a_set(seed=1)
    found = score(samples, reference).metrics
    order = np.random.default_rng(5).permutation(len(samples.features))
    for name, metric in score(reordered(samples, order), reference).metrics.items():
        assert metric == pytest.approx(found[name], rel=1e-6, abs=1e-9)
