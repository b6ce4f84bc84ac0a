"""What the steps report, collected without waiting for the device."""

import math

import numpy as np
import pytest
import torch as th

from improved_diffusion.distributed import devices
from improved_diffusion.distributed.devices import peak_memory
from improved_diffusion.training.metrics import BadSteps, LossMeter, StepClock
from improved_diffusion.training.precision import LossScale


def test_quartiles_split_the_losses_by_timestep():
    meter = LossMeter()
    meter.add_losses(8, th.tensor([0, 1, 2, 7]), {"loss": th.tensor([1.0, 3.0, 5.0, 11.0])})
    meter.add_losses(8, th.tensor([6]), {"loss": th.tensor([5.0])})
    assert meter.read() == {"loss": 5.0, "loss_q0": 2.0, "loss_q1": 5.0, "loss_q3": 8.0}
    assert meter.read() == {}
    meter.add("norm", th.tensor(math.inf))
    meter.add("norm", th.tensor(3.0))
    assert meter.read() == {"norm": 3.0}


def test_losses_that_are_no_numbers_are_left_out():
    meter = LossMeter()
    meter.add_losses(4, th.tensor([0, 0, 3]), {"loss": th.tensor([1.0, math.nan, math.inf])})
    assert meter.read() == {"loss": 1.0, "loss_q0": 1.0}


def test_sums_go_on_from_where_they_were_saved():
    values = [th.rand(3) for _ in range(6)]
    whole, first, second = LossMeter(), LossMeter(), LossMeter()
    for i, value in enumerate(values):
        whole.add("loss", value)
        if i == 2:
            second.load_state_dict(first.state_dict())
        (first if i <= 2 else second).add("loss", value)
    second.load_state_dict(first.state_dict())
    for value in values[3:]:
        second.add("loss", value)
    assert second.read() == whole.read()


def note_all(bad_steps, flags, first=0):
    for step, bad in enumerate(flags, first):
        bad_steps.note(th.tensor(float(bad)), step)


@pytest.mark.parametrize(
    "flags, longest, first",
    [([0, 0, 0], 0, 0), ([1, 0, 0], 1, 0), ([0, 1, 1, 1, 0, 1, 1], 3, 1), ([1, 0, 1, 1], 2, 2), ([1] * 5, 5, 0)],
)
def test_the_longest_row_of_bad_steps_and_its_first(flags, longest, first):
    bad_steps = BadSteps()
    note_all(bad_steps, flags)
    assert bad_steps.read() == (longest, first) if longest else bad_steps.read()[0] == 0


def test_a_row_is_counted_across_reads_and_saves():
    bad_steps, other = BadSteps(), BadSteps()
    note_all(bad_steps, [0, 1, 1])
    assert bad_steps.read() == (2, 1)
    note_all(bad_steps, [1], first=3)
    other.load_state_dict(bad_steps.state_dict())
    note_all(other, [1, 0, 1], first=4)
    assert other.read() == (4, 1)
    note_all(other, [0, 0], first=7)
    assert other.read()[0] == 0  # the row that ended before is told of once


def test_the_clock_counts_images_and_the_wait_for_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock(batch_size=8)
    for _ in range(5):
        with clock.waiting():
            now[0] += 0.5
        now[0] += 1.5
    speed = clock.read()
    assert (speed["images_per_second"], speed["data_wait"]) == (4.0, 0.25)
    with clock.waiting():
        now[0] += 1.0
    with clock.paused():
        now[0] += 100.0
    assert clock.read()["images_per_second"] == 8.0


def test_peak_memory_counts_what_is_taken():
    before = peak_memory(th.device("cpu"))
    th.zeros(2**26).add_(1)  # 256 MiB
    assert 2**20 < before < 2**40 and peak_memory(th.device("cpu")) >= max(before, 2**28)


@pytest.fixture
def meta_without_float64(monkeypatch):
    """The meta device stands in for an accelerator without float64."""
    monkeypatch.setattr(devices, "has_float64", lambda device: device.type != "meta")


@pytest.mark.usefixtures("meta_without_float64")
def test_an_accelerator_without_float64_gets_none():
    meter, t = LossMeter(), th.arange(4, device="meta")
    values = th.zeros(4, device="meta")
    meter.add("norm", values)
    meter.add_losses(4, t, {"loss": values})
    assert {pair.dtype for pair in meter.sums.values()} == {th.float32}
    assert LossScale("meta", 1e-3).lg.dtype == th.float32 and LossScale("cpu", 1e-3).lg.dtype == th.float64


@pytest.mark.usefixtures("meta_without_float64")
def test_sums_are_saved_alike_whatever_the_device():
    meter, other = LossMeter(), LossMeter()
    meter.add("loss", th.tensor([1.0, 2.0]))
    state = meter.state_dict()
    assert {pair.dtype for pair in state.values()} == {th.float64}
    other.load_state_dict(state, "meta")
    assert other.sums["loss"].dtype == th.float32


def test_a_rank_may_read_its_own_values():
    meter = LossMeter()
    meter.add("loss", th.tensor([1.0, 2.0]))
    assert meter.read_own() == {"loss": 1.5} and meter.read_own() == {} == meter.read()


def recorded(steps, meter, seed=0):
    """What a few steps of a run report."""
    random = th.Generator().manual_seed(seed)
    for step in range(steps):
        ts, weights = th.randint(0, 20, (5,), generator=random), th.rand(5, generator=random)
        losses = {name: th.randn(5, generator=random).exp() for name in ("loss", "mse")}
        if step % 7 == 3:
            losses["loss"][2] = math.inf
        meter.add_losses(20, ts, losses, weights)
        meter.add("grad_norm", th.rand((), generator=random))
        yield step, ts, {name: value * weights for name, value in losses.items()}


@pytest.mark.parametrize("steps", [1, 9, LossMeter.AT_ONCE + 9])
def test_means_are_those_of_the_plain_sums(steps):
    meter, plain = LossMeter(), {}
    for _, ts, losses in recorded(steps, meter):
        for name, values in losses.items():
            for t, value in zip(ts.tolist(), values.tolist()):
                for key in (name, f"{name}_q{4 * t // 20}"):
                    plain.setdefault(key, []).append(value)
    means = meter.read()
    means.pop("grad_norm")
    assert means == pytest.approx({key: np.mean(list(filter(math.isfinite, v))) for key, v in plain.items()}, rel=1e-12)


@pytest.mark.parametrize("looked_at", [(), (0, 1, 2), (40,), range(0, 150, 10)])
def test_when_the_sums_are_added_makes_no_difference(looked_at):
    """Bit for bit: a run that was saved more often, or resumed, has the same log."""
    meter, other = LossMeter(), LossMeter()
    for _ in recorded(150, meter):
        pass
    for step, _, _ in recorded(150, other):
        if step in looked_at:
            state, other_before = other.state_dict(), other
            other_before.load_state_dict(state)
    assert other.read() == meter.read()


def test_a_thousand_steps_of_notes_are_kept_without_a_read():
    bad_steps = BadSteps()
    flags = [step % 100 < step // 100 for step in range(1000)]
    note_all(bad_steps, flags)
    assert bad_steps.read() == (9, 900) and bad_steps.row() == (0, 900)
