"""The kernel distance."""

import numpy as np
import pytest
import torch as th
from torchmetrics.image.kid import KernelInceptionDistance

from improved_diffusion.evaluation.metrics import kid
from improved_diffusion.evaluation.metrics.kid import kernel_distance


def features(n, d=8, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def by_hand(x, y):
    """Binkowski et al. 2018, eq. 3: means over the pairs of different points."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    def within(points):
        return np.mean([kernel(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize("rows, columns", [(3, 2), (512, 2560)])
@pytest.mark.parametrize("blocks", [2, 20])
@pytest.mark.parametrize("d", [1, 8, 16])
def test_the_value_is_the_mean_over_all_pairs(d, blocks, rows, columns, monkeypatch):
    monkeypatch.setattr(kid, "ROWS", rows)
    monkeypatch.setattr(kid, "COLUMNS", columns)
    x, y = features(43, d), features(51, d, seed=1, shift=0.3)
    assert kernel_distance(x, y, blocks).value == pytest.approx(by_hand(x, y), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [16, 64])
def test_it_is_that_of_torchmetrics(d, dtype):
    """With one subset, of all images."""
    x, y = features(300, d).astype(dtype), features(300, d, seed=1, shift=0.1).astype(dtype)
    theirs = KernelInceptionDistance(feature=th.nn.Identity(), subsets=1, subset_size=300)
    theirs.update(th.from_numpy(x).double(), real=False)
    theirs.update(th.from_numpy(y).double(), real=True)
    assert kernel_distance(x, y).value == pytest.approx(theirs.compute()[0].item(), rel=1e-9)


def test_the_error_is_the_jackknife_over_blocks():
    """By leaving a block of both sets out and starting again."""
    x, y = features(60), features(80, seed=1, shift=0.3)
    rng = np.random.default_rng(0)  # as it mixes the images
    blocks_of_x, blocks_of_y = (np.split(rng.permutation(n), 10) for n in (60, 80))
    without = [by_hand(np.delete(x, i, axis=0), np.delete(y, j, axis=0)) for i, j in zip(blocks_of_x, blocks_of_y)]
    expected = np.sqrt(9 / 10 * ((without - np.mean(without)) ** 2).sum())
    assert kernel_distance(x, y, blocks=10).standard_error == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [1, 2, 9])
def test_the_two_ways_to_sum_agree(d):
    groups = [th.from_numpy(features(n, d, seed=n, shift=0.5)) for n in (5, 30, 17)]
    pairs, moments = kid._sums_by_pairs(groups), kid._sums_by_moments(groups)
    np.testing.assert_allclose(moments, pairs, rtol=1e-12)


def test_the_cheaper_way_is_taken(monkeypatch):
    """At as many images the one or the other, by their width."""
    taken = []
    for name in ("_sums_by_pairs", "_sums_by_moments"):
        original = getattr(kid, name)
        monkeypatch.setattr(kid, name, lambda groups, n=name, f=original: taken.append(n) or f(groups))
    for d in (40, 4):
        kernel_distance(features(100, d), features(100, d, seed=1))
    assert taken == ["_sums_by_pairs", "_sums_by_moments"]


def repeated(shift):
    sets = ((features(200, seed=2 * i), features(150, seed=2 * i + 1, shift=shift)) for i in range(150))
    results = [kernel_distance(x, y) for x, y in sets]
    return np.array(results).T


def test_it_is_unbiased():
    """Of two sets of one distribution the mean is 0."""
    values, _ = repeated(0.0)
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_its_error_is_that_of_repetition():
    """Where the distance is not 0; there the jackknife is on the safe side."""
    values, errors = repeated(0.4)
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)
    values, errors = repeated(0.0)
    assert values.std() < errors.mean() < 3 * values.std()


def test_the_order_of_the_images_does_not_matter_to_the_error():
    """As where they come class by class."""
    x, y = features(400), features(400, seed=1, shift=0.5)
    mixed, sorted_by_one = (kernel_distance(x, y[order]) for order in (np.arange(400), np.argsort(y[:, 0])))
    assert mixed.value == pytest.approx(sorted_by_one.value, rel=1e-9)
    assert mixed.standard_error == pytest.approx(sorted_by_one.standard_error, rel=0.6)


def test_it_grows_with_the_distance():
    values = [kernel_distance(features(300), features(300, seed=1, shift=s)).value for s in (0, 0.2, 0.4, 0.8)]
    assert values == sorted(values) and values[-1] > 1


def test_sets_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="8 and 4 dimensions"):
        kernel_distance(features(50), features(50, d=4))
    with pytest.raises(ValueError, match="30 images are too few: give at least 40"):
        kernel_distance(features(50), features(30))
