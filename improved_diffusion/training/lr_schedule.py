"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import LR_SCHEDULES, unknown_name


def learning_rate(step: int, *, lr: float, schedule: str, total_steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of a step (from 0).

    `linear` and `cosine` fall from lr to 0 at total_steps; `one-cycle` (Smith & Topin 2018) rises from lr/25 over the
    first 30% and falls to lr/250,000. The warm-up multiplies the schedule, reaching 1 after warmup_steps.
    """
    done = min(step / total_steps, 1.0) if total_steps else 0.0
    if schedule == "linear":
        lr *= 1 - done
    elif schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * done))
    elif schedule == "one-cycle":
        rise = 0.3
        start, end, u = (lr / 25, lr, done / rise) if done < rise else (lr, lr / 250_000, (done - rise) / (1 - rise))
        lr = end + (start - end) * 0.5 * (1 + math.cos(math.pi * u))
    return lr * min(1.0, (step + 1) / warmup_steps) if warmup_steps else lr


def rectification(step: int, beta2: float) -> float:
    """RAdam's factor of the learning rate at a step (from 0), in [0, 1) (Liu et al. 2020, arXiv 1908.03265, alg. 2).

    It is 0 in the first steps, where the variance of Adam's second moment is infinite and the paper takes momentum.
    """
    t, rho_inf = step + 1, 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 4:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


@dataclass(frozen=True)
class LRSchedule:
    """A learning rate as a function of the step; see `learning_rate`.

    :param rectified_beta2: Adam's beta2 where the rate is rectified, as in RAdam; 0: it is not.
    :param restarts: steps, ascending, before each of which the schedule ends, and at which it begins anew.
    Raises UserError for an unknown name.
    """

    name: str
    total_steps: int
    warmup_steps: int
    rectified_beta2: float = 0.0
    restarts: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.name not in LR_SCHEDULES:
            raise unknown_name("lr_schedule", self.name, LR_SCHEDULES)

    @property
    def is_constant(self) -> bool:
        """Whether every step has the same rate."""
        return self.name == "constant" and not self.warmup_steps and not self.rectified_beta2

    def start(self, step: int) -> int:
        """The step at which the schedule that a step is in began."""
        return max((restart for restart in self.restarts if restart <= step), default=0)

    def at(self, step: int, lr: float) -> float:
        """The rate of a step (from 0), where `lr` is the highest."""
        first = self.start(step)
        end = min((restart for restart in self.restarts if restart > step), default=self.total_steps)
        step -= first
        rate = learning_rate(step, lr=lr, schedule=self.name, total_steps=end - first, warmup_steps=self.warmup_steps)
        return rate * rectification(step, self.rectified_beta2) if self.rectified_beta2 else rate
