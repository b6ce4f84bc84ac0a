"""Sums that have the same bits whatever is summed beside them, and the precision of matrix products."""

import math

import numpy as np
import pytest
import torch as th

from improved_diffusion.evaluation.metrics.arrays import full_precision, on_device, sum_of_rows
from improved_diffusion.evaluation.metrics.neighbours import Pairs


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 1001, 2048])
def test_the_sum_of_a_row_does_not_depend_on_the_others(width):
    x = th.from_numpy(np.random.default_rng(0).normal(size=(37, width)))
    whole = sum_of_rows(x.clone())
    assert th.equal(whole, th.cat([sum_of_rows(row[None].clone()) for row in x]))
    assert whole.tolist() == pytest.approx([math.fsum(row) for row in x.tolist()], rel=1e-13, abs=1e-13)


def test_a_distance_has_the_same_bits_in_both_directions_and_in_any_company():
    x = np.random.default_rng(0).normal(size=(9, 301)).astype(np.float32)
    pairs = Pairs(x, x)
    i, j = th.cartesian_prod(th.arange(9), th.arange(9)).T
    squared = pairs.squared(i, j).view(9, 9)
    assert th.equal(squared, squared.T) and not squared.diagonal().any()
    assert all(pairs.squared(a[None], b[None]) == squared[a, b] for a, b in zip(i, j))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_that_may_not_be_written_are_copied(dtype):
    array = np.arange(12, dtype=dtype).reshape(3, 4)[::-1, ::2]
    array.flags.writeable = False
    copied = on_device(array, "cpu")
    copied += 1
    np.testing.assert_array_equal(copied.numpy(), array + 1)


def test_products_are_exact_where_the_process_allows_less_and_it_goes_on_allowing_it():
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError), full_precision():
            assert th.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert th.get_float32_matmul_precision() == "medium"
    finally:
        th.set_float32_matmul_precision(before)
