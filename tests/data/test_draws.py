"""Random numbers of many places at once are those of numpy's generators."""

import numpy as np
import pytest

from improved_diffusion.data.draws import BLOCK, uniform, uniform_in_order

PLACES = [0, 1, 2, 127, 128, 65_535, 1_281_166, 2**31, 2**32 - 1]


@pytest.mark.parametrize("more", [(), (1,), (7, 2**40)])
@pytest.mark.parametrize("epoch", [0, 1, 999, 2**32 + 5])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**62 - 1])
def test_they_are_numpys(seed, epoch, more):
    expected = [np.random.default_rng((seed, epoch, place, *more)).random() for place in PLACES]
    np.testing.assert_array_equal(uniform((seed, epoch), np.array(PLACES), *more), expected)


def test_they_are_numpys_in_many_places():
    expected = [np.random.default_rng((3, 1, place)).random() for place in range(1000)]
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(uniform((3, 1), np.arange(1000)), expected)


@pytest.mark.parametrize("first", [0, 5, BLOCK - 3, 3 * BLOCK])
@pytest.mark.parametrize("stride", [1, 3])
def test_the_numbers_of_an_order_are_the_same(first, stride):
    places = np.arange(first, first + 40, stride)
    for key in ((0, 1), (1, 1), (0, 1)):
        np.testing.assert_array_equal(uniform_in_order(key, places, 2), uniform(key, places, 2))
    far = np.array([1, BLOCK + 1, 5 * BLOCK])
    np.testing.assert_array_equal(uniform_in_order((4, 4), far), uniform((4, 4), far))
