"""The training loop: batches, steps, hooks, log rows, checkpoints. It trains any module on any loss."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch as th

from .. import distributed
from ..checkpoints.checkpoint import parse_resume_step_from_filename
from ..config import PRECISIONS, TrainConfig, TrainSpeedConfig, comma_list, unknown_name
from ..logs import logger
from ..resample import UniformSampler
from .checkpointed import CheckpointedStep
from .checkpointer import Checkpointer, Diverged, ResumedSet, find_ema_checkpoint, get_blob_logdir
from .ema import warn_of_slow_averages
from .flops import training_flops
from .hooks import Hook
from .lr_schedule import LRSchedule
from .patience import first_step
from .run_log import RunLog, log_loss_dict
from .signals import TIME_IS_UP, Agreement, LastSave, Stopped, StopSignals, TimeLimit
from .step import Unfinished

__all__ = [
    "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict",
    "parse_resume_step_from_filename",
]  # fmt: skip


def find_resume_checkpoint() -> str | None:
    """A checkpoint to resume from, whatever the arguments say. None, unless this function is replaced."""
    return None


class TrainLoop(CheckpointedStep):
    """Trains a model on a diffusion's loss.

    :param data: an iterator of (batch float32 [N, C, H, W], dict of [N, ...] tensors for the model). If it has
        `seek(step)`, resuming moves it to the right batch.
    :param diffusion: anything with `num_timesteps` and `training_losses(model, x_start, t, model_kwargs, noise)`, which
        returns a dict of terms, [N] or without dimensions, with "loss" among them. `noise` is optional. If it has
        `at_step(step)`, that is called before each step with its number, counted from the very first, and with that of
        the first one here. If it has `restarts`, a list of such numbers, the optimizer, its schedule and the moving
        averages begin anew there, and what was before is saved. If it has `description(done)`, that is what changes on
        the way in the checkpoints' description, after so many steps.
    :param resume_checkpoint: a modelNNNNNN.pt, to continue from step NNNNNN with the ema_* and opt files beside it; ""
        to start at step 0. One of those files that is missing raises UserError if `strict_resume`, else is a warning.
    :param schedule_sampler: any object with `sample(batch_size, device)`; uniform unless given.
    :param precision: 16 bits need a model that has convert_to_bf16() or convert_to_fp16().
    :param seed: makes each step a function of (seed, step, rank); None leaves the global generators alone.
    :param metadata: a description of the model for its checkpoints, JSON.
    :param hooks: (interval, hook) pairs; hook(loop) is called after every `interval` steps, on every rank, before the
        step's row of the log and its checkpoint. See hooks.TrainingView for what it may use.
    :param speed: how the network runs; as it is unless given.
    The other arguments are described in config.TrainConfig. Subclasses may replace any method.
    Raises UserError for a checkpoint that does not fit. Collective: every rank makes one, with the same arguments.
    """

    def __init__(
        self, *, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval, save_interval,
        resume_checkpoint, use_fp16=TrainConfig.use_fp16, fp16_scale_growth=TrainConfig.fp16_scale_growth,
        schedule_sampler=None, weight_decay=TrainConfig.weight_decay, lr_anneal_steps=TrainConfig.lr_anneal_steps,
        precision=TrainConfig.precision, max_steps=TrainConfig.max_steps, max_hours=TrainConfig.max_hours,
        lr_schedule=TrainConfig.lr_schedule, lr_warmup_steps=TrainConfig.lr_warmup_steps,
        grad_clip=TrainConfig.grad_clip, adam_beta1=TrainConfig.adam_beta1, adam_beta2=TrainConfig.adam_beta2,
        adam_eps=TrainConfig.adam_eps, optimizer=TrainConfig.optimizer, seed=None, metadata=None,
        hooks: Sequence[tuple[int, Hook]] = (),
        keep_last=TrainConfig.keep_last, keep_every=TrainConfig.keep_every, max_bad_steps=TrainConfig.max_bad_steps,
        ema_warmup=TrainConfig.ema_warmup, ema_sigma_rel=TrainConfig.ema_sigma_rel, strict_resume=False,
        hook_timeout=TrainConfig.hook_timeout,
        save_timeout=TrainConfig.save_timeout, speed: TrainSpeedConfig | None = None,
    ):  # fmt: skip
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.global_batch = batch_size * distributed.get_world_size()
        self.schedule_sampler: Any = schedule_sampler or UniformSampler(diffusion)
        self.speed = speed or TrainSpeedConfig()
        self.precision = "fp16" if use_fp16 else precision
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        self.use_fp16, self.fp16_scale_growth = self.precision == "fp16", fp16_scale_growth
        self.lr, self.weight_decay, self.lr_anneal_steps, self.grad_clip = lr, weight_decay, lr_anneal_steps, grad_clip
        self.max_steps = max_steps or lr_anneal_steps
        schedule = ("linear" if lr_anneal_steps else "constant") if lr_schedule == "auto" else lr_schedule
        self.lr_schedule = LRSchedule(
            schedule,
            lr_anneal_steps or self.max_steps,
            lr_warmup_steps,
            adam_beta2 if optimizer == "radam" else 0.0,
            getattr(diffusion, "restarts", ()),
        )
        self.ema_rate = comma_list(str(ema_rate), float)
        self.log_interval, self.save_interval = log_interval, save_interval
        self.hook_timeout = hook_timeout
        self.time_limit = TimeLimit(max_hours)
        self.seed, self.rank = seed, distributed.get_rank()
        self.hooks = [(interval, hook) for interval, hook in hooks if interval > 0]

        self.signals: StopSignals | None = None  # those of the whole run, if somebody else catches them
        self.step = 0  # since this process started
        self.resume_step = 0  # done before
        self.resume_checkpoint = find_resume_checkpoint() or resume_checkpoint
        self.resumed = ResumedSet(self.resume_checkpoint, strict_resume) if self.resume_checkpoint else None
        self.model_params = list(model.parameters())
        self.device = self.model_params[0].device
        self.sync_cuda = self.device.type == "cuda"
        self.run_log = RunLog(self.device, self.global_batch, max_bad_steps)
        self.checkpointer = Checkpointer(metadata or {}, keep_last, keep_every, save_timeout)
        self.checkpointer.resumed_from = self.resume_checkpoint
        self.last_save = LastSave()

        self._load_and_sync_parameters()
        self.run_log.first_row = self.resume_step
        self._set_up_parameters((adam_beta1, adam_beta2), adam_eps, ema_sigma_rel, ema_warmup)
        if self.resumed:
            self._load_optimizer_state()
            labels: list[float | str] = [*self.ema_rate, *(ema.label for ema in self.emas[len(self.ema_rate) :])]
            self.ema_params = [self._load_ema_parameters(label) for label in labels]
            self._seek()
        if hasattr(diffusion, "at_step"):  # what is missing for the first step is known before anything is written
            diffusion.at_step(self.absolute_step)

    # The loop

    def run_loop(self) -> None:
        """Train until max_steps or max_hours, or without end, logging and saving on the way and at the end.

        SIGTERM, SIGUSR1, SIGHUP or SIGINT on any rank ends it after the same step on all, with a checkpoint; then
        Stopped is raised. With one rank, a step of several microbatches is left unfinished, as if it had not begun. A
        second SIGINT raises KeyboardInterrupt at once. Outside the main thread signals are not handled. Before any
        other error is raised, the last whole step is saved. Raises UserError for a run that ends in a row of bad steps,
        whose weights are not saved.
        """
        if self._is_finished():
            logger.log(f"nothing to do: {self.resume_step} of --max_steps {self.max_steps} steps are done")
            return
        self.checkpointer.take_folder()
        self.run_log.discard_later_rows(self.steps_done)
        if self.resumed:
            self.checkpointer.rename_newer(self.resume_checkpoint)
        warn_of_slow_averages(self.emas, self.max_steps)
        self.run_log.start(self.max_steps, self.resume_step)
        with nullcontext(self.signals) if self.signals else StopSignals() as signals:
            signals.begin()
            try:
                reason = self._train(signals)
            except KeyboardInterrupt:
                saved = self.checkpointer.writer.last_saved
                where = (
                    f"last checkpoint: {saved}; --resume auto continues from it" if saved else "no checkpoint was saved"
                )
                raise KeyboardInterrupt(f"training stopped after {self.steps_done} steps; {where}") from None
            except Diverged:
                raise
            except Exception:
                self._save_after_error()
                raise
            finally:
                self.checkpointer.writer.close()
                self.run_log.close()
        if reason == TIME_IS_UP:
            logger.log(f"--max_hours {self.time_limit.hours} reached after {self.absolute_step} steps")
        elif reason:
            saved_here = self._saved_after == self.steps_done
            last = "there" if saved_here else self.checkpointer.writer.last_saved or "step 0: nothing is saved"
            stopped = Stopped(reason, self.absolute_step, last)
            logger.log(str(stopped))
            raise stopped

    def _train(self, signals: StopSignals) -> int:
        """Steps until the end; returns why it ended: 0 if finished, TIME_IS_UP, or the number of a signal."""
        agreement, reason = Agreement(), 0
        self.signals = signals
        while not reason and not self._is_finished():
            distributed.heartbeat(self.absolute_step + 1)
            with self.run_log.clock.waiting(), distributed.working("the next batch of images"):
                batch, cond = next(self.data)
            try:
                with first_step(self):
                    self.run_step(batch, cond)
                    self._measure_peak(batch, cond)
            except Unfinished:
                reason = signals.received
                break
            self._call_hooks()
            if self.absolute_step % self.log_interval == 0:
                self._write_row()
            if self._is_save_due():
                self._save_for_loop()
            if self._is_test() and self.absolute_step > 0 and self.absolute_step % self.save_interval == 0:
                break
            self.step += 1
            self.run_log.advance()
            self.checkpointer.writer.collect()
            reason = agreement.exchange(signals.received or (TIME_IS_UP if self.time_limit.is_over() else 0))
        agreement.finish()
        # The last step may have been saved already, under its own number.
        if self.step and self._saved_after != self.steps_done:
            self._save_for_loop()
        if self.run_log.first_row < self.steps_done:
            self._write_row()  # of the steps since the last row; resuming from here discards it
        row = self.run_log.bad_row()
        if row and not self._postponed:
            logger.warn(f"{row.describe()}: float16's loss scale was still falling; the weights are from before")
        self.checkpointer.finish(prune=not self._postponed)
        distributed.heartbeat(0)
        distributed.barrier()  # a launcher may end all ranks as soon as the first one leaves
        reason = 0 if self._is_finished() else reason
        if row and self._postponed and reason in (0, TIME_IS_UP):
            what = f"the run ended without a checkpoint of its last weights: {row.describe()}"
            raise self.checkpointer.diverged(what, row.first)
        return reason

    def _measure_peak(self, batch: th.Tensor, cond: Mapping[str, th.Tensor]) -> None:
        """At the first step on a device whose peak is known, count what share of it an image takes."""
        peak = None if self.step else distributed.device_peak(self.device, self.precision)
        if not peak:
            return
        try:
            flops = training_flops(self.model, self.diffusion.training_losses, batch, cond)
        except Exception as error:  # a network of the user's own that does not run without values
            logger.log(f"no mfu in the log, since the network's FLOPs cannot be counted: {error}")
            return
        self.run_log.clock.image_per_peak = flops / peak / distributed.get_world_size()

    def _is_stopped(self) -> bool:
        # A step may take minutes, and schedulers kill soon after their signal. Several ranks end after the same step.
        return distributed.get_world_size() == 1 and bool(self.signals and self.signals.received)

    def _is_save_due(self) -> bool:
        ends_stage = self.steps_done in self.lr_schedule.restarts
        if self.absolute_step % self.save_interval and not ends_stage:
            return self._postponed
        # Never over the set that this run has just been resumed from.
        return self.checkpointer.number_here(self.resume_checkpoint) != self.absolute_step

    def _is_test(self) -> bool:
        return bool(os.environ.get("DIFFUSION_TRAINING_TEST", ""))

    def _is_finished(self) -> bool:
        return bool(self.max_steps) and self.absolute_step >= self.max_steps

    def _call_hooks(self) -> None:
        for interval, hook in self.hooks:
            if (self.absolute_step + 1) % interval == 0:
                with self.run_log.clock.paused(), distributed.working("previews or validation", self.hook_timeout):
                    hook(self)

    def _write_row(self) -> None:
        self.run_log.write(self.steps_done, self.opt.param_groups[0]["lr"])
        if row := self.run_log.longest_bad_row():
            what = row.describe(f" (--max_bad_steps {self.run_log.max_bad_steps})")
            raise self.checkpointer.diverged(what, row.first)

    def _load_and_sync_parameters(self) -> None:
        """Load the weights to resume from, if any, and give every rank rank 0's."""
        if self.resumed:
            self.resumed.load_model(self.model)
            self.resume_step = self.resumed.number
        if distributed.get_world_size() > 1:
            distributed.sync_params([*self.model_params, *self.model.buffers()])

    def _seek(self) -> None:
        """Continue the data after the steps done."""
        assert self.resumed is not None
        self.checkpointer.writer.start = self.resume_step
        self.checkpointer.writer.saved = [(self.resume_step, self.resume_checkpoint)]
        if hasattr(self.data, "seek"):
            self.data.seek(self.resume_step)
        else:
            logger.warn("the data have no seek(step): they start from their beginning again")
        self.resumed.log(self.run_log.first_row)
