"""The training loop: step, log, save, resume. It trains whatever module it is given."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch as th
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..checkpoints import checkpoint, sets
from ..checkpoints.checkpoint import parse_resume_step_from_filename
from ..config import LR_SCHEDULES, PRECISIONS, UserError, comma_list, unknown_name
from ..fp16_util import (
    INITIAL_LOG_LOSS_SCALE,
    LossScale,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
)
from ..logs import logger
from ..logs.progress import Progress
from ..resample import LossAwareSampler, UniformSampler
from ..utils import files
from . import train_state
from .ema import ParameterEMA, PowerEMA, flatten
from .lr_schedule import learning_rate
from .metrics import BadSteps, LossMeter, StepClock
from .signals import EXIT_RESUME, Agreement, StopSignals

__all__ = [
    "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict",
    "parse_resume_step_from_filename",
]  # fmt: skip

HOOK_LIMIT = 4 * 3600.0  # seconds after which a hook, or a save, counts as stuck
SAVE_LIMIT = 3600.0
TIME_IS_UP = 1000  # what the ranks agree on where --max_hours are over; other numbers are signals


def log_loss_dict(diffusion, ts, losses) -> None:
    """Log [N] losses at timesteps ts: the means, and those of each quarter of the timesteps."""
    quartiles = [int(4 * t / diffusion.num_timesteps) for t in ts.tolist()]
    for key, values in losses.items():
        logger.logkv_mean(key, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist()):
            logger.logkv_mean(f"{key}_q{quartile}", value)


class TrainLoop:
    """Trains a model on a diffusion's loss.

    :param data: an iterator of (batch float32 [N, C, H, W], dict of [N, ...] tensors for the model). If it has
        `seek(step)`, resuming moves it to the right batch.
    :param batch_size: images a step on each rank.
    :param microbatch: images in one forward pass; -1: all. Changes memory and nothing else.
    :param ema_rate: a rate, or several as a comma-separated string.
    :param resume_checkpoint: a modelNNNNNN.pt with its ema_* and opt files beside it; "" to start afresh.
    :param schedule_sampler: any object with `sample(batch_size, device)`; uniform unless given.
    :param precision: fp32, bf16 or fp16 (`use_fp16` is the same as fp16); the model needs convert_to_bf16/_fp16.
    :param max_steps: where to end; 0: at lr_anneal_steps, or never.
    :param seed: makes each step a function of (seed, step, rank); None leaves the global generators alone.
    :param metadata: what to write about the model into each checkpoint, JSON.
    :param hooks: (interval, function) pairs; function(loop) is called after every `interval` steps, on every rank,
        before the step's row of the log and its checkpoint. One with a `name`, state_dict() and load_state_dict() is
        saved with the checkpoints.
    :param keep_last, keep_every: which checkpoints to keep, see sets.prune.
    :param max_bad_steps: steps in a row without a finite gradient after which training stops.
    :param ema_warmup, ema_sigma_rel: see ParameterEMA and PowerEMA.
    Collective: every rank makes one, with the same arguments.
    """

    def __init__(
        self, *, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval, save_interval,
        resume_checkpoint, use_fp16=False, fp16_scale_growth=1e-3, schedule_sampler=None, weight_decay=0.0,
        lr_anneal_steps=0, precision="fp32", max_steps=0, max_hours=0.0, lr_schedule="auto", lr_warmup_steps=0,
        grad_clip=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, seed=None, metadata=None,
        hooks: Sequence[tuple[int, Callable[[TrainLoop], None]]] = (), keep_last=0, keep_every=0, max_bad_steps=100,
        ema_warmup=False, ema_sigma_rel="",
    ):  # fmt: skip
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = comma_list(str(ema_rate), float)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.precision = "fp16" if use_fp16 else precision
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        self.schedule_sampler: Any = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps = lr_anneal_steps
        if lr_schedule not in LR_SCHEDULES:
            raise unknown_name("lr_schedule", lr_schedule, LR_SCHEDULES)
        self.lr_schedule = ("linear" if lr_anneal_steps else "constant") if lr_schedule == "auto" else lr_schedule
        self.lr_warmup_steps = lr_warmup_steps
        self.max_steps = max_steps or lr_anneal_steps
        self.max_hours = max_hours
        self.grad_clip = grad_clip
        self.seed = seed
        self.metadata = metadata or {}
        self.hooks = [(interval, hook) for interval, hook in hooks if interval > 0]

        self.step = 0  # since this process started
        self.steps_done = 0  # like step, but already counted up while a step's results are saved
        self.resume_step = 0  # done before
        self.first_row = 0  # the first step whose row of the log is not written, or has to be written again
        self.saved_after = -1  # the steps that were done when a set was last written
        self.rank = distributed.get_rank()
        self.global_batch = self.batch_size * distributed.get_world_size()
        self.started = time.monotonic()
        self.meter = LossMeter()
        self.writer = sets.SetWriter(get_blob_logdir(), logger.log, logger.warn, keep_last, keep_every)

        self.model_params = list(model.parameters())
        self.device = self.model_params[0].device
        self.bad_steps = BadSteps(self.device)
        self.max_bad_steps = max_bad_steps
        resumed = self._load_model()
        if distributed.get_world_size() > 1:
            distributed.sync_params([*self.model_params, *model.buffers()])
        self.master_params = self.model_params
        if self.precision != "fp32":
            self.master_params = make_master_params(self.model_params)
            getattr(model, f"convert_to_{self.precision}")()
        self.loss_scale = LossScale(self.device, fp16_scale_growth) if self.precision == "fp16" else None
        self.opt_args = dict(weight_decay=weight_decay, betas=(adam_beta1, adam_beta2), eps=adam_eps, fused=True)
        self.opt = th.optim.AdamW(self.master_params, lr=lr, **self.opt_args)
        self.emas: list[ParameterEMA | PowerEMA] = [
            *(ParameterEMA(rate, self.master_params, ema_warmup) for rate in self.ema_rate),
            *(PowerEMA(width, self.master_params) for width in comma_list(ema_sigma_rel, float)),
        ]
        if self.resume_checkpoint:
            self.resume_step = train_state.restore(self, self.resume_checkpoint, self.resume_step, resumed)
            self.writer.last_saved = self.resume_checkpoint
            if hasattr(data, "seek"):
                data.seek(self.resume_step)
            else:
                logger.warn("the data have no seek(step): they start from their beginning again")

        self.use_ddp = distributed.get_world_size() > 1
        self.ddp_model = model
        if self.use_ddp:
            self.ddp_model = DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                bucket_cap_mb=128,
            )

    @property
    def ema_params(self) -> list[list[th.Tensor]]:
        """For each rate, the averages in the master parameters' shapes."""
        return [ema.params for ema in self.emas]

    @property
    def lg_loss_scale(self) -> float:
        """log2 of float16's loss scale. Waits for the device."""
        return float(self.loss_scale.lg) if self.loss_scale else INITIAL_LOG_LOSS_SCALE

    def _load_model(self) -> dict[str, Any]:
        """Load the weights to go on from, if any; returns the description in their file."""
        self.resume_checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        if not self.resume_checkpoint:
            return {}
        self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
        state_dict, metadata = checkpoint.load(self.resume_checkpoint)
        checkpoint.load_into(self.model, state_dict, self.resume_checkpoint)
        return metadata

    # Training

    @property
    def absolute_step(self) -> int:
        """The number of the current step, counted from the very first."""
        return self.step + self.resume_step

    def run_loop(self) -> None:
        """Train until max_steps, max_hours or for ever, logging and saving on the way and at the end.

        SIGTERM, SIGUSR1 or SIGINT on any rank ends it after the same step on all, with a checkpoint and
        SystemExit(EXIT_RESUME); a second SIGINT at once, with KeyboardInterrupt.
        """
        if self.max_steps and self.resume_step >= self.max_steps:
            logger.log(f"nothing to do: {self.resume_step} of --max_steps {self.max_steps} steps are done")
            return
        self._go_back()
        bar = Progress("training", self.max_steps or None, "step", initial=self.resume_step)
        self.clock = StepClock(self.global_batch)
        try:
            with StopSignals() as signals:
                reason = self._run(bar, signals)
        except KeyboardInterrupt:
            saved = self.writer.last_saved
            where = f"last checkpoint: {saved}; --resume auto goes on from it" if saved else "no checkpoint was written"
            raise KeyboardInterrupt(
                f"training stopped after {self.resume_step + self.steps_done} steps; {where}"
            ) from None
        finally:
            bar.close()
        if reason == TIME_IS_UP:
            logger.log(f"--max_hours {self.max_hours} are over after {self.absolute_step} steps")
        elif reason:
            logger.log(
                f"stopped by {signal.Signals(reason).name} after {self.absolute_step} steps; the same command with "
                f"--resume auto goes on (exit code {EXIT_RESUME})"
            )
            raise SystemExit(EXIT_RESUME)

    def _run(self, bar: Progress, signals: StopSignals) -> int:
        """The loop itself; returns why it ended: 0 where it is finished, TIME_IS_UP, or a signal's number."""
        agreement = Agreement()
        reason = 0
        while not reason and (not self.max_steps or self.absolute_step < self.max_steps):
            distributed.beat(self.absolute_step + 1)
            with self.clock.waiting(), distributed.working("the next batch of images"):
                batch, cond = next(self.data)
            self.run_step(batch, cond)
            for interval, hook in self.hooks:
                if (self.absolute_step + 1) % interval == 0:
                    with self.clock.aside(), distributed.working("previews or validation", HOOK_LIMIT):
                        hook(self)
            shown = {}
            if self.absolute_step % self.log_interval == 0:
                shown = self._write_log()
            if self.absolute_step % self.save_interval == 0:
                # Never over the set that the run has just been resumed from.
                if self.step or self._resumed_set() != self.absolute_step:
                    self._save_in_background()
                if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.absolute_step > 0:
                    break
            self.step += 1
            bar.update(1, **shown)
            self.writer.collect()
            reason = agreement.exchange(signals.received or (TIME_IS_UP if self._time_is_up() else 0))
        agreement.finish()
        if self.max_steps and self.absolute_step >= self.max_steps:
            reason = 0  # whatever came in during the last step
        # The last step may have been saved already, under its own number.
        if self.step and self.saved_after != self.resume_step + self.steps_done:
            self._save_in_background()
        if self.first_row < self.resume_step + self.steps_done:
            self._write_log()  # what came after the last row; a run that goes on from here drops it again
        with distributed.working("the last checkpoint to be written", SAVE_LIMIT):
            self.writer.finish()
        distributed.beat(0)
        distributed.barrier()  # a launcher may end all ranks once the first one leaves
        return reason

    def _resumed_set(self) -> int | None:
        """The number of the set that this run goes on from, where that lies in its own folder."""
        main = self.resume_checkpoint
        if not main or not files.same(main.rpartition("/")[0] or ".", get_blob_logdir()):
            return None
        return parse_resume_step_from_filename(main)

    def _go_back(self) -> None:
        """What an earlier course of the run wrote after the checkpoint that it goes on from, this one writes anew."""
        dropped = logger.drop_rows(self.first_row) if self.resume_checkpoint else 0
        if dropped:
            logger.log(f"{dropped} rows of the log were written after that step: they are dropped, and come again")
        number = self._resumed_set()
        if self.rank == 0 and number is not None:
            names = sets.set_aside_after(get_blob_logdir(), number)
            if names:
                logger.log(f"later checkpoints are set aside: {', '.join(names)} (now with the ending .aside)")

    def _time_is_up(self) -> bool:
        """Whether rank 0's clock says so."""
        return self.rank == 0 and 0 < self.max_hours * 3600 <= time.monotonic() - self.started

    def run_step(self, batch, cond) -> None:
        """One step on this rank's batch [N, C, H, W] and conditions (dict of [N, ...])."""
        if self.seed is not None:
            # Nothing but the step's number is needed to draw the same again after a resume.
            seeds = np.random.SeedSequence((self.seed, self.absolute_step, self.rank)).generate_state(2)
            th.manual_seed(int(seeds[0]))
            np.random.seed(int(seeds[1]))
        self.forward_backward(batch, cond)
        self.optimize()
        self.steps_done = self.step + 1
        self.log_step()

    def forward_backward(self, batch, cond) -> None:
        """The gradient of the batch's weighted mean loss, averaged over the ranks."""
        for p in self.model_params:
            p.grad = None
        batch = batch.to(self.device, non_blocking=True)
        cond = {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        # Drawn for the whole batch before it is split, so that the microbatch changes memory and nothing else.
        t, weights = self.schedule_sampler.sample(len(batch), self.device)
        noise = th.randn_like(batch)
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        parts = []
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = part.stop >= len(batch)
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(
                    self.ddp_model,
                    batch[part],
                    t[part],
                    model_kwargs={key: value[part] for key, value in cond.items()},
                    noise=noise[part],
                )
                # Each microbatch carries its share of the batch's mean.
                total = (losses["loss"] * weights[part]).sum() / len(batch) * scale
                # A loss that is not finite spoils every gradient, so that all ranks skip the step.
                (total * th.where(th.isfinite(total), 1.0, math.nan)).backward()
            parts.append({key: value.detach() for key, value in losses.items()})
        all_losses = {key: th.cat([part[key] for part in parts]) for key in parts[0]}
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, all_losses["loss"])
        self.meter.add_losses(self.diffusion.num_timesteps, t, {k: v * weights for k, v in all_losses.items()})

    def optimize(self) -> None:
        """Clip, step, and move the averages; a gradient that is not finite changes no parameter."""
        if self.precision != "fp32":
            model_grads_to_master_grads(self.model_params, self.master_params)
        if self.loss_scale:
            self.master_params[0].grad.mul_(1.0 / self.loss_scale.scale)
        norm = th.nn.utils.clip_grad_norm_(self.master_params, self.grad_clip or math.inf)
        bad = (~th.isfinite(norm)).float()
        self.bad_steps.note(bad, self.absolute_step)
        self.meter.add("skipped_steps", bad)
        self.meter.add("grad_norm", norm, counted=1 - bad)
        if self.grad_clip:
            self.meter.add("grad_norm_clipped", norm.clamp(max=self.grad_clip), counted=1 - bad)
        for group in self.opt.param_groups:
            group["lr"] = learning_rate(
                self.absolute_step,
                lr=self.lr,
                schedule=self.lr_schedule,
                total_steps=self.lr_anneal_steps or self.max_steps,
                warmup_steps=self.lr_warmup_steps,
            )
        # The fused step looks at it on the device, and leaves everything as it was where it is 1.
        self.opt.found_inf = bad  # type: ignore[attr-defined]
        self.opt.step()
        if self.precision != "fp32":
            master_params_to_model_params(self.model_params, self.master_params)
        if self.emas:
            flat = flatten(self.master_params)
            for ema in self.emas:
                ema.update(flat, 1 - bad, self.absolute_step)
        if self.loss_scale:
            self.loss_scale.update(bad)

    def log_step(self) -> None:
        """Note the step's number and the images seen."""
        logger.logkv("step", self.absolute_step)
        logger.logkv("samples", (self.absolute_step + 1) * self.global_batch)

    def _write_log(self) -> dict[str, str]:
        """Write a row of the log; stop a run that makes no steps any more. Returns what the bar shows."""
        means = self.meter.read()
        speed = self.clock.read()
        logger.logkvs({**means, **speed, "lr": self.opt.param_groups[0]["lr"]})
        if self.loss_scale:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)
        logger.dumpkvs()
        self.first_row = self.resume_step + self.steps_done
        in_row, first = self.bad_steps.read()
        if in_row >= self.max_bad_steps:
            self.writer.wait()
            raise UserError(
                f"{in_row} steps in a row had no finite loss and gradient (--max_bad_steps {self.max_bad_steps}), the "
                f"first at step {first}: resume from the last good checkpoint, {self.writer.last_saved or 'none'}, "
                "with a lower --lr, --grad_clip 1 or --precision fp32, and look at the data"
            )
        return {
            "loss": f"{means.get('loss', math.nan):.4g}",
            "images": f"{speed['images_per_second']:.4g}/s",
            "data": f"{speed['data_wait']:.0%}",
            "memory": f"{speed['peak_gib']:.2f} GiB",
        }

    # The parameters and their averages

    def state_dict_of(self, params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """The model's state dict in float32 with the given master parameters, or averages, in place of its own."""
        return train_state.state_dict_of(self, params)

    @contextmanager
    def using(self, params: Sequence[th.Tensor]) -> Iterator[None]:
        """The model has the given master parameters, or averages, and is in eval mode; afterwards it is as before."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.state_dict_of(params))
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(own)
            self.model.train()

    # Saving

    def save(self) -> None:
        """Write the set of the current step: modelNNNNNN.pt, ema_LABEL_NNNNNN.pt, optNNNNNN.pt, manifestNNNNNN.json.

        Rank 0 writes. Collective.
        """
        self._save_in_background()
        self.writer.wait()

    def _save_in_background(self) -> None:
        with distributed.working("the checkpoint before to be written", SAVE_LIMIT):
            self.writer.wait()  # before the next is copied to host memory, which may have no room for two
        done = self.resume_step + self.steps_done
        parts = train_state.parts_of(self, self.absolute_step, done)
        self.saved_after = done
        if self.rank == 0:
            self.writer.submit(self.absolute_step, done, parts)

    def write_model(self, name: str, params: Sequence[th.Tensor], metadata: dict[str, Any]) -> None:
        """Write the given parameters, or averages, to a file beside the checkpoints, together with the next set."""
        if self.rank == 0:
            description = {**self.metadata, "step": self.resume_step + self.steps_done, **metadata}
            self.writer.write_beside(name, checkpoint.describe(self.state_dict_of(params), description))


def get_blob_logdir() -> str:
    """Where checkpoints go: DIFFUSION_BLOB_LOGDIR, else the logger's folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """A checkpoint to go on from, whatever the arguments say: none, unless this function is replaced."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The path of the moving average beside a model's checkpoint, or None where there is none."""
    if main_checkpoint is None:
        return None
    directory = main_checkpoint.rsplit("/", 1)[0] if "/" in main_checkpoint else "."
    path = files.join(directory, checkpoint.ema_name(rate, step))
    return path if files.exists(path) else None
