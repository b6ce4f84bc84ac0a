"""Which timesteps to train on."""

import numpy as np
import pytest
import torch as th
from helpers import golden, make_diffusion

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.resample import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

G = golden("resampler")


def golden_resampler():
    return LossSecondMomentResampler(make_diffusion(12), int(G["history_per_term"]), float(G["uniform_prob"]))


def filled(losses_by_t, history=3, uniform_prob=0.1):
    """A resampler each of whose histories is full of one loss."""
    sampler = LossSecondMomentResampler(make_diffusion(len(losses_by_t)), history, uniform_prob)
    for _ in range(history):
        sampler.update_with_all_losses(range(len(losses_by_t)), losses_by_t)
    return sampler


@pytest.mark.parametrize("update", ["update_with_all_losses", "update_with_local_losses"])
def test_weights_after_each_update_are_the_published_ones(update):
    sampler = golden_resampler()
    for ts, losses, expected in zip(G["timesteps"], G["losses"], G["weights"]):
        if update == "update_with_all_losses":
            sampler.update_with_all_losses(ts.tolist(), losses.tolist())
        else:
            sampler.update_with_local_losses(th.from_numpy(ts), th.from_numpy(losses))
        np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-12)


def test_weights_are_uniform_until_every_history_is_full():
    sampler = LossSecondMomentResampler(make_diffusion(2), history_per_term=2)
    for t in (0, 0, 0, 1):
        sampler.update_with_all_losses([t], [5.0])
        assert (sampler.weights() == 1).all()
    sampler.update_with_all_losses([1], [1.0])
    assert (sampler.weights() != 1).all()


def test_weights_follow_the_second_moment():
    p = filled([1.0, 2.0, 5.0], uniform_prob=0.1).weights()
    np.testing.assert_allclose(p, 0.9 * np.array([1, 2, 5]) / 8 + 0.1 / 3)  # IDDPM eq. 18
    sampler = LossSecondMomentResampler(make_diffusion(1), history_per_term=2, uniform_prob=0.0)
    sampler.update_with_all_losses([0, 0], [3.0, 4.0])
    assert sampler.weights() == pytest.approx(1)


def test_the_oldest_loss_goes_first_and_repeats_enter_in_order():
    sampler = LossSecondMomentResampler(make_diffusion(2), history_per_term=2, uniform_prob=0.0)
    sampler.update_with_all_losses([0, 0, 1, 0, 1], [9.0, 1.0, 2.0, 1.0, 2.0])
    np.testing.assert_allclose(sampler.weights(), [1 / 3, 2 / 3])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_teaches_nothing(loss):
    sampler = filled([1.0, 2.0])
    before = sampler.weights()
    sampler.update_with_all_losses([0, 1], [loss, 2.0])
    np.testing.assert_array_equal(sampler.weights(), before)


@pytest.mark.parametrize(
    "sampler", [UniformSampler(make_diffusion(3)), filled([1.0, 2.0, 5.0])], ids=["uniform", "loss-second-moment"]
)
def test_importance_weights_leave_the_objective_unbiased(sampler):
    t, weights = sampler.sample(20_000, "cpu")
    assert t.dtype == th.int64 and weights.dtype == th.float32 and t.shape == weights.shape == (20_000,)
    p = sampler.weights() / sampler.weights().sum()
    th.testing.assert_close(weights, th.from_numpy(1 / (3 * p)).float()[t])
    frequencies = np.bincount(t.numpy(), minlength=3) / len(t)
    np.testing.assert_allclose(frequencies, p, atol=0.02)
    loss = th.tensor([3.0, 0.5, 1.0])
    assert (loss[t] * weights).mean().item() == pytest.approx(loss.mean().item(), abs=0.05)


def test_sampling_follows_numpys_seed():
    sampler = UniformSampler(make_diffusion(100))
    np.random.seed(4)
    first = sampler.sample(8, "cpu")[0]
    np.random.seed(4)
    assert (sampler.sample(8, "cpu")[0] == first).all()


def test_state_survives_a_round_trip():
    sampler, other = golden_resampler(), golden_resampler()
    for ts, losses in zip(G["timesteps"][:7], G["losses"][:7]):
        sampler.update_with_all_losses(ts, losses)
    other.load_state_dict(sampler.state_dict())
    for ts, losses, expected in zip(G["timesteps"][7:], G["losses"][7:], G["weights"][7:]):
        other.update_with_all_losses(ts, losses)
        np.testing.assert_allclose(other.weights(), expected, rtol=1e-12)


def test_restored_state_is_a_copy():
    sampler = filled([1.0, 2.0])
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    other = LossSecondMomentResampler(make_diffusion(2), 3, 0.1)
    other.load_state_dict(state)
    other.update_with_all_losses([0], [100.0])
    assert state["loss_history"].max() == 2


def test_state_of_another_process_is_an_error():
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(2, 3\)"):
        filled([1.0, 2.0]).load_state_dict(filled([1.0, 2.0, 3.0]).state_dict())


def test_ranks_of_different_counts_are_heard_in_rank_order(monkeypatch):
    other = th.tensor([[1.0, 0.25], [0.0, 4.0]], dtype=th.float64)
    monkeypatch.setattr(distributed, "all_gather_ragged", lambda mine: [mine, other])
    heard = []

    class Listener(LossAwareSampler):
        def weights(self):
            return np.ones(2)

        def update_with_all_losses(self, ts, losses):
            heard.append((ts, losses))

    Listener().update_with_local_losses(th.tensor([1]), th.tensor([0.5], requires_grad=True))
    assert heard == [([1, 1, 0], [0.5, 0.25, 4.0])]


def test_named_samplers():
    assert isinstance(create_named_schedule_sampler("uniform", make_diffusion(4)), UniformSampler)
    sampler = create_named_schedule_sampler("loss-second-moment", make_diffusion(4))
    assert isinstance(sampler, LossSecondMomentResampler)
    assert (sampler.history_per_term, sampler.uniform_prob) == (10, 0.001)
    with pytest.raises(UserError, match="did you mean loss-second-moment"):
        create_named_schedule_sampler("loss-second-momentum", make_diffusion(4))


def test_a_sampler_needs_only_its_weights():
    class Last(ScheduleSampler):
        def weights(self):
            return np.array([0.0, 0.0, 2.0])

    t, weights = Last().sample(5, "cpu")
    assert (t == 2).all() and weights == pytest.approx([1 / 3] * 5)


class OneByOne(LossSecondMomentResampler):
    """The published loop."""

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if not np.isfinite(loss):
                continue
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1


@pytest.mark.parametrize("history", [1, 3, 10])
@pytest.mark.parametrize("size", [0, 1, 7, 60])
def test_all_at_once_is_one_by_one(history, size):
    """Bit for bit, with many losses of one t in a batch, and some that are not finite."""
    rng = np.random.default_rng(size)
    fast, slow = (kind(make_diffusion(5), history) for kind in (LossSecondMomentResampler, OneByOne))
    for _ in range(8):
        ts, losses = rng.integers(0, 5, size).tolist(), rng.exponential(size=size)
        losses[rng.random(size) < 0.1] = np.nan
        for sampler in (fast, slow):
            sampler.update_with_all_losses(ts, losses.tolist())
        np.testing.assert_array_equal(fast._loss_history, slow._loss_history)
        np.testing.assert_array_equal(fast._loss_counts, slow._loss_counts)
        np.testing.assert_array_equal(fast.weights(), slow.weights())
