"""Bits per dimension over a set of images."""

import math

import numpy as np
import pytest

from improved_diffusion.evaluation.nll import BoundSummary, stratified_timesteps, summarize_bound

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


# A few timesteps in place of all

PLACES = 20_000
OFFSETS = (np.arange(PLACES) + 0.5) / PLACES


@pytest.mark.parametrize(("num_timesteps", "count"), [(1000, 8), (1000, 64), (100, 8), (20, 8), (9, 8), (50, 2)])
def test_the_estimate_is_unbiased_for_any_terms(num_timesteps, count):
    t, weights = stratified_timesteps(num_timesteps, count, OFFSETS)
    assert t.shape == weights.shape == (PLACES, count) and t.dtype == np.int64 and weights.dtype == np.float64
    # Over all offsets a timestep's weights add up to 1. A place is off by one grid point at either end of its interval.
    expected = np.bincount(t.ravel(), weights.ravel(), minlength=num_timesteps) / PLACES
    np.testing.assert_allclose(expected, 1, atol=2 * weights.max() / PLACES)
    terms = np.random.default_rng(0).normal(size=num_timesteps)
    assert (weights * terms[t]).sum(axis=1).mean() == pytest.approx(terms.sum(), abs=0.02 * math.sqrt(num_timesteps))


@pytest.mark.parametrize(("num_timesteps", "count"), [(1000, 8), (100, 64), (9, 8)])
def test_the_decoders_term_is_always_there_and_no_timestep_comes_twice(num_timesteps, count):
    t, weights = stratified_timesteps(num_timesteps, count, OFFSETS[::50])
    assert (t[:, 0] == 0).all() and (weights[:, 0] == 1).all()
    assert (np.diff(t, axis=1) > 0).all() and t.max() < num_timesteps
    assert (weights >= 1).all()


@pytest.mark.parametrize("count", [20, 64])
def test_with_enough_evaluations_the_sum_is_exact(count):
    t, weights = stratified_timesteps(20, count, OFFSETS[:3])
    np.testing.assert_array_equal(t, np.broadcast_to(np.arange(20), (3, 20)))
    assert (weights == 1).all()


def test_one_evaluation_cannot_stand_for_two_kinds_of_terms():
    with pytest.raises(ValueError, match=r"count must be at least 2, .* got 1"):
        stratified_timesteps(20, 1, OFFSETS[:3])
    t, weights = stratified_timesteps(1, 1, OFFSETS[:3])
    assert (t == 0).all() and (weights == 1).all()


def test_terms_that_fall_as_trained_models_do_are_estimated_closely():
    terms = 1.2 / np.arange(1.0, 1001) ** 1.2  # about those of a model of digits after 600 steps
    t, weights = stratified_timesteps(1000, 8, OFFSETS)
    error = (weights * terms[t]).sum(axis=1) - terms.sum()
    assert error.std() < 0.02 * terms.sum()
    assert error.std() < 999 * terms[1:].std() / math.sqrt(7) / 50  # that of seven timesteps drawn evenly
