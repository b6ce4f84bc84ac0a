"""Bits per dimension over a set of images."""

import math

import numpy as np
import pytest

from improved_diffusion.evaluation.nll import BoundSummary, summarize_bound

TOTALS = np.array([2.0, 4.0, 9.0, 5.0, 5.0], dtype=np.float32)
TERMS = np.arange(10, dtype=np.float32).reshape(5, 2)


def bound(indices):
    return {"total_bpd": TOTALS[indices], "vb": TERMS[indices]} if indices else {}


def alone(part):
    return [part]


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[i] for i in range(5)]])
def test_the_mean_does_not_depend_on_the_batches(batches):
    reports = []
    result = summarize_bound([(batch,) for batch in batches], bound, alone, lambda *report: reports.append(report))
    np.testing.assert_array_equal(result.total_bpd, TOTALS)
    assert result.mean == 5.0
    np.testing.assert_allclose(result.terms["vb"], TERMS.mean(axis=0))
    assert result.terms["vb"].dtype == np.float64
    assert len(reports) == len(batches) and reports[-1] == (5, 5.0)
    assert reports[0] == (len(batches[0]), pytest.approx(TOTALS[batches[0]].mean()))


def test_ranks_are_joined_in_their_order_and_may_have_nothing_to_do():
    def gather(mine):
        return [mine, bound([3, 4]), {}]

    result = summarize_bound([([0, 1, 2],)], bound, gather, lambda *report: None)
    np.testing.assert_array_equal(result.total_bpd, TOTALS)
    np.testing.assert_allclose(result.terms["vb"], TERMS.mean(axis=0))


def test_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    summary = BoundSummary(values, {})
    assert summary.standard_error == pytest.approx(2 / math.sqrt(400), rel=0.1)
    assert summary.standard_error == pytest.approx(values.std(ddof=1) / 20)
    assert math.isnan(BoundSummary(np.array([3.0]), {}).standard_error)
