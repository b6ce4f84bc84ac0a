"""One training step: the gradient, the optimizer, and the moving averages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..config import TrainSpeedConfig, comma_list
from ..data.pixels import to_model_range
from ..fp16_util import make_master_params
from ..logs import logger
from ..models.acceleration import accelerate, checkpoint_levels
from ..resample import LossAwareSampler
from . import objective
from . import precision as precision_util
from .ema import Followed, ParameterEMA, PowerEMA
from .lr_schedule import LRSchedule
from .optimizer import AdamW
from .run_log import RunLog

BUCKET_MB = 25  # of gradients that travel together while the backward pass goes on: the last bucket waits alone


class Unfinished(Exception):
    """A step was left between two microbatches, before it changed anything but gradients."""


class TrainStep:
    """The parameters of a model in training, and how a step changes them.

    TrainLoop adds the loop. The published code's methods, which its subclasses replace, are all here or there.
    """

    model: nn.Module
    diffusion: Any
    microbatch: int
    global_batch: int  # images a step over all ranks
    schedule_sampler: Any
    precision: str
    speed: TrainSpeedConfig
    use_fp16: bool
    fp16_scale_growth: float
    ema_rate: list[float]
    lr: float
    lr_schedule: LRSchedule
    weight_decay: float
    grad_clip: float
    seed: int | None
    rank: int
    device: th.device
    run_log: RunLog
    step: int  # made since this process started
    resume_step: int  # made before
    model_params: list[nn.Parameter]
    _made = 0  # the steps that run_step has made, counted from the very first
    _whole = True  # the parameters and all that belongs to them are those after a whole step

    @property
    def absolute_step(self) -> int:
        """The number of the current step, counted from the very first."""
        return self.step + self.resume_step

    @property
    def steps_done(self) -> int:
        """The steps made, counted from the very first one; the current one counts once run_step has made it."""
        return max(self._made, self.absolute_step)

    # The parameters and their averages

    def _set_up_parameters(
        self, adam_betas: tuple[float, float], adam_eps: float, ema_sigma_rel: str, ema_warmup: bool
    ) -> None:
        """Make the master parameters, the optimizer, the moving averages, and DDP's wrapper of the model."""
        self.master_params: list[Any] = self.model_params
        self.loss_scale = precision_util.LossScale(self.device, self.fp16_scale_growth)
        if self.sixteen_bits:
            self._setup_fp16()
        checkpoint_levels(self.model, self.speed.levels)
        self.ddp_model: Any = accelerate(self.model, self.speed)
        self._master_copy = precision_util.MasterCopy(self.model_params)
        self._followed = Followed()
        self.opt: th.optim.Optimizer = AdamW(
            self.master_params, lr=self.lr, weight_decay=self.weight_decay, betas=adam_betas, eps=adam_eps
        )
        self.emas: list[ParameterEMA | PowerEMA] = [
            *(ParameterEMA(rate, self.master_params, ema_warmup) for rate in self.ema_rate),
            *(PowerEMA(width, self.master_params) for width in comma_list(ema_sigma_rel, float)),
        ]
        # In 16-bit training _average_gradients adds the ranks' gradients in float32; DDP would add them in 16 bits.
        self.use_ddp = distributed.get_world_size() > 1 and not self.sixteen_bits
        if self.use_ddp:
            devices = None if self.device.type == "cpu" else [self.device]
            # No static_graph: a user's model may use other parameters in another step, and it saves little here.
            self.ddp_model = DistributedDataParallel(
                self.ddp_model, device_ids=devices, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
            )

    @property
    def sixteen_bits(self) -> bool:
        """Whether the model computes in 16 bits, beside float32 master parameters."""
        return self.precision != "fp32"

    @property
    def lg_loss_scale(self) -> float:
        """log2 of float16's loss scale; may be set. Waits for the device."""
        return float(self.loss_scale.lg)

    @lg_loss_scale.setter
    def lg_loss_scale(self, value: float) -> None:
        self.loss_scale.lg.fill_(value)

    @property
    def ema_params(self) -> list[list[th.Tensor]]:
        """For each average, its values in the master parameters' shapes; may be set."""
        return [ema.params for ema in self.emas]

    @ema_params.setter
    def ema_params(self, values: Sequence[Sequence[th.Tensor]]) -> None:
        for ema, params in zip(self.emas, values):
            ema.load(params)

    @property
    def parameter_sets(self) -> dict[str, Sequence[th.Tensor]]:
        """The master parameters under "", and each average under its label."""
        return {"": self.master_params, **{ema.label: ema.params for ema in self.emas}}

    @property
    def initial_shares(self) -> dict[str, float]:
        """For each average, by its label, the share of the first parameters in it, in [0, 1]."""
        return {ema.label: ema.initial_share(self.steps_done) for ema in self.emas}

    @contextmanager
    def using(self, params: Sequence[th.Tensor]) -> Iterator[None]:
        """The model has the given master parameters, or averages, and is in eval mode; afterwards it is as before."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self._master_params_to_state_dict(params))
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(own)
            self.model.train()

    def _setup_fp16(self) -> None:
        """Make the float32 master copy, and convert the model's torso to 16 bits."""
        self.master_params = make_master_params(self.model_params)
        getattr(self.model, f"convert_to_{self.precision}")()

    def _master_params_to_state_dict(self, master_params) -> dict[str, th.Tensor]:
        """The model's state dict, in float32, with master parameters, or averages, in place of its own."""
        return precision_util.state_dict_of(self.model, master_params, self.sixteen_bits)

    def _state_dict_to_master_params(self, state_dict: Mapping[str, th.Tensor]) -> list[th.Tensor]:
        """The inverse of _master_params_to_state_dict."""
        return precision_util.params_of(self.model, state_dict, self.sixteen_bits)

    # A step

    def run_step(self, batch, cond) -> None:
        """One step on this rank's batch [N, C, H, W] and conditions (dict of [N, ...])."""
        if self.seed is not None:
            objective.seed_step(self.seed, self.absolute_step, self.rank, self.device)
        if hasattr(self.diffusion, "at_step"):
            self.diffusion.at_step(self.absolute_step)
        self.forward_backward(batch, cond)
        if self.absolute_step in self.lr_schedule.restarts:  # not before: a step that is left changes nothing
            self._restart()
        if self.use_fp16:
            self.optimize_fp16()
        else:
            self.optimize_normal()
        self._made = self.absolute_step + 1
        self.log_step()

    def _restart(self) -> None:
        """Begin anew from the present parameters, with a new optimizer and new averages."""
        self.opt.state.clear()
        for ema in self.emas:
            if ema.restarts:
                ema.load(self.master_params)

    def forward_backward(self, batch, cond) -> None:
        """The gradient of the batch's weighted mean loss.

        It is in model_params, averaged over the ranks; in 16-bit training with several microbatches or ranks in
        master_params, to be averaged by the optimize methods.
        """
        precision_util.clear_gradients(self.model_params)
        if self.sixteen_bits:
            precision_util.clear_gradients(self.master_params)
        batch = to_model_range(batch, self.device)
        cond = {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        # Drawn for the whole batch before it is split, so that the microbatch changes memory use only.
        t, weights = self.schedule_sampler.sample(len(batch), self.device)
        noise = objective.draw_noise(self.diffusion.training_losses, batch)
        scale = self.loss_scale.scale if self.use_fp16 else None
        learns = isinstance(self.schedule_sampler, LossAwareSampler)
        parts, seen = [], []
        for start in range(0, len(batch), self.microbatch):
            if start and self._is_stopped():
                raise Unfinished
            part = slice(start, start + self.microbatch)
            last = part.stop >= len(batch)
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(
                    self.ddp_model, batch[part], t[part], model_kwargs=objective.split(cond, part),
                    **objective.split(noise, part),
                )  # fmt: skip
                losses = objective.per_image(losses, len(t[part]))
                parts.append({key: value.detach() for key, value in losses.items()})
                if learns:  # on their way before the backward pass, which nobody then has to wait for
                    seen.append((distributed.HostCopy(t[part]), distributed.HostCopy(losses["loss"])))
                # Each microbatch adds its share of the batch's mean.
                share = (losses["loss"] * weights[part]).sum() / len(batch)
                precision_util.backward(share if scale is None else share * scale)
            if self.sixteen_bits and (len(batch) > self.microbatch or distributed.get_world_size() > 1):
                self._master_copy.collect_gradients(*self.master_params)
        self._whole = False
        if learns:
            ts, values = (th.cat([copy.get() for copy in copies]) for copies in zip(*seen))
            self.schedule_sampler.update_with_local_losses(ts, values)
        whole = parts[0] if len(parts) == 1 else {key: th.cat([part[key] for part in parts]) for key in parts[0]}
        self.run_log.add_losses(self.diffusion.num_timesteps, t, whole, weights)

    def _is_stopped(self) -> bool:
        """Whether to leave the step at hand unfinished, of which nothing is kept."""
        return False

    def optimize_normal(self) -> None:
        """Clip the gradient, step, and move the averages; a gradient that is not finite changes no parameter."""
        self._average_gradients()
        self._optimize()

    def optimize_fp16(self) -> None:
        """`optimize_normal` on the gradient divided by the loss scale, which is then adjusted."""
        self._average_gradients()
        self.master_params[0].grad.mul_(1.0 / self.loss_scale.scale)
        self.loss_scale.update(self._optimize())

    def _average_gradients(self) -> None:
        """In 16-bit training, move the gradient to master_params, averaged over the ranks. Collective."""
        if self.sixteen_bits:
            self._master_copy.collect_gradients(*self.master_params)
            precision_util.average_gradients(self.master_params)
            if distributed.get_world_size() > 1:
                distributed.sync_params(self.model.buffers())  # as DDP does

    def _optimize(self) -> th.Tensor:
        """Clip the gradient of master_params, step, and move the averages; 1 if the step was skipped, else 0."""
        self._whole = False
        self.grad_norm = precision_util.clip_gradients(self.master_params, self.grad_clip)
        good = (self.grad_norm < math.inf).float()  # NaN is not
        bad = 1 - good
        self.run_log.add_step(bad, self.absolute_step)
        self._log_grad_norm()
        self._anneal_lr()
        precision_util.step_where_finite(self.opt, bad)
        if self.sixteen_bits:
            self._master_copy.update_model(*self.master_params)
            precision_util.clear_gradients(self.master_params)
        if self.emas:
            followed, start = self._followed(self.master_params), self.lr_schedule.start(self.absolute_step)
            for ema in self.emas:
                ema.update(followed, good, self.absolute_step - (start if ema.restarts else 0))
        self._whole = True
        return bad

    def _log_grad_norm(self) -> None:
        self.run_log.add_gradient_norm(self.grad_norm, self.grad_clip)

    def _anneal_lr(self) -> None:
        """Set the step's learning rate; one that is set from outside stays where there is no schedule."""
        if self.lr_schedule.is_constant:
            return
        for group in self.opt.param_groups:
            group["lr"] = self.lr_schedule.at(self.absolute_step, self.lr)

    def log_step(self) -> None:
        """Log the step's number and the images seen."""
        logger.logkv("step", self.absolute_step)
        logger.logkv("samples", (self.absolute_step + 1) * self.global_batch)
        if self.use_fp16:
            logger.defer(self._loss_scale_row)

    def _loss_scale_row(self) -> dict[str, float]:
        return {"lg_loss_scale": self.lg_loss_scale}
