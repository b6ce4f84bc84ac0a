"""Nearest neighbours and the sieve that finds them."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.evaluation.metrics import neighbours
from improved_diffusion.evaluation.metrics.neighbours import Pairs, nearest_neighbours


def points(n, d=12, seed=0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, 1, (n, d)).astype(np.float32)


def all_squared(x, y):
    """By the definition, in float64."""
    return np.array([((y.astype(np.float64) - row) ** 2).sum(axis=1) for row in x.astype(np.float64)])


def assert_nearest(result, squared):
    distances, index = result
    count = distances.shape[1]
    np.testing.assert_allclose(distances, np.sort(squared, axis=1)[:, :count], rtol=1e-13, atol=0)
    np.testing.assert_allclose(np.take_along_axis(squared, index, axis=1), distances, rtol=1e-13, atol=0)
    assert all(len(set(row)) == count for row in index)


@pytest.mark.parametrize("elements", [1, 1000, 1 << 24])
@pytest.mark.parametrize("count", [1, 4, 37])
def test_the_nearest_are_those_of_a_full_sort(count, elements, monkeypatch):
    monkeypatch.setattr(neighbours, "ELEMENTS", elements)
    x, y = points(53), points(37, seed=1)
    assert_nearest(nearest_neighbours(x, y, count), all_squared(x, y))


@pytest.mark.parametrize("rows", [7, 1 << 14])
def test_a_point_is_not_its_own_neighbour_and_its_copy_is(rows, monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ROWS", rows)
    x = np.concatenate([points(40), points(9)])
    distances, index = nearest_neighbours(x, count=3)
    squared = all_squared(x, x)
    np.fill_diagonal(squared, np.inf)
    assert_nearest((distances, index), squared)
    assert (distances[:9, 0] == 0).all() and index[:9, 0].tolist() == list(range(40, 49))
    assert (distances[9:40, 0] > 0).all()


def crowd(n, spread, seed=0):
    """Points around one of the norm 100, of which float32 loses the order."""
    return 100 / np.sqrt(12) + spread * np.random.default_rng(seed).normal(size=(n, 12))


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_the_order_is_float64s_where_float32_cannot_tell(spread):
    around = crowd(300, spread)
    y = np.concatenate([around, -around])  # centred between the two
    x = np.concatenate([around[:20] + spread / 10, -around[:20]])
    distances, index = nearest_neighbours(x, y, 3)
    assert_nearest((distances, index), all_squared(x, y))
    rough = next(block for _, block in Pairs(x, y).blocks())
    if spread <= 1e-4:
        assert (rough.argmax(dim=1).numpy() != index[:, 0]).any(), "the test is to be a hard one"


@pytest.mark.parametrize("d, offset", [(3, 0), (64, 100), (768, 3)])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_the_thresholds_hold_for_all_balls(k, d, offset):
    """Also where the radius is 0, or exactly the distance of a point; and the points in doubt are few."""
    x, y = points(100, d, offset=offset), points(80, d, seed=1, offset=offset)
    y[:40], x[90:] = x[:40], 30 * x[90:]
    squared = th.from_numpy(all_squared(x, y))
    pairs = Pairs(x, y)
    ((_, closeness),) = pairs.blocks()
    np.testing.assert_allclose(-2 * closeness, squared, atol=1e-5 * squared.max())
    for radius, centres in (
        (squared.sort(dim=0).values[k], pairs.y_squared),
        (squared.sort(dim=1).values[:, k : k + 1], pairs.x_squared[:, None]),
    ):
        least, sure = pairs.thresholds(centres, radius)
        inside = squared <= radius
        assert (closeness >= least)[inside].all() and not (closeness >= sure)[~inside].any()
        assert ((closeness >= least) & (closeness < sure)).double().mean() < 0.1


def test_copies_of_one_point_are_found_in_a_set_of_nothing_else():
    x = np.ones((500, 5), np.float32)
    distances, index = nearest_neighbours(x, count=4)
    assert (distances == 0).all() and (index != np.arange(500)[:, None]).all()


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="12 and 5 dimensions"):
        nearest_neighbours(points(4), points(4, 5))
    with pytest.raises(ValueError, match="4 images are too few to have 4 neighbours"):
        nearest_neighbours(points(4), count=4)
    nearest_neighbours(points(4), points(4), count=4)
    broken = points(4)
    broken[1, 1] = np.nan
    for pair in ((broken, points(4)), (points(4), broken)):
        with pytest.raises(ValueError, match="not finite"):
            nearest_neighbours(*pair)
