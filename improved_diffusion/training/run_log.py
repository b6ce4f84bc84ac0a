"""The rows of a run's log, its progress bar and speed, and the steps that had to be skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch as th

from ..logs import logger
from ..logs.progress import Progress
from ..utils.text import counted
from .metrics import BadSteps, LossMeter, StepClock


class BadRow(NamedTuple):
    """Steps in a row whose loss or gradient was not finite."""

    length: int
    first: int  # the number of its first step

    def describe(self, note: str = "") -> str:
        """What happened, with a note on the number of steps."""
        steps = "1 step" if self.length == 1 else f"{self.length} steps in a row"
        return f"{steps} had no finite loss and gradient{note}, the first at step {self.first}"


class RunLog:
    """Collects on the device what the steps report, and writes it as a row of the log now and then.

    :param images_per_step: over all ranks.
    :param max_bad_steps: steps in a row without a finite gradient after which the run ends.
    """

    def __init__(self, device: th.device, images_per_step: int, max_bad_steps: int):
        self.meter = LossMeter()
        self.device = device
        self.bad_steps = BadSteps()
        self._last_loss = th.zeros(())  # of the last step, on this rank
        self.max_bad_steps = max_bad_steps
        self.clock = StepClock(images_per_step)
        self.first_row = 0  # the first step whose row is not written, or has to be written again
        self.shown: dict[str, str] = {}  # beside the progress bar
        self.bar: Progress | None = None

    # What a step reports, without waiting for the device

    def add_losses(self, num_timesteps: int, t: th.Tensor, losses: Mapping[str, th.Tensor], weights: th.Tensor) -> None:
        """Note the losses [N], times their weights [N], at the timesteps t [N]."""
        self.meter.add_losses(num_timesteps, t, losses, weights)
        self._last_loss = losses["loss"]
        logger.defer(self.meter.read_own)  # for a loop that calls logger.dumpkvs() by itself

    def add_gradient_norm(self, norm: th.Tensor, clip: float) -> None:
        """Note the gradient's norm (no dimensions), and what clipping makes of it; those not finite do not count."""
        self.meter.add("grad_norm", norm)
        if clip:
            self.meter.add("grad_norm_clipped", norm * (clip / norm).clamp(max=1))  # inf * 0 is NaN

    def add_step(self, bad: th.Tensor, step: int) -> None:
        """Note whether the step was skipped: `bad` is 1 (no dimensions) where it was, else 0."""
        self.bad_steps.note(bad, step)
        self.meter.add("skipped_steps", bad)

    @property
    def loss_is_finite(self) -> bool:
        """Whether the last step's losses on this rank are. Waits for the device."""
        return bool(th.isfinite(self._last_loss).all())

    # Progress

    def start(self, total_steps: int, done: int) -> None:
        """Show progress from here on, and measure speed. A `total_steps` of 0: not known."""
        self.bar = Progress("training", total_steps or None, "step", initial=done)
        self.clock.restart()
        logger.expect(done, total_steps)

    def advance(self) -> None:
        """One more step is done."""
        if self.bar is not None:
            self.bar.update(1, **self.shown)
        self.shown = {}

    def close(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    # Rows

    def write(self, steps_done: int, lr: float) -> None:
        """Write a row of the means since the last one. Collective."""
        means, speed = self.meter.read(), self.clock.read()
        logger.logkvs({**means, **speed, "lr": lr})
        row = logger.dumpkvs()
        self.first_row = steps_done
        if self.bar is not None:
            self.bar.postpone()
        self.shown = {
            "loss": f"{row.get('loss', means.get('loss', math.nan)):.4g}",
            "images": f"{speed['images_per_second']:.4g}/s",
            "data": f"{speed['data_wait']:.0%}",
            "memory": f"{speed['peak_gib']:.2f} GiB",
        }

    def longest_bad_row(self) -> BadRow | None:
        """The longest row of skipped steps since the last call, if it has `max_bad_steps`. Waits for the device."""
        row = BadRow(*self.bad_steps.read())
        return row if row.length >= self.max_bad_steps else None

    def bad_row(self) -> BadRow | None:
        """The row of skipped steps that the last step belongs to. Waits for the device."""
        row = BadRow(*self.bad_steps.row())
        return row if row.length else None

    def discard_later_rows(self, steps_done: int) -> None:
        """Remove the rows of `first_row` and later, which this run writes again.

        :param steps_done: of the checkpoint, 0 where there is none, as after a kill before the first: rows of later
            steps are lost; that of the steps just before it is written again with the same steps in it.
        """
        lost = logger.drop_rows(steps_done)
        if lost:
            than = "the checkpoint's step" if steps_done else "this start at step 0"
            logger.log(f"discarded {counted(lost, 'row')} of the log after {than}")
        logger.drop_rows(self.first_row)


def log_loss_dict(diffusion, ts, losses) -> None:
    """Log [N] losses at timesteps ts: the means, and those of each quarter of the timesteps. Waits for the device."""
    quartiles = [int(4 * t / diffusion.num_timesteps) for t in ts.tolist()]
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist()):
            logger.logkv_mean(f"{key}_q{quartile}", value)
