"""Moving averages of the parameters."""

import math
import re

import numpy as np
import pytest
import torch as th

from improved_diffusion.logs import logger
from improved_diffusion.nn import update_ema
from improved_diffusion.training.ema import (
    Followed,
    ParameterEMA,
    PowerEMA,
    forgetting_rate,
    gamma_of,
    posthoc_weights,
    profile_error,
    profile_products,
    warn_of_slow_averages,
)

ONE, ZERO = th.tensor(1.0), th.tensor(0.0)


def parameters():
    return [th.nn.Parameter(th.randn(2, 3)), th.nn.Parameter(th.randn(4)), th.nn.Parameter(th.randn(()))]


def flat(params):
    return th.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9999])
def test_average_is_the_one_parameter_by_parameter(rate, joined, monkeypatch):
    """Where the parameters are followed one by one, and where they are joined, as on GPUs."""
    if joined:
        monkeypatch.setattr(Followed, "__call__", lambda self, params: [self._flat(params)])
    params, followed = parameters(), Followed()
    ema, expected = ParameterEMA(rate, params), [p.detach().clone() for p in params]
    for step in range(5):
        for p in params:
            p.data += th.randn_like(p)
        ema.update(followed(params), ONE, step)
        update_ema(expected, params, rate)
    for got, want in zip(ema.params, expected):
        th.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_average_of_a_constant_step_response():
    """After n steps from 0 towards 1 the average is 1 - rate^n."""
    ema = ParameterEMA(0.9, [th.zeros(3)])
    for step in range(20):
        ema.update([th.ones(3)], ONE, step)
    th.testing.assert_close(ema.params[0], th.full((3,), 1 - 0.9**20))


@pytest.mark.parametrize("warmup", [False, True])
def test_a_skipped_step_leaves_the_average_alone(warmup):
    ema = ParameterEMA(0.1, [th.ones(3)], warmup)
    for step in range(3):
        ema.update([th.full((3,), 5.0)], ZERO, step)
    assert ema.params[0].tolist() == [1, 1, 1]


def test_a_power_function_average_weighs_the_time_of_skipped_steps_too():
    """The parameters stand still meanwhile, and its profile is one of time."""
    ema, other = PowerEMA(0.1, [th.zeros(3)]), PowerEMA(0.1, [th.zeros(3)])
    for step in range(6):
        ema.update([th.full((3,), 5.0)], ZERO if step % 2 else ONE, step)
        other.update([th.full((3,), 5.0)], ONE, step)
    assert th.equal(ema.params[0], other.params[0])


def test_average_is_a_copy_and_continues_from_given_values():
    params = parameters()
    ema = ParameterEMA(0.5, params)
    before = ema.params[0].clone()
    params[0].data += 1
    th.testing.assert_close(ema.params[0], before)
    ema.load([p.detach() for p in params])
    for got, p in zip(ema.params, params):
        assert got.shape == p.shape and not got.requires_grad
        th.testing.assert_close(got, p.detach())


def test_without_warmup_the_update_is_one_lerp():
    """Bit for bit, so that runs go on as they began."""
    start, step = th.randn(1000), th.randn(1000)
    ema = ParameterEMA(0.9999, [start])
    ema.update([step], ONE, 0)
    assert th.equal(ema.params[0], start.lerp(step, (1 - 0.9999) * ONE))


@pytest.mark.parametrize("step, rate", [(0, 0.1), (8, 0.5), (90, 0.91), (900, 0.95)])
def test_with_warmup_the_rate_rises_to_its_final_value(step, rate):
    ema = ParameterEMA(0.95, [th.zeros(1)], warmup=True)
    ema.update([th.ones(1)], ONE, step)
    assert ema.params[0].item() == pytest.approx(1 - rate, rel=1e-6)


def test_averages_are_named_after_what_they_are():
    params = parameters()
    named = [(ema.label, ema.description) for ema in (ParameterEMA(0.9999, params), PowerEMA(0.05, params))]
    assert named == [("0.9999", {"ema_rate": 0.9999}), ("sigma_rel0.05", {"ema_sigma_rel": 0.05})]


# Power-function averages


def random_walk(steps, size, seed=0):
    """Parameters over training: they wander, and jitter about where they are. Float64 [steps, size]."""
    rng = np.random.default_rng(seed)
    return 1 + np.cumsum(rng.standard_normal((steps, size)), axis=0) / steps**0.5 + rng.standard_normal((steps, size))


def track(walk, sigma_rel, stored_at=()):
    """The power-function average of a walk in float64, by the paper's formula: at each of the steps, and at the end."""
    gamma, value, stored = gamma_of(sigma_rel), np.zeros(walk.shape[1]), []
    for t, parameters in enumerate(walk, start=1):
        beta = (1 - 1 / t) ** (gamma + 1)
        value = beta * value + (1 - beta) * parameters
        if t in stored_at:
            stored.append(value)
    return (np.array(stored), value) if len(stored_at) else value


def test_power_average_follows_the_papers_formula():
    walk = random_walk(500, 50)
    ema = PowerEMA(0.1, [th.full((50,), 9.0)])
    for step, parameters in enumerate(walk):
        ema.update([th.from_numpy(parameters).float()], ONE, step)
    np.testing.assert_allclose(ema.params[0].numpy(), track(walk, 0.1), rtol=2e-6, atol=2e-6)


def test_first_update_takes_the_parameters_entirely():
    ema, params = PowerEMA(0.05, [th.full((100,), 1e9)]), th.randn(100)
    ema.update([params], ONE, 0)
    assert th.equal(ema.params[0], params)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.15])
def test_weights_of_a_power_average_are_its_profile(sigma_rel):
    """An impulse at step n comes out as the profile's integral from n - 1 to n; their spread is sigma_rel."""
    steps = 200
    ema = PowerEMA(sigma_rel, [th.zeros(steps)])
    for step, impulse in enumerate(th.eye(steps)):
        ema.update([impulse], ONE, step)
    weights = ema.params[0].double().numpy()
    edges = np.arange(steps + 1) / steps
    np.testing.assert_allclose(weights, np.diff(edges ** (ema.gamma + 1)), rtol=1e-4, atol=1e-7)
    middle = (edges[1:] + edges[:-1]) / 2
    mean = (weights * middle).sum()
    assert ((weights * (middle - mean) ** 2).sum()) ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886])
def test_the_exponents_profile_has_the_width(sigma_rel):
    """The standard deviation of the profile tau^gamma on [0, 1] (EDM2 sec. 3.1)."""
    gamma = gamma_of(sigma_rel)
    assert gamma >= 0
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-10)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 12**-0.5, 0.5])
def test_a_width_that_no_exponent_has_is_an_error(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel {sigma_rel} .*0\.2887"):
        gamma_of(sigma_rel)


# Other lengths, after training


def test_products_of_profiles_are_their_integrals():
    cases = [(3.0, 5.0), (7.0, 2.0), (10.0, 2.0), (10.0, 0.5)]
    steps, gammas = np.array(cases).T
    tau = (np.arange(2_000_000) + 0.5) * (10 / 2_000_000)
    profiles = [(g + 1) * tau**g / t ** (g + 1) * (tau < t) for t, g in cases]
    integrals = [[(p * q).mean() * 10 for q in profiles] for p in profiles]
    np.testing.assert_allclose(profile_products(steps, gammas, steps, gammas), integrals, rtol=1e-5)


def snapshots(walk, widths, every, end):
    """(steps, gammas, averages) as a run stores them."""
    at = list(range(every, end + 1, every))
    stored = [track(walk[:end], width, at)[0] for width in widths]
    return np.tile(at, len(widths)), np.repeat([gamma_of(w) for w in widths], len(at)), np.concatenate(stored)


STEPS, EVERY = 4096, 64


@pytest.fixture(scope="module")
def stored():
    walk = random_walk(STEPS, 200)
    return walk, *snapshots(walk, (0.05, 0.10), EVERY, STEPS)


@pytest.mark.parametrize("end", [STEPS, STEPS // 2])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.08, 0.15])
def test_average_of_another_length_is_rebuilt(stored, sigma_rel, end):
    walk, steps, gammas, averages = stored
    weights = posthoc_weights(steps, gammas, end, gamma_of(sigma_rel))
    assert not weights[steps > end].any() and weights.sum() == pytest.approx(1, abs=1e-12)
    truth = track(walk[:end], sigma_rel)
    size = np.linalg.norm(truth)
    error = np.linalg.norm(weights @ averages - truth) / size
    nearest = min(np.linalg.norm(average - truth) / size for average in averages[steps == end])
    assert error < (1e-9 if sigma_rel == 0.05 else 1e-4)
    assert sigma_rel == 0.05 or nearest > 100 * error
    assert profile_error(steps, gammas, weights, end, gamma_of(sigma_rel)) < 3e-3


def test_parameters_that_stand_still_come_out_as_they_are():
    """However badly few snapshots represent the length."""
    weights = posthoc_weights([100, 200, 300], [gamma_of(0.05)] * 3, 300, gamma_of(0.25))
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_error_of_the_profile_is_the_integral_of_its_difference():
    steps, gammas, target = (
        np.array([400, 1000, 1000]),
        np.array([gamma_of(w) for w in (0.1, 0.1, 0.05)]),
        gamma_of(0.2),
    )
    weights = posthoc_weights(steps, gammas, 1000, target)
    tau = np.arange(0.005, 1000, 0.01)
    made = sum(w * (g + 1) * tau**g / t ** (g + 1) * (tau < t) for w, t, g in zip(weights, steps.astype(float), gammas))
    wanted = (target + 1) * tau**target / 1000 ** (target + 1)
    expected = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert profile_error(steps, gammas, weights, 1000, target) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.1


def test_weights_are_the_nearest_of_those_that_sum_to_one():
    steps, gammas, target = [500, 800, 1000], [gamma_of(0.1)] * 3, gamma_of(0.15)
    weights = posthoc_weights(steps, gammas, 1000, target)
    least = profile_error(steps, gammas, weights, 1000, target)
    for change in ([1, -1, 0], [0, 1, -1], [-1, 0, 1]):
        for size in (-1e-2, 1e-2):
            assert profile_error(steps, gammas, weights + size * np.array(change), 1000, target) > least


def test_error_falls_with_the_number_of_snapshots():
    errors = []
    for every in (250, 100, 25):
        steps = np.tile(np.arange(every, 1001, every), 2)
        gammas = np.repeat([gamma_of(0.05), gamma_of(0.1)], len(steps) // 2)
        weights = posthoc_weights(steps, gammas, 1000, gamma_of(0.2))
        errors.append(profile_error(steps, gammas, weights, 1000, gamma_of(0.2)))
    assert errors[0] > 0.1 > errors[1] > 10 * errors[2]


def test_snapshots_that_say_the_same_share_the_weight():
    """Doubled ones, as in a folder with copies, make the equations singular."""
    steps, gammas = np.array([500, 500, 1000, 1000]), np.full(4, gamma_of(0.1))
    weights = posthoc_weights(steps, gammas, 1000, gamma_of(0.15))
    once = posthoc_weights(steps[::2], gammas[::2], 1000, gamma_of(0.15))
    np.testing.assert_allclose(weights, np.repeat(once / 2, 2), rtol=1e-9)


def test_a_step_before_all_snapshots_is_an_error():
    with pytest.raises(ValueError, match="up to step 50"):
        posthoc_weights([100, 200], [7.0, 7.0], 50, 5.0)


@pytest.mark.parametrize(
    "rate, warmup", [(0.9999, False), (0.9, False), (0.9, True), (0.9999, True), (0.05, True), (0.0, True)]
)
@pytest.mark.parametrize("steps", [0, 1, 5, 100])
def test_the_share_of_the_first_parameters_is_what_is_left_of_them(rate, warmup, steps):
    ema = ParameterEMA(rate, [th.ones(1, dtype=th.float64)], warmup)
    for step in range(steps):
        ema.update([th.zeros(1, dtype=th.float64)], ONE.double(), step)
    assert ema.params[0].item() == pytest.approx(ema.initial_share(steps), rel=1e-9, abs=1e-300)


def test_a_power_average_holds_nothing_of_the_first_parameters():
    ema = PowerEMA(0.1, [th.ones(1)])
    assert ema.initial_share(0) == 1
    ema.update([th.zeros(1)], ONE, 0)
    assert ema.params[0].item() == ema.initial_share(1) == 0


@pytest.mark.parametrize(
    "steps, remedy",
    [(1, "after 1 step .*train for more"), (9, "train for more"), (10, "rate 0.5$"), (100, "rate 0.9$"), (10**6, None)],
)
def test_a_rate_is_advised_where_one_forgets(steps, remedy, monkeypatch):
    given = []
    monkeypatch.setattr(logger, "warn", given.append)
    warn_of_slow_averages([ParameterEMA(0.9999, [th.ones(1)])], steps)
    assert bool(given) == bool(remedy) and all(re.search(remedy, text) for text in given)
    assert all(("ema_rate 0." in text.split("noise: ")[1]) == (steps >= 10) for text in given)


@pytest.mark.parametrize("steps", [2, 20, 300, 1500, 20_000, 10**6])
def test_the_rate_advised_forgets(steps):
    rate = forgetting_rate(steps)
    assert 0 < rate <= 0.9999 and (steps < 10 or ParameterEMA(rate, [th.ones(1)]).initial_share(steps) < 0.01)


# All parameters as one vector


def test_kept_views_follow_the_parameters():
    params, join = parameters(), Followed()._flat
    for change in (
        lambda: None,
        lambda: params[0].data.add_(1),  # in place
        lambda: setattr(params[1], "data", th.randn(4)),  # elsewhere
        lambda: params.__setitem__(2, th.nn.Parameter(th.randn(()))),
        lambda: setattr(params[0], "data", th.randn(3, 2).t()),
        lambda: params[0].data.mul_(2),
    ):
        change()
        assert th.equal(join(params), flat(params))


def test_channels_last_parameters_are_joined_in_their_shapes_order():
    params, join = [th.nn.Parameter(th.randn(2, 3, 4, 4)), th.nn.Parameter(th.randn(5))], Followed()._flat
    params[0].data = params[0].data.to(memory_format=th.channels_last)
    for _ in range(3):
        assert th.equal(join(params), flat(params))
        params[0].data += 1


def test_what_is_joined_is_a_copy():
    params, join = parameters(), Followed()._flat
    before = join(params)
    params[0].data += 1
    assert not th.equal(before, join(params))
