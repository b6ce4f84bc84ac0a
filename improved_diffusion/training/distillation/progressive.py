"""Progressive distillation: the student learns to do in one step of DDIM what the teacher does in two, again and again.

Salimans & Ho 2022 (arXiv 2202.00512). Each stage halves the number of steps, and its student is the teacher of the next
one. All steps are deterministic: from the same noise, the student makes the image that the teacher makes.
A noise level is an angle: x_t = alpha x_0 + sigma eps, with alpha its cosine and sigma its sine; the image is at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th

from ... import distributed
from ...config import UserError
from ...gaussian_diffusion import _on_device
from ...logs import logger
from ...nn import mean_flat
from ...sampling.timestep_grids import timestep_grid
from ...schedules import sigma_at
from ...utils.text import counted
from ..hooks import Hook, TrainingView
from .levels import like, x0_of
from .objective import Distillation
from .teacher import Teacher, prediction_of


class Stage(NamedTuple):
    """A stage of the distillation.

    :param number: from 0.
    :param steps: of the student; its teacher takes twice as many.
    :param first, end: it is trained in the steps from `first` until before `end`.
    """

    number: int
    steps: int
    first: int
    end: int


def stages_of(steps: int, to: int, converts: bool, total: int) -> list[Stage]:
    """The stages from a teacher of `steps` steps to a student of `to`, which share `total` training steps.

    :param converts: whether the student learns another prediction: it does so in the first stage, which is then three
        times as long as each of the others.
    """
    counts = [to << n for n in reversed(range((steps // to).bit_length() - 1))]
    shares = [3.0 if converts else 1.0] + [1.0] * (len(counts) - 1)
    ends = [round(end) for end in total * np.cumsum([0.0, *shares]) / sum(shares)]
    return [Stage(n, count, ends[n], ends[n + 1]) for n, count in enumerate(counts)]


def levels_of(steps: int, to: int, alpha_bar: np.ndarray, grid: str) -> np.ndarray:
    """The timesteps that the teacher's `steps` steps start from, float64 [steps], ascending; the last step ends at -1,
    which is the image.

    Every (steps / to)-th is one of `grid`, for the student's `to` steps. The others divide the way from one of these to
    the next, or to -1, evenly: they need not be whole. On the grid "trailing", where `to` divides T, they are
    T k / steps - 1 for k = 1 ... steps, which are the paper's times k / steps.
    :param alpha_bar: [T], of the process that the teacher was trained on.
    Raises UserError for more steps than it has noise levels.
    """
    ends = np.append(-1.0, timestep_grid(grid, to, alpha_bar))
    levels = np.interp(np.arange(1, steps + 1) * to / steps, np.arange(to + 1), ends)
    if levels[0] < 0:
        raise UserError(f"--steps {steps} are too many for a teacher with {len(alpha_bar)} noise levels: give fewer")
    return levels


class StageLevels:
    """The noise levels of a stage. All arrays are float64 [N], for the N steps of the student.

    :param levels: see `levels_of`; :param alpha_bar: [T], of the process that these are timesteps of.
    """

    def __init__(self, stage: Stage, levels: np.ndarray, alpha_bar: np.ndarray):
        stride = len(levels) // stage.steps
        self.t = levels[stride - 1 :: stride]  # where the student's steps start
        self.middle = levels[stride // 2 - 1 :: stride]  # where the teacher's second ones do
        self.angle, self.middle_angle = (np.arctan(sigma_at(alpha_bar, t)) for t in (self.t, self.middle))
        end = np.append(0.0, self.angle[:-1])
        # Two steps of DDIM, by the predictions x1 and x2 of x_0, end where one does by x1 + share (x2 - x1): alg. 2 for
        # angles, where alpha of one times sigma of another minus the reverse is the sine of their difference.
        self.share = np.sin(self.middle_angle - end) / np.sin(self.angle - end)
        self.share *= np.sin(self.angle) / np.sin(self.middle_angle)

    def index_of(self, t: th.Tensor) -> th.Tensor:
        """The numbers [N] of the student's steps that start at timesteps [N]."""
        return th.searchsorted(_on_device(self.t, t.device), t.float()).clamp(max=len(self.t) - 1)


class Progressive(Distillation):
    """Progressive distillation. The student predicts x_0 or v."""

    sampler, grid = "ddim", "trailing"
    saved_copies = 1  # the teacher of the present stage

    def __init__(self, settings, diffusion, teacher):
        super().__init__(settings, diffusion, teacher)
        options, train = settings.distill, settings.train
        if prediction_of(settings.diffusion) == "eps":
            raise UserError(
                "--method progressive is for students that predict v or x0: nearly all of x is noise where a long step "
                "starts, and a small error of the noise is a large one of the image. Give --student_prediction v"
            )
        total = train.max_steps or train.lr_anneal_steps
        converts = prediction_of(settings.diffusion) != teacher.prediction
        self.stages = stages_of(options.steps, options.to, converts, total)
        if min(stage.end - stage.first for stage in self.stages) == 0:
            raise UserError(f"--max_steps {total} are too few for {len(self.stages)} stages: give more")
        if train.lr_anneal_steps not in (0, total):
            raise UserError(
                f"--lr_anneal_steps {train.lr_anneal_steps}: the learning rate falls to 0 in each stage, leave it out"
            )
        self.all_levels = levels_of(options.steps, options.to, diffusion.base_alphas_cumprod, self.grid)
        self.predecessor = Predecessor(self.stages, teacher)
        self._begin(self.stages[0])
        plan = ", ".join(f"{stage.steps} in {stage.end - stage.first:,}" for stage in self.stages)
        logger.log(f"from {options.steps} steps of {self.sampler} to (in training steps): {plan}")

    @property
    def restarts(self) -> Sequence[int]:
        """The training steps at which the optimizer, the averages and the learning rate's schedule begin anew."""
        return [stage.first for stage in self.stages[1:]]

    @classmethod
    def keeps_teacher(cls, settings) -> bool:
        return True

    def stage_at(self, step: int) -> Stage:
        """The stage of a training step, from 0; the last one for what follows it."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])

    def steps_after(self, done: int) -> int:
        return self.stage_at(done - 1).steps

    def at_step(self, step: int) -> None:
        stage = self.stage_at(step)
        if not self.settings.train.dry_run:  # which restores nothing
            self.predecessor.check(stage)
        if stage.number == 0:
            _ = self.teacher.guided  # loaded, or refused, before the step
        if stage != self.stage:
            self._begin(stage)

    def _begin(self, stage: Stage) -> None:
        self.stage = stage
        self.levels = StageLevels(stage, self.all_levels, self.diffusion.base_alphas_cumprod)

    def schedule_sampler(self) -> Progressive:
        return self

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """(t, weight), both float32 [batch_size]: levels of the stage, and 1. Draws from numpy's generator."""
        t = self.levels.t[np.random.randint(self.stage.steps, size=batch_size)]
        return distributed.to_device(th.from_numpy(t).float(), device), th.ones(batch_size, device=device)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """`loss`, max(1, SNR) (x_0 - target)^2 (sec. 4), and `mse`, the same without weight; both per pixel."""
        if noise is None:
            noise = th.randn_like(x_start)
        index = self.levels.index_of(t)
        t, angle = (_on_device(array, t.device)[index] for array in (self.levels.t, self.levels.angle))
        x = like(angle.cos(), noise) * x_start + like(angle.sin(), noise) * noise
        target = self.target(x, index, model_kwargs or {})
        output = model(x, self.diffusion.network_timestep(t), **(model_kwargs or {}))
        mse = mean_flat((x0_of(self.diffusion.model_mean_type, output, x, angle) - target) ** 2)
        return {"loss": (angle.tan() ** -2).clamp(min=1) * mse, "mse": mse}

    @th.no_grad()
    def target(self, x: th.Tensor, index: th.Tensor, model_kwargs: Mapping[str, th.Tensor]) -> th.Tensor:
        """The x_0 by which one step of DDIM from x [N, C, ...] ends where the teacher's steps do.

        :param index: [N], the numbers of the student's steps.
        """
        if x.device.type == "meta":  # the student's arithmetic is counted, not the teacher's
            return x

        def at(array: np.ndarray) -> th.Tensor:
            return _on_device(array, x.device)[index]

        angle, middle = at(self.levels.angle), at(self.levels.middle_angle)
        first = self.predict(x, at(self.levels.t), angle, model_kwargs)
        eps = (x - like(angle.cos(), x) * first) / like(angle.sin(), x)
        x = like(middle.cos(), x) * first + like(middle.sin(), x) * eps
        second = self.predict(x, at(self.levels.middle), middle, model_kwargs)
        return self.heard(th.lerp(first, second, like(at(self.levels.share), x)))

    def predict(
        self, x: th.Tensor, t: th.Tensor, angle: th.Tensor, model_kwargs: Mapping[str, th.Tensor]
    ) -> th.Tensor:  # fmt: skip
        """The teacher's x_0 at timesteps t [N] with these angles, clipped as in sampling."""
        # Without the clipping, small errors of a network that predicts the noise would be all of the first target.
        first = self.stage.number == 0
        network = self.teacher.guided if first else self.teacher.module
        kind = (self.teacher.diffusion if first else self.diffusion).model_mean_type
        output = network(x, self.diffusion.network_timestep(t), **model_kwargs)
        return x0_of(kind, output, x, angle).clamp(-1, 1)

    def hooks(self) -> Sequence[tuple[int, Hook]]:
        return [(1, self.predecessor)]


class Predecessor:
    """The student of the stage before, as the teacher of a stage: a hook that is saved with the checkpoints."""

    name = "predecessor"

    def __init__(self, stages: Sequence[Stage], teacher: Teacher):
        self.stages, self.teacher = stages, teacher
        self.teaches = 0  # the stage whose teacher `teacher.module` is

    def __call__(self, view: TrainingView) -> None:
        for stage in self.stages:
            if stage.end == view.absolute_step + 1:
                self._end(stage, view)

    def _end(self, stage: Stage, view: TrainingView) -> None:
        done = f"stage {stage.number + 1} of {len(self.stages)} ends after {stage.end:,} training steps"
        logger.log(f"{done}: the student samples in {counted(stage.steps, 'step')}")
        if stage != self.stages[-1]:
            with view.using(view.parameter_sets[""]):
                self.teacher.module.load_state_dict(view.model.state_dict())
            self.teaches = stage.number + 1

    def check(self, stage: Stage) -> None:
        """Raise UserError where the teacher of a stage is not there."""
        if self.teaches != stage.number:
            raise UserError(
                f"the teacher of stage {stage.number + 1}, the student of stage {stage.number}, is not in the "
                "checkpoint that the run continues from: --resume from one with its opt*.pt, or begin anew in another "
                "--out_dir"
            )

    def state_dict(self) -> dict[str, Any]:
        weights = self.teacher.module.state_dict() if self.teaches else {}
        return {"ends": [stage.end for stage in self.stages], "teaches": self.teaches, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises UserError where the stages had other ends."""
        if state["ends"] != [stage.end for stage in self.stages]:
            raise UserError(
                f"--max_steps {self.stages[-1].end} moves the ends of the stages: continue with --max_steps "
                f"{state['ends'][-1]}, or begin anew in another --out_dir"
            )
        self.teaches = state["teaches"]
        if self.teaches:
            self.teacher.module.load_state_dict(state["weights"])
