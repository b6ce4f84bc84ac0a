"""The course of the learning rate."""

from __future__ import annotations

import math


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
