"""What a method of distillation is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th

from ...config import UserError
from ...config.settings import ImageDistillation, SuperResDistillation
from ...respace import SpacedDiffusion
from ..hooks import Hook
from .teacher import Teacher


class Distillation:
    """A method: what TrainLoop trains the student on, in place of a diffusion.

    :param settings: of the run; the network and the diffusion are the student's.
    :param diffusion: the student's: the process that the teacher was trained on, and what the student predicts.
    :param teacher: the frozen teacher, whose network is loaded where a method first asks for it.
    Raises UserError for options that cannot work.
    """

    sampler: str  # the solver of the student
    grid = "auto"  # the timestep grid of its steps
    saved_copies = 0  # how many networks a checkpoint holds besides the model and its averages
    _heard = False

    def __init__(
        self, settings: ImageDistillation | SuperResDistillation, diffusion: SpacedDiffusion, teacher: Teacher
    ):  # fmt: skip
        self.settings, self.diffusion, self.teacher = settings, diffusion, teacher
        self.num_timesteps = diffusion.original_num_steps
        if settings.distill.to > self.num_timesteps:
            raise UserError(
                f"--to {settings.distill.to}: the teacher was trained with {self.num_timesteps} noise levels, give 1 "
                f"to {self.num_timesteps}"
            )

    @classmethod
    def keeps_teacher(cls, settings: ImageDistillation | SuperResDistillation) -> bool:
        """Whether the teacher's network is in memory while the student is trained."""
        return settings.distill.guidance_scale != 1

    def at_step(self, step: int) -> None:
        """The number of the step that follows, from 0. What changes on the way is a function of it.

        Raises UserError where what the step needs is missing. Collective.
        """

    def steps_after(self, done: int) -> int:
        """How many steps of the sampler the student takes after so many training steps."""
        return self.settings.distill.to

    def description(self, done: int | None = None) -> dict[str, Any]:
        """What the student's file says of it, besides what all files say.

        :param done: training steps; None: all.
        """
        options = self.settings.distill
        steps = options.to if done is None else self.steps_after(done)
        own = {"method": options.method, "sampler": self.sampler, "timestep_grid": self.grid, "steps": steps}
        return {"distilled": {**self.teacher.facts, **own}}

    def schedule_sampler(self) -> Any:
        """What draws the timesteps of a batch, whole or not: an object with ScheduleSampler.sample.

        It draws from numpy's generator, which is seeded for each step.
        """
        raise NotImplementedError

    def training_losses(
        self, model: Callable[..., th.Tensor], x_start: th.Tensor, t: th.Tensor,
        model_kwargs: dict[str, th.Tensor] | None = None, noise: th.Tensor | None = None,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """`loss` and other terms of each image, [N].

        All random numbers, but those of dropout, are in t and noise, which are drawn for the whole batch before it is
        split: so microbatches change memory use only.
        """
        raise NotImplementedError

    def heard(self, said: th.Tensor) -> th.Tensor:
        """What the teacher said. Raises UserError where it is not finite at first; later it waits for no device."""
        if not self._heard and not said.isfinite().all():
            train = self.settings.train
            remedy = "use another checkpoint" if train.precision == "fp32" else "give --precision fp32"
            raise UserError(
                f"the teacher {self.settings.distill.teacher} predicts numbers that are not finite (--precision "
                f"{train.precision}): {remedy}"
            )
        self._heard = True
        return said

    def hooks(self) -> Sequence[tuple[int, Hook]]:
        """What the loop calls every so many steps. One that has a name is saved with the checkpoints."""
        return []


class RandomState:
    """The state of torch's generators, of the CPU and of a device: what follows `restore` draws the same again."""

    def __init__(self, device: th.device):
        self.module = None if device.type in ("cpu", "meta") else th.get_device_module(device)
        self.of_cpu = th.default_generator.get_state()
        self.of_device = self.module.get_rng_state() if self.module else None

    def restore(self) -> None:
        """Go back to it."""
        th.default_generator.set_state(self.of_cpu)
        if self.module:
            self.module.set_rng_state(self.of_device)
