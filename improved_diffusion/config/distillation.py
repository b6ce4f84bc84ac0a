"""Distillation options."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Config, extra, with_default
from .messages import UserError
from .training import TrainConfig
from .values import path_of

METHODS = ("consistency", "progressive")
PREDICTIONS = ("teacher", "eps", "x0", "v")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    """Distillation."""

    teacher: str = extra(
        "", "checkpoint of the model to distil, or its run's folder; a moving average is best", parse=path_of
    )
    method: str = extra(
        "consistency",
        "consistency: images in a few steps that add noise again (consistency tuning, Geng et al. 2024); progressive: "
        "the teacher's images, from the same noise, in fewer steps of ddim (Salimans & Ho 2022)",
        choices=METHODS,
    )
    to: int = extra(4, "steps that the student is for: what sampling, previews and validation take", low=1, high=1000)
    student_prediction: str = extra(
        "teacher",
        "what the student predicts; another than the teacher's is learned from the images first, for one stage",
        choices=PREDICTIONS,
    )
    steps: int = extra(
        64, "progressive: steps of the teacher at first, halved stage by stage until --to; max_steps is shared equally",
        low=2, high=10_000,
    )  # fmt: skip
    guidance_scale: float = extra(
        1.0,
        "progressive: the student learns what the teacher does with classifier-free guidance of this scale, in one "
        "evaluation a step; 1: without guidance",
        low=0,
        high=1e6,
    )
    max_q: int = extra(
        16, "consistency: the pairs of noise levels move together until they are 1/q apart; 2, 4, 8, ... up to this",
        low=2, high=4096,
    )  # fmt: skip
    q_steps: int = extra(0, "consistency: steps of each q; 0: max_steps shared equally", low=0)
    p_mean: float = extra(-1.1, "consistency: mean of log sigma, the noise level", low=-20, high=20)
    p_std: float = extra(2.0, "consistency: standard deviation of log sigma", low=0, high=20)

    def validate(self) -> None:
        if self.max_q & (self.max_q - 1):
            raise UserError(f"--max_q {self.max_q} must be a power of 2: q doubles from 2 on")
        if self.method == "progressive" and self.steps not in {self.to * 2**n for n in range(1, 32)}:
            possible = sorted((self.to * 2**n for n in range(1, 10)), key=lambda n: abs(n - self.steps))[0]
            raise UserError(
                f"--steps {self.steps} is not --to {self.to} doubled once or several times: the steps are halved stage "
                f"by stage, give --steps {possible} for example"
            )
        if self.method != "progressive" and self.guidance_scale != 1:
            raise UserError(f"--guidance_scale {self.guidance_scale} is for --method progressive, not {self.method}")


@dataclass(frozen=True, kw_only=True)
class DistillTrainConfig(TrainConfig):
    """Training loop."""

    ema_rate: str = with_default(TrainConfig, "ema_rate", "0.9993")
    ema_warmup: bool = with_default(TrainConfig, "ema_warmup", True)
    optimizer: str = with_default(TrainConfig, "optimizer", "radam")
    lr_schedule: str = with_default(TrainConfig, "lr_schedule", "linear")
    max_steps: int = with_default(TrainConfig, "max_steps", 10_000)
    save_interval: int = with_default(TrainConfig, "save_interval", 1000)

    def validate(self) -> None:
        super().validate()
        if self.schedule_sampler != "uniform":
            raise UserError(
                f"--schedule_sampler {self.schedule_sampler} is not for distillation: --method decides which noise "
                "levels are drawn, leave it out"
            )
        if not (self.max_steps or self.lr_anneal_steps):
            raise UserError(
                "--max_steps 0: a distillation has stages, whose lengths follow from its end: give a number"
            )
