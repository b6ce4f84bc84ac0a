"""The teacher of a distillation: its options, its weights, and which file it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch as th

from ... import distributed
from ...checkpoints import checkpoint
from ...checkpoints.averages import warn_of_initial_weights
from ...checkpoints.loading import (
    MODEL_OPTIONS,
    READING_OPTIONS,
    kind_of,
    read,
    read_kind,
    refuse_contradictions,
    take_options,
)
from ...config import KINDS, DiffusionConfig, UserError
from ...config.messages import naming
from ...config.settings import (
    TAKEN_FROM_TEACHER,
    Distilling,
    ImageDistillation,
    ImageModel,
    SuperResDistillation,
)
from ...logs import logger
from ...models.build import build_diffusion, build_model
from ...respace import SpacedDiffusion
from ...sampling.guidance import ClassifierFreeGuidance
from ...sampling.guided import to_device
from ...sampling.request import model_name
from ...utils import files
from ...utils.outline import outline

Settings = ImageDistillation | SuperResDistillation

# What a method has for a default, rather than that of distillation: here, since each stage begins with a new optimizer,
# and RAdam's first steps are short.
_DEFAULTS = {"progressive": {"optimizer": "adamw"}}
# What decides the student and cannot change while it is trained.
_KEPT = ("method", "steps", "to", "student_prediction", "guidance_scale")


def prediction_of(diffusion: DiffusionConfig) -> str:
    """What a network of these options predicts: eps, x0 or v."""
    return "v" if diffusion.predict_v else "x0" if diffusion.predict_xstart else "eps"


class Teacher:
    """The frozen teacher of a run.

    :param settings: of the run, whose network is the student's and the teacher's alike.
    :param facts: what the description of the student says of it.
    """

    def __init__(self, settings: Settings, facts: Mapping[str, Any]):
        self.settings, self.facts = settings, facts

    @property
    def prediction(self) -> str:
        """What it predicts: eps, x0 or v."""
        return self.facts["teacher_prediction"]

    @cached_property
    def diffusion(self) -> SpacedDiffusion:
        """The teacher's diffusion, on all timesteps."""
        return build_diffusion(with_prediction(self.settings, self.prediction).diffusion)

    @cached_property
    def module(self) -> th.nn.Module:
        """A network of the teacher's form, without its weights: on the device, in the run's precision and eval mode,
        without gradients."""
        with th.random.fork_rng(devices=[]):  # where a step makes it, the step draws the same
            network = build_model(self.settings.model, self.settings.diffusion.learn_sigma)
        return to_device(network, self.settings.train.precision).eval().requires_grad_(False)

    @cached_property
    def network(self) -> th.nn.Module:
        """`module` with the teacher's weights. Collective where it is first used.

        Raises UserError where the file is gone, or is another one than the run began with.
        """
        path = self.settings.distill.teacher
        if distributed.from_rank0(_sha256, path) != self.facts["teacher_sha256"]:
            raise UserError(f"{path} has changed since the distillation began: bring the teacher back, or begin anew")
        checkpoint.load_into(self.module, checkpoint.load(path)[0], path)
        return self.module

    @cached_property
    def guided(self) -> th.nn.Module:
        """`network`, guided by itself with its class hidden where --guidance_scale says so."""
        scale = self.settings.distill.guidance_scale
        return self.network if scale == 1 else ClassifierFreeGuidance(self.network, scale)


def _sha256(path: str) -> str:
    """The SHA-256 of the teacher's file. Raises UserError where it is gone."""
    if not files.exists(path):
        raise UserError(f"the teacher {path} does not exist: bring it back, or name where it is now by --teacher")
    return files.sha256(path)


def chosen_prediction(option: str, teacher: str) -> str:
    """What the student predicts by --student_prediction, of a teacher that predicts eps, x0 or v."""
    if option == "auto":
        return "v" if teacher == "eps" else teacher
    return teacher if option == "teacher" else option


def with_prediction(settings: Settings, prediction: str) -> Settings:
    """The settings of a network that predicts eps, x0 or v."""
    return settings.replace(predict_v=prediction == "v", predict_xstart=prediction == "x0")


# Starting


def take_teacher(settings: Distilling, given: frozenset[str]) -> tuple[Settings, dict[str, Any]]:
    """(the settings of a new student, its teacher's description with the facts of the distillation). Collective.

    The student starts from the teacher's weights, unless --init_checkpoint names others. Raises UserError for a file
    that is no such model, and for an option that contradicts it.
    """
    found = read(settings.distill.teacher, "--teacher")
    path, state_dict, metadata = found
    warn_of_initial_weights(path, metadata)
    kind = ImageDistillation if read_kind(path, found) is ImageModel else SuperResDistillation
    mine = of_kind(settings, kind, given, path)
    taken = [name for name in TAKEN_FROM_TEACHER if name != "total_batch_size" or "batch_size" not in given]
    mine = take_options(mine, given, path, state_dict, metadata, [*MODEL_OPTIONS, *READING_OPTIONS, *taken])
    prediction = prediction_of(mine.diffusion)
    if mine.distill.guidance_scale != 1:
        mine = _guided(mine, given, path, metadata.get("config", {}).get("label_drop", mine.model.label_drop))
    chosen = chosen_prediction(mine.distill.student_prediction, prediction)
    if chosen != prediction:
        with naming(f"--student_prediction {chosen}, for {path}"):
            mine = with_prediction(mine, chosen)
    defaults = _DEFAULTS.get(mine.distill.method, {})
    mine = mine.replace(**{name: value for name, value in defaults.items() if name not in given})
    start = _checked_start(mine) if mine.train.init_checkpoint else path
    logger.log(f"teacher: {path}")
    _warn_of_unfit_teacher(mine, path, metadata)
    # A respacing of the teacher's would win over the student's own steps.
    mine = mine.replace(teacher=path, timestep_respacing="", init_checkpoint=start, student_prediction=chosen)
    facts = {
        "teacher": model_name(path),
        "teacher_sha256": distributed.from_rank0(files.sha256, path),
        "teacher_prediction": prediction,
    }
    return mine, {**metadata, "distilled": facts}


def _checked_start(settings: Settings) -> str:
    """The file of --init_checkpoint. Raises UserError unless its network is the student's. Collective."""
    path, state_dict, _ = read(settings.train.init_checkpoint, "--init_checkpoint")
    with outline():
        network = build_model(settings.model, settings.diffusion.learn_sigma)
    checkpoint.check_fits(network, state_dict, f"--init_checkpoint {path}")
    return path


def _warn_of_unfit_teacher(settings: Settings, path: str, metadata: Mapping[str, Any]) -> None:
    """Warn of a teacher that does not know all noise levels at which it is asked."""
    options, student = settings.distill, metadata.get("distilled")
    if settings.diffusion.timestep_respacing:
        logger.warn(
            f"{path} was trained with --timestep_respacing {settings.diffusion.timestep_respacing}, on a part of its "
            "timesteps: what it predicts at the others may be no good"
        )
    if options.method == "progressive" and student and student["method"] != "progressive":
        logger.warn(
            f"{path} is a student of {student['method']} tuning, which has not learned the steps of ddim: distil its "
            f"own teacher, {student.get('teacher', 'which it names')}, for better results"
        )
    elif options.method == "progressive" and student and student["steps"] != options.steps:
        logger.warn(
            f"{path} is a student for {student['steps']} steps, and may be no good at others: --steps "
            f"{student['steps']} goes on from there"
        )


def of_kind(settings: Distilling, kind: type[Settings], given: frozenset[str], path: str) -> Settings:
    """The settings of distilling a model of the given kind. Raises UserError for an option that is not for it.

    :param path: of the file that decides the kind.
    """
    if settings.diffusion.timestep_respacing:
        raise UserError(
            f"--timestep_respacing {settings.diffusion.timestep_respacing} is not for distillation: --to says how many "
            "steps the student is for, leave it out"
        )
    for name in sorted(given - kind.options().keys()):
        raise UserError(f"--{name} is not for {path}, which is {KINDS[kind_of(kind.options())][0]}: leave it out")
    return kind.of({name: value for name, value in settings.values().items() if name in kind.options()})


def _guided(settings: Settings, given: frozenset[str], path: str, label_drop: float) -> Settings:
    """The settings for a guided teacher, whose student needs no guidance: it does not learn to do without the class.

    :param label_drop: of the teacher's training.
    Raises UserError for a teacher that cannot be guided.
    """
    flag = f"--guidance_scale {settings.distill.guidance_scale}"
    if not settings.model.class_cond:
        raise UserError(f"{flag}: {path} has no classes to guide it towards: leave the flag out")
    if not label_drop:
        raise UserError(
            f"{flag}: {path} was never trained with its class hidden (--label_drop 0.1), which guidance needs"
        )
    return settings if "label_drop" in given else settings.replace(label_drop=0.0)


# Resuming


def resume_student(
    settings: Distilling, given: frozenset[str], path: str, metadata: Mapping[str, Any]
) -> Settings:  # fmt: skip
    """The settings for the student of a checkpoint. Collective.

    Raises UserError for one that is not a student's, and for another teacher or method than it has.
    """
    facts, stored = metadata.get("distilled"), metadata.get("config", {})
    if not facts:
        raise UserError(f"{path} is not from a distillation: give --teacher {path} to distil it, in another --out_dir")
    if "teacher" in given:
        teacher = read(settings.distill.teacher, "--teacher")[0]
        if distributed.from_rank0(files.sha256, teacher) != facts["teacher_sha256"]:
            raise UserError(
                f"--teacher {teacher} is not the teacher of {path}, {facts['teacher']} (its SHA-256 begins with "
                f"{facts['teacher_sha256'][:8]}): leave the flag out, or choose another --out_dir"
            )
        settings = settings.replace(teacher=teacher)
    chosen = chosen_prediction(settings.distill.student_prediction, facts["teacher_prediction"])
    settings = settings.replace(student_prediction=chosen)
    refuse_contradictions(settings.values(), given, path, stored, _KEPT)
    kind = SuperResDistillation if kind_of(stored) == "super_res" else ImageDistillation
    return of_kind(settings, kind, given, path)
