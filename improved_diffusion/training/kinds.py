"""Which task a run's settings are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.settings import (
    ClassifierTraining,
    ImageDistillation,
    ImageTraining,
    SuperResDistillation,
    SuperResTraining,
    Training,
)
from .distillation.tasks import ImageDistillationTask, SuperResDistillationTask
from .tasks import ClassifierTask, ImageTask, SuperResTask, Task

_TASKS: dict[type[Training], type[Task]] = {
    ImageTraining: ImageTask,
    SuperResTraining: SuperResTask,
    ClassifierTraining: ClassifierTask,
    ImageDistillation: ImageDistillationTask,
    SuperResDistillation: SuperResDistillationTask,
}


def task_of(settings: Training, metadata: Mapping[str, Any] | None = None) -> Task:
    """The task of a run's settings; see Task."""
    return _TASKS[type(settings)](settings, metadata)
