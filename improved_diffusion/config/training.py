"""Training options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import AUTO_PRECISION, LONGEST_WAIT, PRECISIONS, Config, extra, option
from .messages import UserError, unknown_name
from .values import comma_list, path_of, str2bool, whole_number


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """Images."""

    data_dir: str = option(
        "", "images: a folder, a .zip or an .npz; a local path or a URL that blobfile reads", parse=path_of
    )
    labels: str = extra(
        "prefix",
        "where classes come from: prefix (cat_001.png), folder (cat/001.png), or a JSON, CSV or TSV file",
        parse=path_of,
    )


def _number_or_auto(value: Any) -> int | str:
    return "auto" if value == "auto" else whole_number(value)


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Training images."""

    random_flip: bool = extra(False, "mirror each image left to right with probability 1/2")
    num_workers: int | str = extra(
        "auto",
        "processes that read and resize images, per rank; 0: read in the training process; auto: as the machine has "
        "cores, 0 for images in memory or in a cache",
        parse=_number_or_auto,
        low=0,
        high=1024,
    )
    cache: str = extra(
        "auto",
        "folder in which the resized images are packed, once for all runs; auto: in ~/.cache, where it pays; off: none",
        parse=path_of,
    )

    def validate(self) -> None:
        self.require(bool(self.cache), "cache", "is empty: name a folder, auto or off")


MIN_SIGMA_REL = 0.001
MAX_SIGMA_REL = 0.28  # of a power-function average; a little less than that of the plain mean, 12^-1/2
OPTIMIZERS = ("adamw", "radam")
LR_SCHEDULES = ("auto", "constant", "linear", "cosine", "one-cycle")


def _schedule_of_anneal_lr(value: str) -> str:
    """The lr_schedule of guided-diffusion's --anneal_lr. Raises ValueError for a value that is not a bool's."""
    return "linear" if str2bool(value) else "constant"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Training loop."""

    schedule_sampler: str = option(
        "uniform",
        "which timesteps to train on (loss-second-moment: IDDPM eq. 18)",
        choices=("uniform", "loss-second-moment"),
    )
    lr: float = option(1e-4, "learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", low=0)
    lr_anneal_steps: int = option(
        0, "steps over which the learning rate falls to 0; training ends there; 0: no annealing", low=0
    )
    batch_size: int = option(1, "images a step on each rank", low=1)
    microbatch: int = option(-1, "images in one forward pass, to save memory; -1: the whole batch", low=-1)
    ema_rate: str = option("0.9999", "rates of the moving averages of the weights, comma-separated")
    log_interval: int = option(10, "steps between rows of the log", low=1)
    save_interval: int = option(10000, "steps between checkpoints", low=1)
    resume_checkpoint: str = option(
        "",
        "modelNNNNNN.pt to continue from; without its ema_* and opt files these start afresh, as published",
        parse=path_of,
    )
    use_fp16: bool = option(False, "train in float16 (the same as --precision fp16)")
    fp16_scale_growth: float = option(1e-3, "added to log2 of fp16's loss scale after each good step", low=0, high=10)
    precision: str = extra(
        "fp32",
        "number format of the network's blocks; 16 bits round, and are faster where the processor or GPU computes in "
        "them; master weights stay fp32; auto: bf16 where it is computed in, else fp32",
        choices=(*PRECISIONS, AUTO_PRECISION),
    )
    total_batch_size: int = extra(0, "images a step over all ranks; 0: batch_size x ranks", low=0)
    max_steps: int = extra(
        0, "steps to train for; 0: lr_anneal_steps, or until stopped", low=0, flags={"iterations": str}
    )
    max_hours: float = extra(
        0.0, "hours of wall-clock time after which training saves and ends; 0: no limit", low=0, high=1e6
    )
    lr_schedule: str = extra(
        "auto",
        "learning rate over lr_anneal_steps (or max_steps); auto: linear with lr_anneal_steps, else constant",
        choices=LR_SCHEDULES,
        flags={"anneal_lr": _schedule_of_anneal_lr},
    )
    lr_warmup_steps: int = extra(0, "steps over which the learning rate rises from 0", low=0)
    grad_clip: float = extra(0.0, "clip the gradient's norm to this; 0: no clipping", low=0)
    adam_beta1: float = extra(0.9, "decay rate of Adam's first moment")
    adam_beta2: float = extra(0.999, "decay rate of Adam's second moment")
    adam_eps: float = extra(1e-8, "Adam's epsilon")
    optimizer: str = extra(
        "adamw",
        "adamw, or radam: with the learning rate of the first steps lowered as far as Adam's second moment is "
        "uncertain (Liu et al. 2020)",
        choices=OPTIMIZERS,
    )
    resume: str = extra(
        "",
        "auto: continue from the newest complete checkpoint in out_dir, if any; or a checkpoint file or folder",
        parse=path_of,
    )
    init_checkpoint: str = extra(
        "",
        "start at step 0 from the weights of this checkpoint, or of a run's folder, as far as they fit",
        parse=path_of,
    )
    keep_last: int = extra(0, "newest checkpoints to keep; 0: all", low=0)
    keep_every: int = extra(0, "with keep_last, also keep checkpoints at multiples of this many steps; 0: none", low=0)
    max_bad_steps: int = extra(100, "stop after this many steps in a row without a finite gradient", low=1)
    ema_warmup: bool = extra(
        False,
        "EMA warm-up: the rate is min(ema_rate, (1 + s)/(10 + s)) at step s, so that the average forgets the initial "
        "weights at once",
    )
    ema_sigma_rel: str = extra(
        "",
        "relative widths of power-function averages, such as 0.05,0.10 (EDM2); posthoc-ema makes other widths later",
    )
    hook_timeout: float = extra(
        14400.0, "seconds that previews or a validation may take before the run ends", high=LONGEST_WAIT
    )
    save_timeout: float = extra(
        3600.0, "seconds that writing a checkpoint may take before the run ends", high=LONGEST_WAIT
    )
    dry_run: bool = extra(False, "run 3 steps and report time, memory and disk needs; write nothing")

    def validate(self) -> None:
        for name in ("lr", "adam_eps", "hook_timeout", "save_timeout"):
            self.require(getattr(self, name) > 0, name, "must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")
        rates = self.numbers("ema_rate", "0.999,0.9999")
        self.require(all(0 <= rate < 1 for rate in rates), "ema_rate", "must be in [0, 1)")
        widths = self.numbers("ema_sigma_rel", "0.05,0.10")
        in_range = all(MIN_SIGMA_REL <= width < MAX_SIGMA_REL for width in widths)
        self.require(in_range, "ema_sigma_rel", f"must be in [{MIN_SIGMA_REL}, {MAX_SIGMA_REL})")
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


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainConfig(TrainConfig):
    """Training."""

    noised: bool = extra(True, "train on noisy images, as a classifier that guides needs; only True is supported")

    def validate(self) -> None:
        super().validate()
        self.require(self.noised, "noised", "is not supported: classifiers train on noisy images, leave the flag out")


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class ProgressConfig(Config):
    """Monitoring."""

    val_dir: str = extra(
        "",
        "held-out images to measure the model on: loss and bits/dim, a classifier's accuracy, or a student's samples",
        parse=path_of,
        flags={"val_data_dir": str},
    )
    val_interval: int = extra(5000, "steps between measurements on val_dir", low=1, flags={"eval_interval": str})
    val_images: int = extra(512, "images of val_dir to use, at most all", low=1)
    trackers: str = extra("", "also log to these, comma-separated: tensorboard, wandb")

    def validate(self) -> None:
        for name in comma_list(self.trackers, str.strip):
            if name not in TRACKERS:
                raise unknown_name("--trackers", name, TRACKERS)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(ProgressConfig):
    """Monitoring."""

    sample_interval: int = extra(0, "steps between preview grids of samples; 0: none", low=0)
    loss_floor: bool = extra(
        False,
        "every val_interval steps, log the loss on training images by quarter of the timesteps, beside the floor that "
        "no model can be below",
    )


@dataclass(frozen=True, kw_only=True)
class PosthocConfig(Config):
    """Averages after training."""

    run_dir: str = extra(
        "", "folder or URL of a run trained with --ema_sigma_rel; the averages are written there", parse=path_of
    )
    sigma_rel: str = extra("", "relative widths of the averages to make, such as 0.07,0.15, each in [0.001, 0.28)")
    step: int = extra(-1, "step, as in the snapshots' file names, to make them at; -1: the newest", low=-1)

    def validate(self) -> None:
        widths = self.numbers("sigma_rel", "0.07,0.15")
        in_range = all(MIN_SIGMA_REL <= width < MAX_SIGMA_REL for width in widths)
        self.require(in_range, "sigma_rel", f"must be in [{MIN_SIGMA_REL}, {MAX_SIGMA_REL})")
