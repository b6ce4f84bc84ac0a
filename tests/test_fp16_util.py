"""16-bit training's parts."""

import pytest
import torch as th
from torch import nn

from improved_diffusion.fp16_util import (
    convert_module_to_bf16,
    convert_module_to_f16,
    convert_module_to_f32,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)


def model():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3, 2))


def half_model():
    half = model()
    half.apply(convert_module_to_f16)
    return half


@pytest.mark.parametrize("convert, dtype", [(convert_module_to_f16, th.float16), (convert_module_to_bf16, th.bfloat16)])
@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 1), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 3, bias=False)])
def test_convolutions_are_converted_there_and_back(convert, dtype, layer):
    before = layer.weight.detach().clone()
    layer.apply(convert)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    layer.apply(convert_module_to_f32)
    th.testing.assert_close(layer.weight.detach(), before.to(dtype).float(), rtol=0, atol=0)


def test_other_layers_stay_in_float32():
    half = half_model()
    assert [p.dtype for p in half.parameters()] == [th.float16] * 2 + [th.float32] * 4


def test_master_parameters_are_one_flat_float32_copy():
    half = half_model()
    params = list(half.parameters())
    (master,) = make_master_params(params)
    assert isinstance(master, nn.Parameter) and master.requires_grad and master.dtype == th.float32
    th.testing.assert_close(master.detach(), th.cat([p.detach().float().flatten() for p in params]), rtol=0, atol=0)
    for view, p in zip(unflatten_master_params(params, [master]), params):
        assert view.shape == p.shape
        th.testing.assert_close(view, p.detach().float(), rtol=0, atol=0)
    master.data += 1
    assert all((p.abs() < 1).any() for p in params[:1])  # a copy: the model is as it was


def test_master_parameters_go_back_into_the_model_in_its_types():
    params = list(half_model().parameters())
    master = make_master_params(params)
    master[0].data.mul_(3).add_(0.1)
    expected = [view.clone() for view in unflatten_master_params(params, master)]
    master_params_to_model_params(params, master)
    for p, value in zip(params, expected):
        th.testing.assert_close(p.detach(), value.to(p.dtype), rtol=0, atol=0)
    master_params_to_model_params(iter(params), master)  # an iterator will do


def test_gradients_of_the_model_become_those_of_the_master():
    params = list(half_model().parameters())
    master = make_master_params(params)
    for i, p in enumerate(params[:-1]):
        p.grad = th.full_like(p, i + 1)
    model_grads_to_master_grads(params, master)
    assert master[0].grad.dtype == th.float32
    parts = unflatten_master_params(params, [master[0].grad])
    for i, part in enumerate(parts[:-1]):
        assert (part == i + 1).all()
    assert (parts[-1] == 0).all()  # a parameter that the loss did not reach


def test_zero_grad_keeps_the_tensors():
    params = list(model().parameters())
    params[0].grad = kept = th.ones_like(params[0])
    zero_grad(params)
    assert params[0].grad is kept and (kept == 0).all() and params[1].grad is None
