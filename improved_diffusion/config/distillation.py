"""Distillation options."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .base import Config, extra, with_default
from .messages import UserError
from .training import TrainConfig, WatchConfig
from .values import path_of

METHODS = ("consistency", "progressive")
# Options that one method alone has.
OF_METHOD = {"consistency": ("max_q", "q_steps", "p_mean", "p_std"), "progressive": ("steps",)}
PREDICTIONS = ("auto", "teacher", "eps", "x0", "v")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    """Distillation."""

    teacher: str = extra(
        "",
        "checkpoint of the model to distil, or its run's folder; a moving average is best. The network, batch_size, "
        "random_flip, labels and how images are read are as in its training, unless given",
        parse=path_of,
    )
    method: str = extra(
        "consistency",
        "consistency: images in a few steps that add noise again (consistency tuning, Geng et al. 2024); progressive: "
        "the teacher's images, from the same noise, in fewer steps of ddim (Salimans & Ho 2022)",
        choices=METHODS,
    )
    to: int = extra(4, "steps that the student is for: what sampling, previews and validation take", low=1, high=1000)
    student_prediction: str = extra(
        "auto",
        "what the student predicts; auto: v where the teacher predicts eps, which is too inexact for one step, else "
        "what the teacher predicts; another prediction than the teacher's is learned first, for one stage",
        choices=PREDICTIONS,
    )
    steps: int = extra(
        64, "progressive: steps of the teacher at first, halved stage by stage until --to; max_steps is shared equally",
        low=2, high=10_000,
    )  # fmt: skip
    guidance_scale: float = extra(
        1.0,
        "distil the teacher guided towards the class at this scale: one evaluation then does the work of two; 1: the "
        "teacher itself",
        low=0,
        high=100,
    )
    max_q: int = extra(
        16,
        "consistency: the pairs of noise levels move together until they are 1/q apart; q is 2, 4, 8, ... up to this, "
        "or as far as the training steps suffice",
        low=2, high=4096,
    )  # fmt: skip
    q_steps: int = extra(
        0, "consistency: steps of each q, the last one's go on to the end; 0: max_steps shared equally", low=0
    )
    p_mean: float = extra(0.5, "consistency: mean of log sigma, the noise level", low=-20, high=20)
    p_std: float = extra(2.0, "consistency: standard deviation of log sigma", low=0, high=20)

    def validate(self) -> None:
        self._refuse_other_methods()
        if self.max_q & (self.max_q - 1):
            raise UserError(f"--max_q {self.max_q} must be a power of 2: q doubles from 2 on")
        doubled = [self.to * 2**n for n in range(1, 15)]
        if self.method == "progressive" and self.steps not in doubled:
            nearest = min(doubled, key=lambda steps: abs(steps - self.steps))
            raise UserError(
                f"--steps {self.steps} is not --to {self.to} doubled once or several times: the steps are halved stage "
                f"by stage, give --steps {nearest} for example"
            )

    def _refuse_other_methods(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for method, names in OF_METHOD.items():
            for name in names if method != self.method else ():
                if getattr(self, name) != defaults[name]:
                    instead = f" or, for a student of {self.steps} steps, give --to {self.steps}"
                    raise UserError(
                        f"--{name} is for --method {method}, not {self.method}: leave it out"
                        + (instead if name == "steps" else "")
                    )


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


@dataclass(frozen=True, kw_only=True)
class DistillWatchConfig(WatchConfig):
    """Monitoring."""

    sample_interval: int = with_default(WatchConfig, "sample_interval", 500)
