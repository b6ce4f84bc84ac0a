"""Bits per dimension over a set of images."""

import math

import numpy as np
import pytest

from improved_diffusion.bound import BoundSummary, left_out_variance, stratified_timesteps, summarize_bound

TOTALS = np.array([2.0, 4.0, 9.0, 5.0, 5.0], dtype=np.float32)
TERMS = np.arange(10, dtype=np.float32).reshape(5, 2)


def bound(indices):
    return {"total_bpd": TOTALS[indices], "vb": TERMS[indices]} if indices else {}


def alone(part):
    return [part]


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[i] for i in range(5)]])
def test_the_mean_and_each_images_terms_do_not_depend_on_the_batches(batches):
    reports = []
    result = summarize_bound([(batch,) for batch in batches], bound, alone, lambda *report: reports.append(report))
    np.testing.assert_array_equal(result.total_bpd, TOTALS)
    assert result.mean == 5.0
    np.testing.assert_array_equal(result.terms["vb"], TERMS)
    assert result.terms["vb"].dtype == np.float32  # 4,000 terms of 10,000 images are 160 MB
    assert len(reports) == len(batches) and reports[-1] == (5, 5.0)
    assert reports[0] == (len(batches[0]), pytest.approx(TOTALS[batches[0]].mean()))


def test_ranks_are_joined_in_their_order_and_may_have_nothing_to_do():
    def gather(mine):
        return [mine, bound([3, 4]), {}]

    result = summarize_bound([([0, 1, 2],)], bound, gather, lambda *report: None)
    np.testing.assert_array_equal(result.total_bpd, TOTALS)
    np.testing.assert_array_equal(result.terms["vb"], TERMS)


def test_terms_that_are_not_wanted_are_not_kept():
    result = summarize_bound([([0, 1],), ([2],)], bound, alone, lambda *report: None, keep_terms=False)
    assert result.terms == {}
    np.testing.assert_array_equal(result.total_bpd, TOTALS[:3])


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


# How far an estimate may be off

STEPS = np.arange(1.0, 1001)
SMOOTH = {
    "as stratified_timesteps assumes": 1.2 * STEPS**-1.2,
    "falling faster": 1.2 * STEPS**-1.5,
    "falling to nothing": 1.2 * STEPS**-1.2 * (1.001 - STEPS / 1000) ** 2,
    "rising at the end": 1.2 * STEPS**-1.3 * (1 - 0.9 * STEPS / 1000 + 0.2 * (STEPS > 995)),
}


@pytest.mark.parametrize("count", [8, 25, 100])
@pytest.mark.parametrize("terms", SMOOTH.values(), ids=SMOOTH)
def test_the_variance_told_from_one_draw_is_that_over_all_draws(terms, count):
    t, weights = stratified_timesteps(1000, count, OFFSETS)
    spread = (weights * terms[t]).sum(axis=1).std()
    told = np.sqrt(left_out_variance(terms[t], weights).mean())
    assert told == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("count", [8, 25, 100])
def test_the_variance_of_rough_terms_is_told_on_the_average(count):
    rng = np.random.default_rng(0)
    t, weights = stratified_timesteps(1000, count, OFFSETS[::20])
    true, told = [], []
    for _ in range(40):
        terms = 1.2 * STEPS**-1.2 * np.exp(0.5 * rng.standard_normal(1000))
        true.append((weights * terms[t]).sum(axis=1).var())
        told.append(left_out_variance(terms[t], weights).mean())
    assert np.mean(told) == pytest.approx(np.mean(true), rel=0.3)  # the rise takes roughness for a slope, too


def test_the_error_of_a_mean_over_images_falls_with_their_number():
    terms = SMOOTH["falling to nothing"]
    rng = np.random.default_rng(0)
    means, told = [], []
    for _ in range(200):
        t, weights = stratified_timesteps(1000, 25, rng.random(50))
        means.append((weights * terms[t]).sum(axis=1).mean())
        told.append(BoundSummary(np.zeros(50), {"vb": terms[t], "weights": weights}).timesteps_error)
    # The spread of 200 means is known to 5%.
    assert np.mean(told) == pytest.approx(np.std(means), rel=0.15)


def test_with_every_timestep_there_is_no_error_and_with_too_few_drawn_none_is_told():
    t, weights = stratified_timesteps(20, 20, OFFSETS[:3])
    assert (left_out_variance(STEPS[t], weights) == 0).all()
    assert BoundSummary(TOTALS, {"vb": TERMS}).timesteps_error == 0
    t, weights = stratified_timesteps(1000, 3, OFFSETS[:3])
    assert np.isnan(left_out_variance(STEPS[t], weights)).all()


def test_a_straight_rise_is_no_roughness():
    """With a weighted term of a + b k at the k-th of n places the sum moves by b n from one end of the offset to the
    other, evenly: a variance of (b n)^2 / 12."""
    _, weights = stratified_timesteps(1000, 25, OFFSETS[:1])
    n = int((weights > 1).sum())
    terms = 0.3 * np.arange(25.0) / weights
    assert left_out_variance(terms, weights) == pytest.approx([(0.3 * n) ** 2 / 12])
