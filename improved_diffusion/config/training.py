"""Training options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import PRECISIONS, Config, UserError, comma_list, extra, option, unknown_name


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """Images."""

    data_dir: str = option("", "images: a folder, a .zip or an .npz; a local path or a URL that blobfile reads")
    labels: str = extra(
        "prefix", "where classes come from: prefix (cat_001.png), folder (cat/001.png), or a JSON, CSV or TSV file"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Training images."""

    random_flip: bool = extra(False, "mirror each image left to right with probability 1/2")
    num_workers: int = extra(1, "processes that read and resize images, per rank; 0: read in the training process")

    def validate(self) -> None:
        self.require(self.num_workers >= 0, "num_workers", "must not be negative")


MAX_SIGMA_REL = 0.28  # of a power-function average; a little less than that of the plain mean, 12^-1/2
LR_SCHEDULES = ("auto", "constant", "linear", "cosine", "one-cycle")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Training loop."""

    schedule_sampler: str = option(
        "uniform",
        "which timesteps to train on (loss-second-moment: IDDPM eq. 18)",
        choices=("uniform", "loss-second-moment"),
    )
    lr: float = option(1e-4, "learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    lr_anneal_steps: int = option(
        0, "steps over which the learning rate falls to 0; training ends there; 0: no annealing"
    )
    batch_size: int = option(1, "images a step on each rank")
    microbatch: int = option(-1, "images in one forward pass, to save memory; -1: the whole batch")
    ema_rate: str = option("0.9999", "rates of the moving averages of the weights, comma-separated")
    log_interval: int = option(10, "steps between rows of the log")
    save_interval: int = option(10000, "steps between checkpoints")
    resume_checkpoint: str = option(
        "", "modelNNNNNN.pt to continue from; without its ema_* and opt files these start afresh, as published"
    )
    use_fp16: bool = option(False, "train in float16 (the same as --precision fp16)")
    fp16_scale_growth: float = option(1e-3, "added to log2 of fp16's loss scale after each good step")
    precision: str = extra(
        "fp32", "arithmetic of the network's blocks; the master weights stay fp32", choices=PRECISIONS
    )
    total_batch_size: int = extra(0, "images a step over all ranks; 0: batch_size x ranks")
    max_steps: int = extra(0, "steps to train for; 0: until lr_anneal_steps, or until stopped")
    max_hours: float = extra(0.0, "hours of wall-clock time after which training saves and ends; 0: no limit")
    lr_schedule: str = extra(
        "auto",
        "learning rate over lr_anneal_steps (or max_steps); auto: linear with lr_anneal_steps, else constant",
        choices=LR_SCHEDULES,
    )
    lr_warmup_steps: int = extra(0, "steps over which the learning rate rises from 0")
    grad_clip: float = extra(0.0, "clip the gradient's norm to this; 0: no clipping")
    adam_beta1: float = extra(0.9, "decay rate of Adam's first moment")
    adam_beta2: float = extra(0.999, "decay rate of Adam's second moment")
    adam_eps: float = extra(1e-8, "Adam's epsilon")
    resume: str = extra(
        "", "auto: continue from the newest complete checkpoint in out_dir, if any; or a checkpoint file or folder"
    )
    init_checkpoint: str = extra(
        "", "start at step 0 from the weights of this checkpoint, or of a run's folder, as far as they fit"
    )
    keep_last: int = extra(0, "newest checkpoints to keep; 0: all")
    keep_every: int = extra(0, "with keep_last, also keep checkpoints at multiples of this many steps; 0: none")
    max_bad_steps: int = extra(100, "stop after this many steps in a row without a finite gradient")
    ema_warmup: bool = extra(False, "EMA warm-up: the rate is min(ema_rate, (1 + s)/(10 + s)) at step s")
    ema_sigma_rel: str = extra(
        "",
        "relative widths of power-function averages, such as 0.05,0.10 (EDM2); posthoc-ema makes other widths later",
    )
    hook_timeout: float = extra(14400.0, "seconds that previews or a validation may take before the run ends")
    save_timeout: float = extra(3600.0, "seconds that writing a checkpoint may take before the run ends")
    dry_run: bool = extra(False, "run 3 steps and report time, memory and disk needs; write nothing")

    def validate(self) -> None:
        for name in ("batch_size", "log_interval", "save_interval"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in (
            "lr_anneal_steps",
            "total_batch_size",
            "max_steps",
            "max_hours",
            "lr_warmup_steps",
            "grad_clip",
            "weight_decay",
            "keep_last",
            "keep_every",
        ):
            self.require(getattr(self, name) >= 0, name, "must not be negative")
        self.require(self.max_bad_steps >= 1, "max_bad_steps", "must be at least 1")
        for name in ("lr", "adam_eps", "hook_timeout", "save_timeout"):
            self.require(getattr(self, name) > 0 and math.isfinite(getattr(self, name)), name, "must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")
        try:
            rates = comma_list(self.ema_rate, float)
        except ValueError:
            raise UserError(f"--ema_rate {self.ema_rate!r}: expected numbers such as 0.999,0.9999") from None
        self.require(all(0 <= rate < 1 for rate in rates), "ema_rate", "must be in [0, 1)")
        try:
            widths = comma_list(self.ema_sigma_rel, float)
        except ValueError:
            raise UserError(f"--ema_sigma_rel {self.ema_sigma_rel!r}: expected numbers such as 0.05,0.10") from None
        self.require(all(0 < width < MAX_SIGMA_REL for width in widths), "ema_sigma_rel", "must be in (0, 0.28)")
        if self.use_fp16 and self.precision == "bf16":
            raise UserError("--use_fp16 True contradicts --precision bf16: give one of them")
        if self.resume and self.resume_checkpoint and self.resume != self.resume_checkpoint:
            raise UserError(
                f"--resume {self.resume} contradicts --resume_checkpoint {self.resume_checkpoint}: give one of them"
            )
        if self.keep_every and not self.keep_last:
            raise UserError(f"--keep_every {self.keep_every} needs --keep_last: without it every checkpoint is kept")
        if self.init_checkpoint and self.resume_checkpoint:
            raise UserError("--init_checkpoint starts at step 0, --resume_checkpoint continues a run: give one of them")
        if self.lr_schedule in ("linear", "cosine", "one-cycle") and not (self.lr_anneal_steps or self.max_steps):
            raise UserError(f"--lr_schedule {self.lr_schedule} needs an end: give --max_steps or --lr_anneal_steps")


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class ProgressConfig(Config):
    """Monitoring."""

    val_dir: str = extra(
        "",
        "held-out images, in any form of data_dir, to measure the loss and bits/dim (a classifier's accuracy) on",
    )
    val_interval: int = extra(5000, "steps between measurements on val_dir")
    val_images: int = extra(512, "images of val_dir to use, at most all")
    trackers: str = extra("", "also log to these, comma-separated: tensorboard, wandb")

    def validate(self) -> None:
        for name in ("val_interval", "val_images"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in comma_list(self.trackers, str.strip):
            if name not in TRACKERS:
                raise unknown_name("--trackers", name, TRACKERS)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(ProgressConfig):
    """Monitoring."""

    sample_interval: int = extra(0, "steps between preview grids of samples, from the model and its first EMA; 0: none")

    def validate(self) -> None:
        super().validate()
        self.require(self.sample_interval >= 0, "sample_interval", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class PosthocConfig(Config):
    """Averages after training."""

    run_dir: str = extra("", "folder or URL of a run trained with --ema_sigma_rel; the averages are written there")
    sigma_rel: str = extra("", "relative widths of the averages to make, such as 0.07,0.15, each in (0, 0.28)")
    step: int = extra(-1, "step, as in the snapshots' file names, to make them at; -1: the newest")

    def validate(self) -> None:
        try:
            widths = comma_list(self.sigma_rel, float)
        except ValueError:
            raise UserError(f"--sigma_rel {self.sigma_rel!r}: expected numbers such as 0.07,0.15") from None
        self.require(all(0 < width < MAX_SIGMA_REL for width in widths), "sigma_rel", "must be in (0, 0.28)")
        self.require(self.step >= -1, "step", "must be -1 or the step of a snapshot")
