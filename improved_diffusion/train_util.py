"""The training loop: step, log, save, resume. It trains whatever module it is given."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch as th
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, files, logger
from .checkpoint import parse_resume_step_from_filename
from .config import LR_SCHEDULES, PRECISIONS, UserError, comma_list, unknown_name
from .ema import ParameterEMA, flatten
from .fp16_util import (
    INITIAL_LOG_LOSS_SCALE,
    LossScale,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
)
from .resample import LossAwareSampler, UniformSampler

__all__ = [
    "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint", "get_blob_logdir", "learning_rate", "log_loss_dict",
    "parse_resume_step_from_filename",
]  # fmt: skip

MIN_LOG_LOSS_SCALE = -20.0  # below, float16 cannot hold this model's gradients at all


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


class LossMeter:
    """Means of what a step reports, collected on the device and read when the log is written."""

    def __init__(self) -> None:
        self.sums: dict[str, th.Tensor] = {}  # name -> float64 [2]: sum and count

    def add(self, name: str, values: th.Tensor, counted: th.Tensor | None = None) -> None:
        """Add values of any shape; where `counted` (of the same shape) is 0 they are left out."""
        counted = th.ones_like(values) if counted is None else counted
        pair = th.stack([th.where(counted > 0, values, 0.0).double().sum(), counted.double().sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_losses(self, num_timesteps: int, ts: th.Tensor, losses: dict[str, th.Tensor]) -> None:
        """Add [N] losses, as a whole and by the quarter of the timesteps that each belongs to (name_q0..name_q3)."""
        quartile = (4 * ts) // num_timesteps
        for name, values in losses.items():
            self.add(name, values)
            values = values.double()
            both = th.zeros(4, 2, dtype=th.float64, device=values.device)
            both.index_add_(0, quartile, th.stack([values, th.ones_like(values)], dim=1))
            for q in range(4):
                key = f"{name}_q{q}"
                self.sums[key] = self.sums[key] + both[q] if key in self.sums else both[q]

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last call, {} where nothing was added. Collective."""
        if not self.sums:
            return {}
        table = dist_util.sum_over_ranks(th.stack(list(self.sums.values()))).cpu()
        means = {name: float(row[0] / row[1]) for name, row in zip(self.sums, table) if row[1]}
        self.sums = {}
        return means


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
    :param hooks: (interval, function) pairs; function(loop) is called after every `interval` steps, on every rank.
    Collective: every rank makes one, with the same arguments.
    """

    def __init__(
        self, *, model, diffusion, data, batch_size, microbatch, lr, ema_rate, log_interval, save_interval,
        resume_checkpoint, use_fp16=False, fp16_scale_growth=1e-3, schedule_sampler=None, weight_decay=0.0,
        lr_anneal_steps=0, precision="fp32", max_steps=0, max_hours=0.0, lr_schedule="auto", lr_warmup_steps=0,
        grad_clip=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, seed=None, metadata=None,
        hooks: Sequence[tuple[int, Callable[[TrainLoop], None]]] = (),
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
        self.rank = dist_util.get_rank()
        self.global_batch = self.batch_size * dist_util.get_world_size()
        self.started = time.monotonic()
        self.meter = LossMeter()
        self.last_saved: str | None = None

        self.model_params = list(model.parameters())
        self.device = self.model_params[0].device
        self._load_model()
        if dist_util.get_world_size() > 1:
            dist_util.sync_params([*self.model_params, *model.buffers()])
        self.master_params = self.model_params
        if self.precision != "fp32":
            self.master_params = make_master_params(self.model_params)
            getattr(model, f"convert_to_{self.precision}")()
        self.loss_scale = LossScale(self.device, fp16_scale_growth) if self.precision == "fp16" else None
        self.opt_args = dict(weight_decay=weight_decay, betas=(adam_beta1, adam_beta2), eps=adam_eps, fused=True)
        self.opt = th.optim.AdamW(self.master_params, lr=lr, **self.opt_args)
        self.emas = [ParameterEMA(rate, self.master_params) for rate in self.ema_rate]
        if self.resume_checkpoint:
            self._load_rest()
            if hasattr(data, "seek"):
                data.seek(self.resume_step)
            else:
                logger.warn("the data have no seek(step): they start from their beginning again")

        self.use_ddp = dist_util.get_world_size() > 1
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

    # Resuming

    def _load_model(self) -> None:
        self.resume_checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        if self.resume_checkpoint:
            self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
            state_dict, _ = checkpoint.load(self.resume_checkpoint)
            checkpoint.load_into(self.model, state_dict, self.resume_checkpoint)

    def _load_rest(self) -> None:
        """The averages, the optimizer and what was saved with it. A missing part is an error that names it."""
        main, named_step = self.resume_checkpoint, self.resume_step
        opt_path = dist_util.from_rank0(
            checkpoint.find_in_set, main, checkpoint.optimizer_name(named_step), "the optimizer's state"
        )
        for ema in self.emas:
            path = dist_util.from_rank0(
                checkpoint.find_in_set, main, checkpoint.ema_name(ema.rate, named_step), "the moving average"
            )
            state_dict, _ = checkpoint.load(path)
            checkpoint.check_fits(self.model, state_dict, path)
            ema.load([state_dict[name].to(self.device).float() for name, _ in self.model.named_parameters()])
        state = dist_util.load_state_dict(opt_path, map_location="cpu")
        self._load_optimizer(state, opt_path)
        rest = state.get("improved_diffusion", {})
        self.resume_step = rest.get("step", named_step)
        restored = ["model", *(f"EMA {rate}" for rate in self.ema_rate), "optimizer"]
        for name, part in (("loss_scale", self.loss_scale), ("schedule_sampler", self.schedule_sampler)):
            if part is None or not hasattr(part, "load_state_dict"):
                continue
            if name not in rest:
                logger.warn(f"{opt_path} has no {name} (it comes from other code): that part starts afresh")
                continue
            part.load_state_dict(rest[name])
            restored.append(name)
        logger.log(f"resumed {main} after {self.resume_step} steps: restored {', '.join(restored)}")

    def _load_optimizer(self, state: Any, path: str) -> None:
        try:
            shapes = [tuple(entry["exp_avg"].shape) for _, entry in sorted(state["state"].items())]
            groups = [{**group, **self.opt_args, "lr": self.lr} for group in state["param_groups"]]
            if state["state"] and shapes != [tuple(p.shape) for p in self.master_params]:
                raise ValueError("its shapes are those of another model or of another --precision")
            self.opt.load_state_dict({"state": state["state"], "param_groups": groups})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} does not fit this run's optimizer: {error}") from None

    # Training

    @property
    def absolute_step(self) -> int:
        """The number of the current step, counted from the very first."""
        return self.step + self.resume_step

    def run_loop(self) -> None:
        """Train until max_steps, max_hours or for ever, logging and saving on the way and at the end."""
        bar = logger.Progress("training", self.max_steps or None, "step", initial=self.resume_step)
        try:
            self._run(bar)
        except KeyboardInterrupt:
            steps = checkpoint.complete_sets(get_blob_logdir(), self.ema_rate) if self.rank == 0 else []
            where = "no checkpoint was written"
            if steps:
                newest = files.join(get_blob_logdir(), checkpoint.model_name(steps[-1]))
                where = f"the last checkpoint is {newest}; --resume auto goes on"
            raise KeyboardInterrupt(
                f"training stopped after {self.resume_step + self.steps_done} steps; {where}"
            ) from None
        finally:
            bar.close()

    def _run(self, bar: logger.Progress) -> None:
        while not self.max_steps or self.absolute_step < self.max_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            shown = {}
            if self.absolute_step % self.log_interval == 0:
                shown = self._write_log()
            if self.absolute_step % self.save_interval == 0:
                self.save()
                if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.absolute_step > 0:
                    return
            for interval, hook in self.hooks:
                if (self.absolute_step + 1) % interval == 0:
                    hook(self)
            time_is_up = self.absolute_step % self.log_interval == 0 and self._time_is_up()
            self.step += 1
            bar.update(1, **shown)
            if time_is_up:
                logger.log(f"--max_hours {self.max_hours} are over")
                break
        # The last step may have been saved already, under its own number.
        if self.step and (self.absolute_step - 1) % self.save_interval != 0:
            self.save()

    def _time_is_up(self) -> bool:
        """Whether rank 0's clock says so."""
        if not self.max_hours:
            return False
        return dist_util.from_rank0(lambda: time.monotonic() - self.started >= self.max_hours * 3600)

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
                ((losses["loss"] * weights[part]).sum() / len(batch) * scale).backward()
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
        self.meter.add("skipped_steps", bad)
        self.meter.add("grad_norm", norm, counted=1 - bad)
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
                ema.update(flat, 1 - bad)
        if self.loss_scale:
            self.loss_scale.update(bad)

    def log_step(self) -> None:
        """Note the step's number and the images seen."""
        logger.logkv("step", self.absolute_step)
        logger.logkv("samples", (self.absolute_step + 1) * self.global_batch)

    def _write_log(self) -> dict[str, str]:
        """Write a row of the log; stop a run whose steps have all been skipped. Returns what the bar shows."""
        means = self.meter.read()
        for key, value in means.items():
            logger.logkv(key, value)
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        if self.loss_scale:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)
        logger.dumpkvs()
        hopeless = self.lg_loss_scale < MIN_LOG_LOSS_SCALE if self.loss_scale else True
        if means.get("skipped_steps", 0) == 1 and hopeless:
            raise UserError(
                f"the gradient was not finite in any step up to {self.absolute_step} since the last row of the log: "
                f"lower --lr, give --grad_clip 1, or --precision fp32; last checkpoint: {self.last_saved or 'none'}"
            )
        return {"loss": f"{means.get('loss', math.nan):.4g}"}

    # Saving

    def state_dict_of(self, params: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """The model's state dict in float32 with the given master parameters, or averages, in place of its own."""
        if self.precision != "fp32":
            params = unflatten_master_params(self.model_params, params)
        state_dict = self.model.state_dict()
        for (name, _), value in zip(self.model.named_parameters(), params):
            state_dict[name] = value.detach()
        return state_dict

    def save(self) -> None:
        """Write modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt; rank 0 writes, the optimizer's last."""
        if self.rank != 0:
            return
        directory, step = get_blob_logdir(), self.absolute_step
        files.make_dirs(directory)
        done = self.resume_step + self.steps_done
        description = {**self.metadata, "step": done}
        checkpoint.save_state_dict(
            self.state_dict_of(self.master_params), files.join(directory, checkpoint.model_name(step)), description
        )
        for ema in self.emas:
            path = files.join(directory, checkpoint.ema_name(ema.rate, step))
            checkpoint.save_state_dict(self.state_dict_of(ema.params), path, {**description, "ema_rate": ema.rate})
        rest: dict[str, Any] = {"step": done}
        for name, part in (("loss_scale", self.loss_scale), ("schedule_sampler", self.schedule_sampler)):
            if part is not None and hasattr(part, "state_dict"):
                rest[name] = part.state_dict()
        checkpoint.save(
            {**self.opt.state_dict(), "improved_diffusion": rest},
            files.join(directory, checkpoint.optimizer_name(step)),
        )
        self.last_saved = files.join(directory, checkpoint.model_name(step))
        logger.log(f"saved {self.last_saved}")


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
