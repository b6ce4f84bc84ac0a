"""The rows of a run's log, its progress bar and speed, and the steps that had to be skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch as th

from ..config import UserError
from ..logs import logger
from ..logs.progress import Progress
from .metrics import BadSteps, LossMeter, StepClock


class RunLog:
    """Collects on the device what the steps report, and writes it as a row of the log now and then.

    :param images_per_step: over all ranks.
    :param max_bad_steps: steps in a row without a finite gradient after which `write` raises UserError.
    """

    def __init__(self, device: th.device, images_per_step: int, max_bad_steps: int):
        self.meter = LossMeter()
        self.bad_steps = BadSteps(device)
        self.max_bad_steps = max_bad_steps
        self.clock = StepClock(images_per_step)
        self.first_row = 0  # the first step whose row is not written, or has to be written again
        self.shown: dict[str, str] = {}  # beside the progress bar
        self.bar: Progress | None = None

    # What a step reports, without waiting for the device

    def add_losses(self, num_timesteps: int, t: th.Tensor, losses: Mapping[str, th.Tensor]) -> None:
        """Note the weighted losses [N] at the timesteps t [N]."""
        self.meter.add_losses(num_timesteps, t, losses)
        logger.defer(self.meter.read_own)  # for a loop that calls logger.dumpkvs() by itself

    def add_gradient_norm(self, norm: th.Tensor, clip: float) -> None:
        """Note the gradient's norm (no dimensions), and what clipping makes of it; those not finite do not count."""
        finite = th.isfinite(norm).float()
        self.meter.add("grad_norm", norm, counted=finite)
        if clip:
            self.meter.add("grad_norm_clipped", norm.clamp(max=clip), counted=finite)

    def add_step(self, bad: th.Tensor, step: int) -> None:
        """Note whether the step was skipped: `bad` is 1 (no dimensions) where it was, else 0."""
        self.bad_steps.note(bad, step)
        self.meter.add("skipped_steps", bad)

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

    def write(self, steps_done: int, lr: float, last_checkpoint: Callable[[], str | None]) -> None:
        """Write a row of the means since the last one. Collective.

        Raises UserError for too many skipped steps in a row; the message names last_checkpoint().
        """
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
        in_row, first = self.bad_steps.read()
        if in_row >= self.max_bad_steps:
            raise UserError(
                f"{in_row} steps in a row had no finite loss and gradient (--max_bad_steps {self.max_bad_steps}), the "
                f"first at step {first}: resume from the last good checkpoint, {last_checkpoint() or 'none'}, "
                "with a lower --lr, --grad_clip 1 or --precision fp32, and check the data"
            )

    def discard_later_rows(self, steps_done: int) -> None:
        """Remove the rows of `first_row` and later, which a resumed run writes again.

        :param steps_done: of the checkpoint: rows of later steps are lost; that of the steps just before it is
            written again with the same steps in it.
        """
        lost = logger.drop_rows(steps_done)
        if lost:
            logger.log(f"discarded {lost} row{'s' * (lost > 1)} of the log that are newer than the checkpoint")
        logger.drop_rows(self.first_row)


def log_loss_dict(diffusion, ts, losses) -> None:
    """Log [N] losses at timesteps ts: the means, and those of each quarter of the timesteps. Waits for the device."""
    quartiles = [int(4 * t / diffusion.num_timesteps) for t in ts.tolist()]
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist()):
            logger.logkv_mean(f"{key}_q{quartile}", value)
