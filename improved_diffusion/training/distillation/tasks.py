"""What distillation trains: a student of an image model or of a super-resolution model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import UserError
from ...data.dataset import ImageDataset
from ...data.stream import BatchStream
from ...models.build import build_diffusion
from ...sampling.sampler import Sampler
from ..tasks import Hooks, ImageTask, SuperResTask, Task
from .consistency import Consistency
from .objective import Distillation
from .progressive import Progressive
from .teacher import Teacher
from .watching import FewStepGrid, FewStepValidation, few_steps

METHODS: dict[str, type[Distillation]] = {"consistency": Consistency, "progressive": Progressive}


class DistillationTask(Task):
    """A student. Mixed into the task of what its teacher was trained for."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the description of the student says of its teacher."""
        return self.metadata["distilled"]

    def objective(self) -> Distillation:
        method = METHODS[self.settings.distill.method]
        teacher = Teacher(self.settings, self.facts)
        return method(self.settings, build_diffusion(self.settings.diffusion), teacher)

    def schedule_sampler(self, objective: Distillation) -> Any:
        return objective.schedule_sampler()

    def description(self, objective: Distillation) -> dict[str, Any]:
        return objective.description()

    def frozen_copies(self) -> int:
        return int(METHODS[self.settings.distill.method].keeps_teacher(self.settings))

    def held_out(self, objective: Distillation, dataset: ImageDataset, **options: Any) -> FewStepValidation:
        return FewStepValidation(objective, dataset, sampler=self._few_steps(objective), **options)

    def preview(self, objective: Distillation, *arguments: Any) -> FewStepGrid:
        return FewStepGrid(self._few_steps(objective), *arguments)

    def _few_steps(self, objective: Distillation) -> Sampler:
        return few_steps(self.settings, objective.diffusion, objective.sampler, objective.grid)

    def hooks(self, objective: Distillation, data: BatchStream) -> Hooks:
        if self.settings.watch.loss_floor:
            raise UserError("--loss_floor: what a distillation minimises has no such floor: leave it out")
        return [*objective.hooks(), *super().hooks(objective, data)]


class ImageDistillationTask(DistillationTask, ImageTask):
    """A student of an image model."""


class SuperResDistillationTask(DistillationTask, SuperResTask):
    """A student of a super-resolution model."""
