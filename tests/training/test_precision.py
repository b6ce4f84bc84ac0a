"""Gradients of microbatches and ranks add up in float32, whatever the model computes in."""

import math
from pathlib import Path

import precision_worker
import pytest
import torch as th
from dist_worker import STEPS, six_steps
from script_helpers import run
from train_helpers import make_loop, small_model, small_unet

from improved_diffusion import distributed
from improved_diffusion.fp16_util import make_master_params, unflatten_master_params
from improved_diffusion.training.precision import (
    INITIAL_LOG_LOSS_SCALE,
    LossScale,
    MasterCopy,
    average_gradients,
    backward,
    gradient_norm,
    params_of,
    state_dict_of,
)

pytestmark = pytest.mark.usefixtures("out_dir")


def gradient(loop):
    """The flat float32 gradient that the optimizer gets."""
    grads = []
    loop._optimize = lambda: grads.append(loop.master_params[0].grad.clone()) or th.zeros(())
    th.manual_seed(0)
    loop.run_step(*next(loop.data))
    return grads[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_is_added_up_is_float32(precision):
    params = [th.nn.Parameter(th.zeros(3, dtype={"bf16": th.bfloat16, "fp16": th.float16}[precision]))]
    master, copy = th.nn.Parameter(th.zeros(3)), MasterCopy(params)
    for _ in range(2):  # in memory that is kept
        master.grad = None
        for value in (1.0, 2**-12, 2**-12):  # 16 bits would forget the small ones
            params[0].grad = th.full_like(params[0], value)
            copy.collect_gradients(master)
            assert params[0].grad is None
        assert master.grad.dtype == th.float32
        assert (master.grad == 1 + 2**-11).all()
        copy.collect_gradients(master)  # nothing new
        assert (master.grad == 1 + 2**-11).all()


@pytest.mark.parametrize("microbatch", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_microbatches_lose_nothing_by_adding_up(precision, microbatch):
    """Their sum is as near to the fp32 gradient as that of the whole batch, and far nearer than one step of 16 bits."""

    def grad(precision, microbatch):
        loop = make_loop(model=small_unet(), precision=precision, microbatch=microbatch)
        loop.lg_loss_scale = 4.0
        if precision != "fp32":
            return gradient(loop)
        loop._optimize = lambda: th.zeros(())
        loop.run_step(*next(loop.data))
        return th.cat([p.grad.flatten() for p in loop.model.parameters()])

    exact, whole, split = grad("fp32", -1), grad(precision, -1), grad(precision, microbatch)
    error = (whole - exact).norm()
    assert (split - exact).norm() < 1.2 * error
    assert (split - whole).norm() < 1.5 * error


def test_the_sum_of_many_microbatches_is_their_exact_sum():
    """In float32, of gradients that are the model's own 16-bit ones."""
    loop = make_loop(model=small_model(), precision="bf16", microbatch=1)
    parts, collect = [], loop._master_copy.collect_gradients

    def spy(master):
        if any(p.grad is not None for p in loop.model_params):
            parts.append(th.cat([p.grad.float().flatten() for p in loop.model_params]))
        collect(master)

    loop._master_copy.collect_gradients = spy
    total = gradient(loop)
    assert len(parts) == 4
    th.testing.assert_close(total, th.stack(parts).sum(0), rtol=1e-6, atol=1e-9)


def test_what_goes_over_the_ranks_is_one_float32_tensor(monkeypatch):
    reduced = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: reduced.append(tensor.dtype) or tensor.mul_(2))
    master = [th.nn.Parameter(th.zeros(3))]
    master[0].grad = th.arange(3.0)
    average_gradients(master)
    assert reduced == [th.float32] and th.equal(master[0].grad, th.arange(3.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_dicts_and_parameters_are_inverses(precision):
    loop = make_loop(precision=precision)
    state_dict = state_dict_of(loop.model, loop.master_params, loop.sixteen_bits)
    assert {value.dtype for value in state_dict.values()} == {th.float32}
    for a, b in zip(params_of(loop.model, state_dict, loop.sixteen_bits), loop.master_params):
        assert th.equal(a, b)


def test_two_ranks_in_bf16_add_up_one_float32_gradient_a_step(tmp_path):
    run("torchrun", 2, Path(precision_worker.__file__), tmp_path, cwd=tmp_path).succeed()
    ranks = [th.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert th.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    count = ranks[0]["parameters"].numel()
    assert [dtype for dtype, numel in ranks[0]["reduced"] if numel == count] == [th.float32] * STEPS
    assert not any(dtype == th.bfloat16 for dtype, _ in ranks[0]["reduced"])
    alone, _ = six_steps(tmp_path / "alone", precision="bf16")
    exact, _ = six_steps(tmp_path / "exact")
    error = (alone.float() - exact).norm()
    assert (ranks[0]["parameters"] - alone.float()).norm() < 1.5 * error


# The loss scale


def test_loss_scale_starts_at_two_to_the_twenty():
    assert INITIAL_LOG_LOSS_SCALE == 20
    assert LossScale("cpu", 1e-3).scale.item() == 2.0**20


def test_a_good_step_adds_the_growth_and_an_overflow_takes_one():
    scale = LossScale("cpu", growth=1e-3)
    for overflow in (0.0, 0.0, 1.0, 0.0):
        scale.update(th.tensor(overflow))
    assert scale.lg.item() == pytest.approx(19.003, abs=1e-12)
    assert scale.scale.dtype == th.float32 and scale.scale.item() == pytest.approx(2**19.003)


def test_a_thousand_good_steps_double_the_scale():
    scale = LossScale("cpu", growth=1e-3)
    for _ in range(1000):
        scale.update(th.tensor(0.0))
    assert scale.scale.item() == pytest.approx(2.0**21, rel=1e-6)


def test_loss_scale_survives_a_round_trip():
    scale, other = LossScale("cpu", 0.5), LossScale("cpu", 0.5)
    scale.update(th.tensor(1.0))
    other.load_state_dict(scale.state_dict())
    assert other.lg == scale.lg


# The way to the master copy and back


def mixed_parameters():
    """In two types and two memory orders."""
    conv = th.randn(4, 3, 3, 3).to(memory_format=th.channels_last)
    return [th.nn.Parameter(p) for p in (conv.bfloat16(), th.randn(4), th.randn(4, 4, 1, 1).bfloat16(), th.randn(()))]


def test_values_come_to_the_model_in_its_types_and_memory_order():
    params = mixed_parameters()
    copy, master = MasterCopy(params), make_master_params(params)[0]
    for _ in range(2):
        master.data += th.randn_like(master)
        copy.update_model(master)
        for p, value in zip(params, unflatten_master_params(params, [master])):
            assert th.equal(p, value.to(p.dtype)) and p.requires_grad
        master.data = master.data.clone()  # elsewhere
    assert params[0].is_contiguous(memory_format=th.channels_last)


def test_a_missing_gradient_is_zero_in_the_master_copy():
    params = mixed_parameters()
    copy, master = MasterCopy(params), make_master_params(params)[0]
    for present in (range(4), (0, 2), (1,), ()):
        master.grad = None
        for i in present:
            params[i].grad = th.ones_like(params[i])
        copy.collect_gradients(master)
        if present:
            parts = unflatten_master_params(params, [master.grad])
            assert [bool((part == (i in present)).all()) for i, part in enumerate(parts)] == [True] * 4
        else:
            assert master.grad is None


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_the_norm_is_that_of_the_gradient_before_clipping(clip):
    params = [th.nn.Parameter(th.zeros(n)) for n in (3, 5, 2)]
    for p in params[:2]:
        p.grad = th.randn_like(p)
    before = th.cat([p.grad for p in params[:2]])
    assert gradient_norm(params, clip).item() == pytest.approx(before.norm().item(), rel=1e-6)
    after = th.cat([p.grad for p in params[:2]])
    if 0 < clip < before.norm():
        assert after.norm().item() == pytest.approx(clip, rel=1e-5)
    else:
        assert th.equal(after, before)


@pytest.mark.parametrize("loss, finite", [(2.0, True), (math.inf, False), (-math.inf, False), (math.nan, False)])
def test_a_loss_that_is_not_finite_is_seen_in_every_gradient(loss, finite):
    params = [th.nn.Parameter(th.ones(2)) for _ in range(2)]
    backward(3 * params[0].sum() + params[1].sum() * 0 + th.tensor(loss))
    assert [p.grad.isfinite().all().item() for p in params] == [finite] * 2
    assert not finite or params[0].grad.tolist() == [3, 3]
