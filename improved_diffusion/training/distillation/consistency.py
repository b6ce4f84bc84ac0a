"""Consistency tuning: the student learns to reach the end of the probability flow from anywhere on it.

ECT is Geng et al. 2024 (arXiv 2406.14548); consistency models are Song et al. 2023 (arXiv 2303.01469). Their
f(x, sigma) is the predicted x_0, which at sigma = 0 is x itself. Of two points x_0 + sigma e and x_0 + r e on a line,
r < sigma, f of the noisier one is to be what f of the other one is now. All sigma are EDM's, sigma / alpha of ours, for
images in [-1, 1], whose standard deviation EDM takes as 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th

from ... import distributed
from ...config import UserError, height_width
from ...logs import logger
from ...respace import SpacedDiffusion
from ...sampling.timestep_grids import SIGMA_MAX, side_of
from ...utils.text import counted
from .levels import NoiseLevels, like, x0_of
from .objective import Distillation, RandomState
from .teacher import Settings, prediction_of

FIRST_GUIDED_Q = 8  # below, r is 0 for all but the largest sigma, and a single step of a solver is too long
_OF_STAGES = ("max_steps", "lr_anneal_steps", "max_q", "q_steps")  # options that decide where the stages end


def qs_of(settings: Settings, teacher: str) -> list[int]:
    """q of each stage. At q = 1 every r is 0: the student learns to denoise, which a new prediction needs first.

    :param teacher: what it predicts: eps, x0 or v.
    """
    options = settings.distill
    first = 2 if options.guidance_scale == 1 else FIRST_GUIDED_Q
    tuned = [2**n for n in range(int(math.log2(first)), int(math.log2(options.max_q)) + 1)]
    return tuned if prediction_of(settings.diffusion) == teacher else [1, *tuned]


def stage_length_of(settings: Settings, teacher: str) -> int:
    """The training steps of each stage; the last one goes on to the end. :param teacher: what it predicts."""
    train = settings.train
    total = train.max_steps or train.lr_anneal_steps
    return settings.distill.q_steps or math.ceil(total / len(qs_of(settings, teacher)))


def keep_stages(settings: Settings, given: frozenset[str], metadata: Mapping[str, Any]) -> Settings:
    """The settings of a resumed run, with the stages of its checkpoint: more steps of training prolong the last one.

    :param given: the options that the user gave: --q_steps moves the stages.
    :param metadata: the checkpoint's description.
    """
    if settings.distill.method != "consistency" or "q_steps" in given:
        return settings
    stored, teacher = metadata["config"], metadata["distilled"]["teacher_prediction"]
    before = settings.replace(**{name: stored[name] for name in _OF_STAGES if name in stored})
    length = stage_length_of(before, teacher)
    return settings if length == stage_length_of(settings, teacher) else settings.replace(q_steps=length)


class LogNormalLevels:
    """Timesteps whose noise level has a normal logarithm (Karras et al. 2022, table 1).

    :param mean, std: of log sigma.
    :param largest: the noise level above which none is drawn; none is drawn outside of the trained ones either.
    """

    def __init__(self, levels: NoiseLevels, mean: float, std: float, largest: float):
        self.levels, self.mean, self.std = levels, mean, std
        low, high = levels.range()
        self.bounds = low, min(high, largest)

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """(t, weight), both float32 [batch_size]: timesteps, rarely whole, and 1. Draws from numpy's generator."""
        sigma = np.exp(np.random.normal(self.mean, self.std, batch_size)).clip(*self.bounds)
        t = th.from_numpy(self.levels.timesteps_of(sigma)).float()
        return distributed.to_device(t, device), th.ones(batch_size, device=device)


class Consistency(Distillation):
    """Consistency tuning. The student starts as the teacher, which is not needed any more unless it is guided."""

    sampler = "renoise"

    def __init__(self, settings, diffusion, teacher):
        super().__init__(settings, diffusion, teacher)
        speed, dropout, options = settings.speed, settings.model.dropout, settings.distill
        if dropout and (speed.compile != "off" or speed.cuda_graphs):
            raise UserError(
                f"--dropout {dropout}, given or the teacher's, has other masks in the second evaluation with --compile "
                "or --cuda_graphs: leave these out, or give --dropout 0"
            )
        self.levels = NoiseLevels(diffusion.base_alphas_cumprod)
        self.least, _ = self.levels.range()
        if options.guidance_scale != 1 and options.max_q < FIRST_GUIDED_Q:
            raise UserError(
                f"--max_q {options.max_q} is too small for --guidance_scale {options.guidance_scale}: the stages of a "
                f"guided teacher begin at q = {FIRST_GUIDED_Q}, give that or more"
            )
        self.guided = teacher.guided if self.keeps_teacher(settings) else None
        self.at_step(0)
        self._log_stages()

    def schedule_sampler(self) -> LogNormalLevels:
        options = self.settings.distill
        side = side_of(*height_width(self.settings.model.size))
        largest = SIGMA_MAX * max(1.0, side / 64)  # beyond, no image shows through
        return LogNormalLevels(self.levels, options.p_mean, options.p_std, largest)

    @property
    def qs(self) -> list[int]:
        """q of each stage."""
        return qs_of(self.settings, self.teacher.prediction)

    @property
    def stage_length(self) -> int:
        """The training steps of each stage; the last one goes on to the end."""
        return stage_length_of(self.settings, self.teacher.prediction)

    def _log_stages(self) -> None:
        """Log the stages that the training steps suffice for."""
        total = self.settings.train.max_steps or self.settings.train.lr_anneal_steps
        firsts = range(0, total, self.stage_length)[: len(self.qs)]
        ends = [*firsts[1:], total]
        reached = [f"{q} in {end - first:,}" for q, first, end in zip(self.qs, firsts, ends)]
        logger.log(f"q (in training steps): {', '.join(reached)}")
        if len(reached) < len(self.qs):
            logger.warn(
                f"the run of {counted(total, 'step')} ends at q = {self.qs[len(reached) - 1]}, before --max_q "
                f"{self.qs[-1]}: more --max_steps or fewer --q_steps lead further"
            )

    def at_step(self, step: int) -> None:
        self.q = self.qs[min(step // self.stage_length, len(self.qs) - 1)]

    def next_sigma(self, sigma: th.Tensor) -> th.Tensor:
        """r of each sigma (Geng et al. 2024, sec. 3.2), 0 instead of a level below those that the model was trained on.

        There f is known, x_0; a network that predicts x_0 would otherwise learn from itself alone, and collapse.
        """
        n = 1 + 8 * th.sigmoid(-sigma)
        r = sigma * (1 - n / self.q)
        return th.where(r < self.least, 0, r)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """`loss`, ||f(x_sigma) - f(x_r)|| / (sigma - r), and `distance`, the same without weight; both per pixel."""
        if noise is None:
            noise = th.randn_like(x_start)
        sigma = self.levels.angle_at(t).tan()
        r = self.next_sigma(sigma)
        x = x_start + like(sigma, noise) * noise
        with th.no_grad():
            nearer = self.nearer(x, x_start, noise, sigma, r, model_kwargs)
        random = RandomState(x.device)
        x0 = self.predict(model, self.diffusion, x, sigma, model_kwargs)
        random.restore()  # the same dropout in both
        with th.no_grad():
            target = self.predict(model, self.diffusion, nearer, r, model_kwargs)
        target = th.where(like(r > 0, x), target, nearer)
        distance = th.linalg.vector_norm((x0 - target).flatten(1), dim=1) / math.sqrt(x[0].numel())
        return {"loss": distance / (sigma - r), "distance": distance}

    def nearer(
        self, x: th.Tensor, x_start: th.Tensor, noise: th.Tensor, sigma: th.Tensor, r: th.Tensor, model_kwargs: Any
    ) -> th.Tensor:
        """x_r, nearer to the image than x = x_start + sigma noise: on the same line, whose mean direction is the
        probability flow's; for a guided teacher a step of Heun's along its flow (Luo et al. 2023, arXiv 2310.04378)."""
        if self.guided is None:
            return x_start + like(r, noise) * noise
        if x.device.type == "meta":  # the student's arithmetic is counted, not the teacher's
            return x
        step = like(r - sigma, x)
        slope = (x - self.predict(self.guided, self.teacher.diffusion, x, sigma, model_kwargs)) / like(sigma, x)
        euler = x + step * slope
        after = (euler - self.predict(self.guided, self.teacher.diffusion, euler, r, model_kwargs)) / like(r, x)
        return self.heard(th.where(like(r > 0, x), x + step * (slope + after) / 2, euler))

    def predict(
        self, model: Callable[..., th.Tensor], diffusion: SpacedDiffusion, x: th.Tensor, sigma: th.Tensor,
        model_kwargs: dict[str, th.Tensor] | None,
    ) -> th.Tensor:  # fmt: skip
        """The predicted x_0 of x = x_0 + sigma e [N, C, ...] by a model; sigma [N]."""
        angle = sigma.atan()
        x = like(angle.cos(), x) * x
        output = model(x, diffusion.network_timestep(self.levels.timestep_at(angle)), **(model_kwargs or {}))
        return x0_of(diffusion.model_mean_type, output, x, angle)
