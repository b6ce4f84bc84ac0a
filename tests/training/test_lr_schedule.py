"""The course of the learning rate."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.training.lr_schedule import LRSchedule, learning_rate, rectification


def test_constant_and_linear_and_cosine_rates():
    def rates(schedule, n=10, **kwargs):
        return [learning_rate(step, lr=2.0, schedule=schedule, total_steps=n, **kwargs) for step in range(n + 3)]

    assert rates("constant") == [2.0] * 13
    np.testing.assert_allclose(rates("linear"), [2 * (1 - k / 10) for k in range(10)] + [0] * 3)
    optimizer = th.optim.SGD([th.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates("cosine"), expected + [0] * 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("total", [10, 1000])
def test_one_cycle_is_torchs(total):
    optimizer = th.optim.SGD([th.zeros(1, requires_grad=True)], lr=1.0)
    # torch counts the last step as the end, and we the one after it.
    scheduler = th.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=total + 1, pct_start=(0.3 * total + 1) / (total + 1), div_factor=25,
        final_div_factor=1e4, cycle_momentum=False,
    )  # fmt: skip
    for step in range(total):
        rate = learning_rate(step, lr=0.01, schedule="one-cycle", total_steps=total)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_warm_up_multiplies_the_schedule():
    rates = [learning_rate(k, lr=1.0, schedule="constant", total_steps=0, warmup_steps=4) for k in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    rates = [learning_rate(k, lr=1.0, schedule="linear", total_steps=10, warmup_steps=2) for k in range(3)]
    np.testing.assert_allclose(rates, [0.5, 0.9, 0.8])


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_a_rectified_rate_makes_of_adam_torchs_radam(beta2):
    """But for the first steps, which torch's takes by momentum alone."""
    schedule, generator = LRSchedule("constant", 0, 0, beta2), th.Generator().manual_seed(0)
    one, other = (th.zeros(5, requires_grad=True) for _ in range(2))
    adam = th.optim.AdamW([one], lr=0.1, betas=(0.9, beta2), weight_decay=0)
    radam = th.optim.RAdam([other], lr=0.1, betas=(0.9, beta2))
    assert not schedule.is_constant and schedule.at(0, 0.1) == 0
    for step in range(30):
        one.grad = other.grad = th.randn(5, generator=generator)
        before = one.detach().clone(), other.detach().clone()
        adam.param_groups[0]["lr"] = schedule.at(step, 0.1)
        adam.step()
        radam.step()
        if step >= 6:
            th.testing.assert_close(one - before[0], other - before[1], rtol=1e-3, atol=1e-6)
    assert rectification(10**6, beta2) == pytest.approx(1, abs=1e-3)
