"""Moving averages of the parameters."""

import pytest
import torch as th

from improved_diffusion.ema import ParameterEMA, flatten
from improved_diffusion.nn import update_ema

ONE, ZERO = th.tensor(1.0), th.tensor(0.0)


def parameters():
    return [th.nn.Parameter(th.randn(2, 3)), th.nn.Parameter(th.randn(4)), th.nn.Parameter(th.randn(()))]


def test_flatten_joins_all_parameters():
    params = parameters()
    flat = flatten(params)
    assert flat.shape == (11,) and not flat.requires_grad
    th.testing.assert_close(flat[:6], params[0].detach().flatten())
    th.testing.assert_close(flatten(params[:1]), params[0].detach().flatten())


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9999])
def test_average_is_the_one_parameter_by_parameter(rate):
    params = parameters()
    ema, expected = ParameterEMA(rate, params), [p.detach().clone() for p in params]
    for _ in range(5):
        for p in params:
            p.data += th.randn_like(p)
        ema.update(flatten(params), ONE)
        update_ema(expected, params, rate)
    for got, want in zip(ema.params, expected):
        th.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_average_of_a_constant_step_response():
    """After n steps from 0 towards 1 the average is 1 - rate^n."""
    ema = ParameterEMA(0.9, [th.zeros(3)])
    for _ in range(20):
        ema.update(th.ones(3), ONE)
    th.testing.assert_close(ema.params[0], th.full((3,), 1 - 0.9**20))


def test_a_skipped_step_leaves_the_average_alone():
    ema = ParameterEMA(0.9, [th.ones(3)])
    ema.update(th.full((3,), 5.0), ZERO)
    assert ema.params[0].tolist() == [1, 1, 1]


def test_average_is_a_copy_and_continues_from_given_values():
    params = parameters()
    ema = ParameterEMA(0.5, params)
    before = ema.params[0].clone()
    params[0].data += 1
    th.testing.assert_close(ema.params[0], before)
    ema.load([p.detach() for p in params])
    for got, p in zip(ema.params, params):
        assert got.shape == p.shape
        th.testing.assert_close(got, p.detach())
