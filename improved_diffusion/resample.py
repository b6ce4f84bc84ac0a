"""Schedule samplers: which timesteps to train on, uniformly or by importance (IDDPM sec. 3.3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch as th

from . import distributed
from .config import unknown_name


def create_named_schedule_sampler(name: str, diffusion) -> ScheduleSampler:
    """`uniform` or `loss-second-moment` for a diffusion; another name raises UserError."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise unknown_name("schedule sampler", name, samplers)
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over timesteps, with the importance weights that keep the objective's mean unchanged."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights [T], not necessarily normalised."""

    def sample(self, batch_size: int, device) -> tuple[th.Tensor, th.Tensor]:
        """(t, weight), both [batch_size]: int64 timesteps and float32 1 / (T p_t). Draws from numpy's generator."""
        w = self.weights()
        p = w / np.sum(w)
        indices = np.random.choice(len(p), size=(batch_size,), p=p)
        weights = 1 / (len(p) * p[indices])
        t, weight = th.from_numpy(indices).long(), th.from_numpy(weights).float()
        return distributed.to_device(t, device), distributed.to_device(weight, device)


class UniformSampler(ScheduleSampler):
    """All timesteps with the same probability."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all ranks."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """Gather every rank's (timestep, loss) pairs, [n] each with n its own, and learn from them in rank order.

        Collective: every rank must call it.
        """
        # float64 holds timesteps and losses alike; only on the CPU, because not every device has it.
        pairs = th.stack([local_ts.cpu().double(), local_losses.detach().cpu().double()], dim=1)  # [n, 2]
        gathered = th.cat(distributed.all_gather_ragged(pairs))
        self.update_with_all_losses(gathered[:, 0].long().tolist(), gathered[:, 1].tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the pairs of all ranks; every rank gets the same."""


class LossSecondMomentResampler(LossAwareSampler):
    """p_t proportional to sqrt(E[L_t^2]) over the last losses of each t (IDDPM eq. 18); uniform until all are known.

    :param history_per_term: how many losses of each t are remembered.
    :param uniform_prob: the share of uniform sampling that is mixed in.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self):
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts, losses):
        ts, losses = np.asarray(ts, np.int64), np.asarray(losses, np.float64)
        finite = np.isfinite(losses)  # a single non-finite weight would make all probabilities nan
        order = np.argsort(ts[finite], kind="stable")  # by t, and those of one t as they came
        losses = losses[finite][order]
        seen, starts, counts = np.unique(ts[finite][order], return_index=True, return_counts=True)
        if not len(seen):
            return
        # Each seen t's row with its new losses behind what it holds; of that the last ones stay, the oldest go.
        before, length = self._loss_counts[seen], self.history_per_term
        rows = np.pad(self._loss_history[seen], [(0, 0), (0, counts.max())])
        row = np.repeat(np.arange(len(seen)), counts)
        rows[row, before[row] + np.arange(len(losses)) - starts[row]] = losses
        too_many = np.maximum(before + counts - length, 0)
        self._loss_history[seen] = np.take_along_axis(rows, too_many[:, None] + np.arange(length), axis=1)
        self._loss_counts[seen] = before + counts - too_many

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self) -> dict[str, th.Tensor]:
        """The history, for a checkpoint."""
        return {"loss_history": th.from_numpy(self._loss_history), "loss_counts": th.from_numpy(self._loss_counts)}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Restore what `state_dict` gave; another T or history length, and losses that are none, raise ValueError."""
        history, counts = state["loss_history"].numpy(), state["loss_counts"].numpy()
        if history.shape != self._loss_history.shape or counts.shape != self._loss_counts.shape:
            raise ValueError(f"the sampler's history is {history.shape}, expected {self._loss_history.shape}")
        in_range = counts.dtype == np.int64 and counts.min() >= 0 and counts.max() <= self.history_per_term
        if history.dtype != np.float64 or not np.isfinite(history).all() or not in_range:
            raise ValueError("the sampler's history holds other things than losses and their numbers")
        self._loss_history, self._loss_counts = history.copy(), counts.copy()
