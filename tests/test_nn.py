"""Layers and small helpers."""

import math

import pytest
import torch as th
from helpers import assert_golden, golden
from torch import nn as torch_nn

from improved_diffusion import nn


def test_timestep_embedding_is_the_golden_one():
    g = golden("timestep_embedding")
    t = th.from_numpy(g["t"])
    assert_golden(nn.timestep_embedding(t, 32), g["dim32"])
    assert_golden(nn.timestep_embedding(t, 33), g["dim33"])


def test_timestep_embedding_of_fractional_steps():
    t = th.tensor([0.0, 0.25, 999.75])
    embedding = nn.timestep_embedding(t, 4, max_period=100)
    expected = [[math.cos(x), math.cos(x / 10), math.sin(x), math.sin(x / 10)] for x in t.tolist()]
    th.testing.assert_close(embedding, th.tensor(expected), rtol=1e-4, atol=1e-4)
    th.testing.assert_close(nn.timestep_embedding(th.tensor([7]), 8), nn.timestep_embedding(th.tensor([7.0]), 8))


def test_timestep_frequencies_with_a_shift_end_at_the_longest_period():
    t = th.tensor([0.0, 1.0, 500.5])
    angles = t[:, None] * 10000.0 ** -(th.arange(16) / 15)[None]
    found = nn.timestep_embedding(t, 32, freq_shift=1)
    th.testing.assert_close(found, th.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=1e-4)


def test_silu_is_x_times_sigmoid():
    x = th.linspace(-5, 5, 11)
    th.testing.assert_close(nn.SiLU()(x), x * th.sigmoid(x))


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float32])
def test_group_norm_is_computed_in_float32(dtype):
    norm = nn.normalization(64)
    assert isinstance(norm, nn.GroupNorm32) and norm.num_groups == 32
    x = (300 * th.randn(2, 64, 5, 5)).to(dtype)  # squares overflow float16
    out = norm(x)
    assert out.dtype == dtype
    groups = x.float().reshape(2, 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    expected = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    th.testing.assert_close(out, expected.to(dtype), rtol=2e-2 if dtype != th.float32 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_of_any_number_of_dimensions(dims):
    x = th.randn(1, 2, *[4] * dims)
    assert nn.conv_nd(dims, 2, 3, 3, padding=1)(x).shape == (1, 3, *[4] * dims)
    pooled = nn.avg_pool_nd(dims, kernel_size=2, stride=2)(x)
    assert pooled.shape == (1, 2, *[2] * dims)
    assert pooled.mean().item() == pytest.approx(x.mean().item(), abs=1e-6)


def test_linear_is_a_fully_connected_layer():
    layer = nn.linear(3, 2)
    x = th.randn(4, 3)
    th.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_update_ema_moves_in_place():
    target, source = [th.tensor([1.0, 2.0])], [th.tensor([3.0, 6.0], requires_grad=True)]
    same = target[0]
    nn.update_ema(target, source, rate=0.75)
    assert same.tolist() == [1.5, 3.0] and not same.requires_grad
    nn.update_ema(target, source)
    assert same.tolist() == pytest.approx([0.99 * 1.5 + 0.03, 0.99 * 3 + 0.06])
    parameter = torch_nn.Parameter(th.zeros(2))
    nn.update_ema([parameter], source, rate=0.5)
    assert parameter.tolist() == [1.5, 3.0]


def test_zero_and_scale_module_return_the_module():
    layer = torch_nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    assert nn.scale_module(layer, 0.5) is layer
    th.testing.assert_close(layer.weight.detach(), before * 0.5)
    assert nn.zero_module(layer) is layer
    assert all((p == 0).all() and p.requires_grad for p in layer.parameters())


def test_mean_flat_keeps_the_first_dimension():
    x = th.randn(3, 2, 4, 5)
    th.testing.assert_close(nn.mean_flat(x), x.reshape(3, -1).mean(1))


@pytest.mark.parametrize("flag", [False, True])
def test_checkpoint_recomputes_with_the_same_gradients(flag):
    layer, x, calls = torch_nn.Linear(3, 3), th.randn(2, 3, requires_grad=True), []

    def func(x, scale):
        calls.append(1)
        return th.tanh(layer(x)) * scale

    out = nn.checkpoint(func, (x, th.tensor(2.0)), layer.parameters(), flag)
    gradients = th.autograd.grad(out.sum(), [x, *layer.parameters()])
    assert len(calls) == (2 if flag else 1)
    expected = th.autograd.grad((th.tanh(layer(x)) * 2).sum(), [x, *layer.parameters()])
    for gradient, other in zip(gradients, expected):
        th.testing.assert_close(gradient, other, rtol=0, atol=0)


def test_checkpoint_repeats_the_same_dropout():
    x = th.ones(1000, requires_grad=True)
    out = nn.checkpoint(lambda x: th.nn.functional.dropout(x, 0.5), (x,), (), True)
    (gradient,) = th.autograd.grad(out.sum(), x)
    th.testing.assert_close(gradient, out.detach())


@pytest.mark.parametrize("dtype, tolerance", [(th.float32, 1e-6), (th.bfloat16, 0.02), (th.float16, 2e-3)])
@pytest.mark.parametrize("positions", [1, 7, 64])
def test_attention_and_its_gradients_are_those_of_its_formula(positions, dtype, tolerance):
    th.manual_seed(positions)
    drawn = th.randn(4, 3, 2, positions, 5, dtype=th.float64).to(dtype)
    found, exact = ([part.clone().to(kind).requires_grad_() for part in drawn[:3]] for kind in (dtype, th.float64))
    q, k, v = exact
    expected = th.softmax(q @ k.transpose(-2, -1) / 5**0.5, dim=-1) @ v
    got = nn.attend(*found)
    assert got.dtype == dtype
    weights = drawn[3]
    pairs = [(got, expected)]
    pairs += zip(th.autograd.grad(got, found, weights), th.autograd.grad(expected, exact, weights.double()))
    with th.no_grad():
        pairs.append((nn.attend(*found), expected))
    for value, wanted in pairs:
        assert (value.double() - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())
